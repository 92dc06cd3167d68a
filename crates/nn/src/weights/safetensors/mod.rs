//! Safetensors: a JSON header of names, types, shapes and offsets, then the bytes. One file here;
//! [`HfWeights`] shows a whole Hugging Face folder as one source.
//!
//! Format: <https://huggingface.co/docs/safetensors>. A file whose tensors overlap, leave holes, or
//! reach beyond the end is refused.

mod folder;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

pub use folder::HfWeights;

use super::WeightsError;
use super::storage::Storage;

/// The longest header accepted, in bytes; the reference implementation has the same limit.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes before the header: its length.
const PREFIX: usize = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The element type as the file spells it, e.g. `BF16`.
    pub dtype: String,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: usize,
    /// How many bytes it takes.
    pub bytes: usize,
}

/// An opened safetensors file.
#[derive(Debug)]
pub struct Safetensors {
    file: PathBuf,
    storage: Storage,
    data_start: usize,
    metadata: BTreeMap<String, String>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl Safetensors {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// Whatever in the file cannot be true: see [`WeightsError`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::parse(path, Storage::map(path)?)
    }

    /// Reads a file from memory; `file` only names it in errors.
    ///
    /// # Errors
    /// As [`Safetensors::open`].
    pub fn from_bytes(file: &Path, bytes: Vec<u8>) -> Result<Self, WeightsError> {
        Self::parse(file, Storage::Owned(bytes))
    }

    fn parse(file: &Path, storage: Storage) -> Result<Self, WeightsError> {
        let bytes = storage.bytes();
        let truncated = |place: &str, found: u64, expected: u64| WeightsError::Truncated {
            file: file.to_path_buf(),
            place: place.into(),
            found,
            expected,
        };
        let malformed = |place: String, found: String, expected: String| WeightsError::Malformed {
            file: file.to_path_buf(),
            place,
            found,
            expected,
        };
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
            return Err(truncated(
                "the header's length",
                bytes.len() as u64,
                PREFIX as u64,
            ));
        };
        let length = u64::from_le_bytes(*prefix);
        if length > MAX_HEADER {
            return Err(malformed(
                "the header's length".into(),
                format!("{length} bytes"),
                format!("at most {MAX_HEADER} (is this a safetensors file?)"),
            ));
        }
        if length > rest.len() as u64 {
            return Err(truncated("the header", rest.len() as u64, length));
        }
        let (json, data) = rest.split_at(length as usize);
        let data_start = PREFIX + json.len();
        let header: Header = serde_json::from_slice(json).map_err(|error| {
            malformed(
                "the header".into(),
                error.to_string(),
                "a JSON object of tensors".into(),
            )
        })?;
        let mut tensors = Vec::with_capacity(header.tensors.len());
        let mut index = HashMap::with_capacity(header.tensors.len());
        for (name, entry) in header.tensors {
            let place = || format!("tensor `{name}`");
            let Some(bits) = dtype_bits(&entry.dtype) else {
                return Err(WeightsError::Unsupported {
                    file: file.to_path_buf(),
                    place: place(),
                    found: format!("element type `{}`", entry.dtype),
                    expected: DTYPES.iter().map(|d| d.0).collect::<Vec<_>>().join(", "),
                });
            };
            let (begin, end) = entry.data_offsets;
            if begin > end || end > data.len() as u64 {
                return Err(malformed(
                    place(),
                    format!("data offsets {begin} to {end}"),
                    format!("a range within the {} bytes of data", data.len()),
                ));
            }
            let bytes = entry
                .shape
                .iter()
                .try_fold(1u64, |product, &size| product.checked_mul(size))
                .and_then(|elements| elements.checked_mul(bits))
                .filter(|bits| bits % 8 == 0)
                .map(|bits| bits / 8);
            if bytes != Some(end - begin) {
                return Err(malformed(
                    place(),
                    format!("{} bytes of data", end - begin),
                    format!("those of shape {:?} in {}", entry.shape, entry.dtype),
                ));
            }
            if index.insert(name.clone(), tensors.len()).is_some() {
                return Err(malformed(
                    place(),
                    "it twice".into(),
                    "each name once".into(),
                ));
            }
            let shape: Option<Vec<usize>> = entry
                .shape
                .iter()
                .map(|&s| usize::try_from(s).ok())
                .collect();
            let Some(shape) = shape else {
                return Err(malformed(
                    place(),
                    format!("shape {:?}", entry.shape),
                    "sizes that fit in memory".into(),
                ));
            };
            tensors.push(TensorInfo {
                dtype: entry.dtype,
                shape,
                offset: data_start + begin as usize,
                bytes: (end - begin) as usize,
                name,
            });
        }
        // The tensors must tile the data: no overlap, no hole, nothing after the last.
        let mut order: Vec<&TensorInfo> = tensors.iter().collect();
        order.sort_by_key(|t| (t.offset, t.bytes));
        let mut free = data_start;
        for tensor in order {
            if tensor.offset != free {
                return Err(malformed(
                    format!("tensor `{}`", tensor.name),
                    format!("data at {}", tensor.offset - data_start),
                    format!("at {}, where the tensor before it ends", free - data_start),
                ));
            }
            free += tensor.bytes;
        }
        if free != bytes.len() {
            return Err(malformed(
                "the end of the file".into(),
                format!("{} bytes that belong to no tensor", bytes.len() - free),
                "none".into(),
            ));
        }
        Ok(Self {
            file: file.to_path_buf(),
            data_start,
            metadata: header.metadata,
            tensors,
            index,
            storage,
        })
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The text pairs under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, in the order of the header.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor's description.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// The bytes of a tensor of this file, little-endian.
    ///
    /// # Panics
    /// If `tensor` was made up or belongs to another file.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        // In range: checked when the header was read.
        &self.storage.bytes()[tensor.offset..tensor.offset + tensor.bytes]
    }

    /// The bytes before the data.
    fn header_bytes(&self) -> &[u8] {
        &self.storage.bytes()[..self.data_start]
    }

    /// The whole length in bytes.
    fn file_bytes(&self) -> usize {
        self.storage.bytes().len()
    }
}

/// Element types with their size in bits.
const DTYPES: &[(&str, u64)] = &[
    ("BOOL", 8),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

fn dtype_bits(dtype: &str) -> Option<u64> {
    DTYPES.iter().find(|d| d.0 == dtype).map(|d| d.1)
}

/// The header as written, its order and any repeated names kept.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Entry)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut metadata = None;
                let mut tensors = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::custom("`__metadata__` twice"));
                        }
                    } else {
                        tensors.push((key, map.next_value()?));
                    }
                }
                Ok(Header {
                    metadata: metadata.unwrap_or_default(),
                    tensors,
                })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests;

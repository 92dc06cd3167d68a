//! Reads the header of a GGUF file from bytes. Nothing in the header is believed before it has been
//! compared with the bytes that are really there, so a hostile file costs an error and little else.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use longspan_kernels::quant::GgmlType;

use super::{Array, TensorInfo, Value};
use crate::weights::WeightsError;

/// Data offsets are multiples of this unless `general.alignment` says otherwise.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
/// The most dimensions a tensor can have.
const MAX_DIMENSIONS: u32 = 4;
/// The longest name of a key or tensor; the format's description says 65535 for keys.
const MAX_NAME: u64 = 65_535;
/// The least bytes one metadata entry takes: key length, value type, one byte of value.
const MIN_ENTRY: u64 = 8 + 4 + 1;
/// The least bytes one tensor's description takes: name length, one dimension, type, offset.
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// What one GGUF file says of itself.
pub(super) struct Header {
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    /// Offsets are absolute within the file.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensor data begins, a multiple of the alignment.
    pub data_start: usize,
}

/// Reads and checks the whole header; every tensor's bytes lie inside `bytes`, none overlap.
pub(super) fn header(file: &Path, bytes: &[u8]) -> Result<Header, WeightsError> {
    let mut r = Reader { file, bytes, at: 0 };
    let magic = r.take(4, &"the magic number")?;
    if magic != b"GGUF" {
        return Err(r.malformed(
            &"the magic number",
            format!("`{}`", magic.escape_ascii()),
            "`GGUF` (is this a GGUF file?)",
        ));
    }
    let version = r.u32(&"the version")?;
    if !(2..=3).contains(&version) {
        let found = if (2..=3).contains(&version.swap_bytes()) {
            format!("{} in big-endian order", version.swap_bytes())
        } else {
            version.to_string()
        };
        return Err(WeightsError::Unsupported {
            file: file.to_path_buf(),
            place: "GGUF version".into(),
            found,
            expected: "2 and 3, little-endian".into(),
        });
    }
    let tensor_count = r.u64(&"the number of tensors")?;
    let entry_count = r.u64(&"the number of metadata entries")?;
    r.enough(entry_count, MIN_ENTRY, &"metadata entries")?;
    let mut metadata = BTreeMap::new();
    for index in 0..entry_count {
        let place = format!("metadata key number {index}");
        let key = r.name(&place)?;
        let place = format!("metadata key `{key}`");
        let value = r.value(&place)?;
        if metadata.insert(key, value).is_some() {
            return Err(r.malformed(&place, "it twice", "each key once"));
        }
    }
    let alignment = alignment(&r, &metadata)?;
    r.enough(tensor_count, MIN_TENSOR, &"tensor descriptions")?;
    let mut tensors = Vec::with_capacity(tensor_count as usize); // bounded by the line above
    for index in 0..tensor_count {
        tensors.push(r.tensor(index, alignment)?);
    }
    // The data begins at the next multiple of the alignment.
    let data_start = (r.at as u64)
        .checked_next_multiple_of(alignment)
        .and_then(|at| usize::try_from(at).ok())
        .ok_or_else(|| r.truncated(&"the header's padding", alignment))?;
    place_tensors(&r, &mut tensors, data_start)?;
    Ok(Header {
        version,
        metadata,
        tensors,
        data_start,
    })
}

/// `general.alignment`, or the default.
fn alignment(r: &Reader, metadata: &BTreeMap<String, Value>) -> Result<u64, WeightsError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(a) if a.is_power_of_two() && (8..=1 << 20).contains(&a) => Ok(a),
        _ => Err(r.malformed(
            &"metadata key `general.alignment`",
            value.describe(),
            "a power of two from 8 to 1048576",
        )),
    }
}

/// Makes offsets absolute and checks that each tensor's bytes are there and are its own.
fn place_tensors(
    r: &Reader,
    tensors: &mut [TensorInfo],
    data_start: usize,
) -> Result<(), WeightsError> {
    let end = r.bytes.len();
    for tensor in tensors.iter_mut() {
        let start = data_start.checked_add(tensor.offset);
        let stop = start.and_then(|s| s.checked_add(tensor.bytes));
        match (start, stop) {
            (Some(start), Some(stop)) if stop <= end => tensor.offset = start,
            _ => {
                return Err(WeightsError::Truncated {
                    file: r.file.to_path_buf(),
                    place: format!(
                        "tensor `{}` at offset {} of the tensor data",
                        tensor.name, tensor.offset
                    ),
                    found: end.saturating_sub(data_start).saturating_sub(tensor.offset) as u64,
                    expected: tensor.bytes as u64,
                });
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        let free = pair[0].offset + pair[0].bytes;
        if pair[1].offset < free {
            return Err(r.malformed(
                &format!("tensor `{}`", pair[1].name),
                format!("offset {}", pair[1].offset - data_start),
                &format!(
                    "at least {}, where the data of tensor `{}` ends",
                    free - data_start,
                    pair[0].name
                ),
            ));
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(r.malformed(
            &format!("tensor `{}`", pair[0]),
            "it twice",
            "each name once",
        )),
        None => Ok(()),
    }
}

/// The types a tensor can be stored in, for messages.
pub(super) fn supported_types() -> String {
    let all = GgmlType::ALL.iter();
    all.map(|t| t.name()).collect::<Vec<_>>().join(", ")
}

/// A cursor over the file.
struct Reader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

/// Numbers of fixed size, little-endian.
macro_rules! numbers {
    ($($name:ident -> $type:ty;)*) => {$(
        fn $name(&mut self, place: &dyn Display) -> Result<$type, WeightsError> {
            let raw = self.take(size_of::<$type>() as u64, place)?;
            let mut bytes = [0; size_of::<$type>()];
            bytes.copy_from_slice(raw);
            Ok(<$type>::from_le_bytes(bytes))
        }
    )*};
}

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn truncated(&self, place: &dyn Display, expected: u64) -> WeightsError {
        WeightsError::Truncated {
            file: self.file.to_path_buf(),
            place: place.to_string(),
            found: self.left(),
            expected,
        }
    }

    fn malformed(
        &self,
        place: &dyn Display,
        found: impl Into<String>,
        expected: &str,
    ) -> WeightsError {
        WeightsError::Malformed {
            file: self.file.to_path_buf(),
            place: place.to_string(),
            found: found.into(),
            expected: expected.into(),
        }
    }

    /// Refuses a count of things that cannot all fit in what is left, before memory is taken.
    fn enough(&self, count: u64, each: u64, place: &dyn Display) -> Result<(), WeightsError> {
        match count.checked_mul(each) {
            Some(need) if need <= self.left() => Ok(()),
            need => Err(self.truncated(&format!("{count} {place}"), need.unwrap_or(u64::MAX))),
        }
    }

    fn take(&mut self, count: u64, place: &dyn Display) -> Result<&'a [u8], WeightsError> {
        if count > self.left() {
            return Err(self.truncated(place, count));
        }
        let start = self.at;
        self.at += count as usize; // fits: at most the length of the slice
        Ok(&self.bytes[start..self.at])
    }

    numbers! {
        u8 -> u8; i8 -> i8; u16 -> u16; i16 -> i16; u32 -> u32; i32 -> i32;
        u64 -> u64; i64 -> i64; f32 -> f32; f64 -> f64;
    }

    fn bool(&mut self, place: &dyn Display) -> Result<bool, WeightsError> {
        match self.u8(place)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.malformed(place, format!("bool {other}"), "0 or 1")),
        }
    }

    fn string(&mut self, place: &dyn Display) -> Result<String, WeightsError> {
        let length = self.u64(place)?;
        let raw = self.take(length, place)?;
        match std::str::from_utf8(raw) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.malformed(place, format!("text with {error}"), "UTF-8 text")),
        }
    }

    fn name(&mut self, place: &dyn Display) -> Result<String, WeightsError> {
        let name = self.string(place)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME {
            return Err(self.malformed(
                place,
                format!("a name of {} bytes", name.len()),
                "1 to 65535 bytes",
            ));
        }
        Ok(name)
    }

    fn value(&mut self, place: &dyn Display) -> Result<Value, WeightsError> {
        Ok(match self.u32(place)? {
            0 => Value::U8(self.u8(place)?),
            1 => Value::I8(self.i8(place)?),
            2 => Value::U16(self.u16(place)?),
            3 => Value::I16(self.i16(place)?),
            4 => Value::U32(self.u32(place)?),
            5 => Value::I32(self.i32(place)?),
            6 => Value::F32(self.f32(place)?),
            7 => Value::Bool(self.bool(place)?),
            8 => Value::String(self.string(place)?),
            9 => Value::Array(self.array(place)?),
            10 => Value::U64(self.u64(place)?),
            11 => Value::I64(self.i64(place)?),
            12 => Value::F64(self.f64(place)?),
            other => {
                return Err(self.malformed(place, format!("value type {other}"), "0 to 12"));
            }
        })
    }

    fn array(&mut self, place: &dyn Display) -> Result<Array, WeightsError> {
        let element = self.u32(place)?;
        let count = self.u64(place)?;
        Ok(match element {
            0 => Array::U8(self.many(count, 1, place, Self::u8)?),
            1 => Array::I8(self.many(count, 1, place, Self::i8)?),
            2 => Array::U16(self.many(count, 2, place, Self::u16)?),
            3 => Array::I16(self.many(count, 2, place, Self::i16)?),
            4 => Array::U32(self.many(count, 4, place, Self::u32)?),
            5 => Array::I32(self.many(count, 4, place, Self::i32)?),
            6 => Array::F32(self.many(count, 4, place, Self::f32)?),
            7 => Array::Bool(self.many(count, 1, place, Self::bool)?),
            8 => Array::String(self.many(count, 8, place, Self::string)?),
            10 => Array::U64(self.many(count, 8, place, Self::u64)?),
            11 => Array::I64(self.many(count, 8, place, Self::i64)?),
            12 => Array::F64(self.many(count, 8, place, Self::f64)?),
            other => {
                return Err(self.malformed(
                    place,
                    format!("array of value type {other}"),
                    "0 to 8 or 10 to 12",
                ));
            }
        })
    }

    /// `count` elements of at least `each` bytes.
    fn many<T>(
        &mut self,
        count: u64,
        each: u64,
        place: &dyn Display,
        read: fn(&mut Self, &dyn Display) -> Result<T, WeightsError>,
    ) -> Result<Vec<T>, WeightsError> {
        self.enough(count, each, &format!("elements of {place}"))?;
        let mut values = Vec::with_capacity(count as usize); // bounded by the line above
        for _ in 0..count {
            values.push(read(self, place)?);
        }
        Ok(values)
    }

    /// One tensor's description; its offset is still relative to the tensor data.
    fn tensor(&mut self, index: u64, alignment: u64) -> Result<TensorInfo, WeightsError> {
        let name = self.name(&format!("tensor number {index}"))?;
        let place = format!("tensor `{name}`");
        let dimensions = self.u32(&place)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.malformed(&place, format!("{dimensions} dimensions"), "1 to 4"));
        }
        // The file lists the fastest dimension first; a shape here is row-major, outermost first.
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            let size = self.u64(&place)?;
            match usize::try_from(size) {
                Ok(size) if size > 0 => shape.push(size),
                _ => {
                    return Err(self.malformed(
                        &place,
                        format!("a dimension of {size}"),
                        "a positive size",
                    ));
                }
            }
        }
        shape.reverse();
        let id = self.u32(&place)?;
        let offset = self.u64(&place)?;
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(WeightsError::Unsupported {
                file: self.file.to_path_buf(),
                place,
                found: format!("tensor type number {id}"),
                expected: supported_types(),
            });
        };
        let row = shape[shape.len() - 1];
        if row % ty.block_elements() != 0 {
            return Err(self.malformed(
                &place,
                format!("rows of {row} elements in {}", ty.name()),
                &format!("a multiple of {} elements", ty.block_elements()),
            ));
        }
        let bytes = shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .and_then(|elements| ty.bytes(elements));
        let Some(bytes) = bytes else {
            return Err(self.malformed(
                &place,
                format!("shape {shape:?}"),
                "a size that fits in memory",
            ));
        };
        match usize::try_from(offset) {
            Ok(offset) if (offset as u64).is_multiple_of(alignment) => Ok(TensorInfo {
                name,
                shape,
                ty,
                part: 0,
                offset,
                bytes,
            }),
            _ => Err(self.malformed(
                &place,
                format!("offset {offset}"),
                &format!("a multiple of the alignment {alignment}"),
            )),
        }
    }
}

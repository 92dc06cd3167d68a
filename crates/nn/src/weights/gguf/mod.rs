//! GGUF files, version 2 and 3: typed metadata and tensors in ggml's block layouts, mapped from
//! disk, whole or split over several files.
//!
//! [`Gguf`] shows a file as it is, under its own names; [`GgufWeights`] shows the same tensors
//! under Hugging Face names and in Hugging Face order. [`GgufWriter`] writes small files.

mod parse;
mod source;
mod value;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use longspan_data::tokenize::GgufVocab;
use longspan_kernels::quant::GgmlType;

pub use source::GgufWeights;
pub use value::{Array, Value};
pub use write::GgufWriter;

use super::storage::Storage;
use super::{Fingerprint, WeightsError, fingerprint};

/// One tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file, e.g. `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major, outermost dimension first (the file itself lists them the other way round).
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub ty: GgmlType,
    /// Which of the split files holds it, from 0.
    pub part: usize,
    /// Where its bytes begin in that file.
    pub offset: usize,
    /// How many bytes it takes.
    pub bytes: usize,
}

/// An opened GGUF model: the metadata of its first file, the tensors of all.
#[derive(Debug)]
pub struct Gguf {
    file: PathBuf,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    parts: Vec<Part>,
}

/// One file of a split model.
#[derive(Debug)]
struct Part {
    storage: Storage,
    data_start: usize,
}

impl Gguf {
    /// Maps the file at `path`; of a split model (`name-00001-of-00003.gguf`), any one of the files
    /// brings in the others.
    ///
    /// # Errors
    /// Whatever in the file cannot be true: see [`WeightsError`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut files = Vec::new();
        for file in split_files(path) {
            let storage = Storage::map(&file)?;
            files.push((file, storage));
        }
        Self::assemble(files)
    }

    /// Reads a model from memory; `file` only names it in errors.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(file: &Path, bytes: Vec<u8>) -> Result<Self, WeightsError> {
        Self::from_parts(vec![(file.to_path_buf(), bytes)])
    }

    /// Reads a split model from memory, its files in order.
    ///
    /// # Errors
    /// As [`Gguf::open`]; also when `parts` is empty.
    pub fn from_parts(parts: Vec<(PathBuf, Vec<u8>)>) -> Result<Self, WeightsError> {
        let parts = parts.into_iter();
        Self::assemble(parts.map(|(f, b)| (f, Storage::Owned(b))).collect())
    }

    fn assemble(files: Vec<(PathBuf, Storage)>) -> Result<Self, WeightsError> {
        let count = files.len();
        let mut model: Option<Self> = None;
        for (part, (file, storage)) in files.into_iter().enumerate() {
            let mut header = parse::header(&file, storage.bytes())?;
            check_split(&file, &header.metadata, part, count)?;
            for tensor in &mut header.tensors {
                tensor.part = part;
            }
            let data_start = header.data_start.min(storage.bytes().len());
            let model = model.get_or_insert_with(|| Self {
                file: file.clone(),
                version: header.version,
                metadata: header.metadata,
                tensors: Vec::new(),
                index: HashMap::new(),
                parts: Vec::new(),
            });
            for tensor in header.tensors {
                let place = model.tensors.len();
                if model.index.insert(tensor.name.clone(), place).is_some() {
                    return Err(WeightsError::Malformed {
                        file,
                        place: format!("tensor `{}`", tensor.name),
                        found: "it in an earlier file too".into(),
                        expected: "each name once".into(),
                    });
                }
                model.tensors.push(tensor);
            }
            model.parts.push(Part {
                storage,
                data_start,
            });
        }
        let Some(model) = model else {
            return Err(WeightsError::Malformed {
                file: PathBuf::new(),
                place: "the list of files".into(),
                found: "no file".into(),
                expected: "at least one".into(),
            });
        };
        if let Some(expected) = model.get("split.tensors.count").and_then(Value::as_u64)
            && expected != model.tensors.len() as u64
        {
            return Err(WeightsError::Malformed {
                file: model.file,
                place: "metadata key `split.tensors.count`".into(),
                found: format!("{} tensors in {count} files", model.tensors.len()),
                expected: expected.to_string(),
            });
        }
        Ok(model)
    }

    /// The (first) file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// One metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor's description, by its name in the file.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// The stored bytes of a tensor of this model.
    ///
    /// # Panics
    /// If `tensor` was made up or belongs to another model.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        // In range: checked when the header was read.
        &self.parts[tensor.part].storage.bytes()[tensor.offset..tensor.offset + tensor.bytes]
    }

    /// `general.architecture`, e.g. `llama`.
    ///
    /// # Errors
    /// When the key is absent or not text.
    pub fn architecture(&self) -> Result<&str, WeightsError> {
        self.text("general.architecture")?
            .ok_or_else(|| WeightsError::MissingKey {
                file: self.file.clone(),
                key: "general.architecture".into(),
                expected: "the name of the model's architecture".into(),
            })
    }

    /// Text under `key`, if the key is there.
    ///
    /// # Errors
    /// When the value is not text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A non-negative integer under `key`, if the key is there.
    ///
    /// # Errors
    /// When the value is no such integer.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A number under `key`, if the key is there.
    ///
    /// # Errors
    /// When the value is not a finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        let finite = |v: &Value| v.as_f64().filter(|v| v.is_finite());
        self.typed(key, "a finite number", finite)
    }

    /// A boolean under `key`, if the key is there.
    ///
    /// # Errors
    /// When the value is not a boolean.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.typed(key, "a bool", Value::as_bool)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong_value(key, value, expected)),
        }
    }

    fn wrong_value(&self, key: &str, found: &Value, expected: &str) -> WeightsError {
        WeightsError::Malformed {
            file: self.file.clone(),
            place: format!("metadata key `{key}`"),
            found: found.describe(),
            expected: expected.into(),
        }
    }

    /// The tokenizer's tables; absent scores, types and merges are empty lists.
    ///
    /// # Errors
    /// When the vocabulary is absent, or its tables disagree in type or length.
    pub fn vocab(&self) -> Result<GgufVocab, WeightsError> {
        let missing = |key: &str, expected: &str| WeightsError::MissingKey {
            file: self.file.clone(),
            key: key.into(),
            expected: expected.into(),
        };
        let tokens = self
            .typed("tokenizer.ggml.tokens", "an array of strings", |v| {
                v.as_array()?.strings()
            })?
            .ok_or_else(|| missing("tokenizer.ggml.tokens", "the list of tokens"))?
            .to_vec();
        let model = self
            .text("tokenizer.ggml.model")?
            .ok_or_else(|| missing("tokenizer.ggml.model", "the kind of tokenizer"))?
            .to_owned();
        let scores = self
            .typed(
                "tokenizer.ggml.scores",
                "an array of float32",
                |v| match v {
                    Value::Array(Array::F32(v)) => Some(v.clone()),
                    _ => None,
                },
            )?
            .unwrap_or_default();
        let token_types = self
            .typed(
                "tokenizer.ggml.token_type",
                "an array of int32",
                |v| match v {
                    Value::Array(Array::I32(v)) => Some(v.clone()),
                    Value::Array(Array::U32(v)) => {
                        v.iter().map(|&t| i32::try_from(t).ok()).collect()
                    }
                    _ => None,
                },
            )?
            .unwrap_or_default();
        for (key, length) in [
            ("tokenizer.ggml.scores", scores.len()),
            ("tokenizer.ggml.token_type", token_types.len()),
        ] {
            if self.get(key).is_some() && length != tokens.len() {
                return Err(WeightsError::Malformed {
                    file: self.file.clone(),
                    place: format!("metadata key `{key}`"),
                    found: format!("{length} elements"),
                    expected: format!("{}, one for each token", tokens.len()),
                });
            }
        }
        let charsmap = "tokenizer.ggml.precompiled_charsmap";
        let precompiled_charsmap = self.typed(charsmap, "an array of bytes", |v| match v {
            Value::Array(Array::U8(v)) => Some(v.clone()),
            Value::Array(Array::I8(v)) => Some(v.iter().map(|&b| b as u8).collect()),
            _ => None,
        })?;
        let merges = self
            .typed("tokenizer.ggml.merges", "an array of strings", |v| {
                v.as_array()?.strings()
            })?
            .unwrap_or_default()
            .to_vec();
        let id = |key: &str| self.token_id(key, tokens.len());
        Ok(GgufVocab {
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            eot: id("tokenizer.ggml.eot_token_id")?,
            model,
            pre: self.text("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens,
            scores,
            token_types,
            merges,
            add_bos: self.boolean("tokenizer.ggml.add_bos_token")?,
            add_eos: self.boolean("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: self.boolean("tokenizer.ggml.add_space_prefix")?,
            chat_template: self.text("tokenizer.chat_template")?.map(str::to_owned),
            precompiled_charsmap,
            remove_extra_whitespaces: self.boolean("tokenizer.ggml.remove_extra_whitespaces")?,
        })
    }

    /// The id of a special token. Some files write the largest uint32 for "none".
    fn token_id(&self, key: &str, tokens: usize) -> Result<Option<u32>, WeightsError> {
        match self.integer(key)? {
            None => Ok(None),
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            Some(id) if id < tokens as u64 => Ok(Some(id as u32)),
            Some(id) => Err(WeightsError::Malformed {
                file: self.file.clone(),
                place: format!("metadata key `{key}`"),
                found: id.to_string(),
                expected: format!("a token id below {tokens}"),
            }),
        }
    }

    /// Identifies the model: headers, sizes and samples of every tensor's bytes. It does not depend
    /// on where the file lies.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = fingerprint::Hasher::new();
        for part in &self.parts {
            let bytes = part.storage.bytes();
            hasher.header(&bytes[..part.data_start], bytes.len());
        }
        for tensor in &self.tensors {
            hasher.tensor(&tensor.name, self.data(tensor));
        }
        hasher.finish()
    }
}

/// The most files a model may be split into: the format counts them in a uint16.
const MAX_SPLITS: usize = u16::MAX as usize;

/// All files of the model that `path` belongs to, by the naming scheme `-00001-of-00003.gguf`.
fn split_files(path: &Path) -> Vec<PathBuf> {
    let whole = || vec![path.to_path_buf()];
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return whole();
    };
    let digits = |text: &str| match text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit()) {
        true => text.parse::<usize>().ok(),
        false => None,
    };
    let parsed = name.strip_suffix(".gguf").and_then(|stem| {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        Some((prefix, digits(number)?, digits(count)?))
    });
    match parsed {
        Some((prefix, number, count)) if (1..=count).contains(&number) && count <= MAX_SPLITS => (1
            ..=count)
            .map(|n| path.with_file_name(format!("{prefix}-{n:05}-of-{count:05}.gguf")))
            .collect(),
        _ => whole(),
    }
}

/// Checks `split.no` and `split.count` of part number `part` (from 0) of `count`.
fn check_split(
    file: &Path,
    metadata: &BTreeMap<String, Value>,
    part: usize,
    count: usize,
) -> Result<(), WeightsError> {
    let said = |key: &str, default| metadata.get(key).map_or(Some(default), Value::as_u64);
    let wrong = |key: &str, found: Option<u64>, expected: String| WeightsError::Malformed {
        file: file.to_path_buf(),
        place: format!("metadata key `{key}`"),
        found: found.map_or_else(|| "no count".into(), |f| f.to_string()),
        expected,
    };
    // A file that is not split may say so with a count of 0 or 1.
    let found = said("split.count", count as u64);
    if found != Some(count as u64) && !(found == Some(0) && count == 1) {
        return Err(wrong(
            "split.count",
            found,
            format!(
                "{count} (files of a split model keep names like `model-00001-of-00003.gguf` and lie together)"
            ),
        ));
    }
    let found = said("split.no", part as u64);
    if found != Some(part as u64) {
        return Err(wrong("split.no", found, part.to_string()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! A Hugging Face folder, or one safetensors file, as a [`WeightSource`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use longspan_kernels::quant::GgmlType;
use serde::Deserialize;

use super::{Safetensors, TensorInfo};
use crate::config::{Architecture, ModelConfig};
use crate::weights::{
    Fingerprint, MatrixData, WeightSource, WeightsError, fingerprint, missing, to_f32,
};

/// The tensors of a Hugging Face checkpoint.
///
/// Reads `model.safetensors`, or the shards listed in `model.safetensors.index.json`, or a single
/// file. Prefixes of multimodal checkpoints (`language_model.`) are taken off; a bare base model
/// without `model.` gets it.
///
/// Gemma's checkpoints hold norms as the factor minus one: [`WeightSource::vector`] adds one to
/// every tensor whose name ends in `norm.weight`, so that norms multiply alike for all models.
#[derive(Debug)]
pub struct HfWeights {
    path: PathBuf,
    shards: Vec<Safetensors>,
    /// Canonical name to shard and position in it.
    index: BTreeMap<String, (usize, usize)>,
    norm_offset: f32,
}

/// The part of `model.safetensors.index.json` that matters here.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl HfWeights {
    /// Opens a folder or a single `.safetensors` file; `config` says how norms are stored.
    ///
    /// # Errors
    /// When a file is absent or malformed, or the index disagrees with the shards.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Self, WeightsError> {
        let mut weights = Self::open_as_stored(path)?;
        weights.norm_offset = norm_offset(config);
        Ok(weights)
    }

    /// As [`HfWeights::open`] for models that are no decoders: every tensor as the file holds it.
    ///
    /// # Errors
    /// As [`HfWeights::open`].
    pub fn open_as_stored(path: &Path) -> Result<Self, WeightsError> {
        if !path.is_dir() {
            return Self::join(path, vec![Safetensors::open(path)?]);
        }
        let index_file = path.join(INDEX);
        if path.join(WHOLE).is_file() || !index_file.is_file() {
            let shard = Safetensors::open(&path.join(WHOLE))?;
            return Self::join(path, vec![shard]);
        }
        let text = std::fs::read(&index_file).map_err(|source| WeightsError::Io {
            file: index_file.clone(),
            source,
        })?;
        let malformed = |place: String, found: String, expected: &str| WeightsError::Malformed {
            file: index_file.clone(),
            place,
            found,
            expected: expected.into(),
        };
        let listed: ShardIndex = serde_json::from_slice(&text).map_err(|error| {
            malformed(
                "the index".into(),
                error.to_string(),
                "an object with `weight_map`, from tensor name to file name",
            )
        })?;
        let mut names: Vec<&String> = listed.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        let mut shards = Vec::new();
        for name in &names {
            // Only a file of this very folder: an index must not lead elsewhere.
            if Path::new(name.as_str()).file_name() != Some(name.as_ref()) {
                return Err(malformed(
                    "weight_map".into(),
                    format!("file `{name}`"),
                    "the name of a file in the same folder",
                ));
            }
            shards.push(Safetensors::open(&path.join(name))?);
        }
        for (tensor, name) in &listed.weight_map {
            let at = names.partition_point(|n| *n < name);
            if shards[at].tensor(tensor).is_none() {
                let has = shards[at].tensors().iter().map(|t| t.name.as_str());
                return Err(missing(shards[at].file(), tensor, has));
            }
        }
        Self::join(path, shards)
    }

    /// Joins files that are already open, e.g. from memory; `path` names the whole in errors.
    ///
    /// # Errors
    /// When two tensors get one canonical name.
    pub fn from_shards(
        path: &Path,
        shards: Vec<Safetensors>,
        config: &ModelConfig,
    ) -> Result<Self, WeightsError> {
        let mut weights = Self::join(path, shards)?;
        weights.norm_offset = norm_offset(config);
        Ok(weights)
    }

    fn join(path: &Path, shards: Vec<Safetensors>) -> Result<Self, WeightsError> {
        let mut index = BTreeMap::new();
        for (shard, file) in shards.iter().enumerate() {
            for (at, tensor) in file.tensors().iter().enumerate() {
                let name = canonical(&tensor.name);
                if index.insert(name.clone(), (shard, at)).is_some() {
                    return Err(WeightsError::Malformed {
                        file: file.file().to_path_buf(),
                        place: format!("tensor `{}`", tensor.name),
                        found: format!("a second `{name}`"),
                        expected: "each name once".into(),
                    });
                }
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            shards,
            index,
            norm_offset: 0.0,
        })
    }

    /// A tensor with its shard, its type checked.
    fn find(&self, name: &str) -> Result<(&Safetensors, &TensorInfo, GgmlType), WeightsError> {
        let Some(&(shard, at)) = self.index.get(name) else {
            let names = self.index.keys().map(String::as_str);
            return Err(missing(&self.path, name, names));
        };
        let shard = &self.shards[shard];
        let tensor = &shard.tensors()[at];
        let ty = match tensor.dtype.as_str() {
            "F32" => GgmlType::F32,
            "F16" => GgmlType::F16,
            "BF16" => GgmlType::BF16,
            other => {
                return Err(WeightsError::Type {
                    file: shard.file().to_path_buf(),
                    tensor: name.into(),
                    found: other.into(),
                    expected: "F32, F16 or BF16 (for a quantised model, use its GGUF file)".into(),
                });
            }
        };
        Ok((shard, tensor, ty))
    }

    fn wrong_rank(
        file: &Safetensors,
        tensor: &TensorInfo,
        name: &str,
        expected: &str,
    ) -> WeightsError {
        WeightsError::Shape {
            file: file.file().to_path_buf(),
            tensor: name.into(),
            found: tensor.shape.clone(),
            expected: expected.into(),
        }
    }
}

/// What is missing from a norm's factor as stored.
fn norm_offset(config: &ModelConfig) -> f32 {
    match config.architecture {
        Architecture::Gemma3 => 1.0,
        _ => 0.0,
    }
}

/// The canonical name of a tensor; names without one stay as they are.
fn canonical(name: &str) -> String {
    for prefix in ["model.language_model.", "language_model.model."] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return format!("model.{rest}");
        }
    }
    if let Some(rest) = name.strip_prefix("language_model.") {
        return rest.into();
    }
    let bare = ["embed_tokens.", "layers.", "norm."];
    match bare.iter().any(|prefix| name.starts_with(prefix)) {
        true => format!("model.{name}"),
        false => name.into(),
    }
}

impl WeightSource for HfWeights {
    fn matrix(&self, name: &str) -> Result<MatrixData<'_>, WeightsError> {
        let (shard, tensor, ty) = self.find(name)?;
        let [rows, cols] = tensor.shape[..] else {
            return Err(Self::wrong_rank(shard, tensor, name, "[rows, columns]"));
        };
        if rows == 0 || cols == 0 {
            return Err(Self::wrong_rank(shard, tensor, name, "sizes above zero"));
        }
        Ok(MatrixData {
            ty,
            rows,
            cols,
            bytes: Cow::Borrowed(shard.data(tensor)),
        })
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let (shard, tensor, ty) = self.find(name)?;
        if tensor.shape.len() != 1 {
            return Err(Self::wrong_rank(shard, tensor, name, "[length]"));
        }
        let mut values = to_f32(ty, shard.data(tensor)).unwrap_or_default();
        if self.norm_offset != 0.0 && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|v| *v += self.norm_offset);
        }
        Ok(values)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        if let Some(&(shard, at)) = self.index.get(name) {
            let tensor = &self.shards[shard].tensors()[at];
            if tensor.dtype == "I64" {
                // Counts beside the parameters: the length of a kernel.
                let bytes = self.shards[shard].data(tensor).chunks_exact(8);
                return Ok(bytes
                    .map(|b| i64::from_le_bytes(b.try_into().unwrap_or_default()) as f32)
                    .collect());
            }
        }
        let (shard, tensor, ty) = self.find(name)?;
        Ok(to_f32(ty, shard.data(tensor)).unwrap_or_default())
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let &(shard, at) = self.index.get(name)?;
        Some(&self.shards[shard].tensors()[at].shape)
    }

    fn names(&self) -> Vec<String> {
        self.index.keys().cloned().collect()
    }

    fn file(&self) -> &Path {
        &self.path
    }

    fn fingerprint(&self) -> Fingerprint {
        let mut hasher = fingerprint::Hasher::new();
        for shard in &self.shards {
            hasher.header(shard.header_bytes(), shard.file_bytes());
            for tensor in shard.tensors() {
                hasher.tensor(&tensor.name, shard.data(tensor));
            }
        }
        hasher.finish()
    }
}

//! Everything a model brings with it, from one path: configuration, weights, tokenizer.

use std::path::{Path, PathBuf};

use longspan_data::tokenize::{Tokenizer, TokenizerError};

use super::gguf::{Gguf, GgufWeights};
use super::safetensors::HfWeights;
use super::{Fingerprint, WeightSource, WeightsError};
use crate::config::{ConfigError, ModelConfig, StackFile};
use crate::model::network::stack_config;
use crate::model::{Decoder, Network, Precision, Recurrent, StackLm};
use crate::params::ParamStore;
use candle_core::{DType, Device, Tensor};

/// An opened model whose parts have been checked against each other.
pub struct Checkpoint {
    pub config: ModelConfig,
    /// The stack of mixers, for models that are one.
    pub stack: Option<StackFile>,
    pub weights: Box<dyn WeightSource>,
    pub tokenizer: Tokenizer,
    /// Identifies the weights, for files that belong to them.
    pub fingerprint: Fingerprint,
}

/// Why a path is not a model that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The path is neither of the two kinds.
    #[error(
        "{}: {found}; expected a `.gguf` file, or a folder with `config.json`, `tokenizer.json` and `.safetensors` files",
        path.display()
    )]
    NotAModel {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: TokenizerError,
    },
}

impl Checkpoint {
    /// Opens a GGUF file (any one of a split model), a Hugging Face folder, a `.safetensors` file inside such a folder, or
    /// the folder of a training run, whose newest checkpoint is taken. Weights are mapped, not read.
    ///
    /// # Errors
    /// [`CheckpointError`], for the first part that is missing, malformed, or at odds with another.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let not_a_model = |found: String| CheckpointError::NotAModel {
            path: path.to_path_buf(),
            found,
        };
        if path.is_dir() {
            if !path.join("config.json").is_file()
                && let Ok(name) = std::fs::read_to_string(path.join("latest"))
            {
                let newest = path.join(name.trim());
                return Self::open_folder(&newest, &newest);
            }
            return Self::open_folder(path, path);
        }
        if let Err(error) = path.metadata() {
            return Err(not_a_model(format!("cannot read: {error}")));
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("gguf") => Self::open_gguf(path),
            Some("safetensors") => {
                let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
                Self::open_folder(folder.unwrap_or(Path::new(".")), path)
            }
            // A cache may keep files without a name's ending: believe the first bytes.
            _ if starts_with_magic(path) => Self::open_gguf(path),
            _ => Err(not_a_model("a file of another kind".into())),
        }
    }

    fn open_gguf(path: &Path) -> Result<Self, CheckpointError> {
        let gguf = Gguf::open(path)?;
        let config = ModelConfig::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf.vocab()?);
        let weights = GgufWeights::new(gguf, &config)?;
        config.check_tensors(&weights)?;
        Self::assemble(path, config, None, Box::new(weights), tokenizer)
    }

    fn open_folder(folder: &Path, weights: &Path) -> Result<Self, CheckpointError> {
        let file = folder.join("config.json");
        if !file.is_file() {
            return Err(CheckpointError::NotAModel {
                path: folder.to_path_buf(),
                found: "a folder without `config.json`".into(),
            });
        }
        let tokenizer = Tokenizer::from_dir(folder);
        let text = std::fs::read(&file).unwrap_or_default();
        if let Some(stack) = StackFile::parse(&file, &String::from_utf8_lossy(&text))? {
            let c = &stack.stack;
            let inner = (c.mlp_ratio * c.d_model as f64).round() as usize;
            let config = stack_config(
                c.d_model,
                c.layers,
                inner,
                stack.vocab_size,
                stack.trained_length,
            );
            let weights = HfWeights::open_as_stored(weights)?;
            return Self::assemble(folder, config, Some(stack), Box::new(weights), tokenizer);
        }
        let config = ModelConfig::from_hf_file(&file)?;
        let weights = HfWeights::open(weights, &config)?;
        config.check_tensors(&weights)?;
        Self::assemble(folder, config, None, Box::new(weights), tokenizer)
    }

    fn assemble(
        path: &Path,
        config: ModelConfig,
        stack: Option<StackFile>,
        weights: Box<dyn WeightSource>,
        tokenizer: Result<Tokenizer, TokenizerError>,
    ) -> Result<Self, CheckpointError> {
        let tokenizer = tokenizer.map_err(|source| CheckpointError::Tokenizer {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            fingerprint: weights.fingerprint(),
            config,
            stack,
            weights,
            tokenizer,
        })
    }

    /// The model itself, weights held as `precision` says. Stacks of mixers are held in f32.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; a stack that cannot write.
    pub fn network(&self, precision: Precision, device: &Device) -> candle_core::Result<Network> {
        let Some(file) = &self.stack else {
            let decoder = Decoder::load(&self.config, &*self.weights, precision, device)?;
            return Ok(Network::Decoder(Box::new(decoder)));
        };
        let mut tensors = std::collections::HashMap::new();
        for name in self.weights.names() {
            let shape = self.weights.shape(&name).unwrap_or(&[]).to_vec();
            let values = self
                .weights
                .values(&name)
                .map_err(candle_core::Error::wrap)?;
            tensors.insert(name, Tensor::from_vec(values, shape, device)?);
        }
        let store = ParamStore::from_tensors(tensors, DType::F32, device).frozen();
        let model = StackLm::new(&file.stack, file.vocab_size, &store.root())?;
        Ok(Network::Recurrent(Box::new(Recurrent::new(
            model,
            file.trained_length,
        )?)))
    }
}

/// Whether the file begins as GGUF does.
fn starts_with_magic(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    std::fs::File::open(path)
        .is_ok_and(|mut f| f.read_exact(&mut magic).is_ok() && magic == *b"GGUF")
}

//! Everything a model brings with it, from one path: configuration, weights, tokenizer.

use std::path::{Path, PathBuf};

use longspan_data::tokenize::{Tokenizer, TokenizerError};

use super::gguf::{Gguf, GgufWeights};
use super::safetensors::HfWeights;
use super::{Fingerprint, WeightSource, WeightsError};
use crate::config::{ConfigError, ModelConfig};

/// An opened model whose parts have been checked against each other.
pub struct Checkpoint {
    pub config: ModelConfig,
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
    /// Opens a GGUF file (any one of a split model), a Hugging Face folder, or a `.safetensors` file
    /// inside such a folder. Weights are mapped, not read.
    ///
    /// # Errors
    /// [`CheckpointError`], for the first part that is missing, malformed, or at odds with another.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let not_a_model = |found: String| CheckpointError::NotAModel {
            path: path.to_path_buf(),
            found,
        };
        if path.is_dir() {
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
        Self::assemble(path, config, Box::new(weights), tokenizer)
    }

    fn open_folder(folder: &Path, weights: &Path) -> Result<Self, CheckpointError> {
        let file = folder.join("config.json");
        if !file.is_file() {
            return Err(CheckpointError::NotAModel {
                path: folder.to_path_buf(),
                found: "a folder without `config.json`".into(),
            });
        }
        let config = ModelConfig::from_hf_file(&file)?;
        let weights = HfWeights::open(weights, &config)?;
        let tokenizer = Tokenizer::from_dir(folder);
        Self::assemble(folder, config, Box::new(weights), tokenizer)
    }

    fn assemble(
        path: &Path,
        config: ModelConfig,
        weights: Box<dyn WeightSource>,
        tokenizer: Result<Tokenizer, TokenizerError>,
    ) -> Result<Self, CheckpointError> {
        config.check_tensors(weights.as_ref())?;
        let tokenizer = tokenizer.map_err(|source| CheckpointError::Tokenizer {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            fingerprint: weights.fingerprint(),
            config,
            weights,
            tokenizer,
        })
    }
}

/// Whether the file begins as GGUF does.
fn starts_with_magic(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    std::fs::File::open(path)
        .is_ok_and(|mut f| f.read_exact(&mut magic).is_ok() && magic == *b"GGUF")
}

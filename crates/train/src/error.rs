//! What can go wrong in training, with the file, option or step at fault.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// An error of training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A tensor operation failed: shapes, missing tensors.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file's contents are not what they should be.
    #[error("{}: {message}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// An option has a value that cannot be.
    #[error("{option}: found {found}, expected {expected}")]
    Option {
        /// Name of the option, as in the TOML file.
        option: String,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// Several steps in a row had losses or gradients that are not finite.
    #[error("step {step}: loss or gradient was not finite for {count} steps in a row")]
    NotFinite {
        /// The last of them.
        step: u64,
        /// How many.
        count: usize,
    },
}

impl TrainError {
    /// An option's wrong value.
    pub fn option(
        option: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Self {
        TrainError::Option {
            option: option.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// Wrong contents of a file.
    pub fn contents(path: &Path, message: impl std::fmt::Display) -> Self {
        TrainError::Contents {
            path: path.into(),
            message: message.to_string(),
        }
    }
}

/// Attaches the path to an input/output error.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| TrainError::File {
            path: path.into(),
            source,
        })
    }
}

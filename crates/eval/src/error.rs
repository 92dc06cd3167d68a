//! What can go wrong in an evaluation, by who must act.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of this crate. Each names the file, row or option at fault.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A row of a data or prediction file is wrong.
    #[error("{path}:{line}: {reason}")]
    Row {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// Value found and value expected.
        reason: String,
    },
    /// An option or a data set cannot be used; the text says what is expected.
    #[error("{0}")]
    Input(String),
    /// The target does not answer. What was written is kept and the run can go on later.
    #[error("{0}")]
    Unreachable(String),
    /// The target failed in a way that repeats.
    #[error("{0}")]
    Target(String),
    /// The caller stopped the run.
    #[error("stopped after {done} of {total} samples; the same command goes on from there")]
    Interrupted {
        /// Samples finished, earlier runs included.
        done: usize,
        /// Samples asked for.
        total: usize,
    },
}

impl EvalError {
    /// Wraps a file's error with its path.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> EvalError + '_ {
        move |source| EvalError::Io {
            path: path.into(),
            source,
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, EvalError>;

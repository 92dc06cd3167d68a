//! What can be wrong with a file of weights, said so that its owner can act on it.

use std::path::PathBuf;

/// Why a file of weights, or one tensor of it, cannot be used. Every variant names the file; the
/// ones about a tensor or a key name it, what was found, and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system refused to open, read or map the file.
    #[error("{}: cannot read: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file ends before something that its header announces.
    #[error(
        "{}: truncated: {place} needs {expected} bytes but only {found} are left; download the file again",
        file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The field, metadata key or tensor being read.
        place: String,
        /// Bytes left in the file.
        found: u64,
        /// Bytes (or the least number of bytes) required.
        expected: u64,
    },
    /// A field holds a value which the format does not allow.
    #[error("{}: {place}: found {found}, expected {expected}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The field, metadata key or tensor at fault.
        place: String,
        /// The value found.
        found: String,
        /// What the format allows there.
        expected: String,
    },
    /// The file is well formed, but holds something this program does not implement.
    #[error("{}: {place}: {found} is not supported; supported: {expected}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field, metadata key or tensor at fault.
        place: String,
        /// The value found.
        found: String,
        /// The supported values.
        expected: String,
    },
    /// A metadata key is absent.
    #[error("{}: metadata key `{key}` is missing; expected {expected}", file.display())]
    MissingKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What it should have held.
        expected: String,
    },
    /// A tensor is absent.
    #[error("{}: tensor `{tensor}` is missing; the file has {available}", file.display())]
    MissingTensor {
        /// The file.
        file: PathBuf,
        /// The canonical name asked for.
        tensor: String,
        /// The names nearest to it, and how many there are.
        available: String,
    },
    /// A tensor has another shape than its use requires. Shapes are row-major, outermost first.
    #[error("{}: tensor `{tensor}` has shape {found:?}, expected {expected}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The canonical name.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape required.
        expected: String,
    },
    /// A tensor is stored in a type which its use does not allow.
    #[error("{}: tensor `{tensor}` is stored as {found}, expected {expected}", file.display())]
    Type {
        /// The file.
        file: PathBuf,
        /// The canonical name.
        tensor: String,
        /// The stored type.
        found: String,
        /// The types allowed.
        expected: String,
    },
}

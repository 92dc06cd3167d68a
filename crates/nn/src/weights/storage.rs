//! The bytes of a file: mapped, or held in memory. Parsers see only the slice.

use std::fs::File;
use std::path::Path;

use super::WeightsError;

/// Immutable bytes of one file.
#[derive(Debug)]
pub(crate) enum Storage {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl Storage {
    /// Maps `file` read-only. As with every mapped file, another process that truncates it
    /// meanwhile makes this one fail at its next access: a model in use is not to be overwritten.
    pub(crate) fn map(file: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io {
            file: file.to_path_buf(),
            source,
        };
        let handle = File::open(file).map_err(io)?;
        let meta = handle.metadata().map_err(io)?;
        if meta.is_dir() {
            return Err(io(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
        }
        if meta.len() == 0 {
            return Ok(Self::Owned(Vec::new())); // an empty file cannot be mapped
        }
        // SAFETY: the map is read-only and private to this value; see the note above on truncation.
        let map = unsafe { memmap2::Mmap::map(&handle) }.map_err(io)?;
        Ok(Self::Mapped(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

//! Why a document could not be read: each error names the file, what was found, what was expected, and the way out.

use std::io;
use std::path::{Path, PathBuf};

use super::Format;

/// Why a document could not be turned into text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// No file or folder has this path.
    #[error("{}: no such file or folder; check the path (`-` reads standard input)", path.display())]
    Missing {
        /// The path asked for.
        path: PathBuf,
    },
    /// The file exists, and this user may not read it.
    #[error("{}: permission denied; make it readable (chmod u+r) or run as its owner", path.display())]
    PermissionDenied {
        /// The path asked for.
        path: PathBuf,
    },
    /// The system failed while reading.
    #[error("{}: cannot be read: {source}", path.display())]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
    },
    /// There is nothing but white space.
    #[error(
        "{name}: the {format} holds no text (found only white space); give a document with text"
    )]
    Empty {
        /// Name of the document.
        name: String,
        /// The format it was read as.
        format: Format,
    },
    /// The content is not text.
    #[error(
        "{name}: binary content, not text: byte 0x{byte:02x} at offset {offset}, and {percent}% of the first \
         {sampled} bytes are control bytes or invalid UTF-8; give text, or convert it to UTF-8 first"
    )]
    Binary {
        /// Name of the document.
        name: String,
        /// Offset in bytes of the first byte that is not text.
        offset: usize,
        /// That byte.
        byte: u8,
        /// Share of the sample that is not text, in percent.
        percent: usize,
        /// Length of the sample, bytes.
        sampled: usize,
    },
    /// A format that is recognised, and that nothing here reads.
    #[error("{name}: {found} is not a format that can be read; known: {known}", known = Format::KNOWN)]
    Unsupported {
        /// Name of the document.
        name: String,
        /// The format found, in words.
        found: String,
    },
    /// The content is encrypted.
    #[error(
        "{name}: the {format} is encrypted; remove its password or DRM and give the decrypted file"
    )]
    Encrypted {
        /// Name of the document.
        name: String,
        /// The format it was read as.
        format: Format,
    },
    /// The end of the file is missing.
    #[error(
        "{name}: the {format} is cut off after {bytes} bytes ({detail}); fetch the whole file again"
    )]
    Truncated {
        /// Name of the document.
        name: String,
        /// The format it was read as.
        format: Format,
        /// Bytes present.
        bytes: usize,
        /// What was expected and not found.
        detail: String,
    },
    /// The file breaks the rules of its format.
    #[error(
        "{name}: not a valid {format}: {detail}; open and save it again with another program, or convert it to text"
    )]
    Malformed {
        /// Name of the document.
        name: String,
        /// The format it was read as.
        format: Format,
        /// What was found, and what was expected.
        detail: String,
    },
    /// A compressed file that expands beyond the limit.
    #[error(
        "{name}: the {format} expands to more than {limit} bytes from {bytes} bytes on disk; if the file is \
         trusted, raise the limit with --max-bytes"
    )]
    ExpandsTooFar {
        /// Name of the document.
        name: String,
        /// The format it was read as.
        format: Format,
        /// Bytes of the file as stored.
        bytes: usize,
        /// [`super::Limits::max_expanded_bytes`].
        limit: u64,
    },
    /// More input than the limit.
    #[error(
        "{name}: {found} bytes of input, above the limit of {limit} bytes; raise it with --max-bytes {found}"
    )]
    TooLong {
        /// Name of the document.
        name: String,
        /// Bytes found (for a stream, at least so many).
        found: u64,
        /// [`super::Limits::max_bytes`].
        limit: u64,
    },
    /// A PDF of pictures.
    #[error(
        "{name}: no readable text on the {pages} pages of the PDF, which is probably a scan; run OCR on it first (ocrmypdf, say)"
    )]
    NoText {
        /// Name of the document.
        name: String,
        /// Number of pages.
        pages: usize,
    },
    /// Standard input named twice.
    #[error("standard input (`-`) is named {count} times; it can be read once")]
    StdinTwice {
        /// Times it was named.
        count: usize,
    },
}

impl DocumentError {
    /// The typed form of a system error on `path`.
    pub(super) fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            io::ErrorKind::PermissionDenied => Self::PermissionDenied { path },
            _ => Self::Io { path, source },
        }
    }
}

//! Documents in, plain text out: files, folders and standard input become [`Document`]s that a tokenizer can take.
//!
//! The format is chosen by extension, then by content. Everything read is untrusted: sizes are bounded by [`Limits`],
//! and bad input gives a [`DocumentError`], never a panic.

mod epub;
mod error;
mod html;
mod pdf;
mod text;
mod tree;

#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use error::DocumentError;

/// What a document was read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Plain text, source code among it.
    Text,
    /// Markdown, kept as written.
    Markdown,
    /// HTML, its visible text.
    Html,
    /// PDF, the text of its pages in order, a form feed between two pages.
    Pdf,
    /// EPUB, its chapters in reading order.
    Epub,
    /// A folder, its text files in path order.
    Tree,
}

impl Format {
    /// The formats that can be read, for messages.
    pub const KNOWN: &str =
        "txt, md, html, pdf, epub, any UTF-8 text or source file, a folder, `-` for standard input";
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Text => "text file",
            Format::Markdown => "Markdown file",
            Format::Html => "HTML file",
            Format::Pdf => "PDF",
            Format::Epub => "EPUB",
            Format::Tree => "folder",
        })
    }
}

/// How much input is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one file, of all files of a folder, and of the text of all documents of [`read_all`].
    pub max_bytes: u64,
    /// Bytes that one compressed file (EPUB, PDF) may expand to.
    pub max_expanded_bytes: u64,
}

impl Limits {
    /// One limit, in bytes, for the input and for what it expands to (`--max-bytes`).
    pub fn with_max_bytes(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            max_expanded_bytes: max_bytes,
        }
    }
}

impl Default for Limits {
    /// 1 GiB for both.
    fn default() -> Self {
        Self::with_max_bytes(1 << 30)
    }
}

/// One document as plain text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The path as given, or `-` for standard input.
    pub name: String,
    /// The text: UTF-8, lines ended by `\n`, never only white space.
    pub text: String,
    /// What it was read as.
    pub source: Format,
    /// What was lost or guessed on the way, one sentence each, for the user.
    pub warnings: Vec<String>,
}

/// The text of one file, before it has a name.
struct Extracted {
    text: String,
    warnings: Vec<String>,
}

/// Reads one file or folder.
///
/// # Errors
/// See [`DocumentError`]. A file above [`Limits::max_bytes`] is refused from its metadata, before any byte is read.
pub fn read(path: &Path, limits: &Limits) -> Result<Document, DocumentError> {
    let metadata = std::fs::metadata(path).map_err(|error| DocumentError::from_io(path, error))?;
    if metadata.is_dir() {
        return tree::read(path, limits);
    }
    let name = path.display().to_string();
    if metadata.len() > limits.max_bytes {
        return Err(DocumentError::TooLong {
            name,
            found: metadata.len(),
            limit: limits.max_bytes,
        });
    }
    let extension = path
        .extension()
        .and_then(|extension| extension.to_str())
        .map(str::to_ascii_lowercase);
    if let Some(found) = extension.as_deref().and_then(unsupported_extension) {
        return Err(DocumentError::Unsupported {
            name,
            found: found.to_owned(),
        });
    }
    let file = File::open(path).map_err(|error| DocumentError::from_io(path, error))?;
    let bytes = read_bounded(file, path, limits)?;
    from_bytes(&name, extension.as_deref(), &bytes, limits)
}

/// The files below the folder `path` that [`read`] would join, in path order, each to be read by itself, and a warning for
/// each that could not be looked at; the path itself if it is a file.
///
/// # Errors
/// When there is nothing at `path`.
pub fn files(path: &Path) -> Result<(Vec<PathBuf>, Vec<String>), DocumentError> {
    let metadata = std::fs::metadata(path).map_err(|error| DocumentError::from_io(path, error))?;
    if metadata.is_file() {
        return Ok((vec![path.to_path_buf()], Vec::new()));
    }
    let (entries, warnings) = tree::files(path);
    let paths = entries.into_iter().map(|entry| entry.into_path());
    Ok((paths.collect(), warnings))
}

/// Reads standard input to its end; the format is found from the content.
///
/// # Errors
/// As [`read`].
pub fn read_stdin(limits: &Limits) -> Result<Document, DocumentError> {
    let bytes = read_bounded(io::stdin().lock(), Path::new("-"), limits)?;
    from_bytes("-", None, &bytes, limits)
}

/// Reads several files, folders and standard input (`-`, at most once), in the order given.
///
/// # Errors
/// The first document that cannot be read, or [`DocumentError::TooLong`] when the texts together pass the limit.
pub fn read_all<P: AsRef<Path>>(
    paths: &[P],
    limits: &Limits,
) -> Result<Vec<Document>, DocumentError> {
    let count = paths
        .iter()
        .filter(|path| path.as_ref() == Path::new("-"))
        .count();
    if count > 1 {
        return Err(DocumentError::StdinTwice { count });
    }
    let mut documents = Vec::with_capacity(paths.len());
    let mut total = 0;
    for path in paths {
        let path = path.as_ref();
        let document = if path == Path::new("-") {
            read_stdin(limits)?
        } else {
            read(path, limits)?
        };
        total += document.text.len() as u64;
        if total > limits.max_bytes {
            let name = format!("the documents up to {}", document.name);
            return Err(DocumentError::TooLong {
                name,
                found: total,
                limit: limits.max_bytes,
            });
        }
        documents.push(document);
    }
    Ok(documents)
}

/// One text of several documents: a single one as it is, several each under a line `=== name ===`.
/// A folder brings headers of its own and gets no other.
pub fn join(documents: &[Document]) -> String {
    if let [only] = documents {
        return only.text.clone();
    }
    let mut joined = String::with_capacity(
        documents
            .iter()
            .map(|document| document.text.len() + 64)
            .sum(),
    );
    for document in documents {
        if document.source == Format::Tree {
            push_line_end(&mut joined);
            joined.push_str(&document.text);
        } else {
            push_section(&mut joined, &document.name, &document.text);
        }
    }
    joined
}

/// Turns the bytes of one file into a document; `extension` is lower case, without its dot.
///
/// # Errors
/// As [`read`].
pub fn from_bytes(
    name: &str,
    extension: Option<&str>,
    bytes: &[u8],
    limits: &Limits,
) -> Result<Document, DocumentError> {
    let format = sniff(name, extension, bytes)?;
    let extracted = match format {
        Format::Pdf => pdf::extract(name, bytes, limits)?,
        Format::Epub => epub::extract(name, bytes, limits)?,
        Format::Html => {
            let decoded = text::decode(name, bytes, text::declared_charset(bytes))?;
            Extracted {
                text: html::to_text(&decoded.text, html::Syntax::Html),
                warnings: decoded.warnings,
            }
        }
        Format::Text | Format::Markdown | Format::Tree => text::decode(name, bytes, None)?,
    };
    if extracted.text.trim().is_empty() {
        return Err(DocumentError::Empty {
            name: name.to_owned(),
            format,
        });
    }
    Ok(Document {
        name: name.to_owned(),
        text: extracted.text,
        source: format,
        warnings: extracted.warnings,
    })
}

/// The format of a file: its extension when that says enough, else its first bytes.
fn sniff(name: &str, extension: Option<&str>, bytes: &[u8]) -> Result<Format, DocumentError> {
    match extension {
        Some("pdf") => return Ok(Format::Pdf),
        Some("epub") => return Ok(Format::Epub),
        Some("html" | "htm" | "xhtml") => return Ok(Format::Html),
        Some("md" | "markdown") => return Ok(Format::Markdown),
        _ => {}
    }
    if bytes.starts_with(b"%PDF-") {
        return Ok(Format::Pdf);
    }
    if bytes.starts_with(b"PK\x03\x04") {
        // The EPUB container rule: the first entry, stored, is `mimetype`.
        let head = &bytes[..bytes.len().min(128)];
        return match find(head, b"application/epub+zip") {
            Some(_) => Ok(Format::Epub),
            None => Err(DocumentError::Unsupported {
                name: name.to_owned(),
                found: "a ZIP archive".to_owned(),
            }),
        };
    }
    const MAGIC: [(&[u8], &str); 10] = [
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"GIF8", "a GIF image"),
        (b"\x7fELF", "an ELF program"),
        (b"\x1f\x8b", "gzip-compressed data"),
        (b"BZh", "bzip2-compressed data"),
        (b"\xfd7zXZ", "xz-compressed data"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
        (b"\xd0\xcf\x11\xe0", "an old Office document"),
        (b"{\\rtf", "rich text (rtf)"),
    ];
    if let Some((_, found)) = MAGIC.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Err(DocumentError::Unsupported {
            name: name.to_owned(),
            found: (*found).to_owned(),
        });
    }
    // Source trees hold HTML templates under other extensions; only a file with no telling name is sniffed for HTML.
    if extension.is_none() {
        let start = bytes
            .strip_prefix(b"\xef\xbb\xbf")
            .unwrap_or(bytes)
            .trim_ascii_start();
        let head = start[..start.len().min(14)].to_ascii_lowercase();
        if head.starts_with(b"<!doctype html") || head.starts_with(b"<html") {
            return Ok(Format::Html);
        }
    }
    Ok(Format::Text)
}

/// The words for an extension that is known and not read.
fn unsupported_extension(extension: &str) -> Option<&'static str> {
    Some(match extension {
        "doc" | "docx" => "a Word document (doc, docx)",
        "odt" | "ods" | "odp" => "an OpenDocument file (odt, ods, odp)",
        "xls" | "xlsx" | "ppt" | "pptx" => "an Office file (xls, xlsx, ppt, pptx)",
        "rtf" => "rich text (rtf)",
        "mobi" | "azw" | "azw3" => "a Kindle book (mobi, azw)",
        "djvu" => "a DjVu scan",
        "zip" | "tar" | "gz" | "tgz" | "bz2" | "xz" | "zst" | "7z" | "rar" => {
            "an archive (unpack it first)"
        }
        "png" | "jpg" | "jpeg" | "gif" | "webp" | "tif" | "tiff" => "an image",
        "mp3" | "wav" | "flac" | "ogg" | "mp4" | "mkv" | "webm" => "sound or video",
        _ => return None,
    })
}

/// Reads to the end, one byte past the limit at most: the size of a pipe is not known before.
fn read_bounded(reader: impl Read, path: &Path, limits: &Limits) -> Result<Vec<u8>, DocumentError> {
    let mut bytes = Vec::new();
    reader
        .take(limits.max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| DocumentError::from_io(path, error))?;
    if bytes.len() as u64 > limits.max_bytes {
        let name = path.display().to_string();
        return Err(DocumentError::TooLong {
            name,
            found: bytes.len() as u64,
            limit: limits.max_bytes,
        });
    }
    Ok(bytes)
}

/// Appends `body` under its header line.
fn push_section(joined: &mut String, name: &str, body: &str) {
    push_line_end(joined);
    joined.push_str("=== ");
    joined.push_str(name);
    joined.push_str(" ===\n");
    joined.push_str(body);
}

fn push_line_end(text: &mut String) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
}

/// Offset of `needle` in `haystack`.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

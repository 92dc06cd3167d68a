//! One file on its way into the index: has it changed, its text, its passages, its rows.

use super::super::chunk::{self, ChunkConfig};
use longspan_data::document::{self, Document, DocumentError, Format, Limits};
use rusqlite::{OptionalExtension, Transaction, params};
use std::collections::HashMap;
use std::path::Path;

/// A file as the index knows it.
pub(super) struct Known {
    pub id: i64,
    pub hash: Vec<u8>,
    /// Bytes, and nanoseconds of the last change.
    pub stamp: (i64, i64),
}

/// A file as it is now.
pub(super) struct Looked {
    pub name: String,
    /// Its number in the index, if known.
    pub old: Option<i64>,
    /// None: nothing has changed.
    pub stamp: Option<(i64, i64)>,
    /// None: the content is the same.
    pub hash: Option<[u8; 32]>,
    /// None: the content is the same, or cannot be read.
    pub text: Option<ReadText>,
    pub warnings: Vec<String>,
}

pub(super) struct ReadText {
    pub bytes: u64,
    /// Title, line, first and last byte, text.
    pub passages: Vec<(chunk::Chunk, String)>,
}

impl ReadText {
    pub fn new(document: &Document, config: &ChunkConfig) -> Self {
        let chunks = match document.source {
            Format::Tree => chunk::chunk(&document.name, Format::Text, &document.text, config),
            format => chunk::chunk(&document.name, format, &document.text, config),
        };
        ReadText {
            bytes: document.text.len() as u64,
            passages: (chunks.into_iter())
                .map(|chunk| {
                    let text = document.text[chunk.start..chunk.end].trim().to_string();
                    (chunk, text)
                })
                .collect(),
        }
    }
}

pub(super) fn look(
    root: &Path,
    path: &Path,
    known: &HashMap<String, Known>,
    limits: &Limits,
    config: &ChunkConfig,
) -> Looked {
    let relative = match path.strip_prefix(root) {
        Ok(relative) if !relative.as_os_str().is_empty() => relative,
        _ => Path::new(path.file_name().unwrap_or(path.as_os_str())),
    };
    let name = relative
        .to_string_lossy()
        .replace(std::path::MAIN_SEPARATOR, "/");
    let old = known.get(&name);
    let mut looked = Looked {
        old: old.map(|known| known.id),
        name,
        stamp: None,
        hash: None,
        text: None,
        warnings: Vec::new(),
    };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            looked.stamp = Some((0, 0));
            looked.hash = Some([0; 32]);
            looked.warnings.push(format!("cannot be read: {error}"));
            return looked;
        }
    };
    let modified = (metadata.modified().ok())
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
        .map_or(0, |time| time.as_nanos() as i64);
    let stamp = (metadata.len() as i64, modified);
    if old.is_some_and(|known| known.stamp == stamp) {
        return looked;
    }
    looked.stamp = Some(stamp);
    if metadata.len() > limits.max_bytes {
        looked.hash = Some([0; 32]);
        looked.warnings.push(format!(
            "has {} bytes, more than the limit of {}",
            metadata.len(),
            limits.max_bytes
        ));
        return looked;
    }
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            // Tried again next time: the stamp says nothing about permissions.
            looked.stamp = Some((0, 0));
            looked.hash = Some([0; 32]);
            looked.warnings.push(format!("cannot be read: {error}"));
            return looked;
        }
    };
    let hash = *blake3::hash(&bytes).as_bytes();
    if old.is_some_and(|known| known.hash == hash) {
        return looked;
    }
    looked.hash = Some(hash);
    let extension = (path.extension().and_then(|e| e.to_str())).map(str::to_ascii_lowercase);
    match document::from_bytes(&looked.name, extension.as_deref(), &bytes, limits) {
        Ok(document) => {
            looked.text = Some(ReadText::new(&document, config));
            looked.warnings = document.warnings;
        }
        Err(DocumentError::Empty { .. }) => {}
        Err(error) => {
            // The error names the file, as the list of warnings does.
            let text = error.to_string();
            let bare = text.strip_prefix(&format!("{}: ", looked.name));
            looked
                .warnings
                .push(bare.unwrap_or(&text).replace('\n', " "));
        }
    }
    looked
}

impl Looked {
    pub fn store(&self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let Some((size, modified)) = self.stamp else {
            return Ok(());
        };
        let Some(hash) = &self.hash else {
            // Only touched.
            tx.execute(
                "UPDATE files SET size = ?2, modified = ?3 WHERE path = ?1",
                params![self.name, size, modified],
            )?;
            return Ok(());
        };
        let old: Option<i64> = match self.old {
            Some(id) => Some(id),
            None => tx
                .query_row(
                    "SELECT id FROM files WHERE path = ?1",
                    [&self.name],
                    |row| row.get(0),
                )
                .optional()?,
        };
        if let Some(id) = old {
            forget(tx, id)?;
        }
        tx.execute(
            "INSERT INTO files (path, hash, size, modified, warnings) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                self.name,
                &hash[..],
                size,
                modified,
                self.warnings.join("\n")
            ],
        )?;
        let file = tx.last_insert_rowid();
        let mut insert = tx.prepare(
            "INSERT INTO passages (file, title, line, first, last, text, words) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0)",
        )?;
        let mut index = tx.prepare("INSERT INTO words (rowid, body) VALUES (?1, ?2)")?;
        let mut length = tx.prepare("SELECT sz FROM words_docsize WHERE id = ?1")?;
        let mut update = tx.prepare("UPDATE passages SET words = ?2 WHERE id = ?1")?;
        for (chunk, text) in self.text.iter().flat_map(|text| &text.passages) {
            insert.execute(params![
                file,
                chunk.title,
                chunk.line as i64,
                chunk.start as i64,
                chunk.end as i64,
                text
            ])?;
            let id = tx.last_insert_rowid();
            index.execute(params![id, indexed(&format!("{}\n{text}", chunk.title))])?;
            let words = length.query_row([id], |row| Ok(varint(row.get_ref(0)?.as_blob()?)))?;
            update.execute(params![id, words])?;
        }
        Ok(())
    }
}

/// Takes a file and its passages out.
pub(super) fn forget(tx: &Transaction<'_>, file: i64) -> rusqlite::Result<()> {
    let of_file = "SELECT id FROM passages WHERE file = ?1";
    tx.execute(
        &format!("DELETE FROM words WHERE rowid IN ({of_file})"),
        [file],
    )?;
    tx.execute(
        &format!("DELETE FROM vectors WHERE passage IN ({of_file})"),
        [file],
    )?;
    tx.execute("DELETE FROM passages WHERE file = ?1", [file])?;
    tx.execute("DELETE FROM files WHERE id = ?1", [file])?;
    Ok(())
}

/// SQLite's variable-length integer: seven bits a byte, the highest first.
fn varint(bytes: &[u8]) -> i64 {
    let mut value = 0;
    for &byte in bytes.iter().take(8) {
        value = value << 7 | i64::from(byte & 127);
        if byte < 128 {
            break;
        }
    }
    value
}

/// A text as its words are indexed: after `parseConfig` its parts `parse Config` come too.
pub(super) fn indexed(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    out.push_str(text);
    for word in text.split(|c: char| !c.is_alphanumeric()) {
        let mut parts: Vec<&str> = Vec::new();
        let (mut start, mut lower) = (0, false);
        for (at, c) in word.char_indices() {
            if lower && c.is_uppercase() {
                parts.push(&word[start..at]);
                start = at;
            }
            lower = c.is_lowercase();
        }
        if !parts.is_empty() {
            for part in parts.into_iter().chain([&word[start..]]) {
                out.push(' ');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_programs_are_found_by_their_parts() {
        assert_eq!(
            indexed("call parseConfigFile now"),
            "call parseConfigFile now parse Config File"
        );
        assert_eq!(indexed("HTML snake_case x1"), "HTML snake_case x1");
    }

    #[test]
    fn variable_length_integers() {
        assert_eq!(varint(&[5]), 5);
        assert_eq!(varint(&[0x81, 0x00]), 128);
        assert_eq!(varint(&[]), 0);
    }
}

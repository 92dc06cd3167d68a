//! Replies kept by all that decides them, so that an answered question is not asked again.

use crate::cell::{read_json, write_json};
use crate::error::{EvalError, Result};
use crate::target::Output;
use crate::task::{Sample, Work};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder of replies, named by hash.
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Uses this folder, making it if need be.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folder: &Path) -> Result<Cache> {
        fs::create_dir_all(folder).map_err(EvalError::io(folder))?;
        Ok(Cache {
            folder: folder.into(),
        })
    }

    /// The key of a sample for a target.
    pub fn key(identity: &str, sample: &Sample, seed: u64) -> String {
        let mut hash = blake3::Hasher::new();
        let mut add = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        add(env!("CARGO_PKG_VERSION"));
        add(identity);
        for segment in &sample.prompt.segments {
            add(&format!("{:?}", std::mem::discriminant(segment)));
            add(segment.text());
        }
        let work = match &sample.work {
            Work::Generate(decode) => serde_json::to_string(decode),
            Work::Likelihood { protocol, tokens } => serde_json::to_string(&(protocol, tokens)),
            Work::Search { documents } => serde_json::to_string(documents.digest()),
        };
        add(&work.unwrap_or_default());
        add(&format!("{:?} {seed}", sample.prompt.truncation));
        hash.finalize().to_hex().to_string()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder
            .join(&key[..2])
            .join(format!("{}.json", &key[2..]))
    }

    /// A kept reply. A file that cannot be read counts as none.
    pub fn get(&self, key: &str) -> Option<Output> {
        let mut output: Output = read_json(&self.path(key)).ok()?;
        output.cost.from_cache = true;
        Some(output)
    }

    /// Keeps a reply; refusals are not kept, as they depend on the machine's memory.
    ///
    /// # Errors
    /// The disk's.
    pub fn put(&self, key: &str, output: &Output) -> Result<()> {
        if output.error.is_some() {
            return Ok(());
        }
        let path = self.path(key);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(EvalError::io(parent))?;
        }
        write_json(&path, output)
    }
}

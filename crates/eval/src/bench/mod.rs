//! Benchmarks, one file or folder each.

pub mod altered;
pub mod dataset;
pub mod export;
pub mod file_task;
pub mod judge;
pub mod leval;
pub mod lines;
pub mod loco;
pub mod longbench;
pub mod longbench_write;
pub mod longicl;
pub mod longsafety;
pub mod m4le;
pub mod needle;
pub mod passkey;
pub mod perplexity;
pub mod ruler;
pub mod threading;

use crate::error::{EvalError, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::Path;

/// An attribute of a sample.
pub(crate) fn attr(name: &str, value: impl Into<Value>) -> (String, Value) {
    (name.into(), value.into())
}

/// Rows of a JSON-lines text; `path` names it in messages.
pub(crate) fn rows<T: DeserializeOwned>(text: &str, path: &Path) -> Result<Vec<T>> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| EvalError::Row {
                path: path.into(),
                line: index + 1,
                reason: error.to_string(),
            })
        })
        .collect()
}

/// Texts of a file or folder: `.txt` files in name order, and `.jsonl` files with a `text` field.
pub(crate) fn texts(path: &Path) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).map_err(EvalError::io(path))? {
            files.push(entry.map_err(EvalError::io(path))?.path());
        }
        files.sort();
    } else {
        files.push(path.to_path_buf());
    }
    let mut all = Vec::new();
    for file in files {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let read = || std::fs::read_to_string(&file).map_err(EvalError::io(&file));
        match file.extension().and_then(|e| e.to_str()) {
            Some("txt" | "md") => all.push((name, read()?)),
            Some("jsonl") => {
                for (index, row) in rows::<Value>(&read()?, &file)?.into_iter().enumerate() {
                    let Some(text) = row["text"].as_str() else {
                        return Err(EvalError::Row {
                            path: file.clone(),
                            line: index + 1,
                            reason: "found no field `text` with a string".into(),
                        });
                    };
                    all.push((format!("{name}:{}", index + 1), text.to_string()));
                }
            }
            _ => {}
        }
    }
    if all.is_empty() {
        return Err(EvalError::Input(format!(
            "{}: found no .txt, .md or .jsonl file",
            path.display()
        )));
    }
    Ok(all)
}

/// The largest `n` in 0..=`most` whose text fits `limit` tokens; None if not even 0 does.
pub(crate) fn largest(
    most: usize,
    limit: usize,
    mut tokens: impl FnMut(usize) -> Result<usize>,
) -> Result<Option<usize>> {
    if tokens(0)? > limit {
        return Ok(None);
    }
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if tokens(middle)? <= limit {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Ok(Some(low))
}

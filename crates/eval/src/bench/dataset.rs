//! Published data sets on disk: a folder, one file, or a zip, of JSON lines or JSON arrays; and the small sets of the
//! same form that ship with the program. A bad row is an error with its file and line.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::error::{EvalError, Result};
use crate::task::SampleCx;

/// Files that ship with the program: path inside the data set, content.
pub type Shipped = &'static [(&'static str, &'static str)];

/// Where rows come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A folder, a zip, or the file itself.
    Path(&'a Path),
    /// Rows that ship with the program.
    Shipped(Shipped),
}

/// A row with its place.
#[derive(Clone, Debug)]
pub struct Row {
    pub path: PathBuf,
    /// From 1.
    pub line: usize,
    /// The row's JSON. Kept as text, because the order of an object's fields can matter.
    pub text: String,
}

impl Row {
    /// The row as a type.
    ///
    /// # Errors
    /// A missing or wrong field, with the file and line.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.text).map_err(|e| self.wrong(e.to_string()))
    }

    /// An error about this row.
    pub fn wrong(&self, reason: impl Into<String>) -> EvalError {
        EvalError::Row {
            path: self.path.clone(),
            line: self.line,
            reason: reason.into(),
        }
    }
}

/// The source that a run's context names for the benchmark `name`.
///
/// # Errors
/// Neither data nor the shipped samples are asked for.
pub fn source<'a>(cx: &SampleCx<'a>, name: &str, shipped: Shipped) -> Result<Source<'a>> {
    match cx.data {
        Some(path) => Ok(Source::Path(path)),
        None if cx.fixtures => Ok(Source::Shipped(shipped)),
        None => Err(EvalError::Input(format!(
            "{name} reads its published data: give the folder with --data (docs/data-sets.md says where it is \
             published), or take the small samples of the program with --sample"
        ))),
    }
}

impl Source<'_> {
    /// Rows of the first of these files that exists; names are relative, as `data/trec.jsonl`. A source that is
    /// itself one file holds them all, whatever its name.
    ///
    /// # Errors
    /// No such file, or a row that is not JSON.
    pub fn rows(&self, names: &[String]) -> Result<Vec<Row>> {
        match self {
            Source::Shipped(files) => {
                for name in names {
                    if let Some((path, text)) = files.iter().find(|(path, _)| path == name) {
                        return parse(Path::new(path), text);
                    }
                }
                Err(missing(Path::new("the samples of this program"), names))
            }
            Source::Path(root) => {
                if root.extension().is_some_and(|e| e == "zip") {
                    return self.zipped(root, names);
                }
                if root.is_file() {
                    return parse(root, &read(root)?);
                }
                for name in names {
                    let path = root.join(name);
                    if path.is_file() {
                        return parse(&path, &read(&path)?);
                    }
                }
                let zip = root.join("data.zip");
                if zip.is_file() {
                    return self.zipped(&zip, names);
                }
                Err(missing(root, names))
            }
        }
    }

    /// Whether one of these files exists, without reading it. True for a single file.
    pub fn has(&self, names: &[String]) -> bool {
        match self {
            Source::Shipped(files) => names
                .iter()
                .any(|n| files.iter().any(|(path, _)| path == n)),
            Source::Path(root) => {
                root.is_file() || names.iter().any(|name| root.join(name).is_file())
            }
        }
    }

    fn zipped(&self, path: &Path, names: &[String]) -> Result<Vec<Row>> {
        let bad = |e: zip::result::ZipError| EvalError::Input(format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(EvalError::io(path))?;
        let mut archive = zip::ZipArchive::new(file).map_err(bad)?;
        let entries: Vec<String> = archive
            .file_names()
            .map(|name| Ok(name.map_err(bad)?.into_owned()))
            .collect::<Result<_>>()?;
        for name in names {
            // Archives differ in the folders above their files.
            let ends = |entry: &&String| {
                let entry = entry.as_str();
                entry == name || entry.ends_with(&format!("/{name}"))
            };
            if let Some(entry) = entries.iter().find(ends) {
                let mut text = String::new();
                let mut reader = archive.by_name(entry).map_err(bad)?;
                let inside = path.join(entry);
                reader
                    .read_to_string(&mut text)
                    .map_err(EvalError::io(&inside))?;
                return parse(&inside, &text);
            }
        }
        Err(missing(path, names))
    }
}

fn missing(root: &Path, names: &[String]) -> EvalError {
    EvalError::Input(format!(
        "{}: found none of {}",
        root.display(),
        names.join(", ")
    ))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(EvalError::io(path))
}

/// Rows of JSON lines, or of one JSON array (then `line` counts its elements).
fn parse(path: &Path, text: &str) -> Result<Vec<Row>> {
    let wrong = |line, reason: String| EvalError::Row {
        path: path.into(),
        line,
        reason,
    };
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_start().starts_with('[') {
        let list: Vec<Box<RawValue>> =
            serde_json::from_str(text).map_err(|e| wrong(e.line(), e.to_string()))?;
        let rows = list.into_iter().enumerate().map(|(index, value)| Row {
            path: path.into(),
            line: index + 1,
            text: value.get().into(),
        });
        return Ok(rows.collect());
    }
    // Only "\n" ends a row: published texts hold other line ends.
    let lines = text.split('\n').enumerate();
    let rows = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| Row {
            path: path.into(),
            line: index + 1,
            text: line.into(),
        });
    Ok(rows.collect())
}

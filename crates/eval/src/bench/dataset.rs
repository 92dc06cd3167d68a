//! Published data sets on disk: a folder, one file, or a zip, of JSON lines, JSON arrays or parquet; and the small sets
//! of the same form that ship with the program. A bad row is an error with its file and line.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::error::{EvalError, Result};
use crate::task::SampleCx;

/// Files that ship with the program: path inside the data set, content.
pub type Shipped = &'static [(&'static str, &'static str)];

/// Where rows come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A folder, a zip, or the file itself (JSON lines, JSON, parquet).
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
    /// Rows of the first of these files that exists; names are relative, as `data/trec.jsonl`. Beside `trec.jsonl`
    /// also `trec.parquet`, or its parts `trec-00000-of-00002.parquet`, are found, and all of these in a folder
    /// directly below. A source that is itself one file holds them all, whatever its name.
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
                    return match is_parquet(root) {
                        true => parquet(root),
                        false => parse(root, &read(root)?),
                    };
                }
                if let Some(files) = candidates(root, names)? {
                    let rows: Vec<Vec<Row>> = files
                        .iter()
                        .map(|file| match is_parquet(file) {
                            true => parquet(file),
                            false => parse(file, &read(file)?),
                        })
                        .collect::<Result<_>>()?;
                    return Ok(rows.concat());
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
                root.is_file() || candidates(root, names).is_ok_and(|found| found.is_some())
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

/// The files of the first of these names that is there: in the folder, or in a folder directly below it, as data sets
/// are often published.
fn candidates(root: &Path, names: &[String]) -> Result<Option<Vec<PathBuf>>> {
    let mut folders = vec![root.to_path_buf()];
    if root.is_dir() {
        for entry in std::fs::read_dir(root).map_err(EvalError::io(root))? {
            let path = entry.map_err(EvalError::io(root))?.path();
            if path.is_dir() {
                folders.push(path);
            }
        }
        folders[1..].sort();
    }
    for folder in &folders {
        for name in names {
            let path = folder.join(name);
            if path.is_file() {
                return Ok(Some(vec![path]));
            }
            let parts = parquet_parts(&path)?;
            if !parts.is_empty() {
                return Ok(Some(parts));
            }
        }
    }
    Ok(None)
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "parquet")
}

/// The parquet files that hold what `path` (as `data/test.jsonl`) would: `data/test.parquet`, or all of
/// `data/test-*.parquet` in the order of their names.
fn parquet_parts(path: &Path) -> Result<Vec<PathBuf>> {
    let whole = path.with_extension("parquet");
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    let (Some(folder), Some(stem)) = (path.parent(), path.file_stem().and_then(|s| s.to_str()))
    else {
        return Ok(Vec::new());
    };
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut parts = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(EvalError::io(folder))? {
        let file = entry.map_err(EvalError::io(folder))?.path();
        let name = file.file_stem().and_then(|s| s.to_str()).unwrap_or("");
        let part = name
            .strip_prefix(stem)
            .and_then(|rest| rest.strip_prefix('-'));
        // `test-00000-of-00001`, not `test-hard`.
        if is_parquet(&file) && part.is_some_and(|p| p.starts_with(|c: char| c.is_ascii_digit())) {
            parts.push(file);
        }
    }
    parts.sort();
    Ok(parts)
}

/// Rows of a parquet file as JSON, fields in the order of its columns.
fn parquet(path: &Path) -> Result<Vec<Row>> {
    let bad = |e: &dyn std::fmt::Display| EvalError::Input(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(EvalError::io(path))?;
    let reader = SerializedFileReader::new(file).map_err(|e| bad(&e))?;
    let mut rows = Vec::new();
    for (index, row) in reader.get_row_iter(None).map_err(|e| bad(&e))?.enumerate() {
        let row = row.map_err(|e| bad(&e))?;
        let mut text = String::new();
        object(&mut text, row.get_column_iter());
        rows.push(Row {
            path: path.into(),
            line: index + 1,
            text,
        });
    }
    Ok(rows)
}

fn string(out: &mut String, text: &str) {
    *out += &serde_json::Value::from(text).to_string();
}

fn object<'a>(out: &mut String, fields: impl Iterator<Item = (&'a String, &'a Field)>) {
    out.push('{');
    for (index, (name, field)) in fields.enumerate() {
        if index > 0 {
            out.push(',');
        }
        string(out, name);
        out.push(':');
        json(out, field);
    }
    out.push('}');
}

fn json(out: &mut String, field: &Field) {
    match field {
        Field::Null => *out += "null",
        Field::Str(text) => string(out, text),
        // Text whose column does not say that it is text.
        Field::Bytes(bytes) => string(out, &String::from_utf8_lossy(bytes.data())),
        Field::Group(row) => object(out, row.get_column_iter()),
        Field::ListInternal(list) => {
            out.push('[');
            for (index, element) in list.elements().iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                json(out, element);
            }
            out.push(']');
        }
        Field::MapInternal(map) => {
            out.push('{');
            for (index, (key, value)) in map.entries().iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                match key {
                    Field::Str(text) => string(out, text),
                    other => string(out, &other.to_string()),
                }
                out.push(':');
                json(out, value);
            }
            out.push('}');
        }
        Field::Bool(value) => *out += &value.to_string(),
        Field::Byte(value) => *out += &value.to_string(),
        Field::Short(value) => *out += &value.to_string(),
        Field::Int(value) => *out += &value.to_string(),
        Field::Long(value) => *out += &value.to_string(),
        Field::UByte(value) => *out += &value.to_string(),
        Field::UShort(value) => *out += &value.to_string(),
        Field::UInt(value) => *out += &value.to_string(),
        Field::ULong(value) => *out += &value.to_string(),
        // JSON has no NaN: null, as serde_json writes it.
        Field::Float(value) => *out += &serde_json::Value::from(*value).to_string(),
        Field::Double(value) => *out += &serde_json::Value::from(*value).to_string(),
        // Dates, times, decimals: as people write them.
        other => string(out, &other.to_string()),
    }
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

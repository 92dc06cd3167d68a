//! Cells and run folders: every result is a list of cells; predictions are appended line by line
//! and survive a kill.

use crate::error::{EvalError, Result};
use crate::target::Cost;
use crate::task::Prediction;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// One combination that is measured.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cell {
    /// Task id.
    pub task: String,
    /// Task version.
    pub version: u32,
    /// Length in the task's unit.
    pub length: usize,
    /// Model.
    pub model: String,
    /// Context policy, "-" if none.
    pub policy: String,
    /// Seed of samples and sampling.
    pub seed: u64,
}

impl Cell {
    /// File name without extension: readable, with a hash of the whole so that no two clash.
    pub fn name(&self) -> String {
        let plain = |text: &str| -> String {
            let mut out: String = text
                .chars()
                .map(|c| {
                    if c.is_ascii_alphanumeric() || c == '-' {
                        c
                    } else {
                        '_'
                    }
                })
                .take(32)
                .collect();
            out.truncate(32);
            out
        };
        let text = serde_json::to_string(self).unwrap_or_default();
        let hash = blake3::hash(text.as_bytes()).to_hex();
        format!(
            "{}.{}.{}.{}.{}",
            plain(&self.task),
            self.length,
            plain(&self.model),
            plain(&self.policy),
            &hash[..6]
        )
    }
}

/// What a run was asked for; a folder is gone on with only by the same request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Of the harness.
    pub harness: String,
    /// `official`: behaviour of the published code, quirks included.
    pub compat: String,
    /// The cells, with the number of samples of each.
    pub cells: Vec<(Cell, usize)>,
    /// What counted tokens.
    pub tokenizer: String,
    /// All that decides the outputs of each target.
    pub targets: Vec<String>,
    /// Options in words, for the report's head.
    pub options: Vec<(String, String)>,
    /// When the folder was made, seconds since 1970. Not compared.
    pub created: u64,
}

impl RunConfig {
    fn same(&self, other: &RunConfig) -> bool {
        let plain = |config: &RunConfig| RunConfig {
            created: 0,
            ..config.clone()
        };
        plain(self) == plain(other)
    }
}

/// A run's folder.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes the folder, or finds one that was made by the same request.
    ///
    /// # Errors
    /// A folder that holds another run.
    pub fn create(path: &Path, config: &RunConfig) -> Result<RunFolder> {
        let folder = RunFolder { path: path.into() };
        if folder.config_path().exists() {
            if !folder.config()?.same(config) {
                return Err(EvalError::Input(format!(
                    "{}: the folder holds a run with other options; name another folder with --out",
                    path.display()
                )));
            }
            return Ok(folder);
        }
        let cells = path.join("cells");
        fs::create_dir_all(&cells).map_err(EvalError::io(&cells))?;
        write_json(&folder.config_path(), config)?;
        Ok(folder)
    }

    /// A folder with a finished or broken-off run.
    ///
    /// # Errors
    /// There is no run.json.
    pub fn open(path: &Path) -> Result<RunFolder> {
        let folder = RunFolder { path: path.into() };
        if !folder.config_path().is_file() {
            return Err(EvalError::Input(format!(
                "{}: this is no run folder (it has no run.json)",
                path.display()
            )));
        }
        Ok(folder)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn config_path(&self) -> PathBuf {
        self.path.join("run.json")
    }

    /// What was asked for.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn config(&self) -> Result<RunConfig> {
        read_json(&self.config_path())
    }

    /// The stored replies of a cell.
    pub fn predictions_path(&self, cell: &Cell) -> PathBuf {
        self.path
            .join("cells")
            .join(format!("{}.pred.jsonl", cell.name()))
    }

    /// What each reply took.
    pub fn costs_path(&self, cell: &Cell) -> PathBuf {
        self.path
            .join("cells")
            .join(format!("{}.cost.jsonl", cell.name()))
    }

    /// The scores of a cell.
    pub fn score_path(&self, cell: &Cell) -> PathBuf {
        self.path
            .join("cells")
            .join(format!("{}.score.json", cell.name()))
    }

    /// Stored replies of a cell in sample order; empty if there are none yet.
    ///
    /// # Errors
    /// A row that is not JSON, unless it is a torn last line.
    pub fn predictions(&self, cell: &Cell) -> Result<Vec<Prediction>> {
        let mut rows: Vec<Prediction> = read_lines(&self.predictions_path(cell))?.0;
        rows.sort_by_key(|row| row.index);
        Ok(rows)
    }

    /// Costs by sample id.
    ///
    /// # Errors
    /// As [`RunFolder::predictions`].
    pub fn costs(&self, cell: &Cell) -> Result<Vec<CostRow>> {
        Ok(read_lines(&self.costs_path(cell))?.0)
    }
}

/// What one reply took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostRow {
    /// The sample's id.
    pub id: String,
    /// Time and memory.
    #[serde(flatten)]
    pub cost: Cost,
    /// Tokens read and written.
    pub tokens: (usize, usize),
}

/// Reads JSON.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(EvalError::io(path))?;
    serde_json::from_str(&text).map_err(|error| EvalError::Row {
        path: path.into(),
        line: error.line(),
        reason: error.to_string(),
    })
}

/// Writes JSON so that a reader sees the old or the new file, never a part.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| EvalError::Input(e.to_string()))?;
    write_file(path, &(text + "\n"))
}

/// As [`write_json`], for text.
pub(crate) fn write_file(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, text).map_err(EvalError::io(&part))?;
    fs::rename(&part, path).map_err(EvalError::io(path))
}

/// Rows of a JSON-lines file, and the bytes up to the last whole line. A missing file has none.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<(Vec<T>, u64)> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(error) => return Err(EvalError::io(path)(error)),
    };
    let mut reader = BufReader::new(file);
    let (mut rows, mut good, mut line, mut text) = (Vec::new(), 0u64, 0, Vec::new());
    loop {
        text.clear();
        let read = reader
            .read_until(b'\n', &mut text)
            .map_err(EvalError::io(path))?;
        if read == 0 || text.last() != Some(&b'\n') {
            // A line without its end was torn by a kill.
            return Ok((rows, good));
        }
        line += 1;
        match serde_json::from_slice(&text) {
            Ok(row) => rows.push(row),
            Err(error) => {
                return Err(EvalError::Row {
                    path: path.into(),
                    line,
                    reason: error.to_string(),
                });
            }
        }
        good += read as u64;
    }
}

/// A cell's files while it runs.
pub struct CellWriter {
    predictions: Lines,
    costs: Lines,
    done: HashSet<String>,
    order: Vec<usize>,
}

/// An append-only file of JSON lines.
struct Lines {
    path: PathBuf,
    file: File,
    unsynced: usize,
}

/// Rows between two syncs.
const SYNC_EVERY: usize = 16;

impl Lines {
    fn open(path: PathBuf, good: u64) -> Result<Lines> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(EvalError::io(&path))?;
        file.set_len(good).map_err(EvalError::io(&path))?;
        Ok(Lines {
            path,
            file,
            unsynced: 0,
        })
    }

    fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(row).map_err(|e| EvalError::Input(e.to_string()))?;
        text.push(b'\n');
        // One call, so that a kill tears at most this line.
        self.file
            .write_all(&text)
            .map_err(EvalError::io(&self.path))?;
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY {
            self.file.sync_data().map_err(EvalError::io(&self.path))?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

impl CellWriter {
    /// Opens a cell's files; a torn last line is dropped, and rows of samples that are not in
    /// `known` are refused.
    ///
    /// # Errors
    /// Files that cannot be read or belong to other samples.
    pub fn open(folder: &RunFolder, cell: &Cell, known: &HashSet<String>) -> Result<CellWriter> {
        let path = folder.predictions_path(cell);
        let (rows, good) = read_lines::<Prediction>(&path)?;
        if let Some((line, row)) = rows
            .iter()
            .enumerate()
            .find(|(_, row)| !known.contains(&row.id))
        {
            return Err(EvalError::Row {
                path,
                line: line + 1,
                reason: format!("sample {} is none of this run's", row.id),
            });
        }
        let costs = folder.costs_path(cell);
        let (_, good_costs) = read_lines::<CostRow>(&costs)?;
        Ok(CellWriter {
            order: rows.iter().map(|row| row.index).collect(),
            done: rows.into_iter().map(|row| row.id).collect(),
            predictions: Lines::open(path, good)?,
            costs: Lines::open(costs, good_costs)?,
        })
    }

    /// Ids with a stored reply.
    pub fn done(&self) -> &HashSet<String> {
        &self.done
    }

    /// Stores a reply; a second one for a sample is dropped.
    ///
    /// # Errors
    /// The disk's.
    pub fn append(&mut self, row: &Prediction, cost: &CostRow) -> Result<()> {
        if !self.done.insert(row.id.clone()) {
            return Ok(());
        }
        self.order.push(row.index);
        self.costs.append(cost)?;
        self.predictions.append(row)
    }

    /// Brings the rows into sample order, so that equal runs leave equal files.
    ///
    /// # Errors
    /// The disk's.
    pub fn finish(self, folder: &RunFolder, cell: &Cell) -> Result<()> {
        let path = folder.predictions_path(cell);
        self.predictions
            .file
            .sync_data()
            .map_err(EvalError::io(&path))?;
        if self.order.is_sorted() {
            return Ok(());
        }
        let mut text = String::new();
        for row in folder.predictions(cell)? {
            text += &serde_json::to_string(&row).map_err(|e| EvalError::Input(e.to_string()))?;
            text.push('\n');
        }
        write_file(&path, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell() -> Cell {
        Cell {
            task: "ruler/vt".into(),
            version: 1,
            length: 1024,
            model: "a model".into(),
            policy: "infllm:n_local=64,block=8".into(),
            seed: 0,
        }
    }

    fn config() -> RunConfig {
        RunConfig {
            harness: "0".into(),
            compat: "official".into(),
            cells: vec![(cell(), 3)],
            tokenizer: "words".into(),
            targets: Vec::new(),
            options: Vec::new(),
            created: 1,
        }
    }

    fn row(index: usize) -> Prediction {
        Prediction {
            id: format!("id{index}"),
            index,
            text: "line\nbreak".into(),
            ..Prediction::default()
        }
    }

    fn cost(index: usize) -> CostRow {
        CostRow {
            id: format!("id{index}"),
            cost: Cost::default(),
            tokens: (1, 2),
        }
    }

    #[test]
    fn a_torn_line_is_dropped_and_rows_come_out_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path(), &config()).unwrap();
        let known: HashSet<String> = (0..3).map(|i| format!("id{i}")).collect();
        let mut writer = CellWriter::open(&folder, &cell(), &known).unwrap();
        writer.append(&row(2), &cost(2)).unwrap();
        writer.append(&row(0), &cost(0)).unwrap();
        writer.append(&row(0), &cost(0)).unwrap();
        drop(writer);
        let path = folder.predictions_path(&cell());
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"id\":\"id1\",\"ind");
        fs::write(&path, &bytes).unwrap();
        let mut writer = CellWriter::open(&folder, &cell(), &known).unwrap();
        assert_eq!(writer.done().len(), 2);
        writer.append(&row(1), &cost(1)).unwrap();
        writer.finish(&folder, &cell()).unwrap();
        let ids: Vec<usize> = folder
            .predictions(&cell())
            .unwrap()
            .iter()
            .map(|r| r.index)
            .collect();
        assert_eq!(ids, [0, 1, 2]);
        let on_disk = fs::read_to_string(&path).unwrap();
        assert!(on_disk.starts_with("{\"id\":\"id0\"") && on_disk.lines().count() == 3);
    }

    #[test]
    fn another_request_or_a_broken_row_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path(), &config()).unwrap();
        let later = RunConfig {
            created: 9,
            ..config()
        };
        assert!(RunFolder::create(dir.path(), &later).is_ok());
        let other = RunConfig {
            tokenizer: "other".into(),
            ..config()
        };
        let error = RunFolder::create(dir.path(), &other)
            .unwrap_err()
            .to_string();
        assert!(error.contains("other options"), "{error}");
        fs::write(folder.predictions_path(&cell()), "{}\nno json\n").unwrap();
        let error = folder.predictions(&cell()).unwrap_err().to_string();
        assert!(error.contains("pred.jsonl:1"), "{error}");
        assert!(RunFolder::open(&dir.path().join("cells")).is_err());
    }

    #[test]
    fn names_are_files_and_do_not_clash() {
        let other = Cell {
            policy: "infllm:n_local=64,block:8".into(),
            ..cell()
        };
        assert_ne!(cell().name(), other.name());
        assert!(
            cell()
                .name()
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        );
    }
}

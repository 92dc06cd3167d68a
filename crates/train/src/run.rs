//! A run on disk: configuration, events, checkpoints. Whatever kills the process, what was written stays whole.
//!
//! `config.toml` (resolved), `events.jsonl` (one event a line), `step-NNNNNN/` with `model.safetensors`,
//! `optim.safetensors` and `state.json`, and `latest`, the name of the newest checkpoint. A checkpoint is written to a
//! temporary folder, synced and renamed; `latest` changes after that.

use crate::error::{At, Result, TrainError};
use crate::objective::Objective;
use crate::source::Source;
use crate::trainer::{StepEvent, Trainer};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Layout of checkpoints; another number is refused.
const FORMAT: u32 = 1;

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    format: u32,
    step: u64,
    tokens: u64,
    optimizer_steps: u64,
    not_finite: usize,
    source: Value,
    code_version: String,
}

/// A line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A step.
    Step(StepEvent),
    /// A measurement between steps.
    Eval {
        /// Steps made.
        step: u64,
        /// Names and values.
        values: serde_json::Map<String, Value>,
    },
}

impl Event {
    /// Steps made at this event.
    pub fn step(&self) -> u64 {
        match self {
            Event::Step(event) => event.step,
            Event::Eval { step, .. } => *step,
        }
    }
}

/// The folder of a run.
pub struct RunFolder {
    path: PathBuf,
    events: File,
    keep_last: usize,
    files: Vec<(String, Vec<u8>)>,
}

impl RunFolder {
    /// Opens or makes the folder. An existing run must have been started with the same configuration.
    pub fn open(path: &Path, config: &str, keep_last: usize) -> Result<Self> {
        fs::create_dir_all(path).at(path)?;
        let file = path.join("config.toml");
        match fs::read_to_string(&file) {
            Ok(found) if found == config => {}
            Ok(_) => {
                return Err(TrainError::contents(
                    &file,
                    "another configuration than this run's; choose another folder with --out, or remove this one",
                ));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                write_whole(&file, config.as_bytes())?;
            }
            Err(error) => return Err(error).at(&file),
        }
        let events = path.join("events.jsonl");
        let events = File::options()
            .create(true)
            .append(true)
            .open(&events)
            .at(&events)?;
        Ok(RunFolder {
            path: path.into(),
            events,
            keep_last: keep_last.max(1),
            files: Vec::new(),
        })
    }

    /// Files that every checkpoint shall hold beside its tensors: what other programs need to read the model.
    pub fn carry(&mut self, files: Vec<(String, Vec<u8>)>) {
        self.files = files;
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends an event.
    pub fn log(&mut self, event: &Event) -> Result<()> {
        let path = self.path.join("events.jsonl");
        let mut line =
            serde_json::to_string(event).map_err(|error| TrainError::contents(&path, error))?;
        line.push('\n');
        self.events.write_all(line.as_bytes()).at(&path)
    }

    /// Writes a checkpoint and removes all but the newest ones.
    pub fn save<S, O>(&mut self, trainer: &Trainer<S, O>) -> Result<PathBuf>
    where
        O: Objective,
        S: Source<Batch = O::Batch>,
    {
        let name = format!("step-{:06}", trainer.step);
        let (folder, temporary) = (self.path.join(&name), self.path.join(format!("tmp-{name}")));
        if folder.exists() {
            // The same step of the same run: what is there is what would be written.
            write_whole(&self.path.join("latest"), name.as_bytes())?;
            return Ok(folder);
        }
        remove(&temporary)?;
        fs::create_dir_all(&temporary).at(&temporary)?;
        save_tensors(
            &trainer.params.tensors(),
            &temporary.join("model.safetensors"),
        )?;
        let optimizer = trainer.optimizer.tensors();
        save_tensors(&optimizer, &temporary.join("optim.safetensors"))?;
        let state = State {
            format: FORMAT,
            step: trainer.step,
            tokens: trainer.tokens,
            optimizer_steps: trainer.optimizer.steps(),
            not_finite: trainer.not_finite,
            source: trainer.source.state(),
            code_version: env!("CARGO_PKG_VERSION").into(),
        };
        for (name, bytes) in &self.files {
            write_whole(&temporary.join(name), bytes)?;
        }
        let file = temporary.join("state.json");
        let json = serde_json::to_vec_pretty(&state)
            .map_err(|error| TrainError::contents(&file, error))?;
        write_whole(&file, &json)?;
        self.events.sync_all().at(&self.path.join("events.jsonl"))?;
        sync_folder(&temporary)?;
        fs::rename(&temporary, &folder).at(&folder)?;
        sync_folder(&self.path)?;
        write_whole(&self.path.join("latest"), name.as_bytes())?;
        self.prune(&name)?;
        Ok(folder)
    }

    /// Takes up the newest checkpoint, if there is one: parameters, optimiser, data, counts; later events go.
    pub fn resume<S, O>(&mut self, trainer: &mut Trainer<S, O>) -> Result<bool>
    where
        O: Objective,
        S: Source<Batch = O::Batch>,
    {
        let resumed = take_up(&self.path, trainer)?;
        self.cut_events(trainer.step)?;
        Ok(resumed)
    }

    /// Removes events after `step`: they will happen again.
    fn cut_events(&mut self, step: u64) -> Result<()> {
        let path = self.path.join("events.jsonl");
        let file = File::open(&path).at(&path)?;
        let mut kept = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            let line = line.at(&path)?;
            // A line that was cut off by a crash is the last, and later than the checkpoint.
            match serde_json::from_slice::<Event>(&line) {
                Ok(event) if event.step() <= step => {
                    kept.extend(line);
                    kept.push(b'\n');
                }
                _ => break,
            }
        }
        write_whole(&path, &kept)?;
        self.events = File::options().append(true).open(&path).at(&path)?;
        Ok(())
    }

    fn prune(&self, newest: &str) -> Result<()> {
        let mut names = checkpoints(&self.path)?;
        names.retain(|name| name != newest);
        let excess = (names.len() + 1).saturating_sub(self.keep_last);
        for name in names.iter().take(excess) {
            remove(&self.path.join(name))?;
        }
        Ok(())
    }
}

/// Takes up the newest checkpoint of a run, if there is one: parameters, optimiser, data, counts. Nothing is written: any
/// process of a run may do so.
pub fn take_up<S, O>(run: &Path, trainer: &mut Trainer<S, O>) -> Result<bool>
where
    O: Objective,
    S: Source<Batch = O::Batch>,
{
    let Some(folder) = latest(run)? else {
        return Ok(false);
    };
    let file = folder.join("state.json");
    let text = fs::read(&file).at(&file)?;
    let state: State =
        serde_json::from_slice(&text).map_err(|error| TrainError::contents(&file, error))?;
    if state.format != FORMAT {
        return Err(TrainError::contents(
            &file,
            format!("found format {}, expected {FORMAT}", state.format),
        ));
    }
    trainer.params.load(&load_tensors(
        &folder.join("model.safetensors"),
        trainer.params.device(),
    )?)?;
    let file = folder.join("optim.safetensors");
    let tensors = load_tensors(&file, trainer.params.device())?;
    trainer
        .optimizer
        .load(tensors, state.optimizer_steps, &file)?;
    trainer.source.load(&state.source)?;
    trainer.step = state.step;
    trainer.tokens = state.tokens;
    trainer.not_finite = state.not_finite;
    Ok(true)
}

/// Names of the checkpoints of a run, oldest first.
pub fn checkpoints(run: &Path) -> Result<Vec<String>> {
    let mut names: Vec<(u64, String)> = Vec::new();
    for entry in fs::read_dir(run).at(run)? {
        let name = entry.at(run)?.file_name().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
            names.push((step, name));
        }
    }
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

/// The newest checkpoint's folder.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    let file = run.join("latest");
    match fs::read_to_string(&file) {
        Ok(name) if run.join(name.trim()).is_dir() => Ok(Some(run.join(name.trim()))),
        Ok(name) => Err(TrainError::contents(
            &file,
            format!("names {:?}, which is not there", name.trim()),
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at(&file),
    }
}

/// All events of a run; a last line cut off by a crash is left out.
pub fn events(run: &Path) -> Result<Vec<Event>> {
    let path = run.join("events.jsonl");
    let file = File::open(&path).at(&path)?;
    let mut out = Vec::new();
    let mut broken = None;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.at(&path)?;
        if let Some(broken) = broken {
            return Err(TrainError::contents(
                &path,
                format!("line {broken} is not an event"),
            ));
        }
        match serde_json::from_str(&line) {
            Ok(event) => out.push(event),
            Err(_) => broken = Some(number + 1),
        }
    }
    Ok(out)
}

fn save_tensors(tensors: &HashMap<String, Tensor>, path: &Path) -> Result<()> {
    candle_core::safetensors::save(tensors, path)?;
    File::open(path).at(path)?.sync_all().at(path)
}

/// Tensors of a safetensors file. Errors name it.
pub fn load_tensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(path, device).map_err(|error| TrainError::contents(path, error))
}

/// Writes a file so that a reader sees the old contents or the new ones, never a part.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let mut file = File::create(&temporary).at(&temporary)?;
    file.write_all(bytes).at(&temporary)?;
    file.sync_all().at(&temporary)?;
    fs::rename(&temporary, path).at(path)
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).at(path)?.sync_all().at(path)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at(folder),
        _ => Ok(()),
    }
}

//! A run as a TOML file: model, data, optimiser, loop. What `longspan train` reads.

use crate::batch::PackedBatch;
use crate::comm::{Alone, Comm};
use crate::error::{At, Result, TrainError};
use crate::exact::exact_match;
use crate::objective::{LanguageModeling, Recompute};
use crate::optim::{OptimConfig, Optimizer};
use crate::run::{Event, RunFolder, take_up};
use crate::source::{Source, TaskSource, TextSource};
use crate::trainer::{LoopConfig, StepEvent, Trainer};
use candle_core::{DType, Device};
use longspan_data::task::TokenTask;
use longspan_nn::config::{ModelConfig, StackFile};
use longspan_nn::model::{LanguageModel, StackConfig, StackLm, new_decoder};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Initial weights and data order follow from it.
    #[serde(default)]
    pub seed: u64,
    /// Longest time between checkpoints, in steps.
    #[serde(default = "save_every")]
    pub save_every: u64,
    /// Checkpoints that are kept.
    #[serde(default = "keep_last")]
    pub keep_last: usize,
    /// Activations kept for the backward pass.
    #[serde(default)]
    pub recompute: Recompute,
    /// Logits exist for this many tokens at a time.
    #[serde(default = "head_rows")]
    pub head_rows: usize,
    /// What is trained.
    pub model: Model,
    /// On what.
    pub data: Data,
    /// By which optimiser.
    pub optim: OptimConfig,
    /// How long.
    #[serde(default)]
    pub train: LoopConfig,
    /// What is measured between steps.
    #[serde(default)]
    pub eval: Option<Eval>,
}

fn save_every() -> u64 {
    500
}
fn keep_last() -> usize {
    2
}
fn head_rows() -> usize {
    1024
}

/// The model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Model {
    /// A transformer of the decoder family, by its Hugging Face configuration; the data's vocabulary is used.
    Decoder {
        /// Keys of `config.json`.
        config: serde_json::Value,
        /// Standard deviation of initial weights.
        #[serde(default = "std")]
        std: f64,
    },
    /// Blocks over a sequence mixer.
    Stack(StackConfig),
}

fn std() -> f64 {
    0.02
}

/// The data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Data {
    /// Text files, one document each, as bytes.
    Text {
        /// Paths, relative to the configuration's folder.
        files: Vec<PathBuf>,
        /// Longest piece, tokens.
        length: usize,
        /// Tokens of a micro-batch.
        tokens: usize,
    },
    /// Examples of a synthetic task.
    Task {
        /// The task.
        task: TokenTask,
        /// Shortest and longest example, in the task's own measure.
        lengths: (usize, usize),
        /// Examples of a micro-batch.
        examples: usize,
    },
}

/// Exact answers of a task, greedily written, at these lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Steps between measurements; the last step is always measured.
    pub every: u64,
    /// Lengths, in the task's own measure.
    pub lengths: Vec<usize>,
    /// Examples of each length.
    pub examples: usize,
}

impl TrainConfig {
    /// Parses TOML; `path` is named in errors, and file names are relative to its folder.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut config: TrainConfig =
            toml::from_str(text).map_err(|error| TrainError::contents(path, error))?;
        if let Data::Text { files, .. } = &mut config.data {
            let folder = path.parent().unwrap_or(Path::new(""));
            files
                .iter_mut()
                .for_each(|file| *file = folder.join(&*file));
        }
        if config.save_every == 0 {
            return Err(TrainError::option("save_every", 0, "1 or more"));
        }
        config.train.check()?;
        config.optim.check()?;
        Ok(config)
    }

    /// The configuration with all defaults written out.
    pub fn resolved(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| TrainError::contents(Path::new("config.toml"), error))
    }

    fn vocab_size(&self) -> usize {
        match &self.data {
            Data::Text { .. } => 256,
            Data::Task { task, .. } => task.get().vocab_size(),
        }
    }

    /// `config.json`, and `tokenizer.json` where tokens are text: with them a checkpoint is a model to generate with.
    fn model_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let vocab = self.vocab_size();
        let (length, text) = match &self.data {
            Data::Text { length, .. } => (Some(*length), true),
            Data::Task { .. } => (None, false),
        };
        let model = match &self.model {
            Model::Decoder { config, .. } => {
                let mut json = config.clone();
                json["vocab_size"] = vocab.into();
                json
            }
            Model::Stack(stack) => StackFile {
                stack: stack.clone(),
                vocab_size: vocab,
                trained_length: length,
            }
            .to_json(),
        };
        let mut files = vec![("config.json", model)];
        if text {
            files.push(("tokenizer.json", longspan_data::tokenize::byte_vocabulary()));
        }
        files
            .into_iter()
            .map(|(name, json)| {
                let bytes = serde_json::to_vec_pretty(&json)
                    .map_err(|error| TrainError::contents(Path::new(name), error))?;
                Ok((name.to_string(), bytes))
            })
            .collect()
    }

    fn source(&self) -> Result<Box<dyn Source<Batch = PackedBatch>>> {
        Ok(match &self.data {
            Data::Text {
                files,
                length,
                tokens,
            } => {
                let documents = files
                    .iter()
                    .map(|file| {
                        let bytes = std::fs::read(file).at(file)?;
                        Ok(bytes.into_iter().map(u32::from).collect())
                    })
                    .collect::<Result<Vec<Vec<u32>>>>()?;
                Box::new(TextSource::new(documents, *length, *tokens, self.seed)?)
            }
            Data::Task {
                task,
                lengths,
                examples,
            } => Box::new(TaskSource::new(
                task.clone(),
                *lengths,
                *examples,
                self.seed,
            )?),
        })
    }
}

impl<B> Source for Box<dyn Source<Batch = B>> {
    type Batch = B;
    fn next(&mut self, count: usize) -> Result<Vec<B>> {
        (**self).next(count)
    }
    fn state(&self) -> serde_json::Value {
        (**self).state()
    }
    fn load(&mut self, state: &serde_json::Value) -> Result<()> {
        (**self).load(state)
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RunReport {
    /// Steps made in all.
    pub step: u64,
    /// Step it was resumed at.
    pub resumed_at: Option<u64>,
    /// False when it was asked to stop before its end; the same command goes on.
    pub finished: bool,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// Trained values.
    pub parameters: usize,
}

/// Where a model is trained, and the type of its parameters and activations.
#[derive(Clone, Debug)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// f32, or bf16 with f32 copies in the optimiser.
    pub dtype: DType,
}

impl Default for Place {
    fn default() -> Self {
        Place {
            device: Device::Cpu,
            dtype: DType::F32,
        }
    }
}

/// Trains in a run's folder, going on from its newest checkpoint. `watch` sees every event and answers whether to go on;
/// when it says no, a checkpoint is written first.
pub fn train(
    config: &TrainConfig,
    out: &Path,
    watch: &mut dyn FnMut(&Event) -> bool,
) -> Result<RunReport> {
    train_with(config, out, Place::default(), Arc::new(Alone), watch)
}

/// As [`train`], together with other processes that call it with the same arguments: they share the micro-batches of each
/// step, process 0 writes the run's folder and decides when to stop, and any number of them gives the same bits.
pub fn train_with(
    config: &TrainConfig,
    out: &Path,
    place: Place,
    comm: Arc<dyn Comm>,
    watch: &mut dyn FnMut(&Event) -> bool,
) -> Result<RunReport> {
    let params = Arc::new(ParamStore::new(config.seed, place.dtype, &place.device));
    let vocab = config.vocab_size();
    let mut stack = None;
    let model: Arc<dyn LanguageModel> = match &config.model {
        Model::Decoder { config, std } => {
            let mut json = config.clone();
            json["vocab_size"] = vocab.into();
            let path = Path::new("model.config");
            let parsed = ModelConfig::from_hf_json(path, json.to_string().as_bytes())
                .map_err(|error| TrainError::contents(path, error))?;
            Arc::new(new_decoder(&parsed, &params, *std)?)
        }
        Model::Stack(config) => {
            let model = Arc::new(StackLm::new(config, vocab, &params.root())?);
            stack = Some(model.clone());
            model
        }
    };
    if let Some(eval) = &config.eval {
        let task = matches!(config.data, Data::Task { .. });
        if !task || !stack.as_ref().is_some_and(|model| model.has_steps()) || eval.every == 0 {
            return Err(TrainError::option(
                "eval",
                format!("every {} steps for this model and data", eval.every),
                "1 step or more, data of kind task, and a model of kind stack that can be stepped",
            ));
        }
    }
    let objective = LanguageModeling::new(model, config.recompute, config.head_rows)?;
    let mut trainer = Trainer::new(
        params.clone(),
        Optimizer::new(config.optim.clone())?,
        config.source()?,
        objective,
        config.train.clone(),
    )?;
    trainer.comm = comm.clone();
    let first = comm.rank() == 0;
    let mut run = None;
    let mut resumed = false;
    if first {
        let mut folder = RunFolder::open(out, &config.resolved()?, config.keep_last)?;
        folder.carry(config.model_files()?);
        resumed = folder.resume(&mut trainer)?;
        run = Some(folder);
    }
    // The others take up what process 0 found.
    let mut found = vec![u8::from(resumed)];
    comm.broadcast(0, &mut found)?;
    if !first && found == [1] {
        resumed = take_up(out, &mut trainer)?;
    }
    let resumed_at = resumed.then_some(trainer.step);
    let mut report = RunReport {
        step: trainer.step,
        resumed_at,
        finished: trainer.finished(),
        loss: None,
        parameters: params.count(),
    };
    while let Some(event) = trainer.step()? {
        report.step = event.step;
        report.loss = Some(event.loss);
        report.finished = trainer.finished();
        let mut go_on = log(&mut run, Event::Step(event), watch)?;
        if first
            && let (Some(eval), Some(model), Data::Task { task, .. }) =
                (&config.eval, &stack, &config.data)
            && (report.step.is_multiple_of(eval.every) || report.finished)
        {
            let mut values = serde_json::Map::new();
            for &length in &eval.lengths {
                let share = exact_match(model, task.get(), length, eval.examples, config.seed)?;
                values.insert(format!("exact at length {length}"), share.into());
            }
            let step = report.step;
            go_on &= log(&mut run, Event::Eval { step, values }, watch)?;
        }
        let mut word = vec![u8::from(go_on)];
        comm.broadcast(0, &mut word)?;
        go_on = word == [1];
        if let Some(run) = &mut run
            && (!go_on || report.finished || report.step.is_multiple_of(config.save_every))
        {
            run.save(&trainer)?;
        }
        if !go_on {
            break;
        }
    }
    Ok(report)
}

/// Process 0 writes and shows events; the others have no folder.
fn log(
    run: &mut Option<RunFolder>,
    event: Event,
    watch: &mut dyn FnMut(&Event) -> bool,
) -> Result<bool> {
    match run {
        Some(run) => {
            run.log(&event)?;
            Ok(watch(&event))
        }
        None => Ok(true),
    }
}

/// Steps of a run's events.
pub fn steps(events: &[Event]) -> Vec<&StepEvent> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Step(step) => Some(step),
            Event::Eval { .. } => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_configuration_is_written_out_and_read_back() {
        let mixers = [
            r#"kind = "attention""#,
            r#"kind = "s4", n_ssm = 2"#,
            r#"kind = "mamba2""#,
            r#"kind = "rnn", cell = "gru""#,
        ];
        let text = |mixer: &str| {
            format!(
                "[model]\nkind = \"stack\"\nd_model = 8\nlayers = 1\nmixer = {{ {mixer} }}\n\
                 [data]\nkind = \"text\"\nfiles = [\"a.txt\"]\nlength = 8\ntokens = 64\n\
                 [optim]\nname = \"adamw\"\nlr = 0.001\n"
            )
        };
        for mixer in mixers {
            let config = TrainConfig::parse(&text(mixer), Path::new("folder/x.toml")).unwrap();
            let Data::Text { files, .. } = &config.data else {
                panic!("{config:?}")
            };
            assert_eq!(files[0], Path::new("folder/a.txt"));
            let resolved = config.resolved().unwrap();
            let again = TrainConfig::parse(&resolved, Path::new("x.toml")).unwrap();
            assert_eq!(again, config, "{resolved}");
        }
        let path = Path::new("x.toml");
        let wrong = text(mixers[0]).replace("d_model", "d_modell");
        let error = TrainConfig::parse(&wrong, path).unwrap_err().to_string();
        assert!(
            error.contains("x.toml") && error.contains("d_modell"),
            "{error}"
        );
    }

    #[test]
    fn text_is_learned_and_what_cannot_be_measured_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.txt"), "abc abc abc abc abc abc ").unwrap();
        let text = r#"
            [model]
            kind = "decoder"
            std = 0.1
            config = { architectures = ["LlamaForCausalLM"], model_type = "llama", hidden_size = 16, intermediate_size = 32, num_hidden_layers = 2, num_attention_heads = 2, rms_norm_eps = 1e-6, tie_word_embeddings = true, max_position_embeddings = 64, hidden_act = "silu" }
            [data]
            kind = "text"
            files = ["a.txt"]
            length = 12
            tokens = 24
            [optim]
            name = "adamw"
            lr = 0.01
            [train]
            steps = 40
        "#;
        let path = folder.path().join("text.toml");
        let mut config = TrainConfig::parse(text, &path).unwrap();
        let out = folder.path().join("run");
        let mut losses = Vec::new();
        // Asked to stop after 7 steps, then gone on with.
        for stop in [7, 1000] {
            let report = train(&config, &out, &mut |event| {
                if let Event::Step(step) = event {
                    losses.push(step.loss);
                }
                losses.len() < stop
            })
            .unwrap();
            assert_eq!(report.finished, stop == 1000);
            assert_eq!(report.resumed_at, (stop == 1000).then_some(7));
        }
        assert_eq!(losses.len(), 40);
        assert!(
            losses[39] < 0.5 * losses[0],
            "{} to {}",
            losses[0],
            losses[39]
        );
        config.eval = Some(Eval {
            every: 1,
            lengths: vec![1],
            examples: 1,
        });
        let error = train(&config, &folder.path().join("b"), &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("eval"), "{error}");
    }
}

//! States that never learned to forget (paper 16, Stuffed Mamba): loss far beyond the training length, three repairs without
//! training, longer training, and how much a state of each size can hold.

use super::capacity::{ALL, Capacity, HELD, LINE, LOG_LINE, RANKS};
use super::cells::{
    Cell, Cells, Check, GoOn, Measured, Setting, Watch, check_settings, grid, judge, mean, rows,
};
use super::{Recipe, Report};
use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::source::Source;
use crate::streams::{Lesson, StreamSource, StreamTraining, TextStreams, loss_by_position};
use candle_core::Device;
use longspan_data::task::stream::{Rewrite, Streams};
use longspan_nn::mixer::{Mamba2Config, MixerConfig, StatePolicy};
use longspan_nn::model::{StackConfig, StackLm};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
pub enum CollapseTask {
    /// Values that are written again and again.
    Rewrite(Rewrite),
    /// Stretches of a text, byte by byte.
    Text(Text),
}

/// A text: its first nine tenths are learned, the next twentieth chooses repairs, the last is the test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// The file, relative to the recipe's folder, or to the current one for recipes of the program.
    pub file: PathBuf,
}

impl Text {
    /// `longest`: tokens of the longest stretch read.
    fn open(&self, longest: usize) -> Result<Opened> {
        let bytes = std::fs::read(&self.file).map_err(|error| {
            TrainError::option(
                "task.file",
                format!("{}: {error}", self.file.display()),
                format!("a plain text of {} bytes or more", 20 * longest),
            )
        })?;
        if bytes.len() < 20 * longest {
            return Err(TrainError::contents(
                &self.file,
                format!(
                    "found {} bytes, expected {} or more: a twentieth of them is the test, which reads {longest} at once",
                    bytes.len(),
                    20 * longest
                ),
            ));
        }
        let (learned, rest) = bytes.split_at(bytes.len() / 10 * 9);
        let (choose, test) = rest.split_at(rest.len() / 2);
        let part = |bytes: &[u8]| TextStreams::new(bytes, longest);
        let test = part(test)?;
        Ok(Opened {
            key: serde_json::json!({"bytes": bytes.len(), "blake3": blake3::hash(&bytes).to_hex().as_str()}),
            what: format!(
                "bytes of a text of {:.1} MB, a twentieth of it for the test",
                bytes.len() as f64 / 1e6
            ),
            measure: "loss of all bytes",
            baseline: format!(
                "{:.2} nats, knowing only how often each byte comes",
                test.entropy()
            ),
            learn: Box::new(part(learned)?),
            choose: Box::new(part(choose)?),
            test: Box::new(test),
        })
    }
}

/// A task, ready to be sampled, and what reports say of it.
struct Opened {
    /// What is learned.
    learn: Box<dyn Streams>,
    /// What repairs are chosen by.
    choose: Box<dyn Streams>,
    /// What is measured.
    test: Box<dyn Streams>,
    /// Tells the task from others.
    key: serde_json::Value,
    what: String,
    measure: &'static str,
    baseline: String,
}

impl CollapseTask {
    /// `longest`: tokens of the longest stretch read.
    fn open(&self, longest: usize) -> Result<Opened> {
        match self {
            CollapseTask::Text(text) => text.open(longest),
            CollapseTask::Rewrite(task) => {
                let streams = || Box::new(task.clone());
                Ok(Opened {
                    learn: streams(),
                    choose: streams(),
                    test: streams(),
                    key: serde_json::to_value(task).unwrap_or_default(),
                    what: format!(
                        "pairs of {} keys and {} values, a new value in {:.0} % of pairs{}",
                        task.keys,
                        task.values,
                        100.0 * task.change,
                        task.horizon.map_or(String::new(), |most| format!(
                            ", asked where the key came within {most} tokens"
                        ))
                    ),
                    measure: "loss of values that can be known",
                    baseline: format!("ln {} = {:.2} nats", task.values, (task.values as f64).ln()),
                })
            }
        }
    }
}

/// One training on streams.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollapseSetting {
    /// In tables, figures and checks.
    pub name: String,
    /// Columns N of each head's state.
    pub state_size: usize,
    /// Tokens of a training stream.
    pub length: usize,
    /// Examples of a step.
    pub examples: usize,
    /// Whether the repairs are tried on it.
    #[serde(default)]
    pub repaired: bool,
}

impl Setting for CollapseSetting {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollapseRecipe {
    /// What is read.
    pub task: CollapseTask,
    /// Tests read so many times the shortest training length.
    pub factor: usize,
    /// Test streams.
    pub test_examples: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// Width, layers and the rest of Mamba-2; the state size is that of each setting.
    pub d_model: usize,
    /// Blocks.
    pub layers: usize,
    /// The mixer.
    pub mixer: Mamba2Config,
    /// The trainings.
    pub settings: Vec<CollapseSetting>,
    /// What is held by state size; none = not measured.
    #[serde(default)]
    pub capacity: Option<Box<Capacity>>,
    /// What has to hold.
    pub checks: Vec<Check>,
}

const TRAINED: &str = "loss at the training length";
const RISE: &str = "rise at the longest";
const REPAIRS: [&str; 3] = ["forget more", "norm clip", "window"];

impl CollapseRecipe {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.settings.iter().map(|s| s.name.clone()).collect();
        if let Some(capacity) = &self.capacity {
            names.extend(capacity.names());
        }
        names
    }

    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
        if let Some(capacity) = &mut self.capacity {
            capacity.steps = steps;
        }
    }

    pub(super) fn set_folder(&mut self, folder: &Path) {
        if let CollapseTask::Text(text) = &mut self.task {
            text.file = folder.join(&text.file);
        }
    }

    fn shortest(&self) -> usize {
        self.settings.iter().map(|s| s.length).min().unwrap_or(1)
    }

    /// Tokens of a test stream.
    fn longest(&self) -> usize {
        self.shortest() * self.factor
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        let lengths_fit = self
            .settings
            .iter()
            .all(|s| s.length > 0 && s.length <= self.longest() && s.examples > 0);
        if self.settings.is_empty() || self.factor < 2 || !lengths_fit || self.test_examples == 0 {
            return Err(TrainError::option(
                "settings, factor, test_examples",
                format!(
                    "{} settings, {}, {}",
                    self.settings.len(),
                    self.factor,
                    self.test_examples
                ),
                "a setting, a factor of 2 or more that no training length exceeds, and a test stream",
            ));
        }
        if let Some(capacity) = &self.capacity {
            capacity.check()?;
        }
        check_settings(&self.checks, &self.names())
    }

    fn stack(&self, state_size: usize, policy: StatePolicy) -> StackConfig {
        let mixer = MixerConfig::Mamba2(Mamba2Config {
            state_size,
            state_policy: policy,
            ..self.mixer.clone()
        });
        StackConfig::of_mixers(self.d_model, self.layers, mixer)
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let task = &self.task.open(self.longest())?;
        let device = &cells.place();
        let shared = serde_json::json!([
            task.key,
            (self.factor, self.test_examples, self.steps, self.lr),
            (self.d_model, self.layers, &self.mixer),
        ]);
        let mut parts = grid(
            shared,
            &self.settings,
            recipe.seeds,
            |setting, seed, go_on| self.one(task, setting, seed, device, go_on),
        );
        if let Some(capacity) = &self.capacity {
            parts.extend((0..recipe.seeds).flat_map(|seed| capacity.parts(seed, device)));
        }
        let Some(mut measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        if let Some(capacity) = &self.capacity {
            measured.insert(ALL.into(), vec![capacity.all(&measured)]);
        }
        let (holds, required, verdict) = judge(&self.checks, &measured);
        let names = self.names();
        let mut measures = vec![TRAINED.to_string(), RISE.to_string()];
        measures.extend(REPAIRS.iter().map(|repair| repaired_rise(repair)));
        measures.extend([HELD, LINE, LOG_LINE, RANKS].map(String::from));
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "{}; Mamba-2, {} layers of width {}, tested to {} tokens; {} steps, AdamW {}, {} seeds, f32",
                task.what,
                self.layers,
                self.d_model,
                self.longest(),
                self.steps,
                self.lr,
                recipe.seeds
            ),
            measure: format!(
                "{}, nats, in the last stretch before the training length; its rise in the last stretch of the test; pairs of \
                 keys and values held, corrected for guessing",
                task.measure
            ),
            baseline: task.baseline.clone(),
            required,
            holds,
            verdict,
            figure: self.figure(recipe, &measured),
            rows: rows(&measured, &names, &measures),
        }))
    }

    /// Loss by position, as trained and repaired.
    fn figure(&self, recipe: &Recipe, measured: &Measured) -> String {
        let mut lines = Vec::new();
        let step = self.shortest();
        let curve = |name: String, setting: &str, prefix: &str| Curve {
            points: (1..=self.factor)
                .map(|k| {
                    let value = mean(measured, setting, &at(prefix, k));
                    ((k * step) as f64, value)
                })
                .collect(),
            name,
        };
        for setting in &self.settings {
            lines.push(curve(setting.name.clone(), &setting.name, ""));
            if setting.repaired {
                for repair in REPAIRS {
                    let name = format!("{}, {repair}", setting.name);
                    lines.push(curve(name, &setting.name, repair));
                }
            }
        }
        curves(
            &format!("{}: loss by position (trained to {step})", recipe.paper),
            "tokens read",
            "loss, nats",
            &lines,
            false,
        )
    }

    /// Test streams as batches of few, for the memory of long ones.
    fn streams(&self, task: &dyn Streams, seed: u64, purpose: &str) -> Result<Vec<PackedBatch>> {
        let count = self.test_examples.div_ceil(4);
        StreamSource::new(task, self.longest(), 4, seed, purpose)?.next(count)
    }

    fn one(
        &self,
        task: &Opened,
        setting: &CollapseSetting,
        seed: u64,
        device: &Device,
        go_on: GoOn<'_>,
    ) -> Result<Option<Cell>> {
        let training = StreamTraining {
            lessons: vec![Lesson {
                task: &*task.learn,
                length: setting.length,
                examples: setting.examples,
                steps: self.steps,
            }],
            lr: self.lr,
            device: device.clone(),
        };
        let stack = self.stack(setting.state_size, StatePolicy::None);
        let mut part = |share: f64| go_on(if setting.repaired { 0.7 * share } else { share });
        let Some((model, params)) = training.run_to_cpu(&stack, seed, &mut part)? else {
            return Ok(None);
        };
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        let bucket = self.shortest();
        let test = self.streams(&*task.test, seed, "streams to test")?;
        let losses = loss_by_position(&model, &test, bucket)?;
        let trained = losses[(setting.length / bucket).max(1) - 1];
        cell.values.insert(TRAINED.into(), trained);
        cell.values
            .insert(RISE.into(), losses[losses.len() - 1] - trained);
        let mut note = |prefix: &str, losses: &[f64]| {
            let stretches = losses.iter().enumerate();
            let named = stretches.map(|(k, &loss)| (at(prefix, k + 1), loss));
            cell.values.extend(named);
        };
        note("", &losses);
        let mut rises = Vec::new();
        if !setting.repaired {
            return Ok(Some(cell));
        }
        // Constants are chosen on other streams than those of the test.
        let choose_by = self.streams(&*task.choose, seed, "streams to choose by")?;
        let choose_by = &choose_by[..choose_by.len().min(2)];
        let build = |policy: StatePolicy| -> Result<Arc<StackLm>> {
            let stack = self.stack(setting.state_size, policy);
            let vocab = task.learn.vocab_size();
            Ok(Arc::new(StackLm::new(&stack, vocab, &params.root())?))
        };
        let norm = largest_norm(&model, choose_by, setting.length)?;
        let scales = [1.0, 1.05, 1.1, 1.2, 1.5, 2.0]
            .iter()
            .flat_map(|&forget| [1.0, 0.9, 0.75].map(|write| StatePolicy::Scale { forget, write }));
        let clips = [0.25, 0.5, 0.75, 1.0].map(|share| StatePolicy::NormClip { p: share * norm });
        let windows = [setting.length / 2, 3 * setting.length / 4, setting.length]
            .map(|r| StatePolicy::Window { r: r.max(1) });
        let families: [Vec<StatePolicy>; 3] = [scales.collect(), clips.into(), windows.into()];
        for (which, (repair, policies)) in REPAIRS.iter().zip(families).enumerate() {
            let mut best: Option<(f64, StatePolicy)> = None;
            for policy in policies {
                let losses = loss_by_position(&build(policy)?, choose_by, bucket)?;
                let last = losses[losses.len() - 1];
                if best.is_none_or(|(best, _)| last < best) {
                    best = Some((last, policy));
                }
            }
            let Some((_, policy)) = best else { continue };
            let losses = loss_by_position(&build(policy)?, &test, bucket)?;
            note(repair, &losses);
            let rise = losses[losses.len() - 1] - trained;
            rises.push((repaired_rise(repair), rise));
            if !go_on(0.7 + 0.1 * (which + 1) as f64) {
                return Ok(None);
            }
        }
        cell.values.extend(rises);
        Ok(Some(cell))
    }
}

fn at(prefix: &str, bucket: usize) -> String {
    if prefix.is_empty() {
        format!("loss in stretch {bucket}")
    } else {
        format!("loss in stretch {bucket}, {prefix}")
    }
}

fn repaired_rise(repair: &str) -> String {
    format!("{RISE}, {repair}")
}

/// The largest norm of any head's state after the first `length` tokens of the streams.
fn largest_norm(model: &StackLm, batches: &[PackedBatch], length: usize) -> Result<f64> {
    let mut largest = 0f64;
    for batch in batches {
        let rows: Vec<Vec<u32>> = batch
            .ids
            .chunks(batch.lengths[0])
            .map(|row| row[..length.min(row.len())].to_vec())
            .collect();
        let mut states = model.stack().init_states(rows.len())?;
        model.advance(&rows, &mut states)?;
        for state in &states {
            let norms = state.get("ssm")?.sqr()?.sum((2, 3))?.sqrt()?;
            let top = norms.flatten_all()?.max_all()?.to_scalar::<f32>()?;
            largest = largest.max(f64::from(top));
        }
    }
    Ok(largest.max(f64::MIN_POSITIVE))
}

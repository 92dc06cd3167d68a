//! States that never learned to forget (paper 16, Stuffed Mamba): loss far beyond the training length, three repairs without
//! training, longer training, and how much a state of each size can hold.

use super::cells::{
    Cell, Cells, Check, GoOn, Measured, Part, Setting, Watch, check_settings, grid, judge, mean,
    rows, values,
};
use super::{Recipe, Report};
use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::source::Source;
use crate::streams::{StreamSource, StreamTraining, accuracy, loss_by_position};
use longspan_data::task::stream::{Recall, Rewrite, StreamTask};
use longspan_nn::mixer::{Mamba2Config, MixerConfig, StatePolicy};
use longspan_nn::model::{StackConfig, StackLm};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

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

/// How much a state of each size holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Columns N of each head's state.
    pub state_sizes: Vec<usize>,
    /// Numbers of pairs to be remembered in the tests; training draws from 1 to the last.
    pub pairs: Vec<usize>,
    /// Different keys and values.
    pub symbols: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollapseRecipe {
    /// Values that are written again and again.
    pub task: Rewrite,
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
    pub capacity: Option<Capacity>,
    /// What has to hold.
    pub checks: Vec<Check>,
}

const TRAINED: &str = "loss at the training length";
const RISE: &str = "rise at the longest";
const HELD: &str = "pairs held";
const FIT: &str = "R² of pairs held by state size";
const REPAIRS: [&str; 3] = ["forget more", "norm clip", "window"];
const ALL: &str = "all state sizes";

impl CollapseRecipe {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.settings.iter().map(|s| s.name.clone()).collect();
        if let Some(capacity) = &self.capacity {
            names.extend(capacity.state_sizes.iter().map(|n| held_by(*n)));
            names.push(ALL.into());
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

    fn shortest(&self) -> usize {
        self.settings.iter().map(|s| s.length).min().unwrap_or(1)
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        let lengths_fit = self
            .settings
            .iter()
            .all(|s| s.length > 0 && s.length <= self.shortest() * self.factor && s.examples > 0);
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
        if let Some(capacity) = &self.capacity
            && (capacity.state_sizes.len() < 2 || capacity.pairs.is_empty())
        {
            return Err(TrainError::option(
                "capacity",
                format!("{:?}, {:?}", capacity.state_sizes, capacity.pairs),
                "two state sizes or more, and a number of pairs",
            ));
        }
        check_settings(&self.checks, &self.names())
    }

    fn stack(&self, state_size: usize, policy: StatePolicy) -> StackConfig {
        StackConfig {
            d_model: self.d_model,
            layers: self.layers,
            mixer: MixerConfig::Mamba2(Mamba2Config {
                state_size,
                state_policy: policy,
                ..self.mixer.clone()
            }),
            mlp_ratio: 0.0,
            norm_epsilon: 1e-5,
            norm: true,
            residual: true,
            tie_embeddings: true,
            sinusoid: false,
        }
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let shared = serde_json::to_value(CollapseRecipe {
            settings: Vec::new(),
            checks: Vec::new(),
            capacity: None,
            ..self.clone()
        });
        let shared = shared.unwrap_or_default();
        let mut parts = grid(
            shared,
            &self.settings,
            recipe.seeds,
            |setting, seed, go_on| self.one(setting, seed, go_on),
        );
        for seed in 0..recipe.seeds {
            if let Some(capacity) = &self.capacity {
                for &n in &capacity.state_sizes {
                    let model = (self.d_model, self.layers, &self.mixer, self.lr);
                    let task = (&capacity.pairs, capacity.symbols, capacity.steps);
                    parts.push(Part {
                        setting: held_by(n),
                        seed,
                        key: serde_json::json!([
                            n,
                            model,
                            task,
                            capacity.examples,
                            self.test_examples
                        ]),
                        make: Box::new(move |go_on| self.held(n, seed, go_on)),
                    });
                }
            }
        }
        let Some(mut measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        if let Some(capacity) = &self.capacity {
            let points: Vec<(f64, f64)> = capacity
                .state_sizes
                .iter()
                .map(|&n| (n as f64, median(values(&measured, &held_by(n), HELD))))
                .collect();
            let cell = Cell {
                values: [(FIT.to_string(), r_squared(&points))].into(),
                ..Cell::default()
            };
            measured.insert(ALL.into(), vec![cell]);
        }
        let (holds, required, verdict) = judge(&self.checks, &measured);
        let names = self.names();
        let mut measures = vec![TRAINED.to_string(), RISE.to_string()];
        measures.extend(REPAIRS.iter().map(|repair| repaired_rise(repair)));
        measures.extend([HELD.to_string(), FIT.to_string()]);
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "pairs of {} keys and {} values, a new value in {:.0} % of pairs{}; Mamba-2, {} layers of width {}, tested to \
                 {} tokens; {} steps, AdamW {}, {} seeds, f32 on the CPU",
                self.task.keys,
                self.task.values,
                100.0 * self.task.change,
                self.task.horizon.map_or(String::new(), |most| format!(
                    ", asked where the key came within {most} tokens"
                )),
                self.layers,
                self.d_model,
                self.shortest() * self.factor,
                self.steps,
                self.lr,
                recipe.seeds
            ),
            measure: "loss of values that can be known, nats, in the last stretch before the training length; its rise in the \
                      last stretch of the test; pairs of keys and values held, corrected for guessing"
                .into(),
            baseline: format!("ln {} = {:.2} nats", self.task.values, (self.task.values as f64).ln()),
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
    fn streams(&self, seed: u64, purpose: &str) -> Result<Vec<PackedBatch>> {
        let length = self.shortest() * self.factor;
        let task = StreamTask::Rewrite(self.task.clone());
        let count = self.test_examples.div_ceil(4);
        StreamSource::new(task, length, 4, seed, purpose)?.next(count)
    }

    fn one(&self, setting: &CollapseSetting, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let training = StreamTraining {
            task: StreamTask::Rewrite(self.task.clone()),
            length: setting.length,
            steps: self.steps,
            examples: setting.examples,
            lr: self.lr,
            device: candle_core::Device::Cpu,
        };
        let stack = self.stack(setting.state_size, StatePolicy::None);
        let mut part = |share: f64| go_on(if setting.repaired { 0.7 * share } else { share });
        let Some((model, params)) = training.run(&stack, seed, &mut part)? else {
            return Ok(None);
        };
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        let bucket = self.shortest();
        let test = self.streams(seed, "streams to test")?;
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
        let choose_by = self.streams(seed, "streams to choose by")?;
        let choose_by = &choose_by[..choose_by.len().min(2)];
        let build = |policy: StatePolicy| -> Result<Arc<StackLm>> {
            let stack = self.stack(setting.state_size, policy);
            let vocab = training.task.get().vocab_size();
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

    /// Pairs that a state of this size holds.
    fn held(&self, state_size: usize, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let Some(capacity) = &self.capacity else {
            return Ok(Some(Cell::default()));
        };
        let most = capacity.pairs.iter().copied().max().unwrap_or(1);
        let recall = |pairs: usize, varied: bool| {
            StreamTask::Recall(Recall {
                pairs,
                keys: capacity.symbols,
                values: capacity.symbols,
                varied,
            })
        };
        let training = StreamTraining {
            task: recall(most, false),
            length: 4 * most,
            steps: capacity.steps,
            examples: capacity.examples,
            lr: self.lr,
            device: candle_core::Device::Cpu,
        };
        let stack = self.stack(state_size, StatePolicy::None);
        let Some((model, params)) = training.run(&stack, seed, go_on)? else {
            return Ok(None);
        };
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        let guess = 1.0 / capacity.symbols.max(2) as f64;
        let mut held = 0f64;
        for &pairs in &capacity.pairs {
            let task = recall(pairs, false);
            let count = self.test_examples.div_ceil(4);
            let length = 4 * pairs;
            let mut source = StreamSource::new(task, length, 8, seed, "pairs to test")?;
            let share = accuracy(&model, &source.next(count)?)?;
            cell.values.insert(format!("right of {pairs} pairs"), share);
            held = held.max(pairs as f64 * ((share - guess) / (1.0 - guess)).max(0.0));
        }
        cell.values.insert(HELD.into(), held);
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

fn held_by(state_size: usize) -> String {
    format!("held by N = {state_size}")
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

fn median(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    match list.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => list[n / 2],
        n => (list[n / 2 - 1] + list[n / 2]) / 2.0,
    }
}

/// Of the best line through the points.
fn r_squared(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|p| f(p.0 - x, p.1 - y)).sum::<f64>();
    let (xx, yy, xy) = (sum(&|a, _| a * a), sum(&|_, b| b * b), sum(&|a, b| a * b));
    if xx * yy > 0.0 {
        xy * xy / (xx * yy)
    } else {
        f64::NAN
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn lines_are_fitted_and_medians_taken() {
        let line = [(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)];
        assert!((super::r_squared(&line) - 1.0).abs() < 1e-12);
        assert!(super::r_squared(&[(1.0, 1.0), (2.0, 0.0), (3.0, 1.0)]) < 1e-12);
        assert_eq!(super::median(vec![3.0, 1.0, 2.0]), 2.0);
        assert!(super::median(Vec::new()).is_nan());
    }
}

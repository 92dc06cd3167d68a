//! Waveforms at another sampling rate than trained (paper 26, LSSL): accuracy as trained, at the other rate with the steps
//! scaled, and with the steps as they were.

use super::cells::{Cell, Cells, Check, GoOn, Watch, check_settings, grid, judge, mean, rows};
use super::signals::{EXPLAINED, Named, SignalRecipe};
use super::{Recipe, Report};
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::signal::{Regression, SignalBatch, SignalSource};
use crate::source::Source;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device, Tensor};
use longspan_data::task::{SignalTask, Signals, Waveform};
use longspan_nn::mixer::MixerConfig;
use longspan_nn::model::{SignalModel, StackConfig};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaveRecipe {
    /// The waveforms as trained.
    pub task: Waveform,
    /// Samples are this many times further apart in the second test.
    pub rate: usize,
    /// Optimiser steps of each run.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Test examples.
    pub test_examples: usize,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// What has to hold.
    pub checks: Vec<Check>,
    /// The models.
    pub models: Vec<Named>,
    /// What they remember, on a task of its own.
    #[serde(default)]
    pub memory: Option<Memory>,
}

/// Models of real-valued sequences, compared by the share of the targets' variance that they explain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The task.
    pub task: SignalTask,
    /// Optimiser steps of each run.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Test examples.
    pub test_examples: usize,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// The models.
    pub models: Vec<Named>,
}

impl Memory {
    fn recipe(&self) -> SignalRecipe {
        SignalRecipe {
            task: self.task.clone(),
            steps: self.steps,
            examples: self.examples,
            test_examples: self.test_examples,
            lr: self.lr,
            claimed: Vec::new(),
            controls: Vec::new(),
            factor: 1.0,
            models: self.models.clone(),
        }
    }
}

const TRAINED: &str = "right as trained";
const SCALED: &str = "right at the other rate, steps scaled";
const KEPT: &str = "right at the other rate, steps kept";

impl WaveRecipe {
    fn names(&self) -> Vec<String> {
        let memory = self.memory.iter().flat_map(|m| &m.models);
        let models = self.models.iter().chain(memory);
        models.map(|m| m.name.clone()).collect()
    }

    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
        if let Some(memory) = &mut self.memory {
            memory.steps = steps;
        }
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        if self.rate < 2 || !self.task.steps.is_multiple_of(self.rate) || self.test_examples == 0 {
            return Err(TrainError::option(
                "rate, test_examples",
                format!("{} and {}", self.rate, self.test_examples),
                "a divisor of the steps, 2 or more, and an example",
            ));
        }
        check_settings(&self.checks, &self.names())
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let shared = serde_json::to_value(WaveRecipe {
            models: Vec::new(),
            checks: Vec::new(),
            memory: None,
            ..self.clone()
        });
        let shared = shared.unwrap_or_default();
        let memory = self.memory.as_ref().map(Memory::recipe);
        let device = cells.place();
        let mut parts = grid(shared, &self.models, recipe.seeds, |model, seed, go_on| {
            self.one(model, seed, go_on)
        });
        parts.extend(memory.iter().flat_map(|m| m.parts(recipe.seeds, &device)));
        let Some(measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        let (holds, required, verdict) = judge(&self.checks, &measured);
        let rates = [TRAINED, SCALED, KEPT];
        let measures = [TRAINED, SCALED, KEPT, EXPLAINED];
        let lines: Vec<Curve> = self
            .models
            .iter()
            .map(|model| Curve {
                name: model.name.clone(),
                points: rates
                    .iter()
                    .enumerate()
                    .map(|(k, m)| (k as f64, 100.0 * mean(&measured, &model.name, m)))
                    .collect(),
            })
            .collect();
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "sine, saw tooth or square, {} ± {:.0} % periods in {} steps, noise {}; tested at {} steps; {} steps of {} \
                 examples, AdamW {}, {} seeds, f32 on the CPU{}",
                self.task.periods,
                100.0 * self.task.jitter,
                self.task.steps,
                self.task.noise,
                self.task.steps / self.rate,
                self.steps,
                self.examples,
                self.lr,
                recipe.seeds,
                self.memory.as_ref().map_or(String::new(), |memory| {
                    let task = serde_json::to_string(&memory.task).unwrap_or_default();
                    format!(
                        ". Memory: task {task}, {} steps of {} examples, AdamW {}",
                        memory.steps, memory.examples, memory.lr
                    )
                })
            ),
            measure: format!(
                "share of {} test examples whose class is right; of the memory task, share of the targets' variance that is explained",
                self.test_examples
            ),
            baseline: "one third by guessing; 0 of the variance by answering the mean".into(),
            required,
            holds,
            verdict,
            figure: curves(
                &format!(
                    "{}: accuracy as trained (0), steps scaled (1), kept (2)",
                    recipe.paper
                ),
                "as trained, other rate scaled, other rate kept",
                "right, %",
                &lines,
                false,
            ),
            rows: rows(&measured, &self.names(), &measures.map(String::from)),
        }))
    }

    fn one(&self, model: &Named, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let task = SignalTask::Waveform(self.task.clone());
        let params = Arc::new(ParamStore::new(seed, DType::F32, &Device::Cpu));
        let root = params.root();
        let build = |stack: &StackConfig| SignalModel::new(stack, 1, self.task.outputs(), &root);
        let built = Arc::new(build(&model.stack)?);
        let objective = Regression::new(built.clone(), task.clone());
        let config = LoopConfig {
            steps: self.steps,
            clip: Some(1.0),
            schedule: Schedule::Cosine {
                warmup: self.steps / 20,
                min_lr_ratio: 0.1,
            },
            ..LoopConfig::default()
        };
        let source = SignalSource::new(task.clone(), self.examples, seed, "signals to learn")?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, objective, config)?;
        while let Some(event) = trainer.step()? {
            if !go_on(event.step as f64 / self.steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let coarse = Waveform {
            steps: self.task.steps / self.rate,
            ..self.task.clone()
        };
        let share = |model: &SignalModel, task: &Waveform| -> Result<f64> {
            let count = self.test_examples.div_ceil(8);
            let task = SignalTask::Waveform(task.clone());
            let batches = SignalSource::new(task, 8, seed, "signals to test")?.next(count)?;
            right(model, &batches)
        };
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        let mut put = |name: &str, value: f64| cell.values.insert(name.into(), value);
        put(TRAINED, share(&built, &self.task)?);
        put(KEPT, share(&built, &coarse)?);
        let mut scaled = model.stack.clone();
        if let MixerConfig::Lssl(config) = &mut scaled.mixer {
            config.rate *= self.rate as f64;
            put(SCALED, share(&build(&scaled)?, &coarse)?);
        }
        Ok(Some(cell))
    }
}

/// Share of examples whose largest output is the target's.
fn right(model: &SignalModel, batches: &[SignalBatch]) -> Result<f64> {
    let (mut right, mut count) = (0usize, 0usize);
    for batch in batches {
        let x = Tensor::from_slice(
            &batch.inputs,
            (batch.examples, batch.steps, 1),
            model.device(),
        )?;
        let y = model.forward(&x, true)?.detach().squeeze(1)?;
        let classes = y.dim(1)?;
        let best = y.argmax(1)?.to_vec1::<u32>()?;
        for (best, target) in best.iter().zip(batch.targets.chunks(classes)) {
            count += 1;
            right += usize::from(target[*best as usize] == 1.0);
        }
    }
    Ok(right as f64 / count.max(1) as f64)
}

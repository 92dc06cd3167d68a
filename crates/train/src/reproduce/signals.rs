//! Models of real-valued sequences on one task, compared by test error: S4's lag task, the adding problem.

use super::cells::{Cell, Cells, GoOn, Part, Setting, Watch, grid, mean, values};
use super::{Recipe, Report, Row};
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::signal::{Regression, SignalBatch, SignalSource};
use crate::source::Source;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device};
use longspan_data::task::SignalTask;
use longspan_nn::model::{SignalModel, StackConfig};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A model of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// In tables and figures.
    pub name: String,
    /// The model.
    pub stack: StackConfig,
}

impl Setting for Named {
    fn name(&self) -> &str {
        &self.name
    }
}

const ERROR: &str = "mean squared error";
/// 1 - error / variance of the targets.
pub(super) const EXPLAINED: &str = "share of variance explained";

/// Settings of the experiment. All models see the same examples in the same order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalRecipe {
    /// The task.
    pub task: SignalTask,
    /// Optimiser steps of each run.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Examples the error is measured on, of another stream than those of training.
    pub test_examples: usize,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// Models that the claim is about.
    pub claimed: Vec<String>,
    /// Models they must beat.
    pub controls: Vec<String>,
    /// The claim holds if every claimed model's mean error is at most this share of every control's.
    pub factor: f64,
    /// The models.
    pub models: Vec<Named>,
}

/// Refuses names that no model has.
pub(super) fn check_names(models: &[Named], names: &[&[String]]) -> Result<()> {
    for name in names.iter().copied().flatten() {
        if !models.iter().any(|model| &model.name == name) {
            let known: Vec<&str> = models.iter().map(|m| m.name.as_str()).collect();
            let expected = format!("the name of a model: {}", known.join(", "));
            return Err(TrainError::option("claimed, controls", name, expected));
        }
    }
    if names.iter().any(|list| list.is_empty()) {
        return Err(TrainError::option(
            "claimed, controls",
            "no name",
            "one or more",
        ));
    }
    Ok(())
}

impl SignalRecipe {
    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        check_names(&self.models, &[&self.claimed, &self.controls])
    }

    /// All parts.
    pub(super) fn parts<'a>(&'a self, seeds: u64, device: &'a Device) -> Vec<Part<'a>> {
        let shared = serde_json::json!([
            self.task,
            self.steps,
            self.examples,
            self.test_examples,
            self.lr
        ]);
        grid(shared, &self.models, seeds, |model, seed, go_on| {
            self.one(model, seed, device, go_on)
        })
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let device = cells.place();
        let parts = self.parts(recipe.seeds, &device);
        let Some(measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        let rows: Vec<Row> = self
            .models
            .iter()
            .map(|model| Row {
                name: model.name.clone(),
                parameters: measured[&model.name].first().map_or(0, |c| c.parameters),
                values: values(&measured, &model.name, ERROR),
                seconds: measured[&model.name].iter().map(|c| c.seconds).sum(),
            })
            .collect();
        let lines: Vec<Curve> = self
            .models
            .iter()
            .map(|model| Curve {
                name: model.name.clone(),
                points: mean_curve(&measured[&model.name]),
            })
            .collect();
        let mean = |name: &String| mean(&measured, name, ERROR);
        let worst = self.claimed.iter().map(mean).fold(0f64, f64::max);
        let best = self.controls.iter().map(mean).fold(f64::INFINITY, f64::min);
        let task = serde_json::to_string(&self.task).unwrap_or_default();
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "task {task}; {} steps of {} examples, AdamW {}, {} seeds, f32 on the CPU",
                self.steps, self.examples, self.lr, recipe.seeds
            ),
            measure: format!("mean squared error on {} test examples", self.test_examples),
            baseline: match self.task {
                SignalTask::Lag(_) => "answering 0: the target's variance, about 1 times the share of steps after the lag".into(),
                SignalTask::Adding(_) => "answering 1: 1/6".into(),
                SignalTask::Waveform(_) => "answering 1/3 for every class: 2/9".into(),
            },
            required: format!(
                "each of {} has at most {} times the error of each of {}, means over seeds",
                self.claimed.join(", "),
                self.factor,
                self.controls.join(", ")
            ),
            holds: worst <= self.factor * best,
            verdict: format!(
                "largest claimed mean {worst:.4}, smallest control mean {best:.4}, ratio {:.3}, allowed {}",
                worst / best,
                self.factor
            ),
            figure: curves(
                &format!("{}: training loss, mean over seeds", recipe.paper),
                "step",
                "mean squared error",
                &lines,
                true,
            ),
            rows,
        }))
    }

    /// Test error and training losses of one run; none when asked to stop.
    fn one(
        &self,
        model: &Named,
        seed: u64,
        device: &Device,
        go_on: GoOn<'_>,
    ) -> Result<Option<Cell>> {
        let task = self.task.get();
        let params = Arc::new(ParamStore::new(seed, DType::F32, device));
        let root = params.root();
        let built = SignalModel::new(&model.stack, task.inputs(), task.outputs(), &root)?;
        let objective = Regression::new(Arc::new(built), self.task.clone());
        let config = LoopConfig {
            steps: self.steps,
            clip: Some(1.0),
            schedule: Schedule::Cosine {
                warmup: self.steps / 20,
                min_lr_ratio: 0.1,
            },
            ..LoopConfig::default()
        };
        let source = SignalSource::new(self.task.clone(), self.examples, seed, "signals to learn")?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, objective, config)?;
        let mut losses = Vec::new();
        while let Some(event) = trainer.step()? {
            losses.push((event.step as f64, event.loss));
            if !go_on(event.step as f64 / self.steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let mut test = SignalSource::new(self.task.clone(), 8, seed, "signals to test")?;
        let batches = test.next(self.test_examples.div_ceil(8))?;
        let error = trainer.objective.mean(&batches)?;
        Ok(Some(Cell {
            values: [
                (ERROR.to_string(), error),
                (EXPLAINED.to_string(), 1.0 - error / variance(&batches)),
            ]
            .into(),
            curve: smooth(&losses),
            parameters: params.count(),
            seconds: 0.0,
        }))
    }
}

/// Of all targets around their mean.
fn variance(batches: &[SignalBatch]) -> f64 {
    let all = || {
        batches
            .iter()
            .flat_map(|b| &b.targets)
            .map(|&x| f64::from(x))
    };
    let count = all().count().max(1) as f64;
    let mean = all().sum::<f64>() / count;
    all().map(|x| (x - mean).powi(2)).sum::<f64>() / count
}

/// The mean over seeds; all curves have the same steps.
fn mean_curve(cells: &[Cell]) -> Vec<(f64, f64)> {
    let mut mean = cells.first().map_or(Vec::new(), |cell| cell.curve.clone());
    for (k, point) in mean.iter_mut().enumerate() {
        let sum: f64 = cells
            .iter()
            .filter_map(|cell| cell.curve.get(k))
            .map(|p| p.1)
            .sum();
        point.1 = sum / cells.len() as f64;
    }
    mean
}

/// Means of at most 120 stretches.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(120).max(1);
    points
        .chunks(size)
        .map(|chunk| {
            let sum = chunk.iter().map(|p| p.1).sum::<f64>();
            (chunk[chunk.len() - 1].0, sum / chunk.len() as f64)
        })
        .collect()
}

//! Mixers of one backbone on streams of tokens (papers 28 and 29): each is trained on each task alone, with its learning rate
//! chosen on validation streams.

use super::cells::{
    Cell, Cells, Check, GoOn, Measured, Part, Watch, check_settings, judge, mean, rows,
};
use super::signals::Named;
use super::{Recipe, Report};
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::source::Source;
use crate::streams::{Lesson, StreamSource, StreamTraining, accuracy};
use longspan_data::task::stream::StreamTask;
use longspan_nn::mixer::{LongVq, MixerConfig};
use longspan_nn::model::{LanguageModel, StackLm};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};

/// A task of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamilyTask {
    /// In tables, figures and checks.
    pub name: String,
    /// The stream.
    pub task: StreamTask,
    /// Tokens of an example.
    pub length: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FamilyRecipe {
    /// The tasks; every model is trained on each alone.
    pub tasks: Vec<FamilyTask>,
    /// Learning rates of AdamW; the best on validation streams is reported.
    pub lrs: Vec<f64>,
    /// Test streams of each task.
    pub test_examples: usize,
    /// What has to hold.
    pub checks: Vec<Check>,
    /// The models.
    pub models: Vec<Named>,
}

const PERPLEXITY: &str = "perplexity of codes";
const QUANTISED: &str = "relative error of codes";

fn both(model: &Named, task: &FamilyTask) -> String {
    format!("{}, {}", model.name, task.name)
}

impl FamilyRecipe {
    fn names(&self) -> Vec<String> {
        self.models.iter().map(|m| m.name.clone()).collect()
    }

    /// As many optimiser steps for every task.
    pub fn set_steps(&mut self, steps: u64) {
        self.tasks.iter_mut().for_each(|task| task.steps = steps);
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        if self.tasks.is_empty() || self.lrs.is_empty() || self.test_examples == 0 {
            return Err(TrainError::option(
                "tasks, lrs, test_examples",
                format!(
                    "{}, {} and {}",
                    self.tasks.len(),
                    self.lrs.len(),
                    self.test_examples
                ),
                "one or more of each",
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
        let device = &cells.place();
        let mut parts = Vec::new();
        for seed in 0..recipe.seeds {
            for (model, task) in self
                .models
                .iter()
                .flat_map(|m| self.tasks.iter().map(move |t| (m, t)))
            {
                parts.push(Part {
                    setting: both(model, task),
                    seed,
                    key: serde_json::json!([model, task, self.lrs, self.test_examples]),
                    make: Box::new(move |go_on| self.one(model, task, seed, device, go_on)),
                });
            }
        }
        let Some(made) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        // A model's cell of a seed holds what it scored on all tasks.
        let mut measured = Measured::new();
        for model in &self.models {
            let mut whole = vec![Cell::default(); recipe.seeds as usize];
            for task in &self.tasks {
                for (whole, cell) in whole.iter_mut().zip(&made[&both(model, task)]) {
                    whole.values.extend(cell.values.clone());
                    whole.parameters = cell.parameters;
                    whole.seconds += cell.seconds;
                }
            }
            measured.insert(model.name.clone(), whole);
        }
        let (holds, required, verdict) = judge(&self.checks, &measured);
        let lines: Vec<Curve> = self
            .models
            .iter()
            .map(|model| Curve {
                name: model.name.clone(),
                points: self
                    .tasks
                    .iter()
                    .enumerate()
                    .map(|(k, t)| {
                        (
                            k as f64 + 1.0,
                            100.0 * mean(&measured, &model.name, &t.name),
                        )
                    })
                    .collect(),
            })
            .collect();
        let mut measures: Vec<String> = self.tasks.iter().map(|t| t.name.clone()).collect();
        measures.extend([PERPLEXITY.to_string(), QUANTISED.to_string()]);
        let tasks: Vec<String> = self
            .tasks
            .iter()
            .map(|t| {
                let task = serde_json::to_string(&t.task).unwrap_or_default();
                format!(
                    "{}: {task}, {} tokens, {} steps of {} examples",
                    t.name, t.length, t.steps, t.examples
                )
            })
            .collect();
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "{}; AdamW, rates {:?}, the best on validation; {} seeds, f32 on the CPU",
                tasks.join("; "),
                self.lrs,
                recipe.seeds
            ),
            measure: format!(
                "share of known tokens that are predicted, on {} test streams of each task",
                self.test_examples
            ),
            baseline: "1 over the number of symbols by guessing".into(),
            required,
            holds,
            verdict,
            figure: curves(
                &format!("{}: tokens right, by task", recipe.paper),
                &self
                    .tasks
                    .iter()
                    .enumerate()
                    .map(|(k, t)| format!("{}: {}", k + 1, t.name))
                    .collect::<Vec<_>>()
                    .join(", "),
                "right, %",
                &lines,
                false,
            ),
            rows: rows(&measured, &self.names(), &measures),
        }))
    }

    fn one(
        &self,
        model: &Named,
        task: &FamilyTask,
        seed: u64,
        device: &candle_core::Device,
        go_on: GoOn<'_>,
    ) -> Result<Option<Cell>> {
        let batches = |purpose: &str| {
            let count = self.test_examples.div_ceil(8);
            StreamSource::new(task.task.get(), task.length, 8, seed, purpose)?.next(count)
        };
        let (validation, test) = (
            batches("streams to choose by")?,
            batches("streams to test")?,
        );
        let mut best: Option<(f64, Cell)> = None;
        for (k, &lr) in self.lrs.iter().enumerate() {
            let training = StreamTraining {
                lessons: vec![Lesson {
                    task: task.task.get(),
                    length: task.length,
                    examples: task.examples,
                    steps: task.steps,
                }],
                lr,
                device: device.clone(),
            };
            let mut part = |share: f64| go_on((k as f64 + share) / self.lrs.len() as f64);
            let Some((built, params)) = training.run(&model.stack, seed, &mut part)? else {
                return Ok(None);
            };
            let chosen_by = accuracy(&built, &validation)?;
            if best.as_ref().is_some_and(|(best, _)| *best >= chosen_by) {
                continue;
            }
            let mut cell = Cell {
                parameters: params.count(),
                ..Cell::default()
            };
            cell.values
                .insert(task.name.clone(), accuracy(&built, &test)?);
            code_use(model, &built, &params, &test[0], &mut cell)?;
            best = Some((chosen_by, cell));
        }
        Ok(best.map(|(_, cell)| cell))
    }
}

/// How the first layer of a LongVQ model uses its codes.
fn code_use(
    model: &Named,
    built: &StackLm,
    params: &ParamStore,
    batch: &crate::batch::PackedBatch,
    cell: &mut Cell,
) -> Result<()> {
    let MixerConfig::LongVq(config) = &model.stack.mixer else {
        return Ok(());
    };
    // The same parameters, by their names.
    let at = params.root().at("backbone").at("layers").at(0).at("mixer");
    let layer = LongVq::new(config, model.stack.d_model, &at)?;
    let x = built.embed(&batch.ids, &batch.lengths)?;
    let (documents, length) = (batch.lengths.len(), batch.lengths[0]);
    let codes = layer.code_use(&x.reshape((documents, length, ()))?)?;
    cell.values.insert(PERPLEXITY.into(), codes.perplexity);
    cell.values.insert(QUANTISED.into(), codes.relative_error);
    Ok(())
}

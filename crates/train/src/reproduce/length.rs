//! Length generalisation (paper 27, NoPE): language models trained on short examples of token tasks, tested by exact match
//! of freely written answers at longer ones; schemes are ranked by mean reciprocal rank.

use super::cells::{Cell, Cells, GoOn, Part, Watch, mean};
use super::signals::{Named, check_names};
use super::{Recipe, Report, Row};
use crate::error::{Result, TrainError};
use crate::exact::exact_match;
use crate::figure::{Curve, curves};
use crate::objective::{LanguageModeling, Recompute};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::source::TaskSource;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device};
use longspan_data::task::TokenTask;
use longspan_nn::model::StackLm;
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LengthRecipe {
    /// The tasks; every model is trained on each alone.
    pub tasks: Vec<TokenTask>,
    /// Shortest and longest training example.
    pub train_lengths: (usize, usize),
    /// Lengths of test examples; those above the longest training example are out of distribution.
    pub test_lengths: Vec<usize>,
    /// Test examples of each length.
    pub test_examples: usize,
    /// Optimiser steps of each run.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Learning rate of AdamW; a line to 0 after 6 % of warm-up.
    pub lr: f64,
    /// Models that the claim is about: the best of them is compared.
    pub claimed: Vec<String>,
    /// Models that it must exceed.
    pub controls: Vec<String>,
    /// By how much, as a share of examples.
    pub margin: f64,
    /// The models.
    pub models: Vec<Named>,
}

impl LengthRecipe {
    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        check_names(&self.models, &[&self.claimed, &self.controls])?;
        let longest = self.train_lengths.1;
        if self.tasks.is_empty() || !self.test_lengths.iter().any(|&length| length > longest) {
            return Err(TrainError::option(
                "tasks, test_lengths",
                format!("{} tasks, {:?}", self.tasks.len(), self.test_lengths),
                format!("a task, and a test length above {longest}"),
            ));
        }
        Ok(())
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let device = &cells.place();
        let (tasks, lengths) = (self.tasks.len(), self.test_lengths.len());
        let longest = self.train_lengths.1;
        let beyond: Vec<usize> = (0..lengths)
            .filter(|&l| self.test_lengths[l] > longest)
            .collect();
        let mut parts = Vec::new();
        for seed in 0..recipe.seeds {
            for (model, t) in self
                .models
                .iter()
                .flat_map(|m| (0..tasks).map(move |t| (m, t)))
            {
                let task = &self.tasks[t];
                let trained = (self.train_lengths, self.steps, self.examples, self.lr);
                let tested = (&self.test_lengths, self.test_examples);
                parts.push(Part {
                    setting: on_task(model, t),
                    seed,
                    key: serde_json::json!([model, task, trained, tested]),
                    make: Box::new(move |go_on| self.one(model, task, seed, device, go_on)),
                });
            }
        }
        let Some(measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        // [model][task][length], means over seeds
        let means: Vec<Vec<Vec<f64>>> = self
            .models
            .iter()
            .map(|model| {
                let of_task = |t: usize| {
                    let name = on_task(model, t);
                    let at = |&n: &usize| mean(&measured, &name, &exact_at(n));
                    self.test_lengths.iter().map(at).collect()
                };
                (0..tasks).map(of_task).collect()
            })
            .collect();
        let rows: Vec<Row> = self
            .models
            .iter()
            .map(|model| {
                let mut row = Row {
                    name: model.name.clone(),
                    parameters: 0,
                    values: vec![0.0; recipe.seeds as usize],
                    seconds: 0.0,
                };
                for t in 0..tasks {
                    for (value, cell) in row.values.iter_mut().zip(&measured[&on_task(model, t)]) {
                        row.parameters = cell.parameters;
                        row.seconds += cell.seconds;
                        let shares = beyond.iter().map(|&l| {
                            let name = exact_at(self.test_lengths[l]);
                            cell.values.get(&name).copied().unwrap_or(f64::NAN)
                        });
                        *value += shares.sum::<f64>() / (beyond.len() * tasks) as f64;
                    }
                }
                row
            })
            .collect();
        let mean = |name: &String| {
            rows.iter()
                .find(|r| &r.name == name)
                .map_or(f64::NAN, Row::mean)
        };
        let claimed = self
            .claimed
            .iter()
            .map(mean)
            .fold(f64::NEG_INFINITY, f64::max);
        let control = self
            .controls
            .iter()
            .map(mean)
            .fold(f64::NEG_INFINITY, f64::max);
        let inside = |m: usize| -> f64 {
            let known = (0..lengths).filter(|l| !beyond.contains(l));
            let list: Vec<f64> = known
                .flat_map(|l| (0..tasks).map(move |t| (t, l)))
                .map(|(t, l)| means[m][t][l])
                .collect();
            list.iter().sum::<f64>() / list.len().max(1) as f64
        };
        let details: Vec<String> = self
            .models
            .iter()
            .enumerate()
            .map(|(m, model)| {
                format!(
                    "{}: MRR {:.2}, at trained lengths {:.0} %",
                    model.name,
                    reciprocal_rank(&means, m),
                    100.0 * inside(m)
                )
            })
            .collect();
        let lines: Vec<Curve> = self
            .models
            .iter()
            .enumerate()
            .map(|(m, model)| Curve {
                name: model.name.clone(),
                points: (0..lengths)
                    .map(|l| {
                        let sum: f64 = (0..tasks).map(|t| means[m][t][l]).sum();
                        (self.test_lengths[l] as f64, 100.0 * sum / tasks as f64)
                    })
                    .collect(),
            })
            .collect();
        let names = serde_json::to_string(&self.tasks).unwrap_or_default();
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "tasks {names}; trained at lengths {} to {longest}, tested at {:?}; {} steps of {} examples, AdamW {}, \
                 {} seeds, f32 on the CPU",
                self.train_lengths.0,
                self.test_lengths,
                self.steps,
                self.examples,
                self.lr,
                recipe.seeds
            ),
            measure: format!(
                "share of examples longer than trained for that are answered exactly, {} of each length and task",
                self.test_examples
            ),
            baseline: "0 by guessing".into(),
            required: format!(
                "the best of {} exceeds each of {} by {:.0} points, means over seeds",
                self.claimed.join(", "),
                self.controls.join(", "),
                100.0 * self.margin
            ),
            holds: claimed - control >= self.margin,
            verdict: format!(
                "best claimed {:.1} %, best control {:.1} %, difference {:.1} points; {}",
                100.0 * claimed,
                100.0 * control,
                100.0 * (claimed - control),
                details.join("; ")
            ),
            figure: curves(
                &format!(
                    "{}: exact match by length (trained to {longest})",
                    recipe.paper
                ),
                "length",
                "exact match, %",
                &lines,
                false,
            ),
            rows,
        }))
    }

    /// Exact match at every test length; none when asked to stop.
    fn one(
        &self,
        model: &Named,
        task: &TokenTask,
        seed: u64,
        device: &Device,
        go_on: GoOn<'_>,
    ) -> Result<Option<Cell>> {
        let params = Arc::new(ParamStore::new(seed, DType::F32, device));
        let built = StackLm::new(&model.stack, task.get().vocab_size(), &params.root())?;
        let built = Arc::new(built);
        let objective = LanguageModeling::new(built.clone(), Recompute::None, usize::MAX)?;
        let config = LoopConfig {
            steps: self.steps,
            clip: Some(1.0),
            schedule: Schedule::Linear {
                warmup: self.steps * 6 / 100,
                min_lr_ratio: 0.0,
            },
            ..LoopConfig::default()
        };
        let source = TaskSource::new(task.clone(), self.train_lengths, self.examples, seed)?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, objective, config)?;
        while let Some(event) = trainer.step()? {
            if !go_on(event.step as f64 / self.steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        for &length in &self.test_lengths {
            let share = exact_match(&built, task.get(), length, self.test_examples, seed)?;
            cell.values.insert(exact_at(length), share);
        }
        Ok(Some(cell))
    }
}

fn on_task(model: &Named, task: usize) -> String {
    format!("{}, task {}", model.name, task + 1)
}

fn exact_at(length: usize) -> String {
    format!("exact at {length}")
}

/// Mean over tasks and lengths of 1 / rank of model m; ties share the better rank.
fn reciprocal_rank(means: &[Vec<Vec<f64>>], m: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for (t, lengths) in means[m].iter().enumerate() {
        for (l, &mine) in lengths.iter().enumerate() {
            let better = means.iter().filter(|other| other[t][l] > mine).count();
            sum += 1.0 / (better + 1) as f64;
            count += 1.0;
        }
    }
    sum / f64::max(count, 1.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn ranks_are_averaged_and_ties_share_the_better_one() {
        let means = [
            vec![vec![1.0, 0.5]],
            vec![vec![1.0, 0.2]],
            vec![vec![0.0, 0.9]],
        ];
        let rank = |m| super::reciprocal_rank(&means, m);
        assert_eq!(rank(0), (1.0 + 0.5) / 2.0);
        assert_eq!(rank(1), (1.0 + 1.0 / 3.0) / 2.0);
        assert_eq!(rank(2), (1.0 / 3.0 + 1.0) / 2.0);
    }
}

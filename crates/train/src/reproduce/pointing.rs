//! Pointing tasks (papers 08 and 39): models trained on inputs of some sizes, tested at others by what they answer alone.

use super::cells::{
    Cell, Cells, Check, GoOn, Measured, Part, Setting, Watch, check_settings, grid, judge, mean,
    rows,
};
use super::{Recipe, Report};
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::optim::{OptimConfig, Optimizer};
use crate::pointing::{PointingConfig, PointingLoss, PointingModel, PointingSource};
use crate::schedule::Schedule;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device};
use longspan_data::random::Random;
use longspan_data::task::PointingTask;
use longspan_data::task::geometry::Question;
use longspan_data::task::geometry::exact::Point;
use longspan_data::task::geometry::score::{is_tour, score_hull, score_triangles};
use longspan_data::task::geometry::tsp::tour_length;
use longspan_nn::model::pointer::{Answer, Rule};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One training: a model on a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointingSetting {
    /// In tables, figures and checks.
    pub name: String,
    /// What is asked.
    pub task: PointingTask,
    /// The model.
    pub model: PointingConfig,
    /// Smallest and largest input it is trained on; the size of a batch is uniform between them.
    pub sizes: (usize, usize),
    /// Sizes it is tested at.
    pub test_sizes: Vec<usize>,
    /// Optimiser steps, if others than the recipe's.
    #[serde(default)]
    pub steps: Option<u64>,
    /// Which answers may be given at the test.
    #[serde(default)]
    pub rule: Rule,
}

impl Setting for PointingSetting {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointingRecipe {
    /// Optimiser steps of each training.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Test examples of each size.
    pub test_examples: usize,
    /// Learning rate of AdamW; a line to 0 after 2 % of warm-up.
    pub lr: f64,
    /// Limit of the gradients' norm.
    pub clip: f64,
    /// Beam width at the test; the baselines are greedy.
    #[serde(default = "one")]
    pub beam: usize,
    /// The trainings.
    pub settings: Vec<PointingSetting>,
    /// Measures that are tabulated.
    pub measures: Vec<String>,
    /// Which measure the figure shows over sizes: its name without the size.
    pub figure: String,
    /// What has to hold.
    pub checks: Vec<Check>,
}

fn one() -> usize {
    1
}

/// Name of a measure at a size.
fn at(measure: &str, n: usize) -> String {
    format!("{measure} at {n}")
}

impl PointingRecipe {
    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        check_settings(&self.checks, &self.names())?;
        for setting in &self.settings {
            let smallest = setting.test_sizes.iter().min().copied().unwrap_or(0);
            if smallest == 0 {
                let found = format!("{:?} of {}", setting.test_sizes, setting.name);
                return Err(TrainError::option("test_sizes", found, "sizes from 1"));
            }
        }
        Ok(())
    }

    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
        self.settings.iter_mut().for_each(|s| s.steps = None);
    }

    /// Names of the settings.
    pub fn names(&self) -> Vec<String> {
        self.settings.iter().map(|s| s.name.clone()).collect()
    }

    /// All parts.
    pub(super) fn parts(&self, seeds: u64) -> Vec<Part<'_>> {
        let shared = serde_json::to_value(PointingRecipe {
            settings: Vec::new(),
            checks: Vec::new(),
            measures: Vec::new(),
            figure: String::new(),
            ..self.clone()
        });
        let shared = shared.unwrap_or_default();
        grid(shared, &self.settings, seeds, |setting, seed, go_on| {
            self.one(setting, seed, go_on)
        })
    }

    pub(super) fn run(
        &self,
        recipe: &Recipe,
        cells: &mut Cells,
        watch: Watch<'_>,
    ) -> Result<Option<Report>> {
        self.check()?;
        let Some(measured) = cells.make(&self.parts(recipe.seeds), watch)? else {
            return Ok(None);
        };
        let (holds, required, verdict) = judge(&self.checks, &measured);
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: self.describe(recipe.seeds),
            measure: format!(
                "of {} fresh inputs of each size: share of answers that are right, of areas covered by answers that are \
                 simple polygons, of answers that are none, length over the shortest tour's",
                self.test_examples
            ),
            baseline: "models with a fixed softmax over one size's indices".into(),
            required,
            holds,
            verdict,
            figure: self.draw(&recipe.paper, &measured),
            rows: rows(&measured, &self.names(), &self.measures),
        }))
    }

    /// The setting in a line.
    pub(super) fn describe(&self, seeds: u64) -> String {
        let trained: Vec<String> = self
            .settings
            .iter()
            .map(|s| {
                format!(
                    "{} on sizes {} to {}, {} steps",
                    s.name,
                    s.sizes.0,
                    s.sizes.1,
                    s.steps.unwrap_or(self.steps)
                )
            })
            .collect();
        format!(
            "{}; {} examples a step, AdamW {}, clip {}, beam {}, {seeds} seeds, f32 on the CPU",
            trained.join("; "),
            self.examples,
            self.lr,
            self.clip,
            self.beam
        )
    }

    /// The figure's measure over sizes.
    pub(super) fn draw(&self, paper: &str, measured: &Measured) -> String {
        let lines: Vec<Curve> = self
            .settings
            .iter()
            .map(|setting| Curve {
                name: setting.name.clone(),
                points: setting
                    .test_sizes
                    .iter()
                    .map(|&n| {
                        let value = mean(measured, &setting.name, &at(&self.figure, n));
                        (n as f64, 100.0 * value)
                    })
                    .filter(|point| point.1.is_finite())
                    .collect(),
            })
            .filter(|curve| !curve.points.is_empty())
            .collect();
        curves(
            &format!("{paper}: {} by size, mean over seeds", self.figure),
            "elements of the input",
            &format!("{}, %", self.figure),
            &lines,
            false,
        )
    }

    fn one(&self, setting: &PointingSetting, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let task = setting.task.get();
        let params = Arc::new(ParamStore::new(seed, DType::F32, &Device::Cpu));
        let model = PointingModel::new(&setting.model, task.dim(), task.ends(), &params.root())?;
        let model = Arc::new(model);
        let steps = setting.steps.unwrap_or(self.steps);
        let config = LoopConfig {
            steps,
            clip: Some(self.clip),
            schedule: Schedule::Linear {
                warmup: steps / 50,
                min_lr_ratio: 0.0,
            },
            ..LoopConfig::default()
        };
        let source = PointingSource::new(
            setting.task.clone(),
            setting.sizes,
            self.examples,
            seed,
            "inputs to learn from",
        )?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let loss = PointingLoss::new(model.clone(), task.dim());
        let mut trainer = Trainer::new(params.clone(), optimizer, source, loss, config)?;
        let mut last = 0.0;
        while let Some(event) = trainer.step()? {
            last = event.loss;
            if !go_on(event.step as f64 / steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        cell.values.insert("last loss".into(), last);
        for &n in &setting.test_sizes {
            for (measure, value) in self.test(setting, &model, n, seed)? {
                cell.values.insert(at(measure, n), value);
            }
        }
        Ok(Some(cell))
    }

    /// Measures at one size.
    fn test(
        &self,
        setting: &PointingSetting,
        model: &PointingModel,
        n: usize,
        seed: u64,
    ) -> Result<Vec<(&'static str, f64)>> {
        let task = setting.task.get();
        let mut random = Random::new(seed, &format!("inputs of size {n} to test"));
        let examples: Vec<_> = (0..self.test_examples)
            .map(|_| task.sample(n, &mut random))
            .collect();
        let most = match &setting.task {
            PointingTask::Geometry(g) if g.question == Question::Delaunay => 6 * n + 3,
            _ => n + 2,
        };
        let mut answers: Vec<Answer> = Vec::new();
        for chunk in examples.chunks(128) {
            let inputs: Vec<Vec<f32>> = chunk.iter().map(|e| e.inputs.clone()).collect();
            answers.extend(model.answer(&inputs, task.dim(), setting.rule, self.beam, most)?);
        }
        let total = examples.len().max(1) as f64;
        let share = |count: usize| count as f64 / total;
        let exact = examples
            .iter()
            .zip(&answers)
            .filter(|(e, a)| e.answer == a.indices)
            .count();
        let PointingTask::Geometry(geometry) = &setting.task else {
            return Ok(vec![("accuracy", share(exact))]);
        };
        let (mut right, mut covered, mut valid, mut ratios) = (0, 0.0, 0, 0.0);
        for (example, answer) in examples.iter().zip(&answers) {
            let points: Vec<Point> = example
                .inputs
                .chunks(2)
                .map(|p| [f64::from(p[0]), f64::from(p[1])])
                .collect();
            match geometry.question {
                Question::Hull => {
                    let (same, area) = score_hull(&points, &example.answer, &answer.indices);
                    right += usize::from(same);
                    valid += usize::from(area.is_some());
                    covered += area.unwrap_or(0.0);
                }
                Question::Delaunay => {
                    let truth: Vec<[usize; 3]> = example
                        .answer
                        .chunks_exact(3)
                        .map(|t| [t[0], t[1], t[2]])
                        .collect();
                    let (same, found) = score_triangles(&truth, &answer.indices);
                    right += usize::from(same);
                    covered += found;
                    valid += 1;
                }
                Question::Tsp => {
                    if is_tour(n, &answer.indices) {
                        let best = tour_length(&points, &example.answer);
                        let ratio = tour_length(&points, &answer.indices) / best;
                        right += usize::from(ratio < 1.0 + 1e-6);
                        ratios += ratio;
                        valid += 1;
                    }
                }
            }
        }
        let mut out = vec![("accuracy", share(right)), ("invalid", 1.0 - share(valid))];
        if valid > 0 {
            let valid = valid as f64;
            out.push(match geometry.question {
                Question::Tsp => ("length ratio", ratios / valid),
                _ => ("coverage", covered / valid),
            });
        }
        Ok(out)
    }
}

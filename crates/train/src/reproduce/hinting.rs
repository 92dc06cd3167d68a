//! Task hinting (paper 51): the same decoder sorts with and without a helper task, and is asked for lists longer than trained.

use super::cells::{
    Cell, Cells, Check, GoOn, Setting, Watch, check_settings, grid, judge, mean, rows,
};
use super::{Recipe, Report};
use crate::error::{Result, TrainError};
use crate::figure::{Curve, curves};
use crate::hints::{HintSource, Hinting, Mixing, TaskBatch, exact};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device};
use longspan_data::random::Random;
use longspan_data::task::{Hint, HintedSort, Sort};
use longspan_nn::model::{Temper, TemperedConfig, TemperedDecoder};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintSetting {
    /// In tables, figures and checks.
    pub name: String,
    /// The helper task; none = sorting alone.
    #[serde(default)]
    pub hint: Option<Hint>,
    /// How the tasks share the steps.
    #[serde(default)]
    pub mixing: Mixing,
    /// Factor of the attention logits.
    #[serde(default)]
    pub temper: Temper,
    /// Optimiser steps, if others than the recipe's: what equal compute needs.
    #[serde(default)]
    pub steps: Option<u64>,
}

impl Setting for HintSetting {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintRecipe {
    /// Different values of lists (V).
    pub values: usize,
    /// Shortest and longest list trained, of sorting and of hints.
    pub train_lengths: (usize, usize),
    /// Lengths to be tested.
    pub test_lengths: Vec<usize>,
    /// Lists of each length.
    pub test_examples: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Lists of a step, of each task.
    pub examples: usize,
    /// Learning rate of AdamW; a cosine to 0 after 5 % of warm-up.
    pub lr: f64,
    /// Width, layers, heads; `temper` is that of each setting.
    pub model: TemperedConfig,
    /// The trainings.
    pub settings: Vec<HintSetting>,
    /// What has to hold.
    pub checks: Vec<Check>,
}

fn sorted_at(n: usize) -> String {
    format!("sorted at {n}")
}

/// Exactness of the hint at the longest trained length.
const HINTED: &str = "hint right at the longest trained";
/// How far training brought the losses down.
const FALL: &str = "fall of the hint's loss";

impl HintRecipe {
    fn names(&self) -> Vec<String> {
        self.settings.iter().map(|s| s.name.clone()).collect()
    }

    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
        self.settings.iter_mut().for_each(|s| s.steps = None);
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        if !self.test_lengths.iter().any(|&n| n > self.train_lengths.1) {
            let expected = format!("one above {}", self.train_lengths.1);
            let found = format!("{:?}", self.test_lengths);
            return Err(TrainError::option("test_lengths", found, expected));
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
        let shared = serde_json::to_value(HintRecipe {
            settings: Vec::new(),
            checks: Vec::new(),
            ..self.clone()
        });
        let shared = shared.unwrap_or_default();
        let parts = grid(
            shared,
            &self.settings,
            recipe.seeds,
            |setting, seed, go_on| self.one(setting, seed, go_on),
        );
        let Some(measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        let (holds, required, verdict) = judge(&self.checks, &measured);
        let lines: Vec<Curve> = self
            .settings
            .iter()
            .map(|setting| Curve {
                name: setting.name.clone(),
                points: self
                    .test_lengths
                    .iter()
                    .map(|&n| {
                        let value = mean(&measured, &setting.name, &sorted_at(n));
                        (n as f64, 100.0 * value)
                    })
                    .collect(),
            })
            .collect();
        let mut measures: Vec<String> = self.test_lengths.iter().map(|&n| sorted_at(n)).collect();
        measures.extend([HINTED.to_string(), FALL.to_string()]);
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "lists of {} to {} values below {}, tested to {}; {} layers of width {}, {} heads, no positions; {} steps of \
                 {} lists a task, AdamW {}, {} seeds, f32 on the CPU",
                self.train_lengths.0,
                self.train_lengths.1,
                self.values,
                self.test_lengths.iter().max().copied().unwrap_or(0),
                self.model.layers,
                self.model.d_model,
                self.model.heads,
                self.steps,
                self.examples,
                self.lr,
                recipe.seeds
            ),
            measure: format!(
                "share of {} lists of each length that are sorted whole, written greedily by the model alone",
                self.test_examples
            ),
            baseline: "the same decoder trained on sorting alone, with as many lists to sort"
                .into(),
            required,
            holds,
            verdict,
            figure: curves(
                &format!(
                    "{}: lists sorted whole (trained to {})",
                    recipe.paper, self.train_lengths.1
                ),
                "length of the list",
                "sorted, %",
                &lines,
                false,
            ),
            rows: rows(&measured, &self.names(), &measures),
        }))
    }

    fn one(&self, setting: &HintSetting, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let sort = HintedSort {
            sort: Sort {
                values: self.values,
            },
        };
        let params = Arc::new(ParamStore::new(seed, DType::F32, &Device::Cpu));
        let config = TemperedConfig {
            temper: setting.temper.clone(),
            ..self.model.clone()
        };
        let model = TemperedDecoder::new(&config, sort.vocab_size(), 2, &params.root())?;
        let model = Arc::new(model);
        let steps = setting.steps.unwrap_or(self.steps);
        let loop_config = LoopConfig {
            steps,
            clip: Some(1.0),
            schedule: Schedule::Cosine {
                warmup: steps / 20,
                min_lr_ratio: 0.0,
            },
            ..LoopConfig::default()
        };
        let hint = setting.hint.map(|hint| (hint, setting.mixing));
        let source = HintSource::new(sort.clone(), hint, self.train_lengths, self.examples, seed)?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(
            params.clone(),
            optimizer,
            source,
            Hinting::new(model.clone()),
            loop_config,
        )?;
        // The hint's loss on lists of its own, before and after.
        let longest = self.train_lengths.1;
        let of_hint = |trainer: &Trainer<HintSource, Hinting>, hint: Hint| -> Result<f64> {
            let mut random = Random::new(seed, "hints to test");
            let examples: Vec<_> = (0..256)
                .map(|_| (longest, sort.sample(hint, longest, &mut random)))
                .collect();
            let loss = trainer.objective.mean(&TaskBatch::new(&examples, 1, 1.0))?;
            Ok(f64::from(loss.detach().to_scalar::<f32>()?))
        };
        let before = setting
            .hint
            .map(|hint| of_hint(&trainer, hint))
            .transpose()?;
        while let Some(event) = trainer.step()? {
            if !go_on(event.step as f64 / steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        for &n in &self.test_lengths {
            let share = exact(&model, &sort, None, n, self.test_examples, seed)?;
            cell.values.insert(sorted_at(n), share);
        }
        if let (Some(hint), Some(before)) = (setting.hint, before) {
            let share = exact(&model, &sort, Some(hint), longest, self.test_examples, seed)?;
            cell.values.insert(HINTED.into(), share);
            let after = of_hint(&trainer, hint)?;
            cell.values.insert(FALL.into(), before / after.max(1e-9));
        }
        Ok(Some(cell))
    }
}

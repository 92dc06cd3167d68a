//! Order matters (paper 08): sets as input, read by models that see or do not see an order; sets as output, written in
//! different orders, one of them chosen by the model.

use super::cells::{Cell, Cells, Check, GoOn, Setting, Watch, check_settings, grid, judge, rows};
use super::pointing::PointingRecipe;
use super::{Recipe, Report};
use crate::error::{Result, TrainError};
use crate::optim::{OptimConfig, Optimizer};
use crate::order_search::{Order, OrderSearch, SetSource};
use crate::schedule::Schedule;
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{DType, Device};
use longspan_data::random::Random;
use longspan_data::task::{Star, StarConfig};
use longspan_nn::model::{TaggedConfig, TaggedLm};
use longspan_nn::params::ParamStore;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Which order a star's variables are written in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StarOrder {
    /// The variable that the others depend on comes first.
    HeadFirst,
    /// It comes last.
    HeadLast,
    /// Any order.
    Other(Order),
}

/// One training on the star model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StarSetting {
    /// In tables and checks.
    pub name: String,
    /// Variables, symbols, peakiness.
    pub star: StarConfig,
    /// Samples to learn from.
    pub samples: usize,
    /// The order of the output.
    pub order: StarOrder,
    /// Optimiser steps.
    pub steps: u64,
}

impl Setting for StarSetting {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Trainings on the star model. The model is kept where the loss on held-out samples is least; the reported loss is that of
/// other samples again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StarRecipe {
    /// Samples of a step.
    pub examples: usize,
    /// Learning rate of AdamW; a line to a tenth.
    pub lr: f64,
    /// Width of embedding and LSTM.
    pub hidden: usize,
    /// Steps between looks at the held-out loss.
    pub look: u64,
    /// Samples held out, and as many others to test.
    pub held_out: usize,
    /// The trainings.
    pub settings: Vec<StarSetting>,
}

/// Settings of the experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrderRecipe {
    /// Sets as input.
    pub sorting: PointingRecipe,
    /// Sets as output.
    pub star: StarRecipe,
    /// What has to hold, of both parts.
    pub checks: Vec<Check>,
}

impl OrderRecipe {
    fn names(&self) -> Vec<String> {
        let mut names = self.sorting.names();
        names.extend(self.star.settings.iter().map(|s| s.name.clone()));
        names
    }

    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        self.sorting.set_steps(steps);
        self.star.settings.iter_mut().for_each(|s| s.steps = steps);
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        self.sorting.check()?;
        if self.star.look == 0 || self.star.held_out == 0 {
            let found = format!("{} and {}", self.star.look, self.star.held_out);
            return Err(TrainError::option(
                "look, held_out",
                found,
                "1 or more of each",
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
        let shared = serde_json::to_value(StarRecipe {
            settings: Vec::new(),
            ..self.star.clone()
        });
        let shared = shared.unwrap_or_default();
        let mut parts = self.sorting.parts(recipe.seeds);
        parts.extend(grid(
            shared,
            &self.star.settings,
            recipe.seeds,
            |setting, seed, go_on| self.star.one(setting, seed, go_on),
        ));
        let Some(measured) = cells.make(&parts, watch)? else {
            return Ok(None);
        };
        let checks = [&self.sorting.checks[..], &self.checks].concat();
        let (holds, required, verdict) = judge(&checks, &measured);
        let stars: Vec<String> = self
            .star
            .settings
            .iter()
            .map(|s| {
                format!(
                    "{}: {} variables of {} symbols, beta {}, {} samples, {} steps",
                    s.name, s.star.variables, s.star.symbols, s.star.beta, s.samples, s.steps
                )
            })
            .collect();
        let measures = [
            &self.sorting.measures[..],
            &[EXCESS.to_string(), HEAD_FIRST.to_string()],
        ]
        .concat();
        Ok(Some(Report {
            paper: recipe.paper.clone(),
            claim: recipe.claim.clone(),
            setting: format!(
                "sorting: {}. Star model, LSTM of width {}, AdamW {}, {} samples a step: {}",
                self.sorting.describe(recipe.seeds),
                self.star.hidden,
                self.star.lr,
                self.star.examples,
                stars.join("; ")
            ),
            measure: format!(
                "share of {} sets sorted whole, by the model alone; {EXCESS} of {} other samples; {HEAD_FIRST}",
                self.sorting.test_examples, self.star.held_out
            ),
            baseline: "sorting: the encoder that reads the set as a list; star: the true entropy, 0 nats of excess".into(),
            required,
            holds,
            verdict,
            figure: self.sorting.draw(&recipe.paper, &measured),
            rows: rows(&measured, &self.names(), &measures),
        }))
    }
}

/// Loss above the true entropy of the samples' distribution.
const EXCESS: &str = "nats above entropy";
/// What a search has found.
const HEAD_FIRST: &str = "share of sets written head first";

impl StarRecipe {
    fn one(&self, setting: &StarSetting, seed: u64, go_on: GoOn<'_>) -> Result<Option<Cell>> {
        let star = Star::new(&setting.star, seed);
        let places = star.config().variables;
        let draw = |count: usize, purpose: &str| -> Vec<Vec<u32>> {
            let mut random = Random::new(seed, purpose);
            (0..count).map(|_| star.sample(&mut random)).collect()
        };
        let (held_out, test) = (
            draw(self.held_out, "star held out"),
            draw(self.held_out, "star to test"),
        );
        // The entropy of what was drawn: the same samples are asked of every order.
        let floor = -test.iter().map(|v| star.log_probability(v)).sum::<f64>() / test.len() as f64;
        let params = Arc::new(ParamStore::new(seed, DType::F32, &Device::Cpu));
        let config = TaggedConfig {
            symbols: star.config().symbols,
            places,
            embedding: self.hidden,
            hidden: self.hidden,
        };
        let model = Arc::new(TaggedLm::new(&config, &params.root())?);
        let order = match &setting.order {
            StarOrder::HeadFirst => Order::Fixed((0..places).collect()),
            StarOrder::HeadLast => Order::Fixed((1..places).chain([0]).collect()),
            StarOrder::Other(order) => order.clone(),
        };
        let search = OrderSearch::new(model.clone(), order)?;
        let source = SetSource::new(draw(setting.samples, "star samples"), self.examples, seed)?;
        let loop_config = LoopConfig {
            steps: setting.steps,
            clip: Some(1.0),
            schedule: Schedule::Linear {
                warmup: setting.steps / 50,
                min_lr_ratio: 0.1,
            },
            ..LoopConfig::default()
        };
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, search, loop_config)?;
        let mut best = (f64::INFINITY, f64::NAN);
        while let Some(event) = trainer.step()? {
            if event.step.is_multiple_of(self.look) || event.step == setting.steps {
                let held = trainer.objective.mean(&held_out, event.step)?;
                if held < best.0 {
                    best = (held, trainer.objective.mean(&test, event.step)?);
                }
            }
            if !go_on(event.step as f64 / setting.steps.max(1) as f64) {
                return Ok(None);
            }
        }
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        cell.values.insert(EXCESS.into(), best.1 - floor);
        if matches!(setting.order, StarOrder::Other(_)) {
            let batch = crate::order_search::SetBatch {
                values: test,
                step: setting.steps,
                draw: Random::new(seed, "orders to look at").state(),
            };
            let written = trainer.objective.written(&batch)?;
            let first = written
                .iter()
                .zip(&batch.values)
                .filter(|(written, values)| written[0] == model.id(values[0], 0))
                .count();
            let share = first as f64 / written.len().max(1) as f64;
            cell.values.insert(HEAD_FIRST.into(), share);
        }
        Ok(Some(cell))
    }
}

//! How many pairs of key and value a Mamba-2 holds, by the size of its state (paper 16, Stuffed Mamba).

use super::cells::{Cell, GoOn, Measured, Part, values};
use crate::error::{Result, TrainError};
use crate::source::Source;
use crate::streams::{Lesson, StreamSource, StreamTraining, accuracy};
use candle_core::Device;
use longspan_data::task::stream::Recall;
use longspan_nn::mixer::{Mamba2Config, MixerConfig};
use longspan_nn::model::StackConfig;
use serde::{Deserialize, Serialize};

/// How much a state of each size holds. Nothing but its size must be in the way: models that begin with many pairs never
/// find the key of a value, so lessons go from few pairs to many, more than the largest state can hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Columns N of each head's state.
    pub state_sizes: Vec<usize>,
    /// Numbers of pairs to be remembered: each is a lesson, of examples with 1 to so many pairs, and a test.
    pub pairs: Vec<usize>,
    /// Different keys, and different values.
    pub symbols: usize,
    /// Optimiser steps of each lesson.
    pub steps: u64,
    /// Tokens of a step: an example has four times as many as its pairs.
    pub tokens: usize,
    /// Examples of each number of pairs in the tests.
    pub test_examples: usize,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// Width.
    pub d_model: usize,
    /// Blocks.
    pub layers: usize,
    /// The mixer; its state size is each of `state_sizes`.
    pub mixer: Mamba2Config,
}

pub(super) const HELD: &str = "pairs held";
/// The name of what is found from all sizes together.
pub(super) const ALL: &str = "all state sizes";
pub(super) const LINE: &str = "R² of pairs held by state size";
pub(super) const LOG_LINE: &str = "R² of log pairs held by log state size";
pub(super) const RANKS: &str = "rank correlation of pairs held and state size";

impl Capacity {
    /// Settings that are measured, and the one of all together.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.state_sizes.iter().map(|n| held_by(*n)).collect();
        names.push(ALL.into());
        names
    }

    /// Refuses what cannot run.
    pub(super) fn check(&self) -> Result<()> {
        let most = self.most();
        if self.state_sizes.len() < 2 || most == 0 || self.pairs.contains(&0) {
            return Err(TrainError::option(
                "capacity.state_sizes, capacity.pairs",
                format!("{:?}, {:?}", self.state_sizes, self.pairs),
                "two state sizes or more, and numbers of pairs of 1 or more",
            ));
        }
        if self.symbols < most.max(2) {
            let expected = format!("{} or more, for keys that differ", most.max(2));
            return Err(TrainError::option(
                "capacity.symbols",
                self.symbols,
                expected,
            ));
        }
        if self.tokens < 4 * most || self.test_examples == 0 {
            return Err(TrainError::option(
                "capacity.tokens, capacity.test_examples",
                format!("{} and {}", self.tokens, self.test_examples),
                format!(
                    "{} or more, an example of {most} pairs, and 1 or more",
                    4 * most
                ),
            ));
        }
        Ok(())
    }

    fn most(&self) -> usize {
        self.pairs.iter().copied().max().unwrap_or(0)
    }

    /// Every size with this seed.
    pub(super) fn parts<'a>(
        &'a self,
        seed: u64,
        device: &'a Device,
    ) -> impl Iterator<Item = Part<'a>> {
        let shared = Capacity {
            state_sizes: Vec::new(),
            ..self.clone()
        };
        let shared = serde_json::to_value(shared).unwrap_or_default();
        self.state_sizes.iter().map(move |&n| Part {
            setting: held_by(n),
            seed,
            key: serde_json::json!([n, shared]),
            make: Box::new(move |go_on| self.held(n, seed, device, go_on)),
        })
    }

    /// Pairs that a state of this size holds.
    fn held(
        &self,
        state_size: usize,
        seed: u64,
        device: &Device,
        go_on: GoOn<'_>,
    ) -> Result<Option<Cell>> {
        let recall = |pairs: usize, varied: bool| Recall {
            pairs,
            keys: self.symbols,
            values: self.symbols,
            varied,
        };
        let tasks: Vec<Recall> = self
            .pairs
            .iter()
            .map(|&pairs| recall(pairs, true))
            .collect();
        let lessons = tasks.iter().map(|task| Lesson {
            task,
            length: 4 * task.pairs,
            examples: self.tokens / (4 * task.pairs),
            steps: self.steps,
        });
        let training = StreamTraining {
            lessons: lessons.collect(),
            lr: self.lr,
            device: device.clone(),
        };
        let mixer = MixerConfig::Mamba2(Mamba2Config {
            state_size,
            ..self.mixer.clone()
        });
        let stack = StackConfig::of_mixers(self.d_model, self.layers, mixer);
        let Some((model, params)) = training.run_to_cpu(&stack, seed, go_on)? else {
            return Ok(None);
        };
        let mut cell = Cell {
            parameters: params.count(),
            ..Cell::default()
        };
        let guess = 1.0 / self.symbols as f64;
        let mut held = 0f64;
        for &pairs in &self.pairs {
            let task = recall(pairs, false);
            let count = self.test_examples.div_ceil(8);
            let mut source = StreamSource::new(&task, 4 * pairs, 8, seed, "pairs to test")?;
            let share = accuracy(&model, &source.next(count)?)?;
            cell.values.insert(format!("right of {pairs} pairs"), share);
            held = held.max(pairs as f64 * ((share - guess) / (1.0 - guess)).max(0.0));
        }
        cell.values.insert(HELD.into(), held);
        Ok(Some(cell))
    }

    /// What is found from the medians over seeds of all sizes.
    pub(super) fn all(&self, measured: &Measured) -> Cell {
        let points: Vec<(f64, f64)> = self
            .state_sizes
            .iter()
            .map(|&n| (n as f64, median(values(measured, &held_by(n), HELD))))
            .collect();
        let logs: Vec<(f64, f64)> = points.iter().map(|p| (p.0.ln(), p.1.ln())).collect();
        let found = [
            (LINE, r_squared(&points)),
            (LOG_LINE, r_squared(&logs)),
            (RANKS, rank_correlation(&points)),
        ];
        Cell {
            values: found.map(|(name, value)| (name.into(), value)).into(),
            ..Cell::default()
        }
    }
}

fn held_by(state_size: usize) -> String {
    format!("held by N = {state_size}")
}

fn median(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    match list.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => list[n / 2],
        n => (list[n / 2 - 1] + list[n / 2]) / 2.0,
    }
}

/// Of x and y: Pearson's correlation.
fn correlation(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|p| f(p.0 - x, p.1 - y)).sum::<f64>();
    let (xx, yy, xy) = (sum(&|a, _| a * a), sum(&|_, b| b * b), sum(&|a, b| a * b));
    if xx * yy > 0.0 {
        xy / (xx * yy).sqrt()
    } else {
        f64::NAN
    }
}

/// Of the best line through the points.
fn r_squared(points: &[(f64, f64)]) -> f64 {
    correlation(points).powi(2)
}

/// Spearman's: the correlation of ranks; equal values share their mean rank.
fn rank_correlation(points: &[(f64, f64)]) -> f64 {
    let rank = |value: f64, pick: fn(&(f64, f64)) -> f64| {
        let below = points.iter().filter(|p| pick(p) < value).count();
        let equal = points.iter().filter(|p| pick(p) == value).count();
        below as f64 + (equal as f64 - 1.0) / 2.0
    };
    let ranks = points
        .iter()
        .map(|&(x, y)| (rank(x, |p| p.0), rank(y, |p| p.1)));
    correlation(&ranks.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_fitted_and_medians_taken() {
        let line = [(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)];
        assert!((r_squared(&line) - 1.0).abs() < 1e-12);
        assert!(r_squared(&[(1.0, 1.0), (2.0, 0.0), (3.0, 1.0)]) < 1e-12);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn ranks_see_order_alone() {
        let curve = [(2.0, 1.0), (4.0, 1.1), (8.0, 90.0)];
        assert!((rank_correlation(&curve) - 1.0).abs() < 1e-12);
        assert!(r_squared(&curve) < 0.9);
        let falling = curve.map(|(x, y)| (x, -y));
        assert!((rank_correlation(&falling) + 1.0).abs() < 1e-12);
        let tied = [(1.0, 2.0), (2.0, 2.0), (3.0, 5.0)];
        assert!((rank_correlation(&tied) - 0.75f64.sqrt()).abs() < 1e-12);
    }
}

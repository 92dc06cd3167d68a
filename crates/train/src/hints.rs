//! Task hinting (paper 51): a small helper task is trained beside the base task, sorting, by the same decoder.
//!
//! In mode `sum` every step has a batch of each task and losses are added, each a mean over its own targets, so that the
//! base task sees as many examples as without hints. In mode `mix` one batch is drawn from both.

use crate::error::{Result, TrainError};
use crate::objective::Objective;
use crate::source::{Source, state_from};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use longspan_data::random::Random;
use longspan_data::task::{EOS, Example, Hint, HintedSort, Tokens};
use longspan_kernels::learn::nll;
use longspan_nn::model::TemperedDecoder;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// How base task and hint share the steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Mixing {
    /// A batch of each, losses added, the hint's times `weight`.
    Sum {
        /// λ
        weight: f64,
    },
    /// One batch, this share of it hints.
    Mix {
        /// ρ
        share: f64,
    },
}

impl Default for Mixing {
    fn default() -> Self {
        Mixing::Sum { weight: 1.0 }
    }
}

/// Examples of one task, padded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskBatch {
    /// [examples][longest]
    pub ids: Vec<Vec<u32>>,
    /// Elements of each example's list.
    pub lengths: Vec<usize>,
    /// Places (example longest + position) whose next token is a target.
    pub rows: Vec<u32>,
    /// The targets.
    pub targets: Vec<u32>,
    /// The head.
    pub task: usize,
    /// Factor of the mean loss.
    pub weight: f64,
}

impl TaskBatch {
    /// Sets examples out; only answers are targets.
    pub fn new(examples: &[(usize, Example)], task: usize, weight: f64) -> Self {
        let size = |e: &Example| e.prompt.len() + e.answer.len() - 1;
        let longest = examples.iter().map(|(_, e)| size(e)).max().unwrap_or(0);
        let mut batch = TaskBatch {
            task,
            weight,
            ..TaskBatch::default()
        };
        for (k, (length, example)) in examples.iter().enumerate() {
            // The last token of an answer is never read.
            let mut ids = [&example.prompt[..], &example.answer[..]].concat();
            ids.truncate(size(example));
            ids.resize(longest, EOS);
            batch.ids.push(ids);
            batch.lengths.push(*length);
            for (t, &target) in example.answer.iter().enumerate() {
                let position = example.prompt.len() - 1 + t;
                batch.rows.push((k * longest + position) as u32);
                batch.targets.push(target);
            }
        }
        batch
    }
}

/// Fresh lists of lengths uniform in a range, sorted and hinted at.
pub struct HintSource {
    sort: HintedSort,
    hint: Option<(Hint, Mixing)>,
    lengths: (usize, usize),
    examples: usize,
    base: Random,
    extra: Random,
}

impl HintSource {
    /// `examples`: of a step, for each task (`sum`) or of both (`mix`).
    pub fn new(
        sort: HintedSort,
        hint: Option<(Hint, Mixing)>,
        lengths: (usize, usize),
        examples: usize,
        seed: u64,
    ) -> Result<Self> {
        if lengths.0 == 0 || lengths.0 > lengths.1 || examples == 0 {
            return Err(TrainError::option(
                "lengths, examples",
                format!("{lengths:?} and {examples}"),
                "a range from 1, small to large, and 1 example or more",
            ));
        }
        let (name, value) = match hint {
            Some((_, Mixing::Sum { weight })) => ("weight", weight),
            Some((_, Mixing::Mix { share })) if share <= 1.0 => ("share", share),
            Some((_, Mixing::Mix { share })) => ("share", -share),
            None => ("weight", 0.0),
        };
        if !(value.is_finite() && value >= 0.0) {
            return Err(TrainError::option(
                name,
                value.abs(),
                "a number from 0, a share up to 1",
            ));
        }
        Ok(HintSource {
            sort,
            hint,
            lengths,
            examples,
            base: Random::new(seed, "lists to sort"),
            extra: Random::new(seed, "hints"),
        })
    }

    fn lists(&mut self, count: usize) -> Vec<(usize, Example)> {
        (0..count)
            .map(|_| {
                let length = self.base.between(self.lengths.0, self.lengths.1);
                (length, self.sort.sort.sample(length, &mut self.base))
            })
            .collect()
    }

    fn hints(&mut self, hint: Hint, count: usize) -> Vec<(usize, Example)> {
        (0..count)
            .map(|_| {
                let length = self.extra.between(self.lengths.0, self.lengths.1);
                (length, self.sort.sample(hint, length, &mut self.extra))
            })
            .collect()
    }
}

impl Source for HintSource {
    /// The tasks of one step.
    type Batch = Vec<TaskBatch>;

    fn next(&mut self, count: usize) -> Result<Vec<Vec<TaskBatch>>> {
        Ok((0..count)
            .map(|_| match self.hint {
                None => vec![TaskBatch::new(&self.lists(self.examples), 0, 1.0)],
                Some((hint, Mixing::Sum { weight })) => {
                    let base = TaskBatch::new(&self.lists(self.examples), 0, 1.0);
                    let hints = self.hints(hint, self.examples);
                    vec![base, TaskBatch::new(&hints, 1, weight)]
                }
                Some((hint, Mixing::Mix { share })) => {
                    let of_hint = (share * self.examples as f64).round() as usize;
                    let base = self.lists(self.examples - of_hint);
                    let hints = self.hints(hint, of_hint);
                    // Means over all targets of the pool.
                    let count = |list: &[(usize, Example)]| -> f64 {
                        list.iter().map(|(_, e)| e.answer.len() as f64).sum()
                    };
                    let (a, b) = (count(&base), count(&hints));
                    vec![
                        TaskBatch::new(&base, 0, a / (a + b)),
                        TaskBatch::new(&hints, 1, b / (a + b)),
                    ]
                }
            })
            .collect())
    }

    fn state(&self) -> Value {
        serde_json::json!([self.base.state(), self.extra.state()])
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        let [base, extra]: [u64; 2] = state_from(state)?;
        self.base = Random::from_state(base);
        self.extra = Random::from_state(extra);
        Ok(())
    }
}

/// The weighted sum of the tasks' mean losses.
pub struct Hinting {
    model: Arc<TemperedDecoder>,
}

impl Hinting {
    /// The loss of `model`.
    pub fn new(model: Arc<TemperedDecoder>) -> Self {
        Hinting { model }
    }

    /// Mean loss of one task's batch, tracked.
    pub fn mean(&self, batch: &TaskBatch) -> Result<Tensor> {
        let logits = self
            .model
            .logits(&batch.ids, &batch.lengths, &batch.rows, batch.task)?;
        Ok(nll(&logits, &batch.targets)?.mean_all()?)
    }
}

impl Objective for Hinting {
    type Batch = Vec<TaskBatch>;

    fn weight(&self, _: &Vec<TaskBatch>) -> f64 {
        1.0
    }

    fn tokens(&self, batch: &Vec<TaskBatch>) -> usize {
        batch.iter().flat_map(|task| &task.ids).map(Vec::len).sum()
    }

    fn gradients(&self, batch: &Vec<TaskBatch>, scale: f64) -> Result<(f64, GradStore)> {
        let mut total = 0.0;
        let mut store = GradStore::default();
        for task in batch
            .iter()
            .filter(|t| t.weight != 0.0 && !t.targets.is_empty())
        {
            let loss = (self.mean(task)? * (task.weight * scale))?;
            total += f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            store.extend(loss.backward()?)?;
        }
        Ok((total, store))
    }
}

/// Share of `count` fresh examples of this length that are answered exactly, written greedily by the model alone. Without a
/// hint the task is sorting.
pub fn exact(
    model: &TemperedDecoder,
    sort: &HintedSort,
    hint: Option<Hint>,
    length: usize,
    count: usize,
    seed: u64,
) -> Result<f64> {
    let mut random = Random::new(seed, &format!("lists of {length} to test"));
    let (mut right, mut left) = (0, count);
    while left > 0 {
        let size = left.min(128);
        left -= size;
        let examples: Vec<Example> = (0..size)
            .map(|_| match hint {
                None => sort.sort.sample(length, &mut random),
                Some(hint) => sort.sample(hint, length, &mut random),
            })
            .collect();
        let prompts: Vec<Vec<u32>> = examples.iter().map(|e| e.prompt.clone()).collect();
        let longest = examples.iter().map(|e| e.answer.len()).max().unwrap_or(0);
        let task = usize::from(hint.is_some());
        let written = model.greedy(&prompts, length, longest, task)?;
        right += examples
            .iter()
            .zip(written)
            .filter(|(example, written)| written.starts_with(&example.answer))
            .count();
    }
    Ok(right as f64 / count.max(1) as f64)
}

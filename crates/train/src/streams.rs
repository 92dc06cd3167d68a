//! Learning on streams of tokens with marked targets: a source, accuracy, and loss by position.

use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use crate::objective::{LanguageModeling, Recompute};
use crate::optim::{OptimConfig, Optimizer};
use crate::schedule::Schedule;
use crate::source::{Source, state_from};
use crate::trainer::{LoopConfig, Trainer};
use candle_core::{D, DType, Device};
use longspan_data::random::Random;
use longspan_data::task::stream::StreamTask;
use longspan_nn::model::{LanguageModel, StackConfig, StackLm};
use longspan_nn::params::ParamStore;
use serde_json::Value;
use std::sync::Arc;

/// Examples of a stream task, all of one length; only what can be known is a target.
pub struct StreamSource {
    task: StreamTask,
    length: usize,
    examples: usize,
    random: Random,
}

impl StreamSource {
    /// `purpose` names the stream of random numbers: training and test never share one.
    pub fn new(
        task: StreamTask,
        length: usize,
        examples: usize,
        seed: u64,
        purpose: &str,
    ) -> Result<Self> {
        if length == 0 || examples == 0 {
            return Err(TrainError::option(
                "length, examples",
                format!("{length} and {examples}"),
                "1 or more of each",
            ));
        }
        Ok(StreamSource {
            task,
            length,
            examples,
            random: Random::new(seed, purpose),
        })
    }
}

impl Source for StreamSource {
    type Batch = PackedBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PackedBatch>> {
        let task = self.task.get();
        Ok((0..count)
            .map(|_| {
                let mut batch = PackedBatch::default();
                for _ in 0..self.examples {
                    let row = task.sample(self.length, &mut self.random);
                    batch.push(&row.tokens, |t| if row.known[t] { 1.0 } else { 0.0 });
                }
                batch
            })
            .collect())
    }

    fn state(&self) -> Value {
        self.random.state().into()
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        self.random = Random::from_state(state_from(state)?);
        Ok(())
    }
}

/// How a stack is trained on a stream task.
#[derive(Clone, Debug)]
pub struct StreamTraining {
    /// The task.
    pub task: StreamTask,
    /// Tokens of an example.
    pub length: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Examples of a step.
    pub examples: usize,
    /// Learning rate of AdamW; a cosine to a tenth after 5 % of warm-up.
    pub lr: f64,
    /// Where.
    pub device: Device,
}

impl StreamTraining {
    /// A trained model and its parameters; none when `go_on`, told of every step, says stop.
    pub fn run(
        &self,
        stack: &StackConfig,
        seed: u64,
        go_on: &mut dyn FnMut(f64) -> bool,
    ) -> Result<Option<(Arc<StackLm>, Arc<ParamStore>)>> {
        let params = Arc::new(ParamStore::new(seed, DType::F32, &self.device));
        let model = StackLm::new(stack, self.task.get().vocab_size(), &params.root())?;
        let model = Arc::new(model);
        let objective = LanguageModeling::new(model.clone(), Recompute::None, usize::MAX)?;
        let config = LoopConfig {
            steps: self.steps,
            clip: Some(1.0),
            schedule: Schedule::Cosine {
                warmup: self.steps / 20,
                min_lr_ratio: 0.1,
            },
            ..LoopConfig::default()
        };
        let purpose = "streams to learn";
        let source =
            StreamSource::new(self.task.clone(), self.length, self.examples, seed, purpose)?;
        let optimizer = Optimizer::new(OptimConfig::adamw(self.lr))?;
        let mut trainer = Trainer::new(params.clone(), optimizer, source, objective, config)?;
        while let Some(event) = trainer.step()? {
            if !go_on(event.step as f64 / self.steps.max(1) as f64) {
                return Ok(None);
            }
        }
        Ok(Some((model, params)))
    }
}

/// Share of the marked targets that are the likeliest token.
pub fn accuracy(model: &StackLm, batches: &[PackedBatch]) -> Result<f64> {
    let (mut right, mut count) = (0usize, 0usize);
    for batch in batches {
        batch.check(model.vocab_size())?;
        let hidden = model.hidden(&batch.ids, &batch.lengths)?.detach();
        let best = model.logits(&hidden)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        for ((best, target), weight) in best.iter().zip(&batch.targets).zip(&batch.weights) {
            if *weight > 0.0 {
                count += 1;
                right += usize::from(best == target);
            }
        }
    }
    Ok(right as f64 / count.max(1) as f64)
}

/// Mean loss of marked targets in each stretch of `bucket` positions, nats.
pub fn loss_by_position(
    model: &Arc<StackLm>,
    batches: &[PackedBatch],
    bucket: usize,
) -> Result<Vec<f64>> {
    let objective = LanguageModeling::new(model.clone(), Recompute::None, usize::MAX)?;
    let (mut sums, mut counts) = (Vec::<f64>::new(), Vec::<f64>::new());
    for batch in batches {
        let losses = objective.losses(batch)?;
        let mut start = 0;
        for &length in &batch.lengths {
            for t in 0..length {
                if batch.weights[start + t] > 0.0 {
                    let at = t / bucket.max(1);
                    if sums.len() <= at {
                        sums.resize(at + 1, 0.0);
                        counts.resize(at + 1, 0.0);
                    }
                    sums[at] += f64::from(losses[start + t]);
                    counts[at] += 1.0;
                }
            }
            start += length;
        }
    }
    Ok(sums.iter().zip(&counts).map(|(sum, n)| sum / n).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use longspan_data::task::stream::Rewrite;

    #[test]
    fn losses_are_sorted_by_position_and_sources_resume() {
        let task = StreamTask::Rewrite(Rewrite {
            keys: 4,
            values: 4,
            change: 0.2,
            horizon: None,
        });
        let training = StreamTraining {
            task: task.clone(),
            length: 16,
            steps: 2,
            examples: 2,
            lr: 1e-3,
            device: Device::Cpu,
        };
        let stack =
            serde_json::json!({"d_model": 8, "layers": 1, "mixer": {"kind": "lru", "n": 4}});
        let stack: StackConfig = serde_json::from_value(stack).unwrap();
        let (model, _) = training.run(&stack, 0, &mut |_| true).unwrap().unwrap();
        assert!(training.run(&stack, 0, &mut |_| false).unwrap().is_none());
        let mut source = StreamSource::new(task.clone(), 32, 3, 1, "test").unwrap();
        let state = source.state();
        let batches = source.next(2).unwrap();
        source.load(&state).unwrap();
        assert_eq!(source.next(2).unwrap(), batches);
        let losses = loss_by_position(&model, &batches, 8).unwrap();
        assert_eq!(losses.len(), 4);
        assert!(
            losses.iter().all(|l| l.is_finite() && *l > 0.0),
            "{losses:?}"
        );
        let share = accuracy(&model, &batches).unwrap();
        assert!((0.0..=1.0).contains(&share));
        assert!(StreamSource::new(task, 0, 1, 0, "x").is_err());
    }
}

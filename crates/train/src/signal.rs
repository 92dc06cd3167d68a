//! Learning on real-valued sequences: a source of task examples and the mean squared error.

use crate::error::{Result, TrainError};
use crate::objective::Objective;
use crate::source::{Source, state_from};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use longspan_data::random::Random;
use longspan_data::task::SignalTask;
use longspan_nn::model::SignalModel;
use serde_json::Value;
use std::sync::Arc;

/// Examples of one length.
#[derive(Clone, Debug, PartialEq)]
pub struct SignalBatch {
    /// Number of examples.
    pub examples: usize,
    /// Steps of each.
    pub steps: usize,
    /// [examples, steps, inputs]
    pub inputs: Vec<f32>,
    /// [examples, steps or 1, outputs]
    pub targets: Vec<f32>,
}

/// Examples of a [`SignalTask`].
pub struct SignalSource {
    task: SignalTask,
    examples: usize,
    random: Random,
}

impl SignalSource {
    /// `examples`: size of a micro-batch; `purpose` names the stream: training and test data never share one.
    pub fn new(task: SignalTask, examples: usize, seed: u64, purpose: &str) -> Result<Self> {
        if examples == 0 || task.get().steps() == 0 {
            return Err(TrainError::option(
                "examples, steps",
                format!("{examples} and {}", task.get().steps()),
                "1 or more of each",
            ));
        }
        Ok(SignalSource {
            task,
            examples,
            random: Random::new(seed, purpose),
        })
    }
}

impl Source for SignalSource {
    type Batch = SignalBatch;

    fn next(&mut self, count: usize) -> Result<Vec<SignalBatch>> {
        let task = self.task.get();
        Ok((0..count)
            .map(|_| {
                let mut batch = SignalBatch {
                    examples: self.examples,
                    steps: task.steps(),
                    inputs: Vec::new(),
                    targets: Vec::new(),
                };
                for _ in 0..self.examples {
                    let (inputs, targets) = task.sample(&mut self.random);
                    batch.inputs.extend(inputs);
                    batch.targets.extend(targets);
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

/// Squared error over all targets; the loop divides by their number.
pub struct Regression {
    model: Arc<SignalModel>,
    task: SignalTask,
}

impl Regression {
    /// The error of `model` on `task`.
    pub fn new(model: Arc<SignalModel>, task: SignalTask) -> Self {
        Regression { model, task }
    }

    /// Σ of squared errors, tracked.
    fn sum(&self, batch: &SignalBatch) -> Result<Tensor> {
        let task = self.task.get();
        let device = self.model.device();
        let shape = (batch.examples, batch.steps, task.inputs());
        let x = Tensor::from_slice(&batch.inputs, shape, device)?;
        let y = self.model.forward(&x, task.last_only())?;
        let target = Tensor::from_slice(&batch.targets, y.shape(), device)?;
        Ok((y - target)?.sqr()?.sum_all()?)
    }

    /// Mean squared error over batches, without gradients.
    pub fn mean(&self, batches: &[SignalBatch]) -> Result<f64> {
        let (mut sum, mut count) = (0f64, 0f64);
        for batch in batches {
            sum += f64::from(self.sum(batch)?.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            count += self.weight(batch);
        }
        Ok(sum / count.max(1.0))
    }
}

impl Objective for Regression {
    type Batch = SignalBatch;

    fn weight(&self, batch: &SignalBatch) -> f64 {
        batch.targets.len() as f64
    }

    fn tokens(&self, batch: &SignalBatch) -> usize {
        batch.examples * batch.steps
    }

    fn gradients(&self, batch: &SignalBatch, scale: f64) -> Result<(f64, GradStore)> {
        let loss = (self.sum(batch)? * scale)?;
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        Ok((value, loss.backward()?))
    }
}

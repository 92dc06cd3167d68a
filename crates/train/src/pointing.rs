//! Learning to point (papers 08 and 39): batches of inputs with answers that are positions, the models that may be compared,
//! and their loss, the mean over sequences of -ln p.

use crate::error::{Result, TrainError};
use crate::objective::Objective;
use crate::source::{Source, state_from};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use longspan_data::random::Random;
use longspan_data::task::PointingTask;
use longspan_nn::model::pointer::{Answer, FixedSeq2Seq, Rule, Sets, masked_nll};
use longspan_nn::model::{PtrNet, PtrNetConfig, Set2Seq, Set2SeqConfig};
use longspan_nn::params::Params;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// Examples of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct PointingBatch {
    /// Elements of each example, row-major.
    pub inputs: Vec<Vec<f32>>,
    /// Candidates to be pointed at: with an end it is candidate 0 and elements count from 1; -1 is padding.
    pub targets: Vec<Vec<i64>>,
}

/// Answers (indices from 0) as targets of one length.
pub fn targets(answers: &[Vec<usize>], ends: bool) -> Vec<Vec<i64>> {
    let extra = usize::from(ends);
    let longest = answers.iter().map(|a| a.len() + extra).max().unwrap_or(0);
    answers
        .iter()
        .map(|answer| {
            let mut row: Vec<i64> = answer.iter().map(|&i| (i + extra) as i64).collect();
            if ends {
                row.push(0);
            }
            row.resize(longest, -1);
            row
        })
        .collect()
}

/// Fresh examples of a [`PointingTask`]; every batch has one size, uniform in a range.
pub struct PointingSource {
    task: PointingTask,
    sizes: (usize, usize),
    examples: usize,
    random: Random,
}

impl PointingSource {
    /// `examples`: size of a micro-batch; `purpose` names the stream.
    pub fn new(
        task: PointingTask,
        sizes: (usize, usize),
        examples: usize,
        seed: u64,
        purpose: &str,
    ) -> Result<Self> {
        if sizes.0 == 0 || sizes.0 > sizes.1 || examples == 0 {
            return Err(TrainError::option(
                "sizes, examples",
                format!("{sizes:?} and {examples}"),
                "a range of sizes from 1, small to large, and 1 example or more",
            ));
        }
        Ok(PointingSource {
            task,
            sizes,
            examples,
            random: Random::new(seed, purpose),
        })
    }
}

impl Source for PointingSource {
    type Batch = PointingBatch;

    fn next(&mut self, count: usize) -> Result<Vec<PointingBatch>> {
        let task = self.task.get();
        Ok((0..count)
            .map(|_| {
                let n = self.random.between(self.sizes.0, self.sizes.1);
                let (mut inputs, mut answers) = (Vec::new(), Vec::new());
                for _ in 0..self.examples {
                    let example = task.sample(n, &mut self.random);
                    inputs.push(example.inputs);
                    answers.push(example.answer);
                }
                PointingBatch {
                    inputs,
                    targets: targets(&answers, task.ends()),
                }
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

/// A model of the comparison, as recipes write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PointingConfig {
    /// An LSTM reads, another points.
    PtrNet {
        /// Width.
        hidden: usize,
        /// Weights start uniform in -init..init.
        #[serde(default = "init")]
        init: f64,
        /// Attention between state and pointer.
        #[serde(default)]
        glimpse: bool,
    },
    /// Read, process, write.
    #[serde(rename = "set2seq")]
    Set2Seq {
        /// Width.
        d: usize,
        /// Process steps.
        steps: usize,
        /// Attention between state and pointer.
        #[serde(default)]
        glimpse: bool,
    },
    /// A softmax over the indices of one length, with or without attention that mixes.
    Fixed {
        /// Width.
        hidden: usize,
        /// Weights start uniform in -init..init.
        #[serde(default = "init")]
        init: f64,
        /// Content attention.
        #[serde(default)]
        attention: bool,
        /// The only number of elements it can read.
        n: usize,
    },
}

fn init() -> f64 {
    0.08
}

/// A model that answers with positions.
pub enum PointingModel {
    /// Pointer network.
    PtrNet(PtrNet),
    /// Read, process, write.
    Set2Seq(Set2Seq),
    /// The baselines.
    Fixed(FixedSeq2Seq),
}

impl PointingModel {
    /// For elements of `dim` numbers; `ends`: answers end with an end token.
    pub fn new(
        config: &PointingConfig,
        dim: usize,
        ends: bool,
        params: &Params<'_>,
    ) -> Result<Self> {
        Ok(match *config {
            PointingConfig::PtrNet {
                hidden,
                init,
                glimpse,
            } => {
                let config = PtrNetConfig {
                    hidden,
                    init,
                    glimpse,
                    ends,
                };
                PointingModel::PtrNet(PtrNet::new(&config, dim, params)?)
            }
            PointingConfig::Set2Seq { d, steps, glimpse } => {
                let config = Set2SeqConfig {
                    d,
                    steps,
                    glimpse,
                    ends,
                };
                PointingModel::Set2Seq(Set2Seq::new(&config, dim, params)?)
            }
            PointingConfig::Fixed {
                hidden,
                init,
                attention,
                n,
            } => {
                if !ends {
                    return Err(TrainError::option(
                        "model.kind",
                        "fixed",
                        "a task whose answers end with an end token",
                    ));
                }
                let fixed = FixedSeq2Seq::new(hidden, init, attention, n, dim, params)?;
                PointingModel::Fixed(fixed)
            }
        })
    }

    fn sets(&self, inputs: &[Vec<f32>], dim: usize) -> Result<Sets> {
        let rows: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let like = match self {
            PointingModel::PtrNet(net) => net.like(),
            PointingModel::Set2Seq(net) => net.like(),
            PointingModel::Fixed(net) => net.like(),
        };
        Ok(Sets::new(&rows, dim, like)?)
    }

    /// Σ of -ln p of each example's targets: [batch].
    pub fn nll(&self, batch: &PointingBatch, dim: usize) -> Result<Tensor> {
        let sets = self.sets(&batch.inputs, dim)?;
        Ok(match self {
            PointingModel::PtrNet(net) => net.decoder().nll(&net.read(&sets)?, &batch.targets)?,
            PointingModel::Set2Seq(net) => {
                net.decoder().nll(&net.reading(&sets)?, &batch.targets)?
            }
            PointingModel::Fixed(net) => {
                let steps = batch.targets.first().map_or(0, Vec::len);
                // Padding is read as the start; what follows it has no weight.
                let logits = net.logits(&sets, Some(&batch.targets), steps)?;
                masked_nll(&logits, &batch.targets)?
            }
        })
    }

    /// The model's own answers: nothing but the input is shown to it. The baselines are greedy and know no rule.
    pub fn answer(
        &self,
        inputs: &[Vec<f32>],
        dim: usize,
        rule: Rule,
        width: usize,
        most: usize,
    ) -> Result<Vec<Answer>> {
        let sets = self.sets(inputs, dim)?;
        Ok(match self {
            PointingModel::PtrNet(net) => {
                net.decoder().decode(&net.read(&sets)?, rule, width, most)?
            }
            PointingModel::Set2Seq(net) => {
                net.decoder()
                    .decode(&net.reading(&sets)?, rule, width, most)?
            }
            PointingModel::Fixed(net) => net.greedy(&sets, most)?,
        })
    }
}

/// The mean over sequences of -ln p.
pub struct PointingLoss {
    model: Arc<PointingModel>,
    dim: usize,
}

impl PointingLoss {
    /// The loss of `model` over elements of `dim` numbers.
    pub fn new(model: Arc<PointingModel>, dim: usize) -> Self {
        PointingLoss { model, dim }
    }
}

impl Objective for PointingLoss {
    type Batch = PointingBatch;

    fn weight(&self, batch: &PointingBatch) -> f64 {
        batch.inputs.len() as f64
    }

    fn tokens(&self, batch: &PointingBatch) -> usize {
        let answers = batch.targets.iter().flatten().filter(|&&t| t >= 0).count();
        answers + batch.inputs.iter().map(Vec::len).sum::<usize>() / self.dim.max(1)
    }

    fn gradients(&self, batch: &PointingBatch, scale: f64) -> Result<(f64, GradStore)> {
        let loss = (self.model.nll(batch, self.dim)?.sum_all()? * scale)?;
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        Ok((value, loss.backward()?))
    }
}

//! Orders of an output that is a set (paper 08, Order Matters): fixed, random, or searched by the model while it learns.
//!
//! The objective is max over orders of ln p: after a warm-up on random orders each set is written in an order that the
//! model chooses, and the model is trained on that. Choosing the best from the start locks into whatever came first.

use crate::error::{Result, TrainError};
use crate::objective::Objective;
use crate::source::{Source, state_from};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use longspan_data::random::Random;
use longspan_nn::model::tagged::permutations;
use longspan_nn::model::{Choose, TaggedLm};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// In which order sets are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Always this one: places in the order written.
    Fixed(Vec<usize>),
    /// A uniform one, anew for every example.
    Random,
    /// All orders at once: ln Σ p (at most 5 elements).
    LogSumExp,
    /// Random for a warm-up, then as the model chooses.
    Search {
        /// Steps of uniform random orders.
        #[serde(default = "warmup")]
        warmup: u64,
        /// How the model chooses.
        #[serde(default)]
        mode: Choose,
    },
}

fn warmup() -> u64 {
    1000
}

/// Sets, each a value for every place.
#[derive(Clone, Debug, PartialEq)]
pub struct SetBatch {
    /// [examples][places]
    pub values: Vec<Vec<u32>>,
    /// Steps before this one.
    pub step: u64,
    /// State of the generator that orders are drawn with.
    pub draw: u64,
}

/// A fixed collection of sets, shuffled every epoch.
pub struct SetSource {
    sets: Vec<Vec<u32>>,
    examples: usize,
    seed: u64,
    step: u64,
}

impl SetSource {
    /// `examples`: size of a micro-batch, one per step.
    pub fn new(sets: Vec<Vec<u32>>, examples: usize, seed: u64) -> Result<Self> {
        if sets.is_empty() || examples == 0 {
            return Err(TrainError::option(
                "sets, examples",
                format!("{} and {examples}", sets.len()),
                "1 or more of each",
            ));
        }
        Ok(SetSource {
            sets,
            examples,
            seed,
            step: 0,
        })
    }
}

impl Source for SetSource {
    type Batch = SetBatch;

    fn next(&mut self, count: usize) -> Result<Vec<SetBatch>> {
        let total = self.sets.len() as u64;
        let mut epoch = (u64::MAX, Vec::new());
        Ok((0..count as u64)
            .map(|k| {
                let at = (self.step + k) * self.examples as u64;
                let values = (at..at + self.examples as u64)
                    .map(|place| {
                        if epoch.0 != place / total {
                            let mut order: Vec<usize> = (0..self.sets.len()).collect();
                            let key = format!("order of epoch {}", place / total);
                            Random::new(self.seed, &key).shuffle(&mut order);
                            epoch = (place / total, order);
                        }
                        self.sets[epoch.1[(place % total) as usize]].clone()
                    })
                    .collect();
                let step = self.step + k;
                SetBatch {
                    values,
                    step,
                    draw: Random::new(self.seed, &format!("orders of step {step}")).state(),
                }
            })
            .collect::<Vec<_>>())
        .inspect(|batches: &Vec<SetBatch>| self.step += batches.len() as u64)
    }

    fn state(&self) -> Value {
        self.step.into()
    }

    fn load(&mut self, state: &Value) -> Result<()> {
        self.step = state_from(state)?;
        Ok(())
    }
}

/// -ln p of sets written in an [`Order`], nats per set.
pub struct OrderSearch {
    model: Arc<TaggedLm>,
    order: Order,
}

impl OrderSearch {
    /// The loss of `model`.
    pub fn new(model: Arc<TaggedLm>, order: Order) -> Result<Self> {
        let places = model.config().places;
        match &order {
            Order::Fixed(list) => {
                let mut sorted = list.clone();
                sorted.sort_unstable();
                if sorted != (0..places).collect::<Vec<_>>() {
                    return Err(TrainError::option(
                        "order.fixed",
                        format!("{list:?}"),
                        format!("every place from 0 to {} once", places - 1),
                    ));
                }
            }
            Order::LogSumExp if places > 5 => {
                let expected = "a set of at most 5 elements";
                return Err(TrainError::option(
                    "order",
                    format!("{places} places"),
                    expected,
                ));
            }
            _ => {}
        }
        Ok(OrderSearch { model, order })
    }

    /// Elements of each set in the order they are to be written at this step.
    pub fn written(&self, batch: &SetBatch) -> Result<Vec<Vec<u32>>> {
        let tagged = |values: &Vec<u32>| -> Vec<u32> {
            let places = values.iter().enumerate();
            places.map(|(place, &v)| self.model.id(v, place)).collect()
        };
        let sets: Vec<Vec<u32>> = batch.values.iter().map(tagged).collect();
        let mut random = Random::from_state(batch.draw);
        let mut shuffled = || {
            let mut sets = sets.clone();
            sets.iter_mut().for_each(|set| random.shuffle(set));
            sets
        };
        Ok(match &self.order {
            Order::Fixed(order) => sets
                .iter()
                .map(|set| order.iter().map(|&place| set[place]).collect())
                .collect(),
            Order::Random | Order::LogSumExp => shuffled(),
            Order::Search { warmup, .. } if batch.step < *warmup => shuffled(),
            Order::Search { mode, .. } => self.model.choose(&sets, *mode, &mut random)?,
        })
    }

    /// -ln p of each set: [sets], tracked.
    fn losses(&self, batch: &SetBatch) -> Result<Tensor> {
        let written = self.written(batch)?;
        if self.order == Order::LogSumExp {
            let count = permutations(&written[0]).len();
            let all: Vec<Vec<u32>> = written.iter().flat_map(|set| permutations(set)).collect();
            let log = self.model.log_probability(&all)?;
            let log = log.reshape((written.len(), count))?;
            let top = log.max_keepdim(1)?.detach();
            let sum = log.broadcast_sub(&top)?.exp()?.sum_keepdim(1)?.log()?;
            return Ok((sum + top)?.squeeze(1)?.neg()?);
        }
        Ok(self.model.log_probability(&written)?.neg()?)
    }

    /// Mean loss of sets without gradients, nats per set.
    pub fn mean(&self, sets: &[Vec<u32>], step: u64) -> Result<f64> {
        let mut sum = 0.0;
        for (k, chunk) in sets.chunks(256).enumerate() {
            let batch = SetBatch {
                values: chunk.to_vec(),
                step,
                draw: Random::new(k as u64, "orders to test").state(),
            };
            let losses = self.losses(&batch)?.detach().to_dtype(DType::F64)?;
            sum += losses.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(sum / sets.len().max(1) as f64)
    }
}

impl Objective for OrderSearch {
    type Batch = SetBatch;

    fn weight(&self, batch: &SetBatch) -> f64 {
        batch.values.len() as f64
    }

    fn tokens(&self, batch: &SetBatch) -> usize {
        batch.values.iter().map(Vec::len).sum()
    }

    fn gradients(&self, batch: &SetBatch, scale: f64) -> Result<(f64, GradStore)> {
        let loss = (self.losses(batch)?.sum_all()? * scale)?;
        let value = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        Ok((value, loss.backward()?))
    }
}

//! What is minimised. An objective gives, for one micro-batch, its summed loss and the gradients of all parameters; the
//! loop divides by the weight of the global batch, so that how a batch is cut changes nothing.

use crate::batch::PackedBatch;
use crate::error::{Result, TrainError};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use longspan_kernels::autograd::seeded;
use longspan_kernels::learn::nll;
use longspan_nn::model::LanguageModel;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A loss over batches of one kind.
pub trait Objective: Send + Sync {
    /// What a source yields for it.
    type Batch: Send + Sync;
    /// Σ of the weights of a micro-batch's targets.
    fn weight(&self, batch: &Self::Batch) -> f64;
    /// Tokens (or steps) that are read, without padding: for counts and rates.
    fn tokens(&self, batch: &Self::Batch) -> usize;
    /// The weighted sum of losses times `scale`, and its gradients.
    fn gradients(&self, batch: &Self::Batch, scale: f64) -> Result<(f64, GradStore)>;
    /// What [`gradients`](Self::gradients) noted on this thread for [`after_step`](Self::after_step), taken out.
    fn take_notes(&self) -> Vec<Vec<f64>> {
        Vec::new()
    }
    /// Adds the notes of a micro-batch; called in the order of micro-batches, whichever rank ran them.
    fn add_notes(&self, notes: &[Vec<f64>]) -> Result<()> {
        let _ = notes;
        Ok(())
    }
    /// What changes after an optimiser step other than by gradients.
    fn after_step(&self) -> Result<()> {
        Ok(())
    }
}

/// Which activations are kept for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[derive(Default)]
pub enum Recompute {
    /// All: fastest.
    #[default]
    None,
    /// Only those between groups of this many blocks; a group runs again when its gradient is asked.
    Every(usize),
}

/// Next-token prediction by any language model: cross-entropy over the batch's weighted targets.
pub struct LanguageModeling {
    model: Arc<dyn LanguageModel>,
    recompute: Recompute,
    head_rows: usize,
}

impl LanguageModeling {
    /// `head_rows`: logits exist for this many tokens at a time, never for the whole batch.
    pub fn new(
        model: Arc<dyn LanguageModel>,
        recompute: Recompute,
        head_rows: usize,
    ) -> Result<Self> {
        if recompute == Recompute::Every(0) {
            let found = "every 0 blocks";
            return Err(TrainError::option("train.recompute", found, "1 or more"));
        }
        if head_rows == 0 {
            return Err(TrainError::option("train.head_rows", 0, "1 or more"));
        }
        Ok(LanguageModeling {
            model,
            recompute,
            head_rows,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<dyn LanguageModel> {
        &self.model
    }

    /// Loss of each position (0 where the weight is 0), without gradients: [tokens].
    pub fn losses(&self, batch: &PackedBatch) -> Result<Vec<f32>> {
        batch.check(self.model.vocab_size())?;
        let hidden = self.model.hidden(&batch.ids, &batch.lengths)?.detach();
        let mut out = Vec::with_capacity(batch.tokens());
        for start in (0..batch.tokens()).step_by(self.head_rows) {
            let rows = self.head_rows.min(batch.tokens() - start);
            let logits = self.model.logits(&hidden.narrow(0, start, rows)?)?;
            let losses = nll(&logits, &batch.targets[start..start + rows])?;
            out.extend(losses.to_vec1::<f32>()?);
        }
        for (loss, weight) in out.iter_mut().zip(&batch.weights) {
            if *weight == 0.0 {
                *loss = 0.0;
            }
        }
        Ok(out)
    }

    /// Head and loss, block of rows by block of rows: the summed loss, parameter gradients, and the gradient of
    /// `hidden` [tokens, hidden].
    fn head(
        &self,
        hidden: &Tensor,
        batch: &PackedBatch,
        scale: f64,
    ) -> Result<(f64, GradStore, Tensor)> {
        let mut total = 0f64;
        let mut store = GradStore::default();
        let mut parts = Vec::new();
        for start in (0..batch.tokens()).step_by(self.head_rows) {
            let rows = self.head_rows.min(batch.tokens() - start);
            let weights = &batch.weights[start..start + rows];
            let block = hidden.narrow(0, start, rows)?;
            if weights.iter().all(|&w| w == 0.0) {
                parts.push(block.zeros_like()?);
                continue;
            }
            let leaf = leaf(&block)?;
            let logits = self.model.logits(leaf.as_tensor())?;
            let losses = nll(&logits, &batch.targets[start..start + rows])?;
            let weights = Tensor::from_slice(weights, rows, losses.device())?;
            let loss = ((losses * weights)?.sum_all()? * scale)?;
            total += f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
            let mut gradients = loss.backward()?;
            let gradient = gradients.remove(leaf.as_tensor());
            parts.push(gradient.map_or_else(|| block.zeros_like(), Ok)?);
            store.extend(gradients)?;
        }
        Ok((total, store, Tensor::cat(&parts, 0)?))
    }
}

impl Objective for LanguageModeling {
    type Batch = PackedBatch;

    fn take_notes(&self) -> Vec<Vec<f64>> {
        self.model.take_notes()
    }

    fn add_notes(&self, notes: &[Vec<f64>]) -> Result<()> {
        Ok(self.model.add_notes(notes)?)
    }

    fn after_step(&self) -> Result<()> {
        Ok(self.model.after_step()?)
    }

    fn weight(&self, batch: &PackedBatch) -> f64 {
        batch.total_weight()
    }

    fn tokens(&self, batch: &PackedBatch) -> usize {
        batch.tokens()
    }

    fn gradients(&self, batch: &PackedBatch, scale: f64) -> Result<(f64, GradStore)> {
        batch.check(self.model.vocab_size())?;
        let model = &*self.model;
        let embedded = model.embed(&batch.ids, &batch.lengths)?;
        let blocks = model.num_blocks();
        let every = match self.recompute {
            Recompute::None => {
                let mut x = embedded;
                for index in 0..blocks {
                    x = model.block(index, &x, &batch.lengths)?;
                }
                let (loss, mut store, gradient) = self.head(&x.detach(), batch, scale)?;
                store.extend(pull_back(&x, &gradient)?)?;
                return Ok((loss, store));
            }
            Recompute::Every(every) => every,
        };
        let segment = |start: usize, x: &Tensor| -> Result<Tensor> {
            let mut x = x.clone();
            for index in start..(start + every).min(blocks) {
                x = model.block(index, &x, &batch.lengths)?;
            }
            Ok(x)
        };
        // Forward: only what lies between segments is kept; each segment's graph goes with its end.
        let mut borders = vec![embedded.detach()];
        for start in (0..blocks).step_by(every) {
            let next = segment(start, &borders[borders.len() - 1])?.detach();
            borders.push(next);
        }
        let hidden = borders.pop().expect("there is the embedding");
        let (loss, mut store, mut gradient) = self.head(&hidden, batch, scale)?;
        // Backward: each segment again, from the last, with a graph.
        for start in (0..blocks).step_by(every).rev() {
            let input = borders.pop().expect("a border per segment");
            let leaf = leaf(&input)?;
            let mut gradients = pull_back(&segment(start, leaf.as_tensor())?, &gradient)?;
            gradient = gradients
                .remove(leaf.as_tensor())
                .map_or_else(|| input.zeros_like(), Ok)?;
            store.extend(gradients)?;
        }
        store.extend(pull_back(&embedded, &gradient)?)?;
        Ok((loss, store))
    }
}

/// A copy of the values that gradients stop at.
fn leaf(x: &Tensor) -> candle_core::Result<Var> {
    Var::from_tensor(&x.detach().contiguous()?)
}

/// Gradients of all that `x` depends on, given that of `x`.
fn pull_back(x: &Tensor, gradient: &Tensor) -> candle_core::Result<GradStore> {
    if !x.track_op() {
        return Ok(GradStore::default());
    }
    seeded(x, gradient)?.backward()
}

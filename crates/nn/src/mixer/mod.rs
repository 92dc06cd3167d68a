//! How the tokens of one layer exchange information: one trait for attention, state-space layers and recurrent nets.
//!
//! A mixer has a parallel form (whole sequences, differentiable), a step form (one token, a state that is changed in place)
//! and a state that can be carried, split by batch rows and stored. Norms, residuals and MLPs belong to the block around it.

mod attention;
mod dss;
mod ema;
mod gss;
mod h3;
pub mod hippo;
mod hyena;
pub mod liquid;
pub mod longvq;
mod lru;
pub mod lssl;
mod mamba1;
mod mamba2;
mod modes;
mod retention;
mod rnn;
mod s4;
mod s5;

pub use attention::{AttentionConfig, AttentionMixer, Position, t5_bucket};
pub use dss::{Dss, DssConfig, DssVersion, dss_kernel, dss_start};
pub use ema::{Ema, EmaConfig};
pub use gss::{Gss, GssConfig};
pub use h3::{H3, H3Config};
pub use hyena::{Hyena, HyenaConfig};
pub use liquid::{LiquidConfig, LiquidS4};
pub use longvq::{LongVq, LongVqConfig};
pub use lru::{Lru, LruConfig, lru_start};
pub use lssl::{Lssl, LsslConfig};
pub use mamba1::{Mamba, MambaConfig};
pub use mamba2::{Mamba2, Mamba2Config, StatePolicy};
pub use retention::{Retention, RetentionConfig, retain};
pub use rnn::{Rnn, RnnCell, RnnConfig};
pub use s4::{DtTransform, S4, S4Config, S4Init, S4Mode};
pub use s5::{S5, S5Config};

use crate::params::Params;
use candle_core::{Result, Tensor, bail};
use longspan_kernels::composed::{self, composes};
use longspan_kernels::{learn, linear};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How a mixer's state grows with the tokens read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// There is no step form: the mixer looks both ways.
    None,
    /// The same size always.
    Fixed,
    /// A share per token.
    Growing,
}

/// What a mixer can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixerSpec {
    /// Name in the registry.
    pub name: &'static str,
    /// Later tokens do not change earlier outputs.
    pub causal: bool,
    /// Growth of the state.
    pub state: StateKind,
    /// Why gradients do not flow into a carried state; none = they do.
    pub state_gradient: Option<&'static str>,
}

/// State of a layer for a batch of sequences: named tensors, batch first, and the tokens read.
#[derive(Clone, Default)]
pub struct MixerState {
    /// By name; the first axis is the batch.
    pub tensors: BTreeMap<String, Tensor>,
    /// Tokens read so far.
    pub position: usize,
    /// What a mixer computed from its weights for stepping; a state is valid for the weights it was made with.
    plan: Option<Arc<dyn Any + Send + Sync>>,
}

impl MixerState {
    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor),
            None => bail!("mixer state has no {name}: it is another kind of mixer's"),
        }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.tensors.values().map(size).sum()
    }

    /// The states of these sequences, in this order (beams, finished requests).
    pub fn select(&self, rows: &[u32]) -> Result<MixerState> {
        self.map(|t| {
            t.contiguous()?
                .index_select(&Tensor::new(rows, t.device())?, 0)
        })
    }

    /// The states of several batches as those of one, in this order. All must have read equally much where their size
    /// grows with it.
    pub fn concat(states: &[&MixerState]) -> Result<MixerState> {
        let Some(first) = states.first() else {
            bail!("mixer state: there are none to put together")
        };
        let tensors = first.tensors.keys().map(|name| {
            let parts = states
                .iter()
                .map(|state| state.get(name)?.contiguous())
                .collect::<Result<Vec<_>>>()?;
            Ok((name.clone(), Tensor::cat(&parts, 0)?))
        });
        Ok(MixerState {
            tensors: tensors.collect::<Result<_>>()?,
            position: first.position,
            plan: first.plan.clone(),
        })
    }

    /// The same values; gradients stop here (truncated back-propagation through time).
    pub fn detach(&self) -> MixerState {
        MixerState {
            tensors: self
                .tensors
                .iter()
                .map(|(name, t)| (name.clone(), t.detach()))
                .collect(),
            position: self.position,
            plan: self.plan.clone(),
        }
    }

    /// Zeros of these shapes, before the first token, of the type and on the device of `like`.
    pub(crate) fn zeros<'a>(
        shapes: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        like: &Tensor,
    ) -> Result<MixerState> {
        let tensors = shapes.into_iter().map(|(name, shape)| {
            let zeros = Tensor::zeros(shape, like.dtype(), like.device())?;
            Ok((name.to_string(), zeros))
        });
        Ok(MixerState {
            tensors: tensors.collect::<Result<_>>()?,
            position: 0,
            plan: None,
        })
    }

    /// The state after so many more tokens, with these tensors.
    pub(crate) fn moved<'a>(
        &self,
        tokens: usize,
        tensors: impl IntoIterator<Item = (&'a str, Tensor)>,
    ) -> MixerState {
        let tensors = tensors.into_iter();
        MixerState {
            tensors: tensors.map(|(name, t)| (name.to_string(), t)).collect(),
            position: self.position + tokens,
            plan: self.plan.clone(),
        }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<MixerState> {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, t)| Ok((name.clone(), f(t)?)));
        Ok(MixerState {
            tensors: tensors.collect::<Result<_>>()?,
            position: self.position,
            plan: self.plan.clone(),
        })
    }
}

/// One layer's mixing.
pub trait SequenceMixer: Send + Sync {
    /// What it can do.
    fn spec(&self) -> MixerSpec;

    /// Parallel form: x [batch, length, width] to the same, from a carried state (none = the start). The state after the
    /// last token comes back when one was given; one from [`init_state`](Self::init_state) begins a sequence.
    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)>;

    /// The state before the first token.
    ///
    /// # Errors
    /// For mixers that look both ways.
    fn init_state(&self, batch: usize) -> Result<MixerState>;

    /// Why gradients are not those of finite differences (something is rounded, and its gradient passed on); none = they are.
    fn estimated_gradient(&self) -> Option<&'static str> {
        None
    }

    /// What this thread's tracked forward passes noted for [`after_step`](Self::after_step), taken out: a trainer asks after
    /// each micro-batch, on the thread that ran it.
    fn take_notes(&self) -> Vec<f64> {
        Vec::new()
    }

    /// Adds the notes of a micro-batch, wherever it ran; in the order of micro-batches, so that ranks change nothing.
    fn add_notes(&self, notes: &[f64]) -> Result<()> {
        let _ = notes;
        Ok(())
    }

    /// What changes after an optimiser step other than by gradients (a codebook's running means).
    fn after_step(&self) -> Result<()> {
        Ok(())
    }

    /// Step form: x [batch, width] to the same; `state` moves on by one token. No gradients.
    fn step(&self, x: &Tensor, state: &mut MixerState) -> Result<Tensor> {
        let (y, next) = self.forward(&x.detach().unsqueeze(1)?, Some(state))?;
        match next {
            Some(next) => *state = next.detach(),
            None => bail!("{} gave no state", self.spec().name),
        }
        y.detach().squeeze(1)
    }
}

/// Documents that lie flat, each on its own: x [tokens, width] to the same.
///
/// Documents are set out as rows of one batch, padded at their ends: what is causal does not see it. Mixers that look both
/// ways read one document at a time.
pub fn packed(mixer: &dyn SequenceMixer, x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    if lengths.iter().sum::<usize>() != tokens {
        bail!(
            "document lengths sum to {}, expected {tokens} tokens",
            lengths.iter().sum::<usize>()
        );
    }
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let batch = lengths.len();
    if batch * longest == tokens {
        let rows = x.reshape((batch, longest, width))?;
        return mixer
            .forward(&rows, None)?
            .0
            .contiguous()?
            .reshape((tokens, width));
    }
    if !mixer.spec().causal {
        // What looks both ways would read padding after a document's end.
        let (mut parts, mut start) = (Vec::new(), 0);
        for &length in lengths.iter().filter(|&&length| length > 0) {
            let document = x.narrow(0, start, length)?.unsqueeze(0)?;
            parts.push(mixer.forward(&document, None)?.0.squeeze(0)?);
            start += length;
        }
        return Tensor::cat(&parts, 0);
    }
    // Row `tokens` is the padding.
    let (mut set, mut back, mut start) = (Vec::new(), Vec::new(), 0);
    for (row, &length) in lengths.iter().enumerate() {
        for t in 0..longest {
            set.push(if t < length { start + t } else { tokens } as u32);
            if t < length {
                back.push((row * longest + t) as u32);
            }
        }
        start += length;
    }
    let zero = Tensor::zeros((1, width), x.dtype(), x.device())?;
    let rows = composed::rows(&Tensor::cat(&[x, &zero], 0)?, &set)?;
    let rows = rows.reshape((batch, longest, width))?;
    let y = mixer.forward(&rows, None)?.0.contiguous()?;
    composed::rows(&y.reshape((batch * longest, width))?, &back)
}

/// Sequences with padding anywhere: `keep` [batch][length] says which tokens are real. Padded tokens contribute nothing and
/// their outputs are 0: x [batch, length, width] to the same.
pub fn masked(mixer: &dyn SequenceMixer, x: &Tensor, keep: &[Vec<bool>]) -> Result<Tensor> {
    let (batch, length, width) = x.dims3()?;
    if keep.len() != batch || keep.iter().any(|row| row.len() != length) {
        bail!(
            "mask: found {} rows, expected [{batch}, {length}]",
            keep.len()
        );
    }
    let (mut real, mut lengths) = (Vec::new(), Vec::new());
    // Padded tokens read a row of zeros that stands behind the real ones.
    let mut back = vec![u32::MAX; batch * length];
    for (row, keep) in keep.iter().enumerate() {
        let before = real.len();
        for (t, _) in keep.iter().enumerate().filter(|(_, keep)| **keep) {
            back[row * length + t] = real.len() as u32;
            real.push((row * length + t) as u32);
        }
        lengths.push(real.len() - before);
    }
    lengths.retain(|&length| length > 0);
    if real.is_empty() {
        return x.zeros_like();
    }
    let zeros = real.len() as u32;
    back.iter_mut().for_each(|i| *i = (*i).min(zeros));
    let flat = x.reshape((batch * length, width))?;
    let flat = flat.index_select(&Tensor::new(real, x.device())?, 0)?;
    let y = packed(mixer, &flat, &lengths)?;
    let zero = Tensor::zeros((1, width), x.dtype(), x.device())?;
    Tensor::cat(&[y, zero], 0)?
        .index_select(&Tensor::new(back, x.device())?, 0)?
        .reshape((batch, length, width))
}

/// A mixer by name with its hyper-parameters, as configuration files write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum MixerConfig {
    /// Causal softmax attention with a position scheme.
    Attention(AttentionConfig),
    /// S4 and S4D.
    S4(S4Config),
    /// Mamba-2.
    Mamba2(Mamba2Config),
    /// Elman, LSTM, GRU.
    Rnn(RnnConfig),
    /// LSSL.
    Lssl(LsslConfig),
    /// DSS.
    Dss(DssConfig),
    /// S5.
    S5(S5Config),
    /// Liquid-S4.
    #[serde(rename = "liquid-s4")]
    LiquidS4(LiquidConfig),
    /// Gated state spaces.
    Gss(GssConfig),
    /// H3.
    H3(H3Config),
    /// Hyena.
    Hyena(HyenaConfig),
    /// Linear recurrent unit.
    Lru(LruConfig),
    /// Mega's moving averages.
    Ema(EmaConfig),
    /// Retention.
    Retention(RetentionConfig),
    /// Mamba.
    Mamba(MambaConfig),
    /// Attention over quantised keys.
    #[serde(rename = "longvq")]
    LongVq(LongVqConfig),
}

impl MixerConfig {
    /// Whether every operation of the mixer's parallel form is also composed of tensor operations, so that it runs on a GPU.
    pub fn composes(&self) -> bool {
        match self {
            MixerConfig::Attention(_)
            | MixerConfig::Hyena(_)
            | MixerConfig::Ema(_)
            | MixerConfig::H3(_)
            | MixerConfig::Mamba(_) => true,
            MixerConfig::S4(config) => config.mode == S4Mode::Diag && !config.bilinear,
            MixerConfig::Mamba2(config) => matches!(
                config.state_policy,
                StatePolicy::None | StatePolicy::Scale { .. }
            ),
            _ => false,
        }
    }

    /// The mixer, with parameters from `params`; `shared` is the name space of what all layers share.
    pub fn build(
        &self,
        d_model: usize,
        params: &Params<'_>,
        shared: &Params<'_>,
    ) -> Result<Box<dyn SequenceMixer>> {
        if !params.device().is_cpu() && !self.composes() {
            let name = serde_json::to_value(self).unwrap_or_default();
            bail!(
                "mixer {}: found {:?}, expected the CPU: with these parameters it has no form of tensor operations",
                name["kind"].as_str().unwrap_or("?"),
                params.device().location()
            );
        }
        Ok(match self {
            MixerConfig::Attention(config) => {
                Box::new(AttentionMixer::new(config, d_model, params, shared)?)
            }
            MixerConfig::S4(config) => Box::new(S4::new(config, d_model, params)?),
            MixerConfig::Mamba2(config) => Box::new(Mamba2::new(config, d_model, params)?),
            MixerConfig::Rnn(config) => Box::new(Rnn::new(config, d_model, params)?),
            MixerConfig::Lssl(config) => Box::new(Lssl::new(config, d_model, params)?),
            MixerConfig::Dss(config) => Box::new(Dss::new(config, d_model, params)?),
            MixerConfig::S5(config) => Box::new(S5::new(config, d_model, params)?),
            MixerConfig::LiquidS4(config) => Box::new(LiquidS4::new(config, d_model, params)?),
            MixerConfig::Gss(config) => Box::new(Gss::new(config, d_model, params)?),
            MixerConfig::H3(config) => Box::new(H3::new(config, d_model, params)?),
            MixerConfig::Hyena(config) => Box::new(Hyena::new(config, d_model, params)?),
            MixerConfig::Lru(config) => Box::new(Lru::new(config, d_model, params)?),
            MixerConfig::Ema(config) => Box::new(Ema::new(config, d_model, params)?),
            MixerConfig::Retention(config) => Box::new(Retention::new(config, d_model, params)?),
            MixerConfig::Mamba(config) => Box::new(Mamba::new(config, d_model, params)?),
            MixerConfig::LongVq(config) => Box::new(LongVq::new(config, d_model, params)?),
        })
    }
}

/// Softmax over the last axis; -inf gets 0.
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    learn::softmax(x)
}

/// x [.., in] times weight [out, in] transposed, plus bias [out].
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let same = |t: &Tensor| t.dtype() == x.dtype();
    // The fused form packs the weight at every call, which few rows do not pay for.
    let rows = x.elem_count() / weight.dim(1)?.max(1);
    let worth = rows >= 16 || composes(x);
    if worth && same(weight) && bias.is_none_or(same) {
        return linear::linear(x, weight, bias);
    }
    linear::linear_naive(x, weight, bias)
}

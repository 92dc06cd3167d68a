//! Retention: linear attention whose past fades at a fixed rate per head (paper 29).
//!
//! Retentive Network (arXiv 2307.08621), without its rotation. The scan is Mamba-2's with a constant step.

use super::modes::{Affine, layer_norm};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::Params;
use candle_core::{Result, Tensor, bail};
use longspan_kernels::ssd::Scan;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Retention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Heads.
    pub heads: usize,
    /// Tokens per matrix product of the scan: speed only.
    pub chunk_size: usize,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        RetentionConfig {
            heads: 4,
            chunk_size: 64,
        }
    }
}

/// The layer.
pub struct Retention {
    heads: usize,
    head_dim: usize,
    chunk: usize,
    q: Affine,
    k: Affine,
    v: Affine,
    gate: Affine,
    out: Affine,
    gamma: Tensor,
}

/// S = γ S + k vᵀ, y = qᵀ S: q, k [batch, length, heads, d_k], v [batch, length, heads, d_v], gamma [heads], state [batch,
/// heads, d_v, d_k] to y as v and the last state.
pub fn retain(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gamma: &Tensor,
    state: Option<&Tensor>,
    chunk: usize,
) -> Result<(Tensor, Tensor)> {
    let (batch, length, heads, _) = v.dims4()?;
    let scan = Scan {
        x: v,
        dt: &Tensor::ones((batch, length, heads), v.dtype(), v.device())?,
        a: &gamma.log()?,
        b: k,
        c: q,
        state,
    };
    scan.chunked(chunk)
}

impl Retention {
    /// Parameters in `params`.
    pub fn new(config: &RetentionConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let heads = config.heads;
        if heads == 0 || !d_model.is_multiple_of(heads) || config.chunk_size == 0 {
            bail!(
                "retention: found {heads} heads and chunk_size {}, expected a divisor of d_model, {d_model}, and 1 or more",
                config.chunk_size
            );
        }
        let linear = |name: &str| Affine::with(params, name, d_model, d_model, false);
        // γ = 1 - 2^(-5 - head)
        let gamma: Vec<f64> = (0..heads).map(|h| 1.0 - 2f64.powi(-5 - h as i32)).collect();
        Ok(Retention {
            heads,
            head_dim: d_model / heads,
            chunk: config.chunk_size,
            q: linear("q_proj")?,
            k: linear("k_proj")?,
            v: linear("v_proj")?,
            gate: linear("g_proj")?,
            out: linear("out_proj")?,
            gamma: Tensor::from_vec(gamma, heads, params.device())?.to_dtype(params.dtype())?,
        })
    }
}

impl SequenceMixer for Retention {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "retention",
            causal: true,
            state: StateKind::Fixed,
            state_gradient: None,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, d_model) = x.dims3()?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let split = |x: Tensor| x.reshape((batch, length, self.heads, self.head_dim));
        let q = (split(self.q.apply(x)?)? * (self.head_dim as f64).powf(-0.5))?;
        let (k, v) = (split(self.k.apply(x)?)?, split(self.v.apply(x)?)?);
        let start = state.map(|state| state.get("state")).transpose()?;
        let (y, last) = retain(&q, &k, &v, &self.gamma, start, self.chunk)?;
        let y = layer_norm(&y, 1e-5)?.reshape((batch, length, d_model))?;
        let y = self.out.apply(&(y * self.gate.apply(x)?.silu()?)?)?;
        Ok((y, state.map(|s| s.moved(length, [("state", last)]))))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let shape = [batch, self.heads, self.head_dim, self.head_dim];
        MixerState::zeros([("state", &shape[..])], &self.gamma)
    }
}

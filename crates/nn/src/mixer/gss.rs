//! GSS: a diagonal state-space layer at a quarter of the width, gated at four times the width (paper 29).
//!
//! Gated State Spaces (arXiv 2206.13947). The norm before and the residual around it belong to the block; the norm on the
//! state-space branch, without weights, belongs here.

use super::modes::{Affine, Modes, layer_norm, normal, pair};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Gss`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GssConfig {
    /// Width F of the gate; none = 4 d_model.
    pub gate_width: Option<usize>,
    /// Channels H of the state-space layer; none = d_model / 4.
    pub ssm_width: Option<usize>,
    /// Modes N of every channel.
    pub n: usize,
}

impl Default for GssConfig {
    fn default() -> Self {
        GssConfig {
            gate_width: None,
            ssm_width: None,
            n: 64,
        }
    }
}

/// The layer.
pub struct Gss {
    width: usize,
    v: Affine,
    u: Affine,
    y: Affine,
    o: Affine,
    log_neg_re: Tensor,
    log_im: Tensor,
    c: Tensor,
    d: Tensor,
}

impl Gss {
    /// Parameters in `params`.
    pub fn new(config: &GssConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let gate = config.gate_width.unwrap_or(4 * d_model);
        let width = config.ssm_width.unwrap_or((d_model / 4).max(1));
        let n = config.n;
        if n == 0 || gate == 0 || width == 0 {
            bail!("gss: found n {n}, gate_width {gate}, ssm_width {width}, expected 1 or more");
        }
        let slow = ParamGroup::STATE_SPACE;
        // The step is 1: Λ itself carries the time scale. Real parts log-uniform as dt/2 elsewhere, frequencies spread
        // up to half a turn.
        let mut random = params.random("log_neg_re");
        let re = (0..n)
            .map(|_| random.range(5e-4f64.ln(), 5e-2f64.ln()))
            .collect();
        let im = (0..n)
            .map(|k| (std::f64::consts::PI * (k as f64 + 0.5) / n as f64).ln())
            .collect();
        Ok(Gss {
            width,
            v: Affine::new(params, "v_proj", d_model, gate)?,
            u: Affine::new(params, "u_proj", d_model, width)?,
            y: Affine::new(params, "y_proj", width, gate)?,
            o: Affine::new(params, "o_proj", gate, d_model)?,
            log_neg_re: params.get_in("log_neg_re", &[n], Init::Values(re), slow)?,
            log_im: params.get_in("log_im", &[n], Init::Values(im), slow)?,
            c: params.get_in("C", &[width, n, 2], normal((n as f64).powf(-0.5)), slow)?,
            d: params.get("D", &[width], normal(1.0))?,
        })
    }

    fn modes(&self) -> Result<Modes> {
        let lambda = pair(&self.log_neg_re.exp()?.neg()?, &self.log_im.exp()?)?.unsqueeze(0)?;
        Modes::zoh(&lambda, &lambda, None, &self.c)
    }

    /// The kernels [channels, length].
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        self.modes()?.kernel(length)
    }
}

impl SequenceMixer for Gss {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "gss",
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
        let length = x.dim(1)?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let gate = self.v.apply(x)?.gelu_erf()?;
        let s = layer_norm(&self.u.apply(x)?.gelu_erf()?, 1e-5)?;
        let modes = self.modes()?;
        let (y, next) = match state {
            None => (modes.convolve(&s)?, None),
            Some(state) => {
                let (y, last) = modes.carry(&s, state.get("state")?)?;
                (y, Some(state.moved(length, [("state", last)])))
            }
        };
        let y = (y + s.broadcast_mul(&self.d)?)?;
        Ok((self.o.apply(&(self.y.apply(&y)? * gate)?)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let shape = [batch, self.width, self.c.dim(1)?, 2];
        MixerState::zeros([("state", &shape[..])], &self.c)
    }
}

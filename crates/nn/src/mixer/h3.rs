//! H3: a shift register on keys, a product with values, a diagonal system, a product with queries (paper 29).
//!
//! Hungry Hungry Hippos (arXiv 2212.14052), head dimension 1. The shift system's B is the first unit vector, so it is a short
//! convolution with the taps C; its step form is the shift register.

use super::modes::{Affine, Modes, log_steps, normal, pair, short_conv};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`H3`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct H3Config {
    /// Taps of the shift system.
    pub n_shift: usize,
    /// State size of every channel's diagonal system; even.
    pub d_state: usize,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
}

impl Default for H3Config {
    fn default() -> Self {
        H3Config {
            n_shift: 64,
            d_state: 64,
            dt_min: 1e-3,
            dt_max: 1e-1,
        }
    }
}

/// The layer.
pub struct H3 {
    channels: usize,
    taps: usize,
    q: Affine,
    k: Affine,
    v: Affine,
    out: Affine,
    shift_c: Tensor,
    shift_d: Tensor,
    log_dt: Tensor,
    a_real: Tensor,
    a_imag: Tensor,
    c: Tensor,
    d: Tensor,
}

impl H3 {
    /// Parameters in `params`, S4D-Lin at the start.
    pub fn new(config: &H3Config, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        if c.n_shift == 0 || c.d_state < 2 || !c.d_state.is_multiple_of(2) {
            bail!(
                "h3: found n_shift {} and d_state {}, expected 1 or more taps and an even number",
                c.n_shift,
                c.d_state
            );
        }
        if c.dt_min.is_nan() || c.dt_min <= 0.0 || c.dt_max < c.dt_min {
            bail!(
                "h3: found dt {}..{}, expected 0 < dt_min <= dt_max",
                c.dt_min,
                c.dt_max
            );
        }
        let n = c.d_state / 2;
        let (slow, shift, ssm) = (
            ParamGroup::STATE_SPACE,
            params.at("shift"),
            params.at("ssm"),
        );
        let steps = log_steps(params, "log_dt", d_model, c.dt_min, c.dt_max);
        let frequencies = (0..n).map(|k| std::f64::consts::PI * k as f64).collect();
        let linear = |name: &str| Affine::new(params, name, d_model, d_model);
        Ok(H3 {
            channels: d_model,
            taps: c.n_shift,
            q: linear("q_proj")?,
            k: linear("k_proj")?,
            v: linear("v_proj")?,
            out: linear("out_proj")?,
            shift_c: shift.get(
                "C",
                &[d_model, c.n_shift],
                normal((c.n_shift as f64).powf(-0.5)),
            )?,
            shift_d: shift.get("D", &[d_model], normal(1.0))?,
            log_dt: ssm.get_in("log_dt", &[d_model], Init::Values(steps), slow)?,
            a_real: ssm.get_in("A_real", &[n], Init::Constant(0.5f64.ln()), slow)?,
            a_imag: ssm.get_in("A_imag", &[n], Init::Values(frequencies), slow)?,
            c: ssm.get("C", &[d_model, n, 2], normal(0.5f64.sqrt()))?,
            d: ssm.get("D", &[d_model], normal(1.0))?,
        })
    }

    fn modes(&self) -> Result<Modes> {
        let lambda = pair(&self.a_real.exp()?.neg()?, &self.a_imag)?.unsqueeze(0)?;
        let dt = self.log_dt.exp()?.unsqueeze(1)?.unsqueeze(2)?;
        let scaled = lambda.broadcast_mul(&dt)?;
        Modes::zoh(&scaled, &lambda, None, &(&self.c * 2.0)?)
    }

    /// The diagonal system's kernels [channels, length].
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        self.modes()?.kernel(length)
    }
}

impl SequenceMixer for H3 {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "h3",
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
        let (batch, length, channels) = x.dims3()?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let (q, k, v) = (self.q.apply(x)?, self.k.apply(x)?, self.v.apply(x)?);
        let before = match state {
            Some(state) => state.get("shift")?.clone(),
            None => Tensor::zeros((batch, self.taps - 1, channels), x.dtype(), x.device())?,
        };
        let padded = Tensor::cat(&[&before, &k], 1)?;
        // Tap n of C belongs to the key n steps back.
        let reversed: Vec<u32> = (0..self.taps as u32).rev().collect();
        let taps = self
            .shift_c
            .index_select(&Tensor::new(reversed, x.device())?, 1)?;
        let shifted = (short_conv(&padded, &taps)? + k.broadcast_mul(&self.shift_d)?)?;
        let kv = (shifted * v)?;
        let modes = self.modes()?;
        let (y, next) = match state {
            None => (modes.convolve(&kv)?, None),
            Some(state) => {
                let (y, last) = modes.carry(&kv, state.get("state")?)?;
                let shift = padded.narrow(1, length, self.taps - 1)?;
                let next = state.moved(length, [("state", last), ("shift", shift)]);
                (y, Some(next))
            }
        };
        let y = (y + kv.broadcast_mul(&self.d)?)?;
        Ok((self.out.apply(&(q * y)?)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        MixerState::zeros(
            [
                ("state", &[batch, self.channels, self.c.dim(1)?, 2][..]),
                ("shift", &[batch, self.taps - 1, self.channels][..]),
            ],
            &self.c,
        )
    }
}

//! S5: one system with many inputs and outputs, run by an associative scan (paper 29).
//!
//! Simplified State Space Layers (arXiv 2208.04933): HiPPO-N blocks at the start, zero-order hold, then GELU and a gate.

use super::modes::{Affine, divide, exp, expm1, log_steps, multiply, pair, sigmoid};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind, hippo, linear};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::modal::associative_scan;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`S5`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S5Config {
    /// States P, one of each conjugate pair.
    pub p: usize,
    /// Blocks J of the initial matrix; they divide P.
    pub blocks: usize,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
    /// GELU and a gate after the system.
    pub gate: bool,
}

impl Default for S5Config {
    fn default() -> Self {
        S5Config {
            p: 32,
            blocks: 1,
            dt_min: 1e-3,
            dt_max: 1e-1,
            gate: true,
        }
    }
}

/// The layer.
pub struct S5 {
    p: usize,
    lambda: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    log_step: Tensor,
    gate: Option<Affine>,
}

impl S5 {
    /// Parameters in `params`.
    pub fn new(config: &S5Config, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        if c.p == 0 || c.blocks == 0 || !c.p.is_multiple_of(c.blocks) {
            bail!(
                "s5: found {} states in {} blocks, expected 1 or more of each, and a divisor",
                c.p,
                c.blocks
            );
        }
        if c.dt_min.is_nan() || c.dt_min <= 0.0 || c.dt_max < c.dt_min {
            bail!(
                "s5: found dt {}..{}, expected 0 < dt_min <= dt_max",
                c.dt_min,
                c.dt_max
            );
        }
        let slow = ParamGroup::STATE_SPACE;
        let half = c.p / c.blocks;
        let block = hippo::nplr_legs(2 * half, 1);
        let lambda: Vec<f64> = (0..c.p)
            .flat_map(|k| {
                let l = block.lambda[k % half];
                [l.re, l.im]
            })
            .collect();
        // B~ = V^-1 B and C~ = C V with random B and C of variance 1 / width.
        let eigen = |row: usize, k: usize| block.v[row][k % half];
        let mut random = params.random("B");
        let std = (d_model as f64).powf(-0.5);
        let mut b = vec![0f64; c.p * d_model * 2];
        for j in 0..c.blocks {
            for column in 0..d_model {
                let drawn: Vec<f64> = (0..2 * half).map(|_| std * random.normal()).collect();
                for k in 0..half {
                    let mut sum = rustfft::num_complex::Complex64::ZERO;
                    for (row, value) in drawn.iter().enumerate() {
                        sum += eigen(row, k).conj() * value;
                    }
                    let at = ((j * half + k) * d_model + column) * 2;
                    (b[at], b[at + 1]) = (sum.re, sum.im);
                }
            }
        }
        let mut random = params.random("C");
        let std = (c.p as f64).powf(-0.5);
        let mut read = vec![0f64; d_model * c.p * 2];
        for row in 0..d_model {
            for j in 0..c.blocks {
                let drawn: Vec<f64> = (0..2 * half).map(|_| std * random.normal()).collect();
                for k in 0..half {
                    let mut sum = rustfft::num_complex::Complex64::ZERO;
                    for (at, value) in drawn.iter().enumerate() {
                        sum += eigen(at, k) * value;
                    }
                    let at = (row * c.p + j * half + k) * 2;
                    (read[at], read[at + 1]) = (sum.re, sum.im);
                }
            }
        }
        let steps = log_steps(params, "log_step", c.p, c.dt_min, c.dt_max);
        Ok(S5 {
            p: c.p,
            lambda: params.get_in("Lambda", &[c.p, 2], Init::Values(lambda), slow)?,
            b: params.get_in("B", &[c.p, d_model, 2], Init::Values(b), slow)?,
            c: params.get("C", &[d_model, c.p, 2], Init::Values(read))?,
            d: params.get("D", &[d_model], Init::Normal { std: 1.0 })?,
            log_step: params.get_in("log_step", &[c.p], Init::Values(steps), slow)?,
            gate: c
                .gate
                .then(|| Affine::new(params, "gate", d_model, d_model))
                .transpose()?,
        })
    }

    /// The system alone: u [batch, length, width] from a state [batch, p, 2] to y and the last state.
    pub fn system(&self, u: &Tensor, start: &Tensor) -> Result<(Tensor, Tensor)> {
        let scaled = self
            .lambda
            .broadcast_mul(&self.log_step.exp()?.unsqueeze(1)?)?; // [p, 2]
        let write = divide(&expm1(&scaled)?, &self.lambda, 0.0)?.unsqueeze(1)?;
        let b = multiply(&write, &self.b)?; // [p, width, 2]
        scan(u, &exp(&scaled)?, &b, &self.c, 2.0, &self.d, start)
    }
}

/// x_t = decay x_{t-1} + B u_t, y_t = factor Re(C x_t) + D u_t: u [batch, length, width], decay [p, 2], B [p, width, 2], C
/// [width, p, 2], start [batch, p, 2] to y [batch, length, width] and the last state.
pub(super) fn scan(
    u: &Tensor,
    decay: &Tensor,
    b: &Tensor,
    c: &Tensor,
    factor: f64,
    d: &Tensor,
    start: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (_, length, _) = u.dims3()?;
    let part = |z: &Tensor, which: usize| z.narrow(2, which, 1)?.squeeze(2)?.contiguous();
    let written = pair(
        &linear(u, &part(b, 0)?, None)?,
        &linear(u, &part(b, 1)?, None)?,
    )?; // [batch, length, p, 2]
    let x = associative_scan(decay, &written.contiguous()?, start)?;
    let (re, im) = super::modes::parts(&x)?;
    let y = (linear(&re, &part(c, 0)?, None)? - linear(&im, &part(c, 1)?, None)?)?;
    let y = ((y * factor)? + u.broadcast_mul(d)?)?;
    Ok((y, x.narrow(1, length - 1, 1)?.squeeze(1)?))
}

impl SequenceMixer for S5 {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "s5",
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
        let (batch, length, _) = x.dims3()?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let start = match state {
            Some(state) => state.get("state")?.clone(),
            None => Tensor::zeros((batch, self.p, 2), x.dtype(), x.device())?,
        };
        let (y, last) = self.system(x, &start)?;
        let y = match &self.gate {
            None => y,
            Some(gate) => {
                let y = y.gelu_erf()?;
                let open = sigmoid(&gate.apply(&y)?)?;
                (y * open)?
            }
        };
        Ok((y, state.map(|s| s.moved(length, [("state", last)]))))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        MixerState::zeros([("state", &[batch, self.p, 2][..])], &self.b)
    }
}

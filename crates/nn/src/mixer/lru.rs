//! LRU: a linear recurrence with complex decays on a ring, normalised inputs, and no discretisation (paper 29).
//!
//! Linear Recurrent Unit (arXiv 2303.06349); followed by GELU and a gated linear layer.

use super::modes::{Glu, exp, multiply, normal, pair};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Lru`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LruConfig {
    /// States N.
    pub n: usize,
    /// Smallest initial |λ|.
    pub r_min: f64,
    /// Largest initial |λ|.
    pub r_max: f64,
    /// Largest initial phase, radians.
    pub max_phase: f64,
    /// GELU and a gated linear layer after the recurrence.
    pub glu: bool,
}

impl Default for LruConfig {
    fn default() -> Self {
        LruConfig {
            n: 64,
            r_min: 0.0,
            r_max: 1.0,
            max_phase: std::f64::consts::TAU,
            glu: true,
        }
    }
}

/// The layer.
pub struct Lru {
    n: usize,
    nu_log: Tensor,
    theta_log: Tensor,
    gamma_log: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    out: Glu,
}

/// (ν, θ, γ), as stored, from two uniform draws.
pub fn lru_start(config: &LruConfig, u_nu: f64, u_theta: f64) -> (f64, f64, f64) {
    let (low, high) = (config.r_min.powi(2), config.r_max.powi(2));
    let nu = (-0.5 * (u_nu * (high - low) + low).ln()).ln();
    let theta = (config.max_phase * u_theta).ln();
    let size = (-nu.exp()).exp();
    (nu, theta, (1.0 - size * size).sqrt().ln())
}

impl Lru {
    /// Parameters in `params`.
    pub fn new(config: &LruConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let ring = c.r_min >= 0.0 && c.r_min < c.r_max && c.r_max <= 1.0;
        if c.n == 0 || !ring || c.max_phase.is_nan() || c.max_phase <= 0.0 {
            bail!(
                "lru: found n {}, r_min {}, r_max {}, max_phase {}, expected 1 or more states, 0 <= r_min < r_max <= 1 \
                 and a phase above 0",
                c.n,
                c.r_min,
                c.r_max,
                c.max_phase
            );
        }
        let slow = ParamGroup::STATE_SPACE;
        let mut random = params.random("ring");
        let starts: Vec<(f64, f64, f64)> = (0..c.n)
            .map(|_| {
                // Draws of exactly 0 have no logarithm.
                let mut draw = || random.uniform().max(1e-9);
                let nu = draw();
                lru_start(c, nu, draw())
            })
            .collect();
        let values =
            |pick: fn(&(f64, f64, f64)) -> f64| Init::Values(starts.iter().map(pick).collect());
        Ok(Lru {
            n: c.n,
            nu_log: params.get_in("nu_log", &[c.n], values(|s| s.0), slow)?,
            theta_log: params.get_in("theta_log", &[c.n], values(|s| s.1), slow)?,
            gamma_log: params.get_in("gamma_log", &[c.n], values(|s| s.2), slow)?,
            b: params.get_in(
                "B",
                &[c.n, d_model, 2],
                normal((2.0 * d_model as f64).powf(-0.5)),
                slow,
            )?,
            c: params.get("C", &[d_model, c.n, 2], normal((c.n as f64).powf(-0.5)))?,
            d: params.get("D", &[d_model], normal(1.0))?,
            out: Glu::new(params, d_model, c.glu)?,
        })
    }

    /// The recurrence alone: u [batch, length, width] from a state [batch, n, 2] to y and the last state.
    pub fn system(&self, u: &Tensor, start: &Tensor) -> Result<(Tensor, Tensor)> {
        let log = pair(&self.nu_log.exp()?.neg()?, &self.theta_log.exp()?)?;
        let gamma = self.gamma_log.exp()?;
        let gamma = pair(&gamma, &gamma.zeros_like()?)?.unsqueeze(1)?; // [n, 1, 2]
        let b = multiply(&gamma, &self.b)?;
        super::s5::scan(u, &exp(&log)?, &b, &self.c, 1.0, &self.d, start)
    }
}

impl SequenceMixer for Lru {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "lru",
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
            None => Tensor::zeros((batch, self.n, 2), x.dtype(), x.device())?,
        };
        let (y, last) = self.system(x, &start)?;
        let next = state.map(|s| s.moved(length, [("state", last)]));
        Ok((self.out.apply(&y)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        MixerState::zeros([("state", &[batch, self.n, 2][..])], &self.b)
    }
}

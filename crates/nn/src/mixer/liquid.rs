//! Liquid-S4: a diagonal system whose decay also depends on the input, exact or as a convolution with products of
//! neighbouring inputs (paper 29).
//!
//! Liquid Structural State-Space Models (arXiv 2209.12951). The correlation term here is causal, as in the paper; the public
//! code's is not.

use super::modes::{Glu, Modes, exp, log_steps, multiply, normal, pair, parts};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::modal::ModalScan;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`LiquidS4`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LiquidConfig {
    /// State size of every channel; even.
    pub d_state: usize,
    /// Degree of the approximation by products of inputs, 2 to 4; none = the exact recurrence.
    pub degree: Option<usize>,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
    /// GELU and a gated linear layer after the system.
    pub glu: bool,
}

impl Default for LiquidConfig {
    fn default() -> Self {
        LiquidConfig {
            d_state: 64,
            degree: Some(2),
            dt_min: 1e-3,
            dt_max: 1e-1,
            glu: true,
        }
    }
}

/// The layer.
pub struct LiquidS4 {
    config: LiquidConfig,
    channels: usize,
    log_dt: Tensor,
    a_real: Tensor,
    a_imag: Tensor,
    c: Tensor,
    d: Tensor,
    out: Glu,
}

/// x_t = (Ā + B̄ u_t) x_{t-1} + B̄ u_t, y = 2 Re(C x): u [batch, length, channels], system [channels, n, 2], state [batch,
/// channels, n, 2].
pub fn liquid_exact(
    u: &Tensor,
    a_bar: &Tensor,
    b_bar: &Tensor,
    c: &Tensor,
    state: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let scan = ModalScan {
        u,
        decay: a_bar,
        input: b_bar,
        output: &(c * 2.0)?,
        state,
        liquid: true,
    };
    scan.run()
}

/// What degrees 2.. add: Σ_p 2 Re Σ_n C B̄^p (u_t u_{t-1} .. u_{t-p+1}). `padded` [batch, degree - 1 + length, channels]
/// begins with the inputs before (zeros at the start).
pub fn liquid_products(
    padded: &Tensor,
    b_bar: &Tensor,
    c: &Tensor,
    degree: usize,
) -> Result<Tensor> {
    let length = (padded.dim(1)? + 1).saturating_sub(degree);
    let input = |back: usize| padded.narrow(1, degree - 1 - back, length);
    let (mut product, mut power) = (input(0)?, b_bar.clone());
    let mut sum = product.zeros_like()?;
    for p in 2..=degree {
        product = (product * input(p - 1)?)?;
        power = multiply(&power, b_bar)?;
        let (re, _) = parts(&multiply(c, &power)?)?;
        let weight = (re.sum(1)? * 2.0)?; // [channels]
        sum = (sum + product.broadcast_mul(&weight)?)?;
    }
    Ok(sum)
}

impl LiquidS4 {
    /// Parameters in `params`, S4D-Lin at the start.
    pub fn new(config: &LiquidConfig, channels: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        if c.d_state < 2 || !c.d_state.is_multiple_of(2) {
            bail!(
                "liquid-s4: found d_state {}, expected an even number",
                c.d_state
            );
        }
        if c.degree.is_some_and(|degree| !(2..=4).contains(&degree)) {
            bail!("liquid-s4: found degree {:?}, expected 2, 3 or 4", c.degree);
        }
        if c.dt_min.is_nan() || c.dt_min <= 0.0 || c.dt_max < c.dt_min {
            bail!(
                "liquid-s4: found dt {}..{}, expected 0 < dt_min <= dt_max",
                c.dt_min,
                c.dt_max
            );
        }
        let n = c.d_state / 2;
        let slow = ParamGroup::STATE_SPACE;
        let steps = log_steps(params, "log_dt", channels, c.dt_min, c.dt_max);
        let frequencies = (0..n).map(|k| std::f64::consts::PI * k as f64).collect();
        Ok(LiquidS4 {
            channels,
            log_dt: params.get_in("log_dt", &[channels], Init::Values(steps), slow)?,
            a_real: params.get_in("A_real", &[n], Init::Constant(0.5f64.ln()), slow)?,
            a_imag: params.get_in("A_imag", &[n], Init::Values(frequencies), slow)?,
            c: params.get("C", &[channels, n, 2], normal(0.5f64.sqrt()))?,
            d: params.get("D", &[channels], normal(1.0))?,
            out: Glu::new(params, channels, c.glu)?,
            config: c.clone(),
        })
    }

    /// Zero-order hold of the linear part, read by 2 C.
    fn modes(&self) -> Result<Modes> {
        let lambda = pair(&self.a_real.exp()?.neg()?, &self.a_imag)?.unsqueeze(0)?; // [1, n, 2]
        let dt = self.log_dt.exp()?.unsqueeze(1)?.unsqueeze(2)?; // [channels, 1, 1]
        let scaled = lambda.broadcast_mul(&dt)?;
        Modes::zoh(&scaled, &lambda, None, &(&self.c * 2.0)?)
    }
}

impl SequenceMixer for LiquidS4 {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "liquid-s4",
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
        let modes = self.modes()?;
        let (y, next) = match self.config.degree {
            None => {
                let start = match state {
                    Some(state) => state.get("state")?.clone(),
                    None => {
                        let shape = (batch, channels, self.config.d_state / 2, 2);
                        Tensor::zeros(shape, x.dtype(), x.device())?
                    }
                };
                let decay = exp(&modes.log_decay)?;
                let (y, last) = liquid_exact(x, &decay, &modes.input, &self.c, &start)?;
                (y, state.map(|s| s.moved(length, [("state", last)])))
            }
            Some(degree) => {
                let before = match state {
                    Some(state) => state.get("inputs")?.clone(),
                    None => Tensor::zeros((batch, degree - 1, channels), x.dtype(), x.device())?,
                };
                let padded = Tensor::cat(&[&before, x], 1)?;
                let products = liquid_products(&padded, &modes.input, &self.c, degree)?;
                let (y, next) = match state {
                    None => (modes.convolve(x)?, None),
                    Some(state) => {
                        let (y, last) = modes.carry(x, state.get("state")?)?;
                        let inputs = padded.narrow(1, length, degree - 1)?;
                        let next = state.moved(length, [("state", last), ("inputs", inputs)]);
                        (y, Some(next))
                    }
                };
                ((y + products)?, next)
            }
        };
        let y = (y + x.broadcast_mul(&self.d)?)?;
        Ok((self.out.apply(&y)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let shape = [batch, self.channels, self.config.d_state / 2, 2];
        match self.config.degree {
            None => MixerState::zeros([("state", &shape[..])], &self.c),
            Some(degree) => MixerState::zeros(
                [
                    ("state", &shape[..]),
                    ("inputs", &[batch, degree - 1, self.channels][..]),
                ],
                &self.c,
            ),
        }
    }
}

//! DSS: a diagonal state-space layer without conjugate pairs, its kernel normalised by length or exponential (paper 29).
//!
//! Diagonal State Spaces (arXiv 2203.14343). Real parts of Λ are kept negative in both versions.

use super::modes::{Glu, Modes, divide, expm1, log_steps, multiply, normal, pair, parts};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind, hippo};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// How the kernel is made from Λ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DssVersion {
    /// Zero-order hold.
    Exp,
    /// Divided by the sum over `l_max` steps (a softmax over time).
    Softmax,
}

/// Hyper-parameters of [`Dss`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DssConfig {
    /// Modes N of every channel.
    pub n: usize,
    /// Kernel.
    pub version: DssVersion,
    /// Smallest initial step.
    pub dt_min: f64,
    /// Largest initial step.
    pub dt_max: f64,
    /// Length that the softmax version normalises over.
    pub l_max: usize,
    /// Added to |x|² where the softmax version takes a reciprocal.
    pub reciprocal_eps: f64,
    /// GELU and a gated linear layer after the system.
    pub glu: bool,
}

impl Default for DssConfig {
    fn default() -> Self {
        DssConfig {
            n: 64,
            version: DssVersion::Exp,
            dt_min: 1e-3,
            dt_max: 1e-1,
            l_max: 1024,
            reciprocal_eps: 1e-7,
            glu: true,
        }
    }
}

/// The layer.
pub struct Dss {
    config: DssConfig,
    channels: usize,
    lambda: Tensor,
    log_dt: Tensor,
    w: Tensor,
    d: Tensor,
    out: Glu,
}

/// The kernels [channels, length] of Λ [n, 2], dt [channels, 2] (steps of real and imaginary part) and W [channels, n, 2];
/// `normalised`: the length of the softmax version and the eps of its reciprocal.
pub fn dss_kernel(
    lambda: &Tensor,
    dt: &Tensor,
    w: &Tensor,
    normalised: Option<(usize, f64)>,
    length: usize,
) -> Result<Tensor> {
    modes(lambda, dt, w, normalised)?.kernel(length)
}

fn modes(
    lambda: &Tensor,
    dt: &Tensor,
    w: &Tensor,
    normalised: Option<(usize, f64)>,
) -> Result<Modes> {
    let lambda = lambda.unsqueeze(0)?; // [1, n, 2]
    let scaled = lambda.broadcast_mul(&dt.unsqueeze(1)?)?; // [channels, n, 2]
    let Some((length, eps)) = normalised else {
        return Modes::zoh(&scaled, &lambda, None, w);
    };
    // (e^{dtΛ} - 1) / (Λ (e^{dtΛ L} - 1))
    let sum = multiply(&lambda, &expm1(&(&scaled * length as f64)?)?)?;
    Ok(Modes {
        input: divide(&expm1(&scaled)?, &sum, eps)?,
        log_decay: scaled,
        output: w.clone(),
    })
}

/// The eigenvalues DSS starts from: those of the skew part of the HiPPO matrix of order 2n with positive imaginary part,
/// descending, minus 1/2: (real, imaginary).
pub fn dss_start(n: usize) -> Vec<(f64, f64)> {
    let (a, _) = hippo::legs(2 * n);
    let skew: hippo::Matrix = (0..2 * n)
        .map(|i| {
            (0..2 * n)
                .map(|j| {
                    let below = |i: usize, j: usize| if i > j { a[i][j] } else { 0.0 };
                    // -i K is Hermitian.
                    let value = (below(i, j) - below(j, i)) / 2.0;
                    rustfft::num_complex::Complex64::new(0.0, -value)
                })
                .collect()
        })
        .collect();
    let mut values: Vec<f64> = hippo::eigen_hermitian(skew).0;
    values.retain(|&v| v > 0.0);
    values.sort_by(|a, b| b.total_cmp(a));
    values.into_iter().map(|v| (-0.5, v)).collect()
}

impl Dss {
    /// Parameters in `params`.
    pub fn new(config: &DssConfig, channels: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        if c.n == 0 || c.l_max == 0 || c.dt_min.is_nan() || c.dt_min <= 0.0 || c.dt_max < c.dt_min {
            bail!(
                "dss: found n {}, l_max {}, dt {}..{}, expected 1 or more and 0 < dt_min <= dt_max",
                c.n,
                c.l_max,
                c.dt_min,
                c.dt_max
            );
        }
        let slow = ParamGroup::STATE_SPACE;
        let lambda = dss_start(c.n);
        let lambda = lambda.iter().flat_map(|(re, im)| [(-re).ln(), *im]);
        let steps = log_steps(params, "log_dt", channels, c.dt_min, c.dt_max);
        let steps = steps.iter().flat_map(|&s| [s, s]).collect();
        Ok(Dss {
            channels,
            lambda: params.get_in("Lambda", &[c.n, 2], Init::Values(lambda.collect()), slow)?,
            log_dt: params.get_in("log_dt", &[channels, 2], Init::Values(steps), slow)?,
            w: params.get_in("W", &[channels, c.n, 2], normal(1.0), slow)?,
            d: params.get("D", &[channels], normal(1.0))?,
            out: Glu::new(params, channels, c.glu)?,
            config: c.clone(),
        })
    }

    fn modes(&self) -> Result<Modes> {
        let (re, im) = parts(&self.lambda)?;
        let lambda = pair(&re.exp()?.neg()?, &im)?;
        let c = &self.config;
        let normalised = (c.version == DssVersion::Softmax).then_some((c.l_max, c.reciprocal_eps));
        modes(&lambda, &self.log_dt.exp()?, &self.w, normalised)
    }
}

impl SequenceMixer for Dss {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "dss",
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
        let modes = self.modes()?;
        let (y, next) = match state {
            None => (modes.convolve(x)?, None),
            Some(state) => {
                let (y, next) = modes.carry(x, state.get("state")?)?;
                (y, Some(state.moved(length, [("state", next)])))
            }
        };
        let y = (y + x.broadcast_mul(&self.d)?)?;
        Ok((self.out.apply(&y)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let shape = [batch, self.channels, self.config.n, 2];
        MixerState::zeros([("state", &shape[..])], &self.w)
    }
}

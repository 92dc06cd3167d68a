//! Mamba-2: a state-space layer whose decays and writes depend on the input (paper 16 studies it; block as in transformers).
//!
//! Tensor names, splits and numerics are those of Hugging Face's `Mamba2Mixer`, so its checkpoints load without a map. The
//! state is the last convolution inputs and one matrix per head, in f32 or f64.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{D, Result, Tensor, bail};
use longspan_kernels::autograd::softplus;
use longspan_kernels::ssd::Scan;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Mamba2`], under Hugging Face's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mamba2Config {
    /// Heads; none = expand d_model / head_dim.
    pub num_heads: Option<usize>,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width per model width.
    pub expand: usize,
    /// Columns of each head's state matrix.
    pub state_size: usize,
    /// Groups of heads that share B and C.
    pub n_groups: usize,
    /// Taps of the convolution.
    pub conv_kernel: usize,
    /// Tokens per matrix product of the scan: speed only.
    pub chunk_size: usize,
    /// Step sizes are kept within these.
    pub time_step_limit: (f64, f64),
    /// Biases of the projections.
    pub use_bias: bool,
    /// Bias of the convolution.
    pub use_conv_bias: bool,
    /// Added to the mean square in the gated norm.
    pub layer_norm_epsilon: f64,
}

impl Default for Mamba2Config {
    fn default() -> Self {
        Mamba2Config {
            num_heads: None,
            head_dim: 64,
            expand: 2,
            state_size: 128,
            n_groups: 1,
            conv_kernel: 4,
            chunk_size: 256,
            time_step_limit: (0.0, f64::INFINITY),
            use_bias: false,
            use_conv_bias: true,
            layer_norm_epsilon: 1e-5,
        }
    }
}

/// The layer.
pub struct Mamba2 {
    config: Mamba2Config,
    heads: usize,
    inner: usize,
    in_proj: Tensor,
    in_bias: Option<Tensor>,
    conv: Tensor,
    conv_bias: Option<Tensor>,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    norm: Tensor,
    out_proj: Tensor,
    out_bias: Option<Tensor>,
}

impl Mamba2 {
    /// Parameters in `params`.
    pub fn new(config: &Mamba2Config, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let inner = c.expand * d_model;
        let heads = c.num_heads.unwrap_or(inner / c.head_dim.max(1));
        if heads == 0
            || heads * c.head_dim != inner
            || c.n_groups == 0
            || !heads.is_multiple_of(c.n_groups)
            || c.conv_kernel == 0
        {
            bail!(
                "mamba2: found {heads} heads of {} in {} groups, expected expand d_model = {inner} in all, groups \
                 that divide the heads, and a convolution of 1 tap or more",
                c.head_dim,
                c.n_groups
            );
        }
        let wide = inner + 2 * c.n_groups * c.state_size;
        let uniform = |fan: usize| {
            let limit = (fan as f64).powf(-0.5);
            Init::Uniform {
                low: -limit,
                high: limit,
            }
        };
        // dt log-uniform in [1e-3, 1e-1], at least 1e-4; the bias is its inverse softplus.
        let mut random = params.random("dt_bias");
        let dt_bias = (0..heads)
            .map(|_| {
                let dt = random.range(1e-3f64.ln(), 1e-1f64.ln()).exp().max(1e-4);
                dt + (-(-dt).exp_m1()).ln()
            })
            .collect();
        let plain = ParamGroup::NO_DECAY;
        let bias = |name: &str, width: usize, wanted: bool| {
            let at = params.at(name);
            wanted
                .then(|| at.get_in("bias", &[width], Init::Constant(0.0), plain))
                .transpose()
        };
        let a_log = (1..=heads).map(|h| (h as f64).ln()).collect();
        let rows = inner + wide + heads;
        Ok(Mamba2 {
            heads,
            inner,
            in_proj: params
                .at("in_proj")
                .get("weight", &[rows, d_model], uniform(d_model))?,
            in_bias: bias("in_proj", rows, c.use_bias)?,
            conv: params.at("conv1d").get(
                "weight",
                &[wide, 1, c.conv_kernel],
                uniform(c.conv_kernel),
            )?,
            conv_bias: bias("conv1d", wide, c.use_conv_bias)?,
            dt_bias: params.get_in("dt_bias", &[heads], Init::Values(dt_bias), plain)?,
            a_log: params.get_in("A_log", &[heads], Init::Values(a_log), plain)?,
            d: params.get_in("D", &[heads], Init::Constant(1.0), plain)?,
            norm: params
                .at("norm")
                .get_in("weight", &[inner], Init::Constant(1.0), plain)?,
            out_proj: params
                .at("out_proj")
                .get("weight", &[d_model, inner], uniform(inner))?,
            out_bias: bias("out_proj", d_model, c.use_bias)?,
            config: c.clone(),
        })
    }

    fn wide(&self) -> usize {
        self.inner + 2 * self.config.n_groups * self.config.state_size
    }
}

impl SequenceMixer for Mamba2 {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "mamba2",
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
        let c = &self.config;
        let (batch, length, _) = x.dims3()?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let (inner, wide, heads) = (self.inner, self.wide(), self.heads);
        let all = linear(x, &self.in_proj, self.in_bias.as_ref())?;
        let z = all.narrow(2, 0, inner)?;
        let xbc = all.narrow(2, inner, wide)?;
        let dt = all.narrow(2, inner + wide, heads)?;
        // Causal depthwise convolution, the last inputs of the state (or zeros) before it.
        let taps = c.conv_kernel;
        let before = match state {
            // [batch, wide, taps] -> [batch, taps, wide]
            Some(state) => state.get("conv")?.transpose(1, 2)?.contiguous()?,
            None => Tensor::zeros((batch, taps, wide), x.dtype(), x.device())?,
        };
        let padded = Tensor::cat(&[&before, &xbc], 1)?; // [batch, taps + length, wide]
        let mut convolved = None;
        for tap in 0..taps {
            let weight = self.conv.narrow(2, tap, 1)?.reshape((1, 1, wide))?;
            let term = padded.narrow(1, tap + 1, length)?.broadcast_mul(&weight)?;
            convolved = Some(match convolved {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        let mut xbc = convolved.expect("a convolution has a tap");
        if let Some(bias) = &self.conv_bias {
            xbc = xbc.broadcast_add(bias)?;
        }
        let xbc = xbc.silu()?;
        let (groups, n) = (c.n_groups, c.state_size);
        let heads_of_x = xbc
            .narrow(2, 0, inner)?
            .contiguous()?
            .reshape((batch, length, heads, c.head_dim))?;
        let group = |start: usize| {
            xbc.narrow(2, start, groups * n)?
                .contiguous()?
                .reshape((batch, length, groups, n))
        };
        let (b, read) = (group(inner)?, group(inner + groups * n)?);
        let mut dt = softplus(&dt.broadcast_add(&self.dt_bias)?)?;
        let (low, high) = c.time_step_limit;
        if low > 0.0 {
            dt = dt.maximum(low)?;
        }
        if high.is_finite() {
            dt = dt.minimum(high)?;
        }
        let a = self.a_log.exp()?.neg()?;
        let scan = Scan {
            x: &heads_of_x,
            dt: &dt,
            a: &a,
            b: &b,
            c: &read,
            state: state.map(|state| state.get("ssm")).transpose()?,
        };
        let (y, ssm) = scan.chunked(c.chunk_size)?;
        let skip = heads_of_x.broadcast_mul(&self.d.reshape((1, 1, heads, 1))?)?;
        let y = (y + skip)?.reshape((batch, length, inner))?;
        // Gate first, then RMS over each group's share of the width.
        let y = (y * z.silu()?)?.reshape((batch, length, groups, inner / groups))?;
        let mean = y.sqr()?.mean_keepdim(D::Minus1)?;
        let y = y
            .broadcast_div(&(mean + c.layer_norm_epsilon)?.sqrt()?)?
            .reshape((batch, length, inner))?
            .broadcast_mul(&self.norm)?;
        let y = linear(&y, &self.out_proj, self.out_bias.as_ref())?;
        let next = match state {
            None => None,
            Some(state) => {
                let conv = padded
                    .narrow(1, length, taps)?
                    .transpose(1, 2)?
                    .contiguous()?;
                Some(MixerState {
                    tensors: [("conv".to_string(), conv), ("ssm".to_string(), ssm)].into(),
                    position: state.position + length,
                    plan: None,
                })
            }
        };
        Ok((y, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let zeros =
            |shape: &[usize]| Tensor::zeros(shape, self.in_proj.dtype(), self.in_proj.device());
        let c = &self.config;
        let conv = zeros(&[batch, self.wide(), c.conv_kernel])?;
        let ssm = zeros(&[batch, self.heads, c.head_dim, c.state_size])?;
        Ok(MixerState {
            tensors: [("conv".to_string(), conv), ("ssm".to_string(), ssm)].into(),
            position: 0,
            plan: None,
        })
    }
}

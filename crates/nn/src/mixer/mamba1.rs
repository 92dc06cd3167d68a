//! Mamba: a state-space layer whose step, input and read-out depend on the token, one decay per channel and state (paper 29).
//!
//! Tensor names, splits and numerics are those of Hugging Face's `MambaMixer` (arXiv 2312.00752), so its checkpoints load
//! without a map.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::autograd::softplus;
use longspan_kernels::cut::cut;
use longspan_kernels::learn;
use longspan_kernels::selective::SelectiveScan;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Mamba`], under Hugging Face's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MambaConfig {
    /// Inner width per model width.
    pub expand: usize,
    /// States of every channel.
    pub state_size: usize,
    /// Taps of the convolution.
    pub conv_kernel: usize,
    /// Rank of the step's projection; none = d_model / 16, rounded up.
    pub time_step_rank: Option<usize>,
    /// Biases of the projections.
    pub use_bias: bool,
    /// Bias of the convolution.
    pub use_conv_bias: bool,
}

impl Default for MambaConfig {
    fn default() -> Self {
        MambaConfig {
            expand: 2,
            state_size: 16,
            conv_kernel: 4,
            time_step_rank: None,
            use_bias: false,
            use_conv_bias: true,
        }
    }
}

/// The layer.
pub struct Mamba {
    config: MambaConfig,
    inner: usize,
    rank: usize,
    in_proj: Tensor,
    in_bias: Option<Tensor>,
    conv: Tensor,
    conv_bias: Option<Tensor>,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    out_proj: Tensor,
    out_bias: Option<Tensor>,
}

impl Mamba {
    /// Parameters in `params`.
    pub fn new(config: &MambaConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        let (inner, n) = (c.expand * d_model, c.state_size);
        let rank = c.time_step_rank.unwrap_or(d_model.div_ceil(16));
        if inner == 0 || n == 0 || rank == 0 || c.conv_kernel == 0 {
            bail!(
                "mamba: found expand {}, state_size {n}, time_step_rank {rank}, conv_kernel {}, expected 1 or more",
                c.expand,
                c.conv_kernel
            );
        }
        let uniform = |fan: usize| {
            let limit = (fan as f64).powf(-0.5);
            Init::Uniform {
                low: -limit,
                high: limit,
            }
        };
        let plain = ParamGroup::NO_DECAY;
        let bias = |name: &str, width: usize, wanted: bool| {
            let at = params.at(name);
            wanted
                .then(|| at.get_in("bias", &[width], Init::Constant(0.0), plain))
                .transpose()
        };
        // dt log-uniform in [1e-3, 1e-1], at least 1e-4; the bias is its inverse softplus.
        let mut random = params.random("dt_bias");
        let dt_bias = (0..inner)
            .map(|_| {
                let dt = random.range(1e-3f64.ln(), 1e-1f64.ln()).exp().max(1e-4);
                dt + (-(-dt).exp_m1()).ln()
            })
            .collect();
        let a_log = (0..inner)
            .flat_map(|_| (1..=n).map(|k| (k as f64).ln()))
            .collect();
        let weight = |name: &str, shape: &[usize], fan: usize| {
            params.at(name).get("weight", shape, uniform(fan))
        };
        Ok(Mamba {
            inner,
            rank,
            in_proj: weight("in_proj", &[2 * inner, d_model], d_model)?,
            in_bias: bias("in_proj", 2 * inner, c.use_bias)?,
            conv: weight("conv1d", &[inner, 1, c.conv_kernel], c.conv_kernel)?,
            conv_bias: bias("conv1d", inner, c.use_conv_bias)?,
            x_proj: weight("x_proj", &[rank + 2 * n, inner], inner)?,
            dt_proj: weight("dt_proj", &[inner, rank], rank)?,
            dt_bias: params
                .at("dt_proj")
                .get_in("bias", &[inner], Init::Values(dt_bias), plain)?,
            a_log: params.get_in("A_log", &[inner, n], Init::Values(a_log), plain)?,
            d: params.get_in("D", &[inner], Init::Constant(1.0), plain)?,
            out_proj: weight("out_proj", &[d_model, inner], inner)?,
            out_bias: bias("out_proj", d_model, c.use_bias)?,
            config: c.clone(),
        })
    }
}

impl SequenceMixer for Mamba {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "mamba",
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
        let (inner, taps, n) = (self.inner, self.config.conv_kernel, self.config.state_size);
        let both = linear(x, &self.in_proj, self.in_bias.as_ref())?;
        let both = cut(&both, &[inner, inner])?;
        let (u, z) = (&both[0], &both[1]);
        let before = match state {
            // [batch, inner, taps] -> [batch, taps, inner]
            Some(state) => state.get("conv")?.transpose(1, 2)?.contiguous()?,
            None => Tensor::zeros((batch, taps, inner), x.dtype(), x.device())?,
        };
        let padded = Tensor::cat(&[&before, u], 1)?;
        let weight = self.conv.squeeze(1)?;
        let u = learn::depthwise_conv(&padded, &weight, self.conv_bias.as_ref())?;
        let u = learn::silu_gate(&u, None)?;
        let parts = cut(&linear(&u, &self.x_proj, None)?, &[self.rank, n, n])?;
        let dt = linear(&parts[0], &self.dt_proj, None)?;
        let dt = softplus(&dt.broadcast_add(&self.dt_bias)?)?;
        let scan = SelectiveScan {
            u: &u,
            dt: &dt,
            a: &self.a_log.exp()?.neg()?,
            b: &parts[1],
            c: &parts[2],
            state: state.map(|state| state.get("ssm")).transpose()?,
        };
        let (y, ssm) = scan.run()?;
        let y = learn::silu_gate(z, Some(&learn::skip(&y, &u, &self.d)?))?;
        let y = linear(&y, &self.out_proj, self.out_bias.as_ref())?;
        let next = match state {
            None => None,
            Some(state) => {
                let conv = padded
                    .narrow(1, length, taps)?
                    .transpose(1, 2)?
                    .contiguous()?;
                Some(state.moved(length, [("conv", conv), ("ssm", ssm)]))
            }
        };
        Ok((y, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let c = &self.config;
        MixerState::zeros(
            [
                ("conv", &[batch, self.inner, c.conv_kernel][..]),
                ("ssm", &[batch, self.inner, c.state_size][..]),
            ],
            &self.in_proj,
        )
    }
}

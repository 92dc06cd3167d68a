//! Mamba-2: a state-space layer whose decays and writes depend on the input (paper 16 studies it; block as in transformers).
//!
//! Tensor names, splits and numerics are those of Hugging Face's `Mamba2Mixer`, so its checkpoints load without a map. The
//! state is the last convolution inputs and one matrix per head, in f32 or f64.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear};
use crate::model::stack::rms_norm;
use crate::params::{Init, ParamGroup, Params};
use candle_core::{D, Result, Tensor, bail};
use longspan_kernels::autograd::softplus;
use longspan_kernels::cut::cut;
use longspan_kernels::learn;
use longspan_kernels::ssd::Scan;
use longspan_kernels::ssd_policy::{Repair, RepairState, repaired};
use serde::{Deserialize, Serialize};

/// What is done, without training, to a state that never learned to forget (paper 16). Outputs under `norm-clip` and
/// `window` carry no gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "policy", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StatePolicy {
    /// Nothing.
    #[default]
    None,
    /// Forget more, remember less: decays to the power `forget`, writes times `write`.
    Scale {
        /// 1 or more.
        forget: f64,
        /// 1 or less.
        write: f64,
    },
    /// The Frobenius norm of each head's state is at most this, after every token.
    NormClip {
        /// The limit p.
        p: f64,
    },
    /// The state is that of the last so many tokens, by a difference of states.
    Window {
        /// The window r.
        r: usize,
    },
}

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
    /// Repair of the state when reading beyond the training length.
    pub state_policy: StatePolicy,
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
            state_policy: StatePolicy::None,
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
        match c.state_policy {
            StatePolicy::Scale { forget, write } if !(forget > 0.0 && write >= 0.0) => bail!(
                "mamba2 state policy: found forget {forget} and write {write}, expected forget above 0 and write 0 or more"
            ),
            StatePolicy::NormClip { p } if p.is_nan() || p <= 0.0 => {
                bail!("mamba2 state policy: found p {p}, expected more than 0")
            }
            StatePolicy::Window { r: 0 } => {
                bail!("mamba2 state policy: found a window of 0 tokens, expected 1 or more")
            }
            _ => {}
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

    /// The scan under the state policy, and the tensors of the state after it.
    fn scanned(
        &self,
        scan: &Scan<'_>,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Vec<(String, Tensor)>)> {
        let (repair, window) = match self.config.state_policy {
            StatePolicy::None | StatePolicy::Scale { .. } => {
                let (y, ssm) = scan.chunked(self.config.chunk_size)?;
                return Ok((y, vec![("ssm".into(), ssm)]));
            }
            StatePolicy::NormClip { p } => (Repair::NormClip(p), 0),
            StatePolicy::Window { r } => (Repair::Window(r), r),
        };
        let mut start = RepairState::new(scan, window)?;
        if let Some(state) = state {
            start.main = state.get("ssm")?.clone();
            if window > 0 {
                start.delayed = state.get("delayed")?.clone();
                start.x = state.get("window_x")?.clone();
                start.b = state.get("window_b")?.clone();
                start.dt = state.get("window_dt")?.clone();
            }
        }
        let position = state.map_or(0, |state| state.position);
        let (y, end) = repaired(scan, repair, &start, position)?;
        let mut kept = vec![("ssm".to_string(), end.main)];
        if window > 0 {
            kept.extend([
                ("delayed".to_string(), end.delayed),
                ("window_x".to_string(), end.x),
                ("window_b".to_string(), end.b),
                ("window_dt".to_string(), end.dt),
            ]);
        }
        Ok((y, kept))
    }

    /// silu of the causal depthwise convolution: padded [batch, taps + length, wide] to [batch, length, wide].
    fn convolved(&self, padded: &Tensor) -> Result<Tensor> {
        let weight = self.conv.squeeze(1)?;
        let y = learn::depthwise_conv(padded, &weight, self.conv_bias.as_ref())?;
        learn::silu_gate(&y, None)
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
        // One product for each part: cutting the weights costs less than cutting what they give, and its gradient.
        let rows = [inner, wide, heads];
        let d_model = self.in_proj.dim(1)?;
        let weights = cut(
            &self.in_proj.flatten_all()?,
            &rows.map(|rows| rows * d_model),
        )?;
        let biases = self.in_bias.as_ref().map(|bias| cut(bias, &rows));
        let biases = biases.transpose()?;
        let project = |part: usize| -> Result<Tensor> {
            let weight = weights[part].reshape((rows[part], d_model))?;
            linear(x, &weight, biases.as_ref().map(|biases| &biases[part]))
        };
        let (z, xbc, dt) = (project(0)?, project(1)?, project(2)?);
        // Causal depthwise convolution, the last inputs of the state (or zeros) before it.
        let taps = c.conv_kernel;
        let before = match state {
            // [batch, wide, taps] -> [batch, taps, wide]
            Some(state) => state.get("conv")?.transpose(1, 2)?.contiguous()?,
            None => Tensor::zeros((batch, taps, wide), x.dtype(), x.device())?,
        };
        let padded = Tensor::cat(&[&before, &xbc], 1)?; // [batch, taps + length, wide]
        let xbc = self.convolved(&padded)?;
        let (groups, n) = (c.n_groups, c.state_size);
        let parts = cut(&xbc, &[inner, groups * n, groups * n])?;
        let heads_of_x = parts[0].reshape((batch, length, heads, c.head_dim))?;
        let group = |part: &Tensor| part.reshape((batch, length, groups, n));
        let (b, read) = (group(&parts[1])?, group(&parts[2])?);
        let mut dt = softplus(&dt.broadcast_add(&self.dt_bias)?)?;
        let (low, high) = c.time_step_limit;
        if low > 0.0 {
            dt = dt.maximum(low)?;
        }
        if high.is_finite() {
            dt = dt.minimum(high)?;
        }
        let a = self.a_log.exp()?.neg()?;
        // One step serves decay and write; a scaled write is a scaled x.
        let mut written = heads_of_x.clone();
        if let StatePolicy::Scale { forget, write } = c.state_policy {
            dt = (dt * forget)?;
            written = (written * (write / forget))?;
        }
        let scan = Scan {
            x: &written,
            dt: &dt,
            a: &a,
            b: &b,
            c: &read,
            state: state.map(|state| state.get("ssm")).transpose()?,
        };
        let (y, kept) = self.scanned(&scan, state)?;
        let y = y.reshape((batch, length, inner))?;
        let y = learn::skip(&y, &parts[0], &self.d)?;
        // Gate first, then RMS over each group's share of the width.
        let y = learn::silu_gate(&z, Some(&y))?;
        let y = if groups == 1 {
            rms_norm(&y, &self.norm, c.layer_norm_epsilon)?
        } else {
            let y = y.reshape((batch, length, groups, inner / groups))?;
            let mean = y.sqr()?.mean_keepdim(D::Minus1)?;
            y.broadcast_div(&(mean + c.layer_norm_epsilon)?.sqrt()?)?
                .reshape((batch, length, inner))?
                .broadcast_mul(&self.norm)?
        };
        let y = linear(&y, &self.out_proj, self.out_bias.as_ref())?;
        let next = match state {
            None => None,
            Some(state) => {
                let conv = padded
                    .narrow(1, length, taps)?
                    .transpose(1, 2)?
                    .contiguous()?;
                let mut next = state.moved(length, [("conv", conv)]);
                next.tensors.extend(kept);
                Some(next)
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
        let mut tensors = vec![("conv", conv), ("ssm", ssm.clone())];
        if let StatePolicy::Window { r } = c.state_policy {
            tensors.extend([
                ("delayed", ssm),
                ("window_x", zeros(&[batch, r, self.heads, c.head_dim])?),
                ("window_b", zeros(&[batch, r, c.n_groups, c.state_size])?),
                ("window_dt", zeros(&[batch, r, self.heads])?),
            ]);
        }
        Ok(MixerState::default().moved(0, tensors))
    }
}

//! Hyena: long convolutions whose filters are functions of position, between elementwise products (paper 29).
//!
//! Hyena Hierarchy (arXiv 2302.10866). Filters are not a recurrence: the state is the whole history, and a step costs
//! time linear in it.

use super::modes::{Affine, convolve, short_conv};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::cut::cut;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Hyena`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyenaConfig {
    /// Products, and long convolutions plus one.
    pub order: usize,
    /// Longest sequence: filters are defined up to here.
    pub l_max: usize,
    /// Features of a position; odd, 3 or more.
    pub emb_dim: usize,
    /// Width of the filters' network.
    pub filter_order: usize,
    /// Frequency of its sines at the start.
    pub w: f64,
    /// Added to the window over the filters.
    pub shift: f64,
    /// Taps of the short convolution.
    pub short_kernel: usize,
}

impl Default for HyenaConfig {
    fn default() -> Self {
        HyenaConfig {
            order: 2,
            l_max: 1024,
            emb_dim: 3,
            filter_order: 64,
            w: 1.0,
            shift: 0.0,
            short_kernel: 3,
        }
    }
}

/// The layer.
pub struct Hyena {
    config: HyenaConfig,
    channels: usize,
    input: Affine,
    output: Affine,
    short_weight: Tensor,
    short_bias: Tensor,
    mlp: [Affine; 3],
    last: Tensor,
    freq: Tensor,
    deltas: Tensor,
    bias: Tensor,
}

impl Hyena {
    /// Parameters in `params`.
    pub fn new(config: &HyenaConfig, d_model: usize, params: &Params<'_>) -> Result<Self> {
        let c = config;
        if c.order < 2
            || c.l_max == 0
            || c.emb_dim < 3
            || c.emb_dim.is_multiple_of(2)
            || c.filter_order == 0
            || c.short_kernel == 0
        {
            bail!(
                "hyena: found order {}, l_max {}, emb_dim {}, filter_order {}, short_kernel {}, expected order 2 or more, \
                 an odd emb_dim of 3 or more, and 1 or more of the rest",
                c.order,
                c.l_max,
                c.emb_dim,
                c.filter_order,
                c.short_kernel
            );
        }
        let (wide, filters) = ((c.order + 1) * d_model, (c.order - 1) * d_model);
        let at = params.at("filter_fn");
        let limit = |fan: usize| {
            let limit = (fan as f64).powf(-0.5);
            Init::Uniform {
                low: -limit,
                high: limit,
            }
        };
        let (slow, fast) = ((0.01f64).ln() / 1.5, (0.01f64).ln() / 0.3);
        let deltas = (0..filters)
            .map(|k| slow + (fast - slow) * k as f64 / (filters.max(2) - 1) as f64)
            .collect();
        let fixed = ParamGroup {
            trainable: false,
            ..ParamGroup::NO_DECAY
        };
        let w = c.filter_order;
        let short = params.at("short_filter");
        Ok(Hyena {
            channels: d_model,
            input: Affine::new(params, "in_proj", d_model, wide)?,
            output: Affine::new(params, "out_proj", d_model, d_model)?,
            short_weight: short.get("weight", &[wide, 1, c.short_kernel], limit(c.short_kernel))?,
            short_bias: short.get_in(
                "bias",
                &[wide],
                limit(c.short_kernel),
                ParamGroup::NO_DECAY,
            )?,
            mlp: [
                Affine::new(&at, "implicit_filter.0", c.emb_dim, w)?,
                Affine::new(&at, "implicit_filter.1", w, w)?,
                Affine::new(&at, "implicit_filter.2", w, w)?,
            ],
            last: at.get("implicit_filter.3.weight", &[filters, w], limit(w))?,
            freq: at.get_in("freq", &[w], Init::Constant(c.w), ParamGroup::NO_DECAY)?,
            deltas: at.get_in("deltas", &[filters], Init::Values(deltas), fixed)?,
            bias: at.get("bias", &[filters], Init::Normal { std: 1.0 })?,
            config: c.clone(),
        })
    }

    /// The filters at the first `length` positions: [length, channels (order - 1)], channel by channel.
    pub fn filter(&self, length: usize) -> Result<Tensor> {
        let c = &self.config;
        let bands = (c.emb_dim - 1) / 2;
        let last = (c.l_max.max(2) - 1) as f64;
        let time = |t: usize| t as f64 / last;
        let features: Vec<f64> = (0..length)
            .flat_map(|t| {
                let w = std::f64::consts::TAU * t as f64 / c.l_max as f64;
                let angle = move |band: usize| {
                    let step = if bands > 1 {
                        (bands as f64 - 1.0 - 1e-4) / (bands as f64 - 1.0)
                    } else {
                        0.0
                    };
                    (1e-4 + step * band as f64) * w
                };
                // t, then the real and the imaginary parts of e^{-i f w}.
                std::iter::once(time(t))
                    .chain((0..bands).map(move |b| angle(b).cos()))
                    .chain((0..bands).map(move |b| -angle(b).sin()))
            })
            .collect();
        let like = |t: Tensor| t.to_dtype(self.last.dtype());
        let device = self.last.device();
        let mut h = like(Tensor::from_vec(features, (length, c.emb_dim), device)?)?;
        for layer in &self.mlp {
            h = layer.apply(&h)?.broadcast_mul(&self.freq)?.sin()?;
        }
        let h = linear(&h, &self.last, None)?;
        let times: Vec<f64> = (0..length).map(time).collect();
        let times = like(Tensor::from_vec(times, (length, 1), device)?)?;
        let window = times.broadcast_mul(&self.deltas.abs()?.neg()?.unsqueeze(0)?)?;
        h * (window.exp()? + c.shift)?
    }
}

impl SequenceMixer for Hyena {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "hyena",
            causal: true,
            state: StateKind::Growing,
            state_gradient: None,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, d) = x.dims3()?;
        let c = &self.config;
        let seen = state.map_or(0, |state| state.position);
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        if seen + length > c.l_max {
            bail!(
                "hyena: found a sequence of {} tokens, expected at most l_max, {}",
                seen + length,
                c.l_max
            );
        }
        let (order, taps) = (c.order, c.short_kernel);
        let projected = self.input.apply(x)?;
        let whole = match state {
            Some(state) => Tensor::cat(&[state.get("projected")?, &projected], 1)?,
            None => projected,
        };
        // Only as much of the past as the short convolution sees.
        let back = (taps - 1).min(seen);
        let recent = whole
            .narrow(1, seen - back, back + length)?
            .pad_with_zeros(1, taps - 1 - back, 0)?;
        let short =
            short_conv(&recent, &self.short_weight.squeeze(1)?)?.broadcast_add(&self.short_bias)?;
        let parts = cut(&short, &vec![d; order + 1])?;
        let filter = self.filter(seen + length)?; // [seen + length, d (order - 1)]
        let filter = filter
            .reshape((seen + length, d, order - 1))?
            .permute((2, 1, 0))?
            .contiguous()?; // [order - 1, d, seen + length]
        let bias = self.bias.reshape((d, order - 1))?;
        let mut v = parts[order].clone();
        let mut kept = vec![("projected".to_string(), whole)];
        for j in (1..order).rev() {
            let m = order - 1 - j;
            v = (v * &parts[j])?;
            let name = format!("values{m}");
            let history = match state {
                Some(state) => Tensor::cat(&[state.get(&name)?, &v], 1)?,
                None => v.clone(),
            };
            let y = convolve(&history, &filter.narrow(0, m, 1)?.squeeze(0)?)?;
            let skip = v.broadcast_mul(&bias.narrow(1, m, 1)?.squeeze(1)?)?;
            v = (y.narrow(1, seen, length)? + skip)?;
            kept.push((name, history));
        }
        let y = self.output.apply(&(v * &parts[0])?)?;
        debug_assert_eq!(y.dims(), [batch, length, d]);
        let next = state.map(|state| MixerState {
            tensors: kept.into_iter().collect(),
            position: state.position + length,
            plan: None,
        });
        Ok((y, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let d = self.channels;
        let names: Vec<String> = (0..self.config.order - 1)
            .map(|m| format!("values{m}"))
            .collect();
        let values = [batch, 0, d];
        let wide = [batch, 0, (self.config.order + 1) * d];
        let mut list: Vec<(&str, &[usize])> = vec![("projected", &wide)];
        list.extend(names.iter().map(|name| (name.as_str(), &values[..])));
        MixerState::zeros(list, &self.last)
    }
}

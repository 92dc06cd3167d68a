//! Damped exponential moving averages, several per channel, causal or both ways: the memory of Mega and LongVQ (papers 28, 29).
//!
//! Mega (arXiv 2209.10655): y = silu(Σ_n γ h_n / √n + ω x). Tensor names and shapes are its code's.

use super::modes::{Modes, pair, sigmoid};
use super::{MixerSpec, MixerState, SequenceMixer, StateKind};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{Result, Tensor, bail};
use longspan_kernels::fftconv::fft_conv;
use serde::{Deserialize, Serialize};

/// Hyper-parameters of [`Ema`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaConfig {
    /// Averages per channel.
    pub ndim: usize,
    /// Read both ways; both directions count the present token.
    pub bidirectional: bool,
}

impl Default for EmaConfig {
    fn default() -> Self {
        EmaConfig {
            ndim: 16,
            bidirectional: false,
        }
    }
}

/// The layer.
pub struct Ema {
    config: EmaConfig,
    channels: usize,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor,
}

impl Ema {
    /// Parameters in `params`.
    pub fn new(config: &EmaConfig, channels: usize, params: &Params<'_>) -> Result<Self> {
        let n = config.ndim;
        if n == 0 {
            bail!("ema: found ndim 0, expected 1 or more");
        }
        let rows = if config.bidirectional { 2 } else { 1 } * channels;
        let slow = ParamGroup::STATE_SPACE;
        let normal = |std: f64| Init::Normal { std };
        let mut random = params.random("beta");
        let beta = (0..rows * n)
            .map(|at| {
                let sign = if (at % n).is_multiple_of(2) {
                    1.0
                } else {
                    -1.0
                };
                sign + 0.02 * random.normal()
            })
            .collect();
        Ok(Ema {
            channels,
            delta: params.get_in("delta", &[rows, n, 1], normal(0.2), slow)?,
            alpha: params.get_in("alpha", &[rows, n, 1], normal(0.2), slow)?,
            beta: params.get_in("beta", &[rows, n, 1], Init::Values(beta), slow)?,
            gamma: params.get_in("gamma", &[rows, n], normal(1.0), slow)?,
            omega: params.get("omega", &[channels], normal(1.0))?,
            config: config.clone(),
        })
    }

    /// Decays q = 1 - sigmoid(delta) sigmoid(alpha), in (0, 1): [rows, n].
    pub fn decays(&self) -> Result<Tensor> {
        (self.write()? * sigmoid(&self.alpha.squeeze(2)?)?)?.affine(-1.0, 1.0)
    }

    fn write(&self) -> Result<Tensor> {
        sigmoid(&self.delta.squeeze(2)?)
    }

    fn modes(&self) -> Result<Modes> {
        let real = |x: Tensor| pair(&x, &x.zeros_like()?);
        let scale = (self.config.ndim as f64).powf(-0.5);
        Ok(Modes {
            log_decay: real(self.decays()?.log()?)?,
            input: real((self.write()? * self.beta.squeeze(2)?)?)?,
            output: real((&self.gamma * scale)?)?,
        })
    }

    /// The kernels [channels, length], the reverse direction's after the forward one's.
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        self.modes()?.kernel(length)
    }

    fn finish(&self, y: &Tensor, x: &Tensor) -> Result<Tensor> {
        (y + x.broadcast_mul(&self.omega)?)?.silu()
    }
}

impl SequenceMixer for Ema {
    fn spec(&self) -> MixerSpec {
        let both = self.config.bidirectional;
        MixerSpec {
            name: "ema",
            causal: !both,
            state: if both {
                StateKind::None
            } else {
                StateKind::Fixed
            },
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
        match state {
            Some(_) if self.config.bidirectional => {
                bail!("an average that reads both ways has no state")
            }
            Some(state) => {
                let (y, next) = modes.carry(x, state.get("state")?)?;
                let next = state.moved(length, [("state", next)]);
                Ok((self.finish(&y, x)?, Some(next)))
            }
            None if self.config.bidirectional => {
                let kernel = modes.kernel(length)?;
                let forward = kernel.narrow(0, 0, self.channels)?;
                let back = kernel.narrow(0, self.channels, self.channels)?;
                // The reverse kernel's first tap is the present token's.
                let now = back.narrow(1, 0, 1)?.pad_with_zeros(1, 0, length - 1)?;
                let later = back.narrow(1, 1, length - 1)?.pad_with_zeros(1, 0, 1)?;
                let u = x.transpose(1, 2)?.contiguous()?;
                let y = fft_conv(&u, &(forward + now)?, Some(&later.contiguous()?))?;
                Ok((self.finish(&y.transpose(1, 2)?, x)?, None))
            }
            None => Ok((self.finish(&modes.convolve(x)?, x)?, None)),
        }
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        if self.config.bidirectional {
            bail!("an average that reads both ways has no step form");
        }
        let shape = [batch, self.channels, self.config.ndim, 2];
        MixerState::zeros([("state", &shape[..])], &self.gamma)
    }
}

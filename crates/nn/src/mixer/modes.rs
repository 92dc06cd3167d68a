//! What diagonal state-space layers share (paper 29): complex arithmetic on pairs, one system of modes per channel as a
//! convolution or step by step, and the small layers around it.

use super::linear;
use crate::params::{Init, ParamGroup, Params};
use candle_core::{D, Result, Tensor, bail};
use longspan_kernels::fftconv::fft_conv;
use longspan_kernels::modal::ModalScan;
use longspan_kernels::vandermonde::vandermonde;

/// Real and imaginary part of z [.., 2].
pub(super) fn parts(z: &Tensor) -> Result<(Tensor, Tensor)> {
    let last = z.rank() - 1;
    Ok((
        z.narrow(last, 0, 1)?.squeeze(last)?,
        z.narrow(last, 1, 1)?.squeeze(last)?,
    ))
}

/// The number with these parts: [.., 2].
pub(super) fn pair(re: &Tensor, im: &Tensor) -> Result<Tensor> {
    Tensor::stack(&[re, im], re.rank())
}

/// a b, shapes broadcast.
pub(super) fn multiply(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((ar, ai), (br, bi)) = (parts(a)?, parts(b)?);
    let re = (ar.broadcast_mul(&br)? - ai.broadcast_mul(&bi)?)?;
    let im = (ar.broadcast_mul(&bi)? + ai.broadcast_mul(&br)?)?;
    pair(&re, &im)
}

/// a / b, shapes broadcast; `eps` is added to |b|².
pub(super) fn divide(a: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let (br, bi) = parts(b)?;
    let size = ((br.sqr()? + bi.sqr()?)? + eps)?;
    let inverse = pair(&(&br / &size)?, &(bi.neg()? / &size)?)?;
    multiply(a, &inverse)
}

/// e^z.
pub(super) fn exp(z: &Tensor) -> Result<Tensor> {
    let (re, im) = parts(z)?;
    let size = re.exp()?;
    pair(&(&size * im.cos()?)?, &(&size * im.sin()?)?)
}

/// e^z - 1, exact near 0; Re z <= 0.
pub(super) fn expm1(z: &Tensor) -> Result<Tensor> {
    let (re, im) = parts(z)?;
    // e^a - 1 = 2 t / (1 - t) with t = tanh(a / 2); cos b - 1 = -2 sin²(b / 2).
    let t = (&re * 0.5)?.tanh()?;
    let real = ((&t * 2.0)? / (t.neg()? + 1.0)?)?;
    let turned = ((&im * 0.5)?.sin()?.sqr()? * 2.0)?;
    pair(&((real * im.cos()?)? - turned)?, &(re.exp()? * im.sin()?)?)
}

/// One system per channel: x_t = e^{log_decay} x_{t-1} + input u_t, y_t = Re Σ output x_t. All [channels, modes, 2].
pub(super) struct Modes {
    pub log_decay: Tensor,
    pub input: Tensor,
    pub output: Tensor,
}

impl Modes {
    /// Zero-order hold of x' = Λ x + B u read by C: `scaled` is dt Λ, and Λ, B broadcast to [channels, modes, 2].
    pub fn zoh(scaled: &Tensor, lambda: &Tensor, b: Option<&Tensor>, c: &Tensor) -> Result<Self> {
        let shape = c.dims().to_vec();
        let mut input = divide(&expm1(scaled)?, lambda, 0.0)?;
        if let Some(b) = b {
            input = multiply(&input, b)?;
        }
        Ok(Modes {
            log_decay: scaled.broadcast_as(&shape[..])?.contiguous()?,
            input: input.broadcast_as(&shape[..])?.contiguous()?,
            output: c.clone(),
        })
    }

    /// The impulse response: [channels, length].
    pub fn kernel(&self, length: usize) -> Result<Tensor> {
        // `vandermonde` adds each mode's conjugate.
        let weight = (multiply(&self.input, &self.output)? * 0.5)?;
        vandermonde(&weight, &self.log_decay, length)
    }

    /// u [batch, length, channels] from rest, as one convolution.
    pub fn convolve(&self, u: &Tensor) -> Result<Tensor> {
        convolve(u, &self.kernel(u.dim(1)?)?)
    }

    /// u [batch, length, channels] from a state [batch, channels, modes, 2], step by step.
    pub fn carry(&self, u: &Tensor, state: &Tensor) -> Result<(Tensor, Tensor)> {
        let scan = ModalScan {
            u,
            decay: &exp(&self.log_decay)?,
            input: &self.input,
            output: &self.output,
            state,
            liquid: false,
        };
        scan.run()
    }
}

/// u [batch, length, channels] with a kernel [channels, taps].
pub(super) fn convolve(u: &Tensor, kernel: &Tensor) -> Result<Tensor> {
    let u = u.transpose(1, 2)?.contiguous()?;
    fft_conv(&u, kernel, None)?.transpose(1, 2)?.contiguous()
}

/// Causal convolution of few taps: padded [batch, taps - 1 + length, channels], weight [channels, taps] (the last tap is the
/// present token's) to [batch, length, channels].
pub(super) fn short_conv(padded: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (channels, taps) = weight.dims2()?;
    let length = (padded.dim(1)? + 1).saturating_sub(taps);
    let mut out: Option<Tensor> = None;
    for tap in 0..taps {
        let weight = weight.narrow(1, tap, 1)?.reshape((1, 1, channels))?;
        let term = padded.narrow(1, tap, length)?.broadcast_mul(&weight)?;
        out = Some(match out {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    match out {
        Some(out) => Ok(out),
        None => bail!("convolution: found 0 taps, expected 1 or more"),
    }
}

/// 1 / (1 + e^-x)
pub(super) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    // 1/2 (1 + tanh(x/2)) does not overflow.
    ((x * 0.5)?.tanh()? + 1.0)? * 0.5
}

/// (x - mean) / sqrt(variance + eps) over the last axis, without weights.
pub(super) fn layer_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(variance + eps)?.sqrt()?)
}

/// A linear layer with bias, PyTorch's start.
pub(super) struct Affine {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Affine {
    pub fn new(params: &Params<'_>, name: &str, inputs: usize, outputs: usize) -> Result<Self> {
        Self::with(params, name, inputs, outputs, true)
    }

    pub fn with(
        params: &Params<'_>,
        name: &str,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Self> {
        let limit = (inputs as f64).powf(-0.5);
        let uniform = || Init::Uniform {
            low: -limit,
            high: limit,
        };
        let at = params.at(name);
        Ok(Affine {
            weight: at.get("weight", &[outputs, inputs], uniform())?,
            bias: bias
                .then(|| at.get_in("bias", &[outputs], uniform(), ParamGroup::NO_DECAY))
                .transpose()?,
        })
    }

    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// GELU, then a linear layer with a gate: what follows the linear system in S4's family.
pub(super) struct Glu(Option<Affine>);

impl Glu {
    /// `on` false: nothing follows.
    pub fn new(params: &Params<'_>, channels: usize, on: bool) -> Result<Self> {
        let affine = || Affine::new(&params.at("output_linear"), "0", channels, 2 * channels);
        Ok(Glu(on.then(affine).transpose()?))
    }

    pub fn apply(&self, y: &Tensor) -> Result<Tensor> {
        let Some(affine) = &self.0 else {
            return Ok(y.clone());
        };
        let both = affine.apply(&y.gelu_erf()?)?;
        let half = both.dim(2)? / 2;
        both.narrow(2, 0, half)? * sigmoid(&both.narrow(2, half, half)?)?
    }
}

/// ln dt log-uniform.
pub(super) fn log_steps(
    params: &Params<'_>,
    name: &str,
    count: usize,
    min: f64,
    max: f64,
) -> Vec<f64> {
    let mut random = params.random(name);
    (0..count)
        .map(|_| random.range(min.ln(), max.ln()))
        .collect()
}

/// Normal values with this deviation.
pub(super) fn normal(std: f64) -> Init {
    Init::Normal { std }
}

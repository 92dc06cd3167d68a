//! The learning norms and gates composed of tensor operations: for GPUs and floats of 16 bits, with gradients of their own.

use super::softmax_naive;
use crate::composed::{Composed, sigmoid, sum_rows, wide};
use candle_core::{D, Result, Tensor, bail};

pub(super) struct RmsNormComposed {
    pub(super) eps: f64,
}

impl RmsNormComposed {
    /// x and 1 / sqrt(mean(x²) + eps), in the type of sums.
    fn scale(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = wide(x)?;
        let mean = x.sqr()?.sum_keepdim(D::Minus1)?;
        let mean = mean.affine(1.0 / x.dim(D::Minus1)? as f64, self.eps)?;
        Ok((x, mean.sqrt()?.recip()?))
    }
}

impl Composed for RmsNormComposed {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let (wide, scale) = self.scale(&x[0])?;
        wide.broadcast_mul(&scale)?
            .to_dtype(x[0].dtype())?
            .broadcast_mul(&x[1])
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (read, scale) = self.scale(&x[0])?;
        let (gradient, weight) = (wide(gradient)?, wide(&x[1])?);
        let normed = read.broadcast_mul(&scale)?;
        let grad_weight = sum_rows(&(&gradient * &normed)?)?;
        let pulled = gradient.broadcast_mul(&weight)?;
        let mean = (&pulled * &normed)?.sum_keepdim(D::Minus1)?;
        let mean = (mean * (1.0 / read.dim(D::Minus1)? as f64))?;
        let grad_x = (pulled - normed.broadcast_mul(&mean)?)?.broadcast_mul(&scale)?;
        Ok(vec![
            grad_x.to_dtype(x[0].dtype())?,
            grad_weight.to_dtype(x[1].dtype())?,
        ])
    }
}

pub(super) struct SoftmaxComposed;

impl Composed for SoftmaxComposed {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        softmax_naive(&wide(&x[0])?)?.to_dtype(x[0].dtype())
    }

    fn backward(&self, _: &[Tensor], y: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![softmax_pull(y, gradient)?])
    }
}

/// The gradient of a softmax's input, given its output and that one's gradient.
pub(crate) fn softmax_pull(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let mean = (y * gradient)?.sum_keepdim(D::Minus1)?;
    y * gradient.broadcast_sub(&mean)?
}

pub(super) struct SiluGateComposed;

impl Composed for SiluGateComposed {
    fn name(&self) -> &'static str {
        "silu_gate"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        match x.get(1) {
            Some(up) => x[0].silu()? * up,
            None => x[0].silu(),
        }
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        // d silu = s + silu (1 - s)
        let s = sigmoid(&x[0])?;
        let silu = (&x[0] * &s)?;
        let slope = (&s + (&silu * s.affine(-1.0, 1.0)?)?)?;
        Ok(match x.get(1) {
            Some(up) => vec![((gradient * up)? * slope)?, (gradient * silu)?],
            None => vec![(gradient * slope)?],
        })
    }
}

pub(super) struct DepthwiseComposed {
    pub(super) taps: usize,
}

impl Composed for DepthwiseComposed {
    fn name(&self) -> &'static str {
        "depthwise_conv"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let length = x[0].dim(1)? - self.taps;
        let weight = x[1].t()?.contiguous()?; // [taps, width]
        let mut out: Option<Tensor> = None;
        for tap in 0..self.taps {
            let read = x[0].narrow(1, tap + 1, length)?;
            let term = read.broadcast_mul(&weight.narrow(0, tap, 1)?)?;
            out = Some(match out {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        match (out, x.get(2)) {
            (Some(out), Some(bias)) => out.broadcast_add(bias),
            (Some(out), None) => Ok(out),
            (None, _) => bail!("depthwise_conv: found 0 taps, expected 1 or more"),
        }
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (batch, length, width) = gradient.dims3()?;
        let taps = self.taps;
        let weight = x[1].t()?.contiguous()?;
        // What row r of the padded input gets is Σ_k weight_k g_{r-1-k}.
        let zeros =
            |rows: usize| Tensor::zeros((batch, rows, width), gradient.dtype(), gradient.device());
        let padded = match taps {
            1 => Tensor::cat(&[&zeros(1)?, gradient], 1)?,
            _ => Tensor::cat(&[&zeros(taps)?, gradient, &zeros(taps - 1)?], 1)?,
        };
        let mut grad_x: Option<Tensor> = None;
        let mut grad_weight = Vec::with_capacity(taps);
        for tap in 0..taps {
            let shifted = padded.narrow(1, taps - 1 - tap, taps + length)?;
            let term = shifted.broadcast_mul(&weight.narrow(0, tap, 1)?)?;
            grad_x = Some(match grad_x {
                Some(sum) => (sum + term)?,
                None => term,
            });
            let read = x[0].narrow(1, tap + 1, length)?;
            grad_weight.push(sum_rows(&wide(&(read * gradient)?)?)?);
        }
        let Some(grad_x) = grad_x else {
            bail!("depthwise_conv: found 0 taps, expected 1 or more")
        };
        let mut out = vec![
            grad_x,
            Tensor::stack(&grad_weight, 1)?.to_dtype(x[1].dtype())?,
        ];
        if let Some(bias) = x.get(2) {
            out.push(sum_rows(&wide(gradient)?)?.to_dtype(bias.dtype())?);
        }
        Ok(out)
    }
}

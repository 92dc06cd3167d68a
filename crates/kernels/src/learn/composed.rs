//! The learning norms and gates composed of tensor operations: for GPUs and floats of 16 bits, with gradients of their own.

use super::softmax_naive;
use crate::composed::{Composed, sigmoid, sum_rows, wide};
use crate::gpu::{self, Launch};
use candle_core::{D, Result, Tensor, bail};

pub(crate) struct RmsNormComposed {
    pub(crate) eps: f64,
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
        if gpu::fits(&[&x[0], &x[1]]) {
            let (rows, width) = rows_of(&x[0])?;
            let launch = Launch::rows("rms_norm", (rows, width), &[width], self.eps);
            return gpu::one(launch, &[&x[0], &x[1]], x[0].shape());
        }
        let (wide, scale) = self.scale(&x[0])?;
        wide.broadcast_mul(&scale)?
            .to_dtype(x[0].dtype())?
            .broadcast_mul(&x[1])
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (rows, width) = rows_of(&x[0])?;
        let inputs = [&x[0], &x[1], gradient];
        // A block's share of the weight's gradient is held in its shared memory.
        if gpu::fits(&inputs) && width <= 8192 {
            let blocks = rows.min(2048);
            let launch = Launch {
                shared: 4 * width,
                grid: (blocks, 1),
                ..Launch::rows("rms_norm_back", (rows, width), &[rows, width], self.eps)
            };
            let outputs = vec![
                (x[0].shape().clone(), false),
                ((blocks, width).into(), true),
            ];
            let out = gpu::run(launch, &inputs, outputs)?;
            let grad_weight = sum_rows(&out[1])?.to_dtype(x[1].dtype())?;
            return Ok(vec![out[0].clone(), grad_weight]);
        }
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

pub(super) fn rows_of(x: &Tensor) -> Result<(usize, usize)> {
    let width = x.dim(D::Minus1)?;
    Ok((x.elem_count() / width.max(1), width))
}

pub(super) struct SoftmaxComposed;

impl Composed for SoftmaxComposed {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        if gpu::fits(&[&x[0]]) {
            return Seen::of(&x[0])?.soften(&x[0], 1.0);
        }
        softmax_naive(&wide(&x[0])?)?.to_dtype(x[0].dtype())
    }

    fn backward(&self, _: &[Tensor], y: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        if gpu::fits(&[y, gradient]) {
            return Ok(vec![Seen::of(y)?.pull(y, gradient, 1.0)?]);
        }
        Ok(vec![softmax_pull(y, gradient)?])
    }
}

/// What the rows of a softmax see: row r is the query at position `first + r % rows`, among `keys` keys from position `from` on,
/// and sees its own position and the `window` - 1 before it.
pub(crate) struct Seen {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    pub(crate) first: usize,
    pub(crate) from: usize,
    pub(crate) window: usize,
}

impl Seen {
    /// Each row sees all columns of x [.., keys].
    fn of(x: &Tensor) -> Result<Seen> {
        let keys = x.dim(D::Minus1)?;
        Ok(Seen {
            rows: 1,
            keys,
            first: keys,
            from: 1,
            window: usize::MAX,
        })
    }

    fn launch(&self, name: &'static str, x: &Tensor, scale: f64) -> Launch {
        let ints = [self.rows, self.keys, self.first, self.from, self.window];
        Launch::rows(name, (x.elem_count() / self.keys, self.keys), &ints, scale)
    }

    /// softmax(scale x) of what is seen, 0 elsewhere, by a kernel on a GPU: x [.., keys] to the same.
    pub(crate) fn soften(&self, x: &Tensor, scale: f64) -> Result<Tensor> {
        let launch = self.launch("soften", x, scale);
        gpu::one(launch, &[x], x.shape())
    }

    /// The gradient of [`soften`](Self::soften)'s x, given its y and that one's gradient.
    pub(crate) fn pull(&self, y: &Tensor, gradient: &Tensor, scale: f64) -> Result<Tensor> {
        let launch = self.launch("pull", y, scale);
        gpu::one(launch, &[y, gradient], y.shape())
    }
}

/// The gradient of a softmax's input, given its output and that one's gradient.
pub(crate) fn softmax_pull(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let mean = (y * gradient)?.sum_keepdim(D::Minus1)?;
    y * gradient.broadcast_sub(&mean)?
}

pub(crate) struct SiluGateComposed;

impl Composed for SiluGateComposed {
    fn name(&self) -> &'static str {
        "silu_gate"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let inputs: Vec<&Tensor> = x.iter().collect();
        if gpu::fits(&inputs) {
            let name = if x.len() > 1 { "silu_gate" } else { "silu" };
            let count = x[0].elem_count();
            let launch = Launch::elements(name, count, &[count]);
            return gpu::one(launch, &inputs, x[0].shape());
        }
        match x.get(1) {
            Some(up) => x[0].silu()? * up,
            None => x[0].silu(),
        }
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let inputs: Vec<&Tensor> = x.iter().chain([gradient]).collect();
        if gpu::fits(&inputs) {
            let gated = x.len() > 1;
            let name = if gated { "silu_gate_back" } else { "silu_back" };
            let count = x[0].elem_count();
            let launch = Launch::elements(name, count, &[count]);
            let outputs = x.iter().map(|x| (x.shape().clone(), false));
            return gpu::run(launch, &inputs, outputs.collect());
        }
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

/// Most taps of the kernel for the weight's gradient.
const TAPS: usize = 8;

impl Composed for DepthwiseComposed {
    fn name(&self) -> &'static str {
        "depthwise_conv"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let length = x[0].dim(1)? - self.taps;
        let inputs: Vec<&Tensor> = x.iter().collect();
        let (batch, _, width) = x[0].dims3()?;
        if gpu::fits(&inputs) && batch * length > 0 {
            let name = if x.len() > 2 {
                "depthwise_bias"
            } else {
                "depthwise"
            };
            let count = batch * length * width;
            let launch = Launch::elements(name, count, &[count, length, width, self.taps]);
            return gpu::one(launch, &inputs, (batch, length, width));
        }
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
        if gpu::fits(&[&x[0], &x[1], gradient]) && taps <= TAPS {
            let count = x[0].elem_count();
            let launch = Launch::elements("depthwise_back", count, &[count, length, width, taps]);
            let mut out = vec![gpu::one(launch, &[&x[1], gradient], x[0].shape())?];
            let rows = batch * length;
            let of_block = rows.div_ceil(256).max(64);
            let blocks = rows.div_ceil(of_block);
            let launch = Launch {
                name: "depthwise_weight",
                ints: vec![rows, length, width, taps, of_block],
                float: None,
                grid: (width.div_ceil(32), blocks),
                block: (32, 8),
                shared: 0,
            };
            let partial = vec![((blocks, width * taps).into(), true)];
            let partial = gpu::run(launch, &[&x[0], gradient], partial)?.remove(0);
            let grad_weight = sum_rows(&partial)?.reshape((width, taps))?;
            out.push(grad_weight.to_dtype(x[1].dtype())?);
            if let Some(bias) = x.get(2) {
                out.push(sum_rows(gradient)?.to_dtype(bias.dtype())?);
            }
            return Ok(out);
        }
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
            grad_weight.push(sum_rows(&(read * gradient)?)?);
        }
        let Some(grad_x) = grad_x else {
            bail!("depthwise_conv: found 0 taps, expected 1 or more")
        };
        let mut out = vec![
            grad_x,
            Tensor::stack(&grad_weight, 1)?.to_dtype(x[1].dtype())?,
        ];
        if let Some(bias) = x.get(2) {
            out.push(sum_rows(gradient)?.to_dtype(bias.dtype())?);
        }
        Ok(out)
    }
}

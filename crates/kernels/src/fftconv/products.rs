//! The long convolution where the CPU's transform does not reach: on a GPU by transforms of our own where they fit
//! ([`crate::gpu::fft`]), else composed, the Fourier transform of N = N1 N2 points as products with the transforms of N1 and of
//! N2 points and a table between them (Cooley and Tukey's four steps), so O(L^1.5) work and O(L) memory per channel. Spectra
//! stay in the order the products give; the way back reads the same order.

use crate::composed::{Composed, Kept};
use crate::gpu::{self, fft::Fft};
use candle_core::{DType, Device, DeviceLocation, Result, Tensor};
use std::f64::consts::TAU;

/// u, kernel, and optionally the kernel of the other direction, as [`super::fft_conv`].
pub(super) struct Conv;

/// Tables of one size.
#[derive(Clone)]
struct Plan {
    n1: usize,
    n2: usize,
    /// [C | -S] of N1 points: [n1, 2 n1]
    first: Tensor,
    /// cos and -sin of 2π n2 k1 / N: [n2, n1]
    twiddle: (Tensor, Tensor),
    /// [[C, -S], [S, C]] of N2 points: [2 n2, 2 n2]
    second: Tensor,
}

/// The tables' sines take the host longer than a convolution takes a GPU.
static PLANS: Kept<(usize, DType, DeviceLocation), Plan> = Kept::new(8);

impl Plan {
    fn of(size: usize, dtype: DType, device: &Device) -> Result<Plan> {
        let size = size.next_power_of_two();
        let key = (size, dtype, device.location());
        PLANS.get(key, || Plan::new(size, dtype, device))
    }

    /// `size`: a power of two.
    fn new(size: usize, dtype: DType, device: &Device) -> Result<Plan> {
        let n1 = 1 << (size.trailing_zeros() / 2);
        let n2 = size / n1;
        // Products are taken modulo the number of points, so that angles keep their digits.
        let angle = |a: usize, b: usize, n: usize| TAU * ((a * b) % n) as f64 / n as f64;
        let table = |rows: usize, cols: usize, f: &dyn Fn(usize, usize) -> f64| {
            let values: Vec<f64> = (0..rows * cols).map(|at| f(at / cols, at % cols)).collect();
            Tensor::from_vec(values, (rows, cols), device)?.to_dtype(dtype)
        };
        Ok(Plan {
            n1,
            n2,
            first: table(n1, 2 * n1, &|i, j| match j < n1 {
                true => angle(i, j, n1).cos(),
                false => -angle(i, j - n1, n1).sin(),
            })?,
            twiddle: (
                table(n2, n1, &|i, j| angle(i, j, size).cos())?,
                table(n2, n1, &|i, j| -angle(i, j, size).sin())?,
            ),
            second: table(2 * n2, 2 * n2, &|i, j| {
                let a = angle(i % n2, j % n2, n2);
                match (i < n2, j < n2) {
                    (true, true) | (false, false) => a.cos(),
                    (true, false) => -a.sin(),
                    (false, true) => a.sin(),
                }
            })?,
        })
    }

    /// x [rows, count] with zeros after it, to the parts of its spectrum: [rows, n1, n2] each.
    fn spectrum(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let &Plan { n1, n2, .. } = self;
        let (rows, count) = x.dims2()?;
        let x = x
            .pad_with_zeros(1, 0, n1 * n2 - count)?
            .reshape((rows, n1, n2))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((rows * n2, n1))?;
        let y = x.matmul(&self.first)?.reshape((rows, n2, 2 * n1))?;
        let (re, im) = (y.narrow(2, 0, n1)?, y.narrow(2, n1, n1)?);
        let (c, s) = &self.twiddle;
        let turned = |a: &Tensor, x: &Tensor, b: &Tensor, y: &Tensor| {
            a.broadcast_mul(x)?.add(&b.broadcast_mul(y)?)
        };
        let (re, im) = (turned(&re, c, &im, &s.neg()?)?, turned(&re, s, &im, c)?);
        // [rows, n2, n1] twice -> [rows n1, 2 n2]
        let both = Tensor::cat(&[re.transpose(1, 2)?, im.transpose(1, 2)?], 2)?
            .contiguous()?
            .reshape((rows * n1, 2 * n2))?;
        let y = both.matmul(&self.second)?.reshape((rows, n1, 2 * n2))?;
        Ok((
            y.narrow(2, 0, n2)?.contiguous()?,
            y.narrow(2, n2, n2)?.contiguous()?,
        ))
    }

    /// The real sequences of these spectra: [rows, n1 n2].
    fn sequence(&self, (re, im): &(Tensor, Tensor)) -> Result<Tensor> {
        let &Plan { n1, n2, .. } = self;
        let rows = re.dim(0)?;
        let both = Tensor::cat(&[re, im], 2)?.reshape((rows * n1, 2 * n2))?;
        // The inverse is the transpose: [[C, S], [-S, C]].
        let y = both
            .matmul(&self.second.t()?)?
            .reshape((rows, n1, 2 * n2))?;
        let (re, im) = (
            y.narrow(2, 0, n2)?.transpose(1, 2)?,
            y.narrow(2, n2, n2)?.transpose(1, 2)?,
        );
        let (c, s) = &self.twiddle; // s = -sin
        let (real, imaginary) = (
            re.broadcast_mul(c)?.add(&im.broadcast_mul(s)?)?,
            im.broadcast_mul(c)?.sub(&re.broadcast_mul(s)?)?,
        );
        // Re((a + ib)(C + iS)) = a C - b S
        let both = Tensor::cat(&[&real, &imaginary], 2)?
            .contiguous()?
            .reshape((rows * n2, 2 * n1))?;
        let x = both
            .matmul(&self.first.t()?)?
            .reshape((rows, n2, n1))?
            .transpose(1, 2)?
            .contiguous()?;
        x.reshape((rows, n1 * n2))? * (1.0 / (n1 * n2) as f64)
    }
}

/// a b, or conj(a) b; rows of `a` [channels, ..] serve all of a batch in b [batch, channels, ..].
fn multiply(
    a: &(Tensor, Tensor),
    b: &(Tensor, Tensor),
    conjugate: bool,
) -> Result<(Tensor, Tensor)> {
    let times = |x: &Tensor, y: &Tensor| x.broadcast_mul(y);
    let (rr, ii) = (times(&b.0, &a.0)?, times(&b.1, &a.1)?);
    let (ri, ir) = (times(&b.1, &a.0)?, times(&b.0, &a.1)?);
    Ok(match conjugate {
        false => ((rr - ii)?, (ri + ir)?),
        true => ((rr + ii)?, (ri - ir)?),
    })
}

struct Sizes {
    batch: usize,
    channels: usize,
    length: usize,
    taps: usize,
    reverse: usize,
}

impl Sizes {
    fn of(x: &[Tensor]) -> Result<Sizes> {
        let (batch, channels, length) = x[0].dims3()?;
        let used = |k: &Tensor| k.dim(1).map(|taps| taps.min(length));
        Ok(Sizes {
            batch,
            channels,
            length,
            taps: used(&x[1])?,
            reverse: x.get(2).map(used).transpose()?.unwrap_or(0),
        })
    }

    fn plan(&self, like: &Tensor) -> Result<Plan> {
        let size = self.length + self.taps.max(1) + self.reverse;
        Plan::of(size, like.dtype(), like.device())
    }

    fn points(&self, plan: &Plan) -> (usize, usize, usize, usize) {
        (self.batch, self.channels, plan.n1, plan.n2)
    }

    /// The spectrum of the kernels on a circle: [channels, n1, n2].
    fn kernel(&self, x: &[Tensor], plan: &Plan) -> Result<(Tensor, Tensor)> {
        let size = plan.n1 * plan.n2;
        let kernel = x[1].narrow(1, 0, self.taps)?;
        let circle = match x.get(2) {
            Some(reverse) if self.reverse > 0 => {
                // Tap j stands at the circle's end, place size - 1 - j.
                let turned = turn(&reverse.narrow(1, 0, self.reverse)?)?;
                let gap = size - self.taps - self.reverse;
                Tensor::cat(&[&kernel.pad_with_zeros(1, 0, gap)?, &turned], 1)?
            }
            _ => kernel,
        };
        plan.spectrum(&circle.contiguous()?)
    }

    /// The spectrum of rows: [batch, channels, n1, n2].
    fn rows(&self, x: &Tensor, plan: &Plan) -> Result<(Tensor, Tensor)> {
        let flat = x.reshape((self.batch * self.channels, self.length))?;
        let (re, im) = plan.spectrum(&flat)?;
        let shape = self.points(plan);
        Ok((re.reshape(shape)?, im.reshape(shape)?))
    }

    fn back(&self, (re, im): &(Tensor, Tensor), plan: &Plan) -> Result<Tensor> {
        let shape = (self.batch * self.channels, plan.n1, plan.n2);
        plan.sequence(&(re.reshape(shape)?, im.reshape(shape)?))?
            .narrow(1, 0, self.length)?
            .contiguous()?
            .reshape((self.batch, self.channels, self.length))
    }
}

/// Columns in the other order.
fn turn(x: &Tensor) -> Result<Tensor> {
    let count = x.dim(1)? as u32;
    let order = Tensor::from_iter((0..count).rev(), x.device())?;
    x.contiguous()?.index_select(&order, 1)
}

impl Composed for Conv {
    fn name(&self) -> &'static str {
        "fft_conv"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        if let Some(fft) = Fft::of(x)? {
            return fft.forward(x);
        }
        let sizes = Sizes::of(x)?;
        let plan = sizes.plan(&x[0])?;
        let kernel = sizes.kernel(x, &plan)?;
        let u = sizes.rows(&x[0], &plan)?;
        sizes.back(&multiply(&kernel, &u, false)?, &plan)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        if let Some(fft) = Fft::of(x)?
            && gpu::fits(&[&x[0], gradient])
        {
            return fft.backward(x, gradient);
        }
        let sizes = Sizes::of(x)?;
        let plan = sizes.plan(&x[0])?;
        let kernel = sizes.kernel(x, &plan)?;
        let (u, g) = (sizes.rows(&x[0], &plan)?, sizes.rows(gradient, &plan)?);
        let grad_u = sizes.back(&multiply(&kernel, &g, true)?, &plan)?;
        // The circle's gradient: Σ over the batch of the correlation of u and the output's gradient.
        let (re, im) = multiply(&u, &g, true)?;
        let circle = plan.sequence(&(re.sum(0)?, im.sum(0)?))?;
        let size = plan.n1 * plan.n2;
        let padded = |part: Tensor, taps: usize| {
            let rest = taps - part.dim(1)?;
            part.contiguous()?.pad_with_zeros(1, 0, rest)
        };
        let mut out = vec![
            grad_u,
            padded(circle.narrow(1, 0, sizes.taps)?, x[1].dim(1)?)?,
        ];
        if let Some(reverse) = x.get(2) {
            let part = turn(&circle.narrow(1, size - sizes.reverse, sizes.reverse)?)?;
            out.push(padded(part, reverse.dim(1)?)?);
        }
        Ok(out)
    }
}

//! Norms and gates that learn, each one operation with its analytic gradient: what a composition of tensor operations would
//! read and write ten times is read and written once.

pub(crate) mod composed;
mod skip;

pub use skip::skip;

use crate::autograd::{Kernel, Real, apply};
use crate::composed::{composes, node};
use crate::cpu::Level;
use crate::dense::uninit;
use crate::elementwise::split_rows;
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};
use composed::{DepthwiseComposed, RmsNormComposed, SiluGateComposed, SoftmaxComposed};

/// Compiles a body for each vector width.
macro_rules! levels {
    ($vis:vis $name:ident / $body:ident / $wide:ident / $middle:ident ($($arg:ident: $ty:ty),* $(,)?)) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn $wide<T: Real>($($arg: $ty),*) { $body($($arg),*) }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $middle<T: Real>($($arg: $ty),*) { $body($($arg),*) }
        $vis fn $name<T: Real>(level: Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level says that the CPU has the features.
            match level {
                Level::Amx | Level::Avx512 => return unsafe { $wide($($arg),*) },
                Level::Avx2 => return unsafe { $middle($($arg),*) },
                Level::Portable => {}
            }
            let _ = level;
            $body($($arg),*)
        }
    };
}
pub(crate) use levels;

/// x / sqrt(mean(x²) + eps) weight over rows of the weight's width: x [.., width] to the same.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = weight.elem_count();
    if x.dims().last() != Some(&width) || weight.rank() != 1 || width == 0 {
        bail!(
            "rms_norm: found x {:?} and weight {:?}, expected [.., width] and [width]",
            x.dims(),
            weight.dims()
        );
    }
    if composes(x) {
        return node(RmsNormComposed { eps }, &[x, weight]);
    }
    let op = RmsNorm {
        level: Level::current(),
        eps,
        shape: x.dims().to_vec(),
    };
    apply(op, &[x, weight])
}

struct RmsNorm {
    level: Level,
    eps: f64,
    shape: Vec<usize>,
}

/// Sixteen partial sums: the compiler may not reorder one.
#[inline(always)]
fn dot<T: Real>(a: impl Iterator<Item = T>) -> T {
    let mut sums = [T::zero(); 16];
    let mut lane = 0;
    for x in a {
        sums[lane] += x;
        lane = (lane + 1) % 16;
    }
    sums.into_iter().sum()
}

#[inline(always)]
fn sum_products<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 16];
    let (mut left, mut right) = (a.chunks_exact(16), b.chunks_exact(16));
    for (a, b) in (&mut left).zip(&mut right) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest = left.remainder().iter().zip(right.remainder());
    sums.into_iter().sum::<T>() + dot(rest.map(|(&a, &b)| a * b))
}

levels!(norm_rows / norm_body / norm_wide / norm_middle (x: &[T], weight: &[T], eps: T, out: &mut [T]));
levels!(norm_back / norm_back_body / norm_back_wide / norm_back_middle (
    x: &[T], weight: &[T], eps: T, gradient: &[T], grad_x: &mut [T], grad_weight: &mut [T]
));

#[inline(always)]
fn norm_body<T: Real>(x: &[T], weight: &[T], eps: T, out: &mut [T]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let scale = T::one() / (sum_products(x, x) / T::of(width as f64) + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

#[inline(always)]
fn norm_back_body<T: Real>(
    x: &[T],
    weight: &[T],
    eps: T,
    gradient: &[T],
    grad_x: &mut [T],
    grad_weight: &mut [T],
) {
    let width = weight.len();
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((x, gradient), grad_x) in rows.zip(grad_x.chunks_exact_mut(width)) {
        let mean = sum_products(x, x) / T::of(width as f64) + eps;
        let scale = T::one() / mean.sqrt();
        // grad_x holds gradient times weight for a moment.
        for ((grad_x, &g), &w) in grad_x.iter_mut().zip(gradient).zip(weight) {
            *grad_x = g * w;
        }
        let pull = sum_products(grad_x, x) * scale / (mean * T::of(width as f64));
        for ((grad_x, &x), (grad_w, &g)) in grad_x
            .iter_mut()
            .zip(x)
            .zip(grad_weight.iter_mut().zip(gradient))
        {
            *grad_w += g * x * scale;
            *grad_x = *grad_x * scale - x * pull;
        }
    }
}

/// Rows of a group that sum their own weight gradient: their number does not depend on threads, so sums do not either.
const GROUP: usize = 256;

impl Kernel for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let out = norm_all(self.level, inputs[0], inputs[1], T::of(self.eps));
        (out, self.shape.clone())
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let eps = T::of(self.eps);
        let (grad_x, grad_weight) = norm_back_all(self.level, inputs[0], inputs[1], eps, gradient);
        vec![grad_x, grad_weight]
    }
}

/// RMSNorm of rows as wide as the weight.
pub(crate) fn norm_all<T: Real>(level: Level, x: &[T], weight: &[T], eps: T) -> Vec<T> {
    let width = weight.len();
    let mut out = uninit(x.len());
    let shared = SharedMut::new(&mut out);
    split_rows(x.len() / width, width, |first, rows| {
        // SAFETY: pieces are disjoint row ranges.
        let out = unsafe { shared.slice(first * width, rows * width) };
        let x = &x[first * width..(first + rows) * width];
        norm_rows(level, x, weight, eps, out);
    });
    out
}

/// Gradients of x and of the weight of [`norm_all`].
pub(crate) fn norm_back_all<T: Real>(
    level: Level,
    x: &[T],
    weight: &[T],
    eps: T,
    gradient: &[T],
) -> (Vec<T>, Vec<T>) {
    let width = weight.len();
    let rows = x.len() / width;
    let groups = rows.div_ceil(GROUP);
    let mut grad_x = uninit(x.len());
    let mut partial = vec![T::zero(); groups * width];
    let (out, sums) = (SharedMut::new(&mut grad_x), SharedMut::new(&mut partial));
    split_rows(groups, GROUP * width, |first, count| {
        for group in first..first + count {
            let range = group * GROUP * width..((group + 1) * GROUP).min(rows) * width;
            // SAFETY: groups are disjoint.
            let (grad_x, sum) = unsafe {
                (
                    out.slice(range.start, range.len()),
                    sums.slice(group * width, width),
                )
            };
            let (x, gradient) = (&x[range.clone()], &gradient[range]);
            norm_back(level, x, weight, eps, gradient, grad_x, sum);
        }
    });
    (grad_x, added_up(&partial, width))
}

/// Sum of rows.
fn added_up<T: Real>(rows: &[T], width: usize) -> Vec<T> {
    let mut sum = vec![T::zero(); width];
    for row in rows.chunks_exact(width) {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
    }
    sum
}

/// Softmax over the last axis; -inf gets 0.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    if width == 0 {
        bail!(
            "softmax: found {:?}, expected values on the last axis",
            x.dims()
        );
    }
    if composes(x) {
        return node(SoftmaxComposed, &[x]);
    }
    let op = Softmax {
        level: Level::current(),
        width,
        shape: x.dims().to_vec(),
    };
    apply(op, &[x])
}

/// The naive twin of [`softmax`], of candle operations, for any device and type.
pub fn softmax_naive(x: &Tensor) -> Result<Tensor> {
    let top = x.max_keepdim(candle_core::D::Minus1)?.detach();
    let weights = x.broadcast_sub(&top)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(candle_core::D::Minus1)?)
}

struct Softmax {
    level: Level,
    width: usize,
    shape: Vec<usize>,
}

levels!(softmax_rows / softmax_body / softmax_wide / softmax_middle (x: &[T], width: usize, out: &mut [T]));
levels!(softmax_back / softmax_back_body / softmax_back_wide / softmax_back_middle (
    y: &[T], width: usize, gradient: &[T], out: &mut [T]
));

#[inline(always)]
fn softmax_body<T: Real>(x: &[T], width: usize, out: &mut [T]) {
    // Below this e^x is 0 in f32.
    let least = T::of(-103.0);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let top = x
            .iter()
            .fold(T::neg_infinity(), |m, &x| if x > m { x } else { m });
        for (out, &x) in out.iter_mut().zip(x) {
            let far = x - top;
            let e = far.exp_fast();
            *out = if far < least { T::zero() } else { e };
        }
        let scale = T::one() / dot(out.iter().copied());
        out.iter_mut().for_each(|out| *out *= scale);
    }
}

#[inline(always)]
fn softmax_back_body<T: Real>(y: &[T], width: usize, gradient: &[T], out: &mut [T]) {
    let rows = y.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((y, gradient), out) in rows.zip(out.chunks_exact_mut(width)) {
        let mean = sum_products(y, gradient);
        for ((out, &y), &g) in out.iter_mut().zip(y).zip(gradient) {
            *out = y * (g - mean);
        }
    }
}

impl Kernel for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (x, width) = (inputs[0], self.width);
        let mut out = uninit(x.len());
        let shared = SharedMut::new(&mut out);
        split_rows(x.len() / width, width, |first, rows| {
            let range = first * width..(first + rows) * width;
            // SAFETY: pieces are disjoint row ranges.
            let out = unsafe { shared.slice(range.start, range.len()) };
            softmax_rows(self.level, &x[range], width, out);
        });
        (out, self.shape.clone())
    }

    fn backward<T: Real>(&self, _: &[&[T]], y: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let width = self.width;
        let mut out = uninit(y.len());
        let shared = SharedMut::new(&mut out);
        split_rows(y.len() / width, width, |first, rows| {
            let range = first * width..(first + rows) * width;
            // SAFETY: as above.
            let out = unsafe { shared.slice(range.start, range.len()) };
            softmax_back(self.level, &y[range.clone()], width, &gradient[range], out);
        });
        vec![out]
    }
}

/// Negative log-likelihood of targets under logits [rows, vocab]: [rows], f32.
pub fn nll(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let rows = targets.len();
    let logits = logits.to_dtype(candle_core::DType::F32)?;
    let top = logits.max_keepdim(candle_core::D::Minus1)?.detach();
    let sum = logits
        .broadcast_sub(&top)?
        .exp()?
        .sum_keepdim(candle_core::D::Minus1)?;
    let log_z = (sum.log()? + top)?;
    let index = Tensor::from_slice(targets, (rows, 1), logits.device())?;
    (log_z - logits.gather(&index, 1)?)?.squeeze(1)
}

/// silu(gate) times up, or silu alone: `up` of the same shape, or none.
pub fn silu_gate(gate: &Tensor, up: Option<&Tensor>) -> Result<Tensor> {
    if let Some(up) = up
        && up.dims() != gate.dims()
    {
        bail!(
            "silu_gate: found shapes {:?} and {:?}, expected the same",
            gate.dims(),
            up.dims()
        );
    }
    if composes(gate) {
        return match up {
            Some(up) => node(SiluGateComposed, &[gate, up]),
            None => node(SiluGateComposed, &[gate]),
        };
    }
    let op = SiluGate {
        level: Level::current(),
        shape: gate.dims().to_vec(),
    };
    match up {
        Some(up) => apply(op, &[gate, up]),
        None => apply(op, &[gate]),
    }
}

struct SiluGate {
    level: Level,
    shape: Vec<usize>,
}

levels!(pub(crate) silu_rows / silu_body / silu_wide / silu_middle (gate: &[T], up: Option<&[T]>, out: &mut [T]));
levels!(silu_back / silu_back_body / silu_back_wide / silu_back_middle (
    gate: &[T], up: Option<&[T]>, gradient: &[T], grad_gate: &mut [T], grad_up: Option<&mut [T]>
));

#[inline(always)]
fn silu_body<T: Real>(gate: &[T], up: Option<&[T]>, out: &mut [T]) {
    match up {
        Some(up) => {
            for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                *out = g * g.sigmoid() * u;
            }
        }
        None => {
            for (out, &g) in out.iter_mut().zip(gate) {
                *out = g * g.sigmoid();
            }
        }
    }
}

#[inline(always)]
fn silu_back_body<T: Real>(
    gate: &[T],
    up: Option<&[T]>,
    gradient: &[T],
    grad_gate: &mut [T],
    grad_up: Option<&mut [T]>,
) {
    // d silu = s (1 + g (1 - s))
    match (up, grad_up) {
        (Some(up), Some(grad_up)) => {
            let inputs = gate.iter().zip(up).zip(gradient);
            for (((&g, &u), &y), (grad_gate, grad_up)) in
                inputs.zip(grad_gate.iter_mut().zip(grad_up))
            {
                let s = g.sigmoid();
                *grad_gate = y * u * (s * (T::one() + g * (T::one() - s)));
                *grad_up = y * (g * s);
            }
        }
        _ => {
            for ((&g, &y), grad_gate) in gate.iter().zip(gradient).zip(grad_gate) {
                let s = g.sigmoid();
                *grad_gate = y * (s * (T::one() + g * (T::one() - s)));
            }
        }
    }
}

/// Elements of a piece.
const PIECE: usize = 1024;

impl Kernel for SiluGate {
    fn name(&self) -> &'static str {
        "silu_gate"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let count = inputs[0].len();
        let mut out = uninit(count);
        let shared = SharedMut::new(&mut out);
        split_rows(count.div_ceil(PIECE), PIECE, |first, pieces| {
            let range = first * PIECE..((first + pieces) * PIECE).min(count);
            // SAFETY: pieces are disjoint.
            let out = unsafe { shared.slice(range.start, range.len()) };
            let up = inputs.get(1).map(|up| &up[range.clone()]);
            silu_rows(self.level, &inputs[0][range], up, out);
        });
        (out, self.shape.clone())
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let count = inputs[0].len();
        let mut grads: Vec<Vec<T>> = inputs.iter().map(|x| uninit(x.len())).collect();
        let shared: Vec<SharedMut<T>> = grads.iter_mut().map(|g| SharedMut::new(g)).collect();
        split_rows(count.div_ceil(PIECE), PIECE, |first, pieces| {
            let range = first * PIECE..((first + pieces) * PIECE).min(count);
            // SAFETY: pieces are disjoint.
            let slice = |to: &SharedMut<T>| unsafe {
                std::slice::from_raw_parts_mut(to.at(range.start), range.len())
            };
            silu_back(
                self.level,
                &inputs[0][range.clone()],
                inputs.get(1).map(|up| &up[range.clone()]),
                &gradient[range.clone()],
                slice(&shared[0]),
                shared.get(1).map(slice),
            );
        });
        grads
    }
}

/// Causal depthwise convolution: padded [batch, taps + length, width], the first taps of it what stood before, weight
/// [width, taps], bias [width] to [batch, length, width]: `out_t = bias + Σ_k weight_k padded_{t+1+k}`.
pub fn depthwise_conv(padded: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (batch, rows, width) = padded.dims3()?;
    let taps = match weight.dims() {
        &[w, taps] if w == width && taps <= rows => taps,
        other => {
            bail!("depthwise_conv: found weight {other:?}, expected [{width}, at most {rows}]")
        }
    };
    if composes(padded) {
        let op = DepthwiseComposed { taps };
        if rows == taps {
            return Tensor::zeros((batch, 0, width), padded.dtype(), padded.device());
        }
        return match bias {
            Some(bias) => node(op, &[padded, weight, bias]),
            None => node(op, &[padded, weight]),
        };
    }
    let op = Depthwise {
        level: Level::current(),
        batch,
        length: rows - taps,
        width,
        taps,
    };
    match bias {
        Some(bias) if bias.dims() != [width] => {
            bail!(
                "depthwise_conv: found bias {:?}, expected [{width}]",
                bias.dims()
            )
        }
        Some(bias) => apply(op, &[padded, weight, bias]),
        None => apply(op, &[padded, weight]),
    }
}

struct Depthwise {
    level: Level,
    batch: usize,
    length: usize,
    width: usize,
    taps: usize,
}

levels!(add_scaled / add_scaled_body / add_scaled_wide / add_scaled_middle (out: &mut [T], x: &[T], w: &[T]));

/// out += x w, elementwise.
#[inline(always)]
fn add_scaled_body<T: Real>(out: &mut [T], x: &[T], w: &[T]) {
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *out += x * w;
    }
}

/// Channels of a job.
const CHANNELS: usize = 64;

impl Depthwise {
    /// Weights of channels from `first` on, tap by tap: [taps][count].
    fn taps<T: Real>(&self, weight: &[T], first: usize, count: usize) -> Vec<Vec<T>> {
        (0..self.taps)
            .map(|k| {
                (first..first + count)
                    .map(|c| weight[c * self.taps + k])
                    .collect()
            })
            .collect()
    }

    fn each(&self, task: impl Fn(usize, usize) + Sync) {
        Pool::global().for_each(self.width.div_ceil(CHANNELS), |part| {
            let first = part * CHANNELS;
            task(first, CHANNELS.min(self.width - first));
        });
    }
}

impl Kernel for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise_conv"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let &Depthwise {
            batch,
            length,
            width,
            taps,
            ..
        } = self;
        let mut out = vec![T::zero(); batch * length * width];
        let shared = SharedMut::new(&mut out);
        self.each(|first, count| {
            let weights = self.taps(inputs[1], first, count);
            for b in 0..batch {
                for t in 0..length {
                    // SAFETY: these channels belong to this job alone.
                    let out = unsafe { shared.slice((b * length + t) * width + first, count) };
                    if let Some(bias) = inputs.get(2) {
                        out.copy_from_slice(&bias[first..first + count]);
                    }
                    for (k, weight) in weights.iter().enumerate() {
                        let row = (b * (taps + length) + t + 1 + k) * width + first;
                        add_scaled(self.level, out, &inputs[0][row..row + count], weight);
                    }
                }
            }
        });
        (out, vec![batch, length, width])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let &Depthwise {
            batch,
            length,
            width,
            taps,
            ..
        } = self;
        let mut grads: Vec<Vec<T>> = inputs.iter().map(|x| vec![T::zero(); x.len()]).collect();
        let shared: Vec<SharedMut<T>> = grads.iter_mut().map(|g| SharedMut::new(g)).collect();
        self.each(|first, count| {
            let weights = self.taps(inputs[1], first, count);
            let mut grad_weights = vec![vec![T::zero(); count]; taps];
            let mut grad_bias = vec![T::zero(); count];
            let ones = vec![T::one(); count];
            for b in 0..batch {
                for t in 0..length {
                    let grad = &gradient[(b * length + t) * width + first..][..count];
                    add_scaled(self.level, &mut grad_bias, grad, &ones);
                    for k in 0..taps {
                        let row = (b * (taps + length) + t + 1 + k) * width + first;
                        // SAFETY: these channels belong to this job alone.
                        let grad_row = unsafe { shared[0].slice(row, count) };
                        add_scaled(self.level, grad_row, grad, &weights[k]);
                        let x = &inputs[0][row..row + count];
                        add_scaled(self.level, &mut grad_weights[k], x, grad);
                    }
                }
            }
            for c in 0..count {
                for (k, grad) in grad_weights.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { *shared[1].at((first + c) * taps + k) = grad[c] };
                }
            }
            if let Some(bias) = shared.get(2) {
                // SAFETY: as above.
                unsafe { bias.slice(first, count) }.copy_from_slice(&grad_bias);
            }
        });
        grads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness;
    use candle_core::Device;

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 252.25 - 2.0)
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (x, w, up) = (
            tensor(&[3, 2, 19], 1),
            tensor(&[19], 2),
            tensor(&[3, 2, 19], 3),
        );
        let error = gradient_error(&[x.clone(), w.clone()], 1e-6, &|t| {
            rms_norm(&t[0], &t[1], 1e-5)
        })
        .unwrap();
        assert!(error < 1e-6, "rms_norm {error}");
        let error =
            gradient_error(&[x.clone(), up], 1e-6, &|t| silu_gate(&t[0], Some(&t[1]))).unwrap();
        assert!(error < 1e-6, "silu_gate {error}");
        let error =
            gradient_error(std::slice::from_ref(&x), 1e-6, &|t| silu_gate(&t[0], None)).unwrap();
        assert!(error < 1e-6, "silu {error}");
        assert!(rms_norm(&x, &tensor(&[18], 1), 1e-5).is_err());
        assert!(silu_gate(&x, Some(&w)).is_err());
    }

    #[test]
    fn softmax_is_its_naive_form_at_every_level_and_masks_get_nothing() {
        let x = (tensor(&[3, 4, 21], 1) * 20.0).unwrap();
        let error = gradient_error(&[tensor(&[2, 3, 5], 2)], 1e-6, &|t| softmax(&t[0])).unwrap();
        assert!(error < 1e-7, "{error}");
        let mask: Vec<f64> = (0..21)
            .map(|j| if j % 4 == 1 { f64::NEG_INFINITY } else { 0.0 })
            .collect();
        let x = x
            .broadcast_add(&Tensor::new(mask, &Device::Cpu).unwrap())
            .unwrap();
        let wanted = harness::flat(&softmax_naive(&x).unwrap());
        assert!(harness::distance(&softmax(&x).unwrap(), &softmax_naive(&x).unwrap()) < 1e-14);
        let narrow: Vec<f32> = harness::flat(&x).iter().map(|&x| x as f32).collect();
        for level in Level::available() {
            let op = Softmax {
                level,
                width: 21,
                shape: vec![12, 21],
            };
            let (found, _) = op.forward(&[&narrow]);
            for (j, (&found, wanted)) in found.iter().zip(&wanted).enumerate() {
                assert!(
                    (f64::from(found) - wanted).abs() < 1e-5 * wanted + 1e-12,
                    "{level:?}"
                );
                assert!(j % 21 % 4 != 1 || found == 0.0);
            }
        }
    }

    #[test]
    fn convolutions_are_their_sums_at_every_level() {
        let (batch, length, width, taps) = (2, 5, 70, 3);
        let padded = tensor(&[batch, taps + length, width], 1);
        let (weight, bias) = (tensor(&[width, taps], 2), tensor(&[width], 3));
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (p, w, b) = (flat(&padded), flat(&weight), flat(&bias));
        let mut wanted = Vec::new();
        for s in 0..batch {
            for t in 0..length {
                for c in 0..width {
                    let at = |k: usize| p[(s * (taps + length) + t + 1 + k) * width + c];
                    wanted.push(b[c] + (0..taps).map(|k| w[c * taps + k] * at(k)).sum::<f64>());
                }
            }
        }
        let found = flat(&depthwise_conv(&padded, &weight, Some(&bias)).unwrap());
        assert!(
            found
                .iter()
                .zip(&wanted)
                .all(|(a, b)| (a - b).abs() < 1e-12)
        );
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (p, w, b) = (narrow(&p), narrow(&w), narrow(&b));
        for level in Level::available() {
            let op = Depthwise {
                level,
                batch,
                length,
                width,
                taps,
            };
            let (found, _) = op.forward(&[&p[..], &w, &b]);
            assert!(
                found
                    .iter()
                    .zip(&wanted)
                    .all(|(&a, b)| (f64::from(a) - b).abs() < 1e-5),
                "{level:?}"
            );
        }
        let small = [tensor(&[2, 6, 3], 1), tensor(&[3, 2], 2), tensor(&[3], 3)];
        let error =
            gradient_error(&small, 1e-6, &|t| depthwise_conv(&t[0], &t[1], Some(&t[2]))).unwrap();
        assert!(error < 1e-6, "{error}");
        let error =
            gradient_error(&small[..2], 1e-6, &|t| depthwise_conv(&t[0], &t[1], None)).unwrap();
        assert!(error < 1e-6, "{error}");
        assert!(depthwise_conv(&padded, &bias.unsqueeze(0).unwrap(), None).is_err());
    }

    #[test]
    fn every_level_agrees_with_the_composed_form() {
        let (rows, width) = (601, 37);
        let (x, weight, up) = (
            tensor(&[rows, width], 1),
            tensor(&[width], 2),
            tensor(&[rows, width], 3),
        );
        let mean = (x.sqr().unwrap().mean_keepdim(1).unwrap() + 1e-5).unwrap();
        let normed = x
            .broadcast_div(&mean.sqrt().unwrap())
            .unwrap()
            .broadcast_mul(&weight)
            .unwrap();
        let gated = (x.silu().unwrap() * &up).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let narrow = |x: &Tensor| flat(x).iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let near = |found: &[f32], wanted: &[f64], what: &str| {
            let largest = wanted.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
            for (&found, wanted) in found.iter().zip(wanted) {
                assert!(
                    (f64::from(found) - wanted).abs() < 3e-6 * largest,
                    "{what}: {found} {wanted}"
                );
            }
        };
        let gradient: Vec<f64> = (0..rows * width)
            .map(|i| ((i * 31) % 17) as f64 / 8.0 - 1.0)
            .collect();
        let narrow_gradient: Vec<f32> = gradient.iter().map(|&g| g as f32).collect();
        let norm = |level| RmsNorm {
            level,
            eps: 1e-5,
            shape: vec![rows, width],
        };
        let gate = |level| SiluGate {
            level,
            shape: vec![rows, width],
        };
        let exact = (
            norm(Level::Portable).backward(&[&flat(&x), &flat(&weight)], &[], &gradient),
            gate(Level::Portable).backward(&[&flat(&x), &flat(&up)], &[], &gradient),
        );
        for level in Level::available() {
            let (x, weight, up) = (narrow(&x), narrow(&weight), narrow(&up));
            near(
                &norm(level).forward(&[&x[..], &weight]).0,
                &flat(&normed),
                "norm",
            );
            near(
                &gate(level).forward(&[&x[..], &up]).0,
                &flat(&gated),
                "gate",
            );
            let found = norm(level).backward(&[&x[..], &weight], &[], &narrow_gradient);
            found
                .iter()
                .zip(&exact.0)
                .for_each(|(f, e)| near(f, e, "norm back"));
            let found = gate(level).backward(&[&x[..], &up], &[], &narrow_gradient);
            found
                .iter()
                .zip(&exact.1)
                .for_each(|(f, e)| near(f, e, "gate back"));
        }
    }
}

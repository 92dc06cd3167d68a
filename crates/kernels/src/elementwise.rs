//! The small operations between matrix products: norms, activations, rotary rotation.
//!
//! Each body is written once as plain loops and compiled for every dispatch level; what limits
//! them is memory, so they are split over the pool only when there are many rows.

use crate::cpu::Level;
use crate::pool::{Pool, SharedMut};

/// Compiles one plain-loop body for each vector width and picks by [`Level::current`].
macro_rules! multiversion {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                unsafe fn wide($($arg: $ty),*) { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn middle($($arg: $ty),*) { body($($arg),*) }
                // SAFETY: the level says that the CPU has the features.
                match Level::current() {
                    Level::Amx | Level::Avx512 => return unsafe { wide($($arg),*) },
                    Level::Avx2 => return unsafe { middle($($arg),*) },
                    Level::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}

/// Rows at least this many elements together are worth a fork-join.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Runs `task(first_row, rows)` over `0..rows` in parallel slices when the work is large.
pub fn split_rows(rows: usize, width: usize, task: impl Fn(usize, usize) + Sync) {
    let pool = Pool::global();
    if rows * width < PARALLEL_ELEMENTS || pool.threads() == 1 {
        return task(0, rows);
    }
    let pieces = (pool.threads() * 4).min(rows);
    pool.for_each_in_runs(pieces, |piece| {
        let (first, end) = (rows * piece / pieces, rows * (piece + 1) / pieces);
        task(first, end - first);
    });
}

/// `out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight`; x, out: [rows, width], width = weight.len().
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        x.len() == out.len() && x.len().is_multiple_of(width),
        "rms_norm: ragged rows"
    );
    let shared = SharedMut::new(out);
    split_rows(x.len() / width, width, |first, rows| {
        // SAFETY: pieces are disjoint row ranges.
        let out = unsafe { shared.slice(first * width, rows * width) };
        rms_norm_rows(&x[first * width..(first + rows) * width], weight, eps, out);
    });
}

multiversion! {
    fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let scale = 1.0 / (sum_of_squares(x) / width as f32 + eps).sqrt();
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        }
    }
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 32];
    let mut chunks = x.chunks_exact(32);
    for chunk in &mut chunks {
        for lane in 0..32 {
            lanes[lane] += chunk[lane] * chunk[lane];
        }
    }
    let tail: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    lanes.iter().sum::<f32>() + tail
}

/// `out[row] = (x[row] - mean) / sqrt(variance + eps) * weight + bias`, the variance that of the whole row;
/// x, out: [rows, width], width = weight.len() = bias.len().
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        x.len() == out.len() && bias.len() == width && x.len().is_multiple_of(width),
        "layer_norm: ragged rows"
    );
    let shared = SharedMut::new(out);
    split_rows(x.len() / width, width, |first, rows| {
        // SAFETY: pieces are disjoint row ranges.
        let out = unsafe { shared.slice(first * width, rows * width) };
        let x = &x[first * width..(first + rows) * width];
        layer_norm_rows(x, weight, bias, eps, out);
    });
}

multiversion! {
    fn layer_norm_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mean = sum(x) / width as f32;
            for (out, &x) in out.iter_mut().zip(x) {
                *out = x - mean;
            }
            let scale = 1.0 / (sum_of_squares(out) / width as f32 + eps).sqrt();
            for ((out, &weight), &bias) in out.iter_mut().zip(weight).zip(bias) {
                *out = *out * scale * weight + bias;
            }
        }
    }
}

#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 32];
    let mut chunks = x.chunks_exact(32);
    for chunk in &mut chunks {
        for lane in 0..32 {
            lanes[lane] += chunk[lane];
        }
    }
    lanes.iter().sum::<f32>() + chunks.remainder().iter().sum::<f32>()
}

/// `x = x / 2 * (1 + erf(x / sqrt 2))` in place: GELU in its exact form (BERT). x: [rows, width].
pub fn gelu(x: &mut [f32], width: usize) {
    assert!(
        width > 0 && x.len().is_multiple_of(width),
        "gelu: ragged rows"
    );
    let rows = x.len() / width;
    let shared = SharedMut::new(x);
    split_rows(rows, width * 4, |first, rows| {
        // SAFETY: pieces are disjoint row ranges.
        gelu_exact(unsafe { shared.slice(first * width, rows * width) });
    });
}

multiversion! {
    fn gelu_exact(x: &mut [f32]) {
        for x in x {
            *x = 0.5 * *x * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

/// The error function to a few ulp of f32: the rational minimax approximation that Eigen and XLA use too.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let p = -2.726_142_3e-10;
    let p = p * square + 2.770_681_4e-8;
    let p = p * square - 2.101_024e-6;
    let p = p * square - 5.692_506_4e-5;
    let p = p * square - 7.349_906e-4;
    let p = p * square - 2.954_6e-3;
    let p = p * square - 1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * square - 2.133_740_6e-4;
    let q = q * square - 1.682_827e-3;
    let q = q * square - 7.373_329e-3;
    let q = q * square - 1.426_473_9e-2;
    x * p / q
}

/// The activation of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// x * sigmoid(x) (Llama, Mistral, Qwen).
    Silu,
    /// GELU in its tanh form (Gemma).
    GeluTanh,
}

impl Gate {
    /// The activation of one number.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        let exponent = match self {
            Gate::Silu => x,
            // x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)), the tanh form.
            Gate::GeluTanh => 1.595_769 * (x + 0.044715 * x * x * x),
        };
        x / (1.0 + exp(-exponent))
    }
}

/// `out[row] = act(gate) * up` for rows `gate_up = [gate | up]`: [rows, 2 * width] to [rows, width].
pub fn gated(gate: Gate, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width),
        "gated: ragged rows"
    );
    let shared = SharedMut::new(out);
    split_rows(out.len() / width, width * 4, |first, rows| {
        // SAFETY: pieces are disjoint row ranges.
        let out = unsafe { shared.slice(first * width, rows * width) };
        let gate_up = &gate_up[first * 2 * width..(first + rows) * 2 * width];
        match gate {
            Gate::Silu => silu_rows(gate_up, width, out),
            Gate::GeluTanh => gelu_rows(gate_up, width, out),
        }
    });
}

multiversion! {
    fn silu_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = Gate::Silu.apply(gate) * up;
            }
        }
    }
}

multiversion! {
    fn gelu_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = Gate::GeluTanh.apply(gate) * up;
            }
        }
    }
}

/// Coefficients of 2^r on [0, 1), lowest first: minimax in relative error, 1.6e-7 in f32.
pub(crate) const EXP2: [f32; 6] = [
    0.99999994,
    0.693_153_1,
    0.240_153_62,
    0.055_826_318,
    0.008_989_34,
    0.001_877_576_7,
];

/// e^x to about 1 ulp of f32 in plain arithmetic that the compiler vectorises; saturates
/// instead of overflowing.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    // Times 2^n, through the exponent bits; `n as i32` would check for NaN one number at a time.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    value * f32::from_bits(n.wrapping_add(127) << 23)
}

/// `mean = beta mean + rest x`, or of x².
pub fn running_mean(mean: &mut [f32], x: &[f32], beta: f32, rest: f32, square: bool) {
    assert_eq!(mean.len(), x.len(), "running_mean: lengths differ");
    let shared = SharedMut::new(mean);
    split_rows(x.len().div_ceil(1024), 1024, |first, rows| {
        let range = first * 1024..((first + rows) * 1024).min(x.len());
        // SAFETY: pieces are disjoint.
        let mean = unsafe { shared.slice(range.start, range.len()) };
        running_mean_rows(mean, &x[range], beta, rest, square);
    });
}

multiversion! {
    fn running_mean_rows(mean: &mut [f32], x: &[f32], beta: f32, rest: f32, square: bool) {
        if square {
            for (mean, &x) in mean.iter_mut().zip(x) {
                *mean = beta * *mean + rest * (x * x);
            }
        } else {
            for (mean, &x) in mean.iter_mut().zip(x) {
                *mean = beta * *mean + rest * x;
            }
        }
    }
}

/// Factors of a step of Adam.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Of the weight: 1 - learning rate times decay.
    pub keep: f32,
    /// Learning rate over the first moment's correction.
    pub rate: f32,
    /// One over the second moment's correction.
    pub second: f32,
    /// Added to the root.
    pub eps: f32,
}

/// `weight = keep weight - rate first / (sqrt(second moment) + eps)`.
pub fn adam_step(weight: &mut [f32], first: &[f32], second: &[f32], step: &AdamStep) {
    assert!(
        weight.len() == first.len() && weight.len() == second.len(),
        "adam_step: lengths differ"
    );
    let shared = SharedMut::new(weight);
    split_rows(first.len().div_ceil(1024), 1024, |from, rows| {
        let range = from * 1024..((from + rows) * 1024).min(first.len());
        // SAFETY: pieces are disjoint.
        let weight = unsafe { shared.slice(range.start, range.len()) };
        adam_rows(weight, &first[range.clone()], &second[range], step);
    });
}

multiversion! {
    fn adam_rows(weight: &mut [f32], first: &[f32], second: &[f32], step: &AdamStep) {
        let s = *step;
        for ((weight, &first), &second) in weight.iter_mut().zip(first).zip(second) {
            *weight = s.keep * *weight - s.rate * first / ((second * s.second).sqrt() + s.eps);
        }
    }
}

/// A copy of `x` `[rows, width]`, each piece made by the thread that works on those rows.
pub fn copy<T: Copy + Send + Sync>(x: &[T], width: usize) -> Vec<T> {
    let mut out: Vec<T> = Vec::with_capacity(x.len());
    let shared = SharedMut::new(out.spare_capacity_mut());
    split_rows(x.len() / width.max(1), width, |first, rows| {
        let range = first * width..(first + rows) * width;
        // SAFETY: pieces are disjoint, and may be written where nothing is.
        let to = unsafe { shared.slice(range.start, range.len()) };
        for (to, x) in to.iter_mut().zip(&x[range]) {
            to.write(*x);
        }
    });
    // SAFETY: whole rows are all there is.
    unsafe { out.set_len(x.len()) };
    out
}

/// `out += x`.
pub fn add_assign(out: &mut [f32], x: &[f32]) {
    assert_eq!(out.len(), x.len(), "add_assign: lengths differ");
    add_rows(out, x);
}

multiversion! {
    fn add_rows(out: &mut [f32], x: &[f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out += x;
        }
    }
}

/// Inner product of two slices of the same length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths differ");
    let mut sum = 0.0;
    dot_into(a, b, &mut sum);
    sum
}

multiversion! {
    fn dot_into(a: &[f32], b: &[f32], sum: &mut f32) {
        let mut lanes = [0f32; 32];
        let (mut a, mut b) = (a.chunks_exact(32), b.chunks_exact(32));
        for (a, b) in (&mut a).zip(&mut b) {
            for lane in 0..32 {
                lanes[lane] += a[lane] * b[lane];
            }
        }
        let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
        *sum = lanes.iter().sum::<f32>() + tail;
    }
}

/// `logits = cap * tanh(logits / cap)` (Gemma's soft cap).
pub fn softcap(logits: &mut [f32], cap: f32) {
    logits
        .iter_mut()
        .for_each(|logit| *logit = cap * (*logit / cap).tanh());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_saturates() {
        let mut x = -86.9f32;
        while x < 87.9 {
            let want = (x as f64).exp();
            assert!(((exp(x) as f64 - want) / want).abs() < 2.5e-7, "exp({x})");
            x += 0.0137;
        }
        assert!(exp(-1e30) > 0.0 && exp(-1e30) < 2e-38 && exp(1e30).is_finite());
    }

    #[test]
    fn norm_and_gates_match_their_definitions_in_f64() {
        let (rows, width) = (700, 67);
        let value = |i: usize| ((i * 7919 % 1000) as f32 / 100.0) - 5.0;
        let x: Vec<f32> = (0..rows * 2 * width).map(value).collect();
        let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 50.0).collect();
        let mut out = vec![0f32; rows * width];
        rms_norm(&x[..rows * width], &weight, 1e-5, &mut out);
        for row in 0..rows {
            let x = &x[row * width..(row + 1) * width];
            let mean = x.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let want = x[i] as f64 / (mean + 1e-5).sqrt() * weight[i] as f64;
                assert!((out[row * width + i] as f64 - want).abs() < 1e-5);
            }
        }
        for gate in [Gate::Silu, Gate::GeluTanh] {
            gated(gate, &x, width, &mut out);
            for row in 0..rows {
                for i in 0..width {
                    let g = x[row * 2 * width + i] as f64;
                    let up = x[row * 2 * width + width + i] as f64;
                    let act = match gate {
                        Gate::Silu => g / (1.0 + (-g).exp()),
                        Gate::GeluTanh => {
                            let inner =
                                (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                            0.5 * g * (1.0 + inner.tanh())
                        }
                    };
                    assert!(
                        (out[row * width + i] as f64 - act * up).abs() < 2e-5,
                        "{gate:?} {g}"
                    );
                }
            }
        }
    }

    /// erf by its series of positive terms, exact to f64 where it matters here.
    fn erf_naive(x: f64) -> f64 {
        let (mut term, mut sum, mut n) = (x, x, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 2.0;
            term *= 2.0 * x * x / n;
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
    }

    #[test]
    fn layer_norm_and_exact_gelu_match_their_definitions_in_f64() {
        let (rows, width) = (900, 67);
        let value = |i: usize| ((i * 7919 % 1000) as f32 / 80.0) - 6.0;
        let x: Vec<f32> = (0..rows * width).map(value).collect();
        let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 50.0).collect();
        let bias: Vec<f32> = (0..width).map(|i| i as f32 / 30.0 - 1.0).collect();
        let mut out = vec![0f32; rows * width];
        layer_norm(&x, &weight, &bias, 1e-12, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|&x| x as f64).sum::<f64>() / width as f64;
            let square = |x: &f32| (*x as f64 - mean).powi(2);
            let deviation = (x.iter().map(square).sum::<f64>() / width as f64 + 1e-12).sqrt();
            for i in 0..width {
                let want = (x[i] as f64 - mean) / deviation * weight[i] as f64 + bias[i] as f64;
                assert!((out[i] as f64 - want).abs() < 2e-6, "{} {want}", out[i]);
            }
        }
        let mut activated = x.clone();
        gelu(&mut activated, width);
        for (&x, &y) in x.iter().zip(&activated) {
            let x = x as f64;
            let want = 0.5 * x * (1.0 + erf_naive(x / std::f64::consts::SQRT_2));
            assert!(
                (y as f64 - want).abs() < 1e-6,
                "gelu({x}) = {y}, not {want}"
            );
        }
    }
}

//! The small operations between matrix products: RMSNorm, gated activations, rotary rotation.
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
    pool.for_each(pieces, |piece| {
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

/// The activation of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// x * sigmoid(x) (Llama, Mistral, Qwen).
    Silu,
    /// GELU in its tanh form (Gemma).
    GeluTanh,
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
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

multiversion! {
    fn gelu_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                // gelu(x) = x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3)), the tanh form.
                let inner = 1.595_769 * (gate + 0.044715 * gate * gate * gate);
                *out = gate / (1.0 + exp(-inner)) * up;
            }
        }
    }
}

/// e^x to about 1 ulp of f32 in plain arithmetic that the compiler vectorises; saturates
/// instead of overflowing.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    // Times 2^n, through the exponent bits.
    value * f32::from_bits((((n as i32) + 127) as u32) << 23)
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
}

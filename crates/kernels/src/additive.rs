//! Additive attention scores `u = v · tanh(key + query)` (Bahdanau; papers 08 and 39) as one differentiable operation.
//!
//! Composed of tensor operations the sum over all pairs of keys and queries exists in memory several times over; here
//! nothing but the scores does, and the backward pass computes the tanh again.

use crate::autograd::{Kernel, Real, apply};
use crate::cpu::Level;
use crate::elementwise::exp;
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};
use std::any::TypeId;

/// Scores of every key for every query: keys [batch, keys, width], queries [batch, queries, width], v [width] to
/// [batch, queries, keys].
pub fn additive_scores(keys: &Tensor, queries: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, n, width) = keys.dims3()?;
    let (also, m, inner) = queries.dims3()?;
    if also != batch || inner != width || v.dims() != [width] {
        bail!(
            "additive scores: found keys {:?}, queries {:?}, v {:?}, expected [b, n, d], [b, m, d], [d]",
            keys.dims(),
            queries.dims(),
            v.dims()
        );
    }
    let op = Additive {
        batch,
        keys: n,
        queries: m,
        width,
    };
    apply(op, &[keys, queries, v])
}

/// The same, of tensor operations: the oracle of tests.
pub fn additive_scores_naive(keys: &Tensor, queries: &Tensor, v: &Tensor) -> Result<Tensor> {
    let sums = keys
        .unsqueeze(1)?
        .broadcast_add(&queries.unsqueeze(2)?)?
        .tanh()?; // [batch, queries, keys, width]
    sums.broadcast_mul(v)?.sum(3)
}

struct Additive {
    batch: usize,
    keys: usize,
    queries: usize,
    width: usize,
}

/// `out = tanh(a + b)`: in f32 through our own exponential, which the compiler vectorises.
fn tanh_sum<T: Real>(a: &[T], b: &[T], out: &mut [T]) {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32; the slices stay the same.
        let (a, b, out) = unsafe {
            (
                std::slice::from_raw_parts(a.as_ptr().cast::<f32>(), a.len()),
                std::slice::from_raw_parts(b.as_ptr().cast::<f32>(), b.len()),
                std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<f32>(), out.len()),
            )
        };
        return tanh_sum_f32(a, b, out);
    }
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *out = (a + b).tanh();
    }
}

fn tanh_sum_f32(a: &[f32], b: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn wide(a: &[f32], b: &[f32], out: &mut [f32]) {
            tanh_sum_body(a, b, out)
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn middle(a: &[f32], b: &[f32], out: &mut [f32]) {
            tanh_sum_body(a, b, out)
        }
        // SAFETY: the level is bounded by what this CPU has.
        match Level::current().min(Level::detected()) {
            Level::Amx | Level::Avx512 => return unsafe { wide(a, b, out) },
            Level::Avx2 => return unsafe { middle(a, b, out) },
            Level::Portable => {}
        }
    }
    tanh_sum_body(a, b, out)
}

#[inline(always)]
fn tanh_sum_body(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        // tanh x = 1 - 2 / (1 + e^2x), which saturates as the exponential does.
        *out = 1.0 - 2.0 / (1.0 + exp(2.0 * (a + b)));
    }
}

impl Kernel for Additive {
    fn name(&self) -> &'static str {
        "additive scores"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (n, m, d) = (self.keys, self.queries, self.width);
        let mut out = vec![T::zero(); self.batch * m * n];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.batch, |b| {
            // SAFETY: one job per batch row.
            let scores = unsafe { shared.slice(b * m * n, m * n) };
            let mut row = vec![T::zero(); d];
            for i in 0..m {
                let query = &inputs[1][(b * m + i) * d..][..d];
                for j in 0..n {
                    tanh_sum(&inputs[0][(b * n + j) * d..][..d], query, &mut row);
                    scores[i * n + j] = row.iter().zip(inputs[2]).map(|(&t, &v)| t * v).sum();
                }
            }
        });
        (out, vec![self.batch, m, n])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (n, m, d) = (self.keys, self.queries, self.width);
        let mut grad_keys = vec![T::zero(); inputs[0].len()];
        let mut grad_queries = vec![T::zero(); inputs[1].len()];
        // One part per batch row, added in order: the sum does not depend on the number of threads.
        let mut parts = vec![T::zero(); self.batch * d];
        let (keys, queries, v) = (
            SharedMut::new(&mut grad_keys),
            SharedMut::new(&mut grad_queries),
            SharedMut::new(&mut parts),
        );
        Pool::global().for_each(self.batch, |b| {
            // SAFETY: one job per batch row.
            let (keys, queries, v) = unsafe {
                (
                    keys.slice(b * n * d, n * d),
                    queries.slice(b * m * d, m * d),
                    v.slice(b * d, d),
                )
            };
            let mut row = vec![T::zero(); d];
            for i in 0..m {
                let query = &inputs[1][(b * m + i) * d..][..d];
                let grad_query = &mut queries[i * d..][..d];
                for j in 0..n {
                    let g = gradient[(b * m + i) * n + j];
                    if g == T::zero() {
                        continue;
                    }
                    tanh_sum(&inputs[0][(b * n + j) * d..][..d], query, &mut row);
                    let grad_key = &mut keys[j * d..][..d];
                    for k in 0..d {
                        let t = row[k];
                        v[k] += g * t;
                        let inner = g * inputs[2][k] * (T::one() - t * t);
                        grad_key[k] += inner;
                        grad_query[k] += inner;
                    }
                }
            }
        });
        let mut grad_v = vec![T::zero(); d];
        for part in parts.chunks(d.max(1)) {
            grad_v.iter_mut().zip(part).for_each(|(sum, &g)| *sum += g);
        }
        vec![grad_keys, grad_queries, grad_v]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use candle_core::{DType, Device};

    fn tensor(shape: &[usize], salt: usize, scale: f64) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| (((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0) * scale)
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn scores_are_those_of_the_naive_form() {
        for (batch, n, m, d) in [(1, 1, 1, 1), (2, 5, 3, 7), (3, 4, 9, 33)] {
            let inputs = [
                tensor(&[batch, n, d], 1, 3.0),
                tensor(&[batch, m, d], 2, 30.0),
                tensor(&[d], 3, 1.0),
            ];
            for (dtype, allowed) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
                let x: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
                let fast = additive_scores(&x[0], &x[1], &x[2]).unwrap();
                assert_eq!(fast.dims(), [batch, m, n]);
                let naive = additive_scores_naive(&x[0], &x[1], &x[2]).unwrap();
                let error = (fast - naive).unwrap().abs().unwrap().max_all().unwrap();
                let error = error.to_dtype(DType::F64).unwrap();
                let error = error.to_scalar::<f64>().unwrap() / d as f64;
                assert!(error < allowed, "{batch} {n} {m} {d} {dtype:?}: {error}");
            }
        }
        let wrong = additive_scores(
            &tensor(&[1, 2, 3], 1, 1.0),
            &tensor(&[1, 2, 4], 1, 1.0),
            &tensor(&[3], 1, 1.0),
        );
        assert!(wrong.is_err());
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let inputs = [
            tensor(&[2, 4, 5], 1, 1.0),
            tensor(&[2, 3, 5], 2, 1.0),
            tensor(&[5], 3, 1.0),
        ];
        let error =
            gradient_error(&inputs, 1e-6, &|x| additive_scores(&x[0], &x[1], &x[2])).unwrap();
        assert!(error < 1e-7, "{error}");
    }
}

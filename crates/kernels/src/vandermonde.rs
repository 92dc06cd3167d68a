//! Cauchy and Vandermonde products over conjugate pairs: what kernels of state-space layers are made of (paper 12, S4).
//!
//! `cauchy`: r(z) = Σ_n v_n / (z - w_n) + v̄_n / (z - w̄_n); `vandermonde`: K[l] = 2 Re Σ_n v_n e^{l x_n}. Both in f64
//! inside, whatever the type of the tensors: their sums cancel, and their cost is small beside the layers around them.
//! Complex tensors are real ones with a last axis of 2.

use crate::autograd::{Kernel, Real, apply};
use candle_core::{Result, Tensor, bail};
use rustfft::num_complex::Complex64 as C;

/// Reads complex numbers stored as (re, im).
pub(crate) fn complex<T: Real>(values: &[T]) -> Vec<C> {
    values
        .chunks_exact(2)
        .map(|pair| C::new(pair[0].wide(), pair[1].wide()))
        .collect()
}

/// Stores complex numbers as (re, im).
pub(crate) fn pairs<T: Real>(values: &[C]) -> Vec<T> {
    values
        .iter()
        .flat_map(|z| [T::of(z.re), T::of(z.im)])
        .collect()
}

/// Several Cauchy products with the same poles w: out[k][l] for the weights v[k][n].
pub(crate) fn cauchy_many(v: &[&[C]], w: &[C], z: &[C]) -> Vec<Vec<C>> {
    let mut out = vec![vec![C::ZERO; z.len()]; v.len()];
    for (n, &w) in w.iter().enumerate() {
        // v/(z-w) + v̄/(z-w̄) = (a z - b) / (z² - p z + q), all coefficients real.
        let (p, q) = (2.0 * w.re, w.norm_sqr());
        for (out, v) in out.iter_mut().zip(v) {
            let (a, b) = (2.0 * v[n].re, 2.0 * (v[n] * w.conj()).re);
            for (out, &z) in out.iter_mut().zip(z) {
                *out += (z * a - b) / (z * (z - p) + q);
            }
        }
    }
    out
}

/// Gradients of [`cauchy_many`] with respect to v and w, given those of its outputs (dL = Re Σ conj(ḡ) dg).
pub(crate) fn cauchy_many_backward(
    v: &[&[C]],
    w: &[C],
    z: &[C],
    gradient: &[Vec<C>],
) -> (Vec<Vec<C>>, Vec<C>) {
    let mut grad_v = vec![vec![C::ZERO; w.len()]; v.len()];
    let mut grad_w = vec![C::ZERO; w.len()];
    for (n, &w) in w.iter().enumerate() {
        let (p, q) = (2.0 * w.re, w.norm_sqr());
        let (mut grad_p, mut grad_q) = (0.0, 0.0);
        let mut grad_ab = vec![(0.0, 0.0); v.len()];
        for (l, &z) in z.iter().enumerate() {
            let inverse = (z * (z - p) + q).inv();
            let mut sum = C::ZERO;
            for (k, v) in v.iter().enumerate() {
                let (a, b) = (2.0 * v[n].re, 2.0 * (v[n] * w.conj()).re);
                let g = gradient[k][l].conj() * inverse;
                grad_ab[k].0 += (g * z).re;
                grad_ab[k].1 -= g.re;
                sum += g * (z * a - b);
            }
            let sum = sum * inverse;
            grad_p += (sum * z).re;
            grad_q -= sum.re;
        }
        // p = 2 Re w, q = |w|², a = 2 Re v, b = 2 Re(v w̄)
        grad_w[n] += C::new(2.0 * grad_p, 0.0) + w * (2.0 * grad_q);
        for (k, (a, b)) in grad_ab.into_iter().enumerate() {
            grad_v[k][n] = C::new(2.0 * a, 0.0) + w * (2.0 * b);
            grad_w[n] += v[k][n] * (2.0 * b);
        }
    }
    (grad_v, grad_w)
}

/// v [rows, n, 2], w [rows, n, 2], nodes z [l, 2] (no gradient) to [rows, l, 2].
pub fn cauchy(v: &Tensor, z: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (rows, poles) = check("cauchy", v, w)?;
    let nodes = match z.dims() {
        &[nodes, 2] => nodes,
        other => bail!("cauchy nodes: found shape {other:?}, expected [nodes, 2]"),
    };
    let op = Cauchy { rows, poles, nodes };
    apply(op, &[v, w, z])
}

fn check(name: &str, v: &Tensor, w: &Tensor) -> Result<(usize, usize)> {
    match (v.dims(), w.dims()) {
        (&[rows, n, 2], &[rows_w, n_w, 2]) if (rows, n) == (rows_w, n_w) => Ok((rows, n)),
        (v, w) => bail!("{name}: found shapes {v:?} and {w:?}, expected [rows, n, 2] for both"),
    }
}

struct Cauchy {
    rows: usize,
    poles: usize,
    nodes: usize,
}

impl Kernel for Cauchy {
    fn name(&self) -> &'static str {
        "cauchy"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (v, w, z) = (complex(inputs[0]), complex(inputs[1]), complex(inputs[2]));
        let mut out = Vec::with_capacity(self.rows * self.nodes * 2);
        for (v, w) in v.chunks(self.poles).zip(w.chunks(self.poles)) {
            out.extend(pairs::<T>(&cauchy_many(&[v], w, &z)[0]));
        }
        (out, vec![self.rows, self.nodes, 2])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (v, w, z) = (complex(inputs[0]), complex(inputs[1]), complex(inputs[2]));
        let gradient = complex(gradient);
        let (mut grad_v, mut grad_w) = (Vec::new(), Vec::new());
        for row in 0..self.rows {
            let part = row * self.poles..(row + 1) * self.poles;
            let gradient = vec![gradient[row * self.nodes..][..self.nodes].to_vec()];
            let (v, w) = cauchy_many_backward(&[&v[part.clone()]], &w[part.clone()], &z, &gradient);
            grad_v.extend(pairs::<T>(&v[0]));
            grad_w.extend(pairs::<T>(&w));
        }
        vec![grad_v, grad_w, vec![T::zero(); inputs[2].len()]]
    }
}

/// Powers are renewed by an exponential after so many multiplications.
const RENEW: usize = 64;

/// out[l] += 2 Re Σ_n v_n e^{l x_n}, without a table of powers.
pub(crate) fn vandermonde_add(v: &[C], x: &[C], out: &mut [f64]) {
    for (&v, &x) in v.iter().zip(x) {
        let step = x.exp();
        for (block, out) in out.chunks_mut(RENEW).enumerate() {
            let mut power = v * (x * (block * RENEW) as f64).exp() * 2.0;
            for out in out {
                *out += power.re;
                power *= step;
            }
        }
    }
}

/// Gradients of [`vandermonde_add`] with respect to v and x.
pub(crate) fn vandermonde_backward(v: &[C], x: &[C], gradient: &[f64]) -> (Vec<C>, Vec<C>) {
    v.iter()
        .zip(x)
        .map(|(&v, &x)| {
            let step = x.exp();
            let (mut sum, mut moment) = (C::ZERO, C::ZERO);
            for (block, gradient) in gradient.chunks(RENEW).enumerate() {
                let start = block * RENEW;
                let mut power = (x * start as f64).exp();
                for (offset, &g) in gradient.iter().enumerate() {
                    sum += power * g;
                    moment += power * (g * (start + offset) as f64);
                    power *= step;
                }
            }
            ((sum * 2.0).conj(), (moment * v * 2.0).conj())
        })
        .unzip()
}

/// v [rows, n, 2], x [rows, n, 2] to [rows, length].
pub fn vandermonde(v: &Tensor, x: &Tensor, length: usize) -> Result<Tensor> {
    let (rows, terms) = check("vandermonde", v, x)?;
    let op = Vandermonde {
        rows,
        terms,
        length,
    };
    apply(op, &[v, x])
}

struct Vandermonde {
    rows: usize,
    terms: usize,
    length: usize,
}

impl Kernel for Vandermonde {
    fn name(&self) -> &'static str {
        "vandermonde"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (v, x) = (complex(inputs[0]), complex(inputs[1]));
        let mut out = vec![0f64; self.rows * self.length];
        for (row, out) in out.chunks_mut(self.length.max(1)).enumerate() {
            let part = row * self.terms..(row + 1) * self.terms;
            vandermonde_add(&v[part.clone()], &x[part], out);
        }
        let out = out.into_iter().map(T::of).collect();
        (out, vec![self.rows, self.length])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (v, x) = (complex(inputs[0]), complex(inputs[1]));
        let gradient: Vec<f64> = gradient.iter().map(|g| g.wide()).collect();
        let (mut grad_v, mut grad_x) = (Vec::new(), Vec::new());
        for row in 0..self.rows {
            let part = row * self.terms..(row + 1) * self.terms;
            let gradient = &gradient[row * self.length..][..self.length];
            let (v, x) = vandermonde_backward(&v[part.clone()], &x[part], gradient);
            grad_v.extend(pairs::<T>(&v));
            grad_x.extend(pairs::<T>(&x));
        }
        vec![grad_v, grad_x]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use candle_core::Device;

    fn tensor(shape: &[usize], salt: usize, low: f64, high: f64) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| low + (high - low) * (((i * 7919 + salt * 104_729) % 1009) as f64 / 1009.0))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn products_are_those_of_their_definitions() {
        let v = complex(
            &tensor(&[5, 2], 1, -1.0, 1.0)
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap(),
        );
        let w = complex(
            &tensor(&[5, 2], 2, -1.0, -0.1)
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap(),
        );
        let z: Vec<C> = (0..9).map(|l| C::new(0.1, l as f64)).collect();
        for (l, found) in cauchy_many(&[&v], &w, &z)[0].iter().enumerate() {
            let direct: C = v
                .iter()
                .zip(&w)
                .map(|(v, w)| v / (z[l] - w) + v.conj() / (z[l] - w.conj()))
                .sum();
            assert!((found - direct).norm() < 1e-12);
        }
        let mut found = vec![0.0; 200];
        vandermonde_add(&v, &w, &mut found);
        for (l, found) in found.iter().enumerate() {
            let direct: C = v
                .iter()
                .zip(&w)
                .map(|(v, w)| v * (w * l as f64).exp())
                .sum();
            assert!((found - 2.0 * direct.re).abs() < 1e-12);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (v, w) = (
            tensor(&[2, 3, 2], 1, -1.0, 1.0),
            tensor(&[2, 3, 2], 2, -0.5, -0.05),
        );
        let z = tensor(&[6, 2], 3, 0.2, 3.0);
        let error =
            gradient_error(&[v.clone(), w.clone()], 1e-6, &|x| cauchy(&x[0], &z, &x[1])).unwrap();
        assert!(error < 1e-6, "cauchy {error}");
        let error = gradient_error(&[v, w], 1e-6, &|x| vandermonde(&x[0], &x[1], 70)).unwrap();
        assert!(error < 1e-6, "vandermonde {error}");
    }
}

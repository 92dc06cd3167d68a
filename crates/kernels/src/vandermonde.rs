//! Cauchy and Vandermonde products over conjugate pairs: what kernels of state-space layers are made of (paper 12, S4).
//!
//! `cauchy`: r(z) = Σ_n v_n / (z - w_n) + v̄_n / (z - w̄_n); `vandermonde`: K[l] = 2 Re Σ_n v_n e^{l x_n}. Both in f64
//! inside, whatever the type of the tensors: their sums cancel, and their cost is small beside the layers around them.
//! Complex tensors are real ones with a last axis of 2.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::composes;
use crate::cpu::Level;
use candle_core::{DType, Result, Tensor, bail};
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

/// Numbers that go through a loop side by side.
const LANES: usize = 8;

/// Compiles a body for each vector width and picks by the level.
macro_rules! levels {
    ($vis:vis $name:ident / $body:ident / $wide:ident / $middle:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)?) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn $wide($($arg: $ty),*) $(-> $out)? { $body($($arg),*) }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $middle($($arg: $ty),*) $(-> $out)? { $body($($arg),*) }
        $vis fn $name(level: Level, $($arg: $ty),*) $(-> $out)? {
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

levels!(cauchy_at / cauchy_body / cauchy_wide / cauchy_middle (
    v: &[&[C]], w: &[C], z: &[C]
) -> Vec<Vec<C>>);
levels!(cauchy_back_at / cauchy_back_body / cauchy_back_wide / cauchy_back_middle (
    v: &[&[C]], w: &[C], z: &[C], gradient: &[Vec<C>]
) -> (Vec<Vec<C>>, Vec<C>));
levels!(vandermonde_at / vandermonde_body / vandermonde_wide / vandermonde_middle (
    v: &[C], x: &[C], out: &mut [f64]
));
levels!(vandermonde_back_at / vandermonde_back_body / vandermonde_back_wide / vandermonde_back_middle (
    v: &[C], x: &[C], gradient: &[f64]
) -> (Vec<C>, Vec<C>));

/// Several Cauchy products with the same poles w: out[k][l] for the weights v[k][n].
pub(crate) fn cauchy_many(v: &[&[C]], w: &[C], z: &[C]) -> Vec<Vec<C>> {
    cauchy_at(Level::current(), v, w, z)
}

/// Gradients of [`cauchy_many`] with respect to v and w, given those of its outputs (dL = Re Σ conj(ḡ) dg).
pub(crate) fn cauchy_many_backward(
    v: &[&[C]],
    w: &[C],
    z: &[C],
    gradient: &[Vec<C>],
) -> (Vec<Vec<C>>, Vec<C>) {
    cauchy_back_at(Level::current(), v, w, z, gradient)
}

/// Nodes side by side: real and imaginary parts, and 1 / (z² - p z + q) of a pole.
#[derive(Clone, Copy)]
struct Nodes {
    re: [f64; LANES],
    im: [f64; LANES],
    inverse_re: [f64; LANES],
    inverse_im: [f64; LANES],
}

impl Nodes {
    /// Up to eight nodes; what is missing is repeated.
    #[inline(always)]
    fn new(z: &[C]) -> Self {
        let at = |lane: usize| z[lane.min(z.len() - 1)];
        Nodes {
            re: std::array::from_fn(|lane| at(lane).re),
            im: std::array::from_fn(|lane| at(lane).im),
            inverse_re: [0.0; LANES],
            inverse_im: [0.0; LANES],
        }
    }

    #[inline(always)]
    fn invert(&mut self, p: f64, q: f64) {
        for lane in 0..LANES {
            let (x, y) = (self.re[lane], self.im[lane]);
            let (re, im) = (x * (x - p) - y * y + q, y * (2.0 * x - p));
            let inverse = 1.0 / (re * re + im * im);
            self.inverse_re[lane] = re * inverse;
            self.inverse_im[lane] = -im * inverse;
        }
    }
}

#[inline(always)]
fn cauchy_body(v: &[&[C]], w: &[C], z: &[C]) -> Vec<Vec<C>> {
    let mut out = vec![vec![C::ZERO; z.len()]; v.len()];
    for (block, z) in z.chunks(LANES).enumerate() {
        let mut nodes = Nodes::new(z);
        let mut sums = vec![([0f64; LANES], [0f64; LANES]); v.len()];
        for (n, &w) in w.iter().enumerate() {
            // v/(z-w) + v̄/(z-w̄) = (a z - b) / (z² - p z + q), all coefficients real.
            nodes.invert(2.0 * w.re, w.norm_sqr());
            for ((re, im), v) in sums.iter_mut().zip(v) {
                let (a, b) = (2.0 * v[n].re, 2.0 * (v[n] * w.conj()).re);
                for lane in 0..LANES {
                    let (x, y) = (a * nodes.re[lane] - b, a * nodes.im[lane]);
                    let (i, j) = (nodes.inverse_re[lane], nodes.inverse_im[lane]);
                    re[lane] += x * i - y * j;
                    im[lane] += x * j + y * i;
                }
            }
        }
        for (out, (re, im)) in out.iter_mut().zip(sums) {
            for (lane, out) in out[block * LANES..].iter_mut().take(LANES).enumerate() {
                *out = C::new(re[lane], im[lane]);
            }
        }
    }
    out
}

#[inline(always)]
fn cauchy_back_body(v: &[&[C]], w: &[C], z: &[C], gradient: &[Vec<C>]) -> (Vec<Vec<C>>, Vec<C>) {
    let mut grad_v = vec![vec![C::ZERO; w.len()]; v.len()];
    let mut grad_w = vec![C::ZERO; w.len()];
    for (n, &w) in w.iter().enumerate() {
        let (p, q) = (2.0 * w.re, w.norm_sqr());
        let (mut grad_p, mut grad_q) = ([0f64; LANES], [0f64; LANES]);
        let mut grad_ab = vec![([0f64; LANES], [0f64; LANES]); v.len()];
        for (block, z) in z.chunks(LANES).enumerate() {
            let mut nodes = Nodes::new(z);
            nodes.invert(p, q);
            let (mut sum_re, mut sum_im) = ([0f64; LANES], [0f64; LANES]);
            for (k, v) in v.iter().enumerate() {
                let (a, b) = (2.0 * v[n].re, 2.0 * (v[n] * w.conj()).re);
                let (mut gr, mut gi) = ([0f64; LANES], [0f64; LANES]);
                for (lane, g) in gradient[k][block * LANES..].iter().take(LANES).enumerate() {
                    (gr[lane], gi[lane]) = (g.re, -g.im);
                }
                let (grad_a, grad_b) = &mut grad_ab[k];
                for lane in 0..LANES {
                    let (i, j) = (nodes.inverse_re[lane], nodes.inverse_im[lane]);
                    let (re, im) = (gr[lane] * i - gi[lane] * j, gr[lane] * j + gi[lane] * i);
                    let (x, y) = (nodes.re[lane], nodes.im[lane]);
                    grad_a[lane] += re * x - im * y;
                    grad_b[lane] -= re;
                    let (x, y) = (a * x - b, a * y);
                    sum_re[lane] += re * x - im * y;
                    sum_im[lane] += re * y + im * x;
                }
            }
            for lane in 0..LANES {
                let (i, j) = (nodes.inverse_re[lane], nodes.inverse_im[lane]);
                let (re, im) = (
                    sum_re[lane] * i - sum_im[lane] * j,
                    sum_re[lane] * j + sum_im[lane] * i,
                );
                grad_p[lane] += re * nodes.re[lane] - im * nodes.im[lane];
                grad_q[lane] -= re;
            }
        }
        let sum = |lanes: [f64; LANES]| lanes.iter().sum::<f64>();
        // p = 2 Re w, q = |w|², a = 2 Re v, b = 2 Re(v w̄)
        grad_w[n] += C::new(2.0 * sum(grad_p), 0.0) + w * (2.0 * sum(grad_q));
        for (k, (a, b)) in grad_ab.into_iter().enumerate() {
            let (a, b) = (sum(a), sum(b));
            grad_v[k][n] = C::new(2.0 * a, 0.0) + w * (2.0 * b);
            grad_w[n] += v[k][n] * (2.0 * b);
        }
    }
    (grad_v, grad_w)
}

/// The naive twins of [`cauchy_many`] and [`vandermonde_add`]: their definitions.
#[cfg(test)]
fn naive(v: &[C], w: &[C], z: &[C], length: usize) -> (Vec<C>, Vec<f64>) {
    let cauchy = z.iter().map(|z| {
        let terms = v.iter().zip(w);
        terms
            .map(|(v, w)| v / (z - w) + v.conj() / (z - w.conj()))
            .sum()
    });
    let powers = (0..length).map(|l| {
        let terms = v.iter().zip(w);
        2.0 * terms
            .map(|(v, x)| (v * (x * l as f64).exp()).re)
            .sum::<f64>()
    });
    (cauchy.collect(), powers.collect())
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
    vandermonde_at(Level::current(), v, x, out);
}

/// Gradients of [`vandermonde_add`] with respect to v and x.
pub(crate) fn vandermonde_backward(v: &[C], x: &[C], gradient: &[f64]) -> (Vec<C>, Vec<C>) {
    vandermonde_back_at(Level::current(), v, x, gradient)
}

/// Eight powers in a row, and the factor to the next eight.
struct Powers {
    re: [f64; LANES],
    im: [f64; LANES],
    next: C,
}

impl Powers {
    #[inline(always)]
    fn new(start: C, step: C) -> Self {
        let (mut re, mut im) = ([0f64; LANES], [0f64; LANES]);
        let mut power = start;
        for lane in 0..LANES {
            (re[lane], im[lane]) = (power.re, power.im);
            power *= step;
        }
        let two = step * step;
        let four = two * two;
        Powers {
            re,
            im,
            next: four * four,
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        let (a, b) = (self.next.re, self.next.im);
        for lane in 0..LANES {
            let (x, y) = (self.re[lane], self.im[lane]);
            self.re[lane] = x * a - y * b;
            self.im[lane] = x * b + y * a;
        }
    }
}

#[inline(always)]
fn vandermonde_body(v: &[C], x: &[C], out: &mut [f64]) {
    for (&v, &x) in v.iter().zip(x) {
        let step = x.exp();
        for (block, out) in out.chunks_mut(RENEW).enumerate() {
            let start = v * (x * (block * RENEW) as f64).exp() * 2.0;
            let mut powers = Powers::new(start, step);
            let mut eights = out.chunks_exact_mut(LANES);
            for out in &mut eights {
                for lane in 0..LANES {
                    out[lane] += powers.re[lane];
                }
                powers.advance();
            }
            for (out, re) in eights.into_remainder().iter_mut().zip(powers.re) {
                *out += re;
            }
        }
    }
}

#[inline(always)]
fn vandermonde_back_body(v: &[C], x: &[C], gradient: &[f64]) -> (Vec<C>, Vec<C>) {
    let one = |(&v, &x): (&C, &C)| {
        let step = x.exp();
        let (mut sum_re, mut sum_im) = ([0f64; LANES], [0f64; LANES]);
        let (mut moment_re, mut moment_im) = ([0f64; LANES], [0f64; LANES]);
        for (block, gradient) in gradient.chunks(RENEW).enumerate() {
            let start = block * RENEW;
            let mut powers = Powers::new((x * start as f64).exp(), step);
            for (eight, gradient) in gradient.chunks(LANES).enumerate() {
                let mut g = [0f64; LANES];
                g[..gradient.len()].copy_from_slice(gradient);
                let first = (start + eight * LANES) as f64;
                for lane in 0..LANES {
                    let (re, im) = (powers.re[lane] * g[lane], powers.im[lane] * g[lane]);
                    let at = first + lane as f64;
                    sum_re[lane] += re;
                    sum_im[lane] += im;
                    moment_re[lane] += re * at;
                    moment_im[lane] += im * at;
                }
                powers.advance();
            }
        }
        let sum = |lanes: [f64; LANES]| lanes.iter().sum::<f64>();
        let (total, moment) = (
            C::new(sum(sum_re), sum(sum_im)),
            C::new(sum(moment_re), sum(moment_im)),
        );
        ((total * 2.0).conj(), (moment * v * 2.0).conj())
    };
    v.iter().zip(x).map(one).unzip()
}

/// v [rows, n, 2], x [rows, n, 2] to [rows, length].
pub fn vandermonde(v: &Tensor, x: &Tensor, length: usize) -> Result<Tensor> {
    let (rows, terms) = check("vandermonde", v, x)?;
    if composes(v) {
        let dtype = v.dtype();
        let (v, x) = (v.to_dtype(DType::F64)?, x.to_dtype(DType::F64)?);
        return vandermonde_composed(&v, &x, length)?.to_dtype(dtype);
    }
    let op = Vandermonde {
        rows,
        terms,
        length,
    };
    apply(op, &[v, x])
}

/// [`vandermonde`] of f64 tensors in candle's operations: with l = q i + j, the sum is a product of v e^{q i x} and e^{j x}, and
/// only O(sqrt(length)) powers of each term exist.
pub(crate) fn vandermonde_composed(v: &Tensor, x: &Tensor, length: usize) -> Result<Tensor> {
    let (rows, terms, _) = v.dims3()?;
    let device = v.device();
    if length == 0 {
        return Tensor::zeros((rows, 0), DType::F64, device);
    }
    let columns = (length as f64).sqrt().ceil() as usize;
    let lines = length.div_ceil(columns);
    let part = |t: &Tensor, at: usize| t.narrow(2, at, 1)?.contiguous(); // [rows, terms, 1]
    let (re, im) = (part(x, 0)?, part(x, 1)?);
    // e^{l x} for these l: real and imaginary parts, [rows, terms, count]
    let powers = |count: usize, every: usize| -> Result<(Tensor, Tensor)> {
        let steps: Vec<f64> = (0..count).map(|l| (l * every) as f64).collect();
        let steps = Tensor::from_vec(steps, (1, 1, count), device)?;
        let size = re.broadcast_mul(&steps)?.exp()?;
        let angle = im.broadcast_mul(&steps)?;
        Ok(((&size * angle.cos()?)?, (&size * angle.sin()?)?))
    };
    let ((fr, fi), (cr, ci)) = (powers(lines, columns)?, powers(columns, 1)?);
    let (vr, vi) = (part(v, 0)?, part(v, 1)?);
    let left_re = (fr.broadcast_mul(&vr)? - fi.broadcast_mul(&vi)?)?;
    let left_im = (fr.broadcast_mul(&vi)? + fi.broadcast_mul(&vr)?)?;
    // Re(a b) = Re a Re b - Im a Im b: [rows, lines, 2 terms] times [rows, 2 terms, columns]
    let left = Tensor::cat(&[left_re, left_im.neg()?], 1)?;
    let right = Tensor::cat(&[cr, ci], 1)?;
    let all = left.transpose(1, 2)?.contiguous()?.matmul(&right)?;
    let all = all.reshape((rows, lines * columns))?;
    debug_assert_eq!(left.dim(1)?, 2 * terms);
    all.narrow(1, 0, length)?.contiguous()? * 2.0
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
    use crate::harness::tensor;

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
        for count in [1usize, 8, 9, 29] {
            let z: Vec<C> = (0..count).map(|l| C::new(0.1, l as f64)).collect();
            let length = 23 * count;
            let (products, powers) = naive(&v, &w, &z, length);
            let other: Vec<C> = v.iter().map(|v| v * 2.0).collect();
            let gradient: Vec<f64> = (0..length).map(|l| ((l * 7) % 5) as f64 - 2.0).collect();
            let g: Vec<Vec<C>> = (0..2)
                .map(|k| {
                    (0..count)
                        .map(|l| C::new(((l * 3 + k) % 5) as f64 - 2.0, 0.5))
                        .collect()
                })
                .collect();
            let exact = (
                cauchy_back_at(Level::Portable, &[&v, &other], &w, &z, &g),
                vandermonde_back_at(Level::Portable, &v, &w, &gradient),
            );
            let near = |a: &[C], b: &[C]| {
                a.iter()
                    .zip(b)
                    .all(|(a, b)| (a - b).norm() < 1e-9 * b.norm().max(1.0))
            };
            for level in Level::available() {
                let found = cauchy_at(level, &[&v, &other], &w, &z);
                assert!(near(&found[0], &products), "{level:?} {count}");
                let twice: Vec<C> = products.iter().map(|p| p * 2.0).collect();
                assert!(near(&found[1], &twice), "{level:?} {count}");
                let mut found = vec![0.0; length];
                vandermonde_at(level, &v, &w, &mut found);
                let close = found
                    .iter()
                    .zip(&powers)
                    .all(|(a, b)| (a - b).abs() < 1e-12);
                assert!(close, "{level:?} {count}");
                let (grad_v, grad_w) = cauchy_back_at(level, &[&v, &other], &w, &z, &g);
                let (exact_v, exact_w) = &exact.0;
                assert!(
                    near(&grad_v[1], &exact_v[1]) && near(&grad_w, exact_w),
                    "{level:?}"
                );
                let (grad_v, grad_x) = vandermonde_back_at(level, &v, &w, &gradient);
                assert!(
                    near(&grad_v, &exact.1.0) && near(&grad_x, &exact.1.1),
                    "{level:?}"
                );
            }
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

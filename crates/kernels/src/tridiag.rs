//! Structured state matrices of LSSL (paper 26): tridiagonal solves with their adjoint, and Krylov blocks by doubling.
//!
//! A tridiagonal system costs O(n) per right side, so the dense transition is never inverted. Computes in f64 inside.

use crate::autograd::{Kernel, Real, apply};
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};

/// Solves T s = v: `lower`, `diag`, `upper` [systems, n] (lower's first and upper's last are unused), v [systems, columns,
/// n] to the same. Differentiable in all.
pub fn tridiag_solve(lower: &Tensor, diag: &Tensor, upper: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (systems, columns, n) = v.dims3()?;
    let shape = [systems, n];
    if n == 0 || lower.dims() != shape || diag.dims() != shape || upper.dims() != shape {
        bail!(
            "tridiagonal solve: found lower {:?}, diagonal {:?}, upper {:?}, right sides {:?}",
            lower.dims(),
            diag.dims(),
            upper.dims(),
            v.dims()
        );
    }
    let op = Solve {
        systems,
        columns,
        n,
    };
    apply(op, &[lower, diag, upper, v])
}

/// T v, as [`tridiag_solve`] without the inverse, from candle operations: differentiable.
pub fn tridiag_multiply(
    lower: &Tensor,
    diag: &Tensor,
    upper: &Tensor,
    v: &Tensor,
) -> Result<Tensor> {
    let (_, _, n) = v.dims3()?;
    let wide = |t: &Tensor| t.unsqueeze(1);
    let mut y = v.broadcast_mul(&wide(diag)?)?;
    if n > 1 {
        // Row i takes lower_i v_{i-1} and upper_i v_{i+1}.
        let below = v
            .narrow(2, 0, n - 1)?
            .broadcast_mul(&wide(&lower.narrow(1, 1, n - 1)?)?)?;
        let above = v
            .narrow(2, 1, n - 1)?
            .broadcast_mul(&wide(&upper.narrow(1, 0, n - 1)?)?)?;
        y = (y + below.pad_with_zeros(2, 1, 0)?)?;
        y = (y + above.pad_with_zeros(2, 0, 1)?)?;
    }
    Ok(y)
}

/// [B, A B, .., A^{length-1} B] in about log2(length) products: a [systems, n, n], b [systems, n] to [systems, n, length].
pub fn krylov(a: &Tensor, b: &Tensor, length: usize) -> Result<Tensor> {
    let (systems, n, columns) = a.dims3()?;
    if n != columns || b.dims() != [systems, n] || length == 0 {
        bail!(
            "krylov: found A {:?}, B {:?}, length {length}",
            a.dims(),
            b.dims()
        );
    }
    let mut x = b.unsqueeze(2)?;
    let mut power = a.contiguous()?;
    loop {
        let have = x.dim(2)?;
        if have >= length {
            return Ok(x);
        }
        let more = have.min(length - have);
        let next = power.matmul(&x.narrow(2, 0, more)?.contiguous()?)?;
        x = Tensor::cat(&[&x, &next], 2)?;
        if x.dim(2)? < length {
            power = power.matmul(&power)?;
        }
    }
}

struct Solve {
    systems: usize,
    columns: usize,
    n: usize,
}

/// A factorised system: elimination with row exchanges, which leaves two upper diagonals.
struct Factors {
    diag: Vec<f64>,
    upper: Vec<f64>,
    second: Vec<f64>,
    multiplier: Vec<f64>,
    swapped: Vec<bool>,
}

impl Factors {
    fn new(lower: &[f64], diag: &[f64], upper: &[f64]) -> Self {
        let n = diag.len();
        let mut f = Factors {
            diag: diag.to_vec(),
            upper: upper.to_vec(),
            second: vec![0.0; n],
            multiplier: vec![0.0; n],
            swapped: vec![false; n],
        };
        f.upper[n - 1] = 0.0;
        for i in 0..n - 1 {
            let below = lower[i + 1];
            if below.abs() > f.diag[i].abs() {
                f.swapped[i] = true;
                f.multiplier[i] = f.diag[i] / below;
                let (old, next) = (f.upper[i], f.upper[i + 1]);
                f.diag[i] = below;
                f.upper[i] = f.diag[i + 1];
                f.second[i] = next;
                f.diag[i + 1] = old - f.multiplier[i] * f.upper[i];
                f.upper[i + 1] = -f.multiplier[i] * next;
            } else if below != 0.0 {
                f.multiplier[i] = below / f.diag[i];
                f.diag[i + 1] -= f.multiplier[i] * f.upper[i];
            }
        }
        f
    }

    fn solve(&self, v: &mut [f64]) {
        let n = v.len();
        for i in 0..n - 1 {
            if self.swapped[i] {
                v.swap(i, i + 1);
            }
            v[i + 1] -= self.multiplier[i] * v[i];
        }
        for i in (0..n).rev() {
            let mut value = v[i];
            if i + 1 < n {
                value -= self.upper[i] * v[i + 1];
            }
            if i + 2 < n {
                value -= self.second[i] * v[i + 2];
            }
            v[i] = value / self.diag[i];
        }
    }
}

fn wide<T: Real>(x: &[T]) -> Vec<f64> {
    x.iter().map(|v| v.wide()).collect()
}

impl Solve {
    fn system<T: Real>(&self, x: &[&[T]], h: usize) -> [Vec<f64>; 3] {
        [0, 1, 2].map(|part: usize| wide(&x[part][h * self.n..][..self.n]))
    }
}

impl Kernel for Solve {
    fn name(&self) -> &'static str {
        "tridiag_solve"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (k, n) = (self.columns, self.n);
        let mut out = vec![T::zero(); x[3].len()];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.systems, |h| {
            let [lower, diag, upper] = self.system(x, h);
            let factors = Factors::new(&lower, &diag, &upper);
            for column in 0..k {
                let at = (h * k + column) * n;
                let mut v = wide(&x[3][at..][..n]);
                factors.solve(&mut v);
                // SAFETY: systems are disjoint.
                let row = unsafe { shared.slice(at, n) };
                row.iter_mut().zip(v).for_each(|(s, v)| *s = T::of(v));
            }
        });
        (out, vec![self.systems, k, n])
    }

    fn backward<T: Real>(&self, x: &[&[T]], s: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (k, n) = (self.columns, self.n);
        let mut grads: Vec<Vec<T>> = x.iter().map(|x| vec![T::zero(); x.len()]).collect();
        for h in 0..self.systems {
            let [lower, diag, upper] = self.system(x, h);
            // The adjoint system is the transpose: its lower diagonal is the upper one moved down.
            let mut below = vec![0.0; n];
            let mut above = vec![0.0; n];
            below[1..].copy_from_slice(&upper[..n - 1]);
            above[..n - 1].copy_from_slice(&lower[1..]);
            let factors = Factors::new(&below, &diag, &above);
            let mut sums = vec![[0f64; 3]; n];
            for column in 0..k {
                let at = (h * k + column) * n;
                let mut w = wide(&gradient[at..][..n]);
                factors.solve(&mut w);
                let s = &s[at..][..n];
                for i in 0..n {
                    grads[3][at + i] = T::of(w[i]);
                    sums[i][1] -= w[i] * s[i].wide();
                    if i > 0 {
                        sums[i][0] -= w[i] * s[i - 1].wide();
                    }
                    if i + 1 < n {
                        sums[i][2] -= w[i] * s[i + 1].wide();
                    }
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                for part in 0..3 {
                    grads[part][h * n + i] = T::of(sum[part]);
                }
            }
        }
        grads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::{largest, tensor};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn the_product_of_a_solution_is_the_right_side(
            systems in 1usize..3, columns in 1usize..4, n in 1usize..12, salt in 0usize..1000, zero in any::<bool>(),
        ) {
            // With a diagonal of zeros only exchanges of rows keep the elimination going; n even keeps it regular.
            let n = if zero { 2 * n } else { n };
            let (l, u) = (tensor(&[systems, n], salt, 0.5, 1.0), tensor(&[systems, n], salt + 1, -1.0, -0.5));
            let d = if zero { l.zeros_like().unwrap() } else { tensor(&[systems, n], salt + 2, 1.0, 2.0) };
            let v = tensor(&[systems, columns, n], salt + 3, -1.0, 1.0);
            let s = tridiag_solve(&l, &d, &u, &v).unwrap();
            let back = tridiag_multiply(&l, &d, &u, &s).unwrap();
            prop_assert!(largest(&(back - v).unwrap()) < 1e-8);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let inputs = [
            tensor(&[2, 5], 1, -0.6, 0.6),
            tensor(&[2, 5], 2, 1.0, 2.0),
            tensor(&[2, 5], 3, -0.6, 0.6),
            tensor(&[2, 3, 5], 4, -1.0, 1.0),
        ];
        let error = gradient_error(&inputs, 1e-6, &|x| {
            tridiag_solve(&x[0], &x[1], &x[2], &x[3])
        })
        .unwrap();
        assert!(error < 1e-6, "{error}");
        assert!(tridiag_solve(&inputs[0], &inputs[1], &inputs[3], &inputs[3]).is_err());
    }

    #[test]
    fn krylov_columns_are_powers_and_doubling_stops_anywhere() {
        let (a, b) = (
            tensor(&[2, 4, 4], 1, -0.4, 0.4),
            tensor(&[2, 4], 2, -1.0, 1.0),
        );
        for length in [1, 2, 5, 8, 13] {
            let x = krylov(&a, &b, length).unwrap();
            assert_eq!(x.dims(), [2, 4, length]);
            let mut column = b.unsqueeze(2).unwrap();
            for t in 0..length {
                let error = largest(&(x.narrow(2, t, 1).unwrap() - &column).unwrap());
                assert!(error < 1e-14, "{error}");
                column = a.matmul(&column).unwrap();
            }
        }
        let error = gradient_error(&[a, b], 1e-6, &|x| krylov(&x[0], &x[1], 6)).unwrap();
        assert!(error < 1e-6, "{error}");
    }
}

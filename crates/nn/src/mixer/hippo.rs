//! Initial matrices of state-space layers (paper 12): HiPPO's LegS, LegT and Fourier, their diagonal-plus-low-rank form,
//! and the small complex linear algebra these need, in f64.

use rustfft::num_complex::Complex64 as C;

/// A square matrix, row-major.
pub type Matrix = Vec<Vec<C>>;

/// LegS: A [n, n] and B [n].
pub fn legs(n: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let root = |k: usize| (2.0 * k as f64 + 1.0).sqrt();
    let a = (0..n)
        .map(|i| {
            (0..n)
                .map(|k| match i.cmp(&k) {
                    std::cmp::Ordering::Greater => -root(i) * root(k),
                    std::cmp::Ordering::Equal => -(i as f64 + 1.0),
                    std::cmp::Ordering::Less => 0.0,
                })
                .collect()
        })
        .collect();
    (a, (0..n).map(root).collect())
}

/// LegT: A [n, n] and B [n].
pub fn legt(n: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let root = |k: usize| (2.0 * k as f64 + 1.0).sqrt();
    let a = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| {
                    let sign = if i < j && (j - i) % 2 == 1 { -1.0 } else { 1.0 };
                    -0.5 * root(i) * root(j) * sign
                })
                .collect()
        })
        .collect();
    (a, (0..n).map(|i| root(i) / 2.0).collect())
}

/// Fourier: A [n, n] and B [n].
pub fn fourier(n: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
    let b: Vec<f64> = (0..n)
        .map(|i| match i {
            0 => 1.0,
            i if i.is_multiple_of(2) => std::f64::consts::SQRT_2,
            _ => 0.0,
        })
        .collect();
    let frequency = |k: usize| {
        if k.is_multiple_of(2) {
            std::f64::consts::PI * (k / 2) as f64
        } else {
            0.0
        }
    };
    let a = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| {
                    let turn = if j == i + 1 {
                        -frequency(i)
                    } else if i == j + 1 {
                        frequency(j)
                    } else {
                        0.0
                    };
                    turn - b[i] * b[j]
                })
                .collect()
        })
        .collect();
    (a, b)
}

/// A system in normal-plus-low-rank form, one of each conjugate pair: A ~ diag(lambda) - P P*.
pub struct Nplr {
    /// Eigenvalues with negative imaginary part, ascending: [n / 2]
    pub lambda: Vec<C>,
    /// [n / 2]
    pub b: Vec<C>,
    /// [rank][n / 2]
    pub p: Vec<Vec<C>>,
    /// Eigenvectors as columns: [n][n / 2]
    pub v: Matrix,
}

/// LegS in that form, rank 1 (higher ranks are filled with zeros); `n` even. The eigenvalues' real part is exactly -1/2.
pub fn nplr_legs(n: usize, rank: usize) -> Nplr {
    let (a, b) = legs(n);
    let p: Vec<f64> = (0..n).map(|i| (i as f64 + 0.5).sqrt()).collect();
    nplr(&a, &b, &[p], rank)
}

/// LegT in that form, rank 2 (higher ranks are filled with zeros).
pub fn nplr_legt(n: usize, rank: usize) -> Nplr {
    let (a, b) = legt(n);
    let half = |odd: usize| -> Vec<f64> {
        (0..n)
            .map(|i| {
                if i % 2 == odd {
                    (1.0 + 2.0 * i as f64).sqrt() * 0.5f64.sqrt()
                } else {
                    0.0
                }
            })
            .collect()
    };
    nplr(&a, &b, &[half(0), half(1)], rank.max(2))
}

fn nplr(a: &[Vec<f64>], b: &[f64], p: &[Vec<f64>], rank: usize) -> Nplr {
    let n = b.len();
    // S = A + P Pᵀ is its diagonal plus a skew matrix K; -iK is Hermitian with real eigenvalues Im λ.
    let s = |i: usize, j: usize| a[i][j] + p.iter().map(|p| p[i] * p[j]).sum::<f64>();
    let real = (0..n).map(|i| s(i, i)).sum::<f64>() / n as f64;
    let hermitian: Matrix = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| C::new(0.0, -(s(i, j) - s(j, i)) / 2.0))
                .collect()
        })
        .collect();
    let (values, vectors) = eigen_hermitian(hermitian);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    order.truncate(n / 2);
    let v: Matrix = vectors
        .iter()
        .map(|row| order.iter().map(|&k| row[k]).collect())
        .collect();
    let project = |x: &[f64]| -> Vec<C> {
        (0..n / 2)
            .map(|k| (0..n).map(|i| v[i][k].conj() * x[i]).sum())
            .collect()
    };
    let mut projected: Vec<Vec<C>> = p.iter().map(|p| project(p)).collect();
    while projected.len() < rank {
        projected.push(vec![C::ZERO; n / 2]);
    }
    Nplr {
        lambda: order.iter().map(|&k| C::new(real, values[k])).collect(),
        b: project(b),
        p: projected,
        v,
    }
}

/// Eigenvalues and eigenvectors (columns) of a Hermitian matrix by cyclic Jacobi rotations.
pub fn eigen_hermitian(mut a: Matrix) -> (Vec<f64>, Matrix) {
    let n = a.len();
    let mut v: Matrix = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| if i == j { C::ONE } else { C::ZERO })
                .collect()
        })
        .collect();
    let total: f64 = a.iter().flatten().map(|x| x.norm_sqr()).sum();
    for _ in 0..60 {
        let off: f64 = (0..n)
            .flat_map(|i| (0..n).filter(move |&j| j != i).map(move |j| (i, j)))
            .map(|(i, j)| a[i][j].norm_sqr())
            .sum();
        if off <= 1e-30 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let size = a[p][q].norm();
                if size == 0.0 {
                    continue;
                }
                let phase = a[p][q] / size;
                let theta = (a[q][q].re - a[p][p].re) / (2.0 * size);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                // Columns, then rows: A <- J* A J with J mixing p and q.
                for row in a.iter_mut().chain(v.iter_mut()) {
                    let (x, y) = (row[p], row[q]);
                    row[p] = x * c - y * phase.conj() * s;
                    row[q] = x * phase * s + y * c;
                }
                for k in 0..n {
                    let (x, y) = (a[p][k], a[q][k]);
                    a[p][k] = x * c - y * phase * s;
                    a[q][k] = x * phase.conj() * s + y * c;
                }
            }
        }
    }
    ((0..n).map(|i| a[i][i].re).collect(), v)
}

/// a b.
pub fn multiply(a: &Matrix, b: &Matrix) -> Matrix {
    let columns = b.first().map_or(0, Vec::len);
    a.iter()
        .map(|row| {
            let mut out = vec![C::ZERO; columns];
            for (&x, b) in row.iter().zip(b) {
                for (out, &b) in out.iter_mut().zip(b) {
                    *out += x * b;
                }
            }
            out
        })
        .collect()
}

/// a^power by repeated squaring.
pub fn power(a: &Matrix, mut power: usize) -> Matrix {
    let n = a.len();
    let mut out: Matrix = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| if i == j { C::ONE } else { C::ZERO })
                .collect()
        })
        .collect();
    let mut square = a.clone();
    while power > 0 {
        if power % 2 == 1 {
            out = multiply(&out, &square);
        }
        power /= 2;
        if power > 0 {
            square = multiply(&square, &square);
        }
    }
    out
}

/// Solves a x = b for several right sides (columns of b), by Gauss with pivots.
pub fn solve(a: &Matrix, b: &Matrix) -> Matrix {
    let n = a.len();
    let mut m: Matrix = a
        .iter()
        .zip(b)
        .map(|(a, b)| a.iter().chain(b).copied().collect())
        .collect();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&i, &j| m[i][column].norm_sqr().total_cmp(&m[j][column].norm_sqr()))
            .unwrap_or(column);
        m.swap(column, pivot);
        let inverse = m[column][column].inv();
        m[column].iter_mut().for_each(|x| *x *= inverse);
        let pivot_row = m[column].clone();
        for (row, values) in m.iter_mut().enumerate() {
            let factor = values[column];
            if row != column && factor != C::ZERO {
                values
                    .iter_mut()
                    .zip(&pivot_row)
                    .for_each(|(x, p)| *x -= factor * p);
            }
        }
    }
    m.into_iter().map(|row| row[n..].to_vec()).collect()
}

/// Dense bilinear discretisation of diag(lambda) - Σ P P* over the full spectrum [half, conjugate half]: (Ā, B̄).
pub fn discretise(dt: f64, lambda: &[C], b: &[C], p: &[Vec<C>]) -> (Matrix, Vec<C>) {
    let n = 2 * lambda.len();
    let full = |x: &[C]| -> Vec<C> {
        x.iter()
            .copied()
            .chain(x.iter().map(|x| x.conj()))
            .collect()
    };
    let (lambda, b) = (full(lambda), full(b));
    let p: Vec<Vec<C>> = p.iter().map(|p| full(p)).collect();
    let entry = |i: usize, j: usize| {
        let diagonal = if i == j { lambda[i] } else { C::ZERO };
        diagonal - p.iter().map(|p| p[i] * p[j].conj()).sum::<C>()
    };
    let unit = |i: usize, j: usize| if i == j { C::ONE } else { C::ZERO };
    let matrix = |sign: f64| -> Matrix {
        (0..n)
            .map(|i| {
                (0..n)
                    .map(|j| unit(i, j) + entry(i, j) * (sign * dt / 2.0))
                    .collect()
            })
            .collect()
    };
    let mut right = matrix(1.0);
    for (row, b) in right.iter_mut().zip(&b) {
        row.push(b * dt);
    }
    let mut a = solve(&matrix(-1.0), &right);
    let b = a
        .iter_mut()
        .map(|row| row.pop().unwrap_or(C::ZERO))
        .collect();
    (a, b)
}

/// C~ = (I - Ā^l)ᵀ C, or back: `c` is half a spectrum.
pub fn transform_c(a_bar: &Matrix, l: usize, c: &[C], back: bool) -> Vec<C> {
    let n = a_bar.len();
    let grown = power(a_bar, l);
    let transposed: Matrix = (0..n)
        .map(|i| {
            (0..n)
                .map(|j| if i == j { C::ONE } else { C::ZERO } - grown[j][i])
                .collect()
        })
        .collect();
    let full: Matrix = c
        .iter()
        .copied()
        .chain(c.iter().map(|c| c.conj()))
        .map(|c| vec![c])
        .collect();
    let out = if back {
        solve(&transposed, &full)
    } else {
        multiply(&transposed, &full)
    };
    out.into_iter().take(n / 2).map(|row| row[0]).collect()
}

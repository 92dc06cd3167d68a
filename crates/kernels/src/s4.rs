//! Convolution kernels of state-space layers (paper 12): S4's by generating function (diagonal plus low rank), S4D's in
//! closed form, each as one operation with its analytic gradient.
//!
//! Arrays: dt [channels], A, B [channels, n, 2] and P [rank, channels, n, 2] over one of each conjugate pair, C
//! [heads, channels, n, 2]; out [heads, channels, length]. Complex tensors have a last axis of 2.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::composes;
use crate::pool::{Pool, SharedMut};
use crate::vandermonde::{
    cauchy_many, cauchy_many_backward, complex, pairs, vandermonde_add, vandermonde_backward,
    vandermonde_composed,
};
use candle_core::{DType, Result, Tensor, bail};
use rustfft::num_complex::Complex64 as C;

/// How a diagonal system is made discrete.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Discretisation {
    /// Zero-order hold: input constant over a step.
    Zoh,
    /// Bilinear (Tustin).
    Bilinear,
    /// DSS's softmax normalisation over the length; the value is added to |x|² in its reciprocal.
    Dss(f64),
}

struct Sizes {
    heads: usize,
    channels: usize,
    n: usize,
}

fn sizes(dt: &Tensor, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Sizes> {
    match (dt.dims(), a.dims(), b.dims(), c.dims()) {
        (&[h], &[h_a, n, 2], &[h_b, n_b, 2], &[heads, h_c, n_c, 2])
            if [h_a, h_b, h_c] == [h; 3] && [n_b, n_c] == [n; 2] =>
        {
            Ok(Sizes {
                heads,
                channels: h,
                n,
            })
        }
        (dt, a, b, c) => bail!(
            "state-space kernel: found dt {dt:?}, A {a:?}, B {b:?}, C {c:?}, \
             expected [channels], [channels, n, 2] twice, [heads, channels, n, 2]"
        ),
    }
}

/// S4D's kernel. See the module's text for shapes.
pub fn diagonal_kernel(
    dt: &Tensor,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    length: usize,
    discretisation: Discretisation,
) -> Result<Tensor> {
    let sizes = sizes(dt, a, b, c)?;
    if composes(c) && matches!(discretisation, Discretisation::Zoh) {
        return zoh_composed(dt, a, b, c, length);
    }
    let op = Diagonal {
        sizes,
        length,
        discretisation,
    };
    apply(op, &[dt, a, b, c])
}

/// S4's kernel of A - P P*, bilinear. `c` is C~ = (I - Ā^l)ᵀ C for l = `l_kernel`; the first `length` (at most
/// `l_kernel`) values of the kernel come back.
pub fn dplr_kernel(
    dt: &Tensor,
    a: &Tensor,
    b: &Tensor,
    p: &Tensor,
    c: &Tensor,
    l_kernel: usize,
    length: usize,
) -> Result<Tensor> {
    let sizes = sizes(dt, a, b, c)?;
    let rank = match p.dims() {
        &[rank, h, n, 2] if (h, n) == (sizes.channels, sizes.n) && rank > 0 => rank,
        other => {
            bail!("P of the S4 kernel: found shape {other:?}, expected [rank, channels, n, 2]")
        }
    };
    if length > l_kernel || l_kernel == 0 {
        bail!("S4 kernel: found length {length}, expected at most l_kernel, {l_kernel}");
    }
    let op = Dplr {
        sizes,
        rank,
        l_kernel,
        length,
    };
    apply(op, &[dt, a, b, p, c])
}

/// [`diagonal_kernel`] with zero-order hold in candle's operations, in f64.
fn zoh_composed(dt: &Tensor, a: &Tensor, b: &Tensor, c: &Tensor, length: usize) -> Result<Tensor> {
    let (heads, channels, n, _) = c.dims4()?;
    let wide = |t: &Tensor| t.to_dtype(DType::F64);
    let parts = |t: &Tensor| -> Result<(Tensor, Tensor)> {
        let (t, last) = (wide(t)?, t.rank() - 1);
        let part = |at: usize| t.narrow(last, at, 1)?.squeeze(last)?.contiguous();
        Ok((part(0)?, part(1)?))
    };
    let times = |(ar, ai): (&Tensor, &Tensor), (br, bi): (&Tensor, &Tensor)| {
        let re = (ar.broadcast_mul(br)? - ai.broadcast_mul(bi)?)?;
        let im = (ar.broadcast_mul(bi)? + ai.broadcast_mul(br)?)?;
        Ok::<_, candle_core::Error>((re, im))
    };
    let dt = wide(dt)?.unsqueeze(1)?; // [channels, 1]
    let ((ar, ai), (br, bi), (cr, ci)) = (parts(a)?, parts(b)?, parts(c)?);
    let (xr, xi) = (ar.broadcast_mul(&dt)?, ai.broadcast_mul(&dt)?);
    // (e^x - 1) / a: times the conjugate, over the square of the size
    let size = xr.exp()?;
    let (gr, gi) = (((&size * xi.cos()?)? - 1.0)?, (&size * xi.sin()?)?);
    let square = (ar.sqr()? + ai.sqr()?)?;
    let (fr, fi) = times((&gr, &gi), (&ar, &ai.neg()?))?;
    let (fr, fi) = ((fr / &square)?, (fi / &square)?);
    let (vr, vi) = times((&fr, &fi), (&br, &bi))?; // [channels, n]
    let (vr, vi) = times((&cr, &ci), (&vr, &vi))?; // [heads, channels, n]
    let shape = (heads * channels, n, 2);
    let v = Tensor::stack(&[vr, vi], 3)?.reshape(shape)?;
    let x = Tensor::stack(&[xr, xi], 2)?
        .unsqueeze(0)?
        .broadcast_as((heads, channels, n, 2))?
        .contiguous()?
        .reshape(shape)?;
    vandermonde_composed(&v, &x, length)?
        .reshape((heads, channels, length))?
        .to_dtype(c.dtype())
}

struct Diagonal {
    sizes: Sizes,
    length: usize,
    discretisation: Discretisation,
}

/// e^x - 1 without cancellation for small x.
pub fn expm1(x: C) -> C {
    // e^a cos b - 1 = expm1(a) cos b - 2 sin²(b/2)
    let half = (x.im / 2.0).sin();
    C::new(
        x.re.exp_m1() * x.im.cos() - 2.0 * half * half,
        x.re.exp() * x.im.sin(),
    )
}

/// One mode: the exponent per step x, the factor f of B C, and their derivatives by A and dt.
struct Mode {
    x: C,
    f: C,
    x_a: C,
    x_dt: C,
    f_a: C,
    f_dt: C,
}

impl Diagonal {
    fn mode(&self, dt: f64, a: C) -> Mode {
        let x = a * dt;
        match self.discretisation {
            Discretisation::Zoh => {
                let (grown, power) = (expm1(x), x.exp());
                let f_a = if x.norm() < 1e-4 {
                    // (x e^x - e^x + 1) / a² = dt² (1/2 + x/3 + x²/8 + ...)
                    (x * x / 8.0 + x / 3.0 + 0.5) * (dt * dt)
                } else {
                    (x * power - grown) / (a * a)
                };
                let f = if a == C::ZERO { dt.into() } else { grown / a };
                Mode {
                    x,
                    f,
                    x_a: dt.into(),
                    x_dt: a,
                    f_a,
                    f_dt: power,
                }
            }
            Discretisation::Bilinear => {
                let u = x / 2.0;
                let inverse = (C::ONE - u).inv();
                let slope = (C::ONE - u * u).inv();
                Mode {
                    x: ((C::ONE + u) * inverse).ln(),
                    f: inverse * dt,
                    x_a: slope * dt,
                    x_dt: slope * a,
                    f_a: inverse * inverse * (dt * dt / 2.0),
                    f_dt: inverse * inverse,
                }
            }
            // The reciprocal is not analytic: its gradient is made in `backward`.
            Discretisation::Dss(eps) => {
                let q = a * expm1(x * self.length as f64);
                let r = q.conj() / (q.norm_sqr() + eps);
                Mode {
                    x,
                    f: expm1(x) * r / 2.0,
                    x_a: dt.into(),
                    x_dt: a,
                    f_a: C::ZERO,
                    f_dt: C::ZERO,
                }
            }
        }
    }
}

impl Kernel for Diagonal {
    fn name(&self) -> &'static str {
        "s4d_kernel"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let Sizes { heads, channels, n } = self.sizes;
        let (a, b, c) = (complex(inputs[1]), complex(inputs[2]), complex(inputs[3]));
        let mut out = vec![T::zero(); heads * channels * self.length];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(channels, |h| {
            let modes: Vec<Mode> = (0..n)
                .map(|i| self.mode(inputs[0][h].wide(), a[h * n + i]))
                .collect();
            let x: Vec<C> = modes.iter().map(|mode| mode.x).collect();
            for head in 0..heads {
                let at = (head * channels + h) * n;
                let v: Vec<C> = (0..n)
                    .map(|i| c[at + i] * b[h * n + i] * modes[i].f)
                    .collect();
                let mut row = vec![0f64; self.length];
                vandermonde_add(&v, &x, &mut row);
                // SAFETY: this row belongs to this job alone.
                let out = unsafe { shared.slice((head * channels + h) * self.length, self.length) };
                out.iter_mut().zip(row).for_each(|(out, v)| *out = T::of(v));
            }
        });
        (out, vec![heads, channels, self.length])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let Sizes { heads, channels, n } = self.sizes;
        let (a, b, c) = (complex(inputs[1]), complex(inputs[2]), complex(inputs[3]));
        // Per channel: dt, A [n], B [n], C [heads, n].
        type Part = (f64, Vec<C>, Vec<C>, Vec<C>);
        let mut parts: Vec<Part> = vec![Default::default(); channels];
        let shared = SharedMut::new(&mut parts);
        Pool::global().for_each(channels, |h| {
            let dt = inputs[0][h].wide();
            let modes: Vec<Mode> = (0..n).map(|i| self.mode(dt, a[h * n + i])).collect();
            let x: Vec<C> = modes.iter().map(|mode| mode.x).collect();
            let (mut grad_dt, mut grad_a, mut grad_b) = (0f64, vec![C::ZERO; n], vec![C::ZERO; n]);
            let mut grad_c = vec![C::ZERO; heads * n];
            for head in 0..heads {
                let row = head * channels + h;
                let v: Vec<C> = (0..n)
                    .map(|i| c[row * n + i] * b[h * n + i] * modes[i].f)
                    .collect();
                let g: Vec<f64> = gradient[row * self.length..][..self.length]
                    .iter()
                    .map(|g| g.wide())
                    .collect();
                let (grad_v, grad_x) = vandermonde_backward(&v, &x, &g);
                for i in 0..n {
                    let (mode, b_i, c_i) = (&modes[i], b[h * n + i], c[row * n + i]);
                    grad_c[head * n + i] += grad_v[i] * (b_i * mode.f).conj();
                    grad_b[i] += grad_v[i] * (c_i * mode.f).conj();
                    let grad_f = grad_v[i] * (b_i * c_i).conj();
                    let mut grad_x = grad_x[i];
                    if let Discretisation::Dss(eps) = self.discretisation {
                        // f = expm1(x) r / 2, r = q̄ / (|q|² + eps), q = a expm1(L x)
                        let (a_i, length) = (a[h * n + i], self.length as f64);
                        let (small, large) = (expm1(mode.x), expm1(mode.x * length));
                        let q = a_i * large;
                        let m = 1.0 / (q.norm_sqr() + eps);
                        let r = q.conj() * m;
                        let grad_r = grad_f * small.conj() / 2.0;
                        grad_x += grad_f * (mode.x.exp() * r).conj() / 2.0;
                        let grad_q =
                            grad_r.conj() * m - q * (2.0 * m * m * (grad_r.conj() * q.conj()).re);
                        grad_a[i] += grad_q * large.conj();
                        grad_x += grad_q * (a_i * length * (mode.x * length).exp()).conj();
                    }
                    grad_a[i] += grad_x * mode.x_a.conj() + grad_f * mode.f_a.conj();
                    grad_dt += (grad_x * mode.x_dt.conj() + grad_f * mode.f_dt.conj()).re;
                }
            }
            // SAFETY: this channel's part belongs to this job alone.
            unsafe { shared.slice(h, 1)[0] = (grad_dt, grad_a, grad_b, grad_c) };
        });
        let all = |of: &dyn Fn(&Part) -> &[C]| -> Vec<T> {
            pairs(
                &parts
                    .iter()
                    .flat_map(|part| of(part).to_vec())
                    .collect::<Vec<C>>(),
            )
        };
        let grad_c: Vec<C> = (0..heads)
            .flat_map(|head| {
                parts
                    .iter()
                    .flat_map(move |part| part.3[head * n..][..n].to_vec())
            })
            .collect();
        vec![
            parts.iter().map(|part| T::of(part.0)).collect(),
            all(&|part| &part.1),
            all(&|part| &part.2),
            pairs(&grad_c),
        ]
    }
}

struct Dplr {
    sizes: Sizes,
    rank: usize,
    l_kernel: usize,
    length: usize,
}

/// One channel's Cauchy products and what was multiplied for each.
struct Products {
    /// dt times left times right, in the order of `pairs`.
    v: Vec<Vec<C>>,
    /// left [1 + rank]: B, P_0, ..; right [heads + rank]: C_0, .., conj(P_0), ..
    left: Vec<Vec<C>>,
    right: Vec<Vec<C>>,
    poles: Vec<C>,
}

impl Dplr {
    /// Nodes z = 2 (1 - ω) / (1 + ω) = 2i tan(π j / L), without that at ω = -1.
    fn nodes(&self) -> Vec<C> {
        let l = self.l_kernel;
        (0..=(l - 1) / 2)
            .map(|j| {
                C::new(
                    0.0,
                    2.0 * (std::f64::consts::PI * j as f64 / l as f64).tan(),
                )
            })
            .collect()
    }

    fn products<T: Real>(&self, inputs: &[&[T]], h: usize) -> Products {
        let Sizes { heads, channels, n } = self.sizes;
        let dt = inputs[0][h].wide();
        let row = |input: usize, row: usize| complex(&inputs[input][row * n * 2..][..n * 2]);
        let poles = row(1, h).into_iter().map(|a| a * dt).collect();
        let mut left = vec![row(2, h)];
        let mut right: Vec<Vec<C>> = (0..heads).map(|head| row(4, head * channels + h)).collect();
        for rank in 0..self.rank {
            let p = row(3, rank * channels + h);
            right.push(p.iter().map(|p| p.conj()).collect());
            left.push(p);
        }
        let v = left
            .iter()
            .flat_map(|left| {
                right
                    .iter()
                    .map(move |right| left.iter().zip(right).map(|(l, r)| l * r * dt).collect())
            })
            .collect();
        Products {
            v,
            left,
            right,
            poles,
        }
    }

    /// Inverse of G = I + [r(P_j, Q_i)] (row i, column j) by Gauss and Jordan with pivots.
    fn inverse(&self, g: &[Vec<C>]) -> Vec<Vec<C>> {
        let r = self.rank;
        let mut m: Vec<Vec<C>> = (0..r)
            .map(|i| {
                let unit = (0..r).map(|j| if i == j { C::ONE } else { C::ZERO });
                g[i].iter().copied().chain(unit).collect()
            })
            .collect();
        for column in 0..r {
            let pivot = (column..r)
                .max_by(|&a, &b| m[a][column].norm_sqr().total_cmp(&m[b][column].norm_sqr()))
                .unwrap_or(column);
            m.swap(column, pivot);
            let scale = m[column][column].inv();
            m[column].iter_mut().for_each(|x| *x *= scale);
            let pivot_row = m[column].clone();
            for (row, values) in m.iter_mut().enumerate() {
                if row != column {
                    let factor = values[column];
                    values
                        .iter_mut()
                        .zip(&pivot_row)
                        .for_each(|(x, p)| *x -= factor * p);
                }
            }
        }
        m.into_iter().map(|row| row[r..].to_vec()).collect()
    }

    /// Index of the product of left i and right j.
    fn at(&self, left: usize, right: usize) -> usize {
        left * (self.sizes.heads + self.rank) + right
    }

    /// Woodbury at node l: (G^-1, x = G^-1 b, y = G^-T a for each head), b_j = r(B, Q_j), a_i = r(P_i, C).
    fn woodbury(&self, r: &[Vec<C>], l: usize) -> (Vec<C>, Vec<Vec<C>>) {
        let (heads, rank) = (self.sizes.heads, self.rank);
        let g: Vec<Vec<C>> = (0..rank)
            .map(|i| {
                (0..rank)
                    .map(|j| {
                        let unit = if i == j { C::ONE } else { C::ZERO };
                        unit + r[self.at(1 + j, heads + i)][l]
                    })
                    .collect()
            })
            .collect();
        let inverse = self.inverse(&g);
        let x = (0..rank)
            .map(|i| {
                (0..rank)
                    .map(|j| inverse[i][j] * r[self.at(0, heads + j)][l])
                    .sum()
            })
            .collect();
        let y = (0..heads)
            .map(|head| {
                (0..rank)
                    .map(|j| {
                        (0..rank)
                            .map(|i| inverse[i][j] * r[self.at(1 + i, head)][l])
                            .sum()
                    })
                    .collect()
            })
            .collect();
        (x, y)
    }
}

impl Kernel for Dplr {
    fn name(&self) -> &'static str {
        "s4_kernel"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let Sizes { heads, channels, n } = self.sizes;
        let (l_kernel, nodes) = (self.l_kernel, self.nodes());
        let mut out = vec![T::zero(); heads * channels * self.length];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(channels, |h| {
            let p = self.products(inputs, h);
            let v: Vec<&[C]> = p.v.iter().map(|v| &v[..]).collect();
            let r = cauchy_many(&v, &p.poles, &nodes);
            let woodbury: Vec<_> = (0..nodes.len()).map(|l| self.woodbury(&r, l)).collect();
            for head in 0..heads {
                let mut spectrum = vec![C::ZERO; l_kernel];
                for (l, &z) in nodes.iter().enumerate() {
                    let low_rank: C = (0..self.rank)
                        .map(|i| r[self.at(1 + i, head)][l] * woodbury[l].0[i])
                        .sum();
                    // 2 / (1 + ω) = 1 + z / 2
                    let k = (r[self.at(0, head)][l] - low_rank) * (C::ONE + z / 2.0);
                    spectrum[l] = k;
                    if l > 0 {
                        spectrum[l_kernel - l] = k.conj();
                    }
                }
                if l_kernel.is_multiple_of(2) {
                    // The limit at ω = -1; see the paper's page.
                    let limit: f64 = (0..n).map(|i| p.v[self.at(0, head)][i].re).sum();
                    spectrum[l_kernel / 2] = limit.into();
                }
                f64::fft(l_kernel, true).process(&mut spectrum);
                // SAFETY: this row belongs to this job alone.
                let out = unsafe { shared.slice((head * channels + h) * self.length, self.length) };
                for (out, k) in out.iter_mut().zip(spectrum) {
                    *out = T::of(k.re / l_kernel as f64);
                }
            }
        });
        (out, vec![heads, channels, self.length])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let Sizes { heads, channels, n } = self.sizes;
        let (l_kernel, nodes) = (self.l_kernel, self.nodes());
        let mut out: Vec<Vec<T>> = inputs.iter().map(|i| vec![T::zero(); i.len()]).collect();
        let shared: Vec<SharedMut<T>> = out.iter_mut().map(|o| SharedMut::new(o)).collect();
        Pool::global().for_each(channels, |h| {
            let p = self.products(inputs, h);
            let v: Vec<&[C]> = p.v.iter().map(|v| &v[..]).collect();
            let r = cauchy_many(&v, &p.poles, &nodes);
            let mut grad_r = vec![vec![C::ZERO; nodes.len()]; v.len()];
            let mut grad_v_limit = vec![0f64; heads];
            let woodbury: Vec<_> = (0..nodes.len()).map(|l| self.woodbury(&r, l)).collect();
            for head in 0..heads {
                let row = &gradient[(head * channels + h) * self.length..][..self.length];
                let mut spectrum = vec![C::ZERO; l_kernel];
                for (z, g) in spectrum.iter_mut().zip(row) {
                    z.re = g.wide();
                }
                f64::fft(l_kernel, false).process(&mut spectrum);
                for (l, &z) in nodes.iter().enumerate() {
                    // Each node but the first stands for itself and its conjugate.
                    let weight = if l == 0 { 1.0 } else { 2.0 } / l_kernel as f64;
                    let g = spectrum[l] * weight * (C::ONE + z / 2.0).conj();
                    // k = s - aᵀ G⁻¹ b: dk = ds - da·x - y·db + yᵀ dG x
                    let (x, y) = &woodbury[l];
                    let y = &y[head];
                    grad_r[self.at(0, head)][l] += g;
                    for i in 0..self.rank {
                        grad_r[self.at(1 + i, head)][l] -= g * x[i].conj();
                        grad_r[self.at(0, heads + i)][l] -= g * y[i].conj();
                        for j in 0..self.rank {
                            grad_r[self.at(1 + j, heads + i)][l] += g * (y[i] * x[j]).conj();
                        }
                    }
                }
                if l_kernel.is_multiple_of(2) {
                    grad_v_limit[head] = spectrum[l_kernel / 2].re / l_kernel as f64;
                }
            }
            let (mut grad_v, grad_poles) = cauchy_many_backward(&v, &p.poles, &nodes, &grad_r);
            for (head, g) in grad_v_limit.into_iter().enumerate() {
                grad_v[self.at(0, head)].iter_mut().for_each(|v| v.re += g);
            }
            let dt = inputs[0][h].wide();
            let a = complex(&inputs[1][h * n * 2..][..n * 2]);
            let mut grad_dt = 0f64;
            let mut grad_left = vec![vec![C::ZERO; n]; p.left.len()];
            let mut grad_right = vec![vec![C::ZERO; n]; p.right.len()];
            for (i, left) in p.left.iter().enumerate() {
                for (j, right) in p.right.iter().enumerate() {
                    let g = &grad_v[self.at(i, j)];
                    for k in 0..n {
                        grad_left[i][k] += g[k] * (right[k] * dt).conj();
                        grad_right[j][k] += g[k] * (left[k] * dt).conj();
                        grad_dt += (g[k] * (left[k] * right[k]).conj()).re;
                    }
                }
            }
            for k in 0..n {
                grad_dt += (grad_poles[k] * a[k].conj()).re;
            }
            let put = |input: usize, row: usize, values: &[C]| {
                // SAFETY: rows of channel h belong to this job alone.
                unsafe { shared[input].slice(row * n * 2, n * 2) }.copy_from_slice(&pairs(values));
            };
            // SAFETY: as above.
            unsafe { *shared[0].at(h) = T::of(grad_dt) };
            let grad_a: Vec<C> = grad_poles.iter().map(|g| g * dt).collect();
            put(1, h, &grad_a);
            put(2, h, &grad_left[0]);
            for rank in 0..self.rank {
                let both: Vec<C> = grad_left[1 + rank]
                    .iter()
                    .zip(&grad_right[heads + rank])
                    .map(|(left, right)| left + right.conj())
                    .collect();
                put(3, rank * channels + h, &both);
            }
            for head in 0..heads {
                put(4, head * channels + h, &grad_right[head]);
            }
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::tensor;
    use candle_core::Device;

    /// A, with negative real and imaginary parts.
    fn poles(channels: usize, n: usize) -> Tensor {
        tensor(&[channels, n, 2], 5, -3.0, -0.3)
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let dt = tensor(&[2], 1, 0.05, 0.3);
        let (b, c) = (
            tensor(&[2, 3, 2], 2, -1.0, 1.0),
            tensor(&[2, 2, 3, 2], 3, -1.0, 1.0),
        );
        for method in [
            Discretisation::Zoh,
            Discretisation::Bilinear,
            Discretisation::Dss(1e-3),
        ] {
            let inputs = [dt.clone(), poles(2, 3), b.clone(), c.clone()];
            let error = gradient_error(&inputs, 1e-6, &|x| {
                diagonal_kernel(&x[0], &x[1], &x[2], &x[3], 9, method)
            })
            .unwrap();
            assert!(error < 1e-6, "{method:?}: {error}");
        }
        for (rank, l_kernel, length) in [(1, 8, 8), (1, 7, 5), (2, 10, 10), (1, 1, 1), (1, 2, 2)] {
            let p = tensor(&[rank, 2, 3, 2], 4, -0.5, 0.5);
            let inputs = [dt.clone(), poles(2, 3), b.clone(), p, c.clone()];
            let error = gradient_error(&inputs, 1e-6, &|x| {
                dplr_kernel(&x[0], &x[1], &x[2], &x[3], &x[4], l_kernel, length)
            })
            .unwrap();
            assert!(error < 1e-6, "rank {rank}, {l_kernel}: {error}");
        }
    }

    #[test]
    fn long_kernels_of_small_steps_have_finite_gradients() {
        let dt = Tensor::new(&[1e-4f32], &Device::Cpu).unwrap();
        let f32s = |t: Tensor| t.to_dtype(candle_core::DType::F32).unwrap();
        let (a, b) = (f32s(poles(1, 4)), f32s(tensor(&[1, 4, 2], 2, -1.0, 1.0)));
        let (p, c) = (
            f32s(tensor(&[1, 1, 4, 2], 4, -0.5, 0.5)),
            candle_core::Var::from_tensor(&f32s(tensor(&[1, 1, 4, 2], 3, -1.0, 1.0))).unwrap(),
        );
        for dplr in [true, false] {
            let k = if dplr {
                dplr_kernel(&dt, &a, &b, &p, c.as_tensor(), 16_384, 16_384)
            } else {
                diagonal_kernel(&dt, &a, &b, c.as_tensor(), 16_384, Discretisation::Zoh)
            }
            .unwrap();
            let gradients = k.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let gradient = gradients.get(c.as_tensor()).unwrap().flatten_all().unwrap();
            assert!(
                gradient
                    .to_vec1::<f32>()
                    .unwrap()
                    .iter()
                    .all(|g| g.is_finite())
            );
        }
    }

    #[test]
    fn without_low_rank_part_the_two_kernels_agree() {
        // C~ = (1 - ā^L) C elementwise when A is diagonal.
        let (dt, n, l) = (0.1, 3, 12);
        let (a, b, c) = (
            poles(1, n),
            tensor(&[1, n, 2], 2, -1.0, 1.0),
            tensor(&[1, 1, n, 2], 3, -1.0, 1.0),
        );
        let flat = |t: &Tensor| complex(&t.flatten_all().unwrap().to_vec1::<f64>().unwrap());
        let c_tilde: Vec<C> = flat(&a)
            .iter()
            .zip(flat(&c))
            .map(|(a, c)| {
                let u = a * dt / 2.0;
                (C::ONE - ((C::ONE + u) / (C::ONE - u)).powu(l as u32)) * c
            })
            .collect();
        let c_tilde = Tensor::from_vec(pairs::<f64>(&c_tilde), (1, 1, n, 2), &Device::Cpu).unwrap();
        let dt = Tensor::new(&[dt], &Device::Cpu).unwrap();
        let p = Tensor::zeros((1, 1, n, 2), candle_core::DType::F64, &Device::Cpu).unwrap();
        let dplr = dplr_kernel(&dt, &a, &b, &p, &c_tilde, l, l).unwrap();
        let diagonal = diagonal_kernel(&dt, &a, &b, &c, l, Discretisation::Bilinear).unwrap();
        let difference = (dplr - diagonal).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f64>().unwrap() < 1e-12);
    }
}

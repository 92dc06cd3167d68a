//! State-space duality (Mamba-2, paper 16): the scan `S_t = e^{dt_t A} S_{t-1} + dt_t x_t B_tᵀ`, `y_t = S_t C_t`, by chunks.
//!
//! Inside a chunk the scan is a masked matrix product, between chunks a state is carried, so the work is matrix products
//! of chunk size: one operation on the CPU (`fused`), a composition of candle's elsewhere. Differentiable, also in the carried
//! state. Decays are differences of running sums inside one chunk, at most 0, so nothing grows.

mod composed;
mod fused;
mod parts;

use crate::autograd::apply;
use crate::composed::{Kept, band, composes, node};
use crate::cpu::Level;
use crate::cut::cut;
use candle_core::{DType, Device, DeviceLocation, Result, Tensor, bail};
use composed::Chunked;
use fused::Fused;

/// Inputs of a scan, f32 or f64.
pub struct Scan<'a> {
    /// [batch, length, heads, head_dim]
    pub x: &'a Tensor,
    /// Step sizes, after softplus: [batch, length, heads]
    pub dt: &'a Tensor,
    /// Negative decay rates: [heads]
    pub a: &'a Tensor,
    /// [batch, length, groups, state]; head h reads group h / (heads / groups)
    pub b: &'a Tensor,
    /// As `b`.
    pub c: &'a Tensor,
    /// State before the first token, [batch, heads, head_dim, state]; none = zero.
    pub state: Option<&'a Tensor>,
}

struct Sizes {
    batch: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
    state: usize,
}

impl Scan<'_> {
    fn sizes(&self) -> Result<Sizes> {
        let (batch, length, heads, head_dim) = self.x.dims4()?;
        let (_, _, groups, state) = self.b.dims4()?;
        let rows = [batch, length];
        let right = self.dt.dims() == [batch, length, heads]
            && self.a.dims() == [heads]
            && self.b.dims()[..2] == rows
            && self.b.dims() == self.c.dims()
            && groups > 0
            && heads.is_multiple_of(groups)
            && self
                .state
                .is_none_or(|s| s.dims() == [batch, heads, head_dim, state]);
        if !right {
            bail!(
                "ssd: found x {:?}, dt {:?}, a {:?}, b {:?}, c {:?}, state {:?}",
                self.x.dims(),
                self.dt.dims(),
                self.a.dims(),
                self.b.dims(),
                self.c.dims(),
                self.state.map(|s| s.dims())
            );
        }
        Ok(Sizes {
            batch,
            length,
            heads,
            head_dim,
            state,
        })
    }

    fn start(&self, s: &Sizes) -> Result<Tensor> {
        match self.state {
            Some(state) => Ok(state.clone()),
            None => Tensor::zeros(
                (s.batch, s.heads, s.head_dim, s.state),
                self.x.dtype(),
                self.x.device(),
            ),
        }
    }

    /// y [batch, length, heads, head_dim] and the state after the last token. `chunk` changes speed, not results.
    pub fn chunked(&self, chunk: usize) -> Result<(Tensor, Tensor)> {
        let s = self.sizes()?;
        if chunk == 0 {
            bail!("ssd: found chunk size 0, expected 1 or more");
        }
        if composes(self.x) || s.length == 0 {
            return self.composed(chunk);
        }
        let op = Fused {
            level: Level::current(),
            batch: s.batch,
            length: s.length,
            heads: s.heads,
            head_dim: s.head_dim,
            groups: self.b.dim(2)?,
            state: s.state,
            chunk,
        };
        let split = op.y_len();
        let start = self.start(&s)?;
        let both = apply(op, &[self.x, self.dt, self.a, self.b, self.c, &start])?;
        let both = cut(&both, &[split, start.elem_count()])?;
        Ok((
            both[0].reshape(self.x.shape())?,
            both[1].reshape(start.shape())?,
        ))
    }

    /// [`chunked`](Self::chunked) in candle's operations, for any device: all chunks at once, and the states between them as one
    /// more product (the matrix form of Mamba-2, Dao and Gu, arXiv 2405.21060).
    pub fn composed(&self, chunk: usize) -> Result<(Tensor, Tensor)> {
        let s = self.sizes()?;
        let start = self.start(&s)?;
        if s.length == 0 {
            return Ok((self.x.clone(), start));
        }
        let inputs = [self.x, self.dt, self.a, self.b, self.c, &start];
        let both = node(Chunked::new(chunk), &inputs)?;
        let both = cut(&both, &[self.x.elem_count(), start.elem_count()])?;
        Ok((
            both[0].reshape(self.x.shape())?,
            both[1].reshape(start.shape())?,
        ))
    }

    /// The naive twin: token by token, in f64 on the host, without gradients. Same results as [`chunked`](Self::chunked).
    pub fn naive(&self) -> Result<(Tensor, Tensor)> {
        let s = self.sizes()?;
        let groups = self.b.dim(2)?;
        let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (x, dt, a) = (flat(self.x)?, flat(self.dt)?, flat(self.a)?);
        let (b, c) = (flat(self.b)?, flat(self.c)?);
        let mut state = flat(&self.start(&s)?)?;
        let (p_count, n) = (s.head_dim, s.state);
        let mut y = vec![0f64; x.len()];
        for batch in 0..s.batch {
            for t in 0..s.length {
                let token = batch * s.length + t;
                for h in 0..s.heads {
                    let step = dt[token * s.heads + h];
                    let decay = (step * a[h]).exp();
                    let read = (token * groups + h / (s.heads / groups)) * n;
                    for p in 0..p_count {
                        let at = (token * s.heads + h) * p_count + p;
                        let row = &mut state[((batch * s.heads + h) * p_count + p) * n..][..n];
                        for (k, value) in row.iter_mut().enumerate() {
                            *value = decay * *value + step * x[at] * b[read + k];
                            y[at] += *value * c[read + k];
                        }
                    }
                }
            }
        }
        let dtype = self.x.dtype();
        let shape = (s.batch, s.heads, s.head_dim, s.state);
        Ok((
            Tensor::from_vec(y, self.x.shape(), self.x.device())?.to_dtype(dtype)?,
            Tensor::from_vec(state, shape, self.x.device())?.to_dtype(dtype)?,
        ))
    }
}

/// Inclusive running sums of the rows of x [rows, n], made in f64.
fn running(x: &Tensor) -> Result<Tensor> {
    let upper = upper(x.dim(1)?, x.device())?;
    x.to_dtype(DType::F64)?.matmul(&upper)?.to_dtype(x.dtype())
}

/// 1 on and above the diagonal, 0 below it: [n, n], f64.
fn upper(n: usize, device: &Device) -> Result<Tensor> {
    static UPPER: Kept<(usize, DeviceLocation), Tensor> = Kept::new(8);
    UPPER.get((n, device.location()), || {
        let ones = (0..n * n).map(|at| if at / n <= at % n { 1.0 } else { 0.0 });
        Tensor::from_vec(ones.collect::<Vec<f64>>(), (n, n), device)
    })
}

/// Sums of each element of the rows of x [rows, n] and all behind it, made in f64: the gradient of [`running`].
fn falling(x: &Tensor) -> Result<Tensor> {
    let upper = upper(x.dim(1)?, x.device())?;
    let sums = x.to_dtype(DType::F64)?.matmul(&upper.t()?)?;
    sums.to_dtype(x.dtype())
}

/// 0 on and below the diagonal, far below 0 above it: [n, n].
fn lower(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    band((0, n), (0, n), usize::MAX, device)?.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Kernel, gradient_error};
    use crate::harness::{distance, tensor};
    use proptest::prelude::*;

    fn inputs(batch: usize, length: usize, groups: usize, salt: usize) -> Vec<Tensor> {
        let (heads, p, n) = (2 * groups, 3, 4);
        vec![
            tensor(&[batch, length, heads, p], salt, -1.0, 1.0),
            tensor(&[batch, length, heads], salt + 1, 0.01, 0.8),
            tensor(&[heads], salt + 2, -2.0, -0.1),
            tensor(&[batch, length, groups, n], salt + 3, -1.0, 1.0),
            tensor(&[batch, length, groups, n], salt + 4, -1.0, 1.0),
            tensor(&[batch, heads, p, n], salt + 5, -1.0, 1.0),
        ]
    }

    fn scan<'a>(t: &'a [Tensor]) -> Scan<'a> {
        Scan {
            x: &t[0],
            dt: &t[1],
            a: &t[2],
            b: &t[3],
            c: &t[4],
            state: t.get(5),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn agrees_with_the_naive_twin(
            batch in 1usize..3, length in 1usize..20, groups in 1usize..3, chunk in 1usize..24,
            carried in any::<bool>(), salt in 0usize..1000,
        ) {
            let mut t = inputs(batch, length, groups, salt);
            if !carried { t.pop(); }
            let ((y, s), (y_naive, s_naive)) = (scan(&t).chunked(chunk).unwrap(), scan(&t).naive().unwrap());
            prop_assert!(distance(&y, &y_naive) < 1e-12);
            prop_assert!(distance(&s, &s_naive) < 1e-12);
            let (y, s) = scan(&t).composed(chunk).unwrap();
            prop_assert!(distance(&y, &y_naive) < 1e-12 && distance(&s, &s_naive) < 1e-12);
            // Every level in f32, forward and back.
            let s = scan(&t).sizes().unwrap();
            let mut wide: Vec<Vec<f64>> = t.iter().map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect();
            if !carried { wide.push(vec![0.0; s_naive.elem_count()]); }
            let narrow: Vec<Vec<f32>> = wide.iter().map(|x| x.iter().map(|&x| x as f32).collect()).collect();
            let op = |level| Fused { level, batch, length, heads: s.heads, head_dim: s.head_dim, groups, state: s.state, chunk };
            let gradient: Vec<f64> = (0..y.elem_count() + s_naive.elem_count()).map(|i| ((i * 31) % 17) as f64 / 8.0 - 1.0).collect();
            let refs: Vec<&[f64]> = wide.iter().map(|x| &x[..]).collect();
            let exact = op(Level::Portable).backward(&refs, &[], &gradient);
            let gradient: Vec<f32> = gradient.iter().map(|&g| g as f32).collect();
            let refs: Vec<&[f32]> = narrow.iter().map(|x| &x[..]).collect();
            let wanted: Vec<f64> = y_naive.flatten_all().unwrap().to_vec1().unwrap();
            for level in Level::available() {
                let (found, _) = op(level).forward(&refs);
                for (&found, wanted) in found.iter().zip(&wanted) {
                    prop_assert!((f64::from(found) - wanted).abs() < 2e-5, "{level:?}");
                }
                for (found, exact) in op(level).backward(&refs, &[], &gradient).iter().zip(&exact) {
                    let largest = exact.iter().fold(1f64, |m, x| m.max(x.abs()));
                    for (&found, exact) in found.iter().zip(exact) {
                        prop_assert!((f64::from(found) - exact).abs() < 3e-5 * largest, "{level:?} {found} {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_reach_every_input_and_the_carried_state() {
        let t = inputs(1, 5, 1, 3);
        for chunk in [2, 5] {
            let error = gradient_error(&t, 1e-6, &|t| {
                let (y, state) = scan(t).chunked(chunk)?;
                Tensor::cat(&[y.flatten_all()?, state.flatten_all()?], 0)
            })
            .unwrap();
            assert!(error < 1e-6, "{error}");
        }
        // Two heads of a group share b and c; two sequences do not share anything.
        let error =
            gradient_error(&inputs(2, 4, 2, 8), 1e-6, &|t| Ok(scan(t).chunked(3)?.0)).unwrap();
        assert!(error < 1e-6, "{error}");
        assert!(scan(&t).chunked(0).is_err());
    }
}

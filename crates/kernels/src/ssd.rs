//! State-space duality (Mamba-2, paper 16): the scan `S_t = e^{dt_t A} S_{t-1} + dt_t x_t B_tᵀ`, `y_t = S_t C_t`, by chunks.
//!
//! Inside a chunk the scan is a masked matrix product, between chunks a state is carried, so the work is matrix products
//! of chunk size: one operation on the CPU (`fused`), a composition of candle's elsewhere. Differentiable, also in the carried
//! state. Decays are differences of running sums inside one chunk, at most 0, so nothing grows.

mod fused;

use crate::autograd::apply;
use crate::cpu::Level;
use candle_core::{DType, Result, Tensor, bail};
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
        let plain = matches!(self.x.dtype(), DType::F32 | DType::F64);
        if !self.x.device().is_cpu() || !plain || s.length == 0 {
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
        let last = both.narrow(0, split, start.elem_count())?;
        Ok((
            both.narrow(0, 0, split)?.reshape(self.x.shape())?,
            last.reshape(start.shape())?,
        ))
    }

    /// [`chunked`](Self::chunked) in candle's operations, for any device.
    pub fn composed(&self, chunk: usize) -> Result<(Tensor, Tensor)> {
        let s = self.sizes()?;
        let mut state = self.start(&s)?;
        let mut outputs = Vec::new();
        for start in (0..s.length).step_by(chunk) {
            let q = chunk.min(s.length - start);
            let y;
            (y, state) = self.one_chunk(&s, start, q, &state)?;
            outputs.push(y);
        }
        if outputs.is_empty() {
            return Ok((self.x.clone(), state));
        }
        Ok((Tensor::cat(&outputs, 1)?, state))
    }

    fn one_chunk(
        &self,
        s: &Sizes,
        start: usize,
        q: usize,
        state: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (dtype, device) = (self.x.dtype(), self.x.device());
        // [batch, q, heads] -> [batch, heads, q]
        let dt = self.dt.narrow(1, start, q)?.transpose(1, 2)?.contiguous()?;
        let log_decay = dt.broadcast_mul(&self.a.reshape((1, s.heads, 1))?)?;
        let lower: Vec<f32> = (0..q)
            .flat_map(|i| (0..q).map(move |j| if j <= i { 1.0 } else { 0.0 }))
            .collect();
        let lower = Tensor::from_vec(lower, (q, q), device)?.to_dtype(dtype)?;
        // Inclusive running sum c_i = Σ_{k<=i} dt_k A: [batch, heads, q]
        let sum = log_decay
            .reshape((s.batch * s.heads, q))?
            .matmul(&lower.t()?)?
            .reshape((s.batch, s.heads, q))?;
        let heads_first = |t: &Tensor| t.narrow(1, start, q)?.transpose(1, 2)?.contiguous();
        let x = heads_first(self.x)?; // [batch, heads, q, head_dim]
        let group = |t: &Tensor| -> Result<Tensor> {
            let (groups, n) = (t.dim(2)?, s.state);
            heads_first(t)?
                .unsqueeze(2)?
                .broadcast_as((s.batch, groups, s.heads / groups, q, n))?
                .contiguous()?
                .reshape((s.batch, s.heads, q, n))
        };
        let (b, c) = (group(self.b)?, group(self.c)?); // [batch, heads, q, state]
        let written = x.broadcast_mul(&dt.unsqueeze(3)?)?; // dt_j x_j
        // Decay from j to i: e^{c_i - c_j} for j <= i. Above the diagonal the difference is made 0 before the
        // exponential (it would be positive there), then masked.
        let difference = sum.unsqueeze(3)?.broadcast_sub(&sum.unsqueeze(2)?)?;
        let decay = difference
            .broadcast_mul(&lower)?
            .exp()?
            .broadcast_mul(&lower)?;
        let scores = (c.matmul(&b.transpose(2, 3)?.contiguous()?)? * decay)?; // [batch, heads, q, q]
        let within = scores.matmul(&written)?;
        // What the carried state still gives: e^{c_i} S C_i
        let carried = c
            .matmul(&state.transpose(2, 3)?.contiguous()?)?
            .broadcast_mul(&sum.exp()?.unsqueeze(3)?)?;
        let y = (within + carried)?.transpose(1, 2)?.contiguous()?;
        let last = sum.narrow(2, q - 1, 1)?; // [batch, heads, 1]
        let to_end = last.broadcast_sub(&sum)?.exp()?.unsqueeze(3)?;
        let added = written
            .broadcast_mul(&to_end)?
            .transpose(2, 3)?
            .contiguous()?
            .matmul(&b)?; // [batch, heads, head_dim, state]
        let next = (state.broadcast_mul(&last.exp()?.unsqueeze(3)?)? + added)?;
        Ok((y, next))
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

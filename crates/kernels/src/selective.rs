//! The selective scan of Mamba-1 (paper 29): `h_t = e^{dt_t a} h_{t-1} + dt_t u_t b_t`, `y_t = c_t · h_t`, one state per channel.
//!
//! Decays differ per channel and state, so there is no matrix form as in [`crate::ssd`]; the scan runs along time with the
//! states as vector lanes. Only states at chunk borders are kept for the backward pass, which makes the rest again.

use crate::autograd::{Kernel, Real, apply};
use crate::composed::{composes, doubling};
use crate::cpu::Level;
use crate::cut::cut;
use crate::elementwise;
use crate::pool::{Pool, SharedMut};
use candle_core::{DType, Result, Tensor, bail};
use std::any::TypeId;

/// Inputs of a scan, f32 or f64 on the CPU.
pub struct SelectiveScan<'a> {
    /// [batch, length, channels]
    pub u: &'a Tensor,
    /// Step sizes, after softplus: [batch, length, channels]
    pub dt: &'a Tensor,
    /// Negative decay rates: [channels, state]
    pub a: &'a Tensor,
    /// [batch, length, state]
    pub b: &'a Tensor,
    /// [batch, length, state]
    pub c: &'a Tensor,
    /// State before the first token, [batch, channels, state]; none = zero.
    pub state: Option<&'a Tensor>,
}

impl SelectiveScan<'_> {
    fn op(&self) -> Result<Op> {
        let (batch, length, channels) = self.u.dims3()?;
        let (_, state) = self.a.dims2()?;
        let right = self.dt.dims() == self.u.dims()
            && self.a.dims() == [channels, state]
            && self.b.dims() == [batch, length, state]
            && self.c.dims() == self.b.dims()
            && self
                .state
                .is_none_or(|s| s.dims() == [batch, channels, state]);
        if !right {
            bail!(
                "selective scan: found u {:?}, dt {:?}, a {:?}, b {:?}, c {:?}, state {:?}",
                self.u.dims(),
                self.dt.dims(),
                self.a.dims(),
                self.b.dims(),
                self.c.dims(),
                self.state.map(|s| s.dims())
            );
        }
        Ok(Op {
            batch,
            length,
            channels,
            state,
        })
    }

    fn start(&self, op: &Op) -> Result<Tensor> {
        match self.state {
            Some(state) => Ok(state.clone()),
            None => Tensor::zeros(
                (op.batch, op.channels, op.state),
                self.u.dtype(),
                self.u.device(),
            ),
        }
    }

    /// y [batch, length, channels] and the state after the last token; differentiable in all inputs.
    pub fn run(&self) -> Result<(Tensor, Tensor)> {
        let op = self.op()?;
        let (b, l, d, n) = (op.batch, op.length, op.channels, op.state);
        let start = self.start(&op)?;
        if composes(self.u) {
            return self.composed(&start);
        }
        let all = apply(op, &[self.u, self.dt, self.a, self.b, self.c, &start])?;
        let parts = cut(&all, &[b * l * d, b * d * n])?;
        Ok((parts[0].reshape((b, l, d))?, parts[1].reshape((b, d, n))?))
    }

    /// [`run`](Self::run) in candle's operations: a scan by doubling over all states of all steps, O(length log length) work and
    /// O(length channels state) memory.
    fn composed(&self, start: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, l, d) = self.u.dims3()?;
        let n = self.a.dim(1)?;
        if l == 0 {
            return Ok((self.u.clone(), start.clone()));
        }
        let decay = self
            .dt
            .unsqueeze(3)?
            .broadcast_mul(&self.a.reshape((1, 1, d, n))?)?
            .exp()?; // [batch, length, channels, state]
        let write = (self.dt * self.u)?
            .unsqueeze(3)?
            .broadcast_mul(&self.b.unsqueeze(2)?)?;
        let states = doubling(&decay, &write, start)?;
        let y = states.broadcast_mul(&self.c.unsqueeze(2)?)?.sum(3)?;
        let last = states.narrow(1, l - 1, 1)?.reshape((b, d, n))?;
        Ok((y, last))
    }

    /// The naive twin: the definition, in f64, without gradients. Same results as [`run`](Self::run).
    pub fn naive(&self) -> Result<(Tensor, Tensor)> {
        let op = self.op()?;
        let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (u, dt, a) = (flat(self.u)?, flat(self.dt)?, flat(self.a)?);
        let (b, c) = (flat(self.b)?, flat(self.c)?);
        let mut state = flat(&self.start(&op)?)?;
        let n = op.state;
        let mut y = vec![0f64; u.len()];
        for row in 0..op.batch {
            for t in 0..op.length {
                let token = row * op.length + t;
                for d in 0..op.channels {
                    let at = token * op.channels + d;
                    for k in 0..n {
                        let h = &mut state[(row * op.channels + d) * n + k];
                        *h = (dt[at] * a[d * n + k]).exp() * *h + dt[at] * u[at] * b[token * n + k];
                        y[at] += c[token * n + k] * *h;
                    }
                }
            }
        }
        let (dtype, device) = (self.u.dtype(), self.u.device());
        let shape = (op.batch, op.channels, n);
        Ok((
            Tensor::from_vec(y, self.u.shape(), device)?.to_dtype(dtype)?,
            Tensor::from_vec(state, shape, device)?.to_dtype(dtype)?,
        ))
    }
}

struct Op {
    batch: usize,
    length: usize,
    channels: usize,
    state: usize,
}

/// Channels of one job: their states stay in the first cache.
const GROUP: usize = 64;
/// Steps between kept states.
const CHUNK: usize = 32;

#[inline(always)]
fn exp<T: Real>(x: T) -> T {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        T::of(f64::from(elementwise::exp(x.wide() as f32)))
    } else {
        x.exp()
    }
}

/// What one job reads: rows of one sequence, `count` channels from `first`.
#[derive(Clone, Copy)]
struct Part<'a, T> {
    u: &'a [T],
    dt: &'a [T],
    a: &'a [T],
    b: &'a [T],
    c: &'a [T],
    channels: usize,
    first: usize,
    count: usize,
    n: usize,
    /// Where this sequence's rows start in outputs.
    base: usize,
}

/// Steps `from..to`; `h` [count, n] moves on, `seen` is told the states after every step, `y` the outputs.
#[inline(always)]
fn steps<T: Real>(
    p: &Part<'_, T>,
    from: usize,
    to: usize,
    h: &mut [T],
    mut seen: impl FnMut(usize, &[T]),
    mut y: impl FnMut(usize, usize, T),
) {
    let n = p.n;
    for t in from..to {
        let (b, c) = (&p.b[t * n..][..n], &p.c[t * n..][..n]);
        for d in 0..p.count {
            let at = t * p.channels + p.first + d;
            let (dt, write) = (p.dt[at], p.dt[at] * p.u[at]);
            let (a, h) = (&p.a[(p.first + d) * n..][..n], &mut h[d * n..][..n]);
            let mut sum = T::zero();
            for k in 0..n {
                let next = exp(dt * a[k]) * h[k] + write * b[k];
                h[k] = next;
                sum += next * c[k];
            }
            y(t, d, sum);
        }
        seen(t, h);
    }
}

/// Compiles a body for each vector width and picks by [`Level::current`].
macro_rules! levels {
    ($name:ident / $body:ident / $wide:ident / $middle:ident <$t:ident> ($($arg:ident: $ty:ty),* $(,)?)) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn $wide<$t: Real>($($arg: $ty),*) { $body($($arg),*) }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $middle<$t: Real>($($arg: $ty),*) { $body($($arg),*) }
        fn $name<$t: Real>(level: Level, $($arg: $ty),*) {
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

levels!(forward / forward_body / forward_wide / forward_middle <T>(
    p: &Part<'_, T>, length: usize, h: &mut [T], y: SharedMut<T>
));
levels!(backward / backward_body / backward_wide / backward_middle <T>(
    p: &Part<'_, T>, length: usize, start: &[T], gradient: &[T], out: &mut Grads<'_, T>
));

#[inline(always)]
fn forward_body<T: Real>(p: &Part<'_, T>, length: usize, h: &mut [T], y: SharedMut<T>) {
    let write = |t: usize, d: usize, value: T| {
        // SAFETY: these channels of this sequence belong to this job alone.
        unsafe { *y.at(p.base + t * p.channels + p.first + d) = value };
    };
    steps(p, 0, length, h, |_, _| {}, write);
}

/// Gradients of one job.
struct Grads<'a, T> {
    /// [batch, length, channels]: this sequence's rows, this job's columns.
    u: SharedMut<T>,
    dt: SharedMut<T>,
    /// [count, n]
    a: &'a mut [T],
    /// This job's share, [length, n].
    b: &'a mut [T],
    c: &'a mut [T],
    /// In: gradient of the last state; out: that of the first. [count, n]
    h: &'a mut [T],
}

#[inline(always)]
fn backward_body<T: Real>(
    p: &Part<'_, T>,
    length: usize,
    start: &[T],
    gradient: &[T],
    out: &mut Grads<'_, T>,
) {
    let (n, size) = (p.n, p.count * p.n);
    // States before every chunk.
    let mut borders = Vec::with_capacity(length.div_ceil(CHUNK) * size);
    let mut h = start.to_vec();
    for from in (0..length).step_by(CHUNK) {
        borders.extend_from_slice(&h);
        let to = (from + CHUNK).min(length);
        steps(p, from, to, &mut h, |_, _| {}, |_, _, _| {});
    }
    let mut states = vec![T::zero(); (CHUNK + 1) * size];
    for (chunk, from) in (0..length).step_by(CHUNK).enumerate().rev() {
        let to = (from + CHUNK).min(length);
        let before = &borders[chunk * size..][..size];
        states[..size].copy_from_slice(before);
        h.copy_from_slice(before);
        let keep = |t: usize, h: &[T]| {
            states[(t - from + 1) * size..][..size].copy_from_slice(h);
        };
        steps(p, from, to, &mut h, keep, |_, _, _| {});
        for t in (from..to).rev() {
            let (b, c) = (&p.b[t * n..][..n], &p.c[t * n..][..n]);
            let grad_b = &mut out.b[t * n..][..n];
            let grad_c = &mut out.c[t * n..][..n];
            for d in 0..p.count {
                let at = t * p.channels + p.first + d;
                let (dt, u, gy) = (p.dt[at], p.u[at], gradient[at]);
                let write = dt * u;
                let a = &p.a[(p.first + d) * n..][..n];
                let old = &states[(t - from) * size + d * n..][..n];
                let new = &states[(t - from + 1) * size + d * n..][..n];
                let (grad_h, grad_a) = (&mut out.h[d * n..][..n], &mut out.a[d * n..][..n]);
                let (mut through_decay, mut through_write) = (T::zero(), T::zero());
                for k in 0..n {
                    let g = grad_h[k] + gy * c[k];
                    grad_c[k] += gy * new[k];
                    let decay = exp(dt * a[k]);
                    let inner = g * decay * old[k];
                    through_decay += inner * a[k];
                    grad_a[k] += inner * dt;
                    through_write += g * b[k];
                    grad_b[k] += g * write;
                    grad_h[k] = g * decay;
                }
                // SAFETY: as in forward.
                unsafe {
                    *out.u.at(p.base + at) = through_write * dt;
                    *out.dt.at(p.base + at) = through_decay + through_write * u;
                }
            }
        }
    }
}

impl Op {
    fn groups(&self) -> usize {
        self.channels.div_ceil(GROUP).max(1)
    }

    /// Job index to (sequence, first channel, channels).
    fn job(&self, job: usize) -> (usize, usize, usize) {
        let (row, group) = (job / self.groups(), job % self.groups());
        let first = group * GROUP;
        (row, first, GROUP.min(self.channels - first))
    }

    fn part<'a, T>(&self, x: &[&'a [T]], row: usize, first: usize, count: usize) -> Part<'a, T> {
        let (l, d, n) = (self.length, self.channels, self.state);
        Part {
            u: &x[0][row * l * d..][..l * d],
            dt: &x[1][row * l * d..][..l * d],
            a: x[2],
            b: &x[3][row * l * n..][..l * n],
            c: &x[4][row * l * n..][..l * n],
            channels: d,
            first,
            count,
            n,
            base: row * l * d,
        }
    }
}

impl Kernel for Op {
    fn name(&self) -> &'static str {
        "selective_scan"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (l, d, n) = (self.length, self.channels, self.state);
        let outputs = self.batch * l * d;
        let mut out = vec![T::zero(); outputs];
        out.extend_from_slice(x[5]);
        let (y, states) = out.split_at_mut(outputs);
        let (y, states) = (SharedMut::new(y), SharedMut::new(states));
        let level = Level::current();
        Pool::global().for_each(self.batch * self.groups(), |job| {
            let (row, first, count) = self.job(job);
            // SAFETY: sequences and groups of channels are disjoint between jobs.
            let h = unsafe { states.slice((row * d + first) * n, count * n) };
            forward(level, &self.part(x, row, first, count), l, h, y);
        });
        let total = out.len();
        (out, vec![total])
    }

    fn backward<T: Real>(&self, x: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (l, d, n) = (self.length, self.channels, self.state);
        let (outputs, jobs) = (self.batch * l * d, self.batch * self.groups());
        let mut grad_u = vec![T::zero(); outputs];
        let mut grad_dt = vec![T::zero(); outputs];
        let mut grad_start = gradient[outputs..].to_vec();
        // Shares of each job, added up in the order of jobs: the sum does not depend on the number of threads.
        let mut a_shares = vec![T::zero(); self.batch * d * n];
        let mut b_shares = vec![T::zero(); jobs * l * n];
        let mut c_shares = vec![T::zero(); jobs * l * n];
        let (u, dt, start) = (
            SharedMut::new(&mut grad_u),
            SharedMut::new(&mut grad_dt),
            SharedMut::new(&mut grad_start),
        );
        let (a, b, c) = (
            SharedMut::new(&mut a_shares),
            SharedMut::new(&mut b_shares),
            SharedMut::new(&mut c_shares),
        );
        let level = Level::current();
        Pool::global().for_each(jobs, |job| {
            let (row, first, count) = self.job(job);
            let at = (row * d + first) * n;
            // SAFETY: as in forward; shares are by job.
            let mut grads = unsafe {
                Grads {
                    u,
                    dt,
                    a: a.slice(at, count * n),
                    b: b.slice(job * l * n, l * n),
                    c: c.slice(job * l * n, l * n),
                    h: start.slice(at, count * n),
                }
            };
            let part = self.part(x, row, first, count);
            let gradient = &gradient[row * l * d..][..l * d];
            let before = &x[5][at..][..count * n];
            backward(level, &part, l, before, gradient, &mut grads);
        });
        let mut grad_a = vec![T::zero(); d * n];
        for share in a_shares.chunks(d * n) {
            grad_a.iter_mut().zip(share).for_each(|(sum, &g)| *sum += g);
        }
        let by_sequence = |shares: &[T]| {
            let mut out = vec![T::zero(); self.batch * l * n];
            for (job, share) in shares.chunks((l * n).max(1)).enumerate() {
                let row = job / self.groups();
                let sums = &mut out[row * l * n..][..l * n];
                sums.iter_mut().zip(share).for_each(|(sum, &g)| *sum += g);
            }
            out
        };
        let (grad_b, grad_c) = (by_sequence(&b_shares), by_sequence(&c_shares));
        vec![grad_u, grad_dt, grad_a, grad_b, grad_c, grad_start]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::{distance, tensor};
    use proptest::prelude::*;

    fn inputs(batch: usize, length: usize, channels: usize, n: usize, salt: usize) -> Vec<Tensor> {
        vec![
            tensor(&[batch, length, channels], salt, -1.0, 1.0),
            tensor(&[batch, length, channels], salt + 1, 0.01, 0.8),
            tensor(&[channels, n], salt + 2, -2.0, -0.1),
            tensor(&[batch, length, n], salt + 3, -1.0, 1.0),
            tensor(&[batch, length, n], salt + 4, -1.0, 1.0),
            tensor(&[batch, channels, n], salt + 5, -1.0, 1.0),
        ]
    }

    fn scan(t: &[Tensor]) -> SelectiveScan<'_> {
        SelectiveScan {
            u: &t[0],
            dt: &t[1],
            a: &t[2],
            b: &t[3],
            c: &t[4],
            state: t.get(5),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_the_naive_twin_in_both_types(
            batch in 1usize..3, length in 1usize..80, channels in 1usize..70, n in 1usize..20,
            carried in any::<bool>(), salt in 0usize..1000,
        ) {
            let mut t = inputs(batch, length, channels, n, salt);
            if !carried { t.pop(); }
            let ((y, s), (y_naive, s_naive)) = (scan(&t).run().unwrap(), scan(&t).naive().unwrap());
            prop_assert!(distance(&y, &y_naive) < 1e-12);
            prop_assert!(distance(&s, &s_naive) < 1e-12);
            let t: Vec<Tensor> = t.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
            let ((y, s), (y_naive, s_naive)) = (scan(&t).run().unwrap(), scan(&t).naive().unwrap());
            prop_assert!(distance(&y, &y_naive) < 2e-5, "{}", distance(&y, &y_naive));
            prop_assert!(distance(&s, &s_naive) < 2e-5);
        }
    }

    #[test]
    fn every_level_gives_the_same() {
        let (l, d, n) = (40, 5, 16);
        let t: Vec<Vec<f32>> = inputs(1, l, d, n, 3)
            .iter()
            .map(|t| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap())
            .map(|t| t.to_vec1().unwrap())
            .collect();
        let slices: Vec<&[f32]> = t.iter().map(Vec::as_slice).collect();
        let op = Op {
            batch: 1,
            length: l,
            channels: d,
            state: n,
        };
        let results: Vec<(Vec<f32>, Vec<f32>)> = Level::available()
            .map(|level| {
                let (mut h, mut y) = (t[5].clone(), vec![0f32; l * d]);
                let part = op.part(&slices, 0, 0, d);
                forward(level, &part, l, &mut h, SharedMut::new(&mut y));
                (h, y)
            })
            .collect();
        for (h, y) in &results {
            for (a, b) in h
                .iter()
                .chain(y)
                .zip(results[0].0.iter().chain(&results[0].1))
            {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences_also_across_chunks() {
        for (length, channels, n) in [(5, 3, 2), (70, 2, 1)] {
            let t = inputs(2, length, channels, n, 3);
            let error = gradient_error(&t, 1e-6, &|t| {
                let (y, state) = scan(t).run()?;
                Tensor::cat(&[y.flatten_all()?, state.flatten_all()?], 0)
            })
            .unwrap();
            assert!(error < 1e-6, "{error}");
        }
        let mut t = inputs(1, 4, 3, 2, 0);
        t[3] = tensor(&[1, 4, 3], 0, 0.0, 1.0);
        assert!(scan(&t).run().is_err());
    }
}

//! Diagonal linear recurrences with complex states (paper 29): one system per channel, and scans over vectors of states.
//!
//! [`ModalScan`] runs channels of DSS, GSS, H3, moving averages and Liquid-S4 step by step from a carried state;
//! [`associative_scan`] is x_t = a_t x_{t-1} + v_t by blocks (S5, LRU). Complex tensors are real ones with a last axis of 2.
//! Both compute in f64 inside and have analytic gradients.

use crate::autograd::{Kernel, Real, apply};
use crate::cut::cut;
use crate::pool::{Pool, SharedMut};
use crate::vandermonde::{complex, pairs};
use candle_core::{Result, Tensor, bail};
use rustfft::num_complex::Complex64 as C;

/// x_t = (decay + liquid input u_t) x_{t-1} + input u_t per channel and mode, y_t = Re Σ_n output x_t.
pub struct ModalScan<'a> {
    /// [batch, length, channels]
    pub u: &'a Tensor,
    /// [channels, modes, 2]
    pub decay: &'a Tensor,
    /// [channels, modes, 2]
    pub input: &'a Tensor,
    /// [channels, modes, 2]
    pub output: &'a Tensor,
    /// State before the first step: [batch, channels, modes, 2]
    pub state: &'a Tensor,
    /// Whether the input also acts on the decay (Liquid-S4).
    pub liquid: bool,
}

impl ModalScan<'_> {
    /// y [batch, length, channels] and the state after the last step; differentiable in all.
    pub fn run(&self) -> Result<(Tensor, Tensor)> {
        let (batch, length, channels) = self.u.dims3()?;
        let (_, modes, _) = self.decay.dims3()?;
        let per_channel = [channels, modes, 2];
        if self.decay.dims() != per_channel
            || self.input.dims() != per_channel
            || self.output.dims() != per_channel
            || self.state.dims() != [batch, channels, modes, 2]
        {
            bail!(
                "modal scan: found u {:?}, decay {:?}, input {:?}, output {:?}, state {:?}",
                self.u.dims(),
                self.decay.dims(),
                self.input.dims(),
                self.output.dims(),
                self.state.dims()
            );
        }
        let op = Modal {
            batch,
            length,
            channels,
            modes,
            liquid: self.liquid,
        };
        let inputs = [self.u, self.decay, self.input, self.output, self.state];
        let all = apply(op, &inputs)?;
        let sizes = [batch * length * channels, batch * channels * modes * 2];
        let parts = cut(&all, &sizes)?;
        Ok((
            parts[0].reshape(self.u.shape())?,
            parts[1].reshape(self.state.shape())?,
        ))
    }
}

struct Modal {
    batch: usize,
    length: usize,
    channels: usize,
    modes: usize,
    liquid: bool,
}

impl Modal {
    /// One channel of one sequence: `x` moves on; states after every step go to `seen`.
    fn channel(
        &self,
        u: impl Fn(usize) -> f64,
        system: [&[C]; 3],
        x: &mut [C],
        mut seen: impl FnMut(&[C], f64),
    ) {
        let [decay, input, output] = system;
        for t in 0..self.length {
            let u = u(t);
            let mut y = 0.0;
            for n in 0..self.modes {
                let write = input[n] * u;
                let decay = if self.liquid {
                    decay[n] + write
                } else {
                    decay[n]
                };
                x[n] = decay * x[n] + write;
                y += (output[n] * x[n]).re;
            }
            seen(x, y);
        }
    }
}

impl Kernel for Modal {
    fn name(&self) -> &'static str {
        "modal_scan"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (l, d, n) = (self.length, self.channels, self.modes);
        let system: Vec<Vec<C>> = x[1..4].iter().map(|v| complex(v)).collect();
        let outputs = self.batch * l * d;
        let mut out = vec![T::zero(); outputs + x[4].len()];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.batch * d, |job| {
            let (row, c) = (job / d, job % d);
            let part = |v: usize| &system[v][c * n..][..n];
            let mut state = complex(&x[4][2 * job * n..][..2 * n]);
            let u = |t: usize| x[0][(row * l + t) * d + c].wide();
            let mut t = 0;
            self.channel(u, [part(0), part(1), part(2)], &mut state, |_, y| {
                // SAFETY: this channel of this sequence belongs to this job alone.
                unsafe { *shared.at((row * l + t) * d + c) = T::of(y) };
                t += 1;
            });
            // SAFETY: as above.
            unsafe { shared.slice(outputs + 2 * job * n, 2 * n) }
                .copy_from_slice(&pairs::<T>(&state));
        });
        let total = out.len();
        (out, vec![total])
    }

    fn backward<T: Real>(&self, x: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (l, d, n) = (self.length, self.channels, self.modes);
        let system: Vec<Vec<C>> = x[1..4].iter().map(|v| complex(v)).collect();
        let outputs = self.batch * l * d;
        let mut grad_u = vec![T::zero(); outputs];
        let mut grad_state = vec![C::ZERO; self.batch * d * n];
        // [sequence][channel][3 n]: gradients of decay, input, output, added up in the order of sequences.
        let mut shares = vec![C::ZERO; self.batch * d * 3 * n];
        let (u_out, state_out, share_out) = (
            SharedMut::new(&mut grad_u),
            SharedMut::new(&mut grad_state),
            SharedMut::new(&mut shares),
        );
        Pool::global().for_each(self.batch * d, |job| {
            let (row, c) = (job / d, job % d);
            let part = |v: usize| &system[v][c * n..][..n];
            let (decay, input, output) = (part(0), part(1), part(2));
            let mut state = complex(&x[4][2 * job * n..][..2 * n]);
            let u = |t: usize| x[0][(row * l + t) * d + c].wide();
            let mut states = state.clone();
            self.channel(u, [decay, input, output], &mut state, |x, _| {
                states.extend_from_slice(x);
            });
            // Gradients are conjugated: dL = Re Σ conj(g) dz.
            let mut g = complex(&gradient[outputs + 2 * job * n..][..2 * n]);
            // SAFETY: by job.
            let share = unsafe { share_out.slice(job * 3 * n, 3 * n) };
            for t in (0..l).rev() {
                let (old, new) = (&states[t * n..][..n], &states[(t + 1) * n..][..n]);
                let gy = gradient[(row * l + t) * d + c].wide();
                let (now, mut sum) = (u(t), 0.0);
                for k in 0..n {
                    share[2 * n + k] += new[k].conj() * gy;
                    let whole = g[k] + output[k].conj() * gy;
                    let write = if self.liquid { C::ONE + old[k] } else { C::ONE };
                    share[k] += whole * old[k].conj();
                    share[n + k] += whole * write.conj() * now;
                    sum += (whole.conj() * write * input[k]).re;
                    let decay = if self.liquid {
                        decay[k] + input[k] * now
                    } else {
                        decay[k]
                    };
                    g[k] = whole * decay.conj();
                }
                // SAFETY: by channel and sequence.
                unsafe { *u_out.at((row * l + t) * d + c) = T::of(sum) };
            }
            // SAFETY: by job.
            unsafe { state_out.slice(job * n, n) }.copy_from_slice(&g);
        });
        let mut sums = vec![vec![C::ZERO; d * n]; 3];
        for (job, share) in shares.chunks((3 * n).max(1)).enumerate() {
            let c = job % d;
            for (which, sums) in sums.iter_mut().enumerate() {
                for k in 0..n {
                    sums[c * n + k] += share[which * n + k];
                }
            }
        }
        let mut out = vec![grad_u];
        out.extend(sums.iter().map(|sum| pairs::<T>(sum)));
        out.push(pairs::<T>(&grad_state));
        out
    }
}

/// x_t = a_t x_{t-1} + v_t elementwise: a [batch, length, n, 2], or [n, 2] for all steps; v [batch, length, n, 2]; start
/// [batch, n, 2] to [batch, length, n, 2]. Blocks of time are scanned on their own and joined by the products of their
/// decays, so that one long sequence keeps several threads busy. Differentiable in all.
pub fn associative_scan(a: &Tensor, v: &Tensor, start: &Tensor) -> Result<Tensor> {
    let (batch, length, n, two) = v.dims4()?;
    let varying = a.rank() == 4;
    let right = two == 2
        && start.dims() == [batch, n, 2]
        && if varying {
            a.dims() == v.dims()
        } else {
            a.dims() == [n, 2]
        };
    if !right {
        bail!(
            "associative scan: found a {:?}, v {:?}, start {:?}",
            a.dims(),
            v.dims(),
            start.dims()
        );
    }
    let op = Scan {
        batch,
        length,
        n,
        varying,
    };
    apply(op, &[a, v, start])
}

struct Scan {
    batch: usize,
    length: usize,
    n: usize,
    varying: bool,
}

/// Steps of a block.
const BLOCK: usize = 256;

impl Scan {
    fn decay(&self, a: &[C], row: usize, t: usize, k: usize) -> C {
        if self.varying {
            a[(row * self.length + t) * self.n + k]
        } else {
            a[k]
        }
    }

    /// Fills `x` [batch, length, n], which holds v: first each block from zero, then the carried part.
    fn scan(&self, a: &[C], x: &mut [C], start: &[C]) {
        let (l, n) = (self.length, self.n);
        let blocks = l.div_ceil(BLOCK);
        if blocks == 0 {
            return;
        }
        let mut products = vec![C::ONE; self.batch * blocks * n];
        let (shared, decays) = (SharedMut::new(x), SharedMut::new(&mut products));
        Pool::global().for_each(self.batch * blocks, |job| {
            let (row, block) = (job / blocks, job % blocks);
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(l));
            // SAFETY: blocks are disjoint.
            let x = unsafe { shared.slice((row * l + from) * n, (to - from) * n) };
            let product = unsafe { decays.slice(job * n, n) };
            for t in from..to {
                let at = (t - from) * n;
                for k in 0..n {
                    let decay = self.decay(a, row, t, k);
                    product[k] *= decay;
                    if t > from {
                        let before = x[at - n + k];
                        x[at + k] += decay * before;
                    }
                }
            }
        });
        // State before every block.
        let mut carried = vec![C::ZERO; self.batch * blocks * n];
        for row in 0..self.batch {
            for k in 0..n {
                let mut state = start[row * n + k];
                for block in 0..blocks {
                    let job = row * blocks + block;
                    carried[job * n + k] = state;
                    let last = ((block + 1) * BLOCK).min(l) - 1;
                    state = products[job * n + k] * state + x[(row * l + last) * n + k];
                }
            }
        }
        let shared = SharedMut::new(x);
        Pool::global().for_each(self.batch * blocks, |job| {
            let (row, block) = (job / blocks, job % blocks);
            let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(l));
            // SAFETY: blocks are disjoint.
            let x = unsafe { shared.slice((row * l + from) * n, (to - from) * n) };
            for k in 0..n {
                let mut state = carried[job * n + k];
                for t in from..to {
                    state *= self.decay(a, row, t, k);
                    x[(t - from) * n + k] += state;
                }
            }
        });
    }
}

impl Kernel for Scan {
    fn name(&self) -> &'static str {
        "associative_scan"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (a, mut x, start) = (complex(inputs[0]), complex(inputs[1]), complex(inputs[2]));
        self.scan(&a, &mut x, &start);
        (pairs(&x), vec![self.batch, self.length, self.n, 2])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (l, n) = (self.length, self.n);
        let (a, x, start) = (complex(inputs[0]), complex(output), complex(inputs[2]));
        let mut grad_a = vec![C::ZERO; a.len()];
        // The adjoint is the same scan backwards: g_t += conj(a_{t+1}) g_{t+1}.
        let mut g = complex(gradient);
        let mut grad_start = vec![C::ZERO; start.len()];
        for row in 0..self.batch {
            for k in 0..n {
                let mut carried = C::ZERO;
                for t in (0..l).rev() {
                    let at = (row * l + t) * n + k;
                    g[at] += carried;
                    let before = match t {
                        0 => start[row * n + k],
                        _ => x[at - n],
                    };
                    let decay = self.decay(&a, row, t, k);
                    grad_a[if self.varying { at } else { k }] += g[at] * before.conj();
                    carried = g[at] * decay.conj();
                }
                grad_start[row * n + k] = carried;
            }
        }
        vec![pairs(&grad_a), pairs(&g), pairs(&grad_start)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use candle_core::Device;

    fn tensor(shape: &[usize], salt: usize, size: f64) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| size * (((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f64> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_blocked_scan_is_the_sequential_one_at_every_length() {
        for length in [1, 2, 3, 7, 8, 9, 255, 256, 257, 1025] {
            for varying in [false, true] {
                let (batch, n) = (2, 3);
                let shape = if varying {
                    vec![batch, length, n, 2]
                } else {
                    vec![n, 2]
                };
                let (a, v) = (
                    tensor(&shape, 1, 0.69),
                    tensor(&[batch, length, n, 2], 2, 1.0),
                );
                let start = tensor(&[batch, n, 2], 3, 1.0);
                let found = values(&associative_scan(&a, &v, &start).unwrap());
                let (a, v) = (complex(&values(&a)), complex(&values(&v)));
                let mut state = complex(&values(&start));
                for row in 0..batch {
                    for t in 0..length {
                        for k in 0..n {
                            let at = (row * length + t) * n + k;
                            let decay = if varying { a[at] } else { a[k] };
                            let x = &mut state[row * n + k];
                            *x = decay * *x + v[at];
                            let error = (C::new(found[2 * at], found[2 * at + 1]) - *x).norm();
                            assert!(error < 1e-12, "length {length}: {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for varying in [false, true] {
            let a = if varying {
                tensor(&[2, 5, 3, 2], 1, 0.6)
            } else {
                tensor(&[3, 2], 1, 0.6)
            };
            let inputs = [a, tensor(&[2, 5, 3, 2], 2, 1.0), tensor(&[2, 3, 2], 3, 1.0)];
            let error =
                gradient_error(&inputs, 1e-6, &|x| associative_scan(&x[0], &x[1], &x[2])).unwrap();
            assert!(error < 1e-7, "{error}");
        }
        for liquid in [false, true] {
            let inputs = [
                tensor(&[2, 6, 3], 1, 1.0),
                tensor(&[3, 2, 2], 2, 0.6),
                tensor(&[3, 2, 2], 3, 0.5),
                tensor(&[3, 2, 2], 4, 1.0),
                tensor(&[2, 3, 2, 2], 5, 1.0),
            ];
            let error = gradient_error(&inputs, 1e-6, &|x| {
                let scan = ModalScan {
                    u: &x[0],
                    decay: &x[1],
                    input: &x[2],
                    output: &x[3],
                    state: &x[4],
                    liquid,
                };
                let (y, state) = scan.run()?;
                Tensor::cat(&[y.flatten_all()?, state.flatten_all()?], 0)
            })
            .unwrap();
            assert!(error < 1e-7, "liquid {liquid}: {error}");
        }
        let one = tensor(&[3, 2], 0, 1.0);
        assert!(associative_scan(&one, &tensor(&[1, 2, 4, 2], 0, 1.0), &one).is_err());
    }
}

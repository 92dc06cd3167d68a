//! Recurrent cells over whole sequences with back-propagation through time: Elman, LSTM, GRU (paper 15).
//!
//! Gate order and biases are PyTorch's (LSTM i, f, g, o; GRU r, z, n with the reset gate after the recurrent product).
//! The input's part of all gates comes in ready, one matrix product for all steps; what is left here is the recurrence.
//! Nothing but outputs is kept for the backward pass, which computes the gates again.

use crate::autograd::{Kernel, Real, apply};
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};
use rustfft::num_traits::Float;

/// Kind of cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// h = tanh(pre)
    Tanh,
    /// h = max(pre, 0)
    Relu,
    /// Long short-term memory with forget gate.
    Lstm,
    /// Gated recurrent unit.
    Gru,
}

impl Cell {
    /// Gates of a cell.
    pub fn gates(self) -> usize {
        match self {
            Cell::Tanh | Cell::Relu => 1,
            Cell::Lstm => 4,
            Cell::Gru => 3,
        }
    }

    /// Vectors of state: h, and c of an LSTM.
    pub fn states(self) -> usize {
        if self == Cell::Lstm { 2 } else { 1 }
    }
}

/// The recurrence over a sequence.
///
/// gates [batch, steps, gates hidden] (input product plus input bias), weight [gates hidden, hidden], bias
/// [gates hidden], start [batch, states hidden] (h, then c) to [batch, steps, states hidden].
pub fn recurrence(
    cell: Cell,
    gates: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    start: &Tensor,
) -> Result<Tensor> {
    let (batch, steps, width) = gates.dims3()?;
    let (g, s) = (cell.gates(), cell.states());
    let hidden = width / g;
    if width != g * hidden
        || weight.dims() != [width, hidden]
        || bias.dims() != [width]
        || start.dims() != [batch, s * hidden]
    {
        bail!(
            "recurrence: found gates {:?}, weight {:?}, bias {:?}, start {:?}, expected \
             [batch, steps, {g} h], [{g} h, h], [{g} h], [batch, {s} h]",
            gates.dims(),
            weight.dims(),
            bias.dims(),
            start.dims()
        );
    }
    let op = Recurrence {
        cell,
        batch,
        steps,
        hidden,
    };
    apply(op, &[gates, weight, bias, start])
}

struct Recurrence {
    cell: Cell,
    batch: usize,
    steps: usize,
    hidden: usize,
}

fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exp())
}

/// out += Σ_k x[k] rows[k], rows of the width of out.
fn add_rows<T: Real>(out: &mut [T], x: &[T], rows: &[T]) {
    let width = out.len();
    for (k, &x) in x.iter().enumerate() {
        for (out, &w) in out.iter_mut().zip(&rows[k * width..][..width]) {
            *out += x * w;
        }
    }
}

impl Recurrence {
    fn width(&self) -> usize {
        self.cell.gates() * self.hidden
    }

    /// One step of one row: `recurrent` is bias + W h; writes the new state over `state` [states hidden].
    fn step<T: Real>(&self, input: &[T], recurrent: &[T], state: &mut [T]) {
        let n = self.hidden;
        match self.cell {
            Cell::Tanh => {
                for k in 0..n {
                    state[k] = (input[k] + recurrent[k]).tanh();
                }
            }
            Cell::Relu => {
                for k in 0..n {
                    state[k] = Float::max(input[k] + recurrent[k], T::zero());
                }
            }
            Cell::Lstm => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let c = sigmoid(gate(1, k)) * state[n + k]
                        + sigmoid(gate(0, k)) * gate(2, k).tanh();
                    state[n + k] = c;
                    state[k] = sigmoid(gate(3, k)) * c.tanh();
                }
            }
            Cell::Gru => {
                for k in 0..n {
                    let r = sigmoid(input[k] + recurrent[k]);
                    let z = sigmoid(input[n + k] + recurrent[n + k]);
                    let new = (input[2 * n + k] + r * recurrent[2 * n + k]).tanh();
                    state[k] = (T::one() - z) * new + z * state[k];
                }
            }
        }
    }

    /// Gradients of one step. `grad` [states hidden] is that of the new state and becomes that of the old one, but for
    /// the part through W; `grad_in` and `grad_rec` [gates hidden] are those of the input's and the recurrent part.
    fn step_back<T: Real>(
        &self,
        input: &[T],
        recurrent: &[T],
        old: &[T],
        new: &[T],
        grad: &mut [T],
        grad_in: &mut [T],
        grad_rec: &mut [T],
    ) {
        let (n, one) = (self.hidden, T::one());
        match self.cell {
            Cell::Tanh | Cell::Relu => {
                for k in 0..n {
                    let slope = if self.cell == Cell::Tanh {
                        one - new[k] * new[k]
                    } else if new[k] > T::zero() {
                        one
                    } else {
                        T::zero()
                    };
                    grad_in[k] = grad[k] * slope;
                    grad_rec[k] = grad_in[k];
                    grad[k] = T::zero();
                }
            }
            Cell::Lstm => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let (i, f) = (sigmoid(gate(0, k)), sigmoid(gate(1, k)));
                    let (g, o) = (gate(2, k).tanh(), sigmoid(gate(3, k)));
                    let tanh_c = new[n + k].tanh();
                    let grad_c = grad[n + k] + grad[k] * o * (one - tanh_c * tanh_c);
                    let parts = [
                        grad_c * g * i * (one - i),
                        grad_c * old[n + k] * f * (one - f),
                        grad_c * i * (one - g * g),
                        grad[k] * tanh_c * o * (one - o),
                    ];
                    for (gate, part) in parts.into_iter().enumerate() {
                        grad_in[gate * n + k] = part;
                        grad_rec[gate * n + k] = part;
                    }
                    grad[n + k] = grad_c * f;
                    grad[k] = T::zero();
                }
            }
            Cell::Gru => {
                for k in 0..n {
                    let r = sigmoid(input[k] + recurrent[k]);
                    let z = sigmoid(input[n + k] + recurrent[n + k]);
                    let new = (input[2 * n + k] + r * recurrent[2 * n + k]).tanh();
                    let grad_new = grad[k] * (one - z) * (one - new * new);
                    let grad_z = grad[k] * (old[k] - new) * z * (one - z);
                    let grad_r = grad_new * recurrent[2 * n + k] * r * (one - r);
                    grad_in[k] = grad_r;
                    grad_in[n + k] = grad_z;
                    grad_in[2 * n + k] = grad_new;
                    grad_rec[k] = grad_r;
                    grad_rec[n + k] = grad_z;
                    grad_rec[2 * n + k] = grad_new * r;
                    grad[k] *= z;
                }
            }
        }
    }
}

/// [rows, cols] to [cols, rows].
fn transposed<T: Real>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = vec![T::zero(); x.len()];
    for r in 0..rows {
        for c in 0..cols {
            out[c * rows + r] = x[r * cols + c];
        }
    }
    out
}

impl Kernel for Recurrence {
    fn name(&self) -> &'static str {
        "recurrence"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (width, n) = (self.width(), self.hidden);
        let states = self.cell.states() * n;
        let weight = transposed(inputs[1], width, n);
        let mut out = vec![T::zero(); self.batch * self.steps * states];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.batch, |b| {
            let mut state = inputs[3][b * states..][..states].to_vec();
            for t in 0..self.steps {
                let row = b * self.steps + t;
                let mut recurrent = inputs[2].to_vec();
                add_rows(&mut recurrent, &state[..n], &weight);
                self.step(&inputs[0][row * width..][..width], &recurrent, &mut state);
                // SAFETY: rows of sequence b belong to this job alone.
                unsafe { shared.slice(row * states, states) }.copy_from_slice(&state);
            }
        });
        (out, vec![self.batch, self.steps, states])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (width, n) = (self.width(), self.hidden);
        let states = self.cell.states() * n;
        let weight = transposed(inputs[1], width, n);
        let mut grad_gates = vec![T::zero(); inputs[0].len()];
        let gates = SharedMut::new(&mut grad_gates);
        let mut grad_start = vec![T::zero(); inputs[3].len()];
        let starts = SharedMut::new(&mut grad_start);
        // Groups of rows sum their own weight gradients; their number does not depend on threads, so sums do not either.
        let groups = self.batch.min(16);
        let part = width * n + width;
        let mut partial = vec![T::zero(); groups * part];
        let partials = SharedMut::new(&mut partial);
        Pool::global().for_each(groups, |group| {
            // SAFETY: one part per group.
            let sums = unsafe { partials.slice(group * part, part) };
            let (grad_weight, grad_bias) = sums.split_at_mut(width * n);
            let mut grad_rec = vec![T::zero(); width];
            for b in (group..self.batch).step_by(groups) {
                let mut grad = vec![T::zero(); states];
                for t in (0..self.steps).rev() {
                    let row = b * self.steps + t;
                    let old = if t == 0 {
                        &inputs[3][b * states..][..states]
                    } else {
                        &output[(row - 1) * states..][..states]
                    };
                    let mut recurrent = inputs[2].to_vec();
                    add_rows(&mut recurrent, &old[..n], &weight);
                    for (sum, &g) in grad.iter_mut().zip(&gradient[row * states..][..states]) {
                        *sum += g;
                    }
                    // SAFETY: rows of sequence b belong to this job alone.
                    let grad_in = unsafe { gates.slice(row * width, width) };
                    self.step_back(
                        &inputs[0][row * width..][..width],
                        &recurrent,
                        old,
                        &output[row * states..][..states],
                        &mut grad,
                        grad_in,
                        &mut grad_rec,
                    );
                    add_rows(&mut grad[..n], &grad_rec, inputs[1]);
                    for (g, &rec) in grad_rec.iter().enumerate() {
                        grad_bias[g] += rec;
                        for (w, &h) in grad_weight[g * n..][..n].iter_mut().zip(&old[..n]) {
                            *w += rec * h;
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { starts.slice(b * states, states) }.copy_from_slice(&grad);
            }
        });
        let mut sums = vec![T::zero(); part];
        for group in partial.chunks(part) {
            sums.iter_mut().zip(group).for_each(|(sum, &g)| *sum += g);
        }
        let bias = sums.split_off(width * n);
        vec![grad_gates, sums, bias, grad_start]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use candle_core::Device;

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0)
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_are_those_of_finite_differences_also_far_back() {
        for cell in [Cell::Tanh, Cell::Relu, Cell::Lstm, Cell::Gru] {
            let (g, s, n, steps) = (cell.gates(), cell.states(), 3, 6);
            let inputs = [
                tensor(&[2, steps, g * n], 1),
                tensor(&[g * n, n], 2),
                tensor(&[g * n], 3),
                tensor(&[2, s * n], 4),
            ];
            let error = gradient_error(&inputs, 1e-6, &|x| {
                recurrence(cell, &x[0], &x[1], &x[2], &x[3])
            })
            .unwrap();
            assert!(error < 1e-6, "{cell:?}: {error}");
            // Only the last step is asked: the gradient must come through all steps.
            let error = gradient_error(&inputs, 1e-6, &|x| {
                recurrence(cell, &x[0], &x[1], &x[2], &x[3])?.narrow(1, steps - 1, 1)
            })
            .unwrap();
            assert!(error < 1e-6, "{cell:?}, last step: {error}");
        }
    }

    #[test]
    fn a_sequence_is_its_parts_with_carried_state() {
        for cell in [Cell::Tanh, Cell::Lstm, Cell::Gru] {
            let (g, s, n) = (cell.gates(), cell.states(), 4);
            let x = tensor(&[3, 9, g * n], 1);
            let (w, b, start) = (
                tensor(&[g * n, n], 2),
                tensor(&[g * n], 3),
                tensor(&[3, s * n], 4),
            );
            let whole = recurrence(cell, &x, &w, &b, &start).unwrap();
            for cut in [1, 4, 8] {
                let first =
                    recurrence(cell, &x.narrow(1, 0, cut).unwrap(), &w, &b, &start).unwrap();
                let carried = first.narrow(1, cut - 1, 1).unwrap().squeeze(1).unwrap();
                let rest = x.narrow(1, cut, 9 - cut).unwrap();
                let second = recurrence(cell, &rest, &w, &b, &carried).unwrap();
                let both = Tensor::cat(&[first, second], 1).unwrap();
                let difference = (both - &whole).unwrap().abs().unwrap().max_all().unwrap();
                assert!(
                    difference.to_scalar::<f64>().unwrap() < 1e-14,
                    "{cell:?} at {cut}"
                );
            }
        }
        assert!(
            recurrence(
                Cell::Gru,
                &tensor(&[1, 2, 4], 1),
                &tensor(&[4, 4], 1),
                &tensor(&[4], 1),
                &tensor(&[1, 4], 1)
            )
            .is_err()
        );
    }
}

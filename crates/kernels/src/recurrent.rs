//! Recurrent cells over whole sequences with back-propagation through time: Elman, LSTM and its variants, GRU (paper 15).
//!
//! Gate order and biases are PyTorch's (LSTM i, f, g, o; GRU r, z, n with the reset gate after the recurrent product).
//! The input's part of all gates comes in ready, one matrix product for all steps; what is left here is the recurrence.
//! Nothing but outputs is kept for the backward pass, which computes the gates again.

use crate::autograd::{Kernel, Real, apply};
use crate::cpu::Level;
use crate::dense::{Left, Packed, add_product};
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
    /// The first LSTM: no forget gate, the state only adds up. Gates i, g, o.
    Lstm97,
    /// LSTM whose gates also read the state of their unit: i and f the old one, o the new one.
    PeepholeLstm,
    /// Gated recurrent unit.
    Gru,
}

impl Cell {
    /// Gates of a cell.
    pub fn gates(self) -> usize {
        match self {
            Cell::Tanh | Cell::Relu => 1,
            Cell::Lstm | Cell::PeepholeLstm => 4,
            Cell::Gru | Cell::Lstm97 => 3,
        }
    }

    /// Vectors of state: h, and c of an LSTM.
    pub fn states(self) -> usize {
        match self {
            Cell::Lstm | Cell::Lstm97 | Cell::PeepholeLstm => 2,
            Cell::Tanh | Cell::Relu | Cell::Gru => 1,
        }
    }

    /// Diagonals that follow the bias: those of peepholes on i, f and o.
    pub fn diagonals(self) -> usize {
        if self == Cell::PeepholeLstm { 3 } else { 0 }
    }
}

/// The recurrence over a sequence.
///
/// gates [batch, steps, gates hidden] (input product plus input bias), weight [gates hidden, hidden], bias
/// [gates hidden] (of a peephole LSTM [(gates + 3) hidden], its diagonals i, f, o last), start [batch, states hidden]
/// (h, then c) to [batch, steps, states hidden].
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
        || bias.dims() != [width + cell.diagonals() * hidden]
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
        level: Level::current(),
        cell,
        batch,
        steps,
        hidden,
    };
    apply(op, &[gates, weight, bias, start])
}

struct Recurrence {
    level: Level,
    cell: Cell,
    batch: usize,
    steps: usize,
    hidden: usize,
}

impl Recurrence {
    fn width(&self) -> usize {
        self.cell.gates() * self.hidden
    }

    /// One step of one row: `recurrent` is bias + W h; writes the new state over `state` [states hidden].
    #[inline(always)]
    fn step_body<T: Real>(&self, peep: &[T], input: &[T], recurrent: &[T], state: &mut [T]) {
        let n = self.hidden;
        match self.cell {
            Cell::Tanh => {
                for k in 0..n {
                    state[k] = (input[k] + recurrent[k]).tanh_fast();
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
                    let c = Real::sigmoid(gate(1, k)) * state[n + k]
                        + Real::sigmoid(gate(0, k)) * gate(2, k).tanh_fast();
                    state[n + k] = c;
                    state[k] = Real::sigmoid(gate(3, k)) * c.tanh_fast();
                }
            }
            Cell::Lstm97 => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let c = state[n + k] + Real::sigmoid(gate(0, k)) * gate(1, k).tanh_fast();
                    state[n + k] = c;
                    state[k] = Real::sigmoid(gate(2, k)) * c.tanh_fast();
                }
            }
            Cell::PeepholeLstm => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let old = state[n + k];
                    let i = Real::sigmoid(gate(0, k) + peep[k] * old);
                    let f = Real::sigmoid(gate(1, k) + peep[n + k] * old);
                    let c = f * old + i * gate(2, k).tanh_fast();
                    state[n + k] = c;
                    state[k] = Real::sigmoid(gate(3, k) + peep[2 * n + k] * c) * c.tanh_fast();
                }
            }
            Cell::Gru => {
                for k in 0..n {
                    let r = Real::sigmoid(input[k] + recurrent[k]);
                    let z = Real::sigmoid(input[n + k] + recurrent[n + k]);
                    let new = (input[2 * n + k] + r * recurrent[2 * n + k]).tanh_fast();
                    state[k] = (T::one() - z) * new + z * state[k];
                }
            }
        }
    }

    /// Gradients of one step. `grad` [states hidden] is that of the new state and becomes that of the old one, but for
    /// the part through W; `grad_in` and `grad_rec` [gates hidden] are those of the input's and the recurrent part.
    #[inline(always)]
    fn step_back_body<T: Real>(
        &self,
        peep: &[T],
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
                    let (i, f) = (Real::sigmoid(gate(0, k)), Real::sigmoid(gate(1, k)));
                    let (g, o) = (gate(2, k).tanh_fast(), Real::sigmoid(gate(3, k)));
                    let tanh_c = new[n + k].tanh_fast();
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
            Cell::Lstm97 => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let (i, g) = (Real::sigmoid(gate(0, k)), gate(1, k).tanh_fast());
                    let o = Real::sigmoid(gate(2, k));
                    let tanh_c = new[n + k].tanh_fast();
                    let grad_c = grad[n + k] + grad[k] * o * (one - tanh_c * tanh_c);
                    let parts = [
                        grad_c * g * i * (one - i),
                        grad_c * i * (one - g * g),
                        grad[k] * tanh_c * o * (one - o),
                    ];
                    for (gate, part) in parts.into_iter().enumerate() {
                        grad_in[gate * n + k] = part;
                        grad_rec[gate * n + k] = part;
                    }
                    grad[n + k] = grad_c;
                    grad[k] = T::zero();
                }
            }
            Cell::PeepholeLstm => {
                let gate = |g: usize, k: usize| input[g * n + k] + recurrent[g * n + k];
                for k in 0..n {
                    let (c_old, c) = (old[n + k], new[n + k]);
                    let i = Real::sigmoid(gate(0, k) + peep[k] * c_old);
                    let f = Real::sigmoid(gate(1, k) + peep[n + k] * c_old);
                    let g = gate(2, k).tanh_fast();
                    let o = Real::sigmoid(gate(3, k) + peep[2 * n + k] * c);
                    let tanh_c = c.tanh_fast();
                    let grad_o = grad[k] * tanh_c * o * (one - o);
                    let grad_c = grad[n + k]
                        + grad[k] * o * (one - tanh_c * tanh_c)
                        + grad_o * peep[2 * n + k];
                    let grad_i = grad_c * g * i * (one - i);
                    let grad_f = grad_c * c_old * f * (one - f);
                    let parts = [grad_i, grad_f, grad_c * i * (one - g * g), grad_o];
                    for (gate, part) in parts.into_iter().enumerate() {
                        grad_in[gate * n + k] = part;
                        grad_rec[gate * n + k] = part;
                    }
                    grad[n + k] = grad_c * f + grad_i * peep[k] + grad_f * peep[n + k];
                    grad[k] = T::zero();
                }
            }
            Cell::Gru => {
                for k in 0..n {
                    let r = Real::sigmoid(input[k] + recurrent[k]);
                    let z = Real::sigmoid(input[n + k] + recurrent[n + k]);
                    let new = (input[2 * n + k] + r * recurrent[2 * n + k]).tanh_fast();
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

/// Compiles a step's body for each vector width.
macro_rules! levels {
    ($name:ident / $body:ident / $wide:ident / $middle:ident ($($arg:ident: $ty:ty),* $(,)?)) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn $wide<T: Real>(&self, $($arg: $ty),*) { self.$body($($arg),*) }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $middle<T: Real>(&self, $($arg: $ty),*) { self.$body($($arg),*) }
        fn $name<T: Real>(&self, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level says that the CPU has the features.
            match self.level {
                Level::Amx | Level::Avx512 => return unsafe { self.$wide($($arg),*) },
                Level::Avx2 => return unsafe { self.$middle($($arg),*) },
                Level::Portable => {}
            }
            self.$body($($arg),*)
        }
    };
}

impl Recurrence {
    levels!(step / step_body / step_wide / step_middle (
        peep: &[T], input: &[T], recurrent: &[T], state: &mut [T]
    ));
    levels!(step_back / step_back_body / step_back_wide / step_back_middle (
        peep: &[T], input: &[T], recurrent: &[T], old: &[T], new: &[T], grad: &mut [T], grad_in: &mut [T], grad_rec: &mut [T]
    ));

    /// Runs `task(first, rows)` over the batch, a group of sequences per thread: a step of a group is one product.
    fn groups(&self, task: impl Fn(usize, usize) + Sync) {
        let count = Pool::global().threads().clamp(1, self.batch.max(1));
        Pool::global().for_each(count, |group| {
            let (first, end) = (self.batch * group / count, self.batch * (group + 1) / count);
            if end > first {
                task(first, end - first);
            }
        });
    }
}

impl Kernel for Recurrence {
    fn name(&self) -> &'static str {
        "recurrence"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (width, n) = (self.width(), self.hidden);
        let states = self.cell.states() * n;
        let (bias, peep) = inputs[2].split_at(width);
        // W [width, n], turned: h [rows, n] times it.
        let weight = Packed::new(inputs[1], n, width, 1, n);
        let mut out = vec![T::zero(); self.batch * self.steps * states];
        let shared = SharedMut::new(&mut out);
        self.groups(|first, rows| {
            let mut state = inputs[3][first * states..(first + rows) * states].to_vec();
            let mut recurrent = vec![T::zero(); rows * width];
            for t in 0..self.steps {
                for row in recurrent.chunks_exact_mut(width.max(1)) {
                    row.copy_from_slice(bias);
                }
                let left = Left {
                    data: &state[..],
                    row: states,
                    col: 1,
                };
                add_product(self.level, left, rows, &weight, &mut recurrent, width);
                for b in 0..rows {
                    let row = (first + b) * self.steps + t;
                    let state = &mut state[b * states..(b + 1) * states];
                    let input = &inputs[0][row * width..][..width];
                    self.step(peep, input, &recurrent[b * width..][..width], state);
                    // SAFETY: rows of sequence first + b belong to this job alone.
                    unsafe { shared.slice(row * states, states) }.copy_from_slice(state);
                }
            }
        });
        (out, vec![self.batch, self.steps, states])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (width, n, steps) = (self.width(), self.hidden, self.steps);
        let states = self.cell.states() * n;
        let (bias, peep) = inputs[2].split_at(width);
        let turned = Packed::new(inputs[1], n, width, 1, n);
        let weight = Packed::new(inputs[1], width, n, n, 1);
        let mut grad_gates = vec![T::zero(); inputs[0].len()];
        let gates = SharedMut::new(&mut grad_gates);
        let mut grad_start = vec![T::zero(); inputs[3].len()];
        let starts = SharedMut::new(&mut grad_start);
        // Gradients of the recurrent part of all steps: [batch, steps, width]
        let mut grad_recurrent = vec![T::zero(); inputs[0].len()];
        let recurrents = SharedMut::new(&mut grad_recurrent);
        self.groups(|first, rows| {
            // bias + W h of all steps, one product for each sequence and one for the starts.
            let mut recurrent = vec![T::zero(); rows * steps * width];
            for row in recurrent.chunks_exact_mut(width.max(1)) {
                row.copy_from_slice(bias);
            }
            let start = &inputs[3][first * states..(first + rows) * states];
            for b in 0..rows {
                let recurrent = &mut recurrent[b * steps * width..(b + 1) * steps * width];
                let left = |data| Left {
                    data,
                    row: states,
                    col: 1,
                };
                let old = left(&start[b * states..]);
                add_product(self.level, old, 1.min(steps), &turned, recurrent, width);
                if steps > 1 {
                    let old = left(&output[(first + b) * steps * states..]);
                    let later = &mut recurrent[width..];
                    add_product(self.level, old, steps - 1, &turned, later, width);
                }
            }
            let mut grad = vec![T::zero(); rows * states];
            for t in (0..steps).rev() {
                for b in 0..rows {
                    let row = (first + b) * steps + t;
                    let old = if t == 0 {
                        &start[b * states..][..states]
                    } else {
                        &output[(row - 1) * states..][..states]
                    };
                    let grad = &mut grad[b * states..(b + 1) * states];
                    for (sum, &g) in grad.iter_mut().zip(&gradient[row * states..][..states]) {
                        *sum += g;
                    }
                    // SAFETY: rows of sequence first + b belong to this job alone.
                    let (grad_in, grad_rec) = unsafe {
                        (
                            gates.slice(row * width, width),
                            recurrents.slice(row * width, width),
                        )
                    };
                    self.step_back(
                        peep,
                        &inputs[0][row * width..][..width],
                        &recurrent[(b * steps + t) * width..][..width],
                        old,
                        &output[row * states..][..states],
                        grad,
                        grad_in,
                        grad_rec,
                    );
                }
                // SAFETY: written above, by this job.
                let data = unsafe {
                    let first = (first * steps + t) * width;
                    recurrents.slice(first, ((rows - 1) * steps) * width + width)
                };
                let left = Left {
                    data: &*data,
                    row: steps * width,
                    col: 1,
                };
                add_product(self.level, left, rows, &weight, &mut grad, states);
            }
            // SAFETY: as above.
            unsafe { starts.slice(first * states, rows * states) }.copy_from_slice(&grad);
        });
        let (grad_weight, grad_bias) = self.weight_gradients(inputs[3], output, &grad_recurrent);
        vec![grad_gates, grad_weight, grad_bias, grad_start]
    }
}

impl Recurrence {
    /// Σ over all steps of grad hᵀ [width, hidden] and of grad [width]; h is that before the step.
    fn weight_gradients<T: Real>(&self, start: &[T], output: &[T], grad: &[T]) -> (Vec<T>, Vec<T>) {
        let (width, n, steps) = (self.width(), self.hidden, self.steps);
        let states = self.cell.states() * n;
        let rows = self.batch * steps;
        let mut old = vec![T::zero(); rows * n];
        for (row, old) in old.chunks_exact_mut(n.max(1)).enumerate() {
            let from = match row.is_multiple_of(steps.max(1)) {
                true => &start[row / steps * states..],
                false => &output[(row - 1) * states..],
            };
            old.copy_from_slice(&from[..n]);
        }
        let mut bias = vec![T::zero(); width];
        for grad in grad.chunks_exact(width.max(1)) {
            bias.iter_mut().zip(grad).for_each(|(sum, &g)| *sum += g);
        }
        if self.cell == Cell::PeepholeLstm {
            // Each diagonal's gradient: that of its gate times the state it read.
            let mut diagonals = vec![T::zero(); 3 * n];
            for row in 0..rows {
                let c_old = match row.is_multiple_of(steps.max(1)) {
                    true => &start[row / steps * states + n..][..n],
                    false => &output[(row - 1) * states + n..][..n],
                };
                let c_new = &output[row * states + n..][..n];
                for (diagonal, (gate, c)) in
                    [(0, c_old), (1, c_old), (3, c_new)].into_iter().enumerate()
                {
                    let grad = &grad[row * width + gate * n..][..n];
                    let sums = diagonals[diagonal * n..][..n].iter_mut();
                    sums.zip(grad.iter().zip(c))
                        .for_each(|(sum, (&g, &c))| *sum += g * c);
                }
            }
            bias.extend(diagonals);
        }
        let old = Packed::new(&old, rows, n, n, 1);
        let mut weight = vec![T::zero(); width * n];
        let shared = SharedMut::new(&mut weight);
        const ROWS: usize = 32;
        Pool::global().for_each(width.div_ceil(ROWS), |part| {
            let (first, count) = (part * ROWS, ROWS.min(width - part * ROWS));
            if rows == 0 {
                return;
            }
            let left = Left {
                data: &grad[first..],
                row: 1,
                col: width,
            };
            // SAFETY: these rows belong to this job alone.
            let out = unsafe { shared.slice(first * n, count * n) };
            add_product(self.level, left, count, &old, out, n);
        });
        (weight, bias)
    }
}

/// The naive twin of [`recurrence`]: one row, one step, one gate after the other, in f64. Arrays as there, row-major.
pub fn naive(
    cell: Cell,
    gates: &[f64],
    weight: &[f64],
    bias: &[f64],
    start: &[f64],
    (batch, steps, hidden): (usize, usize, usize),
) -> Vec<f64> {
    let (n, width) = (hidden, cell.gates() * hidden);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let mut out = Vec::new();
    for b in 0..batch {
        let mut h = start[b * cell.states() * n..][..n].to_vec();
        let mut c = match cell.states() {
            2 => start[b * 2 * n + n..][..n].to_vec(),
            _ => Vec::new(),
        };
        let peep = &bias[width..];
        for t in 0..steps {
            let old = h.clone();
            for k in 0..n {
                let x = |g: usize| gates[(b * steps + t) * width + g * n + k];
                let r = |g: usize| -> f64 {
                    let row = &weight[(g * n + k) * n..][..n];
                    bias[g * n + k] + row.iter().zip(&old).map(|(w, h)| w * h).sum::<f64>()
                };
                h[k] = match cell {
                    Cell::Tanh => (x(0) + r(0)).tanh(),
                    Cell::Relu => (x(0) + r(0)).max(0.0),
                    Cell::Lstm => {
                        let (i, f) = (sigmoid(x(0) + r(0)), sigmoid(x(1) + r(1)));
                        c[k] = f * c[k] + i * (x(2) + r(2)).tanh();
                        sigmoid(x(3) + r(3)) * c[k].tanh()
                    }
                    Cell::Lstm97 => {
                        c[k] += sigmoid(x(0) + r(0)) * (x(1) + r(1)).tanh();
                        sigmoid(x(2) + r(2)) * c[k].tanh()
                    }
                    Cell::PeepholeLstm => {
                        let i = sigmoid(x(0) + r(0) + peep[k] * c[k]);
                        let f = sigmoid(x(1) + r(1) + peep[n + k] * c[k]);
                        c[k] = f * c[k] + i * (x(2) + r(2)).tanh();
                        sigmoid(x(3) + r(3) + peep[2 * n + k] * c[k]) * c[k].tanh()
                    }
                    Cell::Gru => {
                        let (reset, z) = (sigmoid(x(0) + r(0)), sigmoid(x(1) + r(1)));
                        (1.0 - z) * (x(2) + reset * r(2)).tanh() + z * old[k]
                    }
                };
            }
            out.extend(h.iter().chain(&c));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness;

    const CELLS: [Cell; 6] = [
        Cell::Tanh,
        Cell::Relu,
        Cell::Lstm,
        Cell::Lstm97,
        Cell::PeepholeLstm,
        Cell::Gru,
    ];

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        harness::tensor(shape, salt, -1.0, 1.0)
    }

    #[test]
    fn gradients_are_those_of_finite_differences_also_far_back() {
        for cell in CELLS {
            let (g, s, n, steps) = (cell.gates(), cell.states(), 3, 6);
            let inputs = [
                tensor(&[2, steps, g * n], 1),
                tensor(&[g * n, n], 2),
                tensor(&[(g + cell.diagonals()) * n], 3),
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
    fn every_level_agrees_with_the_naive_twin_forward_and_back() {
        for cell in CELLS {
            let (g, s) = (cell.gates(), cell.states());
            for (batch, steps, n) in [(1, 1, 1), (3, 5, 7), (5, 4, 33), (2, 9, 64)] {
                let scale = 1.0 / (n as f64).sqrt();
                let inputs = [
                    tensor(&[batch, steps, g * n], 1),
                    (tensor(&[g * n, n], 2) * scale).unwrap(),
                    tensor(&[(g + cell.diagonals()) * n], 3),
                    tensor(&[batch, s * n], 4),
                ];
                let wide: Vec<Vec<f64>> = inputs
                    .iter()
                    .map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
                    .collect();
                let narrow: Vec<Vec<f32>> = wide
                    .iter()
                    .map(|v| v.iter().map(|&x| x as f32).collect())
                    .collect();
                let sizes = (batch, steps, n);
                let wanted = naive(cell, &wide[0], &wide[1], &wide[2], &wide[3], sizes);
                let gradient: Vec<f64> = (0..wanted.len())
                    .map(|i| ((i * 37) % 19) as f64 / 9.0 - 1.0)
                    .collect();
                let op = |level| Recurrence {
                    level,
                    cell,
                    batch,
                    steps,
                    hidden: n,
                };
                let refs: Vec<&[f64]> = wide.iter().map(|v| &v[..]).collect();
                let exact = op(Level::Portable).backward(&refs, &wanted, &gradient);
                let refs: Vec<&[f32]> = narrow.iter().map(|v| &v[..]).collect();
                let gradient: Vec<f32> = gradient.iter().map(|&g| g as f32).collect();
                for level in Level::available() {
                    let (found, _) = op(level).forward(&refs);
                    for (&found, wanted) in found.iter().zip(&wanted) {
                        assert!(
                            (f64::from(found) - wanted).abs() < 3e-6 * wanted.abs().max(1.0),
                            "{cell:?} {level:?} {found} {wanted}"
                        );
                    }
                    let back = op(level).backward(&refs, &found, &gradient);
                    for (found, wanted) in back.iter().zip(&exact) {
                        let largest = wanted.iter().fold(1.0f64, |m, w| m.max(w.abs()));
                        for (&found, wanted) in found.iter().zip(wanted) {
                            assert!(
                                (f64::from(found) - wanted).abs() < 2e-5 * largest,
                                "{cell:?} {level:?} {found} {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_sequence_is_its_parts_with_carried_state() {
        for cell in CELLS {
            let (g, s, n) = (cell.gates(), cell.states(), 4);
            let x = tensor(&[3, 9, g * n], 1);
            let (w, b, start) = (
                tensor(&[g * n, n], 2),
                tensor(&[(g + cell.diagonals()) * n], 3),
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

//! The chunked scan as one operation on the CPU: products of chunk size per sequence and head, with the analytic gradient. Only
//! the states between chunks are made again for the backward pass.

use crate::autograd::{Kernel, Real};
use crate::cpu::Level;
use crate::dense::{Left, Packed, add_product};
use crate::pool::{Pool, SharedMut};

/// Inputs in the order x, dt, a, b, c, state; the output is y, then the last state, both flat.
pub(super) struct Fused {
    pub level: Level,
    pub batch: usize,
    pub length: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub chunk: usize,
}

/// One chunk of one head of one sequence, its rows gathered.
struct Chunk<T> {
    q: usize,
    /// dt_j x_j: [q, p]
    written: Vec<T>,
    /// [q, n]
    b: Vec<T>,
    /// [q, n]
    c: Vec<T>,
    /// e^{sum to i}: [q]
    decay: Vec<T>,
    /// e^{sum from j to the end}: [q]
    to_end: Vec<T>,
    /// Running sums of dt a: [q]
    sums: Vec<T>,
}

fn left<T>(data: &[T], row: usize) -> Left<'_, T> {
    Left { data, row, col: 1 }
}

fn turned<T>(data: &[T], row: usize) -> Left<'_, T> {
    Left {
        data,
        row: 1,
        col: row,
    }
}

impl Fused {
    pub fn y_len(&self) -> usize {
        self.batch * self.length * self.heads * self.head_dim
    }

    fn gather<T: Real>(&self, inputs: &[&[T]], job: usize, start: usize) -> Chunk<T> {
        let (p, n) = (self.head_dim, self.state);
        let (sequence, head) = (job / self.heads, job % self.heads);
        let group = head / (self.heads / self.groups);
        let q = self.chunk.min(self.length - start);
        let mut chunk = Chunk {
            q,
            written: Vec::with_capacity(q * p),
            b: Vec::with_capacity(q * n),
            c: Vec::with_capacity(q * n),
            decay: Vec::with_capacity(q),
            to_end: Vec::with_capacity(q),
            sums: Vec::with_capacity(q),
        };
        let mut sum = T::zero();
        for t in start..start + q {
            let token = sequence * self.length + t;
            let dt = inputs[1][token * self.heads + head];
            sum += dt * inputs[2][head];
            chunk.sums.push(sum);
            let x = &inputs[0][(token * self.heads + head) * p..][..p];
            chunk.written.extend(x.iter().map(|&x| x * dt));
            let row = (token * self.groups + group) * n;
            chunk.b.extend_from_slice(&inputs[3][row..row + n]);
            chunk.c.extend_from_slice(&inputs[4][row..row + n]);
        }
        chunk.decay.extend(chunk.sums.iter().map(|s| s.exp()));
        chunk
            .to_end
            .extend(chunk.sums.iter().map(|&s| (sum - s).exp()));
        chunk
    }

    /// C_i . B_j e^{sum from j to i} for j <= i, 0 above: [q, q], and the decays alone.
    fn mixing<T: Real>(&self, chunk: &Chunk<T>) -> (Vec<T>, Vec<T>) {
        let (q, n) = (chunk.q, self.state);
        let mut scores = vec![T::zero(); q * q];
        let b = Packed::new(&chunk.b, n, q, 1, n);
        add_product(self.level, left(&chunk.c, n), q, &b, &mut scores, q);
        let mut decays = vec![T::zero(); q * q];
        for i in 0..q {
            let (scores, decays) = (
                &mut scores[i * q..(i + 1) * q],
                &mut decays[i * q..(i + 1) * q],
            );
            let own = chunk.sums[i];
            for (decay, &sum) in decays[..=i].iter_mut().zip(&chunk.sums) {
                *decay = (own - sum).exp_fast();
            }
            for (score, &decay) in scores[..=i].iter_mut().zip(&decays[..=i]) {
                *score *= decay;
            }
            scores[i + 1..].fill(T::zero());
        }
        (scores, decays)
    }

    /// The state [p, n] after the chunk.
    fn advance<T: Real>(&self, chunk: &Chunk<T>, state: &mut [T]) {
        let (p, n) = (self.head_dim, self.state);
        let whole = chunk.decay.last().copied().unwrap_or_else(T::one);
        state.iter_mut().for_each(|s| *s *= whole);
        let mut b = chunk.b.clone();
        for (row, &d) in b.chunks_exact_mut(n.max(1)).zip(&chunk.to_end) {
            row.iter_mut().for_each(|b| *b *= d);
        }
        let b = Packed::new(&b, chunk.q, n, n, 1);
        add_product(self.level, turned(&chunk.written, p), p, &b, state, n);
    }

    /// Gradients of one head of one sequence, from the last chunk to the first.
    fn back<T: Real>(&self, inputs: &[&[T]], gradient: &[T], job: usize, out: &Grads<T>) {
        let (p, n) = (self.head_dim, self.state);
        let (sequence, head) = (job / self.heads, job % self.heads);
        let starts: Vec<usize> = (0..self.length).step_by(self.chunk).collect();
        // States before each chunk.
        let mut state = inputs[5][job * p * n..(job + 1) * p * n].to_vec();
        let mut before = Vec::with_capacity(starts.len());
        for &start in &starts {
            before.push(state.clone());
            self.advance(&self.gather(inputs, job, start), &mut state);
        }
        let mut grad_state = gradient[self.y_len() + job * p * n..][..p * n].to_vec();
        let mut grad_a = T::zero();
        for (&start, state) in starts.iter().zip(&before).rev() {
            let chunk = self.gather(inputs, job, start);
            let q = chunk.q;
            let mut grad = Vec::with_capacity(q * p);
            for t in start..start + q {
                let row = ((sequence * self.length + t) * self.heads + head) * p;
                grad.extend_from_slice(&gradient[row..row + p]);
            }
            let (scores, decays) = self.mixing(&chunk);
            // Gradient of the masked scores, and what reaches the running sums through them.
            let mut slopes = vec![T::zero(); q * q];
            let written = Packed::new(&chunk.written, p, q, 1, p);
            add_product(self.level, left(&grad, p), q, &written, &mut slopes, q);
            let mut grad_sums = vec![T::zero(); q];
            for i in 0..q {
                let row = i * q..i * q + i + 1;
                let mut own = T::zero();
                for (j, (slope, &score)) in slopes[row.clone()]
                    .iter_mut()
                    .zip(&scores[row.clone()])
                    .enumerate()
                {
                    let through = *slope * score;
                    own += through;
                    grad_sums[j] -= through;
                }
                grad_sums[i] += own;
                for (slope, &decay) in slopes[row.clone()].iter_mut().zip(&decays[row]) {
                    *slope *= decay;
                }
                slopes[i * q + i + 1..(i + 1) * q].fill(T::zero());
            }
            // written_j: through the scores, and through the state after the chunk.
            let mut grad_written = vec![T::zero(); q * p];
            {
                let turned_state = Packed::new(&grad_state, n, p, 1, n);
                add_product(
                    self.level,
                    left(&chunk.b, n),
                    q,
                    &turned_state,
                    &mut grad_written,
                    p,
                );
                let last = q - 1;
                for j in 0..q {
                    let row = &mut grad_written[j * p..(j + 1) * p];
                    row.iter_mut().for_each(|g| *g *= chunk.to_end[j]);
                    let dot: T = row
                        .iter()
                        .zip(&chunk.written[j * p..])
                        .map(|(&g, &w)| g * w)
                        .sum();
                    grad_sums[j] -= dot;
                    grad_sums[last] += dot;
                }
                let packed = Packed::new(&grad, q, p, p, 1);
                add_product(
                    self.level,
                    turned(&scores, q),
                    q,
                    &packed,
                    &mut grad_written,
                    p,
                );
            }
            // c_i: through the carried state, and through the scores.
            let mut grad_c = vec![T::zero(); q * n];
            let packed = Packed::new(state, p, n, n, 1);
            add_product(self.level, left(&grad, p), q, &packed, &mut grad_c, n);
            for i in 0..q {
                let row = &mut grad_c[i * n..(i + 1) * n];
                row.iter_mut().for_each(|g| *g *= chunk.decay[i]);
                grad_sums[i] += row
                    .iter()
                    .zip(&chunk.c[i * n..])
                    .map(|(&g, &c)| g * c)
                    .sum::<T>();
            }
            let packed = Packed::new(&chunk.b, q, n, n, 1);
            add_product(self.level, left(&slopes, q), q, &packed, &mut grad_c, n);
            // b_j: through the state after the chunk, and through the scores.
            let mut grad_b = vec![T::zero(); q * n];
            let packed = Packed::new(&grad_state, p, n, n, 1);
            add_product(
                self.level,
                left(&chunk.written, p),
                q,
                &packed,
                &mut grad_b,
                n,
            );
            for (row, &d) in grad_b.chunks_exact_mut(n.max(1)).zip(&chunk.to_end) {
                row.iter_mut().for_each(|g| *g *= d);
            }
            let packed = Packed::new(&chunk.c, q, n, n, 1);
            add_product(self.level, turned(&slopes, q), q, &packed, &mut grad_b, n);
            // The state before the chunk.
            let whole = chunk.decay[q - 1];
            let dot: T = grad_state.iter().zip(state).map(|(&g, &s)| g * s).sum();
            grad_sums[q - 1] += dot * whole;
            grad_state.iter_mut().for_each(|g| *g *= whole);
            let mut c = chunk.c.clone();
            for (row, &d) in c.chunks_exact_mut(n.max(1)).zip(&chunk.decay) {
                row.iter_mut().for_each(|c| *c *= d);
            }
            let packed = Packed::new(&c, q, n, n, 1);
            add_product(self.level, turned(&grad, p), p, &packed, &mut grad_state, n);
            // Sums to single steps, then to x, dt and a.
            let mut later = T::zero();
            for j in (0..q).rev() {
                later += grad_sums[j];
                let token = sequence * self.length + start + j;
                let at = token * self.heads + head;
                let dt = inputs[1][at];
                let (x, grad_w) = (&inputs[0][at * p..][..p], &grad_written[j * p..][..p]);
                let direct: T = x.iter().zip(grad_w).map(|(&x, &g)| x * g).sum();
                grad_a += later * dt;
                // SAFETY: rows of this head and sequence belong to this job alone.
                unsafe {
                    *out.dt.at(at) = direct + later * inputs[2][head];
                    for (to, &g) in out.x.slice(at * p, p).iter_mut().zip(grad_w) {
                        *to = g * dt;
                    }
                    out.b
                        .slice(at * n, n)
                        .copy_from_slice(&grad_b[j * n..(j + 1) * n]);
                    out.c
                        .slice(at * n, n)
                        .copy_from_slice(&grad_c[j * n..(j + 1) * n]);
                }
            }
        }
        // SAFETY: as above.
        unsafe {
            *out.a.at(job) = grad_a;
            out.state
                .slice(job * p * n, p * n)
                .copy_from_slice(&grad_state);
        }
    }
}

/// Where jobs put their gradients; b and c per head, a per sequence and head.
struct Grads<T> {
    x: SharedMut<T>,
    dt: SharedMut<T>,
    a: SharedMut<T>,
    b: SharedMut<T>,
    c: SharedMut<T>,
    state: SharedMut<T>,
}

impl Kernel for Fused {
    fn name(&self) -> &'static str {
        "ssd"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (p, n) = (self.head_dim, self.state);
        let mut out = vec![T::zero(); self.y_len() + inputs[5].len()];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.batch * self.heads, |job| {
            let (sequence, head) = (job / self.heads, job % self.heads);
            let mut state = inputs[5][job * p * n..(job + 1) * p * n].to_vec();
            for start in (0..self.length).step_by(self.chunk) {
                let chunk = self.gather(inputs, job, start);
                let q = chunk.q;
                // What the carried state gives, then what the chunk gives itself.
                let mut y = vec![T::zero(); q * p];
                let carried = Packed::new(&state, n, p, 1, n);
                add_product(self.level, left(&chunk.c, n), q, &carried, &mut y, p);
                for (row, &d) in y.chunks_exact_mut(p.max(1)).zip(&chunk.decay) {
                    row.iter_mut().for_each(|y| *y *= d);
                }
                let (scores, _) = self.mixing(&chunk);
                let written = Packed::new(&chunk.written, q, p, p, 1);
                add_product(self.level, left(&scores, q), q, &written, &mut y, p);
                for (j, row) in y.chunks_exact(p.max(1)).enumerate() {
                    let at = (sequence * self.length + start + j) * self.heads + head;
                    // SAFETY: rows of this head and sequence belong to this job alone.
                    unsafe { shared.slice(at * p, p) }.copy_from_slice(row);
                }
                self.advance(&chunk, &mut state);
            }
            // SAFETY: as above.
            unsafe { shared.slice(self.y_len() + job * p * n, p * n) }.copy_from_slice(&state);
        });
        let size = out.len();
        (out, vec![size])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let n = self.state;
        let jobs = self.batch * self.heads;
        let mut x = vec![T::zero(); inputs[0].len()];
        let mut dt = vec![T::zero(); inputs[1].len()];
        let mut a = vec![T::zero(); jobs];
        let mut b = vec![T::zero(); self.batch * self.length * self.heads * n];
        let mut c = vec![T::zero(); b.len()];
        let mut state = vec![T::zero(); inputs[5].len()];
        let out = Grads {
            x: SharedMut::new(&mut x),
            dt: SharedMut::new(&mut dt),
            a: SharedMut::new(&mut a),
            b: SharedMut::new(&mut b),
            c: SharedMut::new(&mut c),
            state: SharedMut::new(&mut state),
        };
        Pool::global().for_each(jobs, |job| self.back(inputs, gradient, job, &out));
        let mut grad_a = vec![T::zero(); self.heads];
        for a in a.chunks_exact(self.heads.max(1)) {
            grad_a.iter_mut().zip(a).for_each(|(sum, &g)| *sum += g);
        }
        // Heads of a group read the same b and c.
        let width = self.heads / self.groups;
        let grouped = |per_head: Vec<T>| -> Vec<T> {
            let mut out = vec![T::zero(); self.batch * self.length * self.groups * n];
            let groups = per_head.chunks_exact((width * n).max(1));
            for (out, heads) in out.chunks_exact_mut(n.max(1)).zip(groups) {
                for head in heads.chunks_exact(n) {
                    out.iter_mut().zip(head).for_each(|(sum, &g)| *sum += g);
                }
            }
            out
        };
        vec![x, dt, grad_a, grouped(b), grouped(c), state]
    }
}

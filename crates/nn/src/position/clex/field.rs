//! The vector field of CLEX and its solver: fixed steps of the 3/8 form of Runge-Kutta's method, with
//! gradients through the unrolled steps.

use serde::{Deserialize, Serialize};

use crate::position::RopeError;

/// Activation of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Act {
    /// Hyperbolic tangent, the present default of the published code.
    Tanh,
    /// `x * sigmoid(x)`, that of the paper and of the first release.
    Silu,
}

impl Act {
    fn value(self, x: f64) -> f64 {
        match self {
            Act::Tanh => x.tanh(),
            Act::Silu => x / (1.0 + (-x).exp()),
        }
    }

    fn slope(self, x: f64) -> f64 {
        match self {
            Act::Tanh => 1.0 - x.tanh().powi(2),
            Act::Silu => {
                let s = 1.0 / (1.0 + (-x).exp());
                s * (1.0 + x * (1.0 - s))
            }
        }
    }
}

/// `f(t, z) = act((z + log ntk(t)) U) W + d log ntk(t) / dt`, with `ntk(t)` the NTK-scaled frequencies for
/// the scale `2t - 1`.
#[derive(Debug, Clone, PartialEq)]
pub struct ClexField {
    pairs: usize,
    width: usize,
    act: Act,
    base: f64,
    /// U. `[pairs, width]`
    up: Vec<f64>,
    /// W. `[width, pairs]`
    down: Vec<f64>,
}

/// Gradients of a loss with respect to the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// As U. `[pairs, width]`
    pub up: Vec<f64>,
    /// As W. `[width, pairs]`
    pub down: Vec<f64>,
}

impl ClexField {
    /// A field for `pairs` rotated pairs from `up` `[pairs, width]` and `down` `[width, pairs]`, the tensors
    /// `ode_up_proj` and `ode_down_proj` of a checkpoint; `base` is that of the NTK trend. Errors if the
    /// sizes do not belong together, for fewer than two pairs, and for a base that is not above 0.
    pub fn new(
        pairs: usize,
        up: &[f32],
        down: &[f32],
        act: Act,
        base: f64,
    ) -> Result<Self, RopeError> {
        if pairs < 2 {
            return Err(RopeError::field(
                "rotary dimension",
                2 * pairs,
                "at least 4: CLEX builds on a raised base, which needs two pairs",
            ));
        }
        let width = up.len() / pairs;
        if width == 0 || up.len() != pairs * width || down.len() != up.len() {
            return Err(RopeError::field(
                "ode_up_proj, ode_down_proj",
                format!("{} and {} values", up.len(), down.len()),
                format!("[{pairs}, width] and [width, {pairs}]"),
            ));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(RopeError::field(
                "clex_field_base",
                base,
                "a number above 0",
            ));
        }
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect();
        Ok(ClexField {
            pairs,
            width,
            act,
            base,
            up: wide(up),
            down: wide(down),
        })
    }

    /// Twice the scale less one: by so much NTK scaling stretches at scale `t`.
    fn alpha(t: f64) -> f64 {
        if t < 1.0 { 1.0 } else { 2.0 * t - 1.0 }
    }

    /// The logarithm of the NTK-scaled frequencies at scale `t`. `[pairs]`
    pub fn log_ntk(&self, t: f64) -> Vec<f64> {
        let dim = (2 * self.pairs) as f64;
        let log_base = self.base.ln() + Self::alpha(t).ln() * dim / (dim - 2.0);
        let of_pair = |j| -((2 * j) as f64) / dim * log_base;
        (0..self.pairs).map(of_pair).collect()
    }

    /// How fast [`log_ntk`](Self::log_ntk) changes with `t`. `[pairs]`
    pub fn trend(&self, t: f64) -> Vec<f64> {
        let dim = (2 * self.pairs) as f64;
        let alpha = Self::alpha(t);
        let of_pair = |j| -2.0 * (2 * j) as f64 / ((dim - 2.0) * alpha);
        (0..self.pairs).map(of_pair).collect()
    }

    /// Input and pre-activation of the network. `[pairs]`, `[width]`
    fn network(&self, t: f64, z: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let x: Vec<f64> = z.iter().zip(self.log_ntk(t)).map(|(z, n)| z + n).collect();
        let mut hidden = vec![0.0; self.width];
        for (x, row) in x.iter().zip(self.up.chunks_exact(self.width)) {
            for (hidden, up) in hidden.iter_mut().zip(row) {
                *hidden += x * up;
            }
        }
        (x, hidden)
    }

    /// The field at scale `t` and log-frequencies `z` `[pairs]`. `[pairs]`
    pub fn value(&self, t: f64, z: &[f64]) -> Vec<f64> {
        let (_, hidden) = self.network(t, z);
        let mut value = self.trend(t);
        for (hidden, row) in hidden.iter().zip(self.down.chunks_exact(self.pairs)) {
            let active = self.act.value(*hidden);
            for (value, down) in value.iter_mut().zip(row) {
                *value += active * down;
            }
        }
        value
    }

    /// The gradient with respect to `z` of a loss whose gradient with respect to the value is `grad`
    /// `[pairs]`; those of the network are added to `gradients`. `[pairs]`
    fn back(&self, t: f64, z: &[f64], grad: &[f64], gradients: &mut Gradients) -> Vec<f64> {
        let (x, hidden) = self.network(t, z);
        let mut grad_hidden = vec![0.0; self.width];
        for (i, &hidden) in hidden.iter().enumerate() {
            let row = i * self.pairs..(i + 1) * self.pairs;
            let active = self.act.value(hidden);
            for (total, grad) in gradients.down[row.clone()].iter_mut().zip(grad) {
                *total += active * grad;
            }
            let onto: f64 = self.down[row].iter().zip(grad).map(|(w, g)| w * g).sum();
            grad_hidden[i] = onto * self.act.slope(hidden);
        }
        let mut grad_z = vec![0.0; self.pairs];
        for (j, &x) in x.iter().enumerate() {
            let row = j * self.width..(j + 1) * self.width;
            for (total, grad) in gradients.up[row.clone()].iter_mut().zip(&grad_hidden) {
                *total += x * grad;
            }
            let rows = self.up[row].iter().zip(&grad_hidden);
            grad_z[j] = rows.map(|(u, g)| u * g).sum();
        }
        grad_z
    }

    /// One step from `t0` to `t1`: the four slopes and the value reached.
    fn step(&self, t0: f64, t1: f64, y: &[f64]) -> ([Vec<f64>; 4], Vec<f64>) {
        let h = t1 - t0;
        let [p1, p2, p3, p4] = stage_times(t0, t1);
        let k1 = self.value(p1, y);
        let k2 = self.value(p2, &moved(y, h, &[(1.0 / 3.0, &k1)]));
        let k3 = self.value(p3, &moved(y, h, &[(1.0, &k2), (-1.0 / 3.0, &k1)]));
        let k4 = self.value(p4, &moved(y, h, &[(1.0, &k1), (-1.0, &k2), (1.0, &k3)]));
        let weights = [0.125, 0.375, 0.375, 0.125];
        let next = moved(
            y,
            h,
            &[
                (weights[0], &k1),
                (weights[1], &k2),
                (weights[2], &k3),
                (weights[3], &k4),
            ],
        );
        ([k1, k2, k3, k4], next)
    }

    /// The solution from `start` `[pairs]` at scale 1 to each of `times` (rising, at least 1), in steps of
    /// `time_dt`; the last step ends at the last time. Times within a step are interpolated linearly.
    pub fn solve(&self, start: &[f64], times: &[f64], time_dt: f64) -> Vec<Vec<f64>> {
        let mut solution = Vec::with_capacity(times.len());
        let mut wanted = times.iter().copied().peekable();
        while wanted.next_if(|&time| time <= 1.0).is_some() {
            solution.push(start.to_vec());
        }
        let Some(&end) = times.last().filter(|end| **end > 1.0) else {
            return solution;
        };
        let grid = grid(end, time_dt);
        let mut y = start.to_vec();
        for pair in grid.windows(2) {
            let (_, next) = self.step(pair[0], pair[1], &y);
            while let Some(time) = wanted.next_if(|&time| time <= pair[1]) {
                let share = if time == pair[1] {
                    1.0
                } else {
                    (time - pair[0]) / (pair[1] - pair[0])
                };
                let between = y.iter().zip(&next).map(|(a, b)| a + share * (b - a));
                solution.push(between.collect());
            }
            y = next;
        }
        solution
    }

    /// The solution at scale `end`, and the gradients of a loss through all steps: `loss_gradient` maps
    /// the solution `[pairs]` to the loss's gradient there `[pairs]`.
    pub fn solve_with_gradients(
        &self,
        start: &[f64],
        end: f64,
        time_dt: f64,
        loss_gradient: impl FnOnce(&[f64]) -> Vec<f64>,
    ) -> (Vec<f64>, Gradients) {
        let mut gradients = Gradients {
            up: vec![0.0; self.up.len()],
            down: vec![0.0; self.down.len()],
        };
        let grid = grid(end, time_dt);
        let mut states = vec![start.to_vec()];
        for pair in grid.windows(2) {
            let (_, next) = self.step(pair[0], pair[1], &states[states.len() - 1]);
            states.push(next);
        }
        let reached = states[states.len() - 1].clone();
        let mut grad = loss_gradient(&reached);
        for (pair, y) in grid.windows(2).zip(&states).rev() {
            grad = self.back_step(pair[0], pair[1], y, &grad, &mut gradients);
        }
        (reached, gradients)
    }

    /// The gradient before a step from the one after it.
    fn back_step(
        &self,
        t0: f64,
        t1: f64,
        y: &[f64],
        grad: &[f64],
        gradients: &mut Gradients,
    ) -> Vec<f64> {
        let h = t1 - t0;
        let [p1, p2, p3, p4] = stage_times(t0, t1);
        let ([k1, k2, k3, _], _) = self.step(t0, t1, y);
        let scaled = |factor: f64, grad: &[f64]| -> Vec<f64> {
            grad.iter().map(|grad| h * factor * grad).collect()
        };
        let add = |onto: &mut Vec<f64>, factor: f64, other: &[f64]| {
            for (onto, other) in onto.iter_mut().zip(other) {
                *onto += factor * other;
            }
        };
        let (mut g1, mut g2, mut g3) = (
            scaled(0.125, grad),
            scaled(0.375, grad),
            scaled(0.375, grad),
        );
        let g4 = scaled(0.125, grad);
        let mut grad_y = grad.to_vec();

        let at = moved(y, h, &[(1.0, &k1), (-1.0, &k2), (1.0, &k3)]);
        let back = self.back(p4, &at, &g4, gradients);
        add(&mut grad_y, 1.0, &back);
        add(&mut g1, h, &back);
        add(&mut g2, -h, &back);
        add(&mut g3, h, &back);

        let at = moved(y, h, &[(1.0, &k2), (-1.0 / 3.0, &k1)]);
        let back = self.back(p3, &at, &g3, gradients);
        add(&mut grad_y, 1.0, &back);
        add(&mut g1, -h / 3.0, &back);
        add(&mut g2, h, &back);

        let back = self.back(p2, &moved(y, h, &[(1.0 / 3.0, &k1)]), &g2, gradients);
        add(&mut grad_y, 1.0, &back);
        add(&mut g1, h / 3.0, &back);

        let back = self.back(p1, y, &g1, gradients);
        add(&mut grad_y, 1.0, &back);
        grad_y
    }
}

/// Where the four slopes of a step are taken.
fn stage_times(t0: f64, t1: f64) -> [f64; 4] {
    let h = t1 - t0;
    [t0, t0 + h / 3.0, t0 + 2.0 * h / 3.0, t1]
}

/// `y + h * sum of factor * slope`.
fn moved(y: &[f64], h: f64, slopes: &[(f64, &[f64])]) -> Vec<f64> {
    let mut moved = y.to_vec();
    for (factor, slope) in slopes {
        for (moved, slope) in moved.iter_mut().zip(*slope) {
            *moved += h * factor * slope;
        }
    }
    moved
}

/// The points of the solver: 1, 1 + h, ..., the last one replaced by `end`.
fn grid(end: f64, h: f64) -> Vec<f64> {
    // The number of points is that of f32, as in the solver models were trained with.
    let points = ((end - 1.0) as f32 / h as f32 + 1.0).ceil() as usize;
    let mut grid: Vec<f64> = (0..points.max(2)).map(|i| 1.0 + i as f64 * h).collect();
    if let Some(last) = grid.last_mut() {
        *last = end;
    }
    grid
}

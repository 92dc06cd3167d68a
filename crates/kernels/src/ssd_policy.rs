//! Repairs of a state that never learned to forget (paper 16, Stuffed Mamba): the scan of [`crate::ssd`] token by token, with
//! the state's norm clipped, or with only the last tokens in it.
//!
//! The window is a difference of two states: one that read everything since a restart, one that runs `window` tokens behind.
//! Every `4 window` tokens both restart from the window itself, so that no term older than that has to cancel.

use crate::ssd::Scan;
use candle_core::{Result, Tensor, bail};

/// What is done to the state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Repair {
    /// After each step `S <- S min(1, p / |S|)` per head (Frobenius).
    NormClip(f64),
    /// The state of the last so many tokens, this one included.
    Window(usize),
}

/// A state under repair, f32 tensors with the batch first; fixed size.
pub struct RepairState {
    /// [batch, heads, head_dim, state]
    pub main: Tensor,
    /// The state `window` tokens behind, as `main`.
    pub delayed: Tensor,
    /// The last `window` inputs, oldest first: x [batch, window, heads, head_dim].
    pub x: Tensor,
    /// [batch, window, groups, state]
    pub b: Tensor,
    /// [batch, window, heads]
    pub dt: Tensor,
}

impl RepairState {
    /// Before the first token. `window` 0 for repairs without a window.
    pub fn new(scan: &Scan<'_>, window: usize) -> Result<Self> {
        let (batch, _, heads, head_dim) = scan.x.dims4()?;
        let (_, _, groups, n) = scan.b.dims4()?;
        let zeros = |shape: &[usize]| Tensor::zeros(shape, scan.x.dtype(), scan.x.device());
        Ok(RepairState {
            main: zeros(&[batch, heads, head_dim, n])?,
            delayed: zeros(&[batch, heads, head_dim, n])?,
            x: zeros(&[batch, window, heads, head_dim])?,
            b: zeros(&[batch, window, groups, n])?,
            dt: zeros(&[batch, window, heads])?,
        })
    }
}

/// Renewed after so many windows.
const REBASE: usize = 4;

/// Runs a scan under a repair from `state`, which holds what was read before; `position` tokens were. y as of
/// [`Scan::chunked`], without gradients; for a window the next main state is that of the window.
pub fn repaired(
    scan: &Scan<'_>,
    repair: Repair,
    state: &RepairState,
    position: usize,
) -> Result<(Tensor, RepairState)> {
    let (batch, length, heads, p) = scan.x.dims4()?;
    let (_, _, groups, n) = scan.b.dims4()?;
    let window = match repair {
        Repair::Window(0) => bail!("state window: found 0 tokens, expected 1 or more"),
        Repair::Window(window) => window,
        Repair::NormClip(limit) if limit.is_nan() || limit <= 0.0 => {
            bail!("state norm: found {limit}, expected more than 0")
        }
        Repair::NormClip(_) => 0,
    };
    if state.main.dims() != [batch, heads, p, n] || state.x.dims() != [batch, window, heads, p] {
        bail!(
            "repaired state: found {:?} with {:?} inputs, expected [{batch}, {heads}, {p}, {n}] with {window}",
            state.main.dims(),
            state.x.dims()
        );
    }
    let flat = |t: &Tensor| {
        t.detach()
            .to_dtype(candle_core::DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()
    };
    let (a, c) = (flat(scan.a)?, flat(scan.c)?);
    // The last inputs and the new ones stand one after the other.
    let joined = |old: &Tensor, new: &Tensor| Tensor::cat(&[old, &new.detach()], 1);
    let (all_x, all_b, all_dt) = (
        joined(&state.x, scan.x)?,
        joined(&state.b, scan.b)?,
        joined(&state.dt, scan.dt)?,
    );
    let (x, b, dt) = (flat(&all_x)?, flat(&all_b)?, flat(&all_dt)?);
    let (mut main, mut delayed) = (flat(&state.main)?, flat(&state.delayed)?);
    let mut y = vec![0f64; batch * length * heads * p];
    let (total, size) = (window + length, p * n);
    let mut shown = vec![0f64; size];
    for row in 0..batch {
        for h in 0..heads {
            let group = h / (heads / groups);
            let cell = (row * heads + h) * size;
            let (main, delayed) = (&mut main[cell..][..size], &mut delayed[cell..][..size]);
            // Σ dt of the tokens in the window; those before the first token have dt 0.
            let step_at = |i: usize| dt[(row * total + i) * heads + h];
            let read = |s: &mut [f64], i: usize| {
                let step = step_at(i);
                let decay = (step * a[h]).exp();
                for k in 0..p {
                    let write = step * x[((row * total + i) * heads + h) * p + k];
                    let keys = &b[((row * total + i) * groups + group) * n..][..n];
                    for (s, key) in s[k * n..][..n].iter_mut().zip(keys) {
                        *s = decay * *s + write * key;
                    }
                }
            };
            let mut inside: f64 = (0..window).map(step_at).sum();
            for t in 0..length {
                let i = window + t;
                read(main, i);
                let state: &[f64] = match repair {
                    Repair::NormClip(limit) => {
                        let norm = main.iter().map(|s| s * s).sum::<f64>().sqrt();
                        if norm > limit {
                            main.iter_mut().for_each(|s| *s *= limit / norm);
                        }
                        main
                    }
                    Repair::Window(_) => {
                        // Token i - window leaves; its recurrence is the delayed one.
                        read(delayed, t);
                        inside += step_at(i) - step_at(t);
                        if t % 256 == 255 {
                            inside = (t + 1..=i).map(step_at).sum();
                        }
                        let left = (inside * a[h]).exp();
                        for ((out, m), d) in shown.iter_mut().zip(&*main).zip(&*delayed) {
                            *out = m - left * d;
                        }
                        if (position + t + 1).is_multiple_of(REBASE * window) {
                            main.copy_from_slice(&shown);
                            delayed.fill(0.0);
                        }
                        &shown
                    }
                };
                let query = &c[((row * length + t) * groups + group) * n..][..n];
                let out = &mut y[((row * length + t) * heads + h) * p..][..p];
                for (k, out) in out.iter_mut().enumerate() {
                    let row = &state[k * n..][..n];
                    *out = row.iter().zip(query).map(|(s, c)| s * c).sum();
                }
            }
        }
    }
    let (dtype, device) = (scan.x.dtype(), scan.x.device());
    let last = |t: &Tensor| t.narrow(1, total - window, window)?.contiguous();
    let shape = (batch, heads, p, n);
    let make = |v: Vec<f64>| Tensor::from_vec(v, shape, device)?.to_dtype(dtype);
    Ok((
        Tensor::from_vec(y, scan.x.shape(), device)?.to_dtype(dtype)?,
        RepairState {
            main: make(main)?,
            delayed: make(delayed)?,
            x: last(&all_x)?,
            b: last(&all_b)?,
            dt: last(&all_dt)?,
        },
    ))
}

/// The state that a window's [`RepairState`] stands for: what the last tokens wrote. [batch, heads, head_dim, state]
pub fn window_state(state: &RepairState, a: &Tensor) -> Result<Tensor> {
    let (_, _, heads) = state.dt.dims3()?;
    let left = state
        .dt
        .sum(1)?
        .broadcast_mul(&a.reshape((1, heads))?)?
        .exp()?;
    let left = left.unsqueeze(2)?.unsqueeze(3)?;
    &state.main - state.delayed.broadcast_mul(&left)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{largest, tensor};

    fn inputs(length: usize, dt: f64) -> Vec<Tensor> {
        vec![
            tensor(&[2, length, 4, 3], 1, -1.0, 1.0),
            tensor(&[2, length, 4], 2, dt / 10.0, dt),
            tensor(&[4], 3, -1.0, -0.1),
            tensor(&[2, length, 2, 5], 4, -1.0, 1.0),
            tensor(&[2, length, 2, 5], 5, -1.0, 1.0),
        ]
    }

    fn scan(t: &[Tensor]) -> Scan<'_> {
        Scan {
            x: &t[0],
            dt: &t[1],
            a: &t[2],
            b: &t[3],
            c: &t[4],
            state: None,
        }
    }

    fn part(t: &[Tensor], from: usize, count: usize) -> Vec<Tensor> {
        let cut = |t: &Tensor| t.narrow(1, from, count).unwrap().contiguous().unwrap();
        vec![cut(&t[0]), cut(&t[1]), t[2].clone(), cut(&t[3]), cut(&t[4])]
    }

    #[test]
    fn a_window_is_a_scan_of_its_tokens_also_past_restarts_and_in_parts() {
        let (length, window) = (61, 5);
        let t = inputs(length, 0.3);
        let s = scan(&t);
        let start = RepairState::new(&s, window).unwrap();
        let (y, end) = repaired(&s, Repair::Window(window), &start, 0).unwrap();
        for last in [0, 3, 4, 5, 19, 20, 21, 40, 60] {
            let from = (last + 1usize).saturating_sub(window);
            let own = part(&t, from, last + 1 - from);
            let (expected, state) = scan(&own).naive().unwrap();
            let at = |y: &Tensor, i: usize| y.narrow(1, i, 1).unwrap();
            let error = largest(&(at(&y, last) - at(&expected, last - from)).unwrap());
            assert!(error < 1e-12, "token {last}: {error}");
            if last + 1 == length {
                let found = window_state(&end, &t[2]).unwrap();
                assert!(largest(&(found - state).unwrap()) < 1e-12);
            }
        }
        let (mut state, mut parts, mut from) = (start, Vec::new(), 0);
        for count in [1, 30, 3, 27] {
            let own = part(&t, from, count);
            let (y, next) = repaired(&scan(&own), Repair::Window(window), &state, from).unwrap();
            parts.push(y);
            state = next;
            from += count;
        }
        let error = largest(&(Tensor::cat(&parts, 1).unwrap() - &y).unwrap());
        assert!(error < 1e-12, "{error}");
    }

    #[test]
    fn a_window_longer_than_the_text_and_an_infinite_norm_change_nothing() {
        let t = inputs(33, 0.5);
        let s = scan(&t);
        let (plain, _) = s.naive().unwrap();
        for (repair, window) in [
            (Repair::Window(33), 33),
            (Repair::NormClip(f64::INFINITY), 0),
        ] {
            let start = RepairState::new(&s, window).unwrap();
            let (y, _) = repaired(&s, repair, &start, 0).unwrap();
            assert!(largest(&(y - &plain).unwrap()) < 1e-12);
        }
        let start = RepairState::new(&s, 0).unwrap();
        let (_, end) = repaired(&s, Repair::NormClip(0.7), &start, 0).unwrap();
        let norms = end.main.sqr().unwrap().sum((2, 3)).unwrap().sqrt().unwrap();
        assert!(largest(&norms) < 0.7 + 1e-12);
        assert!(repaired(&s, Repair::Window(3), &start, 0).is_err());
        assert!(repaired(&s, Repair::NormClip(0.0), &start, 0).is_err());
    }

    #[test]
    fn weak_decay_over_many_tokens_keeps_the_window_exact_in_f32() {
        // dt A about -1e-5: without restarts the two states would be thousands of times the window.
        let t: Vec<Tensor> = inputs(20_000, 1e-5)
            .iter()
            .map(|t| t.to_dtype(candle_core::DType::F32).unwrap())
            .collect();
        let (window, mut from) = (64, 0);
        let first = part(&t, 0, 1);
        let mut state = RepairState::new(&scan(&first), window).unwrap();
        while from < 20_000 {
            let own = part(&t, from, 1000);
            (_, state) = repaired(&scan(&own), Repair::Window(window), &state, from).unwrap();
            from += 1000;
        }
        let own = part(&t, 20_000 - window, window);
        let (_, expected) = scan(&own).naive().unwrap();
        let found = window_state(&state, &t[2]).unwrap();
        let scale = largest(&expected);
        let error = largest(&(found - expected).unwrap());
        assert!(error < 1e-3 * scale, "{error} of {scale}");
    }
}

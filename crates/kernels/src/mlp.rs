//! The gated half of a transformer block as one operation that learns, `x + down(silu(gate(n)) up(n))` with
//! `n = rms_norm(x)`: what stands between its products is read and written once each way, and the graph holds one node.

use crate::autograd::{Kernel, Real, Saved, apply};
use crate::composed::{Composed, composes, node};
use crate::cpu::Level;
use crate::dense::{Left, Packed, uninit};
use crate::elementwise::{copy, split_rows};
use crate::learn::composed::{RmsNormComposed, SiluGateComposed};
use crate::learn::{levels, norm_all, norm_back_all, silu_rows};
use crate::linear::{linear_naive, shared_product};
use crate::pool::SharedMut;
use candle_core::{Result, Tensor, bail};
use std::sync::Mutex;

/// Weights of [`gated_mlp`]: norm [width], gate and up [inner, width], down [width, inner].
#[derive(Clone, Copy)]
pub struct GatedWeights<'a> {
    /// Of the norm before.
    pub norm: &'a Tensor,
    /// What the sigmoid unit reads.
    pub gate: &'a Tensor,
    /// What it opens or closes.
    pub up: &'a Tensor,
    /// Back to the width.
    pub down: &'a Tensor,
}

/// x [tokens, width] to the same, all of one type; `eps` is the norm's.
pub fn gated_mlp(x: &Tensor, weights: GatedWeights<'_>, eps: f64) -> Result<Tensor> {
    let GatedWeights {
        norm,
        gate,
        up,
        down,
    } = weights;
    let (_, width) = x.dims2()?;
    let inner = gate.dim(0)?;
    let fits = norm.dims() == [width]
        && gate.dims() == [inner, width]
        && up.dims() == [inner, width]
        && down.dims() == [width, inner];
    if !fits {
        bail!(
            "gated_mlp: found x {:?}, norm {:?}, gate {:?}, up {:?}, down {:?}, expected [tokens, width], [width], twice \
             [inner, width], [width, inner]",
            x.dims(),
            norm.dims(),
            gate.dims(),
            up.dims(),
            down.dims()
        );
    }
    let inputs = [x, norm, gate, up, down];
    if composes(x) {
        return node(GatedComposed::new(eps), &inputs);
    }
    let op = GatedMlp {
        level: Level::current(),
        width,
        inner,
        eps,
        saved: Saved::default(),
    };
    apply(op, &inputs)
}

/// The same of tensor operations.
struct GatedComposed {
    norm: RmsNormComposed,
    /// What the norm, the gate and up gave.
    saved: Mutex<Vec<Tensor>>,
}

impl GatedComposed {
    fn new(eps: f64) -> Self {
        GatedComposed {
            norm: RmsNormComposed { eps },
            saved: Mutex::default(),
        }
    }
}

impl Composed for GatedComposed {
    fn name(&self) -> &'static str {
        "gated_mlp"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let normed = self.norm.forward(&x[..2])?;
        let pair = [
            linear_naive(&normed, &x[2], None)?,
            linear_naive(&normed, &x[3], None)?,
        ];
        let hidden = SiluGateComposed.forward(&pair)?;
        let y = (&x[0] + linear_naive(&hidden, &x[4], None)?)?;
        let [gates, ups] = pair;
        *self.saved.lock().unwrap_or_else(|e| e.into_inner()) = vec![normed, gates, ups];
        Ok(y)
    }

    fn backward(&self, x: &[Tensor], y: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let saved = self.saved.lock().unwrap_or_else(|e| e.into_inner());
        let [normed, pair @ ..] = &saved[..] else {
            bail!("gated_mlp: backward without forward")
        };
        let hidden = SiluGateComposed.forward(pair)?;
        let grad_hidden = gradient.matmul(&x[4])?;
        let grad_down = gradient.t()?.matmul(&hidden)?;
        let slopes = SiluGateComposed.backward(pair, &hidden, &grad_hidden)?;
        let grad_gate = slopes[0].t()?.matmul(normed)?;
        let grad_up = slopes[1].t()?.matmul(normed)?;
        let grad_normed = (slopes[0].matmul(&x[2])? + slopes[1].matmul(&x[3])?)?;
        let back = self.norm.backward(&x[..2], y, &grad_normed)?;
        Ok(vec![
            (&back[0] + gradient)?,
            back[1].clone(),
            grad_gate,
            grad_up,
            grad_down,
        ])
    }
}

levels!(gate_back / gate_back_body / gate_back_wide / gate_back_middle (
    gates: &[T], ups: &[T], slopes: &mut [T], grad_ups: &mut [T], hidden: &mut [T]
));

/// Slopes of silu(gate) up become those of the gate; beside them those of `up`, and the product itself.
#[inline(always)]
fn gate_back_body<T: Real>(
    gates: &[T],
    ups: &[T],
    slopes: &mut [T],
    grad_ups: &mut [T],
    hidden: &mut [T],
) {
    let inputs = gates.iter().zip(ups);
    let outputs = slopes.iter_mut().zip(grad_ups).zip(hidden);
    for ((&g, &u), ((slope, grad_up), hidden)) in inputs.zip(outputs) {
        let s = g.sigmoid();
        let y = *slope;
        *hidden = g * s * u;
        *grad_up = y * (g * s);
        // d silu = s (1 + g (1 - s))
        *slope = y * u * (s * (T::one() + g * (T::one() - s)));
    }
}

struct GatedMlp {
    level: Level,
    width: usize,
    inner: usize,
    eps: f64,
    /// Outputs of gate and up, [tokens, inner] each.
    saved: Saved,
}

impl GatedMlp {
    /// Row-major A [.., cols] times B, plus `c` if there is one.
    fn product<T: Real>(&self, a: &[T], cols: usize, b: &Packed<T>, c: Option<Vec<T>>) -> Vec<T> {
        let rows = a.len() / cols.max(1);
        let added = c.is_some();
        let mut out = c.unwrap_or_else(|| uninit(rows * b.cols()));
        let left = Left {
            data: a,
            row: cols,
            col: 1,
        };
        shared_product(self.level, left, rows, b, &mut out, added);
        out
    }

    /// Aᵀ B of A [.., cols]: the gradient of a weight.
    fn turned_product<T: Real>(&self, a: &[T], cols: usize, b: &Packed<T>) -> Vec<T> {
        let mut out = uninit(cols * b.cols());
        let left = Left {
            data: a,
            row: 1,
            col: cols,
        };
        shared_product(self.level, left, cols, b, &mut out, false);
        out
    }
}

impl Kernel for GatedMlp {
    fn name(&self) -> &'static str {
        "gated_mlp"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let &[x, norm, gate, up, down] = inputs else {
            unreachable!("gated_mlp: five inputs")
        };
        let (width, inner) = (self.width, self.inner);
        let rows = x.len() / width.max(1);
        let normed = norm_all(self.level, x, norm, T::of(self.eps));
        let project = |w| {
            self.product(
                &normed,
                width,
                &Packed::new(w, width, inner, 1, width),
                None,
            )
        };
        let (gates, ups) = (project(gate), project(up));
        let mut hidden = uninit(rows * inner);
        let shared = SharedMut::new(&mut hidden);
        split_rows(rows, inner, |first, rows| {
            let range = first * inner..(first + rows) * inner;
            // SAFETY: pieces are disjoint row ranges.
            let out = unsafe { shared.slice(range.start, range.len()) };
            silu_rows(self.level, &gates[range.clone()], Some(&ups[range]), out);
        });
        let down = Packed::new(down, inner, width, 1, inner);
        let y = self.product(&hidden, inner, &down, Some(copy(x, width)));
        self.saved.put(vec![gates, ups]);
        (y, vec![rows, width])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let &[x, norm, gate, up, down] = inputs else {
            unreachable!("gated_mlp: five inputs")
        };
        let (width, inner) = (self.width, self.inner);
        let rows = x.len() / width.max(1);
        let down = Packed::new(down, width, inner, inner, 1);
        let mut slopes = self.product(gradient, width, &down, None); // [rows, inner]
        let mut grad_ups = uninit(rows * inner);
        let mut hidden = uninit(rows * inner);
        self.saved.with::<T, _>(|saved| {
            let [gates, ups] = saved else {
                panic!("gated_mlp: backward without forward")
            };
            let all = [&mut slopes, &mut grad_ups, &mut hidden].map(|x| SharedMut::new(x));
            split_rows(rows, inner, |first, rows| {
                let range = first * inner..(first + rows) * inner;
                // SAFETY: pieces are disjoint row ranges.
                let [slopes, grad_ups, hidden] =
                    std::array::from_fn(|i| unsafe { all[i].slice(range.start, range.len()) });
                let (gates, ups) = (&gates[range.clone()], &ups[range]);
                gate_back(self.level, gates, ups, slopes, grad_ups, hidden);
            });
        });
        let grad_gates = slopes;
        let grad_down = self.turned_product(
            gradient,
            width,
            &Packed::new(&hidden, rows, inner, inner, 1),
        );
        drop(hidden);
        let normed = norm_all(self.level, x, norm, T::of(self.eps));
        let normed = Packed::new(&normed, rows, width, width, 1);
        let grad_gate = self.turned_product(&grad_gates, inner, &normed);
        let grad_up = self.turned_product(&grad_ups, inner, &normed);
        drop(normed);
        let back = |w| Packed::new(w, inner, width, width, 1);
        let grad_normed = self.product(&grad_gates, inner, &back(gate), None);
        let grad_normed = self.product(&grad_ups, inner, &back(up), Some(grad_normed));
        let (mut grad_x, grad_norm) =
            norm_back_all(self.level, x, norm, T::of(self.eps), &grad_normed);
        let shared = SharedMut::new(&mut grad_x);
        split_rows(rows, width, |first, rows| {
            let range = first * width..(first + rows) * width;
            // SAFETY: pieces are disjoint row ranges.
            let own = unsafe { shared.slice(range.start, range.len()) };
            own.iter_mut()
                .zip(&gradient[range])
                .for_each(|(x, &g)| *x += g);
        });
        vec![grad_x, grad_norm, grad_gate, grad_up, grad_down]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::{distance, flat, tensor};
    use crate::learn::{rms_norm, silu_gate};

    fn inputs(tokens: usize, width: usize, inner: usize) -> Vec<Tensor> {
        let shapes = [
            vec![tokens, width],
            vec![width],
            vec![inner, width],
            vec![inner, width],
            vec![width, inner],
        ];
        let tensors = shapes.iter().enumerate();
        tensors
            .map(|(salt, shape)| tensor(shape, salt, -1.0, 1.0))
            .collect()
    }

    fn fused(t: &[Tensor]) -> Result<Tensor> {
        let weights = GatedWeights {
            norm: &t[1],
            gate: &t[2],
            up: &t[3],
            down: &t[4],
        };
        gated_mlp(&t[0], weights, 1e-5)
    }

    #[test]
    fn is_its_composition_with_the_gradients_of_finite_differences() {
        for (tokens, width, inner) in [(1, 1, 1), (3, 5, 7), (9, 12, 40)] {
            let t = inputs(tokens, width, inner);
            let normed = rms_norm(&t[0], &t[1], 1e-5).unwrap();
            let project = |x: &Tensor, w: &Tensor| linear_naive(x, w, None).unwrap();
            let hidden = silu_gate(&project(&normed, &t[2]), Some(&project(&normed, &t[3])));
            let wanted = (&t[0] + project(&hidden.unwrap(), &t[4])).unwrap();
            assert!(distance(&fused(&t).unwrap(), &wanted) < 1e-12);
            let error = gradient_error(&t, 1e-6, &|t| fused(t)).unwrap();
            assert!(error < 1e-6, "{tokens} {width} {inner}: {error}");
        }
        let mut wrong = inputs(2, 3, 4);
        wrong[4] = wrong[3].clone();
        assert!(fused(&wrong).unwrap_err().to_string().contains("gated_mlp"));
    }

    #[test]
    fn levels_agree() {
        let (tokens, width, inner) = (300, 24, 130);
        let op = |level| GatedMlp {
            level,
            width,
            inner,
            eps: 1e-5,
            saved: Saved::default(),
        };
        let wide: Vec<Vec<f64>> = inputs(tokens, width, inner).iter().map(flat).collect();
        let refs: Vec<&[f64]> = wide.iter().map(|x| &x[..]).collect();
        let portable = op(Level::Portable);
        let (y, _) = portable.forward(&refs);
        let exact = portable.backward(&refs, &y, &wide[0]);
        let narrow: Vec<Vec<f32>> = wide
            .iter()
            .map(|x| x.iter().map(|&x| x as f32).collect())
            .collect();
        let refs: Vec<&[f32]> = narrow.iter().map(|x| &x[..]).collect();
        for level in Level::available() {
            let op = op(level);
            let (found, _) = op.forward(&refs);
            let gradients = op.backward(&refs, &found, &narrow[0]);
            let pairs = std::iter::once((&found, &y)).chain(gradients.iter().zip(&exact));
            for (at, (found, exact)) in pairs.enumerate() {
                let largest = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
                for (&found, exact) in found.iter().zip(exact) {
                    let error = (f64::from(found) - exact).abs();
                    assert!(error < 1e-5 * largest, "{level:?} {at} {error}");
                }
            }
        }
    }
}

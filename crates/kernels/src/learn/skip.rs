//! The skip of a state space layer, `y + D x` (S4, Mamba): one operation with its gradient, because the sum behind a scale's
//! gradient over all of a batch is slow where a graph makes it of single operations.

use super::composed::rows_of;
use super::{GROUP, added_up, levels, sum_products};
use crate::autograd::{Kernel, Real, apply};
use crate::composed::{Composed, composes, node, sum_rows};
use crate::cpu::Level;
use crate::dense::uninit;
use crate::elementwise::{copy, split_rows};
use crate::pool::SharedMut;
use candle_core::{Result, Tensor, bail};

/// y + x scale, a scale for each `x.len / scale.len` neighbours of the last axis: the skip of a state space layer. y and x
/// [.., width], scale [groups], width a multiple of groups.
pub fn skip(y: &Tensor, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    let groups = scale.elem_count();
    if y.dims() != x.dims() || scale.rank() != 1 || groups == 0 || !width.is_multiple_of(groups) {
        bail!(
            "skip: found y {:?}, x {:?}, scale {:?}, expected twice [.., width] and [groups], groups a divisor of width",
            y.dims(),
            x.dims(),
            scale.dims()
        );
    }
    if composes(x) {
        return node(SkipComposed, &[y, x, scale]);
    }
    let op = Skip {
        level: Level::current(),
        groups,
        share: width / groups,
        shape: x.dims().to_vec(),
    };
    apply(op, &[y, x, scale])
}

struct Skip {
    level: Level,
    groups: usize,
    /// Neighbours that share a scale.
    share: usize,
    shape: Vec<usize>,
}

levels!(skip_rows / skip_body / skip_wide / skip_middle (x: &[T], scale: &[T], share: usize, out: &mut [T]));
levels!(skip_back / skip_back_body / skip_back_wide / skip_back_middle (
    x: &[T], scale: &[T], share: usize, gradient: &[T], grad_x: &mut [T], grad_scale: &mut [T]
));

#[inline(always)]
fn skip_body<T: Real>(x: &[T], scale: &[T], share: usize, out: &mut [T]) {
    let width = scale.len() * share;
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let groups = x.chunks_exact(share).zip(out.chunks_exact_mut(share));
        for ((x, out), &scale) in groups.zip(scale) {
            out.iter_mut().zip(x).for_each(|(y, &x)| *y += x * scale);
        }
    }
}

#[inline(always)]
fn skip_back_body<T: Real>(
    x: &[T],
    scale: &[T],
    share: usize,
    gradient: &[T],
    grad_x: &mut [T],
    grad_scale: &mut [T],
) {
    let width = scale.len() * share;
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((x, gradient), grad_x) in rows.zip(grad_x.chunks_exact_mut(width)) {
        let groups = x.chunks_exact(share).zip(gradient.chunks_exact(share));
        let sums = scale.iter().zip(grad_scale.iter_mut());
        for (((x, gradient), grad_x), (&scale, sum)) in
            groups.zip(grad_x.chunks_exact_mut(share)).zip(sums)
        {
            for (grad_x, &g) in grad_x.iter_mut().zip(gradient) {
                *grad_x = g * scale;
            }
            *sum += sum_products(x, gradient);
        }
    }
}

impl Kernel for Skip {
    fn name(&self) -> &'static str {
        "skip"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let width = self.groups * self.share;
        let mut out = copy(inputs[0], width);
        let shared = SharedMut::new(&mut out);
        split_rows(inputs[1].len() / width, width, |first, rows| {
            let range = first * width..(first + rows) * width;
            // SAFETY: pieces are disjoint row ranges.
            let out = unsafe { shared.slice(range.start, range.len()) };
            skip_rows(self.level, &inputs[1][range], inputs[2], self.share, out);
        });
        (out, self.shape.clone())
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let width = self.groups * self.share;
        let rows = gradient.len() / width;
        let blocks = rows.div_ceil(GROUP);
        let mut grad_x = uninit(gradient.len());
        let mut partial = vec![T::zero(); blocks * self.groups];
        let (out, sums) = (SharedMut::new(&mut grad_x), SharedMut::new(&mut partial));
        split_rows(blocks, GROUP * width, |first, count| {
            for block in first..first + count {
                let range = block * GROUP * width..((block + 1) * GROUP).min(rows) * width;
                // SAFETY: blocks are disjoint.
                let (grad_x, sum) = unsafe {
                    (
                        out.slice(range.start, range.len()),
                        sums.slice(block * self.groups, self.groups),
                    )
                };
                let (x, gradient) = (&inputs[1][range.clone()], &gradient[range]);
                skip_back(self.level, x, inputs[2], self.share, gradient, grad_x, sum);
            }
        });
        let grad_scale = added_up(&partial, self.groups);
        vec![copy(gradient, width), grad_x, grad_scale]
    }
}

struct SkipComposed;

impl SkipComposed {
    /// Each group's neighbours times its scale.
    fn scaled(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let (rows, width) = rows_of(x)?;
        let groups = scale.elem_count();
        x.reshape((rows, groups, width / groups))?
            .broadcast_mul(&scale.reshape((1, groups, 1))?)?
            .reshape(x.shape())
    }
}

impl Composed for SkipComposed {
    fn name(&self) -> &'static str {
        "skip"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        &x[0] + Self::scaled(&x[1], &x[2])?
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let groups = x[2].elem_count();
        let sums = sum_rows(&(gradient * &x[1])?)?;
        let grad_scale = sums.reshape((groups, sums.elem_count() / groups))?.sum(1)?;
        Ok(vec![
            gradient.clone(),
            Self::scaled(gradient, &x[2])?,
            grad_scale.to_dtype(x[2].dtype())?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::composed::composing;
    use crate::harness;

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        harness::tensor(shape, salt, -2.0, 2.0)
    }

    #[test]
    fn skips_are_their_sums() {
        for (groups, share) in [(1, 6), (3, 2), (5, 1), (2, 40)] {
            let width = groups * share;
            let shape = [2, 300, width];
            let inputs = [tensor(&shape, 1), tensor(&shape, 2), tensor(&[groups], 3)];
            let found = skip(&inputs[0], &inputs[1], &inputs[2]).unwrap();
            let composed = composing(|| skip(&inputs[0], &inputs[1], &inputs[2])).unwrap();
            assert!(harness::distance(&found, &composed) < 1e-13);
            let few = [
                tensor(&[2, width], 1),
                tensor(&[2, width], 2),
                tensor(&[groups], 3),
            ];
            let error = gradient_error(&few, 1e-6, &|t| skip(&t[0], &t[1], &t[2])).unwrap();
            assert!(error < 1e-7, "{groups} {share}: {error}");
        }
        assert!(skip(&tensor(&[2, 5], 1), &tensor(&[2, 5], 1), &tensor(&[2], 1)).is_err());
    }
}

//! Two parts of the composed scan and their gradients: broadcasts would read and write them many times.

use super::lower;
use crate::composed::{Composed, node};
use crate::gpu::{self, Launch};
use candle_core::{D, DType, Result, Tensor};

/// Each row of x [.., width] times its factor [..].
pub(super) fn scale_rows(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    node(ScaleRows, &[x, factor])
}

/// Gradients of both of [`scale_rows`].
pub(super) fn scale_rows_back(
    x: &Tensor,
    factor: &Tensor,
    gradient: &Tensor,
) -> Result<[Tensor; 2]> {
    let inputs = [x.contiguous()?, factor.contiguous()?];
    pair(ScaleRows.backward(&inputs, x, &gradient.contiguous()?)?)
}

fn pair(parts: Vec<Tensor>) -> Result<[Tensor; 2]> {
    parts
        .try_into()
        .map_err(|_| candle_core::Error::msg("expected two gradients"))
}

struct ScaleRows;

impl Composed for ScaleRows {
    fn name(&self) -> &'static str {
        "scale_rows"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let (x, factor) = (&x[0], &x[1]);
        if gpu::fits(&[x, factor]) {
            let (count, width) = (x.elem_count(), x.dim(D::Minus1)?);
            let launch = Launch::elements("scale_rows", count, &[count, width]);
            return gpu::one(launch, &[x, factor], x.shape());
        }
        x.broadcast_mul(&factor.unsqueeze(D::Minus1)?)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (x, factor) = (&x[0], &x[1]);
        if gpu::fits(&[x, factor, gradient]) {
            let (rows, width) = (factor.elem_count(), x.dim(D::Minus1)?);
            let launch = Launch {
                grid: (rows.div_ceil(8), 1),
                ..Launch::elements("scale_rows_back", rows, &[rows, width])
            };
            let outputs = [x, factor].map(|t| (t.shape().clone(), false));
            return gpu::run(launch, &[x, factor, gradient], outputs.into());
        }
        Ok(vec![
            gradient.broadcast_mul(&factor.unsqueeze(D::Minus1)?)?,
            (x * gradient)?.sum(D::Minus1)?,
        ])
    }
}

/// e^{c_i - c_j} s_ij for j <= i, 0 elsewhere: running sums c [heads, q] in the type of sums, and s [heads / share, q, q], which
/// `share` heads have in common, to [heads, q, q].
pub(super) fn decayed(sums: &Tensor, scores: &Tensor, share: usize) -> Result<Tensor> {
    node(Decayed { share }, &[sums, scores])
}

/// Gradients of sums and scores of [`decayed`], which gave `y`.
pub(super) fn decayed_back(
    sums: &Tensor,
    scores: &Tensor,
    share: usize,
    y: &Tensor,
    gradient: &Tensor,
) -> Result<[Tensor; 2]> {
    let inputs = [sums.clone(), scores.clone()];
    pair(Decayed { share }.backward(&inputs, y, &gradient.contiguous()?)?)
}

struct Decayed {
    share: usize,
}

impl Decayed {
    fn fits(sums: &Tensor, others: &[&Tensor]) -> bool {
        sums.dtype() == DType::F32 && gpu::fits(&[sums]) && gpu::fits(others)
    }

    /// [heads / share, share, q, q]
    fn decay(&self, sums: &Tensor, like: &Tensor) -> Result<Tensor> {
        let (heads, q) = sums.dims2()?;
        sums.unsqueeze(2)?
            .broadcast_sub(&sums.unsqueeze(1)?)?
            .broadcast_add(&lower(q, sums.dtype(), sums.device())?)?
            .exp()?
            .to_dtype(like.dtype())?
            .reshape((heads / self.share, self.share, q, q))
    }
}

impl Composed for Decayed {
    fn name(&self) -> &'static str {
        "decayed"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let (sums, scores) = (&x[0], &x[1]);
        let (heads, q) = sums.dims2()?;
        if Decayed::fits(sums, &[scores]) {
            let count = heads * q * q;
            let launch = Launch::elements("decayed", count, &[count, q, self.share]);
            return gpu::one(launch, &[scores, sums], (heads, q, q));
        }
        self.decay(sums, scores)?
            .broadcast_mul(&scores.unsqueeze(1)?)?
            .reshape((heads, q, q))
    }

    fn backward(&self, x: &[Tensor], y: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (sums, scores) = (&x[0], &x[1]);
        let (heads, q) = sums.dims2()?;
        if Decayed::fits(sums, &[scores, y, gradient]) {
            let launch = Launch {
                grid: (heads, 1),
                ..Launch::elements("decayed_sums", heads, &[q])
            };
            let grad_sums = vec![(sums.shape().clone(), true)];
            let mut out = gpu::run(launch, &[y, gradient], grad_sums)?;
            let count = scores.elem_count();
            let launch = Launch::elements("decayed_scores", count, &[count, q, self.share]);
            out.push(gpu::one(launch, &[gradient, sums], scores.shape())?);
            return Ok(out);
        }
        let flow = (y * gradient)?.to_dtype(sums.dtype())?;
        let gradient = gradient.reshape((heads / self.share, self.share, q, q))?;
        Ok(vec![
            (flow.sum(2)? - flow.sum(1)?)?,
            (self.decay(sums, scores)? * gradient)?.sum(1)?,
        ])
    }
}

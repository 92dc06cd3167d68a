//! The chunked scan of tensor operations, as one node with its analytic gradient: all chunks at once, and the states between
//! them as one more product (the matrix form of Mamba-2, Dao and Gu, arXiv 2405.21060).

use super::parts::{decayed, decayed_back, scale_rows, scale_rows_back};
use super::{falling, lower, running};
use crate::composed::{Composed, wide};
use crate::heads::{join_heads, split_heads};
use candle_core::{Result, Tensor, bail};
use std::sync::Mutex;

/// Inputs as in [`Scan`](super::Scan), and the state before; output: y and the state after, flat, one behind the other.
pub(super) struct Chunked {
    chunk: usize,
    kept: Mutex<Option<Kept>>,
}

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    length: usize,
    heads: usize,
    /// Width of a head.
    p: usize,
    groups: usize,
    /// Size of a state's row.
    n: usize,
    /// Tokens of a chunk.
    q: usize,
    chunks: usize,
}

/// What the forward pass keeps; `all` is batch times chunks, types are those of the inputs, but for sums.
struct Kept {
    shape: Shape,
    /// [all heads, q], in the type of sums
    dt: Tensor,
    /// [all heads, q, p]
    x: Tensor,
    /// x times dt
    written: Tensor,
    /// [all groups, q, n] each
    b: Tensor,
    c: Tensor,
    /// Running sums of the logarithms of decays: [all heads, q]
    sums: Tensor,
    /// [all groups, q, q]
    scores: Tensor,
    /// [all heads, q, q]
    mixing: Tensor,
    /// Decay from a token to its chunk's end, and what is then added to the state: [all heads, q], [all groups, q, share p]
    to_end: Tensor,
    to_add: Tensor,
    /// Decays from chunk to chunk: [batch heads, chunks + 1, chunks + 1]
    decay: Tensor,
    /// The state before and what each chunk adds: [batch heads, chunks + 1, p n]
    given: Tensor,
    /// States before each chunk: [all groups, share p, n]
    before: Tensor,
    /// What they give, and its decay: [all heads, q, p], [all heads, q]
    carried: Tensor,
    grown: Tensor,
}

impl Shape {
    fn of(x: &[Tensor], chunk: usize) -> Result<Self> {
        let (batch, length, heads, p) = x[0].dims4()?;
        let (_, _, groups, n) = x[3].dims4()?;
        let q = chunk.min(length);
        Ok(Shape {
            batch,
            length,
            heads,
            p,
            groups,
            n,
            q,
            chunks: length.div_ceil(q),
        })
    }

    fn all(&self) -> usize {
        self.batch * self.chunks
    }

    fn share(&self) -> usize {
        self.heads / self.groups
    }

    /// [batch, length, count, width] to [all count, q, width]. Steps of size 0 behind the end neither forget nor write.
    fn cut(&self, t: &Tensor, count: usize, width: usize) -> Result<Tensor> {
        let behind = self.chunks * self.q - self.length;
        let t = t.pad_with_zeros(1, 0, behind)?.contiguous()?;
        let t = t.reshape((self.all() * self.q, count * width))?;
        match count {
            1 => t.reshape((self.all(), self.q, width)),
            _ => split_heads(&t, self.all(), count, None),
        }
    }

    /// The way back.
    fn joined(&self, t: &Tensor, count: usize, width: usize) -> Result<Tensor> {
        let t = match count {
            1 => t.clone(),
            _ => join_heads(t, self.all())?,
        };
        let t = t.reshape((self.batch, self.chunks * self.q, count, width))?;
        match self.chunks * self.q == self.length {
            true => Ok(t),
            false => t.narrow(1, 0, self.length)?.contiguous(),
        }
    }

    /// [all heads, ..] of `width` elements each to [batch heads, chunks, width].
    fn by_head(&self, t: &Tensor, width: usize) -> Result<Tensor> {
        let t = t.reshape((self.all(), self.heads * width))?;
        split_heads(&t, self.batch, self.heads, None)
    }

    /// [all heads, q, p] to [all groups, q, share p].
    fn beside(&self, t: &Tensor) -> Result<Tensor> {
        let (all, share) = (self.all() * self.groups, self.share());
        let t = t.reshape((all * share, self.q, self.p))?;
        join_heads(&t, all)?.reshape((all, self.q, share * self.p))
    }

    /// The way back.
    fn apart(&self, t: &Tensor) -> Result<Tensor> {
        let (all, share) = (self.all() * self.groups, self.share());
        let t = t.contiguous()?.reshape((all * self.q, share * self.p))?;
        split_heads(&t, all, share, None)
    }
}

impl Chunked {
    pub(super) fn new(chunk: usize) -> Self {
        Chunked {
            chunk,
            kept: Mutex::new(None),
        }
    }
}

fn turned(t: &Tensor) -> Result<Tensor> {
    t.transpose(1, 2)
}

impl Composed for Chunked {
    fn name(&self) -> &'static str {
        "ssd"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let s = Shape::of(x, self.chunk)?;
        let (dtype, device) = (x[0].dtype(), x[0].device());
        let all = s.all();
        let dt = s.cut(&wide(&x[1])?, s.heads, 1)?.squeeze(2)?; // [all heads, q]
        let rates = wide(&x[2])?.reshape((1, s.heads, 1))?;
        let decays = dt.reshape((all, s.heads, s.q))?.broadcast_mul(&rates)?;
        // Inclusive running sums c_i = Σ_{k<=i} dt_k A, in f64: products with ones may be made in fewer digits elsewhere.
        let sums = running(&decays.reshape((all * s.heads, s.q))?)?;
        let last = sums.narrow(1, s.q - 1, 1)?; // [all heads, 1]
        let read = s.cut(&x[0], s.heads, s.p)?;
        let written = scale_rows(&read, &dt.to_dtype(dtype)?)?; // dt_j x_j
        let (b, c) = (s.cut(&x[3], s.groups, s.n)?, s.cut(&x[4], s.groups, s.n)?);
        let scores = c.matmul(&turned(&b)?)?;
        let mixing = decayed(&sums, &scores, s.share())?;
        let within = mixing.matmul(&written)?; // [all heads, q, p]
        // What each chunk adds to the state: [all groups, share p, n]
        let to_end = last.broadcast_sub(&sums)?.exp()?.to_dtype(dtype)?;
        let to_add = s.beside(&scale_rows(&written, &to_end)?)?;
        let added = turned(&to_add)?.matmul(&b)?;
        // States before each chunk and after the last: a product with the decays from chunk to chunk.
        let totals = running(&s.by_head(&last.contiguous()?, 1)?.squeeze(2)?)?; // C_i: [batch heads, chunks]
        let zero = Tensor::zeros((s.batch * s.heads, 1), totals.dtype(), device)?;
        let totals = Tensor::cat(&[&zero, &totals], 1)?; // C_0 = 0, then as above
        let decay = totals
            .unsqueeze(2)?
            .broadcast_sub(&totals.unsqueeze(1)?)?
            .broadcast_add(&lower(s.chunks + 1, totals.dtype(), device)?)?
            .exp()?
            .to_dtype(dtype)?;
        let start = x[5].reshape((s.batch * s.heads, 1, s.p * s.n))?;
        let given = Tensor::cat(&[&start, &s.by_head(&added, s.p * s.n)?], 1)?;
        let states = decay.matmul(&given)?;
        let before = join_heads(&states.narrow(1, 0, s.chunks)?.contiguous()?, s.batch)?;
        let before = before.reshape((all * s.groups, s.share() * s.p, s.n))?;
        // What the carried state still gives: e^{c_i} S C_i
        let carried = s.apart(&c.matmul(&turned(&before)?)?)?;
        let grown = sums.exp()?.to_dtype(dtype)?;
        let y = (within + scale_rows(&carried, &grown)?)?;
        let y = s.joined(&y, s.heads, s.p)?.flatten_all()?;
        let next = states.narrow(1, s.chunks, 1)?.contiguous()?.flatten_all()?;
        let kept = Kept {
            shape: s,
            dt,
            x: read,
            written,
            b,
            c,
            sums,
            scores,
            mixing,
            to_end,
            to_add,
            decay,
            given,
            before,
            carried,
            grown,
        };
        *self.kept.lock().unwrap_or_else(|e| e.into_inner()) = Some(kept);
        Tensor::cat(&[y, next], 0)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        let Some(k) = &*kept else {
            bail!("ssd: backward without forward")
        };
        let s = k.shape;
        let (dtype, sum_type) = (x[0].dtype(), k.sums.dtype());
        let (all, y_len) = (s.all(), x[0].elem_count());
        let wide = |t: &Tensor| t.to_dtype(sum_type);
        let grad_y = gradient.narrow(0, 0, y_len)?.reshape(x[0].shape())?;
        let grad_y = s.cut(&grad_y, s.heads, s.p)?; // [all heads, q, p]
        // Inside chunks.
        let grad_mixing = grad_y.matmul(&turned(&k.written)?)?;
        let mut grad_written = turned(&k.mixing)?.matmul(&grad_y)?;
        let [mut grad_sums, grad_scores] =
            decayed_back(&k.sums, &k.scores, s.share(), &k.mixing, &grad_mixing)?;
        let mut grad_c = grad_scores.matmul(&k.b)?;
        let mut grad_b = turned(&grad_scores)?.matmul(&k.c)?;
        // Through the states before chunks.
        let [grad_carried, grad_grown] = scale_rows_back(&k.carried, &k.grown, &grad_y)?;
        grad_sums = (grad_sums + wide(&(grad_grown * &k.grown)?)?)?;
        let grad_carried = s.beside(&grad_carried)?; // [all groups, q, share p]
        grad_c = (grad_c + grad_carried.matmul(&k.before)?)?;
        let grad_before = turned(&grad_carried)?.matmul(&k.c)?; // [all groups, share p, n]
        let grad_next = gradient.narrow(0, y_len, x[5].elem_count())?;
        let grad_next = grad_next.reshape((s.batch * s.heads, 1, s.p * s.n))?;
        let grad_before = s.by_head(&grad_before, s.p * s.n)?;
        let grad_states = Tensor::cat(&[grad_before, grad_next], 1)?;
        let grad_given = turned(&k.decay)?.matmul(&grad_states)?;
        let flow = wide(&(grad_states.matmul(&turned(&k.given)?)? * &k.decay)?)?;
        let grad_totals = (flow.sum(2)? - flow.sum(1)?)?; // [batch heads, chunks + 1]
        let grad_last = falling(&grad_totals.narrow(1, 1, s.chunks)?.contiguous()?)?;
        let grad_last = join_heads(&grad_last.unsqueeze(2)?, s.batch)?;
        let mut grad_last = grad_last.reshape((all * s.heads, 1))?;
        let grad_start = grad_given.narrow(1, 0, 1)?.contiguous()?;
        let grad_added = grad_given.narrow(1, 1, s.chunks)?.contiguous()?;
        let grad_added = join_heads(&grad_added, s.batch)?;
        let grad_added = grad_added.reshape((all * s.groups, s.share() * s.p, s.n))?;
        // What chunks add.
        let grad_to_add = s.apart(&k.b.matmul(&turned(&grad_added)?)?)?;
        grad_b = (grad_b + k.to_add.matmul(&grad_added)?)?;
        let [more, grad_to_end] = scale_rows_back(&k.written, &k.to_end, &grad_to_add)?;
        grad_written = (grad_written + more)?;
        let flow = wide(&(grad_to_end * &k.to_end)?)?; // [all heads, q]
        grad_last = (grad_last + flow.sum_keepdim(1)?)?;
        // A chunk's last sum is the end that the others decay to.
        let behind = grad_last.pad_with_zeros(1, s.q - 1, 0)?;
        let grad_decays = falling(&((grad_sums - flow)? + behind)?)?;
        let [grad_x, grad_dt] = scale_rows_back(&k.x, &k.dt.to_dtype(dtype)?, &grad_written)?;
        let grad_decays = grad_decays.reshape((all, s.heads, s.q))?;
        let dt = k.dt.reshape((all, s.heads, s.q))?;
        let grad_rates = (&grad_decays * &dt)?.sum(2)?.sum(0)?;
        let rates = x[2].to_dtype(sum_type)?.reshape((1, s.heads, 1))?;
        let grad_dt = wide(&grad_dt)?.reshape((all, s.heads, s.q))?;
        let grad_dt = (grad_dt + grad_decays.broadcast_mul(&rates)?)?;
        let grad_dt = grad_dt.reshape((all * s.heads, s.q, 1))?;
        let of = |t: Tensor, like: &Tensor| t.reshape(like.shape())?.to_dtype(like.dtype());
        Ok(vec![
            s.joined(&grad_x, s.heads, s.p)?,
            of(s.joined(&grad_dt, s.heads, 1)?, &x[1])?,
            of(grad_rates, &x[2])?,
            s.joined(&grad_b, s.groups, s.n)?,
            s.joined(&grad_c, s.groups, s.n)?,
            of(grad_start, &x[5])?,
        ])
    }
}

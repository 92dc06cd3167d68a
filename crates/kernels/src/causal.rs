//! Causal attention that learns, block by block of queries: scores of a block live in a buffer, nothing quadratic is kept, and
//! the backward pass makes them again (Dao et al., arXiv 2205.14135, on CPU blocks).

use crate::autograd::{Kernel, Real, Saved, apply};
use crate::composed::{Composed, band, composes, node, wide};
use crate::cpu::Level;
use crate::dense::{Left, Packed, add_product, product, uninit};
use crate::gpu;
use crate::heads::{Angles, Heads, Sizes};
use crate::learn::composed::{Seen, softmax_pull};
use crate::learn::{levels, softmax_naive};
use crate::pool::{Pool, SharedMut};
use candle_core::{Result, Tensor, bail};

/// Queries of a block.
const ROWS: usize = 64;

/// Softmax attention of queries that are the last of the keys' positions, differentiable.
///
/// query [heads, t, d], key and value [kv_heads, s, d] to [heads, t, d]. A query sees its own position and the `window` - 1 before.
pub fn causal_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    scale: f64,
    window: usize,
) -> Result<Tensor> {
    let (heads, t, d) = query.dims3()?;
    let (kv_heads, s, _) = key.dims3()?;
    if kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || key.dims() != [kv_heads, s, d]
        || value.dims() != key.dims()
        || s < t
        || window == 0
    {
        bail!(
            "causal attention: found query {:?}, key {:?}, value {:?}, window {window}, expected [heads, t, d], twice \
             [kv_heads, s, d] with s >= t, and 1 or more",
            query.dims(),
            key.dims(),
            value.dims()
        );
    }
    if composes(query) {
        let op = Blocks {
            scale,
            window,
            most: SCORES,
        };
        return match t {
            0 => Ok(query.clone()),
            _ => node(op, &[query, key, value]),
        };
    }
    let op = Causal {
        level: Level::current(),
        heads,
        kv_heads,
        t,
        s,
        d,
        scale,
        window,
        log_sums: Saved::default(),
    };
    apply(op, &[query, key, value])
}

/// Where the tokens of [`document_attention`] belong.
#[derive(Clone, Copy)]
pub struct Documents<'a> {
    /// Documents, one behind the other, all of one length.
    pub count: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// How queries and keys turn by position; none: not at all.
    pub angles: Option<Angles<'a>>,
    /// Factor of the products.
    pub scale: f64,
    /// As in [`causal_attention`].
    pub window: usize,
}

/// [`causal_attention`] inside each of several documents, heads split, turned and joined on the way, as one operation: query
/// [tokens, heads d], key and value [tokens, kv_heads d] to [tokens, heads d].
pub fn document_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    documents: Documents<'_>,
) -> Result<Tensor> {
    let Documents {
        count,
        heads,
        kv_heads,
        angles,
        scale,
        window,
    } = documents;
    let of = |x: &Tensor, heads, angles| Heads::new(x.dims2()?, count, heads, angles);
    let queries = of(query, heads, angles)?;
    let keys = of(key, kv_heads, angles)?;
    let values = of(value, kv_heads, None)?;
    let (q, k) = (queries.sizes(), keys.sizes());
    if !heads.is_multiple_of(kv_heads)
        || (q.length, q.width) != (k.length, k.width)
        || key.dims() != value.dims()
        || window == 0
    {
        bail!(
            "document attention: found query {:?} of {heads} heads, key {:?} and value {:?} of {kv_heads}, window {window}, \
             expected heads of one width, a whole number of queries' for each of keys, and a window of 1 or more",
            query.dims(),
            key.dims(),
            value.dims()
        );
    }
    if q.length == 0 {
        return Ok(query.clone());
    }
    if composes(query) {
        let op = DocumentBlocks {
            outputs: of(query, heads, None)?,
            queries,
            keys,
            values,
            blocks: Blocks {
                scale,
                window,
                most: SCORES,
            },
        };
        return node(op, &[query, key, value]);
    }
    let op = DocumentRows {
        queries: q,
        keys: k,
        values: values.sizes(),
        causal: Causal {
            level: Level::current(),
            heads: count * heads,
            kv_heads: count * kv_heads,
            t: q.length,
            s: k.length,
            d: q.width,
            scale,
            window,
            log_sums: Saved::default(),
        },
    };
    match angles {
        Some((cos, sin)) => apply(op, &[query, key, value, cos, sin]),
        None => apply(op, &[query, key, value]),
    }
}

struct DocumentBlocks {
    queries: Heads,
    keys: Heads,
    values: Heads,
    /// As queries, not turned.
    outputs: Heads,
    blocks: Blocks,
}

impl DocumentBlocks {
    fn split(&self, x: &[Tensor]) -> Result<[Tensor; 3]> {
        Ok([
            self.queries.split(&x[0])?,
            self.keys.split(&x[1])?,
            self.values.split(&x[2])?,
        ])
    }
}

impl Composed for DocumentBlocks {
    fn name(&self) -> &'static str {
        "document_attention"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let y = self.blocks.forward(&self.split(x)?)?;
        self.outputs.join(&y)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let gradient = self.outputs.split(gradient)?;
        let grads = self
            .blocks
            .backward(&self.split(x)?, &gradient, &gradient)?;
        Ok(vec![
            self.queries.join(&grads[0])?,
            self.keys.join(&grads[1])?,
            self.values.join(&grads[2])?,
        ])
    }
}

struct DocumentRows {
    queries: Sizes,
    keys: Sizes,
    values: Sizes,
    causal: Causal,
}

impl DocumentRows {
    fn split<T: Real>(&self, inputs: &[&[T]]) -> [Vec<T>; 3] {
        let angles = turns(inputs);
        [
            self.queries.split(inputs[0], angles),
            self.keys.split(inputs[1], angles),
            self.values.split(inputs[2], None),
        ]
    }
}

/// cos and sin among the inputs of [`DocumentRows`].
fn turns<'a, T>(inputs: &[&'a [T]]) -> Option<(&'a [T], &'a [T])> {
    inputs.get(3).map(|cos| (*cos, inputs[4]))
}

impl Kernel for DocumentRows {
    fn name(&self) -> &'static str {
        "document_attention"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let s = self.queries;
        let [q, k, v] = self.split(inputs);
        let (y, _) = self.causal.forward(&[&q[..], &k, &v]);
        let shape = vec![s.documents * s.length, s.heads * s.width];
        (s.join(&y, None), shape)
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let angles = turns(inputs);
        let [q, k, v] = self.split(inputs);
        let y = self.queries.split(output, None);
        let gradient = self.queries.split(gradient, None);
        let grads = self.causal.backward(&[&q[..], &k, &v], &y, &gradient);
        let mut out = vec![
            self.queries.join(&grads[0], angles),
            self.keys.join(&grads[1], angles),
            self.values.join(&grads[2], None),
        ];
        // Angles are constants.
        out.resize(inputs.len(), Vec::new());
        out
    }
}

/// Scores that exist at a time in the composed form.
const SCORES: usize = 1 << 27;

/// The composed form: blocks of queries, each with the keys that one of them sees. Scores are made again for the gradient.
struct Blocks {
    scale: f64,
    window: usize,
    most: usize,
}

/// Queries `first..first + rows` and keys `from..from + keys`.
struct Block {
    first: usize,
    rows: usize,
    from: usize,
    keys: usize,
}

impl Blocks {
    fn blocks(&self, heads: usize, t: usize, s: usize) -> Vec<Block> {
        let rows = (self.most / (heads * s).max(1)).clamp(1, t);
        let starts = (0..t).step_by(rows);
        starts
            .map(|first| {
                let rows = rows.min(t - first);
                let from = (s - t + first + 1).saturating_sub(self.window);
                let keys = s - t + first + rows - from;
                Block {
                    first,
                    rows,
                    from,
                    keys,
                }
            })
            .collect()
    }

    /// Queries of a block, those of a key head side by side: [kv_heads, group rows, d].
    fn queries(&self, query: &Tensor, b: &Block, kv_heads: usize) -> Result<Tensor> {
        let (heads, _, d) = query.dims3()?;
        query.narrow(1, b.first, b.rows)?.contiguous()?.reshape((
            kv_heads,
            heads / kv_heads * b.rows,
            d,
        ))
    }

    fn seen(&self, b: &Block, offset: usize) -> Seen {
        Seen {
            rows: b.rows,
            keys: b.keys,
            first: offset + b.first,
            from: b.from,
            window: self.window,
        }
    }

    /// Weights of a block, in the type of sums where they are composed: [kv_heads, group rows, keys].
    fn weights(&self, queries: &Tensor, keys: &Tensor, b: &Block, offset: usize) -> Result<Tensor> {
        let scores = queries.matmul(&keys.transpose(1, 2)?)?;
        if gpu::fits(&[&scores]) {
            return self.seen(b, offset).soften(&scores, self.scale);
        }
        let scores = (wide(&scores)? * self.scale)?;
        let (kv_heads, wide_rows, count) = scores.dims3()?;
        let band = band(
            (offset + b.first, b.rows),
            (b.from, b.keys),
            self.window,
            scores.device(),
        )?
        .to_dtype(scores.dtype())?;
        let scores = scores
            .reshape((kv_heads * (wide_rows / b.rows), b.rows, count))?
            .broadcast_add(&band)?;
        softmax_naive(&scores)?.reshape((kv_heads, wide_rows, count))
    }
}

impl Composed for Blocks {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        let (heads, t, d) = x[0].dims3()?;
        let (kv_heads, s, _) = x[1].dims3()?;
        let mut parts = Vec::new();
        for b in self.blocks(heads, t, s) {
            let queries = self.queries(&x[0], &b, kv_heads)?;
            let keys = x[1].narrow(1, b.from, b.keys)?;
            let weights = self.weights(&queries, &keys, &b, s - t)?;
            let values = x[2].narrow(1, b.from, b.keys)?;
            let y = weights.to_dtype(x[2].dtype())?.matmul(&values)?;
            parts.push(y.reshape((heads, b.rows, d))?);
        }
        Tensor::cat(&parts, 1)
    }

    fn backward(&self, x: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        let (heads, t, d) = x[0].dims3()?;
        let (kv_heads, s, _) = x[1].dims3()?;
        let mut grad_query = Vec::new();
        let (mut grad_key, mut grad_value): (Option<Tensor>, Option<Tensor>) = (None, None);
        // A block's share, in its place among all keys.
        let add = |sum: &mut Option<Tensor>, part: Tensor, b: &Block| -> Result<()> {
            let part = part.pad_with_zeros(1, b.from, s - b.from - b.keys)?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + part)?,
                None => part,
            });
            Ok(())
        };
        for b in self.blocks(heads, t, s) {
            let queries = self.queries(&x[0], &b, kv_heads)?;
            let keys = x[1].narrow(1, b.from, b.keys)?;
            let values = x[2].narrow(1, b.from, b.keys)?;
            let weights = self.weights(&queries, &keys, &b, s - t)?;
            let grad = gradient
                .narrow(1, b.first, b.rows)?
                .contiguous()?
                .reshape(queries.shape())?;
            let grad_weights = grad.matmul(&values.transpose(1, 2)?)?;
            let slopes = match gpu::fits(&[&weights, &grad_weights]) {
                true => self
                    .seen(&b, s - t)
                    .pull(&weights, &grad_weights, self.scale)?,
                false => (softmax_pull(&weights, &wide(&grad_weights)?)? * self.scale)?,
            };
            let slopes = slopes.to_dtype(x[0].dtype())?;
            let weights = weights.to_dtype(x[2].dtype())?;
            add(&mut grad_value, weights.transpose(1, 2)?.matmul(&grad)?, &b)?;
            add(&mut grad_key, slopes.transpose(1, 2)?.matmul(&queries)?, &b)?;
            grad_query.push(slopes.matmul(&keys)?.reshape((heads, b.rows, d))?);
        }
        match (grad_key, grad_value) {
            (Some(key), Some(value)) => Ok(vec![Tensor::cat(&grad_query, 1)?, key, value]),
            _ => bail!("causal attention: found no queries"),
        }
    }
}

struct Causal {
    level: Level,
    heads: usize,
    kv_heads: usize,
    t: usize,
    s: usize,
    d: usize,
    scale: f64,
    window: usize,
    /// Logarithms of the softmax's sums: [heads t].
    log_sums: Saved,
}

impl Causal {
    /// Keys that query i sees.
    fn seen(&self, i: usize) -> std::ops::Range<usize> {
        let end = self.s - self.t + i + 1;
        end.saturating_sub(self.window)..end
    }

    fn rows<'a, T: Real>(&self, data: &'a [T]) -> Left<'a, T> {
        Left {
            data,
            row: self.d,
            col: 1,
        }
    }

    /// Products of a block of queries with all keys up to the last that one of them sees, times the scale: [rows, s].
    fn scores<T: Real>(
        &self,
        query: &[T],
        rows: usize,
        end: usize,
        keys: &Packed<T>,
        out: &mut [T],
    ) {
        let (query, part) = (self.rows(query), (self.d, end));
        product(self.level, query, rows, keys, part, out, self.s, true);
        let scale = T::of(self.scale);
        for row in out.chunks_exact_mut(self.s.max(1)).take(rows) {
            row[..end].iter_mut().for_each(|x| *x *= scale);
        }
    }
}

levels!(soften / soften_body / soften_wide / soften_middle (row: &mut [T], log_sum: &mut T));
levels!(pull / pull_body / pull_wide / pull_middle (weights: &mut [T], slopes: &mut [T], log_sum: T, shift: T, scale: T));

/// Partial results that are kept apart, so that they fit the widest registers; as many at every level.
const LANES: usize = 16;

#[inline(always)]
fn folded<T: Real>(row: &[T], start: T, join: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, x);
        }
    }
    let rest = chunks.remainder().iter();
    lanes.iter().chain(rest).fold(start, |a, &b| join(a, b))
}

/// Softmax of a row in place, and the logarithm of its sum.
#[inline(always)]
fn soften_body<T: Real>(row: &mut [T], log_sum: &mut T) {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let top = folded(row, T::neg_infinity(), larger);
    for x in row.iter_mut() {
        *x = (*x - top).exp_fast();
    }
    let total = folded(row, T::zero(), |a, b| a + b);
    *log_sum = top + total.ln();
    let inverse = T::one() / total;
    row.iter_mut().for_each(|x| *x *= inverse);
}

/// Scores to weights, and the gradients of weights to those of scores.
#[inline(always)]
fn pull_body<T: Real>(weights: &mut [T], slopes: &mut [T], log_sum: T, shift: T, scale: T) {
    for (weight, slope) in weights.iter_mut().zip(slopes) {
        *weight = (*weight - log_sum).exp_fast();
        *slope = *weight * (*slope + shift) * scale;
    }
}

impl Kernel for Causal {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn forward<T: Real>(&self, inputs: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let &Causal { heads, t, s, d, .. } = self;
        let mut out = uninit(heads * t * d);
        let mut log_sums = uninit(heads * t);
        let (shared, all_sums) = (SharedMut::new(&mut out), SharedMut::new(&mut log_sums));
        Pool::global().for_each(heads, |head| {
            let kv = head / (heads / self.kv_heads) * s * d;
            let keys = Packed::new(&inputs[1][kv..], d, s, 1, d);
            let values = Packed::new(&inputs[2][kv..], s, d, d, 1);
            let mut scores = vec![T::zero(); ROWS.min(t) * s];
            for first in (0..t).step_by(ROWS) {
                let rows = ROWS.min(t - first);
                let end = self.seen(first + rows - 1).end;
                let query = &inputs[0][(head * t + first) * d..];
                self.scores(query, rows, end, &keys, &mut scores);
                // SAFETY: these rows belong to this job alone.
                let sums = unsafe { all_sums.slice(head * t + first, rows) };
                for (r, sum) in sums.iter_mut().enumerate() {
                    let row = &mut scores[r * s..(r + 1) * s];
                    let seen = self.seen(first + r);
                    row[..seen.start].fill(T::zero());
                    row[seen.end..end].fill(T::zero());
                    let seen = &mut row[seen];
                    soften(self.level, seen, sum);
                }
                // SAFETY: as above.
                let out = unsafe { shared.slice((head * t + first) * d, rows * d) };
                let weights = Left {
                    data: &scores[..],
                    row: s,
                    col: 1,
                };
                product(self.level, weights, rows, &values, (end, d), out, d, true);
            }
        });
        self.log_sums.put(vec![log_sums]);
        (out, vec![heads, t, d])
    }

    fn backward<T: Real>(&self, inputs: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let &Causal { heads, t, s, d, .. } = self;
        let sums = self.log_sums.with(|saved| saved[0].clone());
        let scale = T::of(self.scale);
        let mut grads: Vec<Vec<T>> = inputs.iter().map(|x| vec![T::zero(); x.len()]).collect();
        let shared: Vec<SharedMut<T>> = grads.iter_mut().map(|g| SharedMut::new(g)).collect();
        let group = heads / self.kv_heads;
        Pool::global().for_each(self.kv_heads, |kv_head| {
            let kv = kv_head * s * d;
            let turned = Packed::new(&inputs[1][kv..], d, s, 1, d);
            let keys = Packed::new(&inputs[1][kv..], s, d, d, 1);
            let values = Packed::new(&inputs[2][kv..], d, s, 1, d);
            // SAFETY: the rows of a key head, and of its queries, belong to this job alone.
            let (grad_key, grad_value) =
                unsafe { (shared[1].slice(kv, s * d), shared[2].slice(kv, s * d)) };
            let mut weights = vec![T::zero(); ROWS.min(t) * s];
            let mut slopes = vec![T::zero(); ROWS.min(t) * s];
            for head in kv_head * group..(kv_head + 1) * group {
                for first in (0..t).step_by(ROWS) {
                    let rows = ROWS.min(t - first);
                    let end = self.seen(first + rows - 1).end;
                    let at = (head * t + first) * d;
                    let (query, grad) =
                        (&inputs[0][at..at + rows * d], &gradient[at..at + rows * d]);
                    self.scores(query, rows, end, &turned, &mut weights);
                    let (left, part) = (self.rows(grad), (d, end));
                    product(self.level, left, rows, &values, part, &mut slopes, s, true);
                    for r in 0..rows {
                        let out = &output[at + r * d..][..d];
                        let own = &grad[r * d..][..d];
                        let dot: T = out.iter().zip(own).map(|(&o, &g)| o * g).sum();
                        let sum = sums[head * t + first + r];
                        let seen = self.seen(first + r);
                        let (weights, slopes) = (
                            &mut weights[r * s..(r + 1) * s],
                            &mut slopes[r * s..(r + 1) * s],
                        );
                        for row in [&mut *weights, &mut *slopes] {
                            row[..seen.start].fill(T::zero());
                            row[seen.end..end].fill(T::zero());
                        }
                        let (weights, slopes) = (&mut weights[seen.clone()], &mut slopes[seen]);
                        pull(self.level, weights, slopes, sum, -dot, scale);
                    }
                    let across = |data| Left {
                        data,
                        row: s,
                        col: 1,
                    };
                    let down = |data| Left {
                        data,
                        row: 1,
                        col: s,
                    };
                    // SAFETY: as above.
                    let grad_query = unsafe { shared[0].slice(at, rows * d) };
                    product(
                        self.level,
                        across(&slopes[..]),
                        rows,
                        &keys,
                        (end, d),
                        grad_query,
                        d,
                        true,
                    );
                    let query = Packed::new(query, rows, d, d, 1);
                    add_product(self.level, down(&slopes[..]), end, &query, grad_key, d);
                    let grad = Packed::new(grad, rows, d, d, 1);
                    add_product(self.level, down(&weights[..]), end, &grad, grad_value, d);
                }
            }
        });
        grads
    }
}

/// The naive twin of [`causal_attention`], in f64 on row-major arrays.
pub fn naive(
    query: &[f64],
    key: &[f64],
    value: &[f64],
    (heads, kv_heads, t, s, d): (usize, usize, usize, usize, usize),
    scale: f64,
    window: usize,
) -> Vec<f64> {
    let mut out = vec![0.0; heads * t * d];
    for h in 0..heads {
        let kv = h / (heads / kv_heads);
        for i in 0..t {
            let position = s - t + i;
            let seen = (position + 1).saturating_sub(window)..position + 1;
            let weight = |j: usize| {
                let dot: f64 = (0..d)
                    .map(|k| query[(h * t + i) * d + k] * key[(kv * s + j) * d + k])
                    .sum();
                (scale * dot).exp()
            };
            let total: f64 = seen.clone().map(weight).sum();
            for j in seen {
                for k in 0..d {
                    out[(h * t + i) * d + k] += weight(j) / total * value[(kv * s + j) * d + k];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness;
    use proptest::prelude::*;

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        harness::tensor(shape, salt, -1.0, 1.0)
    }

    fn flat(x: &Tensor) -> Vec<f64> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(25))]
        #[test]
        fn every_level_agrees_with_the_naive_twin(
            kv_heads in 1usize..3, group in 1usize..3, t in 1usize..150, more in 0usize..9, d in 1usize..40, narrow in any::<bool>(), salt in 0usize..99,
        ) {
            let (heads, s) = (kv_heads * group, t + more);
            let window = if narrow { 5 } else { usize::MAX };
            let (q, k, v) = (tensor(&[heads, t, d], salt), tensor(&[kv_heads, s, d], salt + 1), tensor(&[kv_heads, s, d], salt + 2));
            let wanted = naive(&flat(&q), &flat(&k), &flat(&v), (heads, kv_heads, t, s, d), 0.7, window);
            let found = causal_attention(&q, &k, &v, 0.7, window).unwrap();
            for (found, wanted) in flat(&found).iter().zip(&wanted) {
                prop_assert!((found - wanted).abs() < 1e-11);
            }
            let inputs: Vec<Vec<f32>> = [&q, &k, &v].iter().map(|x| flat(x).iter().map(|&x| x as f32).collect()).collect();
            let refs: Vec<&[f32]> = inputs.iter().map(|x| &x[..]).collect();
            for level in Level::available() {
                let op = Causal { level, heads, kv_heads, t, s, d, scale: 0.7, window, log_sums: Saved::default() };
                let (out, _) = op.forward(&refs);
                for (&found, wanted) in out.iter().zip(&wanted) {
                    prop_assert!((f64::from(found) - wanted).abs() < 1e-5, "{level:?} {found} {wanted}");
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (heads, kv_heads, t, s, window) in [(2, 1, 5, 5, usize::MAX), (2, 2, 3, 6, 2)] {
            let inputs = [
                tensor(&[heads, t, 3], 1),
                tensor(&[kv_heads, s, 3], 2),
                tensor(&[kv_heads, s, 3], 3),
            ];
            let error = gradient_error(&inputs, 1e-6, &|x| {
                causal_attention(&x[0], &x[1], &x[2], 0.6, window)
            })
            .unwrap();
            assert!(error < 1e-6, "{error}");
        }
        let error = causal_attention(
            &tensor(&[3, 2, 4], 1),
            &tensor(&[2, 2, 4], 1),
            &tensor(&[2, 2, 4], 1),
            1.0,
            9,
        );
        assert!(error.unwrap_err().to_string().contains("causal attention"));
    }

    #[test]
    fn gradients_of_several_blocks_are_alike_at_every_level() {
        let (heads, kv_heads, t, s, d) = (2, 1, 131, 140, 20);
        let tensors = [
            tensor(&[heads, t, d], 1),
            tensor(&[kv_heads, s, d], 2),
            tensor(&[kv_heads, s, d], 3),
        ];
        let op = |level| Causal {
            level,
            heads,
            kv_heads,
            t,
            s,
            d,
            scale: 0.3,
            window: 100,
            log_sums: Saved::default(),
        };
        let wide: Vec<Vec<f64>> = tensors.iter().map(flat).collect();
        let refs: Vec<&[f64]> = wide.iter().map(|x| &x[..]).collect();
        let portable = op(Level::Portable);
        let (out, _) = portable.forward(&refs);
        let gradient: Vec<f64> = (0..out.len())
            .map(|i| ((i * 31) % 17) as f64 / 8.0 - 1.0)
            .collect();
        let exact = portable.backward(&refs, &out, &gradient);
        let narrow = |x: &Vec<f64>| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let inputs: Vec<Vec<f32>> = wide.iter().map(narrow).collect();
        let refs: Vec<&[f32]> = inputs.iter().map(|x| &x[..]).collect();
        for level in Level::available() {
            let op = op(level);
            let (out, _) = op.forward::<f32>(&refs);
            let found = op.backward(&refs, &out, &narrow(&gradient));
            for (found, exact) in found.iter().zip(&exact) {
                let largest = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
                for (&found, exact) in found.iter().zip(exact) {
                    assert!(
                        (f64::from(found) - exact).abs() < 1e-5 * largest,
                        "{level:?}"
                    );
                }
            }
        }
    }
}

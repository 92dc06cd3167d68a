//! Attention over vector-quantised keys (paper 28, LongVQ; form of Transformer-VQ): softmax over all earlier tokens in linear time.
//!
//! Keys far away are known only by their code, so one score per code, a count and a mean value stand for all of them; keys
//! of this block and the one before are attended one by one, with a bias by distance. Equals the dense softmax exactly.

use crate::autograd::{Kernel, Real, apply};
use crate::pool::{Pool, SharedMut};
use candle_core::{DType, Result, Tensor, bail};
use rustfft::num_traits::Float;

/// Nearest code of every key: keys [.., d], codebook [codes, d] to one index per key, the lowest on ties.
pub fn vq_assign(keys: &Tensor, codebook: &Tensor) -> Result<Vec<u32>> {
    let (codes, d) = codebook.dims2()?;
    let rows = keys.elem_count() / d.max(1);
    if codes == 0 || keys.dims().last() != Some(&d) {
        bail!(
            "vq: found keys {:?} and a codebook {:?}, expected the same last axis and a code",
            keys.dims(),
            codebook.dims()
        );
    }
    let flat = keys.contiguous()?.reshape((rows, d))?;
    // |k|² is the same for all codes: |c|² - 2 k·c decides.
    let size = codebook.sqr()?.sum(1)?.unsqueeze(0)?;
    let score = (flat.matmul(&codebook.t()?)? * -2.0)?.broadcast_add(&size)?;
    let score = score.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let nearest = |row: &Vec<f64>| {
        let mut best = 0;
        for (code, &value) in row.iter().enumerate() {
            if value < row[best] {
                best = code;
            }
        }
        best as u32
    };
    Ok(score.iter().map(nearest).collect())
}

/// The code of every key in place of the key: keys and `quantised` [rows, d] to [rows, d]. The gradient passes straight
/// through to the key, plus that of `weight` times the mean over rows of |k - c|² (the commitment); none reaches the codes.
pub fn straight_through(keys: &Tensor, quantised: &Tensor, weight: f64) -> Result<Tensor> {
    let (rows, d) = keys.dims2()?;
    if quantised.dims() != keys.dims() {
        bail!(
            "straight through: found {:?} and {:?}",
            keys.dims(),
            quantised.dims()
        );
    }
    apply(StraightThrough { rows, d, weight }, &[keys, quantised])
}

struct StraightThrough {
    rows: usize,
    d: usize,
    weight: f64,
}

impl Kernel for StraightThrough {
    fn name(&self) -> &'static str {
        "straight_through"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        (x[1].to_vec(), vec![self.rows, self.d])
    }

    fn backward<T: Real>(&self, x: &[&[T]], _: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let scale = T::of(2.0 * self.weight / self.rows.max(1) as f64);
        let pairs = x[0].iter().zip(x[1]).zip(gradient);
        let grad = pairs.map(|((&k, &c), &g)| g + scale * (k - c)).collect();
        vec![grad, vec![T::zero(); x[1].len()]]
    }
}

/// Inputs of attention, f32 or f64.
pub struct VqAttention<'a> {
    /// Scaled queries: [batch, length, d]
    pub q: &'a Tensor,
    /// Code of every key: [batch length]
    pub codes: &'a [u32],
    /// Keys after quantisation (rows of the codebook; gradients reach those that are near): [batch, length, d]
    pub k: &'a Tensor,
    /// [codes, d]; no gradient
    pub codebook: &'a Tensor,
    /// [batch, length, e]
    pub v: &'a Tensor,
    /// Bias of near tokens by distance i - j, clipped to ±(2 block - 1): [4 block - 1]
    pub bias: &'a Tensor,
    /// Tokens of a block.
    pub block: usize,
    /// Only earlier tokens, or all.
    pub causal: bool,
    /// Whether far tokens are seen; false leaves the window alone.
    pub far: bool,
}

impl VqAttention<'_> {
    fn op(&self) -> Result<Attention> {
        let (batch, length, d) = self.q.dims3()?;
        let e = self.v.dim(2)?;
        let codes = self.codebook.dim(0)?;
        let right = self.block > 0
            && self.k.dims() == self.q.dims()
            && self.v.dims() == [batch, length, e]
            && self.codebook.dims() == [codes, d]
            && self.bias.dims() == [4 * self.block - 1]
            && self.codes.len() == batch * length
            && self.codes.iter().all(|&code| (code as usize) < codes);
        if !right {
            bail!(
                "vq attention: found q {:?}, k {:?}, {} codes, codebook {:?}, v {:?}, bias {:?}, block {}",
                self.q.dims(),
                self.k.dims(),
                self.codes.len(),
                self.codebook.dims(),
                self.v.dims(),
                self.bias.dims(),
                self.block
            );
        }
        Ok(Attention {
            batch,
            length,
            d,
            e,
            codes,
            z: self.codes.to_vec(),
            block: self.block,
            causal: self.causal,
            far: self.far,
        })
    }

    /// [batch, length, e], in time linear in the length. Differentiable in q, k, v and the bias.
    pub fn run(&self) -> Result<Tensor> {
        let op = self.op()?;
        apply(op, &[self.q, self.k, self.codebook, self.v, self.bias])
    }

    /// The naive twin: one softmax over all tokens, with a matrix of length by length. Differentiable by candle.
    pub fn dense(&self) -> Result<Tensor> {
        let op = self.op()?;
        let (l, device) = (op.length, self.q.device());
        let mut index = vec![0u32; l * l];
        let (mut near, mut seen) = (vec![0f32; l * l], vec![0f32; l * l]);
        for i in 0..l {
            for j in 0..l {
                let at = i * l + j;
                let is_near = op.near(i).contains(&j);
                if is_near {
                    near[at] = 1.0;
                    index[at] = op.bias_index(i, j) as u32;
                }
                if (!self.causal || j <= i) && (is_near || self.far) {
                    seen[at] = 1.0;
                }
            }
        }
        let dtype = self.q.dtype();
        let square = |v: Vec<f32>| Tensor::from_vec(v, (1, l, l), device)?.to_dtype(dtype);
        let (near, seen) = (square(near)?, square(seen)?);
        let bias = self
            .bias
            .index_select(&Tensor::from_vec(index, l * l, device)?, 0)?
            .reshape((1, l, l))?;
        let score = |k: &Tensor| {
            let k = k.transpose(1, 2)?.contiguous()?;
            self.q.contiguous()?.matmul(&k)
        };
        // A far key is its code, a constant.
        let (near_scores, far_scores) = (score(self.k)?, score(&self.k.detach())?);
        let apart = (near.ones_like()? - &near)?;
        let scores = near_scores
            .broadcast_add(&bias)?
            .broadcast_mul(&near)?
            .broadcast_add(&far_scores.broadcast_mul(&apart)?)?;
        let hidden = ((seen.ones_like()? - &seen)? * -1e30)?;
        let scores = scores.broadcast_mul(&seen)?.broadcast_add(&hidden)?;
        let top = scores.max_keepdim(2)?.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?;
        weights.matmul(&self.v.contiguous()?)
    }
}

struct Attention {
    batch: usize,
    length: usize,
    d: usize,
    e: usize,
    codes: usize,
    z: Vec<u32>,
    block: usize,
    causal: bool,
    far: bool,
}

fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

fn add<T: Real>(out: &mut [T], scale: T, x: &[T]) {
    out.iter_mut().zip(x).for_each(|(o, &x)| *o += scale * x);
}

/// One sequence's inputs.
struct Row<'a, T> {
    q: &'a [T],
    k: &'a [T],
    codebook: &'a [T],
    v: &'a [T],
    bias: &'a [T],
    z: &'a [u32],
}

impl Attention {
    /// Tokens that query i sees one by one.
    fn near(&self, i: usize) -> std::ops::Range<usize> {
        let block = i / self.block;
        let from = block.saturating_sub(1) * self.block;
        if self.causal {
            from..i + 1
        } else {
            from..((block + 2) * self.block).min(self.length)
        }
    }

    fn bias_index(&self, i: usize, j: usize) -> usize {
        let most = 2 * self.block as isize - 1;
        ((i as isize - j as isize).clamp(-most, most) + most) as usize
    }

    fn row<'a, T>(&'a self, x: &[&'a [T]], row: usize) -> Row<'a, T> {
        let (l, d, e) = (self.length, self.d, self.e);
        Row {
            q: &x[0][row * l * d..][..l * d],
            k: &x[1][row * l * d..][..l * d],
            codebook: x[2],
            v: &x[3][row * l * e..][..l * e],
            bias: x[4],
            z: &self.z[row * l..][..l],
        }
    }

    /// Tokens that join the far set when block `block` begins (`true`), and those that leave it (`false`).
    fn far_changes(&self, block: usize) -> Vec<(usize, bool)> {
        if !self.far {
            return Vec::new();
        }
        let tokens = |b: usize| b * self.block..((b + 1) * self.block).min(self.length);
        let mut out = Vec::new();
        if self.causal {
            if block >= 2 {
                out.extend(tokens(block - 2).map(|t| (t, true)));
            }
        } else if block == 0 {
            out.extend((2 * self.block..self.length).map(|t| (t, true)));
        } else {
            if block >= 2 {
                out.extend(tokens(block - 2).map(|t| (t, true)));
            }
            if (block + 1) * self.block < self.length {
                out.extend(tokens(block + 1).map(|t| (t, false)));
            }
        }
        out
    }

    /// Tells `task` of every change of the far set and of every query, in order.
    fn walk<T: Real>(&self, r: &Row<'_, T>, mut task: impl FnMut(Event<'_, T>)) {
        let (d, e, s) = (self.d, self.e, self.codes);
        let (mut counts, mut sums) = (vec![T::zero(); s], vec![T::zero(); s * e]);
        let mut weights = vec![T::zero(); s];
        let mut window = Vec::new();
        for block in 0..self.length.div_ceil(self.block) {
            for (token, joins) in self.far_changes(block) {
                let code = r.z[token] as usize;
                let sign = if joins { T::one() } else { -T::one() };
                counts[code] += sign;
                let sum = &mut sums[code * e..][..e];
                add(sum, sign, &r.v[token * e..][..e]);
                if counts[code] < T::of(0.5) {
                    // Nothing is left: no rounding either.
                    sum.fill(T::zero());
                }
                task(Event::Far { token, joins });
            }
            let last = ((block + 1) * self.block).min(self.length);
            for i in block * self.block..last {
                let q = &r.q[i * d..][..d];
                let score = |j: usize| dot(q, &r.k[j * d..][..d]) + r.bias[self.bias_index(i, j)];
                window.clear();
                window.extend(self.near(i).map(score));
                let mut top = window
                    .iter()
                    .fold(T::neg_infinity(), |m, &x| Float::max(m, x));
                for code in 0..s {
                    if counts[code] > T::zero() {
                        weights[code] = dot(q, &r.codebook[code * d..][..d]);
                        top = Float::max(top, weights[code]);
                    }
                }
                let mut total = T::zero();
                for w in &mut window {
                    *w = (*w - top).exp();
                    total += *w;
                }
                for code in 0..s {
                    weights[code] = if counts[code] > T::zero() {
                        (weights[code] - top).exp()
                    } else {
                        T::zero()
                    };
                    // The count is the e^(log N) of the definition.
                    total += counts[code] * weights[code];
                }
                let scale = T::one() / total;
                window.iter_mut().for_each(|w| *w *= scale);
                weights.iter_mut().for_each(|w| *w *= scale);
                task(Event::Query {
                    i,
                    window: &window,
                    weights: &weights,
                    counts: &counts,
                    sums: &sums,
                });
            }
        }
    }
}

enum Event<'a, T> {
    /// A token becomes far, or is near again.
    Far { token: usize, joins: bool },
    /// Weights of near tokens, weight of one token of each code, and per code the count and the sum of values [codes, e].
    Query {
        i: usize,
        window: &'a [T],
        weights: &'a [T],
        counts: &'a [T],
        sums: &'a [T],
    },
}

impl Kernel for Attention {
    fn name(&self) -> &'static str {
        "vq_attention"
    }

    fn forward<T: Real>(&self, x: &[&[T]]) -> (Vec<T>, Vec<usize>) {
        let (l, e) = (self.length, self.e);
        let mut out = vec![T::zero(); self.batch * l * e];
        let shared = SharedMut::new(&mut out);
        Pool::global().for_each(self.batch, |row| {
            let r = self.row(x, row);
            // SAFETY: sequences are disjoint.
            let out = unsafe { shared.slice(row * l * e, l * e) };
            self.walk(&r, |event| {
                let Event::Query {
                    i,
                    window,
                    weights,
                    sums,
                    ..
                } = event
                else {
                    return;
                };
                let y = &mut out[i * e..][..e];
                for (j, &w) in self.near(i).zip(window) {
                    add(y, w, &r.v[j * e..][..e]);
                }
                for (code, &w) in weights.iter().enumerate() {
                    if w > T::zero() {
                        add(y, w, &sums[code * e..][..e]);
                    }
                }
            });
        });
        (out, vec![self.batch, l, e])
    }

    fn backward<T: Real>(&self, x: &[&[T]], output: &[T], gradient: &[T]) -> Vec<Vec<T>> {
        let (l, d, e, s) = (self.length, self.d, self.e, self.codes);
        let mut grad_q = vec![T::zero(); x[0].len()];
        let mut grad_k = vec![T::zero(); x[1].len()];
        let mut grad_v = vec![T::zero(); x[3].len()];
        let biases = x[4].len();
        let mut bias_shares = vec![T::zero(); self.batch * biases];
        let (q_out, k_out, v_out, bias_out) = (
            SharedMut::new(&mut grad_q),
            SharedMut::new(&mut grad_k),
            SharedMut::new(&mut grad_v),
            SharedMut::new(&mut bias_shares),
        );
        Pool::global().for_each(self.batch, |row| {
            let r = self.row(x, row);
            // SAFETY: sequences are disjoint.
            let (grad_q, grad_k, grad_v, grad_bias) = unsafe {
                (
                    q_out.slice(row * l * d, l * d),
                    k_out.slice(row * l * d, l * d),
                    v_out.slice(row * l * e, l * e),
                    bias_out.slice(row * biases, biases),
                )
            };
            // What a far token of each code has received so far; a token's share is the sum's growth while it is far.
            let mut received = vec![0f64; s * e];
            let mut at_join: Vec<Option<Vec<f64>>> = vec![None; l];
            let settle = |token: usize, received: &[f64], before: &[f64], grad_v: &mut [T]| {
                let now = &received[r.z[token] as usize * e..][..e];
                let out = &mut grad_v[token * e..][..e];
                for ((out, &now), &before) in out.iter_mut().zip(now).zip(before) {
                    *out += T::of(now - before);
                }
            };
            self.walk(&r, |event| match event {
                Event::Far { token, joins: true } => {
                    let code = r.z[token] as usize;
                    at_join[token] = Some(received[code * e..][..e].to_vec());
                }
                Event::Far { token, .. } => {
                    if let Some(before) = at_join[token].take() {
                        settle(token, &received, &before, grad_v);
                    }
                }
                Event::Query {
                    i,
                    window,
                    weights,
                    counts,
                    sums,
                } => {
                    let at = (row * l + i) * e;
                    let g = &gradient[at..][..e];
                    let mean = dot(g, &output[at..][..e]);
                    let q = &r.q[i * d..][..d];
                    for (j, &w) in self.near(i).zip(window) {
                        add(&mut grad_v[j * e..][..e], w, g);
                        let score = w * (dot(g, &r.v[j * e..][..e]) - mean);
                        add(&mut grad_q[i * d..][..d], score, &r.k[j * d..][..d]);
                        add(&mut grad_k[j * d..][..d], score, q);
                        grad_bias[self.bias_index(i, j)] += score;
                    }
                    for (code, &w) in weights.iter().enumerate() {
                        if w <= T::zero() {
                            continue;
                        }
                        let score = w * (dot(g, &sums[code * e..][..e]) - counts[code] * mean);
                        let key = &r.codebook[code * d..][..d];
                        add(&mut grad_q[i * d..][..d], score, key);
                        let received = &mut received[code * e..][..e];
                        for (sum, &g) in received.iter_mut().zip(g) {
                            *sum += (w * g).wide();
                        }
                    }
                }
            });
            for (token, before) in at_join.iter().enumerate() {
                if let Some(before) = before {
                    settle(token, &received, before, grad_v);
                }
            }
        });
        let mut grad_bias = vec![T::zero(); biases];
        for share in bias_shares.chunks(biases) {
            let pairs = grad_bias.iter_mut().zip(share);
            pairs.for_each(|(sum, &g)| *sum += g);
        }
        vec![
            grad_q,
            grad_k,
            vec![T::zero(); x[2].len()],
            grad_v,
            grad_bias,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::gradient_error;
    use crate::harness::{self, largest};
    use candle_core::Device;
    use proptest::prelude::*;

    fn tensor(shape: &[usize], salt: usize) -> Tensor {
        harness::tensor(shape, salt, -1.0, 1.0)
    }

    /// q, v, bias, codebook; codes of random keys, and the keys' codes as rows.
    fn inputs(
        batch: usize,
        l: usize,
        s: usize,
        block: usize,
        salt: usize,
    ) -> (Vec<Tensor>, Vec<u32>) {
        let (d, e) = (3, 4);
        let codebook = tensor(&[s, d], salt + 3);
        let codes = vq_assign(&tensor(&[batch, l, d], salt + 4), &codebook).unwrap();
        let rows = Tensor::from_slice(&codes, codes.len(), &Device::Cpu).unwrap();
        let k = codebook
            .index_select(&rows, 0)
            .unwrap()
            .reshape((batch, l, d))
            .unwrap();
        let list = vec![
            tensor(&[batch, l, d], salt),
            k,
            tensor(&[batch, l, e], salt + 1),
            tensor(&[4 * block - 1], salt + 2),
            codebook,
        ];
        (list, codes)
    }

    fn attention<'a>(
        x: &'a [Tensor],
        codes: &'a [u32],
        block: usize,
        causal: bool,
        far: bool,
    ) -> VqAttention<'a> {
        VqAttention {
            q: &x[0],
            codes,
            k: &x[1],
            codebook: &x[4],
            v: &x[2],
            bias: &x[3],
            block,
            causal,
            far,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn the_linear_form_is_the_dense_softmax(
            batch in 1usize..3, l in 1usize..40, s in 1usize..9, block in 1usize..12,
            causal in any::<bool>(), far in any::<bool>(), salt in 0usize..1000,
        ) {
            let (x, codes) = inputs(batch, l, s, block, salt);
            let attention = attention(&x, &codes, block, causal, far);
            let error = largest(&(attention.run().unwrap() - attention.dense().unwrap()).unwrap());
            prop_assert!(error < 1e-12, "{error}");
        }
    }

    #[test]
    fn gradients_are_those_through_the_dense_form_and_none_reaches_the_codes() {
        for (causal, far) in [(true, true), (false, true), (true, false)] {
            let (x, codes) = inputs(2, 11, 3, 2, 5);
            let x: Vec<candle_core::Var> = x
                .iter()
                .map(|t| candle_core::Var::from_tensor(t).unwrap())
                .collect();
            let t: Vec<Tensor> = x.iter().map(|v| v.as_tensor().clone()).collect();
            let attention = attention(&t, &codes, 2, causal, far);
            let weights = tensor(&[2, 11, 4], 9);
            let gradients = |y: Tensor| {
                (y * &weights)
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap()
            };
            let (fast, dense) = (
                gradients(attention.run().unwrap()),
                gradients(attention.dense().unwrap()),
            );
            for which in 0..4 {
                let (a, b) = (fast.get(&t[which]).unwrap(), dense.get(&t[which]).unwrap());
                assert!(largest(&(a - b).unwrap()) < 1e-12, "input {which}");
            }
            assert_eq!(largest(fast.get(&t[4]).unwrap()), 0.0);
        }
        // And those of finite differences, where near keys are free.
        let (x, codes) = inputs(1, 9, 3, 2, 7);
        let codebook = x[4].clone();
        let error = gradient_error(
            &[x[0].clone(), x[2].clone(), x[3].clone(), x[1].clone()],
            1e-6,
            &|t| {
                let list = [
                    t[0].clone(),
                    t[3].clone(),
                    t[1].clone(),
                    t[2].clone(),
                    codebook.clone(),
                ];
                attention(&list, &codes, 2, true, true).run()
            },
        )
        .unwrap();
        assert!(error < 1e-6, "{error}");
    }

    #[test]
    fn the_key_takes_the_codes_gradient_and_the_commitment() {
        let (k, c) = (
            candle_core::Var::from_tensor(&tensor(&[4, 3], 1)).unwrap(),
            tensor(&[4, 3], 2),
        );
        let y = straight_through(k.as_tensor(), &c, 0.5).unwrap();
        assert_eq!(largest(&(&y - &c).unwrap()), 0.0);
        let weights = tensor(&[4, 3], 3);
        let found = (y * &weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let commit = (k.as_tensor() - &c)
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap();
        let commit = (commit * (0.5 / 4.0)).unwrap().backward().unwrap();
        let expected = (weights + commit.get(k.as_tensor()).unwrap()).unwrap();
        let error = largest(&(found.get(k.as_tensor()).unwrap() - expected).unwrap());
        assert!(error < 1e-12, "{error}");
    }

    #[test]
    fn one_code_makes_far_values_a_mean_and_bad_codes_are_refused() {
        let (x, codes) = inputs(1, 8, 1, 2, 3);
        let far = attention(&x, &codes, 2, true, true).run().unwrap();
        assert!(
            far.flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
                .iter()
                .all(|v| v.is_finite())
        );
        let wrong = vec![1u32; 8];
        assert!(attention(&x, &wrong, 2, true, true).run().is_err());
        assert!(vq_assign(&x[0], &tensor(&[2, 5], 1)).is_err());
    }
}

//! ALiBi: no rotation, but a penalty on logits that grows with distance, at another slope in each head.
//!
//! For models of that kind (MPT, BLOOM; ALiBi, arXiv 2108.12409), with LM-Infinite's visible sets and its
//! ceiling on distance (arXiv 2308.16137) for texts past the training length. The attention here is the
//! naive one, over candle tensors of any float type: the oracle of the engine, whose kernels add the same term.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::attention::Attend;

/// What the queries of an ALiBi model see.
#[derive(Debug, Clone, PartialEq)]
pub struct Alibi {
    /// Slope of each query head.
    pub slopes: Vec<f64>,
    /// LM-Infinite's L: last tokens seen, and the largest distance; `usize::MAX` is plain ALiBi.
    pub local: usize,
    /// LM-Infinite's G: first tokens seen, at distance L.
    pub global: usize,
}

impl Alibi {
    /// Plain ALiBi for `heads` query heads, with the published slopes.
    pub fn new(heads: usize) -> Self {
        Alibi {
            slopes: slopes(heads),
            local: usize::MAX,
            global: 0,
        }
    }

    /// The term added to a logit of `head`; None = not seen. Positions count from 0.
    pub fn bias(&self, head: usize, query: usize, key: usize) -> Option<f64> {
        let distance = query.checked_sub(key)?;
        if distance >= self.local && key >= self.global {
            return None;
        }
        Some(-self.slopes[head] * distance.min(self.local) as f64)
    }
}

/// The published slopes: `2^(-8 i / n)` for the i-th of n heads when n is a power of two; otherwise those of
/// the next lower power of two, then every second one of twice as many heads.
pub fn slopes(heads: usize) -> Vec<f64> {
    slopes_to(8.0, heads)
}

/// [`slopes`] with another largest exponent than 8, as checkpoints may state (`alibi_bias_max`,
/// `attention.max_alibi_bias`).
pub fn slopes_to(max_bias: f64, heads: usize) -> Vec<f64> {
    let of_power = |n: usize| (1..=n).map(move |i| (-max_bias * i as f64 / n as f64).exp2());
    if heads == 0 {
        return Vec::new();
    }
    let lower = 1 << heads.ilog2();
    of_power(lower)
        .chain(of_power(2 * lower).step_by(2))
        .take(heads)
        .collect()
}

/// Naive attention of one sequence with [`Alibi`], layer by layer, keys and values growing from call to call.
pub struct AlibiAttention {
    alibi: Alibi,
    num_kv_heads: usize,
    head_dim: usize,
    scale: f64,
    /// Per layer, keys and values so far: `[kv_heads, tokens, head_dim]`.
    cache: Vec<Option<(Tensor, Tensor)>>,
}

impl AlibiAttention {
    /// For a model of `layers` layers. `scale` is the factor on `query . key`, usually
    /// `1 / sqrt(head_dim)`. Errors if query heads do not divide into key heads.
    pub fn new(
        alibi: Alibi,
        layers: usize,
        num_kv_heads: usize,
        head_dim: usize,
        scale: f64,
    ) -> Result<Self> {
        let heads = alibi.slopes.len();
        if num_kv_heads == 0 || heads == 0 || !heads.is_multiple_of(num_kv_heads) {
            bail!("ALiBi has {heads} slopes, expected a multiple of the {num_kv_heads} key heads");
        }
        if alibi.local == 0 {
            bail!("local is 0, expected at least 1: every query sees itself");
        }
        Ok(AlibiAttention {
            alibi,
            num_kv_heads,
            head_dim,
            scale,
            cache: vec![None; layers],
        })
    }
}

impl Attend for AlibiAttention {
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let heads = self.alibi.slopes.len();
        let tokens = query.dim(0)?;
        // [tokens, heads head_dim] -> [heads, tokens, head_dim]
        let split = |x: &Tensor, heads: usize| {
            x.contiguous()?
                .reshape((tokens, heads, self.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let query = split(query, heads)?;
        let (mut key, mut value) = (
            split(key, self.num_kv_heads)?,
            split(value, self.num_kv_heads)?,
        );
        if let Some((past_key, past_value)) = &self.cache[layer] {
            key = Tensor::cat(&[past_key, &key], 1)?;
            value = Tensor::cat(&[past_value, &value], 1)?;
        }
        self.cache[layer] = Some((key.clone(), value.clone()));
        let seen = key.dim(1)?;
        // [kv_heads, seen, d] -> [heads, seen, d]
        let repeat = |x: &Tensor| {
            let group = heads / self.num_kv_heads;
            x.unsqueeze(1)?
                .broadcast_as((self.num_kv_heads, group, seen, self.head_dim))?
                .reshape((heads, seen, self.head_dim))
        };
        let scores = query.matmul(&repeat(&key)?.transpose(1, 2)?.contiguous()?)?; // [heads, t, seen]
        let scores = match scores.dtype() {
            DType::F64 => scores,
            _ => scores.to_dtype(DType::F32)?,
        };
        let (alibi, start) = (&self.alibi, seen - tokens);
        let bias: Vec<f64> = (0..heads)
            .flat_map(|head| {
                (start..seen).flat_map(move |i| {
                    (0..seen).map(move |j| alibi.bias(head, i, j).unwrap_or(f64::NEG_INFINITY))
                })
            })
            .collect();
        let bias = Tensor::from_vec(bias, (heads, tokens, seen), query.device())?
            .to_dtype(scores.dtype())?;
        let scores = ((scores * self.scale)? + bias)?;
        let weights = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
            .exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights
            .to_dtype(value.dtype())?
            .matmul(&repeat(&value)?.contiguous()?)? // [heads, t, d]
            .transpose(0, 1)?
            .contiguous()?
            .reshape((tokens, heads * self.head_dim))
    }
}

//! What one layer's attention asks of its surroundings, and the plain causal answer to it.
//!
//! The model hands over un-rotated queries, keys and values; an [`Attend`] decides positions,
//! visibility and storage. The engine's answer is paged and follows a policy; [`CausalAttention`]
//! here is whole, differentiable and runs on any candle device.

mod bidirectional;

pub use bidirectional::BidirectionalAttention;

use crate::config::ModelConfig;
use crate::position::{Frequencies, LayerRopes};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use longspan_kernels::causal::{Documents, causal_attention, document_attention};
use longspan_kernels::composed::{Composed, Kept, composes, node};

/// Attention of one layer over all sequences of a forward pass.
pub trait Attend {
    /// query [tokens, num_heads head_dim], key and value [tokens, num_kv_heads head_dim], all
    /// un-rotated, to [tokens, num_heads head_dim].
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor>;
}

/// Softmax attention, causal inside each document, by candle ops: the training and CUDA path.
pub struct CausalAttention<'a> {
    config: &'a ModelConfig,
    /// The model's own rotary bases, or those set in their place.
    ropes: LayerRopes,
    /// Document lengths of the flat tokens; they sum to the number of tokens of a call.
    lengths: Vec<usize>,
    tables: Tables,
    /// Per layer the keys (rotated) and values seen so far, [kv_heads, past, head_dim].
    cache: Option<&'a mut Vec<Option<(Tensor, Tensor)>>>,
}

/// cos and sin of each rotary basis for the tokens of a call: [tokens, rotary_dim / 2].
pub type Tables = Vec<(Tensor, Tensor)>;

/// Tables by document lengths: every layer of a pass asks for the same.
pub type KeptTables = Kept<(Vec<usize>, DType), Tables>;

impl<'a> CausalAttention<'a> {
    /// Attention over packed documents of these lengths, positions restarting in each, with the tables of `kept`, which serves
    /// one model.
    pub fn remembering(
        config: &'a ModelConfig,
        lengths: &[usize],
        dtype: DType,
        device: &Device,
        kept: &KeptTables,
    ) -> Result<Self> {
        let ropes = LayerRopes::new(config).map_err(candle_core::Error::wrap)?;
        let tables = kept.get((lengths.to_vec(), dtype), || {
            restarting_tables(&ropes, lengths, None, dtype, device)
        })?;
        Ok(Self::of_documents(config, ropes, lengths, tables))
    }

    /// Attention over packed documents of these lengths, positions restarting in each
    /// (`positions` overrides them; one per token).
    pub fn packed(
        config: &'a ModelConfig,
        lengths: &[usize],
        positions: Option<&[usize]>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let ropes = LayerRopes::new(config).map_err(candle_core::Error::wrap)?;
        let tables = restarting_tables(&ropes, lengths, positions, dtype, device)?;
        Ok(Self::of_documents(config, ropes, lengths, tables))
    }

    fn of_documents(
        config: &'a ModelConfig,
        ropes: LayerRopes,
        lengths: &[usize],
        tables: Tables,
    ) -> Self {
        CausalAttention {
            config,
            ropes,
            lengths: lengths.to_vec(),
            tables,
            cache: None,
        }
    }

    /// Attention of `tokens` new tokens of one sequence over a growing cache of candle tensors.
    pub fn cached(
        config: &'a ModelConfig,
        tokens: usize,
        cache: &'a mut Vec<Option<(Tensor, Tensor)>>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let ropes = LayerRopes::new(config).map_err(candle_core::Error::wrap)?;
        Self::cached_with(config, ropes, tokens, cache, dtype, device)
    }

    /// As [`cached`](Self::cached), with other rotary bases than the model's own. Keys stay in the cache at
    /// the angles they were read at, as transformers leaves them.
    pub fn cached_with(
        config: &'a ModelConfig,
        ropes: LayerRopes,
        tokens: usize,
        cache: &'a mut Vec<Option<(Tensor, Tensor)>>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        cache.resize(config.num_layers, None);
        let past = match &cache[0] {
            Some((key, _)) => key.dim(1)?,
            None => 0,
        };
        let positions: Vec<usize> = (past..past + tokens).collect();
        let tables = rope_tables(&ropes, &positions, Some(past + tokens), dtype, device)?;
        Ok(CausalAttention {
            config,
            ropes,
            lengths: vec![tokens],
            tables,
            cache: Some(cache),
        })
    }
}

fn restarting_tables(
    ropes: &LayerRopes,
    lengths: &[usize],
    positions: Option<&[usize]>,
    dtype: DType,
    device: &Device,
) -> Result<Tables> {
    let restarting: Vec<usize> = lengths.iter().flat_map(|&length| 0..length).collect();
    let positions = positions.unwrap_or(&restarting);
    let seq_len = positions.iter().max().map(|last| last + 1);
    rope_tables(ropes, positions, seq_len, dtype, device)
}

fn rope_tables(
    ropes: &LayerRopes,
    positions: &[usize],
    seq_len: Option<usize>,
    dtype: DType,
    device: &Device,
) -> Result<Tables> {
    // Each position's angles are computed once, however many documents reach it.
    let count = positions.iter().max().map_or(0, |last| last + 1);
    let repeated = count < positions.len();
    let index = match repeated {
        true => {
            let index = positions.iter().map(|&p| p as u32).collect();
            Some(Tensor::from_vec(index, positions.len(), device)?)
        }
        false => None,
    };
    let distinct: Vec<usize> = (0..count).collect();
    let computed = if repeated { &distinct } else { positions };
    ropes
        .bases()
        .iter()
        .map(|basis| {
            let Frequencies {
                inv_freq,
                attention_factor,
                ..
            } = basis.frequencies(seq_len);
            let angles = computed
                .iter()
                .flat_map(|&p| inv_freq.iter().map(move |&f| p as f64 * f as f64));
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles
                .map(|a| {
                    (
                        (a.cos() * attention_factor) as f32,
                        (a.sin() * attention_factor) as f32,
                    )
                })
                .unzip();
            let shape = (computed.len(), inv_freq.len());
            let table = |values: Vec<f32>| {
                let table = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
                match &index {
                    Some(index) => table.index_select(index, 0),
                    None => Ok(table),
                }
            };
            Ok((table(cos)?, table(sin)?))
        })
        .collect()
}

/// Rotates x [heads, tokens, head_dim] by cos, sin [tokens, rotary_dim / 2], half layout.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if composes(x) {
        let (cos, sin) = (cos.clone(), sin.clone());
        return node(Rotation { cos, sin }, &[x]);
    }
    rotated(x, cos, sin)
}

/// [`rotate`] as one operation; its gradient is the turn back.
struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Composed for Rotation {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn forward(&self, x: &[Tensor]) -> Result<Tensor> {
        rotated(&x[0], &self.cos, &self.sin)
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, gradient: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![rotated(gradient, &self.cos, &self.sin.neg()?)?])
    }
}

fn rotated(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = cos.dim(1)?;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    let rest = x.dim(2)? - 2 * half;
    if rest == 0 {
        Tensor::cat(&[first, second], 2)
    } else {
        Tensor::cat(&[first, second, x.narrow(2, 2 * half, rest)?], 2)
    }
}

impl Attend for CausalAttention<'_> {
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let c = self.config;
        let tokens = query.dim(0)?;
        if self.lengths.iter().sum::<usize>() != tokens {
            bail!(
                "document lengths sum to {}, expected {tokens} tokens",
                self.lengths.iter().sum::<usize>()
            );
        }
        if self.cache.is_none() && self.alike() && c.plain_scores() {
            return self.together(layer, query, key, value);
        }
        // [tokens, heads head_dim] -> [heads, tokens, head_dim]
        let split = |x: &Tensor, heads: usize| {
            x.contiguous()?
                .reshape((tokens, heads, c.head_dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (mut query, mut key, value) = (
            split(query, c.num_heads)?,
            split(key, c.num_kv_heads)?,
            split(value, c.num_kv_heads)?,
        );
        if let Some(rope) = self.ropes.of_layer(layer) {
            let (cos, sin) = &self.tables[rope];
            query = rotate(&query, cos, sin)?;
            key = rotate(&key, cos, sin)?;
        }
        let mut value = value;
        if let Some(cache) = &mut self.cache {
            if let Some((past_key, past_value)) = &cache[layer] {
                key = Tensor::cat(&[past_key, &key], 1)?;
                value = Tensor::cat(&[past_value, &value], 1)?;
            }
            cache[layer] = Some((key.clone(), value.clone()));
        }
        let mut outputs = Vec::with_capacity(self.lengths.len());
        let mut start = 0;
        for &length in &self.lengths {
            // With a cache there is one document and keys reach back over all of it.
            let (key_start, keys) = if self.cache.is_some() {
                (0, key.dim(1)?)
            } else {
                (start, length)
            };
            outputs.push(self.document(
                layer,
                &query.narrow(1, start, length)?,
                &key.narrow(1, key_start, keys)?,
                &value.narrow(1, key_start, keys)?,
            )?);
            start += length;
        }
        Tensor::cat(&outputs, 0)
    }
}

impl CausalAttention<'_> {
    /// Whether all documents have one length.
    fn alike(&self) -> bool {
        let first = self.lengths.first().copied().unwrap_or(0);
        first > 0 && self.lengths.iter().all(|&length| length == first)
    }

    /// Documents of one length in one operation, because each operation has a cost of its own: sizes as those of
    /// [`attend`](Attend::attend).
    fn together(
        &self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let c = self.config;
        let angles = self.ropes.of_layer(layer).map(|rope| {
            let (cos, sin) = &self.tables[rope];
            (cos, sin)
        });
        let documents = Documents {
            count: self.lengths.len(),
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
            angles,
            scale: f64::from(c.attention_scale),
            window: c.layers[layer].sliding_window.unwrap_or(usize::MAX),
        };
        document_attention(query, key, value, documents)
    }

    /// query [heads, t, d], key and value [kv_heads, s, d] (the queries are the last t of the s
    /// positions) to [t, heads d].
    fn document(
        &self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let c = self.config;
        let (t, s) = (query.dim(1)?, key.dim(1)?);
        let window = c.layers[layer].sliding_window.unwrap_or(usize::MAX);
        if c.plain_scores() {
            let scale = f64::from(c.attention_scale);
            let plain = |x: &Tensor| x.contiguous();
            let (query, key, value) = (plain(query)?, plain(key)?, plain(value)?);
            return causal_attention(&query, &key, &value, scale, window)?
                .transpose(0, 1)?
                .contiguous()?
                .reshape((t, c.num_heads * c.head_dim));
        }
        let group = c.num_heads / c.num_kv_heads;
        // [kv_heads, s, d] -> [heads, s, d]: each key head serves `group` query heads
        let repeat = |x: &Tensor| {
            x.unsqueeze(1)?
                .broadcast_as((c.num_kv_heads, group, s, c.head_dim))?
                .reshape((c.num_heads, s, c.head_dim))
        };
        let scores = query
            .contiguous()?
            .matmul(&repeat(key)?.transpose(1, 2)?.contiguous()?)?; // [heads, t, s]
        let mut scores = (scores.to_dtype(DType::F32)? * c.attention_scale as f64)?;
        if let Some(cap) = c.attention_softcap {
            scores = ((scores / cap as f64)?.tanh()? * cap as f64)?;
        }
        if let Some(slopes) = c.alibi_slopes() {
            // The same term for every row of keys: its query's part cancels in the softmax.
            let bias: Vec<f32> = slopes
                .iter()
                .flat_map(|slope| (0..s).map(move |j| -slope * (s - 1 - j) as f32))
                .collect();
            let bias = Tensor::from_vec(bias, (c.num_heads, 1, s), query.device())?;
            scores = scores.broadcast_add(&bias)?;
        }
        let hidden = |i: usize, j: usize| j > i || i - j >= window;
        let mask: Vec<f32> = (s - t..s)
            .flat_map(|i| (0..s).map(move |j| if hidden(i, j) { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, s), query.device())?)?;
        let top = scores.max_keepdim(D::Minus1)?.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights
            .to_dtype(value.dtype())?
            .matmul(&repeat(value)?.contiguous()?)?; // [heads, t, d]
        out.transpose(0, 1)?
            .contiguous()?
            .reshape((t, c.num_heads * c.head_dim))
    }
}

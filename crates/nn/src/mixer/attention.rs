//! Causal softmax attention as a mixer, with the position schemes of paper 27 (NoPE): none, T5's relative bias, ALiBi,
//! rotary; sinusoids are added to the embedding instead. The state is the keys and values seen.

use super::{MixerSpec, MixerState, SequenceMixer, StateKind, linear, softmax};
use crate::params::{Init, Params};
use crate::position::alibi;
use candle_core::{DType, Result, Tensor, bail};
use longspan_kernels::causal::causal_attention;
use serde::{Deserialize, Serialize};

/// Where attention learns positions from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "scheme", rename_all = "kebab-case")]
pub enum Position {
    /// Nothing but the causal mask.
    None,
    /// A learned bias per head and distance bucket, one table for all layers.
    T5Bias {
        /// Height of the table.
        #[serde(default = "buckets")]
        buckets: usize,
        /// Distances from here on share the last bucket.
        #[serde(default = "max_distance")]
        max_distance: usize,
    },
    /// A penalty linear in distance, with the published slopes.
    Alibi,
    /// Rotation of the first coordinates of each head, in adjacent pairs.
    Rotary {
        /// Share of coordinates that turn.
        #[serde(default = "fraction")]
        fraction: f64,
        /// Base of the frequencies.
        #[serde(default = "base")]
        base: f64,
    },
}

fn buckets() -> usize {
    32
}
fn max_distance() -> usize {
    128
}
fn fraction() -> f64 {
    0.25
}
fn base() -> f64 {
    10_000.0
}

/// Hyper-parameters of [`AttentionMixer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionConfig {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head; none = d_model / heads.
    pub head_dim: Option<usize>,
    /// The position scheme.
    pub position: Position,
    /// Divide logits by the square root of the head's width; T5 and the paper's models do not (their start does).
    pub scaled: bool,
}

impl Default for AttentionConfig {
    fn default() -> Self {
        AttentionConfig {
            heads: 8,
            head_dim: None,
            position: Position::None,
            scaled: true,
        }
    }
}

/// The layer: `q_proj`, `k_proj`, `v_proj`, `o_proj`, no biases.
pub struct AttentionMixer {
    config: AttentionConfig,
    head_dim: usize,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    /// [buckets, heads]
    bias: Option<Tensor>,
}

/// T5's bucket of a distance back (unidirectional): exact up to half the table, then logarithmic.
pub fn t5_bucket(distance: usize, buckets: usize, max_distance: usize) -> usize {
    let exact = buckets / 2;
    if distance < exact {
        return distance;
    }
    let ratio = (distance as f32 / exact as f32).ln() / (max_distance as f32 / exact as f32).ln();
    (exact + (ratio * (buckets - exact) as f32) as usize).min(buckets - 1)
}

impl AttentionMixer {
    /// Parameters in `params`, the bias table in `shared`.
    pub fn new(
        config: &AttentionConfig,
        d_model: usize,
        params: &Params<'_>,
        shared: &Params<'_>,
    ) -> Result<Self> {
        let heads = config.heads;
        if heads == 0 || (config.head_dim.is_none() && !d_model.is_multiple_of(heads)) {
            bail!("attention: found {heads} heads, expected a divisor of d_model, {d_model}");
        }
        let head_dim = config.head_dim.unwrap_or(d_model / heads);
        let inner = heads * head_dim;
        // T5 starts queries smaller because its logits are not scaled.
        let query = if config.scaled {
            d_model
        } else {
            d_model * head_dim
        };
        let weight = |name: &str, rows: usize, cols: usize, fan: usize| {
            let std = (fan as f64).powf(-0.5);
            params
                .at(name)
                .get("weight", &[rows, cols], Init::Normal { std })
        };
        let bias = match config.position {
            Position::T5Bias { buckets, .. } => Some(shared.at("relative_attention_bias").get(
                "weight",
                &[buckets, heads],
                Init::Normal {
                    std: (d_model as f64).powf(-0.5),
                },
            )?),
            _ => None,
        };
        Ok(AttentionMixer {
            config: config.clone(),
            head_dim,
            query: weight("q_proj", inner, d_model, query)?,
            key: weight("k_proj", inner, d_model, d_model)?,
            value: weight("v_proj", inner, d_model, d_model)?,
            output: weight("o_proj", d_model, inner, inner)?,
            bias,
        })
    }

    /// What T5 and ALiBi add to the logits: [1, heads, queries, keys]; queries are the last of the keys' positions. Made
    /// where the logits are: on a GPU a table from the host would take longer than the attention.
    fn logit_bias(&self, queries: usize, keys: usize, like: &Tensor) -> Result<Tensor> {
        let (device, past) = (like.device(), keys - queries);
        let places =
            |count: usize| Tensor::arange(0u32, count as u32, device)?.to_dtype(DType::F32);
        let rows = (places(queries)? + past as f64)?.reshape((queries, 1))?;
        // Negative where a key is hidden.
        let distance = rows.broadcast_sub(&places(keys)?.reshape((1, keys))?)?;
        let behind = distance.relu()?;
        let seen = match (&self.config.position, &self.bias) {
            (
                &Position::T5Bias {
                    buckets,
                    max_distance,
                },
                Some(table),
            ) => {
                let bucket = |distance| t5_bucket(distance, buckets, max_distance) as u32;
                let bucket: Vec<u32> = (0..keys).map(bucket).collect();
                let by_distance = table.index_select(&Tensor::new(bucket, device)?, 0)?;
                by_distance
                    .index_select(&behind.to_dtype(DType::U32)?.flatten_all()?, 0)?
                    .t()?
                    .reshape((self.config.heads, queries, keys))?
            }
            _ => {
                let slopes = alibi::slopes(self.config.heads);
                let fall: Vec<f32> = slopes.iter().map(|&slope| -slope as f32).collect();
                let fall = Tensor::from_vec(fall, (slopes.len(), 1, 1), device)?;
                behind.unsqueeze(0)?.broadcast_mul(&fall)?
            }
        };
        let shape = seen.shape();
        let never = Tensor::new(f32::NEG_INFINITY, device)?.to_dtype(seen.dtype())?;
        let hidden = distance.lt(0f32)?.broadcast_as(shape)?;
        let bias = hidden.where_cond(&never.broadcast_as(shape)?, &seen)?;
        bias.unsqueeze(0)?.to_dtype(like.dtype())
    }

    /// query [batch, heads, t, head_dim], key and value [batch, heads, s, head_dim] (the queries are the last t of the s
    /// positions) to [batch, heads, t, head_dim].
    fn attend(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (batch, heads, queries, d) = query.dims4()?;
        let keys = key.dim(2)?;
        let scale = match self.config.scaled {
            true => (d as f64).powf(-0.5),
            false => 1.0,
        };
        match self.config.position {
            // Nothing but the mask is added, so that nothing quadratic need be kept.
            Position::None | Position::Rotary { .. } => {
                let flat = |x: &Tensor| x.contiguous()?.flatten(0, 1);
                causal_attention(&flat(query)?, &flat(key)?, &flat(value)?, scale, usize::MAX)?
                    .reshape((batch, heads, queries, d))
            }
            Position::T5Bias { .. } | Position::Alibi => {
                let mut scores = query
                    .contiguous()?
                    .matmul(&key.transpose(2, 3)?.contiguous()?)?;
                // Scores of a scale of 1 are spared a copy.
                if self.config.scaled {
                    scores = (scores * scale)?;
                }
                let scores = scores.broadcast_add(&self.logit_bias(queries, keys, query)?)?;
                softmax(&scores)?.matmul(&value.contiguous()?)
            }
        }
    }

    /// x [batch, heads, tokens, head_dim] of positions from `start`, turned.
    fn rotate(&self, x: &Tensor, start: usize) -> Result<Tensor> {
        let Position::Rotary { fraction, base } = self.config.position else {
            return Ok(x.clone());
        };
        let (batch, heads, tokens, head_dim) = x.dims4()?;
        let half = (fraction * head_dim as f64) as usize / 2;
        if half == 0 {
            return Ok(x.clone());
        }
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for t in start..start + tokens {
            for m in 0..half {
                let angle = t as f64 * base.powf(-(m as f64) / half as f64);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        let table = |v: Vec<f32>| {
            Tensor::from_vec(v, (1, 1, tokens, half), x.device())?.to_dtype(x.dtype())
        };
        let (cos, sin) = (table(cos)?, table(sin)?);
        // Adjacent pairs: [.., 2 half] -> [.., half, 2]
        let pairs = x
            .narrow(3, 0, 2 * half)?
            .contiguous()?
            .reshape((batch, heads, tokens, half, 2))?;
        let (a, b) = (
            pairs.narrow(4, 0, 1)?.squeeze(4)?,
            pairs.narrow(4, 1, 1)?.squeeze(4)?,
        );
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned =
            Tensor::stack(&[first, second], 4)?.reshape((batch, heads, tokens, 2 * half))?;
        if 2 * half == head_dim {
            return Ok(turned);
        }
        Tensor::cat(&[turned, x.narrow(3, 2 * half, head_dim - 2 * half)?], 3)
    }
}

impl SequenceMixer for AttentionMixer {
    fn spec(&self) -> MixerSpec {
        MixerSpec {
            name: "attention",
            causal: true,
            state: StateKind::Growing,
            state_gradient: None,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        state: Option<&MixerState>,
    ) -> Result<(Tensor, Option<MixerState>)> {
        let (batch, length, _) = x.dims3()?;
        if length == 0 {
            return Ok((x.clone(), state.cloned()));
        }
        let (heads, d) = (self.config.heads, self.head_dim);
        let start = state.map_or(0, |state| state.position);
        // [batch, length, heads head_dim] -> [batch, heads, length, head_dim]
        let split = |weight: &Tensor| {
            linear(x, weight, None)?
                .reshape((batch, length, heads, d))?
                .transpose(1, 2)?
                .contiguous()
        };
        let query = self.rotate(&split(&self.query)?, start)?;
        let (mut key, mut value) = (self.rotate(&split(&self.key)?, start)?, split(&self.value)?);
        if let Some(state) = state
            && start > 0
        {
            key = Tensor::cat(&[state.get("key")?, &key], 2)?;
            value = Tensor::cat(&[state.get("value")?, &value], 2)?;
        }
        let y = self
            .attend(&query, &key, &value)?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((batch, length, heads * d))?;
        let next = state.map(|_| MixerState {
            tensors: [("key".to_string(), key), ("value".to_string(), value)].into(),
            position: start + length,
            plan: None,
        });
        Ok((linear(&y, &self.output, None)?, next))
    }

    fn init_state(&self, batch: usize) -> Result<MixerState> {
        let empty = Tensor::zeros(
            (batch, self.config.heads, 0, self.head_dim),
            DType::F32,
            self.query.device(),
        )?;
        Ok(MixerState {
            tensors: [
                ("key".to_string(), empty.clone()),
                ("value".to_string(), empty),
            ]
            .into(),
            position: 0,
            plan: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::ParamStore;
    use candle_core::{D, Device, Var};
    use longspan_kernels::composed::composing;

    const WIDTH: usize = 12;

    fn values(length: usize, salt: usize) -> Tensor {
        let values: Vec<f64> = (0..2 * length * WIDTH)
            .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0)
            .collect();
        Tensor::from_vec(values, (2, length, WIDTH), &Device::Cpu).unwrap()
    }

    /// The layer with all its scores, of candle's operations.
    fn plain(mixer: &AttentionMixer, x: &Tensor) -> Result<Tensor> {
        let (batch, length, _) = x.dims3()?;
        let (heads, d) = (mixer.config.heads, mixer.head_dim);
        let split = |weight: &Tensor| {
            x.broadcast_matmul(&weight.t()?)?
                .reshape((batch, length, heads, d))?
                .transpose(1, 2)?
                .contiguous()
        };
        let query = mixer.rotate(&split(&mixer.query)?, 0)?;
        let key = mixer.rotate(&split(&mixer.key)?, 0)?;
        let mut scores = query.matmul(&key.transpose(2, 3)?.contiguous()?)?;
        if mixer.config.scaled {
            scores = (scores / (d as f64).sqrt())?;
        }
        let hidden: Vec<f64> = (0..length * length)
            .map(|at| match at % length > at / length {
                true => f64::NEG_INFINITY,
                false => 0.0,
            })
            .collect();
        let hidden = Tensor::from_vec(hidden, (length, length), x.device())?;
        let weights = scores.broadcast_add(&hidden)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights
            .matmul(&split(&mixer.value)?)?
            .transpose(1, 2)?
            .reshape((batch, length, heads * d))?
            .broadcast_matmul(&mixer.output.t()?)
    }

    fn halves(mixer: &AttentionMixer, x: &Tensor, cut: usize) -> Result<Tensor> {
        let length = x.dim(1)?;
        let start = mixer.init_state(2)?;
        let (first, state) = mixer.forward(&x.narrow(1, 0, cut)?, Some(&start))?;
        let rest = x.narrow(1, cut, length - cut)?;
        let (second, _) = mixer.forward(&rest, state.as_ref())?;
        Tensor::cat(&[first, second], 1)
    }

    #[test]
    fn values_and_gradients_are_those_of_all_scores() {
        let rotary = Position::Rotary {
            fraction: 0.7,
            base: 100.0,
        };
        for (position, scaled) in [
            (Position::None, true),
            (Position::None, false),
            (rotary.clone(), true),
            (rotary, false),
        ] {
            let config = AttentionConfig {
                heads: 2,
                head_dim: Some(7),
                position,
                scaled,
            };
            // Longer than a block of queries.
            let length = 150;
            let store = ParamStore::new(7, DType::F64, &Device::Cpu);
            let mixer = AttentionMixer::new(&config, WIDTH, &store.root(), &store.root()).unwrap();
            let x = Var::from_tensor(&values(length, 1)).unwrap();
            let all = |y: Result<Tensor>| {
                let y = y.unwrap();
                let loss = (&y * values(length, 2)).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let mut found = vec![("y".to_string(), y.detach())];
                let gradient = |var: &Var| gradients.get(var.as_tensor()).unwrap().clone();
                found.push(("x".to_string(), gradient(&x)));
                let params = store.list().into_iter();
                found.extend(params.map(|(name, param)| (name, gradient(&param.var))));
                found
            };
            let expected = all(plain(&mixer, &x));
            assert_eq!(expected.len(), 6);
            let fused = || all(mixer.forward(&x, None).map(|(y, _)| y));
            let forms = [fused(), composing(fused), all(halves(&mixer, &x, 70))];
            for (form, found) in forms.iter().enumerate() {
                for ((name, a), (_, b)) in expected.iter().zip(found) {
                    let largest = |t: &Tensor| {
                        let t = t.abs().unwrap().flatten_all().unwrap();
                        t.max_all().unwrap().to_scalar::<f64>().unwrap()
                    };
                    let error = largest(&(a - b).unwrap()) / largest(a);
                    assert!(error < 1e-11, "{config:?}, form {form}: {name}: {error}");
                }
            }
        }
    }
}

//! A causal decoder without positions whose attention is tempered by the length of the example (paper 51, task hinting), with
//! one head for all tasks or one per task; for experiments on length generalisation.
//!
//! With bounded logits a softmax over n keys flattens as n grows, so sharpness must grow like ln n: logits are multiplied by
//! beta(n), n being the number of list elements, not the position.

use super::stack::rms_norm;
use crate::mixer::{linear, softmax};
use crate::params::{Init, ParamGroup, Params};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// beta(n), the factor of attention logits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Temper {
    /// 1
    #[default]
    None,
    /// One learned scalar per length up to `longest`, at first 1. Longer lists than were trained use the least-squares line
    /// through the trained entries in ln n.
    Table {
        /// Longest list that is trained.
        longest: usize,
    },
    /// a + b ln n, learned; at first 1.
    Affine,
    /// ln max(n, 2) / ln max(n_train, 2), fixed; `n_train` = none: without the divisor.
    LogN {
        /// Longest list that is trained.
        n_train: Option<usize>,
    },
}

/// Causal softmax(beta q·k / √d) v: q [batch, heads, queries, d], k and v [batch, heads, keys, d], beta [batch] or none;
/// queries are the last of the keys' positions.
pub fn tempered_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    beta: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, _, queries, d) = q.dims4()?;
    let keys = k.dim(2)?;
    if keys < queries {
        bail!(
            "tempered attention: found {keys} keys for {queries} queries, expected as many or more"
        );
    }
    let mut scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * (d as f64).powf(-0.5))?;
    if let Some(beta) = beta {
        scores = scores.broadcast_mul(&beta.reshape((batch, 1, 1, 1))?)?;
    }
    if queries > 1 {
        let past = keys - queries;
        let mask: Vec<f32> = (0..queries)
            .flat_map(|i| {
                (0..keys).map(move |j| if j > past + i { f32::NEG_INFINITY } else { 0.0 })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, queries, keys), q.device())?;
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    softmax(&scores)?.matmul(&v.contiguous()?)
}

/// Hyper-parameters of [`TemperedDecoder`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemperedConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Blocks; two suffice in the paper's construction.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// beta(n).
    pub temper: Temper,
    /// Temper all layers instead of the first.
    pub temper_all: bool,
    /// One output head for all tasks (false), or one per task (true).
    pub head_per_task: bool,
}

impl Default for TemperedConfig {
    fn default() -> Self {
        TemperedConfig {
            d_model: 256,
            layers: 2,
            heads: 8,
            temper: Temper::None,
            temper_all: false,
            head_per_task: false,
        }
    }
}

struct Block {
    norm: Tensor,
    /// q, k, v one below the other: [3 d, d].
    qkv: Tensor,
    output: Tensor,
    mlp_norm: Tensor,
    up: Tensor,
    down: Tensor,
}

/// The decoder.
pub struct TemperedDecoder {
    config: TemperedConfig,
    embeddings: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    heads: Vec<Tensor>,
    /// Table [longest + 1], or a and b of the affine form.
    beta: Option<Tensor>,
}

/// Keys and values of every layer, so far.
type Cache = Vec<(Tensor, Tensor)>;

impl TemperedDecoder {
    /// `tasks`: how many heads there are if every task has its own.
    pub fn new(
        config: &TemperedConfig,
        vocab_size: usize,
        tasks: usize,
        params: &Params<'_>,
    ) -> Result<Self> {
        let (c, d) = (config, config.d_model);
        if d == 0 || c.layers == 0 || c.heads == 0 || !d.is_multiple_of(c.heads) {
            bail!(
                "tempered decoder: found d_model {d}, {} layers, {} heads, expected 1 or more of each, and a d_model that \
                 heads divide",
                c.layers,
                c.heads
            );
        }
        let normal = |at: Params<'_>, shape: &[usize], fan: usize| {
            at.get(
                "weight",
                shape,
                Init::Normal {
                    std: (fan as f64).powf(-0.5),
                },
            )
        };
        let scale =
            |at: Params<'_>| at.get_in("weight", &[d], Init::Constant(1.0), ParamGroup::NO_DECAY);
        let blocks = (0..c.layers)
            .map(|index| {
                let at = params.at("layers").at(index);
                Ok(Block {
                    norm: scale(at.at("norm"))?,
                    qkv: normal(at.at("qkv"), &[3 * d, d], d)?,
                    output: normal(at.at("output"), &[d, d], 2 * c.layers * d)?,
                    mlp_norm: scale(at.at("mlp_norm"))?,
                    up: normal(at.at("up"), &[4 * d, d], d)?,
                    down: normal(at.at("down"), &[d, 4 * d], 2 * c.layers * 4 * d)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let beta = match c.temper {
            Temper::None | Temper::LogN { .. } => None,
            Temper::Table { longest } => Some(params.get_in(
                "beta",
                &[longest + 1],
                Init::Constant(1.0),
                ParamGroup::NO_DECAY,
            )?),
            Temper::Affine => Some(params.get_in(
                "beta",
                &[2],
                Init::Values(vec![1.0, 0.0]),
                ParamGroup::NO_DECAY,
            )?),
        };
        let heads = if c.head_per_task { tasks.max(1) } else { 1 };
        Ok(TemperedDecoder {
            embeddings: normal(params.at("embeddings"), &[vocab_size, d], 1)?,
            blocks,
            norm: scale(params.at("norm"))?,
            heads: (0..heads)
                .map(|task| normal(params.at("heads").at(task), &[vocab_size, d], d))
                .collect::<Result<_>>()?,
            beta,
            config: c.clone(),
        })
    }

    /// Number of tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.embeddings.dims()[0]
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.embeddings.device()
    }

    /// beta of lists of these lengths: [batch], tracked where it is learned; none = 1.
    pub fn beta(&self, lengths: &[usize]) -> Result<Option<Tensor>> {
        let logs: Vec<f32> = lengths.iter().map(|&n| (n.max(1) as f32).ln()).collect();
        let row = |values: Vec<f32>| {
            Tensor::from_vec(values, lengths.len(), self.device())?
                .to_dtype(self.embeddings.dtype())
        };
        Ok(Some(match (&self.config.temper, &self.beta) {
            (Temper::LogN { n_train }, _) => {
                let unit = n_train.map_or(1.0, |n| (n.max(2) as f32).ln());
                row(lengths
                    .iter()
                    .map(|&n| (n.max(2) as f32).ln() / unit)
                    .collect())?
            }
            (Temper::Affine, Some(beta)) => {
                let slope = beta.narrow(0, 1, 1)?;
                row(logs)?
                    .broadcast_mul(&slope)?
                    .broadcast_add(&beta.narrow(0, 0, 1)?)?
            }
            (Temper::Table { longest }, Some(table)) => {
                if lengths.iter().all(|n| n <= longest) {
                    let index: Vec<u32> = lengths.iter().map(|&n| n as u32).collect();
                    table.index_select(&Tensor::new(index, self.device())?, 0)?
                } else {
                    let values = table.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?;
                    let line = log_line(&values);
                    row(lengths
                        .iter()
                        .map(|&n| match values.get(n) {
                            Some(&value) => value as f32,
                            None => (line.0 + line.1 * (n as f64).ln()) as f32,
                        })
                        .collect())?
                }
            }
            _ => return Ok(None),
        }))
    }

    /// x [batch, length, d_model] through all blocks, after what the cache holds, which moves on.
    fn blocks(
        &self,
        mut x: Tensor,
        beta: Option<&Tensor>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (batch, length, d) = x.dims3()?;
        let (heads, width) = (self.config.heads, d / self.config.heads);
        let mut next = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let qkv = linear(&rms_norm(&x, &block.norm, 1e-5)?, &block.qkv, None)?;
            let part = |k: usize| {
                qkv.narrow(2, k * d, d)?
                    .reshape((batch, length, heads, width))?
                    .transpose(1, 2)?
                    .contiguous() // [batch, heads, length, width]
            };
            let (q, mut k, mut v) = (part(0)?, part(1)?, part(2)?);
            if let Some((past_k, past_v)) = cache.as_ref().and_then(|c| c.get(index)) {
                k = Tensor::cat(&[past_k, &k], 2)?;
                v = Tensor::cat(&[past_v, &v], 2)?;
            }
            let beta = beta.filter(|_| index == 0 || self.config.temper_all);
            let y = tempered_attention(&q, &k, &v, beta)?
                .transpose(1, 2)?
                .contiguous()?
                .reshape((batch, length, d))?;
            if cache.is_some() {
                next.push((k.detach(), v.detach()));
            }
            x = (x + linear(&y, &block.output, None)?)?;
            let hidden = linear(&rms_norm(&x, &block.mlp_norm, 1e-5)?, &block.up, None)?;
            x = (x + linear(&hidden.relu()?, &block.down, None)?)?;
        }
        if let Some(cache) = cache {
            *cache = next;
        }
        rms_norm(&x, &self.norm, 1e-5)
    }

    fn head(&self, task: usize) -> &Tensor {
        self.heads.get(task).unwrap_or(&self.heads[0])
    }

    /// ids [batch][length] (padded at their ends with anything: nothing before it sees it), list lengths, and the rows (b
    /// length + t) whose logits are asked for: [rows, vocab], f32.
    pub fn logits(
        &self,
        ids: &[Vec<u32>],
        lengths: &[usize],
        rows: &[u32],
        task: usize,
    ) -> Result<Tensor> {
        let length = ids.first().map_or(0, Vec::len);
        if ids.iter().any(|row| row.len() != length) || ids.len() != lengths.len() {
            bail!(
                "tempered decoder: found sequences of different lengths, expected {length} tokens in each"
            );
        }
        let x = self.embed(ids, length)?;
        let x = self.blocks(x, self.beta(lengths)?.as_ref(), None)?;
        let x = x
            .reshape((ids.len() * length, self.config.d_model))?
            .index_select(&Tensor::new(rows, self.device())?, 0)?;
        linear(&x, self.head(task), None)?.to_dtype(DType::F32)
    }

    fn embed(&self, ids: &[Vec<u32>], length: usize) -> Result<Tensor> {
        let flat = ids.concat();
        if let Some(id) = flat.iter().find(|&&id| id as usize >= self.vocab_size()) {
            bail!(
                "token id {id} is outside the vocabulary of {} tokens",
                self.vocab_size()
            );
        }
        self.embeddings
            .index_select(&Tensor::new(flat, self.device())?, 0)?
            .reshape((ids.len(), length, self.config.d_model))
    }

    /// Greedy continuations of equally long prompts, `tokens` ids each; nothing but its own tokens is shown to the model.
    pub fn greedy(
        &self,
        prompts: &[Vec<u32>],
        length: usize,
        tokens: usize,
        task: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let mut out = vec![Vec::with_capacity(tokens); prompts.len()];
        let beta = self
            .beta(&vec![length; prompts.len()])?
            .map(|beta| beta.detach());
        let mut cache = Vec::new();
        let mut ids = prompts.to_vec();
        for _ in 0..tokens {
            let width = ids.first().map_or(0, Vec::len);
            if width == 0 || ids.iter().any(|row| row.len() != width) {
                bail!(
                    "tempered decoder: found prompts of different lengths or none, expected equal ones"
                );
            }
            let x = self.embed(&ids, width)?.detach();
            let x = self.blocks(x, beta.as_ref(), Some(&mut cache))?.detach();
            let last = x.narrow(1, width - 1, 1)?.squeeze(1)?;
            let best = linear(&last, &self.head(task).detach(), None)?.argmax(D::Minus1)?;
            let best = best.to_vec1::<u32>()?;
            ids = best.iter().map(|&id| vec![id]).collect();
            out.iter_mut().zip(best).for_each(|(out, id)| out.push(id));
        }
        Ok(out)
    }
}

/// a and b of the least-squares line beta = a + b ln n through entries 1.. of a table.
pub fn log_line(table: &[f64]) -> (f64, f64) {
    let points: Vec<(f64, f64)> = table
        .iter()
        .enumerate()
        .skip(1)
        .map(|(n, &beta)| ((n as f64).ln(), beta))
        .collect();
    let count = points.len().max(1) as f64;
    let (x, y) = points
        .iter()
        .fold((0.0, 0.0), |s, p| (s.0 + p.0 / count, s.1 + p.1 / count));
    let (cov, var) = points.iter().fold((0.0, 0.0), |s, p| {
        (s.0 + (p.0 - x) * (p.1 - y), s.1 + (p.0 - x) * (p.0 - x))
    });
    let slope = if var > 0.0 { cov / var } else { 0.0 };
    (y - slope * x, slope)
}

//! BERT encoders in one file, and sentence embedders made of them (MiniLM): text in, vectors out, for
//! search and for memories. Devlin et al., arXiv 1810.04805; mean pooling after Reimers and Gurevych,
//! arXiv 1908.10084. Reads a Hugging Face folder as sentence-transformers writes it.
//!
//! Tokens of all texts lie flat, [tokens, hidden]: a batch has no padding.

use super::Precision;
use super::parameters::{Loader, Parameters, Projection};
use crate::attention::{Attend, BidirectionalAttention};
use crate::weights::safetensors::HfWeights;
use crate::weights::{Fingerprint, WeightSource, WeightsError};
use candle_core::{Device, Result, Tensor, bail};
use longspan_data::tokenize::{Special, Tokenizer, TokenizerError};
use longspan_kernels::attention::KvDtype;
use longspan_kernels::cpu::Level;
use longspan_kernels::ops::{self, Embedding, LayerNorm, Linear, with_rows};
use longspan_kernels::pool::Pool;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The part of `config.json` that decides what is computed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct BertConfig {
    /// Always `bert` here.
    pub model_type: String,
    /// Rows of the word embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// `gelu`, the exact form.
    pub hidden_act: String,
    /// Most tokens of a text.
    pub max_position_embeddings: usize,
    /// Rows of the segment embedding; segment 0 is used.
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    /// Added to the variance in every norm.
    #[serde(default = "epsilon")]
    pub layer_norm_eps: f64,
    /// `absolute`.
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
}

fn two() -> usize {
    2
}

fn epsilon() -> f64 {
    1e-12
}

fn absolute() -> String {
    "absolute".into()
}

impl BertConfig {
    fn check(&self) -> std::result::Result<(), String> {
        let wrong = |field: &str, found: &str, expected: &str| {
            Err(format!("{field} is {found}, expected {expected}"))
        };
        if self.model_type != "bert" {
            return wrong("model_type", &self.model_type, "bert");
        }
        if self.hidden_act != "gelu" {
            return wrong("hidden_act", &self.hidden_act, "gelu");
        }
        if self.position_embedding_type != "absolute" {
            let found = &self.position_embedding_type;
            return wrong("position_embedding_type", found, "absolute");
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ];
        for (field, size) in sizes {
            if size == 0 || size > 1 << 24 {
                return wrong(field, &size.to_string(), "1 to 2^24");
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let found = self.hidden_size.to_string();
            let expected = format!("a multiple of {} heads", self.num_attention_heads);
            return wrong("hidden_size", &found, &expected);
        }
        Ok(())
    }
}

/// One block: attention and MLP, each normed after its residual.
struct Layer {
    /// Query, key and value side by side: [3 hidden, hidden].
    qkv: Linear,
    output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    mlp_norm: LayerNorm,
}

impl Layer {
    fn forward(&self, index: usize, x: &Tensor, attend: &mut dyn Attend) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?; // [tokens, 3 hidden]
        let hidden = x.dim(1)?;
        let (query, key, value) = (
            qkv.narrow(1, 0, hidden)?,
            qkv.narrow(1, hidden, hidden)?,
            qkv.narrow(1, 2 * hidden, hidden)?,
        );
        let attended = attend.attend(index, &query, &key, &value)?; // [tokens, hidden]
        let x = ops::linear_residual(&attended, &self.output, None, x)?;
        let x = self.attention_norm.forward(&x)?;
        let inner = ops::gelu(&self.up.forward(&x)?)?; // [tokens, intermediate]
        let x = ops::linear_residual(&inner, &self.down, None, &x)?;
        self.mlp_norm.forward(&x)
    }
}

/// A BERT encoder without a head.
pub struct Bert {
    config: BertConfig,
    words: Embedding,
    /// [max_position_embeddings, hidden]
    positions: Tensor,
    /// The row of segment 0, [1, hidden].
    segment: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
    exact: bool,
}

impl Bert {
    /// Reads a checkpoint (names with or without `bert.` before them). Embeddings and norms stay f32
    /// under [`Precision::Packed`]; its matrices are rounded to bf16.
    ///
    /// # Errors
    /// The first tensor or field of the configuration that does not fit.
    pub fn load(
        config: &BertConfig,
        weights: &dyn WeightSource,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        if precision == Precision::Packed && !device.is_cpu() {
            bail!("packed weights are for the CPU; on {device:?} use a dense precision");
        }
        let prefix = match weights.contains("bert.embeddings.word_embeddings.weight") {
            true => "bert.",
            false => "",
        };
        let loader = Loader {
            weights,
            precision,
            device,
        };
        let tables = Loader {
            precision: match precision {
                Precision::Packed => Precision::Dense(candle_core::DType::F32),
                dense => dense,
            },
            ..loader
        };
        Self::build(
            config,
            prefix,
            &loader,
            &tables,
            precision != Precision::Packed,
        )
    }

    /// Builds the model over given tensors (Hugging Face names without `bert.`), for training.
    ///
    /// # Errors
    /// As [`Bert::load`].
    pub fn from_tensors(config: &BertConfig, tensors: &HashMap<String, Tensor>) -> Result<Self> {
        Self::build(config, "", tensors, tensors, true)
    }

    fn build(
        config: &BertConfig,
        prefix: &str,
        source: &dyn Parameters,
        tables: &dyn Parameters,
        exact: bool,
    ) -> Result<Self> {
        if let Err(message) = config.check() {
            bail!("the BERT configuration: {message}");
        }
        let c = config;
        let hidden = c.hidden_size;
        let table = |name: &str, rows: usize| {
            let weight = format!("{prefix}embeddings.{name}.weight");
            let bias = None;
            match tables.linear(hidden, &[Projection { weight, bias, rows }])? {
                Linear::Dense(parts) => Ok(parts[0].weight.clone()),
                Linear::Packed { .. } => bail!("an embedding table came packed"),
            }
        };
        let norm = |name: String| {
            LayerNorm::new(
                source.vector(&format!("{name}.weight"), hidden)?,
                source.vector(&format!("{name}.bias"), hidden)?,
                c.layer_norm_eps,
            )
        };
        let layers = (0..c.num_hidden_layers)
            .map(|index| {
                let at = |name: &str| format!("{prefix}encoder.layer.{index}.{name}");
                let projection = |name: &str, rows: usize| Projection {
                    weight: at(&format!("{name}.weight")),
                    bias: Some(at(&format!("{name}.bias"))),
                    rows,
                };
                Ok(Layer {
                    qkv: source.linear(
                        hidden,
                        &[
                            projection("attention.self.query", hidden),
                            projection("attention.self.key", hidden),
                            projection("attention.self.value", hidden),
                        ],
                    )?,
                    output: source
                        .linear(hidden, &[projection("attention.output.dense", hidden)])?,
                    attention_norm: norm(at("attention.output.LayerNorm"))?,
                    up: source.linear(
                        hidden,
                        &[projection("intermediate.dense", c.intermediate_size)],
                    )?,
                    down: source
                        .linear(c.intermediate_size, &[projection("output.dense", hidden)])?,
                    mlp_norm: norm(at("output.LayerNorm"))?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Bert {
            words: Embedding::Dense(table("word_embeddings", c.vocab_size)?),
            positions: table("position_embeddings", c.max_position_embeddings)?,
            segment: table("token_type_embeddings", c.type_vocab_size)?.narrow(0, 0, 1)?,
            norm: norm(format!("{prefix}embeddings.LayerNorm"))?,
            layers,
            config: config.clone(),
            exact,
        })
    }

    /// The configuration the model was built with.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The last layer's states of several texts whose ids lie flat, `lengths` ids each:
    /// [tokens, hidden].
    ///
    /// # Errors
    /// An id outside the vocabulary, a text longer than the position table, lengths that do not sum
    /// to the number of ids.
    pub fn hidden(&self, ids: &[u32], lengths: &[usize]) -> Result<Tensor> {
        let c = &self.config;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= c.vocab_size) {
            bail!(
                "token id {id} is outside the vocabulary of {} tokens",
                c.vocab_size
            );
        }
        if let Some(length) = (lengths.iter()).find(|&&n| n == 0 || n > c.max_position_embeddings) {
            bail!(
                "a text of {length} tokens, expected 1 to {}",
                c.max_position_embeddings
            );
        }
        if lengths.iter().sum::<usize>() != ids.len() {
            bail!(
                "lengths sum to {}, expected {} ids",
                lengths.iter().sum::<usize>(),
                ids.len()
            );
        }
        let places: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        let places = Tensor::new(places, self.positions.device())?;
        let x = self.words.forward(ids)?; // [tokens, hidden]
        let x = (x + self.positions.index_select(&places, 0)?)?.broadcast_add(&self.segment)?;
        let mut x = self.norm.forward(&x)?;
        let kv = match (self.exact, Level::current()) {
            (true, _) => KvDtype::F32,
            (false, Level::Amx) => KvDtype::Bf16,
            (false, _) => KvDtype::F16,
        };
        let head_dim = c.hidden_size / c.num_attention_heads;
        let mut attend =
            BidirectionalAttention::packed(c.num_attention_heads, head_dim, kv, lengths);
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, &x, &mut attend)?;
        }
        Ok(x)
    }
}

/// How token states become one vector (`1_Pooling/config.json`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The first token's state.
    Cls,
}

/// Why a folder is no sentence embedder, or a text has no vector.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncoderError {
    /// A file that cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that says something else than expected.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, the value found and the value expected.
        message: String,
    },
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The computation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Tokens computed together: enough to fill every core, few enough to stay near the caches.
const BATCH_TOKENS: usize = 2048;

/// A sentence embedder: tokenizer, encoder, pooling, normalisation.
pub struct TextEncoder {
    bert: Bert,
    tokenizer: Tokenizer,
    pooling: Pooling,
    max_tokens: usize,
    cls: u32,
    sep: u32,
    fingerprint: Fingerprint,
}

impl TextEncoder {
    /// Opens a folder with `config.json`, `model.safetensors` and `tokenizer.json`;
    /// `sentence_bert_config.json` (longest text) and `1_Pooling/config.json` where present.
    ///
    /// # Errors
    /// [`EncoderError`], for the first part that is missing, malformed or not supported.
    pub fn open(
        folder: &Path,
        precision: Precision,
        device: &Device,
    ) -> std::result::Result<Self, EncoderError> {
        let file = |name: &str| folder.join(name);
        let config: BertConfig = read_json(&file("config.json"))?;
        let message = config.check();
        message.map_err(|message| EncoderError::Config {
            path: file("config.json"),
            message,
        })?;
        let max_tokens = match file("sentence_bert_config.json") {
            path if path.is_file() => {
                let sentence: SentenceConfig = read_json(&path)?;
                sentence.max_seq_length
            }
            _ => config.max_position_embeddings,
        };
        if !(3..=config.max_position_embeddings).contains(&max_tokens) {
            return Err(EncoderError::Config {
                path: file("sentence_bert_config.json"),
                message: format!(
                    "max_seq_length is {max_tokens}, expected 3 to {}",
                    config.max_position_embeddings
                ),
            });
        }
        let pooling = match file("1_Pooling/config.json") {
            path if path.is_file() => {
                let modes: PoolingConfig = read_json(&path)?;
                modes
                    .pooling()
                    .map_err(|message| EncoderError::Config { path, message })?
            }
            _ => Pooling::Mean,
        };
        let tokenizer = Tokenizer::from_dir(folder)?;
        let special = |name: &str| {
            tokenizer.id(name).ok_or_else(|| EncoderError::Config {
                path: file("tokenizer.json"),
                message: format!("there is no token {name}"),
            })
        };
        let (cls, sep) = (special("[CLS]")?, special("[SEP]")?);
        let weights = HfWeights::open_as_stored(folder)?;
        Ok(TextEncoder {
            bert: Bert::load(&config, &weights, precision, device)?,
            fingerprint: weights.fingerprint(),
            tokenizer,
            pooling,
            max_tokens,
            cls,
            sep,
        })
    }

    /// Numbers in a vector.
    pub fn dim(&self) -> usize {
        self.bert.config.hidden_size
    }

    /// Most tokens of a text that are read, start and end token included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Identifies the weights.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The encoder.
    pub fn bert(&self) -> &Bert {
        &self.bert
    }

    /// The ids of a text between start and end token, cut at [`TextEncoder::max_tokens`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn tokens(&self, text: &str) -> std::result::Result<Vec<u32>, TokenizerError> {
        let mut ids = vec![self.cls];
        ids.extend(self.tokenizer.encode(text, Special::None)?);
        ids.truncate(self.max_tokens - 1);
        ids.push(self.sep);
        Ok(ids)
    }

    /// One vector of length 1 for each text, in order: `[texts.len(), dim]`, row-major. All cores
    /// work; what a text's vector is does not depend on the others.
    ///
    /// # Errors
    /// As [`EncoderError`].
    pub fn embed(&self, texts: &[&str]) -> std::result::Result<Vec<f32>, EncoderError> {
        let tokens: Vec<Mutex<_>> = texts.iter().map(|_| Mutex::new(Ok(Vec::new()))).collect();
        Pool::global().for_each(texts.len(), |index| {
            let ids = self.tokens(texts[index]);
            *tokens[index]
                .lock()
                .unwrap_or_else(|poison| poison.into_inner()) = ids;
        });
        let mut rows = Vec::with_capacity(texts.len());
        for slot in tokens {
            rows.push(
                slot.into_inner()
                    .unwrap_or_else(|poison| poison.into_inner())?,
            );
        }
        let dim = self.dim();
        let mut out = vec![0f32; texts.len() * dim];
        let mut start = 0;
        while start < rows.len() {
            let mut end = start;
            let mut total = 0;
            while end < rows.len() && (end == start || total + rows[end].len() <= BATCH_TOKENS) {
                total += rows[end].len();
                end += 1;
            }
            let lengths: Vec<usize> = rows[start..end].iter().map(Vec::len).collect();
            let ids: Vec<u32> = rows[start..end].concat();
            let hidden = self
                .bert
                .hidden(&ids, &lengths)?
                .to_dtype(candle_core::DType::F32)?
                .to_device(&Device::Cpu)?; // [tokens, hidden]
            with_rows(&hidden, |mut states| {
                let vectors = out[start * dim..end * dim].chunks_exact_mut(dim);
                for (vector, &length) in vectors.zip(&lengths) {
                    let (own, rest) = states.split_at(length * dim);
                    pool(own, self.pooling, vector);
                    states = rest;
                }
            })?;
            start = end;
        }
        Ok(out)
    }
}

/// states [tokens, dim] to one vector [dim] of length 1.
fn pool(states: &[f32], pooling: Pooling, vector: &mut [f32]) {
    let dim = vector.len();
    let used = match pooling {
        Pooling::Mean => states,
        Pooling::Cls => &states[..dim],
    };
    for row in used.chunks_exact(dim) {
        for (sum, x) in vector.iter_mut().zip(row) {
            *sum += x;
        }
    }
    // The mean's divisor goes with the length.
    let norm = vector
        .iter()
        .map(|&x| f64::from(x).powi(2))
        .sum::<f64>()
        .sqrt();
    let scale = (1.0 / norm.max(1e-12)) as f32;
    vector.iter_mut().for_each(|x| *x *= scale);
}

#[derive(Deserialize)]
struct SentenceConfig {
    max_seq_length: usize,
}

#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
}

impl PoolingConfig {
    fn pooling(&self) -> std::result::Result<Pooling, String> {
        let modes = [
            self.pooling_mode_mean_tokens,
            self.pooling_mode_cls_token,
            self.pooling_mode_max_tokens,
            self.pooling_mode_mean_sqrt_len_tokens,
        ];
        match modes {
            [true, false, false, false] => Ok(Pooling::Mean),
            [false, true, false, false] => Ok(Pooling::Cls),
            _ => Err(
                "the pooling modes (mean, cls, max, mean_sqrt_len) are ".to_string()
                    + &format!("{modes:?}, expected mean alone or cls alone"),
            ),
        }
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> std::result::Result<T, EncoderError> {
    let text = std::fs::read(path).map_err(|source| EncoderError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|error| EncoderError::Config {
        path: path.to_path_buf(),
        message: error.to_string(),
    })
}

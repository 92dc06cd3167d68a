//! What a decoder is made of, read from a GGUF file's metadata or a Hugging Face `config.json`.
//!
//! Both readers end in one [`ModelConfig`], in which nothing is left to defaults or to the name of
//! the architecture: a model is built from its fields alone.

mod gguf;
mod hf;
mod stack;

pub use stack::{STACK, StackFile};

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::weights::{WeightSource, WeightsError, missing};

/// A supported family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, SmolLM2 and other models of that shape.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: a norm on every query and key head.
    Qwen3,
    /// Gemma 3, text part: local and global layers, norms before and after each block.
    Gemma3,
    /// SmolLM3: every fourth layer has no position encoding.
    SmolLM3,
    /// A stack of sequence mixers (Mamba-2, S4, recurrent nets): a state instead of keys.
    Stack,
}

/// The activation of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// A decoder: embedding, `num_layers` blocks of attention and gated MLP, norm, output matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub architecture: Architecture,
    /// Rows of the embedding; at least the number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even. `num_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The trained window, in tokens.
    pub context_length: usize,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether query, key and value projections add a bias.
    pub qkv_bias: bool,
    /// Whether the projection after attention adds a bias.
    pub output_bias: bool,
    /// Whether the three matrices of the MLP add a bias.
    pub mlp_bias: bool,
    /// Whether each query and key head is normed before rotation.
    pub qk_norm: bool,
    /// Whether attention and MLP are normed after as well as before.
    pub sandwich_norms: bool,
    /// Factor on embeddings.
    pub embedding_scale: Option<f32>,
    pub activation: Activation,
    /// Factor on the scores `query . key`.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub final_softcap: Option<f32>,
    /// ALiBi in every layer, with slopes down to `2^-bias`; see [`crate::position::alibi::slopes_to`].
    #[serde(default)]
    pub alibi_max_bias: Option<f64>,
    /// One for each layer.
    pub layers: Vec<LayerConfig>,
    /// The distinct position encodings, in the order layers first use them.
    pub rope: Vec<RopeSpec>,
    /// The name the model gives itself.
    pub name: Option<String>,
}

/// What may differ from layer to layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// How many positions a query sees, its own included; none means all.
    pub sliding_window: Option<usize>,
    /// Index into [`ModelConfig::rope`]; none means no position encoding.
    pub rope: Option<usize>,
}

/// A rotary position encoding as Hugging Face describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeSpec {
    /// The `rope_parameters` dictionary: `rope_type` and `rope_theta` always, then whatever the
    /// type needs (`factor`, `original_max_position_embeddings`, `partial_rotary_factor`, ...).
    pub parameters: serde_json::Value,
    /// `rope_freqs.weight` of a GGUF file, `[rotated / 2]`: frequencies are divided by it.
    pub freq_factors: Option<Vec<f32>>,
    /// The window the model declares, in tokens.
    pub max_position_embeddings: usize,
}

impl RopeSpec {
    /// How many elements at the start of a head are rotated.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        let share = self.parameters.get("partial_rotary_factor");
        let share = share.and_then(serde_json::Value::as_f64).unwrap_or(1.0);
        (share * head_dim as f64).round() as usize
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{}: not valid JSON: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The model is of a kind not implemented.
    #[error("{}: architecture `{found}` is not supported; supported: {supported}", file.display())]
    Architecture {
        /// The file.
        file: PathBuf,
        /// Its architecture.
        found: String,
        /// The ones implemented, by the names this kind of file uses.
        supported: String,
    },
    /// A required key is absent.
    #[error("{}: `{key}` is missing; expected {expected}", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What it should have held.
        expected: String,
    },
    /// A key holds a value that cannot be true, or that is not implemented.
    #[error("{}: `{key}` is {found}, expected {expected}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it could be.
        expected: String,
    },
    /// The metadata or tensors of a GGUF file are at fault.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// Upper limits, far beyond any model, that keep products of sizes within 64 bits and lists short.
const MAX_LAYERS: usize = 4096;
const MAX_SIZE: usize = 1 << 28;

impl ModelConfig {
    /// Rows of the query projection, columns of the output projection.
    pub fn query_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Rows of the key and of the value projection.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Whether attention is the softmax of scaled products alone, without soft cap and ALiBi.
    pub fn plain_scores(&self) -> bool {
        self.attention_softcap.is_none() && self.alibi_max_bias.is_none()
    }

    /// ALiBi's slope of each query head, for models of that kind.
    pub fn alibi_slopes(&self) -> Option<Vec<f32>> {
        let slopes = crate::position::alibi::slopes_to(self.alibi_max_bias?, self.num_heads);
        Some(slopes.into_iter().map(|slope| slope as f32).collect())
    }

    /// How many elements at the start of a head are rotated; even, at most `head_dim`.
    pub fn rotary_dim(&self) -> usize {
        let first = self.rope.first();
        first.map_or(self.head_dim, |rope| rope.rotary_dim(self.head_dim))
    }

    /// Every tensor of the model by canonical name, with its shape, `[rows, columns]` or
    /// `[length]`, in the order of use.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (query, kv) = (self.query_size(), self.kv_size());
        let mut all = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab_size, hidden],
        )];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            let mut linear = |name: &str, rows: usize, cols: usize, bias: bool| {
                add(&format!("{name}.weight"), &[rows, cols]);
                if bias {
                    add(&format!("{name}.bias"), &[rows]);
                }
            };
            linear("self_attn.q_proj", query, hidden, self.qkv_bias);
            linear("self_attn.k_proj", kv, hidden, self.qkv_bias);
            linear("self_attn.v_proj", kv, hidden, self.qkv_bias);
            linear("self_attn.o_proj", hidden, query, self.output_bias);
            linear("mlp.gate_proj", inner, hidden, self.mlp_bias);
            linear("mlp.up_proj", inner, hidden, self.mlp_bias);
            linear("mlp.down_proj", hidden, inner, self.mlp_bias);
            add("input_layernorm.weight", &[hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            if self.sandwich_norms {
                add("pre_feedforward_layernorm.weight", &[hidden]);
                add("post_feedforward_layernorm.weight", &[hidden]);
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
        }
        all.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, hidden]));
        }
        all
    }

    /// Checks that `weights` hold every tensor of the model in the right shape.
    ///
    /// # Errors
    /// [`WeightsError::MissingTensor`] or [`WeightsError::Shape`] for the first that does not fit.
    pub fn check_tensors(&self, weights: &dyn WeightSource) -> Result<(), WeightsError> {
        for (name, expected) in self.expected_tensors() {
            match weights.shape(&name) {
                Some(found) if found == expected => {}
                Some(found) => {
                    return Err(WeightsError::Shape {
                        file: weights.file().to_path_buf(),
                        tensor: name,
                        found: found.to_vec(),
                        expected: format!("{expected:?} by the model's configuration"),
                    });
                }
                None => {
                    let names = weights.names();
                    let names = names.iter().map(String::as_str);
                    return Err(missing(weights.file(), &name, names));
                }
            }
        }
        Ok(())
    }

    /// Refuses sizes that cannot belong together. `key` gives the file's name for a field.
    fn validate(self, file: &Path, key: impl Fn(&str) -> String) -> Result<Self, ConfigError> {
        let invalid = |field: &str, found: String, expected: String| ConfigError::Invalid {
            file: file.to_path_buf(),
            key: key(field),
            found,
            expected,
        };
        for (field, size, most) in [
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_heads", self.num_heads, 1 << 14),
            ("num_kv_heads", self.num_kv_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("context_length", self.context_length, 1 << 40),
        ] {
            if size == 0 || size > most {
                return Err(invalid(field, size.to_string(), format!("1 to {most}")));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(invalid(
                "num_kv_heads",
                self.num_kv_heads.to_string(),
                format!("a divisor of the {} heads", self.num_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid(
                "head_dim",
                self.head_dim.to_string(),
                "an even number".into(),
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(invalid(
                "rms_norm_eps",
                self.rms_norm_eps.to_string(),
                "a number between 0 and 1".into(),
            ));
        }
        if !(self.attention_scale > 0.0 && self.attention_scale.is_finite()) {
            return Err(invalid(
                "attention_scale",
                self.attention_scale.to_string(),
                "a positive number".into(),
            ));
        }
        for (field, cap) in [
            ("attention_softcap", self.attention_softcap),
            ("final_softcap", self.final_softcap),
        ] {
            if let Some(cap) = cap
                && !(cap > 0.0 && cap.is_finite())
            {
                return Err(invalid(field, cap.to_string(), "a positive number".into()));
            }
        }
        if let Some(bias) = self.alibi_max_bias
            && !(bias > 0.0 && bias.is_finite())
        {
            let expected = "a positive number".into();
            return Err(invalid("alibi_max_bias", bias.to_string(), expected));
        }
        for rope in &self.rope {
            self.validate_rope(rope, &invalid)?;
        }
        Ok(self)
    }

    fn validate_rope(
        &self,
        rope: &RopeSpec,
        invalid: &dyn Fn(&str, String, String) -> ConfigError,
    ) -> Result<(), ConfigError> {
        let theta = rope.parameters.get("rope_theta");
        if !theta
            .and_then(serde_json::Value::as_f64)
            .is_some_and(|t| t > 0.0 && t.is_finite())
        {
            let found = theta.map_or_else(|| "absent".into(), ToString::to_string);
            return Err(invalid("rope_theta", found, "a positive number".into()));
        }
        if let Some(factor) = rope.parameters.get("partial_rotary_factor") {
            let rotated = factor
                .as_f64()
                .filter(|f| *f > 0.0 && *f <= 1.0)
                .map(|f| (f * self.head_dim as f64).round() as usize);
            if !rotated.is_some_and(|r| r > 0 && r.is_multiple_of(2)) {
                return Err(invalid(
                    "partial_rotary_factor",
                    factor.to_string(),
                    format!(
                        "a share of the head size {} that rotates an even number of elements",
                        self.head_dim
                    ),
                ));
            }
        }
        if let Some(factors) = &rope.freq_factors {
            let pairs = rope.rotary_dim(self.head_dim) / 2;
            if factors.len() != pairs {
                return Err(invalid(
                    "freq_factors",
                    format!("{} numbers", factors.len()),
                    format!("{pairs}, one for each rotated pair"),
                ));
            }
            if let Some(bad) = factors.iter().find(|f| !(**f > 0.0 && f.is_finite())) {
                return Err(invalid(
                    "freq_factors",
                    format!("{bad} among its values"),
                    "positive numbers".into(),
                ));
            }
        }
        Ok(())
    }
}

/// The position of `rope` in `all`, where it is added unless it is there.
fn intern(all: &mut Vec<RopeSpec>, rope: &RopeSpec) -> usize {
    all.iter().position(|r| r == rope).unwrap_or_else(|| {
        all.push(rope.clone());
        all.len() - 1
    })
}

#[cfg(test)]
mod tests;

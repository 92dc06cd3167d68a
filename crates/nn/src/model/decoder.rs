//! The decoder-only family in one file: Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text), SmolLM.
//!
//! They differ only in the switches of [`ModelConfig`]: grouped queries, biases, query/key norms,
//! sandwich norms, sliding layers, soft caps, tied embeddings, per-layer rotary bases. The same
//! definition answers questions (packed weights, fused kernels) and learns (dense weights,
//! gradients); what attention sees is decided by the caller's [`Attend`].

use crate::attention::{Attend, KeptTables};
use crate::config::{Activation, ModelConfig};
use crate::model::parameters::{Loader, Parameters, Projection};
use crate::weights::WeightSource;
use candle_core::{DType, Device, Result, Tensor, bail};
use longspan_kernels::elementwise::Gate;
use longspan_kernels::measure::{Stage, stage};
use longspan_kernels::ops::{self, Embedding, Linear, RmsNorm};
use std::collections::HashMap;

/// How weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Low-bit panels for the CPU kernels; checkpoints in 16 or 32 bit become bf16 panels.
    Packed,
    /// Dequantised to this type on the model's device: the f32 reference path, CUDA.
    Dense(DType),
}

/// One transformer block.
struct Layer {
    input_norm: RmsNorm,
    /// Query, key and value projections side by side: [(num_heads + 2 num_kv_heads) head_dim, hidden].
    qkv: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    output: Linear,
    post_attention_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    /// Gate and up projections side by side: [2 intermediate, hidden].
    gate_up: Linear,
    down: Linear,
    post_mlp_norm: Option<RmsNorm>,
}

/// A decoder-only language model. Tokens of all sequences lie flat: [tokens, hidden].
pub struct Decoder {
    config: ModelConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    device: Device,
    kept_tables: KeptTables,
}

impl Decoder {
    /// Reads a checkpoint. Errors name the tensor, its shape and the shape expected.
    pub fn load(
        config: &ModelConfig,
        weights: &dyn WeightSource,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        if precision == Precision::Packed && !device.is_cpu() {
            bail!("packed weights are for the CPU; on {device:?} use a dense precision");
        }
        let loader = Loader {
            weights,
            precision,
            device,
        };
        Self::build(config, &loader, device)
    }

    /// Builds the same model over given tensors (Hugging Face names), for training: variables
    /// among them receive gradients.
    pub fn from_tensors(
        config: &ModelConfig,
        tensors: &HashMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        Self::build(config, tensors, device)
    }

    fn build(config: &ModelConfig, source: &dyn Parameters, device: &Device) -> Result<Self> {
        let c = config;
        let (hidden, heads, kv) = (
            c.hidden_size,
            c.num_heads * c.head_dim,
            c.num_kv_heads * c.head_dim,
        );
        let norm =
            |name: &str, width: usize| RmsNorm::new(source.vector(name, width)?, c.rms_norm_eps);
        let layers = (0..c.num_layers)
            .map(|index| {
                let at = |name: &str| format!("model.layers.{index}.{name}");
                let projection = |name: &str, rows: usize, bias: bool| Projection {
                    weight: at(&format!("{name}.weight")),
                    bias: bias.then(|| at(&format!("{name}.bias"))),
                    rows,
                };
                let optional = |wanted: bool, name: &str, width: usize| {
                    wanted.then(|| norm(&at(name), width)).transpose()
                };
                // Gemma norms both sides of each half; there `post_attention_layernorm` is the
                // output norm of attention, elsewhere it is the input norm of the MLP.
                let mlp_norm = if c.sandwich_norms {
                    "pre_feedforward_layernorm.weight"
                } else {
                    "post_attention_layernorm.weight"
                };
                Ok(Layer {
                    input_norm: norm(&at("input_layernorm.weight"), hidden)?,
                    qkv: source.linear(
                        hidden,
                        &[
                            projection("self_attn.q_proj", heads, c.qkv_bias),
                            projection("self_attn.k_proj", kv, c.qkv_bias),
                            projection("self_attn.v_proj", kv, c.qkv_bias),
                        ],
                    )?,
                    query_norm: optional(c.qk_norm, "self_attn.q_norm.weight", c.head_dim)?,
                    key_norm: optional(c.qk_norm, "self_attn.k_norm.weight", c.head_dim)?,
                    output: source.linear(
                        heads,
                        &[projection("self_attn.o_proj", hidden, c.output_bias)],
                    )?,
                    post_attention_norm: optional(
                        c.sandwich_norms,
                        "post_attention_layernorm.weight",
                        hidden,
                    )?,
                    mlp_norm: norm(&at(mlp_norm), hidden)?,
                    gate_up: source.linear(
                        hidden,
                        &[
                            projection("mlp.gate_proj", c.intermediate_size, c.mlp_bias),
                            projection("mlp.up_proj", c.intermediate_size, c.mlp_bias),
                        ],
                    )?,
                    down: source.linear(
                        c.intermediate_size,
                        &[projection("mlp.down_proj", hidden, c.mlp_bias)],
                    )?,
                    post_mlp_norm: optional(
                        c.sandwich_norms,
                        "post_feedforward_layernorm.weight",
                        hidden,
                    )?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let table = Projection {
            weight: "model.embed_tokens.weight".into(),
            bias: None,
            rows: c.vocab_size,
        };
        let table = source.linear(hidden, &[table])?;
        let embedding = match &table {
            Linear::Dense(parts) => Embedding::Dense(parts[0].weight.clone()),
            Linear::Packed { matrix, .. } => Embedding::Packed(matrix.clone()),
        };
        let head = if c.tie_word_embeddings {
            table
        } else {
            let head = Projection {
                weight: "lm_head.weight".into(),
                bias: None,
                rows: c.vocab_size,
            };
            source.linear(hidden, &[head])?
        };
        let norm = norm("model.norm.weight", hidden)?;
        Ok(Decoder {
            config: config.clone(),
            embedding,
            layers,
            norm,
            head,
            device: device.clone(),
            kept_tables: KeptTables::new(2),
        })
    }

    /// The configuration the model was built with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Rotary tables of the batches that a training read last.
    pub(super) fn kept_tables(&self) -> &KeptTables {
        &self.kept_tables
    }

    /// Bytes of weights that one token's pass reads.
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            let matrices = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down];
            matrices.map(Linear::bytes).iter().sum::<usize>()
        });
        layers.sum::<usize>() + self.head.bytes()
    }

    /// The type of activations: that of the embeddings, f32 for packed weights.
    pub fn dtype(&self) -> DType {
        match &self.embedding {
            Embedding::Dense(weight) => weight.dtype(),
            Embedding::Packed(_) => DType::F32,
        }
    }

    /// Rows of the input embedding, as stored (without the scale that some models apply): [tokens, hidden].
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        self.embedding.forward(ids)
    }

    /// ids of all sequences, flat, to the residual stream after the last layer: [tokens, hidden].
    pub fn hidden(&self, ids: &[u32], attend: &mut dyn Attend) -> Result<Tensor> {
        let mut x = self.first_residual(ids)?;
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, attend)?;
        }
        Ok(x)
    }

    /// ids to the residual stream before the first layer: [tokens, hidden].
    pub fn first_residual(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids
            .iter()
            .find(|&&id| id as usize >= self.config.vocab_size)
        {
            bail!(
                "token id {id} is outside the vocabulary of {} tokens",
                self.config.vocab_size
            );
        }
        let x = self.embedding.forward(ids)?; // [tokens, hidden]
        match self.config.embedding_scale {
            Some(scale) => x * scale as f64,
            None => Ok(x),
        }
    }

    /// Layer `index` alone: the residual stream [tokens, hidden] before it to that after it.
    pub fn layer(&self, index: usize, x: &Tensor, attend: &mut dyn Attend) -> Result<Tensor> {
        self.layers[index].forward(&self.config, index, x, attend)
    }

    /// hidden [tokens, hidden] to f32 logits [tokens, vocab].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = stage(Stage::Head, || {
            ops::norm_linear(hidden, &self.norm, &self.head)
        })?;
        let logits = logits.to_dtype(DType::F32)?;
        match self.config.final_softcap {
            Some(cap) => (logits / cap as f64)?.tanh()? * cap as f64,
            None => Ok(logits),
        }
    }
}

impl Layer {
    fn forward(
        &self,
        c: &ModelConfig,
        index: usize,
        x: &Tensor,
        attend: &mut dyn Attend,
    ) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        let (heads, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let qkv = stage(Stage::Projections, || {
            ops::norm_linears(x, &self.input_norm, &self.qkv, &[heads, kv, kv])
        })?;
        let head_norm = |part: Tensor, norm: &Option<RmsNorm>, count: usize| match norm {
            // [tokens, count head_dim] -> [tokens, count, head_dim] and back
            Some(norm) => norm
                .forward(&part.contiguous()?.reshape((tokens, count, c.head_dim))?)?
                .reshape((tokens, count * c.head_dim)),
            None => Ok(part),
        };
        let query = head_norm(qkv[0].clone(), &self.query_norm, c.num_heads)?; // [tokens, heads]
        let key = head_norm(qkv[1].clone(), &self.key_norm, c.num_kv_heads)?; // [tokens, kv]
        let value = qkv[2].clone();
        let attended = attend.attend(index, &query, &key, &value)?; // [tokens, heads]
        let post_norm = self.post_attention_norm.as_ref();
        let x = stage(Stage::Projections, || {
            ops::linear_residual(&attended, &self.output, post_norm, x)
        })?;
        let gate = match c.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let post_norm = self.post_mlp_norm.as_ref();
        stage(Stage::Mlp, || {
            ops::gated_mlp(
                &x,
                &self.mlp_norm,
                &self.gate_up,
                gate,
                &self.down,
                post_norm,
            )
        })
    }
}

//! The decoder-only family in one file: Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text), SmolLM.
//!
//! They differ only in the switches of [`ModelConfig`]: grouped queries, biases, query/key norms,
//! sandwich norms, sliding layers, soft caps, tied embeddings, per-layer rotary bases. The same
//! definition answers questions (packed weights, fused kernels) and learns (dense weights,
//! gradients); what attention sees is decided by the caller's [`Attend`].

use crate::attention::Attend;
use crate::config::{Activation, ModelConfig};
use crate::weights::{MatrixData, WeightSource};
use candle_core::{DType, Device, Result, Tensor, bail};
use longspan_kernels::elementwise::Gate;
use longspan_kernels::matmul::{MatrixSource, PackedMatrix};
use longspan_kernels::ops::{self, DensePart, Embedding, Linear, RmsNorm};
use longspan_kernels::quant;
use std::collections::HashMap;
use std::sync::Arc;

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
        if let Some(id) = ids
            .iter()
            .find(|&&id| id as usize >= self.config.vocab_size)
        {
            bail!(
                "token id {id} is outside the vocabulary of {} tokens",
                self.config.vocab_size
            );
        }
        let mut x = self.embedding.forward(ids)?; // [tokens, hidden]
        if let Some(scale) = self.config.embedding_scale {
            x = (x * scale as f64)?;
        }
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&self.config, index, &x, attend)?;
        }
        Ok(x)
    }

    /// hidden [tokens, hidden] to f32 logits [tokens, vocab].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = ops::norm_linear(hidden, &self.norm, &self.head)?.to_dtype(DType::F32)?;
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
        let qkv = ops::norm_linear(x, &self.input_norm, &self.qkv)?; // [tokens, heads + 2 kv]
        let head_norm = |part: Tensor, norm: &Option<RmsNorm>, count: usize| match norm {
            // [tokens, count head_dim] -> [tokens, count, head_dim] and back
            Some(norm) => norm
                .forward(&part.contiguous()?.reshape((tokens, count, c.head_dim))?)?
                .reshape((tokens, count * c.head_dim)),
            None => Ok(part),
        };
        let query = head_norm(qkv.narrow(1, 0, heads)?, &self.query_norm, c.num_heads)?;
        let key = head_norm(qkv.narrow(1, heads, kv)?, &self.key_norm, c.num_kv_heads)?;
        let value = qkv.narrow(1, heads + kv, kv)?;
        let attended = attend.attend(index, &query, &key, &value)?; // [tokens, heads]
        let x = ops::linear_residual(
            &attended,
            &self.output,
            self.post_attention_norm.as_ref(),
            x,
        )?;
        let gate = match c.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        ops::gated_mlp(
            &x,
            &self.mlp_norm,
            &self.gate_up,
            gate,
            &self.down,
            self.post_mlp_norm.as_ref(),
        )
    }
}

/// A matrix asked for by name.
struct Projection {
    weight: String,
    bias: Option<String>,
    rows: usize,
}

/// Where parameters come from: a checkpoint, or tensors held by a trainer.
trait Parameters {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor>;
    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear>;
}

impl Parameters for HashMap<String, Tensor> {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor> {
        match self.get(name) {
            Some(tensor) if tensor.dims() == [width] => Ok(tensor.clone()),
            Some(tensor) => bail!(
                "tensor {name}: found shape {:?}, expected [{width}]",
                tensor.dims()
            ),
            None => bail!("tensor {name} is missing"),
        }
    }

    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear> {
        let parts = parts
            .iter()
            .map(|part| {
                let bias = part
                    .bias
                    .as_ref()
                    .map(|name| self.vector(name, part.rows))
                    .transpose()?;
                match self.get(&part.weight) {
                    Some(weight) if weight.dims() == [part.rows, cols] => Ok(DensePart {
                        weight: weight.clone(),
                        bias,
                    }),
                    Some(weight) => bail!(
                        "tensor {}: found shape {:?}, expected [{}, {cols}]",
                        part.weight,
                        weight.dims(),
                        part.rows
                    ),
                    None => bail!("tensor {} is missing", part.weight),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Linear::Dense(parts))
    }
}

struct Loader<'a> {
    weights: &'a dyn WeightSource,
    precision: Precision,
    device: &'a Device,
}

impl Loader<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<MatrixData<'_>> {
        let matrix = self
            .weights
            .matrix(name)
            .map_err(candle_core::Error::wrap)?;
        if (matrix.rows, matrix.cols) != (rows, cols) {
            bail!(
                "tensor {name}: found shape [{}, {}], expected [{rows}, {cols}]",
                matrix.rows,
                matrix.cols
            );
        }
        Ok(matrix)
    }

    fn values(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let values = self
            .weights
            .vector(name)
            .map_err(candle_core::Error::wrap)?;
        if values.len() != width {
            bail!(
                "tensor {name}: found {} values, expected {width}",
                values.len()
            );
        }
        Ok(values)
    }
}

impl Parameters for Loader<'_> {
    fn vector(&self, name: &str, width: usize) -> Result<Tensor> {
        let dtype = match self.precision {
            Precision::Packed => DType::F32,
            Precision::Dense(dtype) => dtype,
        };
        Tensor::from_vec(self.values(name, width)?, width, self.device)?.to_dtype(dtype)
    }

    fn linear(&self, cols: usize, parts: &[Projection]) -> Result<Linear> {
        match self.precision {
            Precision::Packed => {
                let data = parts
                    .iter()
                    .map(|part| self.matrix(&part.weight, part.rows, cols))
                    .collect::<Result<Vec<_>>>()?;
                let sources: Vec<MatrixSource> = data
                    .iter()
                    .map(|data| MatrixSource {
                        ty: data.ty,
                        rows: data.rows,
                        bytes: &data.bytes,
                    })
                    .collect();
                let matrix =
                    Arc::new(PackedMatrix::pack(cols, &sources).map_err(candle_core::Error::wrap)?);
                let mut bias = Vec::new();
                for part in parts {
                    if let Some(name) = &part.bias {
                        bias.extend(self.values(name, part.rows)?);
                    }
                }
                let bias = (!bias.is_empty()).then(|| Arc::new(bias));
                Ok(Linear::Packed { matrix, bias })
            }
            Precision::Dense(dtype) => {
                let parts = parts
                    .iter()
                    .map(|part| {
                        let data = self.matrix(&part.weight, part.rows, cols)?;
                        let mut values = vec![0f32; part.rows * cols];
                        quant::dequantize(data.ty, &data.bytes, &mut values)
                            .map_err(candle_core::Error::wrap)?;
                        let weight = Tensor::from_vec(values, (part.rows, cols), self.device)?
                            .to_dtype(dtype)?;
                        let bias = part
                            .bias
                            .as_ref()
                            .map(|name| self.vector(name, part.rows))
                            .transpose()?;
                        Ok(DensePart { weight, bias })
                    })
                    .collect::<Result<Vec<_>>>()?;
                Ok(Linear::Dense(parts))
            }
        }
    }
}

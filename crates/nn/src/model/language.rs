//! A language model as a trainer sees it: embedding, a chain of blocks, a head.
//!
//! The chain is explicit so that a trainer can keep only the activations between blocks and run a block again when its
//! gradient is asked (activation checkpointing). Documents of a batch lie flat, one after the other; `lengths` says where
//! each ends, and no block may look across a border.

use crate::attention::CausalAttention;
use crate::config::ModelConfig;
use crate::model::Decoder;
use crate::params::{Init, ParamGroup, ParamStore};
use candle_core::{Result, Tensor};

/// Embedding, blocks and head, all differentiable.
pub trait LanguageModel: Send + Sync {
    /// Number of tokens of the vocabulary.
    fn vocab_size(&self) -> usize;
    /// Number of blocks between embedding and head.
    fn num_blocks(&self) -> usize;
    /// ids of documents of these lengths to the input of the first block: [tokens, hidden].
    fn embed(&self, ids: &[u32], lengths: &[usize]) -> Result<Tensor>;
    /// One block over documents of these lengths: [tokens, hidden] to the same.
    fn block(&self, index: usize, x: &Tensor, lengths: &[usize]) -> Result<Tensor>;
    /// [tokens, hidden] after the last block to f32 logits [tokens, vocab].
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// What this thread's forward passes noted for [`after_step`](Self::after_step), by block, taken out.
    fn take_notes(&self) -> Vec<Vec<f64>> {
        Vec::new()
    }

    /// Adds the notes of a micro-batch.
    fn add_notes(&self, notes: &[Vec<f64>]) -> Result<()> {
        let _ = notes;
        Ok(())
    }

    /// What changes after an optimiser step other than by gradients.
    fn after_step(&self) -> Result<()> {
        Ok(())
    }

    /// All blocks one after the other.
    fn hidden(&self, ids: &[u32], lengths: &[usize]) -> Result<Tensor> {
        let mut x = self.embed(ids, lengths)?;
        for index in 0..self.num_blocks() {
            x = self.block(index, &x, lengths)?;
        }
        Ok(x)
    }
}

impl LanguageModel for Decoder {
    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn num_blocks(&self) -> usize {
        self.config().num_layers
    }

    fn embed(&self, ids: &[u32], _: &[usize]) -> Result<Tensor> {
        self.first_residual(ids)
    }

    fn block(&self, index: usize, x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let config = self.config();
        let (device, kept) = (self.device(), self.kept_tables());
        let mut attend = CausalAttention::remembering(config, lengths, x.dtype(), device, kept)?;
        self.layer(index, x, &mut attend)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Decoder::logits(self, hidden)
    }
}

/// A decoder with fresh weights: matrices normal with standard deviation `std` (those that write to the residual stream
/// smaller by the square root of twice the number of layers), norms 1, biases 0.
pub fn new_decoder(config: &ModelConfig, store: &ParamStore, std: f64) -> Result<Decoder> {
    let c = config;
    let root = store.root();
    let normal = Init::Normal { std };
    let residual = Init::Normal {
        std: std / (2.0 * c.num_layers.max(1) as f64).sqrt(),
    };
    let (heads, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let vector = |at: &crate::params::Params<'_>, name: &str, width: usize, value: f64| {
        at.get_in(name, &[width], Init::Constant(value), ParamGroup::NO_DECAY)
            .map(drop)
    };
    let matrix = |name: String, rows: usize, cols: usize, init: &Init, bias: bool| {
        let at = root.at(name);
        at.get("weight", &[rows, cols], init.clone())?;
        if bias {
            vector(&at, "bias", rows, 0.0)?;
        }
        Ok::<(), candle_core::Error>(())
    };
    let norm = |name: String, width: usize| vector(&root.at(name), "weight", width, 1.0);
    matrix(
        "model.embed_tokens".into(),
        c.vocab_size,
        c.hidden_size,
        &normal,
        false,
    )?;
    for index in 0..c.num_layers {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        norm(at("input_layernorm"), c.hidden_size)?;
        norm(at("post_attention_layernorm"), c.hidden_size)?;
        if c.sandwich_norms {
            norm(at("pre_feedforward_layernorm"), c.hidden_size)?;
            norm(at("post_feedforward_layernorm"), c.hidden_size)?;
        }
        if c.qk_norm {
            norm(at("self_attn.q_norm"), c.head_dim)?;
            norm(at("self_attn.k_norm"), c.head_dim)?;
        }
        for (name, rows) in [("q_proj", heads), ("k_proj", kv), ("v_proj", kv)] {
            let name = at(&format!("self_attn.{name}"));
            matrix(name, rows, c.hidden_size, &normal, c.qkv_bias)?;
        }
        let (h, m) = (c.hidden_size, c.intermediate_size);
        matrix(at("self_attn.o_proj"), h, heads, &residual, c.output_bias)?;
        matrix(at("mlp.gate_proj"), m, h, &normal, c.mlp_bias)?;
        matrix(at("mlp.up_proj"), m, h, &normal, c.mlp_bias)?;
        matrix(at("mlp.down_proj"), h, m, &residual, c.mlp_bias)?;
    }
    norm("model.norm".into(), c.hidden_size)?;
    if !c.tie_word_embeddings {
        matrix(
            "lm_head".into(),
            c.vocab_size,
            c.hidden_size,
            &normal,
            false,
        )?;
    }
    Decoder::from_tensors(config, &store.tensors(), store.device())
}

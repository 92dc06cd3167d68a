//! What an engine runs: a decoder, whose layers attend to cached keys, or a stack of sequence mixers, which carries a
//! state from token to token. Both are described by a [`ModelConfig`]; a stack's has no attention heads.

use super::{Decoder, LanguageModel, StackLm};
use crate::attention::Attend;
use crate::config::{Architecture, LayerConfig, ModelConfig};
use crate::mixer::MixerState;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// See the module's text.
pub enum Network {
    /// Keys and values are cached.
    Decoder(Box<Decoder>),
    /// States are carried.
    Recurrent(Box<Recurrent>),
}

/// A stack that is read and written token by token.
pub struct Recurrent {
    model: StackLm,
    config: ModelConfig,
    /// States before the first token; what layers compute once from their weights for stepping hangs on them.
    start: OnceLock<Vec<MixerState>>,
}

impl From<Decoder> for Arc<Network> {
    fn from(decoder: Decoder) -> Self {
        Arc::new(Network::Decoder(Box::new(decoder)))
    }
}

impl Recurrent {
    /// Wraps a language model; `trained` is the longest sequence it was trained on, if known.
    ///
    /// # Errors
    /// For a stack whose mixer looks both ways: it cannot write.
    pub fn new(model: StackLm, trained: Option<usize>) -> Result<Self> {
        if !model.has_steps() {
            bail!("this stack's mixer looks both ways, so it cannot write token by token");
        }
        let c = model.stack().config();
        let inner = (c.mlp_ratio * c.d_model as f64).round() as usize;
        let config = stack_config(c.d_model, c.layers, inner, model.vocab_size(), trained);
        Ok(Recurrent {
            config,
            model,
            start: OnceLock::new(),
        })
    }

    /// The language model.
    pub fn model(&self) -> &StackLm {
        &self.model
    }

    /// The states of one sequence before its first token, one per block.
    pub fn start(&self) -> Result<Vec<MixerState>> {
        if self.start.get().is_none() {
            // Two threads may compute it; both get the same.
            let _ = self.start.set(self.model.stack().init_states(1)?);
        }
        match self.start.get() {
            Some(start) => Ok(start.clone()),
            None => bail!("the states before the first token are not there"),
        }
    }
}

/// The description of a stack: no heads, no keys, no rotary positions.
pub(crate) fn stack_config(
    d_model: usize,
    layers: usize,
    inner: usize,
    vocab_size: usize,
    trained: Option<usize>,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Stack,
        vocab_size,
        hidden_size: d_model,
        intermediate_size: inner,
        num_layers: layers,
        num_heads: 0,
        num_kv_heads: 0,
        head_dim: 0,
        rms_norm_eps: 1e-5,
        context_length: trained.unwrap_or(0),
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sandwich_norms: false,
        embedding_scale: None,
        activation: crate::config::Activation::Silu,
        attention_scale: 1.0,
        attention_softcap: None,
        alibi_max_bias: None,
        final_softcap: None,
        layers: Vec::<LayerConfig>::new(),
        rope: Vec::new(),
        name: None,
    }
}

impl Network {
    /// What is run.
    pub fn config(&self) -> &ModelConfig {
        match self {
            Network::Decoder(decoder) => decoder.config(),
            Network::Recurrent(recurrent) => &recurrent.config,
        }
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        match self {
            Network::Decoder(decoder) => decoder.device(),
            Network::Recurrent(recurrent) => recurrent.model.device(),
        }
    }

    /// The type of activations.
    pub fn dtype(&self) -> DType {
        match self {
            Network::Decoder(decoder) => decoder.dtype(),
            Network::Recurrent(recurrent) => recurrent.model.dtype(),
        }
    }

    /// The stack, if it is one.
    pub fn recurrent(&self) -> Option<&Recurrent> {
        match self {
            Network::Decoder(_) => None,
            Network::Recurrent(recurrent) => Some(recurrent),
        }
    }

    /// Rows of the input embedding as stored: [tokens, hidden].
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Network::Decoder(decoder) => decoder.embed(ids),
            Network::Recurrent(recurrent) => recurrent.model.rows(ids),
        }
    }

    /// ids of all sequences, flat, to the residual stream after the last layer, [tokens, hidden], where `attend` says what
    /// each sees.
    ///
    /// # Errors
    /// For a stack: it does not attend.
    pub fn hidden(&self, ids: &[u32], attend: &mut dyn Attend) -> Result<Tensor> {
        match self {
            Network::Decoder(decoder) => decoder.hidden(ids, attend),
            Network::Recurrent(_) => bail!("a stack of mixers has no attention over cached keys"),
        }
    }

    /// The residual stream [tokens, hidden] to f32 logits [tokens, vocab].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Network::Decoder(decoder) => decoder.logits(hidden),
            Network::Recurrent(recurrent) => recurrent.model.logits(hidden),
        }
    }
}

//! A stack of blocks over any [`SequenceMixer`]: language models, and models of real-valued sequences.
//!
//! A block is `x + mixer(norm(x))`, then optionally `x + mlp(norm(x))`. Names are those of Hugging Face's Mamba models
//! (`backbone.layers.0.mixer.*`), whose checkpoints load without a map.

use crate::mixer::{self, MixerConfig, MixerState, SequenceMixer, StateKind, StatePolicy, linear};
use crate::model::LanguageModel;
use crate::params::{Init, ParamGroup, Params};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use longspan_kernels::composed::rows;
use longspan_kernels::learn;
use serde::{Deserialize, Serialize};

/// What is built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub layers: usize,
    /// The mixer of every block.
    pub mixer: MixerConfig,
    /// Inner width of the MLP per model width; 0 = no MLP.
    #[serde(default)]
    pub mlp_ratio: f64,
    /// Added to the mean square in norms.
    #[serde(default = "epsilon")]
    pub norm_epsilon: f64,
    /// Norms before mixers and at the end; false for a bare chain.
    #[serde(default = "yes")]
    pub norm: bool,
    /// Residual connections; false for a bare chain.
    #[serde(default = "yes")]
    pub residual: bool,
    /// Output weights are the embedding's.
    #[serde(default = "yes")]
    pub tie_embeddings: bool,
    /// Sinusoids of absolute positions are added to the embedding (sine half, then cosine half).
    #[serde(default)]
    pub sinusoid: bool,
}

impl StackConfig {
    /// Blocks of a mixer alone, each with its norm and residual connection, and tied embeddings.
    pub fn of_mixers(d_model: usize, layers: usize, mixer: MixerConfig) -> Self {
        StackConfig {
            d_model,
            layers,
            mixer,
            mlp_ratio: 0.0,
            norm_epsilon: epsilon(),
            norm: true,
            residual: true,
            tie_embeddings: true,
            sinusoid: false,
        }
    }
}

fn epsilon() -> f64 {
    1e-5
}
fn yes() -> bool {
    true
}

struct Block {
    norm: Option<Tensor>,
    mixer: Box<dyn SequenceMixer>,
    /// Norm, then up and down projections with relu between.
    mlp: Option<(Tensor, Tensor, Tensor)>,
}

/// The blocks alone: [tokens, d_model] to the same.
pub struct Stack {
    config: StackConfig,
    blocks: Vec<Block>,
    norm: Option<Tensor>,
}

impl Stack {
    /// Parameters under `backbone.`.
    pub fn new(config: &StackConfig, params: &Params<'_>) -> Result<Self> {
        let (c, backbone) = (config, params.at("backbone"));
        if c.d_model == 0 || c.layers == 0 {
            bail!(
                "stack: found d_model {} and {} layers, expected 1 or more of each",
                c.d_model,
                c.layers
            );
        }
        let scale = |at: Params<'_>| {
            at.get_in(
                "weight",
                &[c.d_model],
                Init::Constant(1.0),
                ParamGroup::NO_DECAY,
            )
        };
        let inner = (c.mlp_ratio * c.d_model as f64).round() as usize;
        let blocks = (0..c.layers)
            .map(|index| {
                let at = backbone.at("layers").at(index);
                let normal = |fan: usize| Init::Normal {
                    std: (fan as f64).powf(-0.5),
                };
                Ok(Block {
                    norm: c.norm.then(|| scale(at.at("norm"))).transpose()?,
                    mixer: c.mixer.build(c.d_model, &at.at("mixer"), &backbone)?,
                    mlp: if inner == 0 {
                        None
                    } else {
                        let mlp = at.at("mlp");
                        Some((
                            scale(at.at("mlp_norm"))?,
                            mlp.at("wi")
                                .get("weight", &[inner, c.d_model], normal(c.d_model))?,
                            mlp.at("wo")
                                .get("weight", &[c.d_model, inner], normal(inner))?,
                        ))
                    },
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Stack {
            blocks,
            norm: c.norm.then(|| scale(backbone.at("norm_f"))).transpose()?,
            config: c.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &StackConfig {
        &self.config
    }

    fn normed(&self, x: &Tensor, weight: &Option<Tensor>) -> Result<Tensor> {
        match weight {
            Some(weight) => rms_norm(x, weight, self.config.norm_epsilon),
            None => Ok(x.clone()),
        }
    }

    /// Block `index`, with `mix` for its mixer: x [.., d_model] to the same.
    fn block(
        &self,
        index: usize,
        x: &Tensor,
        mix: impl FnOnce(&dyn SequenceMixer, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let block = &self.blocks[index];
        let y = mix(&*block.mixer, &self.normed(x, &block.norm)?)?;
        let x = if self.config.residual { (x + y)? } else { y };
        match &block.mlp {
            None => Ok(x),
            Some((norm, wi, wo)) => {
                let hidden = linear(&rms_norm(&x, norm, self.config.norm_epsilon)?, wi, None)?;
                x + linear(&hidden.relu()?, wo, None)?
            }
        }
    }

    /// All blocks and the last norm over x [batch, length, d_model].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for index in 0..self.blocks.len() {
            x = self.block(index, &x, |mixer, x| Ok(mixer.forward(x, None)?.0))?;
        }
        self.normed(&x, &self.norm)
    }

    /// The same from carried states, one per block, which move on.
    pub fn advance(&self, x: &Tensor, states: &mut [MixerState]) -> Result<Tensor> {
        let mut x = x.clone();
        for index in 0..self.blocks.len() {
            x = self.block(index, &x, |mixer, x| {
                let (y, next) = mixer.forward(x, Some(&states[index]))?;
                if let Some(next) = next {
                    states[index] = next;
                }
                Ok(y)
            })?;
        }
        self.normed(&x, &self.norm)
    }

    /// States before the first token.
    pub fn init_states(&self, batch: usize) -> Result<Vec<MixerState>> {
        self.blocks
            .iter()
            .map(|block| block.mixer.init_state(batch))
            .collect()
    }
}

/// x / sqrt(mean(x²) + eps) times weight.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    learn::rms_norm(x, &weight.to_dtype(x.dtype())?, eps)
}

/// A language model over a [`Stack`].
pub struct StackLm {
    stack: Stack,
    embeddings: Tensor,
    /// None = the embeddings.
    head: Option<Tensor>,
}

impl StackLm {
    /// Parameters in `params`. Checkpoints decide themselves whether the head is tied: by holding `lm_head.weight` or not.
    pub fn new(config: &StackConfig, vocab_size: usize, params: &Params<'_>) -> Result<Self> {
        let shape = [vocab_size, config.d_model];
        let normal = |std: f64| Init::Normal { std };
        let scale = (config.d_model as f64).powf(-0.5);
        let stack = Stack::new(config, params)?;
        let embeddings = params.at("backbone").at("embeddings").get(
            "weight",
            &shape,
            normal(if config.tie_embeddings { scale } else { 1.0 }),
        )?;
        let own = !config.tie_embeddings || params.at("lm_head").given("weight");
        let head = own
            .then(|| params.at("lm_head").get("weight", &shape, normal(scale)))
            .transpose()?;
        Ok(StackLm {
            stack,
            embeddings,
            head,
        })
    }

    /// The blocks.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Rows of the embedding, with sinusoids of these positions if the model has them: [tokens, d_model].
    fn embedded(&self, ids: &[u32], positions: impl Iterator<Item = usize>) -> Result<Tensor> {
        let x = self.rows(ids)?;
        if !self.stack.config.sinusoid {
            return Ok(x);
        }
        let half = self.stack.config.d_model / 2;
        let table: Vec<f32> = positions
            .flat_map(|p| {
                let angle = move |m: usize| p as f64 * 10_000f64.powf(-(m as f64) / half as f64);
                (0..half)
                    .map(move |m| angle(m).sin() as f32)
                    .chain((0..half).map(move |m| angle(m).cos() as f32))
            })
            .collect();
        let table = Tensor::from_vec(table, (ids.len(), 2 * half), x.device())?;
        x.clone() + table.to_dtype(x.dtype())?
    }

    /// Rows of the embedding as stored: [tokens, d_model].
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            bail!(
                "token id {id} is outside the vocabulary of {} tokens",
                self.vocab_size()
            );
        }
        rows(&self.embeddings, ids)
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.embeddings.device()
    }

    /// The type of activations.
    pub fn dtype(&self) -> DType {
        self.embeddings.dtype()
    }

    /// Whether states have the same size always, so that those of several sequences can move on together.
    pub fn fixed_state(&self) -> bool {
        let mut blocks = self.stack.blocks.iter();
        // A window of the state goes by the number of tokens read.
        let windowed = matches!(
            &self.stack.config.mixer,
            MixerConfig::Mamba2(config) if matches!(config.state_policy, StatePolicy::Window { .. })
        );
        !self.stack.config.sinusoid
            && !windowed
            && blocks.all(|block| block.mixer.spec().state == StateKind::Fixed)
    }

    /// ids of equally long sequences, after what `states` have read, to the residual stream before the last norm
    /// [batch length, d_model]; the states move on. No gradients are kept.
    pub fn read(&self, ids: &[&[u32]], states: &mut [MixerState]) -> Result<Tensor> {
        let (batch, length) = (ids.len(), ids.first().map_or(0, |row| row.len()));
        if ids.iter().any(|row| row.len() != length) {
            bail!("read: sequences differ in length, expected {length} tokens in each");
        }
        let start = states.first().map_or(0, |state| state.position);
        let positions = (0..batch).flat_map(|_| start..start + length);
        let mut x =
            self.embedded(&ids.concat(), positions)?
                .detach()
                .reshape((batch, length, ()))?;
        for (index, state) in states.iter_mut().enumerate() {
            x = self
                .stack
                .block(index, &x, |mixer, x| {
                    let (y, next) = mixer.forward(&x.detach(), Some(state))?;
                    if let Some(next) = next {
                        *state = next.detach();
                    }
                    Ok(y)
                })?
                .detach();
        }
        x.reshape((batch * length, ()))
    }

    /// ids of equally long sequences [batch][length], after what `states` have read, to f32 logits of every position
    /// [batch, length, vocab]; the states move on. No gradients are kept in them.
    pub fn advance(&self, ids: &[Vec<u32>], states: &mut [MixerState]) -> Result<Tensor> {
        let rows: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let length = rows.first().map_or(0, |row| row.len());
        let x = self.read(&rows, states)?;
        let x = x.reshape((rows.len(), length, ()))?;
        let x = self.stack.normed(&x, &self.stack.norm)?;
        let weight = self.head.as_ref().unwrap_or(&self.embeddings);
        linear(&x.detach(), &weight.detach(), None)?.to_dtype(DType::F32)
    }

    /// Greedy continuations of equally long prompts: `tokens` ids each.
    pub fn greedy(&self, prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
        let mut states = self.stack.init_states(prompts.len())?;
        let mut out = vec![Vec::with_capacity(tokens); prompts.len()];
        let mut ids = prompts.to_vec();
        for _ in 0..tokens {
            let logits = self.advance(&ids, &mut states)?;
            let last = logits.dim(1)?.saturating_sub(1);
            let best = logits.narrow(1, last, 1)?.squeeze(1)?.argmax(D::Minus1)?;
            let best = best.to_vec1::<u32>()?;
            ids = best.iter().map(|&id| vec![id]).collect();
            out.iter_mut().zip(best).for_each(|(out, id)| out.push(id));
        }
        Ok(out)
    }

    /// Whether the model can be stepped.
    pub fn has_steps(&self) -> bool {
        let mut blocks = self.stack.blocks.iter();
        blocks.all(|block| block.mixer.spec().state != StateKind::None)
    }
}

impl LanguageModel for StackLm {
    fn vocab_size(&self) -> usize {
        self.embeddings.dims()[0]
    }

    fn num_blocks(&self) -> usize {
        self.stack.blocks.len()
    }

    fn embed(&self, ids: &[u32], lengths: &[usize]) -> Result<Tensor> {
        self.embedded(ids, lengths.iter().flat_map(|&length| 0..length))
    }

    fn block(&self, index: usize, x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        self.stack
            .block(index, x, |mixer, x| mixer::packed(mixer, x, lengths))
    }

    fn take_notes(&self) -> Vec<Vec<f64>> {
        let blocks = self.stack.blocks.iter();
        blocks.map(|block| block.mixer.take_notes()).collect()
    }

    fn add_notes(&self, notes: &[Vec<f64>]) -> Result<()> {
        let mut blocks = self.stack.blocks.iter().zip(notes);
        blocks.try_for_each(|(block, notes)| block.mixer.add_notes(notes))
    }

    fn after_step(&self) -> Result<()> {
        let mut blocks = self.stack.blocks.iter();
        blocks.try_for_each(|block| block.mixer.after_step())
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let weight = self.head.as_ref().unwrap_or(&self.embeddings);
        let hidden = self.stack.normed(hidden, &self.stack.norm)?;
        linear(&hidden, weight, None)?.to_dtype(DType::F32)
    }
}

/// A model of real-valued sequences: linear in, [`Stack`], linear out.
pub struct SignalModel {
    stack: Stack,
    encoder: (Tensor, Tensor),
    decoder: (Tensor, Tensor),
}

impl SignalModel {
    /// Parameters in `params`: `encoder`, `backbone`, `decoder`.
    pub fn new(
        config: &StackConfig,
        inputs: usize,
        outputs: usize,
        params: &Params<'_>,
    ) -> Result<Self> {
        let affine = |name: &str, rows: usize, cols: usize| -> Result<(Tensor, Tensor)> {
            let limit = (cols as f64).powf(-0.5);
            let uniform = || Init::Uniform {
                low: -limit,
                high: limit,
            };
            let at = params.at(name);
            Ok((
                at.get("weight", &[rows, cols], uniform())?,
                at.get("bias", &[rows], uniform())?,
            ))
        };
        Ok(SignalModel {
            stack: Stack::new(config, params)?,
            encoder: affine("encoder", config.d_model, inputs)?,
            decoder: affine("decoder", outputs, config.d_model)?,
        })
    }

    /// x [batch, length, inputs] to [batch, length, outputs], or to [batch, 1, outputs] of the last step.
    pub fn forward(&self, x: &Tensor, last_only: bool) -> Result<Tensor> {
        let x = linear(x, &self.encoder.0, Some(&self.encoder.1))?;
        let mut x = self.stack.forward(&x)?;
        if last_only {
            let length = x.dim(1)?;
            x = x.narrow(1, length.saturating_sub(1), 1)?;
        }
        linear(&x, &self.decoder.0, Some(&self.decoder.1))
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.encoder.0.device()
    }
}

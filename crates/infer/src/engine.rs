//! The engine: runs a model over any number of sequences, each with its own store and policy.

use crate::attend::{LayerShape, Row, attend_rows};
use crate::context::{Call, ContextConfig, ContextError, Positions};
use crate::decode::logits::{argmax, log_sum_exp};
use crate::kv::plane::TierFile;
use crate::kv::{KvStore, Rows};
use candle_core::{Device, Tensor};
use longspan_kernels::attention::{KvDtype, KvLayout};
use longspan_kernels::cpu::Level;
use longspan_kernels::learn::nll;
use longspan_kernels::ops::{with_rows, with_strided_rows};
use longspan_kernels::pool::{Pool, SharedMut};
use longspan_nn::attention::{Attend, CausalAttention};
use longspan_nn::model::{Network, Recurrent};
use longspan_nn::position::{
    Frequencies, LayerRopes, RopeBasis, RopeError, RopeOverride, RopeTable,
};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

mod sequence;
mod states;

pub use sequence::Sequence;

/// What can go wrong while a sequence is read or written.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The policy's options are impossible.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The rotary rule cannot be used with this model, or not for a text of this length.
    #[error(transparent)]
    Rope(#[from] RopeError),
    /// A tensor operation failed.
    #[error("{0}")]
    Tensor(#[from] candle_core::Error),
    /// The disk tier or a session file failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The caller stopped the work; the sequence holds what was read so far.
    #[error("stopped after {read} of {total} tokens")]
    Cancelled {
        /// Tokens read in this call.
        read: usize,
        /// Tokens asked for.
        total: usize,
    },
    /// A saved session does not belong to this model or these options.
    #[error("{0}")]
    Session(String),
    /// The request cannot be carried out; the text says why.
    #[error("{0}")]
    Refused(String),
}

/// Result of engine calls.
pub type Result<T> = std::result::Result<T, EngineError>;

/// How new sequences are kept.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Element type of cached keys and values.
    pub kv: KvDtype,
    /// What a sequence sees.
    pub context: ContextConfig,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            kv: default_kv(),
            context: ContextConfig::Full,
        }
    }
}

/// The 16-bit type that suits this CPU: bf16 where tiles multiply it, else f16, which is eight
/// times as exact at the same size.
pub fn default_kv() -> KvDtype {
    if Level::current() == Level::Amx {
        KvDtype::Bf16
    } else {
        KvDtype::F16
    }
}

/// A model ready to read and write. Cheap to share; sequences are separate objects.
pub struct Engine {
    model: Arc<Network>,
    ropes: LayerRopes,
    rope: Option<RopeOverride>,
    fingerprint: String,
    /// Names the weights alone.
    weights: String,
    /// Layers without a sliding window of their own.
    governed: Vec<usize>,
    /// ALiBi's slope of each query head, for models of that kind.
    alibi: Option<Vec<f32>>,
}

/// Tokens whose logits exist at a time when losses are asked.
const LOSS_ROWS: usize = 128;

/// Negative log-likelihoods of targets under logits [targets, vocab].
fn losses_of(logits: &[f32], targets: &[u32]) -> Vec<f32> {
    let vocab = logits.len() / targets.len().max(1);
    let mut losses = vec![0f32; targets.len()];
    let shared = SharedMut::new(&mut losses);
    Pool::global().for_each(targets.len(), |row| {
        let logits = &logits[row * vocab..(row + 1) * vocab];
        let total = log_sum_exp(logits, logits[argmax(logits)]);
        let loss = total - logits[targets[row] as usize];
        // SAFETY: every job has an element of its own.
        unsafe { *shared.at(row) = loss };
    });
    losses
}

/// What a forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want<'a> {
    /// None, only keys and values.
    Nothing,
    /// Of each row's last token: [rows, vocab].
    Last,
    /// Of every token: [tokens, vocab].
    All,
    /// Instead of logits, the negative log-likelihood in nats that each token's logits give to the id in its place: [tokens].
    /// Logits then exist for few tokens at a time.
    Losses(&'a [u32]),
}

impl Engine {
    /// Wraps a model. `fingerprint` names the weights; saved sessions carry it.
    pub fn new(model: impl Into<Arc<Network>>, fingerprint: String) -> Result<Self> {
        let model = model.into();
        let ropes = LayerRopes::new(model.config())?;
        let weights = fingerprint.clone();
        Ok(Self::with_ropes(model, ropes, None, fingerprint, weights))
    }

    /// The same weights, not copied, under another rotary rule; None is the model's own.
    ///
    /// # Errors
    /// As [`Engine::with_rope`].
    pub fn under_rope(&self, rope: Option<RopeOverride>) -> Result<Engine> {
        match rope {
            None => Engine::new(self.model.clone(), self.weights.clone()),
            Some(rope) => Engine::with_rope(self.model.clone(), &self.weights, rope),
        }
    }

    /// Wraps a model with another rotary rule than its own, on every layer that sees the whole text. The
    /// fingerprint then names the rule and its frequencies too. Errors say why a rule does not fit.
    pub fn with_rope(
        model: impl Into<Arc<Network>>,
        fingerprint: &str,
        rope: RopeOverride,
    ) -> Result<Self> {
        let model = model.into();
        let weights = fingerprint.to_string();
        let ropes = LayerRopes::with_override(model.config(), &rope)?;
        if !model.device().is_cpu() && (ropes.turn_cached_keys() || ropes.keys_differ()) {
            let message = format!(
                "--rope {rope} runs on the CPU: on {:?} keys are cached as they were first rotated, and this rule turns them again or otherwise than queries",
                model.device()
            );
            return Err(EngineError::Refused(message));
        }
        let bases = serde_json::to_vec(&ropes).map_err(|error| {
            EngineError::Refused(format!(
                "--rope {rope} gives no usable frequencies: {error}"
            ))
        })?;
        let digest = blake3::hash(&bases).to_hex();
        let fingerprint = format!("{fingerprint} --rope {rope} ({})", &digest[..16]);
        Ok(Self::with_ropes(
            model,
            ropes,
            Some(rope),
            fingerprint,
            weights,
        ))
    }

    fn with_ropes(
        model: Arc<Network>,
        ropes: LayerRopes,
        rope: Option<RopeOverride>,
        fingerprint: String,
        weights: String,
    ) -> Self {
        let layers = model.config().layers.iter().enumerate();
        let governed = layers
            .filter(|(_, layer)| layer.sliding_window.is_none())
            .map(|(index, _)| index)
            .collect();
        let alibi = model.config().alibi_slopes();
        Engine {
            model,
            ropes,
            rope,
            fingerprint,
            weights,
            governed,
            alibi,
        }
    }

    /// The rotary rule of every layer.
    pub(crate) fn ropes(&self) -> &LayerRopes {
        &self.ropes
    }

    /// True for layers that context policies govern: those without a sliding window of their own.
    pub(crate) fn governs(&self, layer: usize) -> bool {
        self.governed.binary_search(&layer).is_ok()
    }

    /// The model.
    pub fn model(&self) -> &Network {
        &self.model
    }

    /// Names the weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The rotary rule set in place of the model's own.
    pub fn rope(&self) -> Option<&RopeOverride> {
        self.rope.as_ref()
    }

    /// The trained window in tokens, or the one that the rotary rule set by hand stretches it to. A model that carries a
    /// state has none: it reads on at constant cost.
    pub fn window(&self) -> u64 {
        if self.model.recurrent().is_some() {
            return u64::from(u32::MAX);
        }
        let trained = self.model.config().context_length;
        match &self.rope {
            Some(_) => self.ropes.stretched_window().unwrap_or(trained) as u64,
            None => trained as u64,
        }
    }

    /// Bytes of rotated keys and of values that a token takes in all layers.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> u64 {
        let planes = 2 * self.model.config().num_layers * self.layout(dtype).plane_bytes();
        (planes / longspan_kernels::attention::PAGE) as u64
    }

    /// Errors if the rotary rule cannot be used for a text of this length.
    pub fn check_length(&self, tokens: usize) -> Result<()> {
        Ok(self.ropes.check_length(tokens)?)
    }

    pub(crate) fn layout(&self, dtype: KvDtype) -> KvLayout {
        let config = self.model.config();
        KvLayout {
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            dtype,
        }
    }

    /// An empty sequence. `tier` is where cold pages go under policies that have a disk tier.
    pub fn sequence(
        &self,
        options: &EngineOptions,
        tier: Option<Arc<TierFile>>,
    ) -> Result<Sequence> {
        let config = self.model.config();
        if !self.model.device().is_cpu() && options.context != ContextConfig::Full {
            let message = format!(
                "--context {} runs on the CPU; on {:?} only full is there",
                options.context,
                self.model.device()
            );
            return Err(EngineError::Refused(message));
        }
        if self.model.recurrent().is_some() && options.context != ContextConfig::Full {
            return Err(EngineError::Refused(format!(
                "--context {}: this model carries a state of fixed size and caches no keys that a policy could choose from; leave --context away",
                options.context
            )));
        }
        let policy = options.context.build(self.window())?;
        let spec = policy.spec();
        let follows_length = self.ropes.depend_on_length();
        if self
            .ropes
            .bases()
            .iter()
            .any(|basis| basis.scale_base().is_some())
            && !matches!(options.kv, KvDtype::Bf16 | KvDtype::F32)
        {
            return Err(EngineError::Refused(
                "--rope xpos grows keys with their position, beyond what f16 and int8 hold; add --kv bf16 or --kv f32".into(),
            ));
        }
        if spec.rearranges && follows_length {
            let message = format!(
                "--context {}: it renumbers or reorders the tokens it keeps, but this model's rotary frequencies change with the length of the text",
                options.context
            );
            return Err(EngineError::Refused(message));
        }
        // Kernels weigh keys by their number in the store; these policies copy keys, or leave them where others were.
        let scattered = matches!(
            options.context,
            ContextConfig::Hip(_) | ContextConfig::Squeezed(_)
        ) || spec.rearranges && spec.positions == Positions::Absolute;
        if self.alibi.is_some() && scattered {
            let message = format!(
                "--context {}: this model tells positions by ALiBi, and the policy does not keep keys in their order; use full, window, sinks, lm-infinite, infllm, span or sirllm",
                options.context
            );
            return Err(EngineError::Refused(message));
        }
        let keep_raw = spec.raw_keys || self.ropes.turn_cached_keys();
        Ok(Sequence {
            tokens: Vec::new(),
            store: KvStore::new(
                self.layout(options.kv),
                self.model.recurrent().map_or(config.num_layers, |_| 0),
                keep_raw,
                spec.first_page,
                tier,
            ),
            policy,
            options: options.clone(),
            frequencies: self
                .ropes
                .bases()
                .iter()
                .map(|rope| rope.frequencies(None))
                .collect(),
            states: self.model.recurrent().map(Recurrent::start).transpose()?,
            dense: Vec::new(),
            committed: None,
            broken: false,
            expected_length: 0,
            prompt_end: 0,
            round: None,
        })
    }

    /// Reads tokens in chunks and returns the logits [vocab] of the last one. `progress(read)` is
    /// called after each chunk; [`ControlFlow::Break`] stops there. A call's tokens never share an
    /// execution block with another call's, and under policies with blocks the last token is read
    /// by itself, so that the first answer token gets its own retrieval.
    pub fn prefill(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, &mut Sequence) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<f32>> {
        let spec = sequence.policy.spec();
        let Some((_, body)) = tokens.split_last() else {
            return Err(EngineError::Refused("there are no tokens to read".into()));
        };
        let alone = spec.exec_block.is_some_and(|most| {
            !(spec.whole_question && !sequence.is_empty() && tokens.len() <= most)
        });
        let body = if alone { body } else { tokens };
        let mut read = 0;
        let mut logits = Vec::new();
        sequence.begin_round(tokens.len());
        let whole = sequence.len() + tokens.len();
        sequence.expected_length = sequence.expected_length.max(whole);
        sequence.prompt_end = whole;
        while read < tokens.len() {
            let end = if read < body.len() {
                (read + spec.chunk).min(body.len())
            } else {
                tokens.len()
            };
            let want = if end == tokens.len() {
                Want::Last
            } else {
                Want::Nothing
            };
            logits = self.forward(&mut [(sequence, &tokens[read..end])], want)?;
            read = end;
            if progress(read, sequence)?.is_break() && read < tokens.len() {
                return Err(EngineError::Cancelled {
                    read,
                    total: tokens.len(),
                });
            }
        }
        Ok(logits)
    }

    /// Runs the new tokens of several sequences through the model in one pass.
    pub fn forward(
        &self,
        rows: &mut [(&mut Sequence, &[u32])],
        want: Want<'_>,
    ) -> Result<Vec<f32>> {
        if rows.iter().any(|(sequence, _)| sequence.broken) {
            return Err(EngineError::Refused(
                "an earlier call on this sequence failed half-way; start it anew".into(),
            ));
        }
        let ids: Vec<u32> = rows
            .iter()
            .flat_map(|(_, tokens)| tokens.iter().copied())
            .collect();
        if let Want::Losses(targets) = want {
            self.check_targets(targets, ids.len())?;
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        // Before anything is touched: a text that is too long leaves its sequence as it was.
        for (sequence, tokens) in rows.iter() {
            self.ropes
                .check_length(sequence.tokens.len() + tokens.len())?;
        }
        rows.iter_mut()
            .for_each(|(sequence, _)| sequence.broken = true);
        if let Some(recurrent) = self.model.recurrent() {
            return self.forward_states(recurrent, rows, want);
        }
        let hidden = if self.model.device().is_cpu() {
            self.hidden_paged(rows, &ids)?
        } else {
            self.hidden_dense(rows, &ids)?
        };
        let mut first = 0;
        // Logits of the rows whose policies ask for them.
        let mut known: Vec<Vec<f32>> = Vec::new();
        for (sequence, tokens) in rows.iter_mut() {
            if sequence.policy.spec().logits && !tokens.is_empty() {
                let logits = self.logits(&hidden.narrow(0, first, tokens.len())?)?;
                sequence.policy.end_call(tokens, &logits)?;
                known.push(logits);
            }
            first += tokens.len();
        }
        for (sequence, tokens) in rows.iter_mut() {
            sequence.tokens.extend_from_slice(tokens);
            sequence.broken = false;
        }
        let filled = rows.iter().filter(|(_, tokens)| !tokens.is_empty()).count();
        let hidden = match want {
            Want::Nothing => return Ok(Vec::new()),
            Want::All if known.len() == filled => return Ok(known.concat()),
            Want::Last if known.len() == filled => {
                let vocab = self.model.config().vocab_size;
                let last = known.iter().map(|logits| &logits[logits.len() - vocab..]);
                return Ok(last.collect::<Vec<_>>().concat());
            }
            Want::All => hidden,
            Want::Losses(targets) => return self.losses(&hidden, targets),
            Want::Last => {
                let mut end = 0;
                let ends =
                    rows.iter()
                        .filter(|(_, tokens)| !tokens.is_empty())
                        .map(|(_, tokens)| {
                            end += tokens.len();
                            hidden.narrow(0, end - 1, 1)
                        });
                Tensor::cat(&ends.collect::<candle_core::Result<Vec<_>>>()?, 0)?
            }
        };
        self.logits(&hidden)
    }

    /// hidden [tokens, hidden] to logits [tokens, vocab].
    fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let logits = self.model.logits(hidden)?.to_device(&Device::Cpu)?;
        Ok(with_rows(&logits, <[f32]>::to_vec)?)
    }

    fn check_targets(&self, targets: &[u32], tokens: usize) -> Result<()> {
        let vocab = self.model.config().vocab_size;
        if targets.len() != tokens || targets.iter().any(|&id| id as usize >= vocab) {
            return Err(EngineError::Refused(format!(
                "found {} targets of {tokens} tokens, the largest {:?}; expected one below {vocab} for each",
                targets.len(),
                targets.iter().max()
            )));
        }
        Ok(())
    }

    /// hidden [tokens, hidden] to the negative log-likelihood of each target: [tokens].
    fn losses(&self, hidden: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(targets.len());
        for (index, targets) in targets.chunks(LOSS_ROWS).enumerate() {
            let hidden = hidden.narrow(0, index * LOSS_ROWS, targets.len())?;
            let logits = self.model.logits(&hidden)?;
            let losses = match logits.device() {
                Device::Cpu => with_rows(&logits, |logits| losses_of(logits, targets))?,
                _ => nll(&logits, targets)?.to_vec1::<f32>()?,
            };
            all.extend(losses);
        }
        Ok(all)
    }

    /// Says that what was read is a fixed prefix, of which many questions will be asked: policies
    /// that index one do it now.
    pub fn seal(&self, sequence: &mut Sequence) -> Result<()> {
        let Sequence { policy, store, .. } = sequence;
        Ok(policy.seal(&self.governed, store)?)
    }

    fn hidden_paged(&self, rows: &mut [(&mut Sequence, &[u32])], ids: &[u32]) -> Result<Tensor> {
        let config = self.model.config();
        let mut error = None;
        let mut tables = Vec::with_capacity(rows.len());
        for (sequence, tokens) in rows.iter_mut() {
            self.follow_length(sequence, tokens.len())?;
            if !tokens.is_empty() {
                let call = Call {
                    tokens: tokens.len(),
                    round: sequence.round.take(),
                    layers: &self.governed,
                };
                sequence.policy.begin_call(&call, &mut sequence.store)?;
            }
            let rows = |start: usize| -> Vec<(Vec<f32>, Vec<f32>)> {
                let ropes = sequence.frequencies.iter();
                ropes
                    .map(|rope| position_rows(rope, start, tokens.len()))
                    .collect()
            };
            let start = sequence.tokens.len();
            let slot = match (sequence.policy.spec().positions, self.governed.first()) {
                (Positions::Cache, Some(&layer)) => sequence.store.len(layer) as usize,
                _ => start,
            };
            tables.push(Tables {
                own: rows(start),
                slots: (slot != start).then(|| rows(slot)),
            });
        }
        let mut attend = PagedAttend {
            engine: self,
            rows,
            tables,
            error: &mut error,
        };
        let hidden = self.model.hidden(ids, &mut attend);
        match error {
            Some(error) => Err(error.into()),
            None => {
                debug_assert!(rows.iter().all(|(s, t)| {
                    (0..config.num_layers)
                        .filter(|&l| !(s.policy.spec().rearranges && self.governs(l)))
                        .all(|l| s.store.len(l) == (s.tokens.len() + t.len()) as u64)
                }));
                Ok(hidden?)
            }
        }
    }

    fn hidden_dense(&self, rows: &mut [(&mut Sequence, &[u32])], ids: &[u32]) -> Result<Tensor> {
        let [(sequence, tokens)] = rows else {
            return Err(EngineError::Refused(format!(
                "{:?} runs one sequence at a time, found {}",
                self.model.device(),
                rows.len()
            )));
        };
        // The weights' own type: candle's GPU products want both sides alike.
        let dtype = self.model.dtype();
        let mut attend = CausalAttention::cached_with(
            self.model.config(),
            self.ropes.clone(),
            tokens.len(),
            &mut sequence.dense,
            dtype,
            self.model.device(),
        )?;
        Ok(self.model.hidden(ids, &mut attend)?)
    }

    /// The length that angles are taken for. A text that grows past the window and past what was announced grows
    /// by a 32nd of the window at a time, so that writing token by token does not turn all keys at each.
    fn rope_length(&self, known: usize, expected: usize) -> usize {
        let window = self.model.config().context_length;
        if known <= expected || known <= window {
            return known.max(expected);
        }
        let ahead = known.next_multiple_of((window / 32).max(1));
        match self.ropes.check_length(ahead) {
            Ok(()) => ahead,
            Err(_) => known,
        }
    }

    /// Bases that depend on the length (dynamic NTK, longrope, CLEX): when the frequencies change, every
    /// cached key is rotated anew.
    fn follow_length(&self, sequence: &mut Sequence, incoming: usize) -> Result<()> {
        let known = sequence.tokens.len() + incoming;
        let config = self.model.config();
        let length = self.rope_length(known, sequence.expected_length);
        let bases = self.ropes.bases().iter().enumerate();
        for (index, basis) in bases.filter(|(_, basis)| basis.depends_on_length()) {
            let now = match basis.keeps_keys() {
                // As transformers: the length of each call, a prompt being one.
                true => basis.frequencies(Some(known.max(sequence.prompt_end))),
                false => basis.frequencies(Some(length)),
            };
            if now == sequence.frequencies[index] {
                continue;
            }
            if !basis.keeps_keys() && !now.same_keys(&sequence.frequencies[index]) {
                for layer in (0..config.num_layers)
                    .filter(|&layer| self.ropes.of_layer(layer) == Some(index))
                {
                    sequence.store.rerotate(layer, 0, |token, keys| {
                        crate::attend::rotate_key_to(Some(&now), token, config.head_dim, keys)
                    })?;
                }
            }
            sequence.frequencies[index] = now;
        }
        Ok(())
    }

    /// The frequencies that the cached keys of a restored sequence stand at.
    pub(crate) fn restore_frequencies(&self, sequence: &mut Sequence) {
        let len = sequence.tokens.len();
        let length = (len > 0).then(|| self.rope_length(len, sequence.expected_length));
        let bases = self.ropes.bases().iter();
        let at = |basis: &RopeBasis| match basis.keeps_keys() {
            true => basis.frequencies((len > 0).then_some(len)),
            false => basis.frequencies(length),
        };
        sequence.frequencies = bases.map(at).collect();
    }

    /// Returns a sequence to an earlier length. Full attention can go anywhere; other policies to
    /// any length since the last [`Sequence::commit`].
    pub fn truncate(&self, sequence: &mut Sequence, len: usize) -> Result<()> {
        if len >= sequence.len() {
            return Ok(());
        }
        if sequence.spec().rewinds && self.model.device().is_cpu() && sequence.store_is_whole() {
            sequence.store.truncate(len as u64);
            sequence.tokens.truncate(len);
            return Ok(());
        }
        let Some(mark) = sequence.committed.take().filter(|mark| mark.len() <= len) else {
            if sequence.states.is_some() {
                return Err(EngineError::Refused(format!(
                    "this model carries a state, which cannot be turned back: a sequence of {} tokens cannot return to {len}, only to lengths since its last commit",
                    sequence.len()
                )));
            }
            let message = format!(
                "under {} keys are dropped as the model reads: a sequence of {} tokens cannot return to {len}, only to lengths since its last commit",
                sequence.options.context.name(),
                sequence.len()
            );
            return Err(EngineError::Refused(message));
        };
        let replay = sequence.tokens[mark.len()..len].to_vec();
        *sequence = mark.fork();
        sequence.committed = Some(mark);
        // One at a time, as they were written: retrieval goes by calls.
        for token in replay {
            self.forward(&mut [(sequence, &[token])], Want::Nothing)?;
        }
        Ok(())
    }
}

/// cos and sin for positions start..start + count: [count, rotary_dim / 2] each; where keys turn
/// otherwise than queries, those of the keys follow: [2, count, rotary_dim / 2].
fn position_rows(rope: &Frequencies, start: usize, count: usize) -> (Vec<f32>, Vec<f32>) {
    let half = rope.inv_freq.len();
    let times = if rope.keys_are_as_queries() { 1 } else { 2 };
    let (mut cos, mut sin) = (
        vec![0f32; times * count * half],
        vec![0f32; times * count * half],
    );
    for (index, (cos, sin)) in cos
        .chunks_exact_mut(half)
        .zip(sin.chunks_exact_mut(half))
        .enumerate()
    {
        if index < count {
            RopeTable::compute_row(rope, (start + index) as f64, cos, sin);
        } else {
            RopeTable::compute_key_row(rope, (start + index - count) as f64, cos, sin);
        }
    }
    (cos, sin)
}

/// cos and sin of a call's positions, per rotary basis.
struct Tables {
    own: Vec<(Vec<f32>, Vec<f32>)>,
    /// For the layers of a policy that stands at cache slots, where they differ.
    slots: Option<Vec<(Vec<f32>, Vec<f32>)>>,
}

struct PagedAttend<'a, 'b, 'c> {
    engine: &'a Engine,
    rows: &'a mut [(&'b mut Sequence, &'c [u32])],
    /// Per row.
    tables: Vec<Tables>,
    /// candle's error type cannot carry ours back; it waits here.
    error: &'a mut Option<io::Error>,
}

impl Attend for PagedAttend<'_, '_, '_> {
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let config = self.engine.model.config();
        let (tokens, width) = query.dims2()?;
        let mut out = vec![0f32; tokens * width];
        let shape = LayerShape {
            layer,
            num_heads: config.num_heads,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            sliding_window: config.layers[layer].sliding_window,
            alibi: self.engine.alibi.as_deref(),
        };
        let rope = self.engine.ropes.of_layer(layer);
        let mut rows: Vec<Row<'_>> = self
            .rows
            .iter_mut()
            .zip(&self.tables)
            .map(|((sequence, tokens), tables)| Row {
                store: &mut sequence.store,
                policy: &mut *sequence.policy,
                rope: rope.map(|rope| &sequence.frequencies[rope]),
                tables: rope.map_or((&[][..], &[][..]), |rope| {
                    let tables = match &tables.slots {
                        Some(slots) if shape.sliding_window.is_none() => &slots[rope],
                        _ => &tables.own[rope],
                    };
                    (&tables.0[..], &tables.1[..])
                }),
                count: tokens.len(),
            })
            .collect();
        let strided = |x: &Tensor, f: &mut dyn FnMut(Rows<'_>) -> io::Result<()>| {
            with_strided_rows(x, |data, stride| f(Rows { data, stride }))
        };
        let mut result = Ok(());
        strided(query, &mut |query| {
            let inner = strided(key, &mut |key| {
                let inner = strided(value, &mut |value| {
                    result = attend_rows(shape, &mut rows, query, key, value, &mut out);
                    Ok(())
                });
                inner.map_err(io::Error::other)?
            });
            inner.map_err(io::Error::other)?
        })?
        .map_err(candle_core::Error::wrap)?;
        if let Err(error) = result {
            let message = error.to_string();
            *self.error = Some(error);
            candle_core::bail!("{message}");
        }
        Tensor::from_vec(out, (tokens, width), &Device::Cpu)
    }
}

//! The engine: runs a model over any number of sequences, each with its own store and policy.

use crate::attend::{LayerShape, Row, attend_rows};
use crate::context::{ContextConfig, ContextError, ContextPolicy, PolicyReport, PolicySpec};
use crate::kv::plane::TierFile;
use crate::kv::{KvBytes, KvStore, Rows};
use candle_core::{Device, Tensor};
use longspan_kernels::attention::{KvDtype, KvLayout};
use longspan_kernels::cpu::Level;
use longspan_kernels::ops::{with_rows, with_strided_rows};
use longspan_nn::attention::{Attend, CausalAttention, rope_bases};
use longspan_nn::model::Decoder;
use longspan_nn::position::{Frequencies, RopeBasis, RopeTable};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

/// What can go wrong while a sequence is read or written.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The policy's options are impossible.
    #[error(transparent)]
    Context(#[from] ContextError),
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
    model: Decoder,
    ropes: Vec<RopeBasis>,
    fingerprint: String,
}

/// One stream of tokens with its keys, values and policy.
pub struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) store: KvStore,
    pub(crate) policy: Box<dyn ContextPolicy>,
    pub(crate) options: EngineOptions,
    /// The rotary frequencies that cached keys stand at, one per basis of the model.
    pub(crate) frequencies: Vec<Frequencies>,
    /// Candle keys and values, on devices other than the CPU.
    dense: Vec<Option<(Tensor, Tensor)>>,
    /// The state at the last commit, for policies that cannot rewind.
    committed: Option<Box<Sequence>>,
    /// A call failed half-way: layers may disagree.
    broken: bool,
}

impl Sequence {
    /// Tokens read and written so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens so far.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The options it was made with.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Bytes of keys and values held, by place.
    pub fn kv_bytes(&self) -> KvBytes {
        let dense: usize = self
            .dense
            .iter()
            .flatten()
            .map(|(k, v)| (k.elem_count() + v.elem_count()) * k.dtype().size_in_bytes())
            .sum();
        let mut bytes = self.store.bytes();
        bytes.memory += dense as u64;
        bytes
    }

    /// The policy's counters.
    pub fn report(&self) -> PolicyReport {
        self.policy.report()
    }

    /// The file that cold pages move to, if any.
    pub fn tier(&self) -> Option<&Arc<TierFile>> {
        self.store.tier()
    }

    /// What the policy needs.
    pub fn spec(&self) -> PolicySpec {
        self.policy.spec()
    }

    /// An independent copy that shares pages until either writes to them.
    pub fn fork(&self) -> Sequence {
        Sequence {
            tokens: self.tokens.clone(),
            store: self.store.clone(),
            policy: self.policy.fork(),
            options: self.options.clone(),
            frequencies: self.frequencies.clone(),
            dense: self.dense.clone(),
            committed: None,
            broken: self.broken,
        }
    }

    /// Marks the present length as one that [`Engine::truncate`] can return to.
    pub fn commit(&mut self) {
        // Full attention rewinds without it, unless the model has sliding layers, which drop pages.
        self.committed = None;
        self.committed = Some(Box::new(self.fork()));
    }
}

/// Which logits a forward pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None, only keys and values.
    Nothing,
    /// Of each row's last token: [rows, vocab].
    Last,
    /// Of every token: [tokens, vocab].
    All,
}

impl Engine {
    /// Wraps a model. `fingerprint` names the weights; saved sessions carry it.
    pub fn new(model: Decoder, fingerprint: String) -> Result<Self> {
        let ropes = rope_bases(model.config())?;
        Ok(Engine {
            model,
            ropes,
            fingerprint,
        })
    }

    /// The model.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// Names the weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The trained window in tokens.
    pub fn window(&self) -> u64 {
        self.model.config().context_length as u64
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
        let policy = options.context.build(self.window())?;
        let spec = policy.spec();
        let keep_raw = spec.raw_keys || self.ropes.iter().any(RopeBasis::depends_on_length);
        Ok(Sequence {
            tokens: Vec::new(),
            store: KvStore::new(
                self.layout(options.kv),
                config.num_layers,
                keep_raw,
                spec.first_page,
                tier,
            ),
            policy,
            options: options.clone(),
            frequencies: self
                .ropes
                .iter()
                .map(|rope| rope.frequencies(None))
                .collect(),
            dense: Vec::new(),
            committed: None,
            broken: false,
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
        let body = if spec.exec_block.is_some() {
            body
        } else {
            tokens
        };
        let mut read = 0;
        let mut logits = Vec::new();
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
    pub fn forward(&self, rows: &mut [(&mut Sequence, &[u32])], want: Want) -> Result<Vec<f32>> {
        if rows.iter().any(|(sequence, _)| sequence.broken) {
            return Err(EngineError::Refused(
                "an earlier call on this sequence failed half-way; start it anew".into(),
            ));
        }
        let ids: Vec<u32> = rows
            .iter()
            .flat_map(|(_, tokens)| tokens.iter().copied())
            .collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        rows.iter_mut()
            .for_each(|(sequence, _)| sequence.broken = true);
        let hidden = if self.model.device().is_cpu() {
            self.hidden_paged(rows, &ids)?
        } else {
            self.hidden_dense(rows, &ids)?
        };
        for (sequence, tokens) in rows.iter_mut() {
            sequence.tokens.extend_from_slice(tokens);
            sequence.broken = false;
        }
        let hidden = match want {
            Want::Nothing => return Ok(Vec::new()),
            Want::All => hidden,
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
        let logits = self.model.logits(&hidden)?.to_device(&Device::Cpu)?;
        Ok(with_rows(&logits, <[f32]>::to_vec)?)
    }

    fn hidden_paged(&self, rows: &mut [(&mut Sequence, &[u32])], ids: &[u32]) -> Result<Tensor> {
        let config = self.model.config();
        let mut error = None;
        let mut tables = Vec::with_capacity(rows.len());
        for (sequence, tokens) in rows.iter_mut() {
            self.follow_length(sequence, tokens.len())?;
            let start = sequence.tokens.len();
            tables.push(
                sequence
                    .frequencies
                    .iter()
                    .map(|rope| position_rows(rope, start, tokens.len()))
                    .collect::<Vec<_>>(),
            );
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
        let mut attend = CausalAttention::cached(
            self.model.config(),
            tokens.len(),
            &mut sequence.dense,
            dtype,
            self.model.device(),
        )?;
        Ok(self.model.hidden(ids, &mut attend)?)
    }

    /// Bases that depend on the length (dynamic NTK, longrope): when the frequencies change, every
    /// cached key is rotated anew.
    fn follow_length(&self, sequence: &mut Sequence, incoming: usize) -> Result<()> {
        let config = self.model.config();
        for (index, rope) in self
            .ropes
            .iter()
            .enumerate()
            .filter(|(_, rope)| rope.depends_on_length())
        {
            let now = rope.frequencies(Some(sequence.tokens.len() + incoming));
            if now == sequence.frequencies[index] {
                continue;
            }
            for layer in
                (0..config.num_layers).filter(|&layer| config.layers[layer].rope == Some(index))
            {
                sequence.store.rerotate(layer, |token, key| {
                    crate::attend::rotate_to(Some(&now), token, config.head_dim, key)
                })?;
            }
            sequence.frequencies[index] = now;
        }
        Ok(())
    }

    /// The frequencies that the cached keys of a restored sequence stand at.
    pub(crate) fn restore_frequencies(&self, sequence: &mut Sequence) {
        let len = sequence.tokens.len();
        sequence.frequencies = self
            .ropes
            .iter()
            .map(|rope| rope.frequencies((len > 0).then_some(len)))
            .collect();
    }

    /// Returns a sequence to an earlier length. Full attention can go anywhere; other policies to
    /// any length since the last [`Sequence::commit`].
    pub fn truncate(&self, sequence: &mut Sequence, len: usize) -> Result<()> {
        if len >= sequence.len() {
            return Ok(());
        }
        if sequence.policy.spec().rewinds
            && self.model.device().is_cpu()
            && sequence.store_is_whole()
        {
            sequence.store.truncate(len as u64);
            sequence.tokens.truncate(len);
            return Ok(());
        }
        let Some(mark) = sequence.committed.take().filter(|mark| mark.len() <= len) else {
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

impl Sequence {
    /// No page was dropped: sliding layers of the model drop theirs under any policy.
    fn store_is_whole(&self) -> bool {
        self.store
            .layers
            .iter()
            .all(|layer| layer.pages.iter().all(|page| page.value.is_some()))
    }
}

/// cos and sin for positions start..start + count: [count, rotary_dim / 2] each.
fn position_rows(rope: &Frequencies, start: usize, count: usize) -> (Vec<f32>, Vec<f32>) {
    let half = rope.inv_freq.len();
    let (mut cos, mut sin) = (vec![0f32; count * half], vec![0f32; count * half]);
    for (index, (cos, sin)) in cos
        .chunks_exact_mut(half)
        .zip(sin.chunks_exact_mut(half))
        .enumerate()
    {
        RopeTable::compute_row(rope, (start + index) as f64, cos, sin);
    }
    (cos, sin)
}

struct PagedAttend<'a, 'b, 'c> {
    engine: &'a Engine,
    rows: &'a mut [(&'b mut Sequence, &'c [u32])],
    /// Per row and rotary basis, cos and sin of the call's positions.
    tables: Vec<Vec<(Vec<f32>, Vec<f32>)>>,
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
        };
        let rope = config.layers[layer].rope;
        let mut rows: Vec<Row<'_>> = self
            .rows
            .iter_mut()
            .zip(&self.tables)
            .map(|((sequence, tokens), tables)| Row {
                store: &mut sequence.store,
                policy: &mut *sequence.policy,
                rope: rope.map(|rope| &sequence.frequencies[rope]),
                tables: rope.map_or((&[][..], &[][..]), |rope| {
                    (&tables[rope].0[..], &tables[rope].1[..])
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

//! [`Sequence`]: one stream of tokens, what it holds, and what it remembers of its calls.

use super::EngineOptions;
use crate::context::{ContextPolicy, PolicyReport, PolicySpec};
use crate::kv::plane::TierFile;
use crate::kv::{KvBytes, KvStore};
use candle_core::Tensor;
use longspan_nn::mixer::MixerState;
use longspan_nn::position::Frequencies;
use std::sync::Arc;

/// One stream of tokens with its keys, values and policy.
pub struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) store: KvStore,
    pub(crate) policy: Box<dyn ContextPolicy>,
    pub(crate) options: EngineOptions,
    /// The rotary frequencies that cached keys stand at, one per basis of the model.
    pub(crate) frequencies: Vec<Frequencies>,
    /// Of a stack of mixers: what its blocks carry. Then there are no keys and values.
    pub(crate) states: Option<Vec<MixerState>>,
    /// Candle keys and values, on devices other than the CPU.
    pub(super) dense: Vec<Option<(Tensor, Tensor)>>,
    /// The state at the last commit, for policies that cannot rewind.
    pub(super) committed: Option<Box<Sequence>>,
    /// A call failed half-way: layers may disagree.
    pub(super) broken: bool,
    /// Rules whose angles depend on the length take it to be at least this.
    pub(crate) expected_length: usize,
    /// Where the last prompt ends; see [`RopeBasis::keeps_keys`](longspan_nn::position::RopeBasis::keeps_keys).
    pub(super) prompt_end: usize,
    /// Tokens of the round that the next call opens.
    pub(super) round: Option<usize>,
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

    /// Bytes of keys and values, or of states, held, by place.
    pub fn kv_bytes(&self) -> KvBytes {
        let dense: usize = self
            .dense
            .iter()
            .flatten()
            .map(|(k, v)| (k.elem_count() + v.elem_count()) * k.dtype().size_in_bytes())
            .sum();
        let mut bytes = self.store.bytes();
        let states = self.states.iter().flatten().map(MixerState::bytes);
        bytes.memory += (dense + states.sum::<usize>()) as u64;
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
        let mut spec = self.policy.spec();
        // A state cannot be taken back to an earlier token.
        spec.rewinds &= self.states.is_none();
        spec
    }

    /// An independent copy that shares pages until either writes to them.
    pub fn fork(&self) -> Sequence {
        Sequence {
            tokens: self.tokens.clone(),
            store: self.store.clone(),
            policy: self.policy.fork(),
            options: self.options.clone(),
            frequencies: self.frequencies.clone(),
            states: self.states.clone(),
            dense: self.dense.clone(),
            committed: None,
            broken: self.broken,
            expected_length: self.expected_length,
            prompt_end: self.prompt_end,
            round: None,
        }
    }

    /// Says how long the text will be (0: not known). Rotary rules whose angles depend on the length then take
    /// them for this length from the first token on, so that no key need be turned again, and results do
    /// not depend on how the text is cut into calls. [`Engine::prefill`] says the length of its prompt.
    pub fn expect_length(&mut self, tokens: usize) {
        self.expected_length = tokens;
    }

    /// Says that the next call opens a round of this many tokens: a prompt, a turn of a talk.
    /// [`Engine::prefill`] does so itself.
    pub fn begin_round(&mut self, tokens: usize) {
        self.round = Some(tokens);
    }

    /// The policy, for tests and reports.
    pub fn policy(&self) -> &dyn ContextPolicy {
        &*self.policy
    }

    /// From now on the policy notes where queries look; see [`ContextPolicy::looked`].
    pub fn watch(&mut self) {
        self.policy.watch();
    }

    /// Marks the present length as one that [`Engine::truncate`] can return to.
    pub fn commit(&mut self) {
        // Full attention rewinds without it, unless the model has sliding layers, which drop pages.
        self.committed = None;
        self.committed = Some(Box::new(self.fork()));
    }

    /// No page was dropped: sliding layers of the model drop theirs under any policy.
    pub(super) fn store_is_whole(&self) -> bool {
        self.store
            .layers
            .iter()
            .all(|layer| layer.pages.iter().all(|page| page.value.is_some()))
    }
}

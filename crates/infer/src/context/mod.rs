//! Context policies: which cached keys a block of queries sees, at which angles, and what may be
//! dropped. One file per policy.
//!
//! A policy never computes attention. It answers with a [`Plan`]; the kernel runs one softmax over
//! the union of the plan's parts and hands back column sums where asked; the store executes moves.
//! A policy sees one sequence; batching lives in the engine.
//!
//! Every position that a plan names is an index of the store: the token's number in the text, or
//! its slot for policies that rearrange what they keep.

pub mod auto;
pub mod full;
pub mod h2o;
pub mod hip;
pub mod infllm;
pub mod lm_infinite;
pub mod reweave;
pub mod sinks;
pub mod sirllm;
pub mod span;
mod spec;
pub mod squeezed;
pub mod window;

pub use full::Full;
pub use h2o::{H2o, H2oConfig};
pub use hip::{Hip, HipConfig};
pub use infllm::{InfLlm, InfLlmConfig};
pub use lm_infinite::{LmInfinite, LmInfiniteConfig};
pub use reweave::{Cmr, CmrConfig};
pub use sinks::{Sinks, SinksConfig};
pub use sirllm::{SirLlm, SirLlmConfig};
pub use span::{Span, SpanConfig};
pub use spec::{ContextConfig, ContextError, POLICIES};
pub use squeezed::{Squeezed, SqueezedConfig};
pub use window::{Window, WindowConfig};

use crate::kv::{Gathered, KeyForm, KvStore};
use crate::wire::{read_u64, write_u64};
use longspan_kernels::attention::{Mask, PAGE};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// The angle of the queries against a part's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Angle {
    /// Each query at its own position.
    Own,
    /// Each query at its own position, but no further than this.
    AtMost(u64),
    /// All queries at this position.
    Fixed(u64),
}

/// Token ranges (ascending, disjoint) that a part covers.
#[derive(Clone)]
pub enum Keys {
    /// The same for every head.
    Shared(Vec<Range<u64>>),
    /// One list per query head, or one per kv head that its query heads share.
    PerQueryHead(Vec<Vec<Range<u64>>>),
    /// One list per query head or per kv head, copied to pages of their own; only under [`Mask::All`].
    Gathered(Arc<Gathered>),
}

/// At which positions a policy that drops tokens has its keys and queries stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Positions {
    /// Each token at its number in the text.
    #[default]
    Absolute,
    /// Each token at its slot in the cache.
    Cache,
}

/// Keys seen under one rule.
#[derive(Clone)]
pub struct Part {
    /// Which tokens.
    pub keys: Keys,
    /// Which form of their keys.
    pub form: KeyForm,
    /// At which angle the queries stand.
    pub angle: Angle,
    /// Which of them each query sees, by true positions.
    pub mask: Mask,
    /// Hand the summed softmax probability of each key back to `observe`.
    pub column_sums: bool,
}

impl Keys {
    /// One range for every head.
    pub fn range(tokens: Range<u64>) -> Self {
        Keys::Shared(std::iter::once(tokens).collect())
    }
}

impl Part {
    /// Tokens in rotated form with queries at their own positions, causal.
    pub fn causal(tokens: Range<u64>) -> Self {
        Part {
            keys: Keys::range(tokens),
            form: KeyForm::Rotated,
            angle: Angle::Own,
            mask: Mask::Causal,
            column_sums: false,
        }
    }
}

/// What one block of queries sees: one softmax runs over the union of the parts.
#[derive(Clone, Default)]
pub struct Plan {
    /// Disjoint in (query, key) pairs after masking, unless the policy says otherwise.
    pub parts: Vec<Part>,
}

/// What a policy needs from the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicySpec {
    /// Most queries that share one plan, counted from a call's first; None = the whole call. A
    /// policy with a limit also gets the last token of a prompt as a call of its own.
    pub exec_block: Option<usize>,
    /// The last token of a question that follows a document, and fits `exec_block`, is read with the question.
    pub whole_question: bool,
    /// Most tokens of one call (a multiple of `exec_block`), bounding activations.
    pub chunk: usize,
    /// Un-rotated keys must be stored too.
    pub raw_keys: bool,
    /// Tokens of the store's first page, 1..=64.
    pub first_page: usize,
    /// True if any earlier length can be returned to without a snapshot.
    pub rewinds: bool,
    /// Layers are rearranged ([`KvStore::rearrange`]): what the store calls a token is a slot.
    pub rearranges: bool,
    /// Where queries and new keys stand.
    pub positions: Positions,
    /// [`ContextPolicy::end_call`] wants the logits of every token.
    pub logits: bool,
    /// Plans of a call's blocks do not wait for the attention of earlier blocks, of which the policy observes
    /// nothing: all run together.
    pub independent_blocks: bool,
}

impl Default for PolicySpec {
    /// One plan a call, rotated keys only, whole pages.
    fn default() -> Self {
        PolicySpec {
            exec_block: None,
            whole_question: false,
            chunk: full::CHUNK,
            raw_keys: false,
            first_page: PAGE,
            rewinds: false,
            rearranges: false,
            positions: Positions::Absolute,
            logits: false,
            independent_blocks: false,
        }
    }
}

/// A forward pass that is about to begin.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Its tokens.
    pub tokens: usize,
    /// Tokens of the round (a prompt, a turn of a talk) that the call opens. A long round goes on
    /// in further calls; calls outside of rounds read documents or write answers.
    pub round: Option<usize>,
    /// Layers that the policy governs: those without a sliding window of their own.
    pub layers: &'a [usize],
}

/// Where a plan applies.
#[derive(Clone, Copy, Debug)]
pub struct LayerAt {
    /// Layer index.
    pub layer: usize,
    /// Position of the block's first query.
    pub start: u64,
    /// Queries in the block.
    pub queries: usize,
}

impl LayerAt {
    /// One past the position of the last query: all tokens known to it.
    pub fn end(&self) -> u64 {
        self.start + self.queries as u64
    }
}

/// Un-rotated queries of a call and how to rotate them.
pub struct Queries<'a> {
    /// Elements from the first query on.
    pub data: &'a [f32],
    /// Distance between queries.
    pub stride: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Rotates heads [n head_dim] to a position.
    pub rotate: &'a (dyn Fn(u64, &mut [f32]) + Sync),
}

/// Column sums of one part: for each query head the softmax probability that each key received,
/// summed over the block's queries.
pub struct ColumnSums {
    /// (first token, number of slots valid from `lo`) of each tile, as the kernel saw them.
    pub tiles: Vec<(u64, Range<usize>)>,
    /// [num_heads, tiles * PAGE]
    pub values: Vec<f32>,
}

impl ColumnSums {
    /// Sums over heads and over all tokens with the same `key`, as (key, sum) in order of first
    /// appearance.
    pub fn by_tokens(&self, num_heads: usize, key: impl Fn(u64) -> u64) -> Vec<(u64, f32)> {
        let width = self.tiles.len() * longspan_kernels::attention::PAGE;
        let mut sums: Vec<(u64, f32)> = Vec::new();
        for (tile, (first, slots)) in self.tiles.iter().enumerate() {
            for slot in slots.clone() {
                let column = tile * longspan_kernels::attention::PAGE + slot;
                let sum: f32 = (0..num_heads)
                    .map(|head| self.values[head * width + column])
                    .sum();
                let key = key(first + slot as u64);
                match sums.last_mut() {
                    Some((last, total)) if *last == key => *total += sum,
                    _ => sums.push((key, sum)),
                }
            }
        }
        sums
    }
}

/// Attention received by tokens, or picks, since somebody asked to watch.
#[derive(Clone, Debug, Default)]
struct Looks(Vec<f32>);

impl Looks {
    /// Adds to a unit: a block, or a stretch of [`Looks::STRETCH`] tokens.
    fn add(&mut self, unit: u64, weight: f32) {
        let unit = unit as usize;
        if self.0.len() <= unit {
            self.0.resize(unit + 1, 0.0);
        }
        self.0[unit] += weight;
    }

    /// Tokens of a stretch, where there are no blocks.
    const STRETCH: u64 = 32;

    /// Adds the column sums of a part.
    fn add_sums(&mut self, sums: &ColumnSums, num_heads: usize) {
        for (stretch, weight) in sums.by_tokens(num_heads, |token| token / Self::STRETCH) {
            self.add(stretch, weight);
        }
    }

    /// Shares of the whole, by the tokens of units that were looked at.
    fn shares(&self, tokens: impl Fn(u64) -> Range<u64>) -> Vec<(Range<u64>, f32)> {
        let total: f32 = self.0.iter().sum();
        let units = self
            .0
            .iter()
            .enumerate()
            .filter(|(_, weight)| **weight > 0.0);
        units
            .map(|(unit, weight)| (tokens(unit as u64), weight / total))
            .collect()
    }

    /// The same for stretches, of a text of `len` tokens.
    fn stretches(&self, len: u64) -> Vec<(Range<u64>, f32)> {
        self.shares(|unit| unit * Self::STRETCH..((unit + 1) * Self::STRETCH).min(len))
    }
}

/// What a policy has done, for people.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct PolicyReport {
    /// Blocks of old tokens held, summed over layers.
    pub blocks: u64,
    /// Blocks brought into memory.
    pub loads: u64,
    /// Picks found in memory.
    pub hits: u64,
    /// Bytes of the policy's own indices.
    pub index_bytes: u64,
    /// Tokens dropped by choice rather than by age, summed over layers where those choose apart.
    pub evicted: u64,
    /// Searches for keys, one for each head and block of queries.
    pub searches: u64,
    /// Keys or centroids that were compared with queries in order to choose.
    pub scored: u64,
    /// Keys of a fixed prefix that were offered to a choice, and that it took.
    pub offered: u64,
    /// See `offered`.
    pub taken: u64,
}

/// Writes lists of ranges, for policies' states.
fn write_lists(out: &mut dyn Write, lists: &[Vec<Range<u64>>]) -> io::Result<()> {
    write_u64(out, lists.len() as u64)?;
    for list in lists {
        write_u64(out, list.len() as u64)?;
        for range in list {
            write_u64(out, range.start)?;
            write_u64(out, range.end)?;
        }
    }
    Ok(())
}

/// Reads lists of ranges; errors unless each is ascending and disjoint.
fn read_lists(input: &mut dyn Read) -> io::Result<Vec<Vec<Range<u64>>>> {
    let mut lists = Vec::new();
    for _ in 0..read_u64(input)? {
        let (mut list, mut end) = (Vec::new(), 0);
        for _ in 0..read_u64(input)? {
            let range = read_u64(input)?..read_u64(input)?;
            if range.start < end || range.end <= range.start {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a list of tokens goes from {end} to {range:?}"),
                ));
            }
            end = range.end;
            list.push(range);
        }
        lists.push(list);
    }
    Ok(lists)
}

/// See the module's text. One object per sequence; it owns indices and scores, never keys.
pub trait ContextPolicy: Send {
    /// What the policy needs; constant for its life.
    fn spec(&self) -> PolicySpec;

    /// Before a call's first layer. Tokens may be dropped or moved here.
    fn begin_call(&mut self, _call: &Call<'_>, _store: &mut KvStore) -> io::Result<()> {
        Ok(())
    }

    /// After a call, where the spec asks for it: its tokens and their logits [tokens, vocab]; row t
    /// is about what follows token t.
    fn end_call(&mut self, _tokens: &[u32], _logits: &[f32]) -> io::Result<()> {
        Ok(())
    }

    /// What was read so far is a fixed prefix, of which many questions will be asked: an index of
    /// it may be made now. `layers` as in [`Call`].
    fn seal(&mut self, _layers: &[usize], _store: &mut KvStore) -> io::Result<()> {
        Ok(())
    }

    /// How many of the `at.queries` queries that are left of a call share the next plan.
    fn block(&self, at: LayerAt) -> usize {
        self.spec().exec_block.unwrap_or(at.queries)
    }

    /// Called once per layer and call, before the call's first plan, with all its queries and
    /// after its keys were appended.
    fn begin_layer(
        &mut self,
        _at: LayerAt,
        _queries: &Queries<'_>,
        _store: &mut KvStore,
    ) -> io::Result<()> {
        Ok(())
    }

    /// What the block's queries see. Keys of the whole call are in the store already; a plan
    /// reaches to `at.end()` at most.
    fn plan(&mut self, at: LayerAt, queries: &Queries<'_>, store: &mut KvStore)
    -> io::Result<Plan>;

    /// After the block's attention: column sums of the parts that asked for them. Tokens may be
    /// dropped or moved here.
    fn observe(
        &mut self,
        _at: LayerAt,
        _sums: &[Option<ColumnSums>],
        _store: &mut KvStore,
    ) -> io::Result<()> {
        Ok(())
    }

    /// An independent copy for a forked sequence.
    fn fork(&self) -> Box<dyn ContextPolicy>;

    /// Writes the state so that [`ContextPolicy::load`] restores it exactly.
    fn save(&self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    /// Restores a saved state. Errors on a state that cannot belong to this policy.
    fn load(&mut self, _input: &mut dyn Read) -> io::Result<()> {
        Ok(())
    }

    /// Tokens kept by choice, by their numbers in the text, with what each is worth: of all layers
    /// where they choose together, else of none.
    fn kept(&self) -> Vec<(u64, f32)> {
        Vec::new()
    }

    /// From now on, note where queries look.
    fn watch(&mut self) {}

    /// Where queries have looked since [`ContextPolicy::watch`]: ranges of tokens, ascending, each with its share of
    /// the attention or of the picks, all layers and heads together. Empty where a policy does not tell.
    fn looked(&self) -> Vec<(Range<u64>, f32)> {
        Vec::new()
    }

    /// Counters for people.
    fn report(&self) -> PolicyReport {
        PolicyReport::default()
    }
}

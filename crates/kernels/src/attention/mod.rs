//! Attention: one softmax over the union of *parts* of cached keys, for prefill and decode alike.
//!
//! A context policy decides which keys a query sees and at which angles; it never computes
//! attention. It hands over parts: lists of page tiles, a mask on true positions, and the queries
//! already rotated as that part wants them. This module knows nothing of models, rotary
//! embeddings or policies.
//!
//! * `layout`: how pages lie in memory (the cache is the operand);
//! * `lanes`, `micro`: the loops, written once and compiled for portable, AVX2 and AVX-512;
//! * `codes`: int8 pages by integer dot products (AVX-512 VNNI);
//! * `words`: many rows against f16 and bf16 pages by 16-bit dot products (AVX-512 VNNI);
//! * `amx`: the same steps on bf16 tiles;
//! * `flash`: one block of query rows against a run of tiles, with a running softmax;
//! * `sight`: which slots of a tile a row sees, and its ALiBi terms;
//! * `schedule`: blocks and key ranges over threads, and the merge of key ranges;
//! * `naive`: plain loops in f64, the oracle of the tests.
//!
//! The arithmetic of f32 pages is f32 throughout, and below AVX-512 and for few rows that of f16
//! and bf16 pages too. AMX rounds queries and probabilities of blocks to bf16. At the AVX-512 level
//! int8 pages, and f16 and bf16 pages under many rows, are multiplied as integers, whose other
//! side has about 16 bits. (`vdpbf16ps` would be less exact, and on Sapphire Rapids it issues once
//! in four times an f32 multiply-add for twice the work.)

mod amx;
#[cfg(target_arch = "x86_64")]
mod codes;
mod flash;
mod lanes;
mod layout;
mod micro;
mod naive;
mod schedule;
mod sight;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod words;

use crate::cpu::Level;
use thiserror::Error;

pub use layout::{KvDtype, KvLayout, PAGE};
pub use naive::attention_naive;

/// One page as a part sees it.
#[derive(Clone, Copy, Debug)]
pub struct Tile<'a> {
    /// The page's K plane, [`KvLayout::plane_bytes`] long.
    pub keys: &'a [u8],
    /// The page's V plane, as long.
    pub values: &'a [u8],
    /// True position of slot 0.
    pub first: u64,
    /// First valid slot.
    pub lo: u8,
    /// One past the last valid slot, at most [`PAGE`].
    pub hi: u8,
}

/// Which keys (true position j) a query (true position i) sees, among the valid slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    All,
    /// `j <= i`.
    Causal,
    /// `0 <= i - j < w`.
    Window(u64),
    /// `i - j >= w`.
    Beyond(u64),
}

impl Mask {
    /// The slots of `tile` that position `i` sees: `start..end`, empty when `start >= end`.
    /// Both ends never decrease as `i` grows.
    #[inline]
    pub(crate) fn span(self, tile: &Tile, i: u64) -> (u64, u64) {
        let (lo, hi) = (u64::from(tile.lo), u64::from(tile.hi));
        let slot = |end: u64| end.saturating_sub(tile.first);
        match self {
            Mask::All => (lo, hi),
            Mask::Causal => (lo, hi.min(slot(i + 1))),
            Mask::Window(w) => (lo.max(slot((i + 1).saturating_sub(w))), hi.min(slot(i + 1))),
            Mask::Beyond(w) => (lo, hi.min(slot((i + 1).saturating_sub(w)))),
        }
    }
}

/// The tiles of a part: one list for all heads, or one for each.
#[derive(Clone, Copy, Debug)]
pub enum Tiles<'a> {
    /// All heads see the same tiles.
    Shared(&'a [Tile<'a>]),
    /// `[num_kv_heads]` lists.
    PerKvHead(&'a [Vec<Tile<'a>>]),
    /// `[num_heads]` lists.
    PerQueryHead(&'a [Vec<Tile<'a>>]),
}

/// Where [`Alibi`] takes queries to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At its true position.
    Own,
    /// At its true position, but no further than this.
    AtMost(u64),
    /// Here.
    At(u64),
}

impl Place {
    /// The place of a query at a true position.
    #[inline]
    pub fn of(self, position: u64) -> u64 {
        match self {
            Place::Own => position,
            Place::AtMost(limit) => position.min(limit),
            Place::At(place) => place,
        }
    }
}

/// ALiBi (arXiv 2108.12409): `slope * (place of the key - place of the query)` is added to each logit,
/// after scale and soft cap.
#[derive(Clone, Copy, Debug)]
pub struct Alibi<'a> {
    /// `[num_heads]`; positive slopes take from distant keys.
    pub slopes: &'a [f32],
    /// Where queries are.
    pub query: Place,
    /// Where all keys are; `None` = at their true positions.
    pub keys_at: Option<u64>,
}

impl Alibi<'_> {
    /// The term of a head's logits, for a query and a key at these true positions.
    pub fn bias(&self, head: usize, query: u64, key: u64) -> f64 {
        let distance = self.keys_at.unwrap_or(key) as f64 - self.query.of(query) as f64;
        f64::from(self.slopes[head]) * distance
    }
}

/// Keys seen under one mask by queries rotated in one way.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// `[queries, num_heads, head_dim]`, contiguous.
    pub query: &'a [f32],
    /// Where the keys are. Parts must not name a visible key twice: it would count twice.
    pub tiles: Tiles<'a>,
    /// Which of them a query sees.
    pub mask: Mask,
    /// Return the column sums of this part (only for [`Tiles::Shared`]).
    pub column_sums: bool,
    /// A term of the logits that grows with distance.
    pub alibi: Option<Alibi<'a>>,
}

/// One attention call: the queries of one sequence and layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Shape and type of the pages.
    pub layout: KvLayout,
    /// Query heads, a multiple of `layout.num_kv_heads`; head h reads kv head
    /// `h / (num_heads / num_kv_heads)`.
    pub num_heads: usize,
    /// Number of queries.
    pub queries: usize,
    /// True position of query 0; query t sits at `query_start + t`.
    pub query_start: u64,
    /// Factor of the logits, usually `head_dim^-0.5`.
    pub scale: f32,
    /// `Some(c)`: logits become `c * tanh(logits / c)`.
    pub softcap: Option<f32>,
    /// Each query's result is, bit for bit, what a call with that query alone gives, whatever stands
    /// beside it: no arithmetic that pays only for many rows. For verifying drafts.
    pub row_exact: bool,
    /// The parts whose union is attended.
    pub parts: &'a [Part<'a>],
}

/// What a call returns beside the attention output itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionOutput {
    /// Per part `[num_heads, tiles * PAGE]`: the sum over queries of the softmax probability of
    /// each key slot, 0 in slots no query sees. `None` where [`Part::column_sums`] is false or
    /// the tiles are not [`Tiles::Shared`] (per-head lists have no common columns).
    pub column_sums: Vec<Option<Vec<f32>>>,
    /// `[queries, num_heads]`: natural logarithm of the softmax denominator, -infinity for a
    /// query that sees no key.
    pub lse: Vec<f32>,
}

/// An [`Attention`] whose fields contradict each other.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AttentionError {
    /// A size that does not fit the others.
    #[error("attention: {what} is {found}, expected {expected}")]
    Size {
        /// The field at fault.
        what: &'static str,
        /// Its value.
        found: usize,
        /// The value wanted, in words.
        expected: String,
    },
    /// Valid slots outside a page or reversed.
    #[error(
        "attention: tile at position {first} has valid slots {lo}..{hi}, expected within 0..64"
    )]
    Slots {
        /// True position of the tile's slot 0.
        first: u64,
        /// First valid slot.
        lo: u8,
        /// End of the valid slots.
        hi: u8,
    },
}

impl Attention<'_> {
    /// Whether a query's result may not depend on the others of the call.
    pub(crate) fn by_row(&self) -> bool {
        self.row_exact || self.queries == 1
    }

    /// Query heads per kv head.
    pub(crate) fn group(&self) -> usize {
        self.num_heads / self.layout.num_kv_heads
    }

    /// Whether the fields fit each other and an output of `out_len` elements. Cheap: looks at
    /// lengths only.
    pub fn check(&self, out_len: usize) -> Result<(), AttentionError> {
        let size = |what, found: usize, expected: usize| {
            if found == expected {
                return Ok(());
            }
            Err(AttentionError::Size {
                what,
                found,
                expected: expected.to_string(),
            })
        };
        let layout = &self.layout;
        if layout.head_dim == 0 || !layout.head_dim.is_multiple_of(2) {
            let expected = "an even number above 0".into();
            let (what, found) = ("head_dim", layout.head_dim);
            return Err(AttentionError::Size {
                what,
                found,
                expected,
            });
        }
        if self.num_heads == 0
            || layout.num_kv_heads == 0
            || !self.num_heads.is_multiple_of(layout.num_kv_heads)
        {
            let expected = format!(
                "a multiple above 0 of num_kv_heads = {}",
                layout.num_kv_heads
            );
            let (what, found) = ("num_heads", self.num_heads);
            return Err(AttentionError::Size {
                what,
                found,
                expected,
            });
        }
        let elements = self.queries * self.num_heads * layout.head_dim;
        size("the length of the output", out_len, elements)?;
        let bytes = layout.plane_bytes();
        let check_tiles = |tiles: &[Tile]| {
            for tile in tiles {
                size("the length of a K plane in bytes", tile.keys.len(), bytes)?;
                size("the length of a V plane in bytes", tile.values.len(), bytes)?;
                let Tile { first, lo, hi, .. } = *tile;
                if lo > hi || usize::from(hi) > PAGE {
                    return Err(AttentionError::Slots { first, lo, hi });
                }
            }
            Ok(())
        };
        for part in self.parts {
            size("the length of a part's query", part.query.len(), elements)?;
            if let Some(alibi) = &part.alibi {
                let (found, wanted) = (alibi.slopes.len(), self.num_heads);
                size("the number of ALiBi slopes", found, wanted)?;
            }
            match part.tiles {
                Tiles::Shared(tiles) => check_tiles(tiles)?,
                Tiles::PerKvHead(lists) => {
                    size("the number of tile lists", lists.len(), layout.num_kv_heads)?;
                    lists.iter().try_for_each(|tiles| check_tiles(tiles))?;
                }
                Tiles::PerQueryHead(lists) => {
                    size("the number of tile lists", lists.len(), self.num_heads)?;
                    lists.iter().try_for_each(|tiles| check_tiles(tiles))?;
                }
            }
        }
        Ok(())
    }
}

/// Softmax attention of `args.queries` queries over the union of `args.parts`, at the best level
/// of this CPU. `out`: `[queries, num_heads, head_dim]`; zeros for a query that sees no key.
///
/// # Panics
/// When [`Attention::check`] refuses `args` and `out`: call it first on input that is not known
/// to be sound.
pub fn attention(args: &Attention, out: &mut [f32]) -> AttentionOutput {
    attention_at(Level::current(), args, out)
}

/// [`attention`] at a given level, or at this CPU's best one if that is lower.
///
/// # Panics
/// As [`attention`].
pub fn attention_at(level: Level, args: &Attention, out: &mut [f32]) -> AttentionOutput {
    let mut outputs = schedule::run(level, std::slice::from_ref(args), &mut [out]);
    outputs.pop().expect("one output per item")
}

/// [`attention`] of several sequences in one fork-join: `outs[i]` belongs to `items[i]`.
///
/// # Panics
/// As [`attention`], and when the lengths of `items` and `outs` differ.
pub fn attention_batch(items: &[Attention], outs: &mut [&mut [f32]]) -> Vec<AttentionOutput> {
    schedule::run(Level::current(), items, outs)
}

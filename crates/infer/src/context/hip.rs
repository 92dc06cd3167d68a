//! HiP: a tree search over key ranges finds, for each block of queries and each head, the key
//! blocks that answer it best; the rest is skipped, nothing is dropped.
//!
//! For reading long texts in O(T log T) and decoding at a cost that hardly grows. Paper: arXiv
//! 2406.09827 (the version of ICLR 2025: a range stands for itself by its middle key).

mod search;

pub use search::{Representative, search};

use super::{ContextPolicy, Keys, LayerAt, Part, Plan, PolicyReport, PolicySpec, Queries, Window};
use super::{full, read_lists, write_lists};
use crate::kv::{Gathered, KeyForm, KvStore};
use crate::wire::{read_u64, write_u64};
use longspan_kernels::attention::{KvLayout, Mask};
use longspan_kernels::block_scores::{Piece, Prober};
use longspan_kernels::pool::{Pool, SharedMut};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// Which query heads search together: the union of their queries rates a key block, and they see the same keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// None, as published.
    None,
    /// The heads of a kv head, while decoding: one pass over its keys serves them all.
    #[default]
    Decode,
    /// The heads of a kv head, always.
    Always,
}

/// `hip:k=512,block_q=64,block_k=2,...`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HipConfig {
    /// Tokens selected for a block of queries.
    pub k: u64,
    /// Key ranges kept in each round of a search, of which the best `k / block_k` blocks are taken in the end; as many
    /// as those where this is less, which is the published number. Large key blocks make few of them, and a narrow
    /// search loses what it looks for.
    pub beams: usize,
    /// Queries that share a search.
    pub block_q: usize,
    /// Tokens of a key block.
    pub block_k: u64,
    /// Tokens of a key block while decoding, where the search is bound by memory: the store keeps 16 keys to a
    /// cache line, so that smaller blocks read no less.
    pub decode_block_k: u64,
    /// Which query heads search together.
    pub share: Share,
    /// Every how many of a block's queries take part in its search.
    pub stride_q: usize,
    /// Fewest queries that take part, where a block has so many: a short question is searched with all its words.
    /// 0 = as published.
    pub least_q: usize,
    /// Last tokens always seen.
    pub window: u64,
    /// First tokens always seen.
    pub sinks: u64,
    /// Which key block stands for a range.
    pub representative: Representative,
    /// First layers that see everything.
    pub dense_layers: usize,
    /// Decoded tokens that share a search (r_m).
    pub refresh: u64,
    /// Search while reading too; off = full attention there, the mode that keeps quality.
    pub prefill: bool,
}

impl Default for HipConfig {
    fn default() -> Self {
        HipConfig {
            k: 1024,
            beams: 256,
            block_q: 256,
            block_k: 16,
            decode_block_k: 16,
            share: Share::Always,
            stride_q: 16,
            least_q: 16,
            window: 256,
            sinks: 16,
            representative: Representative::Center,
            dense_layers: 3,
            refresh: 16,
            prefill: true,
        }
    }
}

impl HipConfig {
    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("k", self.k),
            ("block_q", self.block_q as u64),
            ("block_k", self.block_k),
            ("decode_block_k", self.decode_block_k),
            ("stride_q", self.stride_q as u64),
            ("window", self.window),
            ("refresh", self.refresh),
        ];
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(format!("{name} is 0, expected at least 1")),
            None if self.block_q > full::CHUNK => Err(format!(
                "block_q is {}, expected at most {}",
                self.block_q,
                full::CHUNK
            )),
            None => {
                let blocks = [
                    ("block_k", self.block_k),
                    ("decode_block_k", self.decode_block_k),
                ];
                match blocks.iter().find(|(_, size)| *size > 64) {
                    Some((name, size)) => Err(format!("{name} is {size}, expected at most 64")),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A search shared by decoded tokens.
#[derive(Clone, Default)]
struct Cached {
    /// Position that may use it next.
    next: u64,
    /// Tokens that have used it.
    age: u64,
    /// Tokens below had left the window when the search was made.
    cut: u64,
    /// Per query head, or per kv head where its heads share a search: selected tokens and sinks.
    tokens: Lists,
    /// Copies of those below `cut`; made anew after loading.
    copies: Option<Arc<Gathered>>,
}

/// Ascending ranges of tokens, for each query head or each kv head.
type Lists = Vec<Vec<Range<u64>>>;

/// What a block of queries of a call sees beside its window.
#[derive(Clone)]
struct Chosen {
    block: LayerAt,
    /// None: everything.
    keys: Option<ChosenKeys>,
}

#[derive(Clone)]
struct ChosenKeys {
    /// Copies of the tokens that have left the windows of all the block's queries.
    copies: Arc<Gathered>,
    /// The others, by head.
    near: Lists,
}

/// See the module's text.
#[derive(Clone)]
pub struct Hip {
    config: HipConfig,
    layers: Vec<Cached>,
    /// Of the present call and layer, the blocks that were not attended yet.
    chosen: Vec<Chosen>,
    /// What the last search of each layer selected: block starts per query head.
    selected: Vec<Vec<Vec<u64>>>,
    scored: u64,
    searches: u64,
}

impl Hip {
    /// The configuration must have passed [`HipConfig::check`].
    pub fn new(config: &HipConfig) -> Self {
        Hip {
            config: config.clone(),
            layers: Vec::new(),
            chosen: Vec::new(),
            selected: Vec::new(),
            scored: 0,
            searches: 0,
        }
    }

    /// True if these queries see everything.
    fn dense(&self, at: LayerAt) -> bool {
        at.layer < self.config.dense_layers || (!self.config.prefill && at.queries > 1)
    }

    /// First tokens of the key blocks that a layer's last search selected, per query head, or per kv head where its
    /// heads search together.
    pub fn selected(&self, layer: usize) -> &[Vec<u64>] {
        self.selected.get(layer).map_or(&[], Vec::as_slice)
    }

    /// Searches for blocks of queries, of which the first query is `queries`' first one: selected tokens per query or
    /// kv head for each block; None when that is all.
    fn select(
        &mut self,
        blocks: &[LayerAt],
        queries: &Queries<'_>,
        store: &KvStore,
    ) -> io::Result<Vec<Option<Lists>>> {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            return Ok(Vec::new());
        };
        let (layer, start, layout) = (first.layer, first.start, store.layout());
        let planes = store.key_planes(layer, last.end(), KeyForm::Rotated)?;
        let config = &self.config;
        let samples: Vec<Sample> = (blocks.iter().map(|&at| Sample::new(at, config, &layout)))
            .map(|shape| shape.of_heads(queries.num_heads))
            .collect();
        // The sampled queries of each block, rotated: [heads][rows][head_dim].
        let mut rotated: Vec<Vec<f32>> = vec![Vec::new(); blocks.len()];
        let slots = SharedMut::new(&mut rotated);
        Pool::global().for_each(blocks.len(), |block| {
            let (at, sample) = (blocks[block], &samples[block]);
            let skipped = (at.start - start) as usize;
            if sample.searches {
                // SAFETY: each block has a slot of its own.
                unsafe { slots.slice(block, 1)[0] = sample.queries(at, skipped, queries, config) };
            }
        });
        let tasks: Vec<(usize, usize)> = samples
            .iter()
            .enumerate()
            .filter(|(_, sample)| sample.searches)
            .flat_map(|(block, sample)| (0..sample.units).map(move |unit| (block, unit)))
            .collect();
        let mut found: Vec<(Vec<usize>, u64)> = vec![(Vec::new(), 0); tasks.len()];
        let slots = SharedMut::new(&mut found);
        let one = |task: usize| {
            let (block, unit) = tasks[task];
            let sample = &samples[block];
            let rows = &rotated[block];
            let share = rows.len() / sample.units;
            let query = &rows[unit * share..(unit + 1) * share];
            let section = layout.section(unit * layout.num_kv_heads / sample.units);
            let result = sample.search(config.representative, query, store, &planes, section);
            // SAFETY: each task has a slot of its own.
            unsafe { slots.slice(task, 1)[0] = result };
        };
        Pool::global().for_each(tasks.len(), one);
        self.searches += tasks.len() as u64;
        self.scored += found.iter().map(|(_, scored)| scored).sum::<u64>();
        let mut found = found.into_iter().map(|(blocks, _)| blocks);
        let mut lists = Vec::with_capacity(blocks.len());
        for sample in &samples {
            let (width, visible) = (sample.width, sample.visible);
            let starts: Vec<Vec<u64>> = (0..sample.units)
                .map(|_| match sample.searches {
                    true => found.next().unwrap_or_default(),
                    false => (0..sample.blocks).collect(),
                })
                .map(|blocks| blocks.into_iter().map(|b| b as u64 * width).collect())
                .collect();
            let tokens = starts.iter().map(|starts| {
                let sinks = std::iter::once(0..config.sinks.min(visible)).filter(|r| !r.is_empty());
                let blocks = starts.iter().map(|&s| s..(s + width).min(visible));
                union(sinks, blocks)
            });
            lists.push(sample.searches.then(|| tokens.collect()));
            self.selected[layer] = starts;
        }
        Ok(lists)
    }

    /// Chooses the keys of blocks of several queries each, and copies together those that no window reaches.
    fn choose(
        &mut self,
        blocks: &[LayerAt],
        queries: &Queries<'_>,
        store: &KvStore,
    ) -> io::Result<Vec<Chosen>> {
        let (lists, window) = (self.select(blocks, queries, store)?, self.config.window);
        let mut copies: Vec<io::Result<Option<ChosenKeys>>> =
            lists.iter().map(|_| Ok(None)).collect();
        let slots = SharedMut::new(&mut copies);
        Pool::global().for_each(blocks.len(), |index| {
            let Some(tokens) = &lists[index] else { return };
            let at = blocks[index];
            let cut = (at.start + 1).saturating_sub(window);
            let (far, near): (Vec<_>, Vec<_>) = tokens.iter().map(|list| split(list, cut)).unzip();
            let copies = store.gather(at.layer, far, KeyForm::Rotated);
            let copies = copies.map(Arc::new);
            // SAFETY: each block has a slot of its own.
            unsafe {
                slots.slice(index, 1)[0] = copies.map(|copies| Some(ChosenKeys { copies, near }))
            };
        });
        let pairs = blocks.iter().zip(copies);
        let chosen = pairs.map(|(&block, keys)| keys.map(|keys| Chosen { block, keys }));
        chosen.collect()
    }

    /// What a block sees: its window, copies, and those of its own keys that some of its windows have passed.
    fn parts(&self, at: LayerAt, copies: Arc<Gathered>, near: Lists) -> Plan {
        let mut parts = vec![
            Window::part(at, self.config.window),
            Part {
                keys: Keys::Gathered(copies),
                mask: Mask::All,
                ..Part::causal(0..0)
            },
        ];
        if near.iter().any(|ranges| !ranges.is_empty()) {
            parts.push(Part {
                keys: Keys::PerQueryHead(near),
                mask: Mask::Beyond(self.config.window),
                ..Part::causal(0..0)
            });
        }
        Plan { parts }
    }
}

/// The shape of one block's search.
struct Sample {
    /// Tokens that its last query may see.
    visible: u64,
    /// Tokens of a key block, key blocks before the window, and those that are kept.
    width: u64,
    blocks: usize,
    beams: usize,
    /// Key blocks that are taken.
    keep: usize,
    /// There are more key blocks than are kept.
    searches: bool,
    /// The query heads of a kv head search together.
    shares: bool,
    /// Query or kv heads.
    units: usize,
    kv_heads: usize,
}

impl Sample {
    fn new(at: LayerAt, config: &HipConfig, layout: &KvLayout) -> Self {
        let (visible, decodes) = (at.end(), at.queries == 1);
        let reach = visible.saturating_sub(config.window);
        let width = if decodes {
            config.decode_block_k
        } else {
            config.block_k
        };
        Sample {
            visible,
            width,
            blocks: reach.div_ceil(width) as usize,
            beams: config.beams,
            keep: config.k.div_ceil(width) as usize,
            searches: reach > config.k,
            shares: match config.share {
                Share::None => false,
                Share::Decode => decodes,
                Share::Always => true,
            },
            units: 0,
            kv_heads: layout.num_kv_heads,
        }
    }

    fn of_heads(mut self, heads: usize) -> Self {
        self.units = if self.shares { self.kv_heads } else { heads };
        self
    }

    /// The queries that take part: [heads][rows][head_dim], so that heads of a kv head lie together. `skipped`: rows
    /// of `queries` before the block.
    fn queries(
        &self,
        at: LayerAt,
        skipped: usize,
        queries: &Queries<'_>,
        config: &HipConfig,
    ) -> Vec<f32> {
        let (heads, dim) = (queries.num_heads, queries.head_dim);
        let stride = match config.least_q {
            0 => config.stride_q,
            least => config.stride_q.min((at.queries / least).max(1)),
        };
        let rows: Vec<usize> = if at.queries < stride {
            (0..at.queries).collect()
        } else {
            (stride - 1..at.queries).step_by(stride).collect()
        };
        let mut sampled = vec![0f32; heads * rows.len() * dim];
        let mut all_heads = vec![0f32; heads * dim];
        for (index, &row) in rows.iter().enumerate() {
            let from = (skipped + row) * queries.stride;
            all_heads.copy_from_slice(&queries.data[from..][..heads * dim]);
            (queries.rotate)(at.start + row as u64, &mut all_heads);
            for (head, query) in all_heads.chunks_exact(dim).enumerate() {
                sampled[(head * rows.len() + index) * dim..][..dim].copy_from_slice(query);
            }
        }
        sampled
    }

    /// One unit's search: the key blocks found, and how many keys were compared.
    fn search(
        &self,
        representative: Representative,
        query: &[f32],
        store: &KvStore,
        planes: &[&[u8]],
        section: Range<usize>,
    ) -> (Vec<usize>, u64) {
        let (layout, width, visible) = (store.layout(), self.width, self.visible);
        let prober = Prober::new(&layout, query);
        let (mut scored, mut pieces, mut owners, mut partial) =
            (0, Vec::new(), Vec::new(), Vec::new());
        let (beams, keep) = (self.beams, self.keep);
        let blocks = search(self.blocks, beams, keep, representative, |blocks, out| {
            pieces.clear();
            owners.clear();
            for (index, &block) in blocks.iter().enumerate() {
                let mut token = block as u64 * width;
                let end = (token + width).min(visible);
                scored += end - token;
                while token < end {
                    let (page, slot) = store.place(token);
                    let count = (store.page_of(token).end.min(end) - token) as usize;
                    pieces.push(Piece {
                        keys: &planes[page][section.clone()],
                        slot,
                        count,
                    });
                    owners.push(index);
                    token += count as u64;
                }
            }
            if pieces.len() == blocks.len() {
                return prober.best_scores(&pieces, out);
            }
            // Blocks that lie on two pages.
            partial.resize(pieces.len(), 0.0);
            prober.best_scores(&pieces, &mut partial);
            out.fill(f32::NEG_INFINITY);
            for (&owner, &score) in owners.iter().zip(&partial) {
                out[owner] = out[owner].max(score);
            }
        });
        (blocks, scored)
    }
}

/// Sinks, then blocks in ascending order, as disjoint ranges.
fn union(
    sinks: impl Iterator<Item = Range<u64>>,
    blocks: impl Iterator<Item = Range<u64>>,
) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = sinks.collect();
    for block in blocks {
        match ranges.last_mut() {
            Some(last) if block.start <= last.end => last.end = last.end.max(block.end),
            _ => ranges.push(block),
        }
    }
    ranges
}

/// The parts of ranges below and from `cut` on.
fn split(ranges: &[Range<u64>], cut: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let clip = |from: u64, to: u64| {
        let ranges = ranges.iter().map(|r| r.start.max(from)..r.end.min(to));
        ranges.filter(|r| !r.is_empty()).collect()
    };
    (clip(0, cut), clip(cut, u64::MAX))
}

impl ContextPolicy for Hip {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            exec_block: Some(self.config.block_q),
            chunk: full::CHUNK / self.config.block_q * self.config.block_q,
            independent_blocks: true,
            ..PolicySpec::default()
        }
    }

    fn block(&self, at: LayerAt) -> usize {
        // Layers without a search take a call as a whole.
        if self.dense(at) {
            at.queries
        } else {
            self.config.block_q
        }
    }

    fn begin_layer(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<()> {
        if self.layers.len() < store.num_layers() {
            self.layers.resize_with(store.num_layers(), Cached::default);
            self.selected.resize(store.num_layers(), Vec::new());
        }
        self.chosen.clear();
        if at.queries == 1 || self.dense(at) {
            return Ok(());
        }
        // All blocks of the call at once: more work to share than one block's heads.
        let size = self.config.block_q;
        let blocks: Vec<LayerAt> = (0..at.queries)
            .step_by(size)
            .map(|first| LayerAt {
                start: at.start + first as u64,
                queries: size.min(at.queries - first),
                ..at
            })
            .filter(|block| block.queries > 1)
            .collect();
        self.chosen = self.choose(&blocks, queries, store)?;
        Ok(())
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        let dense = Plan {
            parts: vec![Part::causal(0..at.end())],
        };
        if self.layers.len() <= at.layer {
            return Err(io::Error::other(format!(
                "HiP: layer {} is planned before it began",
                at.layer
            )));
        }
        if self.dense(at) {
            self.layers[at.layer] = Cached::default();
            return Ok(dense);
        }
        if at.queries > 1 {
            self.layers[at.layer] = Cached::default();
            let same = |c: &Chosen| {
                let block = c.block;
                (block.layer, block.start, block.queries) == (at.layer, at.start, at.queries)
            };
            let chosen = match self.chosen.iter().position(same) {
                Some(index) => Some(self.chosen.remove(index)),
                None => self.choose(&[at], queries, store)?.pop(),
            };
            return Ok(match chosen.and_then(|chosen| chosen.keys) {
                Some(keys) => self.parts(at, keys.copies, keys.near),
                None => dense,
            });
        }
        let cached = &self.layers[at.layer];
        let fresh = cached.next == at.start && cached.age < self.config.refresh;
        if !fresh || cached.tokens.is_empty() {
            self.layers[at.layer] = Cached::default();
            let Some(tokens) = self.select(&[at], queries, store)?.pop().flatten() else {
                return Ok(dense);
            };
            self.layers[at.layer].cut = (at.start + 1).saturating_sub(self.config.window);
            self.layers[at.layer].tokens = tokens;
        }
        let cached = &mut self.layers[at.layer];
        let (units, kv_heads) = (cached.tokens.len(), store.layout().num_kv_heads);
        if units != queries.num_heads && units != kv_heads {
            return Err(io::Error::other(format!(
                "HiP: layer {} has selections of {units} heads, expected {} or {kv_heads}",
                at.layer, queries.num_heads
            )));
        }
        let (far, near): (Vec<_>, Vec<_>) = cached
            .tokens
            .iter()
            .map(|ranges| split(ranges, cached.cut))
            .unzip();
        let copies = match cached.copies.take() {
            Some(copies) => copies,
            None => Arc::new(store.gather(at.layer, far, KeyForm::Rotated)?),
        };
        cached.next = at.end();
        cached.age += 1;
        cached.copies = Some(copies.clone());
        Ok(self.parts(at, copies, near))
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        write_u64(out, self.layers.len() as u64)?;
        write_u64(out, self.searches)?;
        write_u64(out, self.scored)?;
        for cached in &self.layers {
            write_u64(out, cached.next)?;
            write_u64(out, cached.age)?;
            write_u64(out, cached.cut)?;
            write_lists(out, &cached.tokens)?;
        }
        Ok(())
    }

    fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        let count = read_u64(input)?;
        self.searches = read_u64(input)?;
        self.scored = read_u64(input)?;
        self.layers.clear();
        for _ in 0..count {
            self.layers.push(Cached {
                next: read_u64(input)?,
                age: read_u64(input)?,
                cut: read_u64(input)?,
                tokens: read_lists(input)?,
                copies: None,
            });
        }
        self.selected = vec![Vec::new(); self.layers.len()];
        Ok(())
    }

    fn report(&self) -> PolicyReport {
        let copies = self
            .layers
            .iter()
            .filter_map(|cached| cached.copies.as_ref());
        PolicyReport {
            index_bytes: copies.map(|copies| copies.bytes()).sum(),
            searches: self.searches,
            scored: self.scored,
            ..PolicyReport::default()
        }
    }
}

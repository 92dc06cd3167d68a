//! InfLLM: the first tokens, a sliding window, and the few blocks of the past that match the
//! current queries best, all inside one attention.
//!
//! For reading streams of any length with a short-window model at constant attention width,
//! nothing trained and nothing lost. Paper: arXiv 2402.04617.

mod cache;
mod state;

use super::{
    Angle, ColumnSums, ContextPolicy, Keys, LayerAt, Looks, Part, Plan, PolicyReport, PolicySpec,
    Queries, Window,
};
use crate::kv::{KeyForm, KvStore};
use cache::BlockCache;
use longspan_kernels::attention::{Mask, PAGE};
use longspan_kernels::elementwise::dot;
use longspan_kernels::pool::{Pool, SharedMut};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;

/// Which blocks leave memory first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evict {
    /// The one picked least recently.
    #[default]
    Lru,
    /// The one with the least decayed attention received (the paper's rule).
    LruS,
}

/// Who shares a pick of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Heads {
    /// All heads of a layer.
    #[default]
    Shared,
    /// Each query head picks its own.
    PerQueryHead,
}

/// How the last token of a question after a document picks its blocks; the first token of the answer follows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// By itself, as in the published code.
    LastAlone,
    /// With the whole question, if that fits `exec_block`: one word of an answer's beginning says little of what is asked.
    #[default]
    Whole,
}

/// `infllm:n_local=2048,block=64,topk=16,...`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InfLlmConfig {
    /// First tokens, always seen.
    pub n_init: u64,
    /// Last tokens seen at their true distance; default a quarter of the trained window.
    pub n_local: Option<u64>,
    /// Tokens of a block.
    pub block: u64,
    /// Blocks picked.
    pub topk: usize,
    /// Tokens that stand for a block.
    pub repr_topk: usize,
    /// Most queries that share a pick; at most `n_local`.
    pub exec_block: usize,
    /// Blocks per layer kept in memory when there is a disk tier; at least `topk`.
    pub max_cached: usize,
    /// Which blocks leave memory first.
    pub evict: Evict,
    /// Decay of `lru-s`.
    pub decay: f64,
    /// Who shares a pick.
    pub heads: Heads,
    /// How a question's last token picks.
    pub question: Question,
    /// Most tokens of one call, a multiple of `exec_block`; does not change results.
    pub chunk: usize,
    /// Reproduces the reference code's double counting of the newest remainder tokens in prefill.
    pub compat_overlap: bool,
}

impl Default for InfLlmConfig {
    fn default() -> Self {
        InfLlmConfig {
            n_init: 16,
            n_local: None,
            block: 64,
            topk: 16,
            repr_topk: 4,
            exec_block: 256,
            max_cached: 32,
            evict: Evict::Lru,
            decay: 0.1,
            heads: Heads::Shared,
            question: Question::Whole,
            chunk: 2048,
            compat_overlap: false,
        }
    }
}

/// What one layer remembers besides keys and values.
#[derive(Clone, Default)]
struct LayerState {
    /// Initial tokens taken so far.
    n0: u64,
    /// First token neither initial nor in a block.
    st: u64,
    /// Per query head the attention received by tokens from `st` on.
    scores: Vec<Vec<f32>>,
    /// Mean raw key of each block's representatives: [blocks, num_heads head_dim].
    repr: Vec<f32>,
    blocks: usize,
    cache: BlockCache,
    /// Relevance of the blocks that existed when the call began, per execution block:
    /// [blocks or blocks * num_heads].
    ahead: Vec<Vec<f32>>,
    call_start: u64,
    picked: Vec<usize>,
}

/// See the module's text.
#[derive(Clone)]
pub struct InfLlm {
    config: InfLlmConfig,
    n_local: u64,
    layers: Vec<LayerState>,
    report: PolicyReport,
    /// Picks of each block, if somebody watches.
    looks: Option<Looks>,
}

impl InfLlm {
    /// The configuration must have passed [`InfLlmConfig::check`].
    pub fn new(config: &InfLlmConfig, window: u64) -> Self {
        let n_local = config.local(window);
        InfLlm {
            config: config.clone(),
            n_local,
            layers: Vec::new(),
            report: PolicyReport::default(),
            looks: None,
        }
    }

    fn block_tokens(&self, block: usize) -> Range<u64> {
        let start = self.config.n_init + block as u64 * self.config.block;
        start..start + self.config.block
    }

    /// Relevance of blocks `range` to each of `probes` (mean queries at angle n_local - 1,
    /// [num_heads head_dim]); one value per block, or one per block and head.
    fn relevance(
        &self,
        repr: &[f32],
        width: usize,
        head_dim: usize,
        range: Range<usize>,
        probes: &[Vec<f32>],
    ) -> Vec<Vec<f32>> {
        let per_head = self.config.heads == Heads::PerQueryHead;
        let units = if per_head { width / head_dim } else { 1 };
        let mut all = vec![vec![0f32; range.len() * units]; probes.len()];
        let outs: Vec<SharedMut<f32>> = all
            .iter_mut()
            .map(|scores| SharedMut::new(scores))
            .collect();
        let score = |first: usize, count: usize| {
            for index in first..first + count {
                let block = range.start + index;
                let repr = &repr[block * width..(block + 1) * width];
                for (probe, out) in probes.iter().zip(&outs) {
                    // SAFETY: pieces are disjoint ranges of blocks.
                    let out = unsafe { out.slice(index * units, units) };
                    if per_head {
                        for (head, out) in out.iter_mut().enumerate() {
                            let part = head * head_dim..(head + 1) * head_dim;
                            *out = dot(&probe[part.clone()], &repr[part]);
                        }
                    } else {
                        out[0] = dot(probe, repr);
                    }
                }
            }
        };
        longspan_kernels::elementwise::split_rows(range.len(), width * probes.len().max(1), score);
        all
    }

    /// Mean of a block's queries, rotated to the constant angle: [num_heads head_dim].
    fn probe(&self, queries: &Queries<'_>, first: usize, count: usize) -> Vec<f32> {
        let width = queries.num_heads * queries.head_dim;
        let mut mean = vec![0f32; width];
        for index in first..first + count {
            longspan_kernels::elementwise::add_assign(
                &mut mean,
                &queries.data[index * queries.stride..][..width],
            );
        }
        mean.iter_mut().for_each(|x| *x /= count as f32);
        // Rotation is linear, so the mean of the rotated queries is the rotated mean.
        mean.chunks_exact_mut(queries.head_dim)
            .for_each(|head| (queries.rotate)(self.n_local - 1, head));
        mean
    }

    /// Indices of the `topk` largest scores, ascending; ties prefer the lower index.
    fn best(&self, scores: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        if order.len() > self.config.topk && self.config.topk > 0 {
            order.select_nth_unstable_by(self.config.topk - 1, |&a, &b| {
                scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
            });
        }
        order.truncate(self.config.topk);
        order.sort_unstable();
        order
    }

    /// The blocks each unit (layer, or query head) attends to.
    fn pick(&self, at: LayerAt, queries: &Queries<'_>) -> Vec<Vec<usize>> {
        let layer = &self.layers[at.layer];
        let units = if self.config.heads == Heads::PerQueryHead {
            queries.num_heads
        } else {
            1
        };
        if layer.blocks <= self.config.topk {
            return vec![(0..layer.blocks).collect(); units];
        }
        let index = ((at.start - layer.call_start) as usize) / self.config.exec_block;
        let width = queries.num_heads * queries.head_dim;
        let mut scores = layer.ahead[index].clone();
        let known = scores.len() / units;
        if known < layer.blocks {
            let probe = self.probe(queries, 0, at.queries);
            scores.extend(
                self.relevance(
                    &layer.repr,
                    width,
                    queries.head_dim,
                    known..layer.blocks,
                    &[probe],
                )
                .remove(0),
            );
        }
        if units == 1 {
            return vec![self.best(&scores)];
        }
        (0..units)
            .map(|unit| {
                self.best(
                    &scores
                        .iter()
                        .skip(unit)
                        .step_by(units)
                        .copied()
                        .collect::<Vec<_>>(),
                )
            })
            .collect()
    }

    /// Steps after a block's attention: initial tokens, then full blocks, leave the window.
    fn advance(&mut self, at: LayerAt, num_heads: usize, store: &mut KvStore) -> io::Result<()> {
        let (config, n_local, seen) = (&self.config, self.n_local, at.end());
        let layer = &mut self.layers[at.layer];
        if layer.n0 < config.n_init && seen - layer.st > n_local {
            let moved = (config.n_init - layer.n0).min(seen - layer.st - n_local);
            layer.n0 += moved;
            layer.st += moved;
            layer
                .scores
                .iter_mut()
                .for_each(|scores| drop(scores.drain(..moved as usize)));
        }
        let (layout, block) = (store.layout(), config.block as usize);
        let group = num_heads / layout.num_kv_heads;
        let mut key = vec![0f32; layout.head_dim];
        while seen - layer.st >= n_local + config.block {
            let tokens = layer.st..layer.st + config.block;
            let repr_topk = config.repr_topk.min(block);
            for head in 0..num_heads {
                let scores = &layer.scores[head][..block];
                let mut order: Vec<usize> = (0..block).collect();
                order.select_nth_unstable_by(repr_topk - 1, |&a, &b| {
                    scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
                });
                order[..repr_topk].sort_unstable();
                let at_head = layer.repr.len();
                layer.repr.resize(at_head + layout.head_dim, 0.0);
                for &index in &order[..repr_topk] {
                    store.raw_key(
                        at.layer,
                        tokens.start + index as u64,
                        head / group,
                        &mut key,
                    )?;
                    for (sum, k) in layer.repr[at_head..].iter_mut().zip(&key) {
                        *sum += k / repr_topk as f32;
                    }
                }
            }
            layer
                .scores
                .iter_mut()
                .for_each(|scores| drop(scores.drain(..block)));
            layer.blocks += 1;
            layer.st += config.block;
            layer
                .cache
                .settle(at.layer, tokens, layer.st, config, store)?;
        }
        store.release_rotated(at.layer, 0..(seen + 1).saturating_sub(n_local));
        Ok(())
    }
}

impl ContextPolicy for InfLlm {
    fn spec(&self) -> PolicySpec {
        let n_init = self.config.n_init as usize;
        PolicySpec {
            exec_block: Some(self.config.exec_block),
            whole_question: self.config.question == Question::Whole,
            chunk: self.config.chunk,
            raw_keys: true,
            // Blocks start at n_init: let pages start there too.
            first_page: if n_init.is_multiple_of(PAGE) {
                PAGE
            } else {
                n_init % PAGE
            },
            ..PolicySpec::default()
        }
    }

    fn begin_layer(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<()> {
        if self.layers.len() < store.num_layers() {
            self.layers
                .resize_with(store.num_layers(), LayerState::default);
        }
        let layer = &mut self.layers[at.layer];
        layer.scores.resize_with(queries.num_heads, Vec::new);
        layer.call_start = at.start;
        let layer = &self.layers[at.layer];
        let probes: Vec<Vec<f32>> = if layer.blocks > 0 && at.queries > 0 {
            let exec = self.config.exec_block;
            let count = at.queries.div_ceil(exec);
            let mut probes = vec![Vec::new(); count];
            let shared = SharedMut::new(&mut probes);
            Pool::global().for_each(count, |index| {
                let first = index * exec;
                // SAFETY: each index writes its own element.
                unsafe {
                    shared.slice(index, 1)[0] =
                        self.probe(queries, first, exec.min(at.queries - first))
                };
            });
            probes
        } else {
            vec![Vec::new(); at.queries.div_ceil(self.config.exec_block)]
        };
        // All execution blocks of the call are scored in one pass over the representatives.
        let width = queries.num_heads * queries.head_dim;
        let ahead = self.relevance(
            &layer.repr,
            width,
            queries.head_dim,
            0..layer.blocks,
            &probes,
        );
        self.layers[at.layer].ahead = ahead;
        Ok(())
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        let picks = self.pick(at, queries);
        let mut all: Vec<usize> = picks.iter().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        let layer = &mut self.layers[at.layer];
        let before = (layer.cache.loads, layer.cache.hits);
        layer
            .cache
            .admit(at.layer, &all, layer.st, &self.config, store)?;
        self.report.loads += layer.cache.loads - before.0;
        self.report.hits += layer.cache.hits - before.1;
        if let Some(looks) = &mut self.looks {
            let weight = 1.0 / picks.len() as f32;
            let picks = picks.iter().flatten();
            picks.for_each(|&block| looks.add(block as u64, weight));
        }
        layer.picked = all;

        let layer = &self.layers[at.layer];
        let far = |keys: Keys, column_sums: bool| Part {
            keys,
            form: KeyForm::Raw,
            angle: Angle::Fixed(self.n_local - 1),
            mask: if self.config.compat_overlap {
                Mask::All
            } else {
                Mask::Beyond(self.n_local)
            },
            column_sums,
        };
        let ranges = |picks: &Vec<usize>| {
            picks
                .iter()
                .map(|&block| self.block_tokens(block))
                .collect::<Vec<_>>()
        };
        let picked = match self.config.heads {
            Heads::Shared => Keys::Shared(ranges(&picks[0])),
            Heads::PerQueryHead => Keys::PerQueryHead(picks.iter().map(ranges).collect()),
        };
        let remainder = (at.end() - layer.st).saturating_sub(self.n_local);
        Ok(Plan {
            parts: vec![
                Part {
                    column_sums: true,
                    ..Window::part(at, self.n_local)
                },
                far(picked, self.config.evict == Evict::LruS),
                far(
                    Keys::Shared(vec![0..layer.n0, layer.st..layer.st + remainder]),
                    false,
                ),
            ],
        })
    }

    fn observe(
        &mut self,
        at: LayerAt,
        sums: &[Option<ColumnSums>],
        store: &mut KvStore,
    ) -> io::Result<()> {
        let layer = &mut self.layers[at.layer];
        let num_heads = layer.scores.len();
        if let Some(local) = &sums[0] {
            let width = local.tiles.len() * PAGE;
            for (head, scores) in layer.scores.iter_mut().enumerate() {
                scores.resize((at.end() - layer.st) as usize, 0.0);
                for (tile, (first, slots)) in local.tiles.iter().enumerate() {
                    let values = &local.values[head * width + tile * PAGE..][slots.clone()];
                    let token = first + slots.start as u64;
                    // Before the window is full, initial tokens may lie below `st`.
                    let skip = layer.st.saturating_sub(token) as usize;
                    if skip < values.len() {
                        let start = (token + skip as u64 - layer.st) as usize;
                        for (score, value) in scores[start..].iter_mut().zip(&values[skip..]) {
                            *score += value;
                        }
                    }
                }
            }
        }
        if let Some(far) = &sums[1] {
            let received = far.by_tokens(num_heads, |token| {
                (token - self.config.n_init) / self.config.block
            });
            layer.cache.receive(self.config.decay as f32, &received);
        }
        self.advance(at, num_heads, store)
    }

    fn fork(&self) -> Box<dyn ContextPolicy> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        state::save(self, out)
    }

    fn load(&mut self, input: &mut dyn Read) -> io::Result<()> {
        state::load(self, input)
    }

    fn watch(&mut self) {
        self.looks = Some(Looks::default());
    }

    fn looked(&self) -> Vec<(Range<u64>, f32)> {
        let looks = self.looks.as_ref();
        looks.map_or(Vec::new(), |looks| {
            looks.shares(|block| self.block_tokens(block as usize))
        })
    }

    fn report(&self) -> PolicyReport {
        PolicyReport {
            blocks: self.layers.iter().map(|layer| layer.blocks as u64).sum(),
            index_bytes: self
                .layers
                .iter()
                .map(|layer| 4 * layer.repr.len() as u64)
                .sum(),
            ..self.report.clone()
        }
    }
}

impl InfLlm {
    /// Device-resident block ids of a layer, ascending (for tests and reports).
    pub fn cached_blocks(&self, layer: usize) -> Vec<usize> {
        let mut blocks = self
            .layers
            .get(layer)
            .map(|layer| layer.cache.blocks())
            .unwrap_or_default();
        blocks.sort_unstable();
        blocks
    }

    /// Blocks that the last plan of a layer attended to, ascending.
    pub fn picked_blocks(&self, layer: usize) -> &[usize] {
        self.layers.get(layer).map_or(&[], |layer| &layer.picked)
    }

    /// Representatives of a layer's blocks: [blocks, num_heads head_dim].
    pub fn representatives(&self, layer: usize) -> &[f32] {
        self.layers.get(layer).map_or(&[], |layer| &layer.repr)
    }
}

impl InfLlmConfig {
    /// The defaults, scaled down for windows that they do not fit in.
    pub fn fitting(window: u64) -> Self {
        let mut config = InfLlmConfig::default();
        while config.check(window).is_err() && config.exec_block > 1 {
            config.exec_block /= 2;
            config.block = (config.block / 2).max(1);
            config.topk = (config.topk / 2).max(2);
            config.n_init = (config.n_init / 2).max(1);
            config.chunk = config.exec_block * 8;
        }
        config
    }

    /// `n_local` with its default for a model of this window.
    pub fn local(&self, window: u64) -> u64 {
        self.n_local.unwrap_or(window / 4).max(1)
    }

    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self, window: u64) -> Result<(), String> {
        let n_local = self.local(window);
        let positive = [
            ("block", self.block),
            ("repr_topk", self.repr_topk as u64),
            ("exec_block", self.exec_block as u64),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(format!("{name} is 0, expected at least 1"));
            }
        }
        if self.exec_block as u64 > n_local {
            return Err(format!(
                "exec_block is {}, expected at most n_local = {n_local}",
                self.exec_block
            ));
        }
        if self.max_cached < self.topk {
            return Err(format!(
                "max_cached is {}, expected at least topk = {}",
                self.max_cached, self.topk
            ));
        }
        if self.chunk == 0 || !self.chunk.is_multiple_of(self.exec_block) {
            return Err(format!(
                "chunk is {}, expected a multiple of exec_block = {}",
                self.chunk, self.exec_block
            ));
        }
        if self.evict == Evict::LruS && self.heads == Heads::PerQueryHead {
            return Err("evict=lru-s needs heads=shared: the attention a block receives is summed over heads".into());
        }
        let width = self.n_init
            + self.topk as u64 * self.block
            + self.block
            + self.exec_block as u64
            + n_local;
        if width > window {
            return Err(format!(
                "n_init + topk * block + block + exec_block + n_local = {width} tokens, more than the model's window of {window}; lower n_local or topk"
            ));
        }
        Ok(())
    }
}

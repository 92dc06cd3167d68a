//! HiP: a tree search over key ranges finds, for each block of queries and each head, the key
//! blocks that answer it best; the rest is skipped, nothing is dropped.
//!
//! For reading long texts in O(T log T) and decoding at a cost that hardly grows. Paper: arXiv
//! 2406.09827 (the version of ICLR 2025: a range stands for itself by its middle key).

use super::{ContextPolicy, Keys, LayerAt, Part, Plan, PolicyReport, PolicySpec, Queries, Window};
use super::{full, read_lists, write_lists};
use crate::kv::{Gathered, KeyForm, KvStore};
use crate::wire::{read_u64, write_u64};
use longspan_kernels::attention::Mask;
use longspan_kernels::block_scores::{Piece, best_scores};
use longspan_kernels::pool::{Pool, SharedMut};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// Which key block stands for a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Representative {
    /// The middle one.
    #[default]
    Center,
    /// The first one, as in the paper's first version.
    First,
}

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
            k: 512,
            block_q: 64,
            block_k: 2,
            decode_block_k: 16,
            share: Share::Decode,
            stride_q: 2,
            window: 256,
            sinks: 16,
            representative: Representative::Center,
            dense_layers: 3,
            refresh: 8,
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

/// The `beams` best of `blocks` key blocks by beam search over a binary tree of ranges, ascending.
/// `score(blocks, out)` rates key blocks.
pub fn search(
    blocks: usize,
    beams: usize,
    representative: Representative,
    mut score: impl FnMut(&[usize], &mut [f32]),
) -> Vec<usize> {
    if blocks <= beams {
        return (0..blocks).collect();
    }
    // (start, size); the ranges tile 0..blocks.
    let edge = |index: usize| blocks * index / beams;
    let mut ranges: Vec<(usize, usize)> = (0..beams)
        .map(|index| (edge(index), edge(index + 1) - edge(index)))
        .collect();
    let (mut children, mut probes, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    // Halvings of blocks / beams until it is at most 1.
    let mut width = beams;
    while width < blocks {
        width *= 2;
        children.clear();
        for &(start, size) in &ranges {
            let left = size / 2;
            children.push((start, left));
            children.push((start + left, size - left));
        }
        // A child of size 0 is dead; its sibling is alive.
        children.retain(|&(_, size)| size > 0);
        probes.clear();
        probes.extend(children.iter().map(|&(start, size)| match representative {
            Representative::First => start,
            Representative::Center => start + size / 2,
        }));
        scores.resize(probes.len(), 0.0);
        score(&probes, &mut scores);
        let mut order: Vec<usize> = (0..children.len()).collect();
        if order.len() > beams {
            order.select_nth_unstable_by(beams - 1, |&a, &b| {
                scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
            });
            order.truncate(beams);
            order.sort_unstable();
        }
        ranges.clear();
        ranges.extend(order.iter().map(|&index| children[index]));
    }
    ranges.into_iter().map(|(start, _)| start).collect()
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
    tokens: Vec<Vec<Range<u64>>>,
    /// Copies of those below `cut`; made anew after loading.
    copies: Option<Arc<Gathered>>,
}

/// See the module's text.
#[derive(Clone)]
pub struct Hip {
    config: HipConfig,
    layers: Vec<Cached>,
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
            selected: Vec::new(),
            scored: 0,
            searches: 0,
        }
    }

    /// First tokens of the key blocks that a layer's last search selected, per query head, or per kv head where its
    /// heads search together.
    pub fn selected(&self, layer: usize) -> &[Vec<u64>] {
        self.selected.get(layer).map_or(&[], Vec::as_slice)
    }

    /// Searches for one block of queries: selected tokens per query or kv head; None when that is all.
    fn select(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &KvStore,
    ) -> io::Result<Option<Vec<Vec<Range<u64>>>>> {
        let config = &self.config;
        let visible = at.end();
        let reach = visible.saturating_sub(config.window);
        let (heads, dim) = (queries.num_heads, queries.head_dim);
        let layout = store.layout();
        let decodes = at.queries == 1;
        let shares = match config.share {
            Share::None => false,
            Share::Decode => decodes,
            Share::Always => true,
        };
        let units = if shares { layout.num_kv_heads } else { heads };
        let width = if decodes {
            config.decode_block_k
        } else {
            config.block_k
        };
        let blocks = reach.div_ceil(width) as usize;
        if reach <= config.k {
            self.selected[at.layer] = (0..units)
                .map(|_| (0..blocks as u64).map(|b| b * width).collect())
                .collect();
            return Ok(None);
        }
        let beams = config.k.div_ceil(width) as usize;

        // Sampled queries, rotated: [heads][rows][head_dim], so that heads of a kv head lie together.
        let rows: Vec<usize> = if at.queries < config.stride_q {
            (0..at.queries).collect()
        } else {
            (config.stride_q - 1..at.queries)
                .step_by(config.stride_q)
                .collect()
        };
        let mut sampled = vec![0f32; heads * rows.len() * dim];
        let mut all_heads = vec![0f32; heads * dim];
        for (index, &row) in rows.iter().enumerate() {
            all_heads.copy_from_slice(&queries.data[row * queries.stride..][..heads * dim]);
            (queries.rotate)(at.start + row as u64, &mut all_heads);
            for (head, query) in all_heads.chunks_exact(dim).enumerate() {
                sampled[(head * rows.len() + index) * dim..][..dim].copy_from_slice(query);
            }
        }

        let group = units / layout.num_kv_heads;
        let of_unit = heads / units * rows.len() * dim;
        let planes = store.key_planes(at.layer, visible, KeyForm::Rotated)?;
        let mut found: Vec<(Vec<usize>, u64)> = vec![(Vec::new(), 0); units];
        let slots = SharedMut::new(&mut found);
        let one_unit = |unit: usize| {
            let section = layout.section(unit / group);
            let query = &sampled[unit * of_unit..(unit + 1) * of_unit];
            let (mut scored, mut pieces, mut owners, mut partial) =
                (0, Vec::new(), Vec::new(), Vec::new());
            let blocks = search(blocks, beams, config.representative, |blocks, out| {
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
                    return best_scores(&layout, &pieces, query, out);
                }
                // Blocks that lie on two pages.
                partial.resize(pieces.len(), 0.0);
                best_scores(&layout, &pieces, query, &mut partial);
                out.fill(f32::NEG_INFINITY);
                for (&owner, &score) in owners.iter().zip(&partial) {
                    out[owner] = out[owner].max(score);
                }
            });
            // SAFETY: each unit has a slot of its own.
            unsafe { slots.slice(unit, 1)[0] = (blocks, scored) };
        };
        Pool::global().for_each(units, one_unit);
        self.searches += units as u64;
        self.scored += found.iter().map(|(_, scored)| scored).sum::<u64>();
        self.selected[at.layer] = found
            .iter()
            .map(|(blocks, _)| blocks.iter().map(|&b| b as u64 * width).collect())
            .collect();
        let tokens = self.selected[at.layer].iter().map(|starts| {
            let sinks = std::iter::once(0..config.sinks.min(visible)).filter(|r| !r.is_empty());
            let blocks = starts.iter().map(|&s| s..(s + width).min(visible));
            union(sinks, blocks)
        });
        Ok(Some(tokens.collect()))
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
            ..PolicySpec::default()
        }
    }

    fn block(&self, at: LayerAt) -> usize {
        // Layers without a search take a call as a whole.
        if at.layer < self.config.dense_layers || (!self.config.prefill && at.queries > 1) {
            at.queries
        } else {
            self.config.block_q
        }
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        if self.layers.len() < store.num_layers() {
            self.layers.resize_with(store.num_layers(), Cached::default);
            self.selected.resize(store.num_layers(), Vec::new());
        }
        let dense = Plan {
            parts: vec![Part::causal(0..at.end())],
        };
        if at.layer < self.config.dense_layers || (!self.config.prefill && at.queries > 1) {
            self.layers[at.layer] = Cached::default();
            return Ok(dense);
        }
        let window = self.config.window;
        let cached = &self.layers[at.layer];
        let fresh = cached.next == at.start && cached.age < self.config.refresh;
        if at.queries > 1 || !fresh || cached.tokens.is_empty() {
            self.layers[at.layer] = Cached::default();
            let Some(tokens) = self.select(at, queries, store)? else {
                return Ok(dense);
            };
            // Keys that have left the window of the block's first query have left all windows.
            self.layers[at.layer].cut = (at.start + 1).saturating_sub(window);
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
        let mut parts = vec![
            Window::part(at, window),
            Part {
                keys: Keys::Gathered(copies.clone()),
                mask: Mask::All,
                ..Part::causal(0..0)
            },
        ];
        if near.iter().any(|ranges| !ranges.is_empty()) {
            parts.push(Part {
                keys: Keys::PerQueryHead(near),
                mask: Mask::Beyond(window),
                ..Part::causal(0..0)
            });
        }
        if at.queries == 1 {
            cached.next = at.end();
            cached.age += 1;
            cached.copies = Some(copies);
        } else {
            *cached = Cached::default();
        }
        Ok(Plan { parts })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn uniform(state: &mut u64) -> f64 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (*state >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(state: &mut u64) -> f64 {
        let (a, b) = (uniform(state).max(1e-300), uniform(state));
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    #[test]
    fn a_wide_search_is_the_exact_best() {
        let mut state = 1;
        for representative in [Representative::Center, Representative::First] {
            for (blocks, beams) in [(7, 7), (9, 5), (20, 10), (63, 40), (64, 32), (101, 77)] {
                let scores: Vec<f32> = (0..blocks).map(|_| uniform(&mut state) as f32).collect();
                let mut found = search(blocks, beams, representative, |probe, out| {
                    for (out, &block) in out.iter_mut().zip(probe) {
                        *out = scores[block];
                    }
                });
                // Where every range holds two blocks at most, each is looked at.
                let mut order: Vec<usize> = (0..blocks).collect();
                order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                order.truncate(beams);
                order.sort_unstable();
                found.sort_unstable();
                assert_eq!(found, order, "{blocks} blocks, {beams} beams");
            }
        }
    }

    #[test]
    fn planted_peaks_are_found_and_cost_is_logarithmic() {
        let (mut state, keys, beams) = (7u64, 4096usize, 64usize);
        let blocks = keys / 2;
        for representative in [Representative::Center, Representative::First] {
            for draw in 0..200 {
                let at = (uniform(&mut state) * keys as f64) as usize;
                let width = keys as f64 / if draw % 2 == 0 { 64.0 } else { 256.0 };
                let scores: Vec<f64> = (0..keys)
                    .map(|key| {
                        let x = (key as f64 - at as f64) / width;
                        (-x * x / 2.0).exp() + 0.02 * normal(&mut state)
                    })
                    .collect();
                let best = (0..keys)
                    .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))
                    .unwrap();
                let mut looks = 0;
                let found = search(blocks, beams, representative, |probe, out| {
                    looks += probe.len();
                    for (out, &block) in out.iter_mut().zip(probe) {
                        *out = scores[2 * block].max(scores[2 * block + 1]) as f32;
                    }
                });
                assert!(found.contains(&(best / 2)), "draw {draw}: {best} is lost");
                // 2 m a halving, log2(n / m) halvings.
                assert!(looks <= 2 * beams * 5, "{looks} blocks were scored");
            }
        }
    }

    #[test]
    fn one_beam_needs_the_middle_key() {
        let (mut state, keys, draws) = (3u64, 4096usize, 300);
        let mut hits = [0; 2];
        for _ in 0..draws {
            let at = (uniform(&mut state) * keys as f64) as usize;
            let scores: Vec<f64> = (0..keys)
                .map(|key| {
                    let far = (key as f64 - at as f64).abs();
                    (-far / 512.0).exp() + 0.005 * normal(&mut state)
                })
                .collect();
            let best = (0..keys)
                .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))
                .unwrap();
            for (hits, representative) in hits
                .iter_mut()
                .zip([Representative::Center, Representative::First])
            {
                let found = search(keys / 2, 1, representative, |probe, out| {
                    for (out, &block) in out.iter_mut().zip(probe) {
                        *out = scores[2 * block].max(scores[2 * block + 1]) as f32;
                    }
                });
                *hits += usize::from(found == [best / 2]);
            }
        }
        let [center, first] = hits.map(|hits| hits as f64 / draws as f64);
        assert!(
            center >= 0.5 && first <= 0.1,
            "center {center}, first {first}"
        );
    }
}

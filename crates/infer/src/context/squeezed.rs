//! Squeezed Attention: the keys of a fixed prefix are clustered once; each question then compares
//! its queries with the centroids and attends exactly to the clusters that matter.
//!
//! For asking many questions of one long document at a fraction of the keys read. Paper: arXiv
//! 2411.09688.

pub mod kmeans;
mod state;

use super::hip::Share;
use super::{Call, ContextPolicy, Keys, LayerAt, Part, Plan, PolicyReport, PolicySpec, Queries};
use crate::kv::{Gathered, KeyForm, KvStore};
use longspan_kernels::attention::Mask;
use longspan_kernels::block_scores::{Panels, cluster_scores};
use longspan_kernels::elementwise::dot;
use longspan_kernels::pool::{Pool, SharedMut};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// `squeezed:PERCENTILE,LOWER`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SqueezedConfig {
    /// Share of the prefix's keys that is skipped, on average over the model.
    pub percentile: f64,
    /// The same for a first, coarser level of clusters that decides which fine ones are looked at;
    /// none = one level.
    pub lower: Option<f64>,
    /// Clusters in percent of the keys.
    pub clusters: f64,
    /// Coarse clusters in percent of the keys.
    pub coarse: f64,
    /// Last tokens of the prefix: they set the thresholds and are always seen.
    pub obs: usize,
    /// First tokens of the prefix that are always seen and not clustered: a model leans on them, and a cluster
    /// hides what it leans on.
    pub sinks: usize,
    /// Decoded tokens that share a choice of clusters; 1 is the paper's.
    pub refresh: u64,
    /// Which query heads see what any of them chose.
    pub share: Share,
    /// Most rounds of k-means.
    pub iterations: usize,
    /// Seed of the first centres.
    pub seed: u64,
}

impl Default for SqueezedConfig {
    fn default() -> Self {
        SqueezedConfig {
            percentile: 0.7,
            lower: None,
            clusters: 5.0,
            coarse: 1.0,
            obs: 100,
            sinks: 4,
            refresh: 1,
            share: Share::Decode,
            iterations: 300,
            seed: 0,
        }
    }
}

impl SqueezedConfig {
    /// Refuses impossible values; the text names the option, the value and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("percentile", self.percentile),
            ("lower", self.lower.unwrap_or(0.0)),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(format!(
                    "{name} is {value}, expected at least 0 and below 1"
                ));
            }
        }
        for (name, value) in [("clusters", self.clusters), ("coarse", self.coarse)] {
            if !(value > 0.0 && value <= 100.0) {
                return Err(format!("{name} is {value} percent, expected 0 to 100"));
            }
        }
        if self.obs == 0 {
            return Err("obs is 0, expected at least 1".into());
        }
        if self.refresh == 0 {
            return Err("refresh is 0, expected at least 1".into());
        }
        Ok(())
    }
}

/// The clusters of one layer's and kv head's keys. Keys of a cluster lie side by side in the store,
/// and so do the clusters of a coarse one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clusters {
    /// [clusters, head_dim], means of the keys.
    pub centroids: Vec<f32>,
    /// First slot of each cluster, and the end of the last.
    pub starts: Vec<u32>,
    /// Coarse level: [coarse, head_dim], unweighted means of centroids; empty without one.
    pub coarse: Vec<f32>,
    /// First cluster of each coarse one, and the end of the last.
    pub coarse_starts: Vec<u32>,
    /// Made of the above.
    panels: Panels,
    coarse_panels: Panels,
}

impl Clusters {
    fn count(&self, cluster: usize) -> f32 {
        (self.starts[cluster + 1] - self.starts[cluster]) as f32
    }

    /// Keys of each cluster.
    fn counts(&self) -> Vec<f32> {
        (0..self.starts.len() - 1).map(|c| self.count(c)).collect()
    }

    /// Keys of each coarse cluster.
    fn coarse_counts(&self) -> Vec<f32> {
        let key = |cluster: u32| self.starts[cluster as usize];
        let pairs = self.coarse_starts.windows(2);
        pairs
            .map(|pair| (key(pair[1]) - key(pair[0])) as f32)
            .collect()
    }

    fn with_panels(mut self, dim: usize) -> Self {
        self.panels = Panels::new(&self.centroids, dim);
        self.coarse_panels = Panels::new(&self.coarse, dim);
        self
    }

    /// Clusters labelled keys [n, dim]: orders them so that members lie together. Returns the order
    /// of the keys too. `coarse`: label of each cluster, and the number of coarse ones.
    pub fn new(
        keys: &[f32],
        dim: usize,
        labels: &[u32],
        k: usize,
        coarse: Option<(&[u32], usize)>,
    ) -> (Self, Vec<u64>) {
        let (centroids, _) = kmeans::means(keys, dim, labels, k);
        let mut by_place: Vec<usize> = (0..k).collect();
        if let Some((coarse, _)) = coarse {
            by_place.sort_by_key(|&cluster| coarse[cluster]);
        }
        let mut place = vec![0; k];
        by_place
            .iter()
            .enumerate()
            .for_each(|(at, &cluster)| place[cluster] = at);
        let mut order: Vec<u64> = (0..labels.len() as u64).collect();
        order.sort_by_key(|&key| place[labels[key as usize] as usize]);
        let mut starts = vec![0u32; k + 1];
        labels
            .iter()
            .for_each(|&label| starts[place[label as usize] + 1] += 1);
        (0..k).for_each(|c| starts[c + 1] += starts[c]);
        let row = |cluster: usize| {
            centroids[cluster * dim..(cluster + 1) * dim]
                .iter()
                .copied()
        };
        let mut clusters = Clusters {
            centroids: by_place.iter().flat_map(|&cluster| row(cluster)).collect(),
            starts,
            ..Clusters::default()
        };
        if let Some((labels, coarse)) = coarse {
            (clusters.coarse, _) = kmeans::means(&centroids, dim, labels, coarse);
            clusters.coarse_starts = vec![0; coarse + 1];
            labels
                .iter()
                .for_each(|&label| clusters.coarse_starts[label as usize + 1] += 1);
            (0..coarse).for_each(|c| clusters.coarse_starts[c + 1] += clusters.coarse_starts[c]);
        }
        (clusters.with_panels(dim), order)
    }

    /// Scores of all clusters for queries [n, dim] of one query head.
    fn scores(&self, queries: &[f32], scale: f32) -> Vec<f32> {
        scores_of(&self.panels, &self.counts(), queries, scale)
    }

    /// Scores of all coarse clusters.
    fn coarse_scores(&self, queries: &[f32], scale: f32) -> Vec<f32> {
        scores_of(&self.coarse_panels, &self.coarse_counts(), queries, scale)
    }

    /// The slots whose cluster scores above `threshold`, as ranges, and how many centroids were
    /// looked at. With a coarse threshold only the clusters of coarse ones above it compete.
    pub fn kept(
        &self,
        queries: &[f32],
        scale: f32,
        threshold: f32,
        coarse: Option<f32>,
    ) -> (Vec<Range<u64>>, u64) {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut add = |cluster: usize| {
            let slots = u64::from(self.starts[cluster])..u64::from(self.starts[cluster + 1]);
            match ranges.last_mut() {
                Some(last) if last.end == slots.start => last.end = slots.end,
                _ if slots.is_empty() => {}
                _ => ranges.push(slots),
            }
        };
        let Some(coarse) = coarse else {
            let scores = self.scores(queries, scale);
            (0..scores.len())
                .filter(|&cluster| scores[cluster] > threshold)
                .for_each(&mut add);
            return (ranges, scores.len() as u64);
        };
        let above = self.coarse_scores(queries, scale);
        let clusters: Vec<usize> = (0..above.len())
            .filter(|&c| above[c] > coarse)
            .flat_map(|c| self.coarse_starts[c] as usize..self.coarse_starts[c + 1] as usize)
            .collect();
        let looked = (above.len() + clusters.len()) as u64;
        if clusters.is_empty() {
            return (ranges, looked);
        }
        let dim = self.centroids.len() / (self.starts.len() - 1);
        let mut logits: Vec<f32> = queries
            .chunks_exact(dim)
            .flat_map(|query| {
                let row = |&c: &usize| dot(query, &self.centroids[c * dim..(c + 1) * dim]);
                clusters.iter().map(row)
            })
            .collect();
        let counts: Vec<f32> = clusters.iter().map(|&c| self.count(c)).collect();
        let mut scores = vec![0f32; clusters.len()];
        cluster_scores(&mut logits, clusters.len(), &counts, scale, &mut scores);
        clusters
            .iter()
            .zip(&scores)
            .filter(|(_, score)| **score > threshold)
            .for_each(|(&cluster, _)| add(cluster));
        (ranges, looked)
    }
}

fn scores_of(panels: &Panels, counts: &[f32], queries: &[f32], scale: f32) -> Vec<f32> {
    let mut logits = Vec::new();
    let stride = panels.products(queries, &mut logits);
    let mut scores = vec![0f32; counts.len()];
    cluster_scores(&mut logits, stride, counts, scale, &mut scores);
    scores
}

/// Quantiles (linearly interpolated between ranks) of scores that occur `count` times each.
pub fn quantiles(mut scores: Vec<(f32, f32)>, quantiles: &[f64]) -> Vec<f32> {
    scores.retain(|&(_, count)| count > 0.0);
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = scores.iter().map(|&(_, count)| f64::from(count)).sum();
    let at_rank = |rank: f64| {
        let mut passed = 0f64;
        for &(score, count) in &scores {
            passed += f64::from(count);
            if passed > rank {
                return f64::from(score);
            }
        }
        scores.last().map_or(0.0, |last| f64::from(last.0))
    };
    let value = |&quantile: &f64| {
        let rank = quantile * (total - 1.0).max(0.0);
        let (low, share) = (rank.floor(), rank.fract());
        let (a, b) = (at_rank(low), at_rank(low + 1.0));
        (a + (b - a) * share) as f32
    };
    quantiles.iter().map(value).collect()
}

/// What is known of a sealed prefix.
#[derive(Debug, Default, PartialEq)]
struct Index {
    /// Tokens of the prefix; those before and below `clustered` are clustered, but for the first `sinks`.
    prefix: u64,
    sinks: u64,
    clustered: u64,
    threshold: f32,
    coarse_threshold: Option<f32>,
    /// By layer and kv head; empty for layers that the policy does not govern.
    clusters: Vec<Vec<Clusters>>,
}

/// A choice of clusters shared by decoded tokens.
#[derive(Clone, Default)]
struct Cached {
    /// Position that may use it next.
    next: u64,
    /// Tokens that have used it.
    age: u64,
    /// Per query head, or per kv head: slots of the prefix, the first tokens among them.
    slots: Vec<Vec<Range<u64>>>,
    /// Copies of them; made anew after loading.
    copies: Option<Arc<Gathered>>,
}

/// See the module's text.
#[derive(Clone)]
pub struct Squeezed {
    config: SqueezedConfig,
    /// Factor of the logits.
    scale: f32,
    /// Until the prefix is sealed: the last rotated queries of each layer, [obs, heads head_dim].
    queries: Vec<Vec<f32>>,
    num_heads: usize,
    index: Option<Arc<Index>>,
    /// By layer, while decoding.
    cached: Vec<Cached>,
    scored: u64,
    offered: u64,
    taken: u64,
}

/// One layer's and kv head's keys [n, head_dim], and their clusters' centres to start from.
type Start<'a> = &'a (dyn Fn(usize, usize, &[f64], usize) -> Vec<f64> + Sync);

impl Squeezed {
    /// The configuration must have passed [`SqueezedConfig::check`].
    pub fn new(config: &SqueezedConfig) -> Self {
        Squeezed {
            config: config.clone(),
            scale: 0.0,
            queries: Vec::new(),
            num_heads: 0,
            index: None,
            cached: Vec::new(),
            scored: 0,
            offered: 0,
            taken: 0,
        }
    }

    /// The clusters of a layer's kv head, once the prefix is sealed.
    pub fn clusters(&self, layer: usize, kv_head: usize) -> Option<&Clusters> {
        self.index.as_ref()?.clusters.get(layer)?.get(kv_head)
    }

    /// The thresholds of the two levels, once the prefix is sealed.
    pub fn thresholds(&self) -> Option<(f32, Option<f32>)> {
        let index = self.index.as_ref()?;
        Some((index.threshold, index.coarse_threshold))
    }

    /// Clusters the prefix, moves the members of clusters together in the store and sets the
    /// thresholds. `first(layer, kv_head, points, k)` gives the centres to start from.
    fn build(
        &mut self,
        layers: &[usize],
        store: &mut KvStore,
        sizes: (usize, Option<usize>),
        first: Start<'_>,
    ) -> io::Result<()> {
        let (layout, prefix) = (store.layout(), store.len(layers[0]));
        let sinks = self.config.sinks;
        let (n, dim) = (prefix as usize - self.config.obs - sinks, layout.head_dim);
        let kv_heads = layout.num_kv_heads;
        let tasks: Vec<(usize, usize)> = layers
            .iter()
            .flat_map(|&layer| (0..kv_heads).map(move |head| (layer, head)))
            .collect();
        let mut made: Vec<io::Result<(Clusters, Vec<u64>)>> =
            tasks.iter().map(|_| Ok(Default::default())).collect();
        let slots = SharedMut::new(&mut made);
        let one = |task: usize| {
            let (layer, head) = tasks[task];
            let result = keys_of(store, layer, head, sinks..sinks + n).map(|keys| {
                let points = kmeans::normalised(&keys, dim);
                let (k, coarse) = sizes;
                let iterations = self.config.iterations;
                let start = first(layer, head, &points, k);
                let labels = kmeans::lloyd(&points, dim, start, iterations);
                let coarse = coarse.map(|coarse| {
                    let (centroids, _) = kmeans::means(&keys, dim, &labels, k);
                    let points = kmeans::normalised(&centroids, dim);
                    let start = first(layer, head, &points, coarse);
                    (kmeans::lloyd(&points, dim, start, iterations), coarse)
                });
                let coarse = coarse.as_ref().map(|(labels, k)| (&labels[..], *k));
                Clusters::new(&keys, dim, &labels, k, coarse)
            });
            // SAFETY: each task has a slot of its own.
            unsafe { slots.slice(task, 1)[0] = result };
        };
        Pool::global().for_each(tasks.len(), one);
        let mut clusters: Vec<Vec<Clusters>> = vec![Vec::new(); store.num_layers()];
        let mut orders: Vec<Vec<Vec<u64>>> = vec![Vec::new(); store.num_layers()];
        for (&(layer, _), made) in tasks.iter().zip(made) {
            let (made, order) = made?;
            let sinks = sinks as u64;
            let order = order.into_iter().map(|key| sinks + key);
            let order = (0..sinks).chain(order).chain(sinks + n as u64..prefix);
            clusters[layer].push(made);
            orders[layer].push(order.collect());
        }
        for &layer in layers {
            store.rearrange(layer, &orders[layer], false)?;
        }

        // Thresholds over all layers, heads and keys.
        let group = self.num_heads / kv_heads;
        let (mut fine, mut coarse) = (Vec::new(), Vec::new());
        for &layer in layers {
            for head in 0..self.num_heads {
                let clusters = &clusters[layer][head / group];
                let queries = of_head(&self.queries[layer], self.num_heads, dim, head);
                let scores = clusters.scores(&queries, self.scale);
                fine.extend(scores.into_iter().zip(clusters.counts()));
                if sizes.1.is_some() {
                    let scores = clusters.coarse_scores(&queries, self.scale);
                    coarse.extend(scores.into_iter().zip(clusters.coarse_counts()));
                }
            }
        }
        // Percentile 0 keeps everything, also the key with the lowest score.
        let at = |scores: Vec<(f32, f32)>, percentile: f64| match percentile {
            0.0 => -1.0,
            percentile => quantiles(scores, &[percentile])[0],
        };
        self.index = Some(Arc::new(Index {
            prefix,
            sinks: sinks as u64,
            clustered: (sinks + n) as u64,
            threshold: at(fine, self.config.percentile),
            coarse_threshold: self.config.lower.map(|lower| at(coarse, lower)),
            clusters,
        }));
        self.queries = Vec::new();
        self.cached = vec![Cached::default(); store.num_layers()];
        Ok(())
    }

    /// The slots of the prefix that a block's queries see, per query head, or per kv head where `shares`.
    fn choose(
        &mut self,
        index: &Index,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &KvStore,
        shares: bool,
    ) -> io::Result<Vec<Vec<Range<u64>>>> {
        let (heads, dim) = (queries.num_heads, queries.head_dim);
        let kv_heads = store.layout().num_kv_heads;
        let clusters = index.clusters.get(at.layer).map_or(&[][..], Vec::as_slice);
        let fits = |c: &Clusters| c.centroids.len() == (c.starts.len() - 1) * dim;
        if clusters.len() != kv_heads || !clusters.iter().all(fits) {
            return Err(io::Error::other(format!(
                "Squeezed Attention: layer {} has clusters of {} kv heads, expected {kv_heads} of width {dim}",
                at.layer,
                clusters.len()
            )));
        }
        let group = heads / kv_heads;
        let rows = rotated(at, queries, 0);
        let mut kept: Vec<(Vec<Range<u64>>, u64)> = vec![(Vec::new(), 0); heads];
        let slots = SharedMut::new(&mut kept);
        let one = |head: usize| {
            let queries = of_head(&rows, heads, dim, head);
            let (threshold, coarse) = (index.threshold, index.coarse_threshold);
            let found = clusters[head / group].kept(&queries, self.scale, threshold, coarse);
            // SAFETY: each head has a slot of its own.
            unsafe { slots.slice(head, 1)[0] = found };
        };
        Pool::global().for_each(heads, one);
        self.scored += kept.iter().map(|(_, looked)| looked).sum::<u64>();
        self.offered += heads as u64 * (index.clustered - index.sinks);
        let taken = kept.iter().flat_map(|(ranges, _)| ranges);
        self.taken += taken.map(|range| range.end - range.start).sum::<u64>();
        let together = if shares { group } else { 1 };
        let lists = kept.chunks(together).map(|heads| {
            let ranges = heads.iter().flat_map(|(ranges, _)| ranges);
            let moved = ranges.map(|r| index.sinks + r.start..index.sinks + r.end);
            let sinks = (index.sinks > 0).then_some(0..index.sinks);
            union(sinks.into_iter().chain(moved).collect())
        });
        Ok(lists.collect())
    }

    /// [`ContextPolicy::seal`] with given cluster counts and first centres, for goldens.
    pub fn seal_from(
        &mut self,
        layers: &[usize],
        store: &mut KvStore,
        sizes: (usize, Option<usize>),
        first: Start<'_>,
    ) -> io::Result<()> {
        self.build(layers, store, sizes, first)
    }
}

/// Ranges in ascending order, those that touch or overlap as one.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// Rotated keys of some slots of one head: [slots, head_dim].
fn keys_of(
    store: &KvStore,
    layer: usize,
    kv_head: usize,
    slots: Range<usize>,
) -> io::Result<Vec<f32>> {
    let layout = store.layout();
    let planes = store.key_planes(layer, slots.end as u64, KeyForm::Rotated)?;
    let mut keys = vec![0f32; slots.len() * layout.head_dim];
    for (slot, key) in slots.zip(keys.chunks_exact_mut(layout.head_dim)) {
        let (page, slot) = store.place(slot as u64);
        layout.read_key(planes[page], kv_head, slot, key);
    }
    Ok(keys)
}

/// One head of rows [n, heads head_dim]: [n, head_dim].
fn of_head(rows: &[f32], num_heads: usize, dim: usize, head: usize) -> Vec<f32> {
    rows.chunks_exact(num_heads * dim)
        .flat_map(|row| row[head * dim..(head + 1) * dim].iter().copied())
        .collect()
}

/// All rows of queries, rotated: [n, heads head_dim].
fn rotated(at: LayerAt, queries: &Queries<'_>, first: usize) -> Vec<f32> {
    let width = queries.num_heads * queries.head_dim;
    let mut rows = vec![0f32; (at.queries - first) * width];
    for (index, row) in rows.chunks_exact_mut(width).enumerate() {
        row.copy_from_slice(&queries.data[(first + index) * queries.stride..][..width]);
        (queries.rotate)(at.start + (first + index) as u64, row);
    }
    rows
}

impl ContextPolicy for Squeezed {
    fn spec(&self) -> PolicySpec {
        PolicySpec {
            rearranges: true,
            ..PolicySpec::default()
        }
    }

    fn begin_call(&mut self, call: &Call<'_>, store: &mut KvStore) -> io::Result<()> {
        // A question asked of a prefix that was not sealed: now it is complete.
        if call.round.is_some() {
            self.seal(call.layers, store)?;
        }
        Ok(())
    }

    fn seal(&mut self, layers: &[usize], store: &mut KvStore) -> io::Result<()> {
        let Some(&layer) = layers.first() else {
            return Ok(());
        };
        let n = (store.len(layer) as usize).saturating_sub(self.config.obs + self.config.sinks);
        // A text of little more than the observed tokens is read as it is.
        if self.index.is_some() || n == 0 || self.queries.is_empty() {
            return Ok(());
        }
        let share = |percent: f64| ((percent / 100.0 * n as f64) as usize).clamp(1, n);
        let k = share(self.config.clusters);
        let coarse = share(self.config.coarse).min(k);
        let sizes = (k, self.config.lower.map(|_| coarse));
        let (dim, seed) = (store.layout().head_dim, self.config.seed);
        let first = |_: usize, _: usize, points: &[f64], k: usize| {
            kmeans::first_centres(points, dim, k, seed)
        };
        self.build(layers, store, sizes, &first)
    }

    fn begin_layer(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<()> {
        self.num_heads = queries.num_heads;
        self.scale = queries.scale;
        if self.index.is_none() {
            self.queries.resize(store.num_layers(), Vec::new());
            let width = queries.num_heads * queries.head_dim;
            let rows = rotated(at, queries, at.queries.saturating_sub(self.config.obs));
            let kept = &mut self.queries[at.layer];
            kept.extend(rows);
            let surplus = (kept.len() / width).saturating_sub(self.config.obs);
            kept.drain(..surplus * width);
        }
        Ok(())
    }

    fn plan(
        &mut self,
        at: LayerAt,
        queries: &Queries<'_>,
        store: &mut KvStore,
    ) -> io::Result<Plan> {
        let Some(index) = self.index.clone() else {
            return Ok(Plan {
                parts: vec![Part::causal(0..at.end())],
            });
        };
        let decodes = at.queries == 1;
        let shares = match self.config.share {
            Share::None => false,
            Share::Decode => decodes,
            Share::Always => true,
        };
        let dense = Part::causal(index.clustered..at.end());
        let sparse = |keys: Keys| Part {
            keys,
            mask: Mask::All,
            ..Part::causal(0..0)
        };
        // A choice that serves one call is read where it lies; one that is shared is copied together first.
        if !decodes || self.config.refresh == 1 {
            self.cached[at.layer] = Cached::default();
            let lists = self.choose(&index, at, queries, store, shares)?;
            return Ok(Plan {
                parts: vec![sparse(Keys::PerQueryHead(lists)), dense],
            });
        }
        let cached = &self.cached[at.layer];
        let fresh = cached.next == at.start && cached.age < self.config.refresh;
        if !fresh || cached.slots.is_empty() {
            self.cached[at.layer] = Cached {
                slots: self.choose(&index, at, queries, store, shares)?,
                ..Cached::default()
            };
        }
        let cached = &mut self.cached[at.layer];
        let (lists, kv_heads) = (cached.slots.len(), store.layout().num_kv_heads);
        if lists != queries.num_heads && lists != kv_heads {
            return Err(io::Error::other(format!(
                "Squeezed Attention: layer {} has choices of {lists} heads, expected {} or {kv_heads}",
                at.layer, queries.num_heads
            )));
        }
        let copies = match cached.copies.take() {
            Some(copies) => copies,
            None => Arc::new(store.gather(at.layer, cached.slots.clone(), KeyForm::Rotated)?),
        };
        cached.next = at.end();
        cached.age += 1;
        cached.copies = Some(copies.clone());
        Ok(Plan {
            parts: vec![sparse(Keys::Gathered(copies)), dense],
        })
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

    fn report(&self) -> PolicyReport {
        let index = self.index.iter().flat_map(|index| &index.clusters);
        let bytes = |c: &Clusters| {
            let level = |rows: usize, starts: usize| 8 * rows + 4 * starts;
            level(c.centroids.len(), c.starts.len()) + level(c.coarse.len(), c.coarse_starts.len())
        };
        let copies = self
            .cached
            .iter()
            .filter_map(|cached| cached.copies.as_ref());
        let copies: u64 = copies.map(|copies| copies.bytes()).sum();
        PolicyReport {
            index_bytes: copies + index.flatten().map(|c| bytes(c) as u64).sum::<u64>(),
            scored: self.scored,
            offered: self.offered,
            taken: self.taken,
            ..PolicyReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_repeated_scores_are_those_of_the_list() {
        let scores = vec![(0.5, 2.0), (0.1, 1.0), (0.9, 3.0), (7.0, 0.0)];
        // 0.1 0.5 0.5 0.9 0.9 0.9: ranks 0 to 5.
        let found = quantiles(scores, &[0.0, 0.2, 0.5, 0.9, 1.0]);
        let want = [0.1, 0.5, 0.7, 0.9, 0.9];
        for (found, want) in found.iter().zip(want) {
            assert!((found - want).abs() < 1e-6, "{found}, expected {want}");
        }
    }

    #[test]
    fn the_coarse_level_looks_only_at_the_children_of_survivors() {
        let (dim, n, k, coarse) = (8, 400, 40, 6);
        let keys: Vec<f32> = (0..n * dim)
            .map(|i| ((i * 7919 + 13) % 1000) as f32 / 500.0 - 1.0)
            .collect();
        let points = kmeans::normalised(&keys, dim);
        let first = kmeans::first_centres(&points, dim, k, 0);
        let labels = kmeans::lloyd(&points, dim, first, 300);
        let (centroids, _) = kmeans::means(&keys, dim, &labels, k);
        let points = kmeans::normalised(&centroids, dim);
        let first = kmeans::first_centres(&points, dim, coarse, 0);
        let parents = kmeans::lloyd(&points, dim, first, 300);
        let (clusters, order) = Clusters::new(&keys, dim, &labels, k, Some((&parents, coarse)));
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n as u64).collect::<Vec<_>>());

        let queries = &keys[..3 * dim];
        let above = clusters.coarse_scores(queries, 1.0);
        let mut ranked = above.clone();
        ranked.sort_by(f32::total_cmp);
        let cut = ranked[coarse / 2];
        let (ranges, looked) = clusters.kept(queries, 1.0, 0.002, Some(cut));
        let survivors = (0..coarse).filter(|&c| above[c] > cut);
        let children: Vec<usize> = survivors
            .flat_map(|c| {
                clusters.coarse_starts[c] as usize..clusters.coarse_starts[c + 1] as usize
            })
            .collect();
        assert_eq!(looked as usize, coarse + children.len());
        assert!(!children.is_empty() && children.len() < k);

        // The same from all clusters, with those of other parents masked out.
        let mut logits = Vec::new();
        let mut counts = clusters.counts();
        for cluster in (0..k).filter(|cluster| !children.contains(cluster)) {
            counts[cluster] = 0.0;
        }
        let stride = clusters.panels.products(queries, &mut logits);
        let mut scores = vec![0f32; k];
        cluster_scores(&mut logits, stride, &counts, 1.0, &mut scores);
        let want: Vec<u64> = (0..k)
            .filter(|&c| scores[c] > 0.002)
            .flat_map(|c| u64::from(clusters.starts[c])..u64::from(clusters.starts[c + 1]))
            .collect();
        assert_eq!(ranges.into_iter().flatten().collect::<Vec<_>>(), want);
    }
}

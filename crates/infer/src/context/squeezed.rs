//! Squeezed Attention: the keys of a fixed prefix are clustered once; each question then compares
//! its queries with the centroids and attends exactly to the clusters that matter.
//!
//! For asking many questions of one long document at a fraction of the keys read. Paper: arXiv
//! 2411.09688.

mod clusters;
pub mod kmeans;
mod state;

pub use clusters::{Clusters, Thresholds, quantiles};

use clusters::scores_of;

use super::hip::Share;
use super::{Call, ContextPolicy, Keys, LayerAt, Part, Plan, PolicyReport, PolicySpec, Queries};
use crate::kv::{Gathered, KeyForm, KvStore};
use longspan_kernels::attention::{KvDtype, Mask, PAGE};
use longspan_kernels::centroids::Panels;
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
    /// A prefix of more than twice this many keys is first split by direction into groups of about so many,
    /// which are clustered apart, so that clustering does not grow with the square of the length; 0 = never.
    pub leaf: usize,
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
            leaf: 1024,
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

/// What is known of a sealed prefix.
#[derive(Debug, PartialEq)]
struct Index {
    /// Tokens of the prefix; those before and below `clustered` are clustered, but for the first `sinks`.
    prefix: u64,
    sinks: u64,
    clustered: u64,
    /// For single query heads.
    thresholds: Thresholds,
    /// For the best score of the query heads of a kv head, where they see what any of them chose.
    shared: Thresholds,
    /// Queries are compared with centroids in f32, not in f16.
    exact: bool,
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

/// Labels of one layer's and kv head's keys [n, head_dim] in about k clusters, and how many those are.
type Label<'a> = &'a (dyn Fn(usize, usize, &[f64], usize) -> (Vec<u32>, usize) + Sync);

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

    /// The thresholds for single query heads, once the prefix is sealed.
    pub fn thresholds(&self) -> Option<Thresholds> {
        Some(self.index.as_ref()?.thresholds)
    }

    /// Clusters the prefix, moves the members of clusters together in the store and sets the
    /// thresholds. `label(layer, kv_head, points, k)` clusters keys, then centroids.
    fn build(
        &mut self,
        layers: &[usize],
        store: &mut KvStore,
        sizes: (usize, Option<usize>),
        label: Label<'_>,
    ) -> io::Result<()> {
        let (layout, prefix) = (store.layout(), store.len(layers[0]));
        let sinks = self.config.sinks;
        let (n, dim) = (prefix as usize - self.config.obs - sinks, layout.head_dim);
        let kv_heads = layout.num_kv_heads;
        let exact = layout.dtype == KvDtype::F32;
        let group = self.num_heads / kv_heads;
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
                let (labels, k) = label(layer, head, &points, sizes.0);
                drop(points);
                let coarse = sizes.1.map(|coarse| {
                    let (centroids, _) = kmeans::means(&keys, dim, &labels, k);
                    label(layer, head, &kmeans::normalised(&centroids, dim), coarse)
                });
                let coarse = coarse.as_ref().map(|(labels, k)| (&labels[..], *k));
                // What the observed queries of the kv head's query heads give each cluster.
                let (centroids, counts) = kmeans::means(&keys, dim, &labels, k);
                let queries = &self.queries[layer];
                let queries = of_heads(queries, self.num_heads, dim, head * group, group);
                let panels = Panels::new(&centroids, dim);
                let worth = scores_of(&panels, &counts, &queries, 1, self.scale);
                Clusters::new(&keys, dim, &labels, k, coarse, &worth, exact)
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
        let (thresholds, shared) = (
            self.calibrate(layers, &clusters, dim, 1),
            self.calibrate(layers, &clusters, dim, group),
        );
        self.index = Some(Arc::new(Index {
            prefix,
            sinks: sinks as u64,
            clustered: (sinks + n) as u64,
            thresholds,
            shared,
            exact,
            clusters,
        }));
        self.queries = Vec::new();
        self.cached = vec![Cached::default(); store.num_layers()];
        Ok(())
    }

    /// The scores that the configured shares of all keys stay below, if every `heads` query heads choose together.
    fn calibrate(
        &self,
        layers: &[usize],
        clusters: &[Vec<Clusters>],
        dim: usize,
        heads: usize,
    ) -> Thresholds {
        let units = self.num_heads / heads;
        let tasks: Vec<(usize, usize)> = layers
            .iter()
            .flat_map(|&layer| (0..units).map(move |unit| (layer, unit)))
            .collect();
        let mut made = vec![(Vec::new(), Vec::new()); tasks.len()];
        let slots = SharedMut::new(&mut made);
        let one = |task: usize| {
            let (layer, unit) = tasks[task];
            let clusters = &clusters[layer][unit * clusters[layer].len() / units];
            let queries = of_heads(
                &self.queries[layer],
                self.num_heads,
                dim,
                unit * heads,
                heads,
            );
            let fine = clusters.scores(&queries, heads, self.scale);
            let fine = fine.into_iter().zip(clusters.counts()).collect();
            let coarse = self.config.lower.map(|_| {
                let scores = clusters.coarse_scores(&queries, heads, self.scale);
                scores.into_iter().zip(clusters.coarse_counts()).collect()
            });
            // SAFETY: each task has a slot of its own.
            unsafe { slots.slice(task, 1)[0] = (fine, coarse.unwrap_or_default()) };
        };
        Pool::global().for_each(tasks.len(), one);
        let (fine, coarse): (Vec<Vec<_>>, Vec<Vec<_>>) = made.into_iter().unzip();
        // Percentile 0 keeps everything, also the key with the lowest score.
        let at = |scores: Vec<Vec<(f32, f32)>>, percentile: f64| match percentile {
            0.0 => -1.0,
            percentile => quantiles(scores.concat(), &[percentile])[0],
        };
        Thresholds {
            fine: at(fine, self.config.percentile),
            coarse: self.config.lower.map(|lower| at(coarse, lower)),
        }
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
        let (group, rows) = (heads / kv_heads, rotated(at, queries, 0));
        let together = if shares { group } else { 1 };
        let thresholds = if shares {
            index.shared
        } else {
            index.thresholds
        };
        let units = heads / together;
        let clusters = |unit: usize| &clusters[unit * kv_heads / units];
        let queries = |unit: usize| of_heads(&rows, heads, dim, unit * together, together);
        // A decoded token has fewer units than there may be threads: its products are shared out by panels.
        let mut products = match at.queries == 1 && thresholds.coarse.is_none() {
            true => shared_products(units, &clusters, &queries),
            false => Vec::new(),
        };
        let own = !products.is_empty();
        let products = SharedMut::new(&mut products);
        let mut kept: Vec<(Vec<Range<u64>>, u64)> = vec![(Vec::new(), 0); units];
        let slots = SharedMut::new(&mut kept);
        let one = |unit: usize| {
            let clusters = clusters(unit);
            let (mut ranges, looked) = if own {
                // SAFETY: each unit has products of its own.
                let products = unsafe { &mut products.slice(unit, 1)[0] };
                clusters.kept_of(products, together, self.scale, thresholds.fine)
            } else {
                clusters.kept(&queries(unit), together, self.scale, thresholds)
            };
            for range in &mut ranges {
                *range = index.sinks + range.start..index.sinks + range.end;
            }
            // SAFETY: each unit has a slot of its own.
            unsafe { slots.slice(unit, 1)[0] = (ranges, looked) };
        };
        Pool::global().for_each(units, one);
        self.scored += kept.iter().map(|(_, looked)| looked).sum::<u64>();
        self.offered += units as u64 * (index.clustered - index.sinks);
        let taken = kept.iter().flat_map(|(ranges, _)| ranges);
        self.taken += taken.map(|range| range.end - range.start).sum::<u64>();
        let lists = kept.into_iter().map(|(mut ranges, _)| {
            match ranges.first_mut() {
                Some(first) if first.start == index.sinks => first.start = 0,
                _ if index.sinks > 0 => ranges.insert(0, 0..index.sinks),
                _ => {}
            }
            ranges
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
        let (dim, iterations) = (store.layout().head_dim, self.config.iterations);
        let label = |layer: usize, head: usize, points: &[f64], k: usize| {
            let first = first(layer, head, points, k);
            (kmeans::lloyd(points, dim, first, iterations), k)
        };
        self.build(layers, store, sizes, &label)
    }
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

/// Products of each unit's queries [n, head_dim] with its centroids: [n, stride] by unit.
fn shared_products<'a>(
    units: usize,
    clusters: &(dyn Fn(usize) -> &'a Clusters + Sync),
    queries: &(dyn Fn(usize) -> Vec<f32> + Sync),
) -> Vec<Vec<f32>> {
    /// Panels of a task: some microseconds of work.
    const PANELS: usize = 8;
    let queries: Vec<Vec<f32>> = (0..units).map(queries).collect();
    let panels = |unit: usize| &clusters(unit).panels;
    let mut products: Vec<Vec<f32>> = (0..units)
        .map(|unit| vec![0f32; queries[unit].len() / panels(unit).dim() * panels(unit).stride()])
        .collect();
    let outs: Vec<SharedMut<f32>> = products.iter_mut().map(|out| SharedMut::new(out)).collect();
    let tasks: Vec<(usize, usize)> = (0..units)
        .flat_map(|unit| {
            let count = panels(unit).stride() / PAGE;
            (0..count).step_by(PANELS).map(move |first| (unit, first))
        })
        .collect();
    Pool::global().for_each(tasks.len(), |task| {
        let (unit, first) = tasks[task];
        let (panels, stride) = (panels(unit), panels(unit).stride());
        let end = (first + PANELS).min(stride / PAGE);
        panels.some(first..end, &queries[unit], |row, column, found| {
            // SAFETY: tasks have columns of their own.
            unsafe {
                outs[unit]
                    .slice(row * stride + column, PAGE)
                    .copy_from_slice(found)
            };
        });
    });
    products
}

/// Some heads of rows [n, heads head_dim], one after another: [count, n, head_dim].
fn of_heads(rows: &[f32], num_heads: usize, dim: usize, first: usize, count: usize) -> Vec<f32> {
    (first..first + count)
        .flat_map(|head| {
            let rows = rows.chunks_exact(num_heads * dim);
            rows.flat_map(move |row| &row[head * dim..(head + 1) * dim])
        })
        .copied()
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
        let (dim, config) = (store.layout().head_dim, self.config.clone());
        let label = |_: usize, _: usize, points: &[f64], k: usize| {
            let (iterations, leaf) = (config.iterations, config.leaf);
            kmeans::cluster(points, dim, k, config.seed, iterations, leaf)
        };
        self.build(layers, store, sizes, &label)
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
            let rows = 4 * (c.centroids.len() + c.coarse.len());
            let starts = 4 * (c.starts.len() + c.coarse_starts.len());
            rows + starts + c.panels.bytes() + c.coarse_panels.bytes()
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

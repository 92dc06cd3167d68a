//! Clusters of keys, their centroids and what queries give them.

use super::kmeans;
use longspan_kernels::centroids::{Panels, cluster_scores, run_products};
use std::ops::Range;

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
    pub(super) panels: Panels,
    pub(super) coarse_panels: Panels,
}

impl Clusters {
    fn count(&self, cluster: usize) -> f32 {
        (self.starts[cluster + 1] - self.starts[cluster]) as f32
    }

    /// Keys of each cluster.
    pub(super) fn counts(&self) -> Vec<f32> {
        (0..self.starts.len() - 1).map(|c| self.count(c)).collect()
    }

    /// Keys of each coarse cluster.
    pub(super) fn coarse_counts(&self) -> Vec<f32> {
        let key = |cluster: u32| self.starts[cluster as usize];
        let pairs = self.coarse_starts.windows(2);
        pairs
            .map(|pair| (key(pair[1]) - key(pair[0])) as f32)
            .collect()
    }

    /// Readies the centroids for comparison; exact ones, or rounded to f16 and read in half the time.
    pub(super) fn with_panels(mut self, dim: usize, exact: bool) -> Self {
        let make = if exact { Panels::new } else { Panels::half };
        self.panels = make(&self.centroids, dim);
        self.coarse_panels = make(&self.coarse, dim);
        self
    }

    /// Clusters labelled keys [n, dim]: orders them so that members lie together. Returns the order
    /// of the keys too. `coarse`: label of each cluster, and the number of coarse ones. `worth`: of
    /// each cluster; worthy ones come first, since those that are kept together should lie together. `exact`: compare
    /// queries with centroids in f32, not in f16.
    pub fn new(
        keys: &[f32],
        dim: usize,
        labels: &[u32],
        k: usize,
        coarse: Option<(&[u32], usize)>,
        worth: &[f32],
        exact: bool,
    ) -> (Self, Vec<u64>) {
        let (centroids, _) = kmeans::means(keys, dim, labels, k);
        let worthier = |worth: &[f32], a: usize, b: usize| worth[b].total_cmp(&worth[a]);
        let mut by_place: Vec<usize> = (0..k).collect();
        by_place.sort_by(|&a, &b| worthier(worth, a, b));
        // Coarse clusters by their worthiest, with numbers in that order.
        let coarse: Option<(Vec<u32>, usize)> = coarse.map(|(labels, count)| {
            let mut best = vec![f32::NEG_INFINITY; count];
            for (&label, &worth) in labels.iter().zip(worth) {
                best[label as usize] = best[label as usize].max(worth);
            }
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|&a, &b| worthier(&best, a, b));
            let mut number = vec![0u32; count];
            (0..count).for_each(|at| number[order[at]] = at as u32);
            let labels = labels.iter().map(|&label| number[label as usize]);
            (labels.collect(), count)
        });
        if let Some((coarse, _)) = &coarse {
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
            (clusters.coarse, _) = kmeans::means(&centroids, dim, &labels, coarse);
            clusters.coarse_starts = vec![0; coarse + 1];
            labels
                .iter()
                .for_each(|&label| clusters.coarse_starts[label as usize + 1] += 1);
            (0..coarse).for_each(|c| clusters.coarse_starts[c + 1] += clusters.coarse_starts[c]);
        }
        (clusters.with_panels(dim, exact), order)
    }

    /// Scores of all clusters for queries [n, dim]: the mean over the queries of each of `heads` query heads, whose
    /// queries lie together, and the largest of these.
    pub(super) fn scores(&self, queries: &[f32], heads: usize, scale: f32) -> Vec<f32> {
        scores_of(&self.panels, &self.counts(), queries, heads, scale)
    }

    /// Scores of all coarse clusters.
    pub(super) fn coarse_scores(&self, queries: &[f32], heads: usize, scale: f32) -> Vec<f32> {
        let counts = self.coarse_counts();
        scores_of(&self.coarse_panels, &counts, queries, heads, scale)
    }

    /// The slots whose cluster scores above the threshold for any of `heads` query heads (queries: [heads n, dim]), as
    /// ranges, and how many centroids were looked at. With a coarse threshold only the clusters of coarse ones
    /// above it compete.
    pub fn kept(
        &self,
        queries: &[f32],
        heads: usize,
        scale: f32,
        thresholds: Thresholds,
    ) -> (Vec<Range<u64>>, u64) {
        let Some(coarse) = thresholds.coarse else {
            let scores = self.scores(queries, heads, scale);
            return (self.above(&scores, thresholds.fine), scores.len() as u64);
        };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let above = self.coarse_scores(queries, heads, scale);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for parent in (0..above.len()).filter(|&parent| above[parent] > coarse) {
            let edge = |parent: usize| self.coarse_starts[parent] as usize;
            match runs.last_mut() {
                Some(last) if last.end == edge(parent) => last.end = edge(parent + 1),
                _ => runs.push(edge(parent)..edge(parent + 1)),
            }
        }
        let count: usize = runs.iter().map(Range::len).sum();
        let looked = (above.len() + count) as u64;
        if count == 0 {
            return (ranges, looked);
        }
        let dim = self.centroids.len() / (self.starts.len() - 1);
        let clusters = || runs.iter().cloned().flatten();
        let counts: Vec<f32> = clusters().map(|c| self.count(c)).collect();
        let mut logits = vec![0f32; queries.len() / dim * count];
        for (queries, logits) in (queries.chunks(16 * dim)).zip(logits.chunks_mut(16 * count)) {
            run_products(&self.centroids, dim, &runs, queries, logits);
        }
        let scores = best_of_heads(&mut logits, count, &counts, heads, scale);
        clusters()
            .zip(&scores)
            .filter(|(_, score)| **score > thresholds.fine)
            .for_each(|(cluster, _)| self.add(cluster, &mut ranges));
        (ranges, looked)
    }

    /// What [`Clusters::kept`] finds on one level, from the products of the queries with all centroids:
    /// `[heads n, stride]`, which are overwritten.
    pub(super) fn kept_of(
        &self,
        products: &mut [f32],
        heads: usize,
        scale: f32,
        threshold: f32,
    ) -> (Vec<Range<u64>>, u64) {
        let (stride, counts) = (self.panels.stride(), self.counts());
        let scores = best_of_heads(products, stride, &counts, heads, scale);
        (self.above(&scores, threshold), scores.len() as u64)
    }

    /// The slots of clusters that score above a threshold.
    fn above(&self, scores: &[f32], threshold: f32) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        (0..scores.len())
            .filter(|&cluster| scores[cluster] > threshold)
            .for_each(|cluster| self.add(cluster, &mut ranges));
        ranges
    }

    /// Adds a cluster's slots to ascending ranges.
    fn add(&self, cluster: usize, ranges: &mut Vec<Range<u64>>) {
        let slots = u64::from(self.starts[cluster])..u64::from(self.starts[cluster + 1]);
        match ranges.last_mut() {
            Some(last) if last.end == slots.start => last.end = slots.end,
            _ if slots.is_empty() => {}
            _ => ranges.push(slots),
        }
    }
}

pub(super) fn scores_of(
    panels: &Panels,
    counts: &[f32],
    queries: &[f32],
    heads: usize,
    scale: f32,
) -> Vec<f32> {
    let mut logits = Vec::new();
    let stride = panels.products(queries, &mut logits);
    best_of_heads(&mut logits, stride, counts, heads, scale)
}

/// Scores of clusters for each of some heads, of which the largest counts. logits: [heads n, stride].
fn best_of_heads(
    logits: &mut [f32],
    stride: usize,
    counts: &[f32],
    heads: usize,
    scale: f32,
) -> Vec<f32> {
    let mut best = vec![0f32; counts.len()];
    if heads == 1 {
        cluster_scores(logits, stride, counts, scale, &mut best);
        return best;
    }
    let mut scores = vec![0f32; counts.len()];
    for logits in logits.chunks_mut(logits.len() / heads) {
        cluster_scores(logits, stride, counts, scale, &mut scores);
        for (best, &score) in best.iter_mut().zip(&scores) {
            *best = if score > *best { score } else { *best };
        }
    }
    best
}

/// Scores that clusters must pass to be seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Of clusters.
    pub fine: f32,
    /// Of coarse clusters, where there are such.
    pub coarse: Option<f32>,
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
        let (clusters, order) = Clusters::new(
            &keys,
            dim,
            &labels,
            k,
            Some((&parents, coarse)),
            &vec![0.0; k],
            true,
        );
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n as u64).collect::<Vec<_>>());

        let queries = &keys[..3 * dim];
        let above = clusters.coarse_scores(queries, 1, 1.0);
        let mut ranked = above.clone();
        ranked.sort_by(f32::total_cmp);
        let cut = ranked[coarse / 2];
        let thresholds = Thresholds {
            fine: 0.002,
            coarse: Some(cut),
        };
        let (ranges, looked) = clusters.kept(queries, 1, 1.0, thresholds);
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

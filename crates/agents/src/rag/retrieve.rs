//! Scores and ranks: BM25's formula, reciprocal rank fusion, the k best of many.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// BM25's constants. Ready-made engines fix 1.2 and 0.75; 0.9 and 0.4 are usual for short passages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bm25Config {
    /// How soon further occurrences of a word stop counting.
    pub k1: f64,
    /// How much long passages are marked down: 0 not at all, 1 in full.
    pub b: f64,
}

impl Default for Bm25Config {
    fn default() -> Self {
        Bm25Config { k1: 0.9, b: 0.4 }
    }
}

impl Bm25Config {
    /// Weight of a word that `n` of `all` passages hold.
    pub fn idf(&self, all: usize, n: usize) -> f64 {
        let (all, n) = (all as f64, n as f64);
        (1.0 + (all - n + 0.5) / (n + 0.5)).ln()
    }

    /// Weight of `tf` occurrences in a passage `length` times as long as the average.
    pub fn weight(&self, tf: f64, length: f64) -> f64 {
        tf * (self.k1 + 1.0) / (tf + self.k1 * (1.0 - self.b + self.b * length))
    }
}

/// The constant of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009).
const FUSION: f64 = 60.0;

/// One ranking of several: each adds 1 / (60 + rank), ranks from 1.
pub fn fuse(lists: &[&[(i64, f64)]]) -> Vec<(i64, f64)> {
    let mut scores: HashMap<i64, f64> = HashMap::new();
    for list in lists {
        for (rank, (id, _)) in list.iter().enumerate() {
            *scores.entry(*id).or_default() += 1.0 / (FUSION + (rank + 1) as f64);
        }
    }
    let count = scores.len();
    top(scores.into_iter().collect(), count)
}

/// The `k` best, best first; of equals the one with the lower id.
pub fn top(mut scores: Vec<(i64, f64)>, k: usize) -> Vec<(i64, f64)> {
    let better = |a: &(i64, f64), b: &(i64, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if k == 0 {
        return Vec::new();
    }
    if k < scores.len() {
        scores.select_nth_unstable_by(k - 1, better);
        scores.truncate(k);
    }
    scores.sort_unstable_by(better);
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fusion_adds_reciprocal_ranks() {
        let fused = fuse(&[&[(7, 9.0), (3, 2.0)], &[(3, 0.5), (8, 0.4)]]);
        let want = [
            (3, 1.0 / 62.0 + 1.0 / 61.0),
            (7, 1.0 / 61.0),
            (8, 1.0 / 62.0),
        ];
        assert_eq!(fused.len(), 3);
        for (found, want) in fused.iter().zip(want) {
            assert!(found.0 == want.0 && (found.1 - want.1).abs() < 1e-15);
        }
    }

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        let scores: Vec<(i64, f64)> = (0..500).map(|i| (i, ((i * 7919) % 101) as f64)).collect();
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for k in [0, 1, 2, 40, 499, 500, 900] {
            assert_eq!(top(scores.clone(), k), sorted[..k.min(500)]);
        }
    }
}

//! Scores, one file each: pure functions of texts, no files, no models. Each follows the published scorer of
//! its benchmark to the last digit; where dialects differ they have different names.

pub mod bleu;
pub mod classification;
pub mod edit_similarity;
pub mod effective_length;
pub mod exact_match;
pub mod length_score;
pub mod letters;
pub mod micro_f1;
pub mod ndcg;
pub mod pairwise;
pub mod panel;
pub mod qa_f1;
pub mod rouge;
pub mod segment;
pub mod string_match;

use std::collections::HashMap;
use std::hash::Hash;

/// How often each element occurs.
fn counts<T: Eq + Hash>(items: impl IntoIterator<Item = T>) -> HashMap<T, usize> {
    let mut counts = HashMap::new();
    for item in items {
        *counts.entry(item).or_insert(0) += 1;
    }
    counts
}

/// Elements two multisets share, with repeats.
fn overlap<T: Eq + Hash>(a: &HashMap<T, usize>, b: &HashMap<T, usize>) -> usize {
    a.iter()
        .map(|(item, &count)| count.min(b.get(item).copied().unwrap_or(0)))
        .sum()
}

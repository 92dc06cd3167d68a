//! Ranking scores with binary relevance: nDCG, recall, reciprocal rank. For LoCoV1 and other search.

/// Indices by descending score; equal scores keep their order; a NaN counts as -1, as in the reference search.
pub fn rank(scores: &[f64]) -> Vec<usize> {
    let value = |i: usize| {
        if scores[i].is_nan() { -1.0 } else { scores[i] }
    };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
    order
}

/// nDCG@k: gain 1 for a relevant result, discount log2(rank + 1), over the best order of `total` relevant ones.
/// `relevant[i]`: whether result i, best first, is relevant. 0 if nothing is relevant.
pub fn ndcg(relevant: &[bool], total: usize, k: usize) -> f64 {
    let discount = |index: usize| 1.0 / ((index + 2) as f64).log2();
    let ideal: f64 = (0..total.min(k)).map(discount).sum();
    if ideal == 0.0 {
        return 0.0;
    }
    let found = relevant.iter().take(k).enumerate();
    let gain: f64 = found.filter(|(_, r)| **r).map(|(i, _)| discount(i)).sum();
    gain / ideal
}

/// The share of the `total` relevant ones among the first k.
pub fn recall(relevant: &[bool], total: usize, k: usize) -> f64 {
    let found = relevant.iter().take(k).filter(|&&r| r).count();
    if total == 0 {
        0.0
    } else {
        found as f64 / total as f64
    }
}

/// 1 / rank of the first relevant result within k; 0 if there is none.
pub fn reciprocal_rank(relevant: &[bool], k: usize) -> f64 {
    let first = relevant.iter().take(k).position(|&r| r);
    first.map_or(0.0, |index| 1.0 / (index + 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_cases() {
        assert_eq!(ndcg(&[true, true, false], 2, 10), 1.0);
        assert_eq!(ndcg(&[false, false, true], 1, 10), 0.5);
        assert_eq!(ndcg(&[false; 4], 1, 10), 0.0);
        assert_eq!(ndcg(&[true; 3], 12, 3), 1.0);
        assert_eq!(rank(&[0.5, f64::NAN, 0.5, 0.9]), [3, 0, 2, 1]);
        assert_eq!(recall(&[true, false, true], 4, 3), 0.5);
        assert_eq!(reciprocal_rank(&[false, true], 1), 0.0);
        assert_eq!(reciprocal_rank(&[false, true], 2), 0.5);
    }
}

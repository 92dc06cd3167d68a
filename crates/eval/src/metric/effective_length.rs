//! The length up to which a model still works: where a curve of accuracy over length falls below a threshold
//! (needle threading), and the longest length above one (RULER).

/// The last downward crossing of `threshold` (accuracy >= threshold before, below after), with linear interpolation.
/// `lengths` ascend. If the curve is never below: the longest length, to be read as "at least". If it starts
/// below: 0.
pub fn crossing(lengths: &[f64], accuracy: &[f64], threshold: f64) -> f64 {
    let points: Vec<(f64, f64)> = lengths
        .iter()
        .copied()
        .zip(accuracy.iter().copied())
        .collect();
    match points.first() {
        Some(&(_, first)) if first >= threshold => {}
        _ => return 0.0,
    }
    let mut found = points[points.len() - 1].0;
    for pair in points.windows(2) {
        let ((from, before), (to, after)) = (pair[0], pair[1]);
        if before >= threshold && after < threshold {
            found = from + (to - from) * (before - threshold) / (before - after);
        }
    }
    found
}

/// The longest length whose score is at least `threshold` (RULER: 85.6, Llama2-7B's at 4k); `None` if none is.
pub fn longest_above(lengths: &[f64], scores: &[f64], threshold: f64) -> Option<f64> {
    let good = lengths.iter().zip(scores).filter(|(_, s)| **s >= threshold);
    good.map(|(&length, _)| length).reduce(f64::max)
}

/// Means weighted 1, 2, 3, ... by length rank: rising (long lengths count most) and falling. `None` without scores.
pub fn weighted_means(scores: &[f64]) -> Option<(f64, f64)> {
    let n = scores.len();
    let weights = (n * (n + 1) / 2) as f64;
    let sum = |weight: &dyn Fn(usize) -> usize| {
        let terms = scores.iter().enumerate();
        terms.map(|(i, s)| s * weight(i) as f64).sum::<f64>() / weights
    };
    (n > 0).then(|| (sum(&|i| i + 1), sum(&|i| n - i)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cases() {
        let lengths = [1.0, 2.0, 4.0];
        assert_eq!(crossing(&lengths, &[0.9, 0.8, 0.75], 0.75), 4.0);
        assert_eq!(crossing(&lengths, &[0.5, 0.4, 0.3], 0.75), 0.0);
        assert_eq!(crossing(&lengths, &[1.0, 0.5, 0.4], 0.75), 1.5);
        assert_eq!(
            longest_above(&lengths, &[90.0, 80.0, 86.0], 85.6),
            Some(4.0)
        );
        assert_eq!(longest_above(&lengths, &[1.0; 3], 85.6), None);
        assert_eq!(weighted_means(&[6.0, 0.0, 0.0]), Some((1.0, 3.0)));
    }

    proptest! {
        #[test]
        fn a_higher_threshold_never_lengthens_a_falling_curve(
            mut accuracy in proptest::collection::vec(0.0..1.0f64, 2..8),
            low in 0.1..0.9f64,
            more in 0.0..0.1f64,
        ) {
            accuracy.sort_by(|a, b| b.total_cmp(a));
            let lengths: Vec<f64> = (0..accuracy.len()).map(|i| f64::from(1u32 << i)).collect();
            let at = |threshold| crossing(&lengths, &accuracy, threshold);
            prop_assert!(at(low + more) <= at(low));
        }
    }
}

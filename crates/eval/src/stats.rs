//! Uncertainty of scores: standard errors clustered by document, Wilson intervals, paired
//! comparisons with a bootstrap.

use crate::python::Random;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Two-sided 95% point of the normal distribution.
const Z: f64 = 1.959963984540054;
/// Draws of a bootstrap.
const DRAWS: usize = 1000;

/// A mean and how sure it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error; None for fewer than two clusters.
    pub se: Option<f64>,
    /// 95% interval.
    pub interval: Option<(f64, f64)>,
    /// Rows.
    pub n: usize,
    /// Clusters.
    pub clusters: usize,
}

impl Estimate {
    /// A figure without an error.
    pub fn exact(value: f64, n: usize) -> Estimate {
        Estimate {
            value,
            n,
            ..Estimate::default()
        }
    }
}

/// The mean of (cluster, value) rows with its cluster-robust standard error: with residuals summed
/// per cluster, se² = g/(g-1) · Σ(Σ residuals)² / n². Rows that are all 0 or 1, each its own
/// cluster, get Wilson's interval, others value ± 1.96 se.
pub fn mean(rows: &[(&str, f64)]) -> Estimate {
    let n = rows.len();
    if n == 0 {
        return Estimate::exact(f64::NAN, 0);
    }
    let value = rows.iter().map(|(_, value)| value).sum::<f64>() / n as f64;
    let mut residuals: BTreeMap<&str, f64> = BTreeMap::new();
    for (cluster, row) in rows {
        *residuals.entry(cluster).or_default() += row - value;
    }
    let clusters = residuals.len();
    let se = (clusters > 1).then(|| {
        let g = clusters as f64;
        let squares: f64 = residuals.values().map(|sum| sum * sum).sum();
        (g / (g - 1.0) * squares).sqrt() / n as f64
    });
    let binary = rows.iter().all(|(_, value)| *value == 0.0 || *value == 1.0);
    let interval = if binary && clusters == n {
        Some(wilson(rows.iter().filter(|(_, v)| *v == 1.0).count(), n))
    } else {
        se.map(|se| (value - Z * se, value + Z * se))
    };
    Estimate {
        value,
        se,
        interval,
        n,
        clusters,
    }
}

/// Wilson's 95% interval of a share. (0, 1) for no trials.
pub fn wilson(successes: usize, trials: usize) -> (f64, f64) {
    if trials == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (trials as f64, successes as f64 / trials as f64);
    let denominator = 1.0 + Z * Z / n;
    let centre = (p + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    // At the ends rounding must not move the bound past the share itself.
    ((centre - half).clamp(0.0, p), (centre + half).clamp(p, 1.0))
}

/// A difference b - a over the same samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Mean difference with its clustered standard error.
    pub difference: Estimate,
    /// 95% interval by bootstrap over clusters, seed 0.
    pub bootstrap: Option<(f64, f64)>,
    /// Samples better in b.
    pub better: usize,
    /// Samples worse in b.
    pub worse: usize,
}

/// Compares (cluster, a, b) rows.
pub fn paired(rows: &[(&str, f64, f64)]) -> Paired {
    let differences: Vec<(&str, f64)> = rows.iter().map(|(c, a, b)| (*c, b - a)).collect();
    let mut by_cluster: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for (cluster, value) in &differences {
        let entry = by_cluster.entry(cluster).or_default();
        entry.0 += value;
        entry.1 += 1;
    }
    let sums: Vec<(f64, usize)> = by_cluster.into_values().collect();
    let mut difference = mean(&differences);
    difference.interval = difference
        .se
        .map(|se| (difference.value - Z * se, difference.value + Z * se));
    Paired {
        difference,
        bootstrap: bootstrap(&sums),
        better: differences.iter().filter(|(_, d)| *d > 0.0).count(),
        worse: differences.iter().filter(|(_, d)| *d < 0.0).count(),
    }
}

/// 95% interval of Σ sums / Σ counts over (sum, count) clusters drawn with replacement, seed 0.
/// None for fewer than two clusters.
pub fn bootstrap(clusters: &[(f64, usize)]) -> Option<(f64, f64)> {
    if clusters.len() < 2 {
        return None;
    }
    let mut random = Random::new(0);
    let mut means: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let (mut sum, mut count) = (0.0, 0);
            for _ in 0..clusters.len() {
                let (s, c) = clusters[random.below(clusters.len() as u64) as usize];
                sum += s;
                count += c;
            }
            sum / count.max(1) as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((DRAWS - 1) as f64 * share).round() as usize];
    Some((at(0.025), at(0.975)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wilson_known_values() {
        let (low, high) = wilson(8, 10);
        assert!(
            (low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4,
            "{low} {high}"
        );
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        let (low, high) = wilson(0, 20);
        assert!(low == 0.0 && (high - 0.1611).abs() < 1e-4);
    }

    #[test]
    fn questions_of_one_document_count_as_little_as_they_say() {
        let values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0];
        let names: Vec<String> = (0..6).map(|i| i.to_string()).collect();
        let single: Vec<(&str, f64)> = names.iter().map(String::as_str).zip(values).collect();
        let plain = mean(&single);
        // The textbook sample standard error.
        let variance = values.iter().map(|v| (v - 0.5f64).powi(2)).sum::<f64>() / 5.0;
        assert!((plain.se.unwrap() - (variance / 6.0).sqrt()).abs() < 1e-12);
        // Every row ten times over, in one cluster: the error must not shrink.
        let repeated: Vec<(&str, f64)> = single
            .iter()
            .flat_map(|&row| std::iter::repeat_n(row, 10))
            .collect();
        let clustered = mean(&repeated);
        assert!((clustered.se.unwrap() - plain.se.unwrap()).abs() < 1e-12);
        assert_eq!((clustered.n, clustered.clusters), (60, 6));
        assert_eq!(mean(&[("a", 1.0), ("a", 0.0)]).se, None);
    }

    #[test]
    fn a_paired_difference_sees_what_two_means_hide() {
        let names: Vec<String> = (0..40).map(|i| i.to_string()).collect();
        let rows: Vec<(&str, f64, f64)> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                (
                    name.as_str(),
                    i as f64,
                    i as f64 + 1.0 + (i % 2) as f64 * 0.1,
                )
            })
            .collect();
        let paired = paired(&rows);
        assert!((paired.difference.value - 1.05).abs() < 1e-12);
        let (low, high) = paired.bootstrap.unwrap();
        assert!(low > 1.0 && high < 1.1, "{low} {high}");
        assert_eq!((paired.better, paired.worse), (40, 0));
    }

    proptest! {
        #[test]
        fn means_lie_within_their_interval(values in prop::collection::vec(0u8..2, 2..30)) {
            let names: Vec<String> = (0..values.len()).map(|i| i.to_string()).collect();
            let rows: Vec<(&str, f64)> = names.iter().zip(&values).map(|(n, v)| (n.as_str(), f64::from(*v))).collect();
            let estimate = mean(&rows);
            let (low, high) = estimate.interval.unwrap();
            // The ends may lie on the value itself, up to rounding.
            prop_assert!(low <= estimate.value + 1e-12 && estimate.value <= high + 1e-12);
        }
    }
}

//! Which examples become demonstrations: LongICLBench's rounds, each showing every label once, and the orders in which
//! a label's demonstrations can stand. Exact, because scores of other selections are not comparable.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;

/// Round-robin over labels in order of first appearance: each round takes the next example of every label; a label
/// that has none left gives its turn to the next later label that has (which may then be taken twice in a round).
/// Returns indices in order.
pub fn round_robin<L: Eq + Hash>(labels: &[L], rounds: usize) -> Vec<usize> {
    let mut slot: HashMap<&L, usize> = HashMap::new();
    let mut queues: Vec<VecDeque<usize>> = Vec::new();
    for (index, label) in labels.iter().enumerate() {
        let at = *slot.entry(label).or_insert_with(|| {
            queues.push(VecDeque::new());
            queues.len() - 1
        });
        queues[at].push_back(index);
    }
    let mut chosen = Vec::new();
    for _ in 0..rounds {
        for turn in 0..queues.len() {
            chosen.extend(queues[turn..].iter_mut().find_map(VecDeque::pop_front));
        }
    }
    chosen
}

/// [`round_robin`] over the examples that have exactly one label.
pub fn round_robin_single_label<L: Eq + Hash + Copy>(
    labels: &[Vec<L>],
    rounds: usize,
) -> Vec<usize> {
    let single: Vec<usize> = (0..labels.len())
        .filter(|&i| labels[i].len() == 1)
        .collect();
    let of_single: Vec<L> = single.iter().map(|&i| labels[i][0]).collect();
    let chosen = round_robin(&of_single, rounds);
    chosen.into_iter().map(|i| single[i]).collect()
}

/// TacRED's single pass: an example is taken when its label is known and not yet taken in this round; a round ends when
/// all labels are taken. A partial last round stays.
pub fn tacred_rounds(labels: &[&str], known: &[String], rounds: usize) -> Vec<usize> {
    let mut chosen = Vec::new();
    let mut taken: HashSet<&str> = HashSet::new();
    let mut round = 0;
    for (index, &label) in labels.iter().enumerate() {
        if round == rounds {
            break;
        }
        if known.iter().any(|k| k == label) && taken.insert(label) {
            chosen.push(index);
            if taken.len() == known.len() {
                taken.clear();
                round += 1;
            }
        }
    }
    chosen
}

/// TacRED's test set: in order, at most `most` examples of each known label.
pub fn tacred_test(labels: &[&str], known: &[String], most: usize) -> Vec<usize> {
    let mut taken: HashMap<&str, usize> = HashMap::new();
    (0..labels.len())
        .filter(|&i| known.iter().any(|k| k == labels[i]))
        .filter(|&i| {
            let count = taken.entry(labels[i]).or_default();
            *count += 1;
            *count <= most
        })
        .collect()
}

/// Positions (from 1) of every label among the demonstrations.
pub fn positions<'a>(labels: &[&'a str]) -> BTreeMap<&'a str, Vec<usize>> {
    let mut positions: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, label) in labels.iter().enumerate() {
        positions.entry(label).or_default().push(index + 1);
    }
    positions
}

/// How predictions lie over the places of their labels' demonstrations.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionBias {
    /// Share of predictions by tenth of the prompt in which the label's demonstrations stand on average.
    pub share: [f64; 10],
    /// KL divergence, in nats, from what predictions even over labels would give.
    pub kl: f64,
    /// Share of correct predictions among queries whose label stands in that tenth; `None` without queries.
    pub recall: [Option<f64>; 10],
}

/// Position bias of predictions, for demonstrations with the given labels. `queries`: gold and predicted label.
/// Predictions that are no label count in recall alone. `None` without a prediction that is a label.
pub fn position_bias(demonstrations: &[&str], queries: &[(&str, &str)]) -> Option<PositionBias> {
    let n = demonstrations.len() as f64;
    let bins: HashMap<&str, usize> = positions(demonstrations)
        .into_iter()
        .map(|(label, at)| {
            let mean = at.iter().map(|&p| p as f64 - 0.5).sum::<f64>() / at.len() as f64;
            (label, ((10.0 * mean / n) as usize).min(9))
        })
        .collect();
    let mut expected = [0.0; 10];
    for &bin in bins.values() {
        expected[bin] += 1.0 / bins.len() as f64;
    }
    let mut share = [0.0; 10];
    let mut total = 0.0;
    let mut recall = [(0.0, 0.0); 10];
    for (gold, predicted) in queries {
        if let Some(&bin) = bins.get(predicted) {
            share[bin] += 1.0;
            total += 1.0;
        }
        if let Some(&bin) = bins.get(gold) {
            recall[bin].0 += f64::from(u8::from(gold == predicted));
            recall[bin].1 += 1.0;
        }
    }
    if total == 0.0 {
        return None;
    }
    share.iter_mut().for_each(|s| *s /= total);
    let terms = share.iter().zip(&expected).filter(|(s, _)| **s > 0.0);
    Some(PositionBias {
        kl: terms.map(|(s, e)| s * (s / e).ln()).sum(),
        share,
        recall: recall.map(|(right, all)| (all > 0.0).then_some(right / all)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounds_are_prefixes_and_full_rounds_show_each_label_once(
            labels in proptest::collection::vec(0u8..5, 1..60),
            rounds in 1usize..4,
        ) {
            let chosen = round_robin(&labels, rounds);
            let more = round_robin(&labels, rounds + 1);
            prop_assert_eq!(&chosen[..], &more[..chosen.len()]);
            let kinds: HashSet<u8> = labels.iter().copied().collect();
            let full = kinds.iter().all(|k| labels.iter().filter(|l| *l == k).count() >= rounds);
            if full {
                for round in chosen.chunks(kinds.len()) {
                    let seen: HashSet<u8> = round.iter().map(|&i| labels[i]).collect();
                    prop_assert_eq!(seen.len(), kinds.len());
                }
            }
        }
    }

    #[test]
    fn a_model_that_repeats_the_last_label_is_as_biased_as_can_be() {
        let names: Vec<String> = (0..10).map(|i| format!("label{i}")).collect();
        let demonstrations: Vec<&str> = names.iter().flat_map(|n| [n.as_str(); 3]).collect();
        let last: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), "label9")).collect();
        let bias = position_bias(&demonstrations, &last).unwrap();
        assert_eq!(bias.share[9], 1.0);
        assert!((bias.kl - 10f64.ln()).abs() < 1e-12);
        assert_eq!((bias.recall[0], bias.recall[9]), (Some(0.0), Some(1.0)));
        let right: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), n.as_str())).collect();
        assert!(position_bias(&demonstrations, &right).unwrap().kl.abs() < 1e-12);
        assert_eq!(position_bias(&demonstrations, &[("label1", "?")]), None);
    }
}

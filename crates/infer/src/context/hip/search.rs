//! The tree search of HiP: a beam over halves of key ranges, each known by one of its key blocks.

use serde::{Deserialize, Serialize};

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

/// The `keep` best of `blocks` key blocks, ascending, by beam search over a binary tree of ranges, of which each round
/// keeps `beams`, `keep` at least. `score(blocks, out)` rates key blocks.
pub fn search(
    blocks: usize,
    beams: usize,
    keep: usize,
    representative: Representative,
    mut score: impl FnMut(&[usize], &mut [f32]),
) -> Vec<usize> {
    if blocks <= keep {
        return (0..blocks).collect();
    }
    let beams = beams.max(keep);
    let mut scores = Vec::new();
    if blocks <= beams {
        let all: Vec<usize> = (0..blocks).collect();
        scores.resize(blocks, 0.0);
        score(&all, &mut scores);
        return best(&scores, keep);
    }
    // (start, size); the ranges tile 0..blocks.
    let edge = |index: usize| blocks * index / beams;
    let mut ranges: Vec<(usize, usize)> = (0..beams)
        .map(|index| (edge(index), edge(index + 1) - edge(index)))
        .collect();
    let (mut children, mut probes) = (Vec::new(), Vec::new());
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
        // In the last round every range is the block that was rated.
        let count = if width < blocks { beams } else { keep };
        ranges.clear();
        ranges.extend(best(&scores, count).into_iter().map(|at| children[at]));
    }
    ranges.into_iter().map(|(start, _)| start).collect()
}

/// Places of the `count` largest scores, ascending; of equal ones the first.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if order.len() > count {
        order.select_nth_unstable_by(count - 1, |&a, &b| {
            scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
        });
        order.truncate(count);
        order.sort_unstable();
    }
    order
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
                let mut found = search(blocks, beams, beams, representative, |probe, out| {
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
                let found = search(blocks, beams, beams, representative, |probe, out| {
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

    /// Single large scores in noise, far apart: what a narrow search loses and a wide one finds.
    #[test]
    fn wide_beams_find_lone_keys_that_narrow_ones_lose() {
        let (mut state, blocks, keep, draws) = (11u64, 512usize, 32usize, 200);
        let mut hits = [0; 2];
        for _ in 0..draws {
            let at = (uniform(&mut state) * blocks as f64) as usize;
            let scores: Vec<f32> = (0..blocks)
                .map(|block| {
                    // Neighbours are a little better than the rest.
                    let near = (block as f64 - at as f64).abs() < 8.0;
                    let lift = if near { 0.8 } else { 0.0 };
                    (normal(&mut state) + lift) as f32 + if block == at { 9.0 } else { 0.0 }
                })
                .collect();
            for (hits, beams) in hits.iter_mut().zip([keep, 4 * keep]) {
                let found = search(blocks, beams, keep, Representative::Center, |probe, out| {
                    for (out, &block) in out.iter_mut().zip(probe) {
                        *out = scores[block];
                    }
                });
                assert!(found.len() == keep && found.is_sorted());
                *hits += usize::from(found.contains(&at));
            }
        }
        let [narrow, wide] = hits.map(|hits| hits as f64 / draws as f64);
        assert!(
            wide > 0.8 && narrow + 0.15 < wide,
            "narrow {narrow}, wide {wide}"
        );
        // As wide as there are blocks, the search is the exact best.
        let scores: Vec<f32> = (0..blocks).map(|_| normal(&mut state) as f32).collect();
        let found = search(
            blocks,
            blocks,
            keep,
            Representative::Center,
            |probe, out| {
                for (out, &block) in out.iter_mut().zip(probe) {
                    *out = scores[block];
                }
            },
        );
        assert_eq!(found, best(&scores, keep));
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
                let found = search(keys / 2, 1, 1, representative, |probe, out| {
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

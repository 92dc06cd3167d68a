//! Spherical k-means of keys, as Squeezed Attention uses it: Lloyd's rule on normalised vectors
//! with plain means as centres, k-means++ to start.

use longspan_kernels::centroids::{Panels, nearest, nearest_naive};

/// f32 scores of unit vectors this close together are compared again in f64.
const CLOSE: f32 = 1e-5;

/// Vectors [count, dim] divided by their lengths (at least 1e-12).
pub fn normalised(rows: &[f32], dim: usize) -> Vec<f64> {
    rows.chunks_exact(dim)
        .flat_map(|row| {
            let square: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let length = square.sqrt().max(1e-12);
            row.iter().map(move |&x| f64::from(x) / length)
        })
        .collect()
}

/// Chooses `k` of the points [count, dim] as first centres, far ones with higher probability
/// (k-means++).
pub fn first_centres(points: &[f64], dim: usize, k: usize, seed: u64) -> Vec<f64> {
    let count = points.len() / dim;
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let single: Vec<f32> = points.iter().map(|&x| x as f32).collect();
    let panels = Panels::new(&single, dim);
    let norms: Vec<f32> = single
        .chunks_exact(dim)
        .map(|p| p.iter().map(|x| x * x).sum())
        .collect();
    let mut centres = Vec::with_capacity(k * dim);
    let mut nearest = vec![f32::INFINITY; count];
    let mut products = Vec::new();
    let mut pick = ((uniform() * count as f64) as usize).min(count - 1);
    for _ in 0..k {
        centres.extend_from_slice(&points[pick * dim..(pick + 1) * dim]);
        panels.products(&single[pick * dim..(pick + 1) * dim], &mut products);
        let mut total = 0f64;
        for index in 0..count {
            let distance = (norms[index] + norms[pick] - 2.0 * products[index]).max(0.0);
            nearest[index] = nearest[index].min(distance);
            total += f64::from(nearest[index]);
        }
        let mut left = uniform() * total;
        pick = count - 1;
        for (index, &distance) in nearest.iter().enumerate() {
            left -= f64::from(distance);
            if left < 0.0 {
                pick = index;
                break;
            }
        }
    }
    centres
}

/// Lloyd's rule from `centres` [k, dim] until no label changes, at most `iterations` times. Ties
/// go to the lower centre; a centre without members stays. Returns the labels.
pub fn lloyd(points: &[f64], dim: usize, mut centres: Vec<f64>, iterations: usize) -> Vec<u32> {
    let single: Vec<f32> = points.iter().map(|&x| x as f32).collect();
    let k = centres.len() / dim;
    let mut labels = vec![u32::MAX; points.len() / dim];
    for _ in 0..iterations.max(1) {
        if !assign(points, &single, dim, &centres, &mut labels) {
            break;
        }
        let (mut sums, mut counts) = (vec![0f64; k * dim], vec![0usize; k]);
        for (point, &label) in points.chunks_exact(dim).zip(&labels) {
            counts[label as usize] += 1;
            let sum = &mut sums[label as usize * dim..][..dim];
            sum.iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
        }
        for (cluster, &members) in counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            for d in cluster * dim..(cluster + 1) * dim {
                centres[d] = sums[d] / members as f64;
            }
        }
    }
    labels
}

/// Labels points with their nearest centres; true if a label changed. `single`: the points in f32.
fn assign(points: &[f64], single: &[f32], dim: usize, centres: &[f64], labels: &mut [u32]) -> bool {
    let halves = |c: &[f64]| c.iter().map(|x| x * x).sum::<f64>() as f32 / 2.0;
    let halves: Vec<f32> = centres.chunks_exact(dim).map(halves).collect();
    let rows: Vec<f32> = centres.iter().map(|&x| x as f32).collect();
    let found = nearest(&Panels::new(&rows, dim), &halves, single, CLOSE);
    let mut changed = false;
    for ((index, (mut label, close)), old) in found.into_iter().enumerate().zip(labels) {
        if close {
            label = nearest_naive(centres, &points[index * dim..(index + 1) * dim], dim)[0];
        }
        changed |= *old != label;
        *old = label;
    }
    changed
}

/// Groups that a split makes at most.
const BRANCHES: usize = 32;
/// Points per group that a split looks at to place its centres, and its rounds.
const SAMPLE: usize = 64;
const ROUNDS: usize = 10;

/// About `k` clusters of points [count, dim] at a cost that grows with count log count: where there are more than
/// twice `leaf` points, they are first split by direction, into groups of about `leaf` (by steps of at
/// most 32), and each group gets its share of the clusters. `leaf` 0: never, which is k-means of all points at once.
/// Returns the labels and the number of clusters, which shares that are rounded up may raise.
pub fn cluster(
    points: &[f64],
    dim: usize,
    k: usize,
    seed: u64,
    iterations: usize,
    leaf: usize,
) -> (Vec<u32>, usize) {
    let count = points.len() / dim;
    if leaf == 0 || count <= 2 * leaf || k <= 1 {
        let first = first_centres(points, dim, k, seed);
        return (lloyd(points, dim, first, iterations), k);
    }
    let branches = count.div_ceil(leaf).min(BRANCHES);
    let step = (count / (branches * SAMPLE)).max(1);
    let sample: Vec<f64> = points
        .chunks_exact(dim)
        .step_by(step)
        .flatten()
        .copied()
        .collect();
    let first = first_centres(&sample, dim, branches, seed);
    let of_sample = lloyd(&sample, dim, first, ROUNDS);
    let rows: Vec<f32> = sample.iter().map(|&x| x as f32).collect();
    let (centres, _) = means(&rows, dim, &of_sample, branches);
    let centres: Vec<f64> = centres.into_iter().map(f64::from).collect();
    let single: Vec<f32> = points.iter().map(|&x| x as f32).collect();
    let mut groups = vec![0u32; count];
    assign(points, &single, dim, &centres, &mut groups);
    drop(single);

    let mut members: Vec<Vec<u32>> = vec![Vec::new(); branches];
    for (point, &group) in groups.iter().enumerate() {
        members[group as usize].push(point as u32);
    }
    // Nearly all in one group: directions do not tell these points apart, and splitting on would not end.
    let most = count - count / 8;
    let members: Vec<&[u32]> = members
        .iter()
        .flat_map(|members| {
            let size = if members.len() > most { leaf } else { count };
            members.chunks(size)
        })
        .collect();
    let (mut labels, mut total, mut passed) = (groups, 0, 0);
    let share = |passed: usize| (k as f64 * passed as f64 / count as f64).round() as usize;
    for members in members {
        let wanted = share(passed + members.len()) - share(passed);
        passed += members.len();
        let points: Vec<f64> = members
            .iter()
            .flat_map(|&point| &points[point as usize * dim..(point as usize + 1) * dim])
            .copied()
            .collect();
        let wanted = wanted.clamp(1, members.len());
        let (inner, k) = cluster(&points, dim, wanted, seed, iterations, leaf);
        for (&point, label) in members.iter().zip(inner) {
            labels[point as usize] = total as u32 + label;
        }
        total += k;
    }
    (labels, total)
}

/// Mean of the raw vectors of each cluster [k, dim] (zeros for an empty one), and its size.
pub fn means(rows: &[f32], dim: usize, labels: &[u32], k: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut sums, mut counts) = (vec![0f64; k * dim], vec![0f32; k]);
    for (row, &label) in rows.chunks_exact(dim).zip(labels) {
        counts[label as usize] += 1.0;
        let sum = &mut sums[label as usize * dim..][..dim];
        sum.iter_mut()
            .zip(row)
            .for_each(|(s, &x)| *s += f64::from(x));
    }
    let means = sums.iter().enumerate().map(|(index, sum)| {
        let count = f64::from(counts[index / dim].max(1.0));
        (sum / count) as f32
    });
    (means.collect(), counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separate_bunches_are_found() {
        let (dim, bunches) = (6, 6);
        let rows: Vec<f32> = (0..600)
            .flat_map(|i| {
                (0..dim).map(move |d| {
                    let noise = ((i * 31 + d * 17) % 23) as f32 / 230.0;
                    (if d == i % bunches { 1.0 } else { 0.0 } + noise) * (1.0 + (i % 5) as f32)
                })
            })
            .collect();
        let points = normalised(&rows, dim);
        let labels = lloyd(&points, dim, first_centres(&points, dim, bunches, 0), 300);
        for i in bunches..600 {
            assert_eq!(labels[i], labels[i % bunches]);
        }
        let (_, counts) = means(&rows, dim, &labels, bunches);
        assert_eq!(counts, vec![100.0; bunches]);
    }
    #[test]
    fn groups_share_the_clusters_and_separate_bunches_stay_whole() {
        let (dim, bunches, count) = (8, 8, 3000);
        let points: Vec<f64> = (0..count)
            .flat_map(|i| {
                (0..dim).map(move |d| {
                    let noise = ((i * 31 + d * 17) % 23) as f64 / 2300.0;
                    if d == i % bunches { 1.0 } else { noise }
                })
            })
            .collect();
        let (labels, k) = cluster(&points, dim, 60, 0, 300, 100);
        assert!((60..=60 + bunches).contains(&k), "{k} clusters");
        assert!(labels.iter().all(|&label| (label as usize) < k));
        // No cluster spans two bunches.
        let mut bunch_of = vec![None; k];
        for (i, &label) in labels.iter().enumerate() {
            let bunch = *bunch_of[label as usize].get_or_insert(i % bunches);
            assert_eq!(bunch, i % bunches, "cluster {label}");
        }
        // As many clusters as points: each has its own; equal points too are told apart in number only.
        let (labels, k) = cluster(&points[..400 * dim], dim, 400, 0, 1, 64);
        assert!(k >= 400 && labels.iter().all(|&label| (label as usize) < k));
        let equal = vec![0.5; 500 * dim];
        let (labels, k) = cluster(&equal, dim, 25, 0, 300, 50);
        assert!(k >= 25 && labels.len() == 500);
    }
}

//! Spherical k-means of keys, as Squeezed Attention uses it: Lloyd's rule on normalised vectors
//! with plain means as centres, k-means++ to start.

use longspan_kernels::block_scores::Panels;

/// Points compared with all centres at a time.
const ROWS: usize = 16;
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
    let count = points.len() / dim;
    let k = centres.len() / dim;
    let mut labels = vec![u32::MAX; count];
    let single: Vec<f32> = points.iter().map(|&x| x as f32).collect();
    let mut products = Vec::new();
    for _ in 0..iterations.max(1) {
        // |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest.
        let halves: Vec<f64> = centres
            .chunks_exact(dim)
            .map(|c| c.iter().map(|x| x * x).sum::<f64>() / 2.0)
            .collect();
        let halves_single: Vec<f32> = halves.iter().map(|&x| x as f32).collect();
        let exact = |point: &[f64], centre: usize| -> f64 {
            let centre_row = &centres[centre * dim..(centre + 1) * dim];
            let product: f64 = point.iter().zip(centre_row).map(|(a, b)| a * b).sum();
            product - halves[centre]
        };
        let rows: Vec<f32> = centres.iter().map(|&x| x as f32).collect();
        let panels = Panels::new(&rows, dim);
        let mut changed = false;
        for first in (0..count).step_by(ROWS) {
            let rows = ROWS.min(count - first);
            let stride = panels.products(&single[first * dim..(first + rows) * dim], &mut products);
            for row in 0..rows {
                let scores = &mut products[row * stride..][..k];
                let mut best = f32::NEG_INFINITY;
                for (score, half) in scores.iter_mut().zip(&halves_single) {
                    *score -= half;
                    best = if *score > best { *score } else { best };
                }
                let point = &points[(first + row) * dim..(first + row + 1) * dim];
                let mut close = (0..k).filter(|&c| scores[c] >= best - CLOSE);
                let mut label = close.next().expect("the best itself is close");
                let mut score = None;
                for centre in close {
                    let (now, other) = (
                        *score.get_or_insert_with(|| exact(point, label)),
                        exact(point, centre),
                    );
                    if other > now {
                        (label, score) = (centre, Some(other));
                    }
                }
                changed |= labels[first + row] != label as u32;
                labels[first + row] = label as u32;
            }
        }
        if !changed {
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
}

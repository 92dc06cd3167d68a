//! Centroids: how well those of clusters of keys answer queries, and what share of the attention a cluster's keys
//! would get if they were their centroid (Squeezed Attention).

use crate::attention::PAGE;
use crate::cpu::Level;
use crate::elementwise::exp;
use crate::panel::{at_level, half_products, panel_products};
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// Products with a panel.
    static SCRATCH: RefCell<Vec<f32>> = RefCell::default();
}

/// Vectors in panels: `[ceil(count / 64)][dim][64]`, zeros after the last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panels {
    dim: usize,
    count: usize,
    data: Vec<f32>,
    /// In place of `data`: the same in f16.
    half: Vec<u16>,
}

impl Panels {
    /// Panels of rows `[count, dim]`.
    pub fn new(rows: &[f32], dim: usize) -> Self {
        let count = rows.len() / dim;
        let mut data = vec![0f32; count.div_ceil(PAGE) * dim * PAGE];
        for (index, row) in rows.chunks_exact(dim).enumerate() {
            let panel = &mut data[index / PAGE * dim * PAGE..];
            for (d, &x) in row.iter().enumerate() {
                panel[d * PAGE + index % PAGE] = x;
            }
        }
        Panels {
            dim,
            count,
            data,
            half: Vec::new(),
        }
    }

    /// The same rounded to f16, half the bytes to read.
    pub fn half(rows: &[f32], dim: usize) -> Self {
        let mut panels = Panels::new(rows, dim);
        let round = |x: f32| half::f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits();
        panels.half = std::mem::take(&mut panels.data)
            .into_iter()
            .map(round)
            .collect();
        panels
    }

    /// Elements of a vector.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True without vectors.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * 4 + self.half.len() * 2
    }

    /// Products of queries `[n, dim]` with every vector: `[n][out_stride]`, of which the first
    /// [`Panels::len`] rounded up to 64 are written.
    pub fn products(&self, queries: &[f32], out: &mut Vec<f32>) -> usize {
        self.products_at(Level::current(), queries, out)
    }

    /// [`Panels::products`] at a given level, or at this CPU's best one if that is lower.
    pub fn products_at(&self, level: Level, queries: &[f32], out: &mut Vec<f32>) -> usize {
        let (rows, stride) = (queries.len() / self.dim, self.stride());
        out.resize(rows * stride, 0.0);
        self.some_at(level, 0..stride / PAGE, queries, |row, column, products| {
            out[row * stride + column..][..PAGE].copy_from_slice(products);
        });
        stride
    }

    /// Number of vectors, rounded up to whole panels of 64.
    pub fn stride(&self) -> usize {
        self.count.next_multiple_of(PAGE)
    }

    /// Products of queries `[n, dim]` with the vectors of some panels: `write(row, first vector, 64 products)`.
    ///
    /// # Panics
    /// When there are no such panels.
    pub fn some(
        &self,
        panels: Range<usize>,
        queries: &[f32],
        write: impl FnMut(usize, usize, &[f32]),
    ) {
        self.some_at(Level::current(), panels, queries, write);
    }

    fn some_at(
        &self,
        level: Level,
        panels: Range<usize>,
        queries: &[f32],
        mut write: impl FnMut(usize, usize, &[f32]),
    ) {
        let level = level.min(Level::detected());
        let (rows, size) = (queries.len() / self.dim, self.dim * PAGE);
        SCRATCH.with_borrow_mut(|products| {
            products.resize(rows * PAGE, 0.0);
            for index in panels {
                let panel = index * size..(index + 1) * size;
                match self.half.is_empty() {
                    true => panel_products(level, &self.data[panel], self.dim, queries, products),
                    false => half_products(level, &self.half[panel], self.dim, queries, products),
                }
                for (row, products) in products.chunks_exact(PAGE).enumerate() {
                    write(row, index * PAGE, products);
                }
            }
        });
    }
}

/// The vector of `panels` that each point `[n, dim]` lies nearest to: where `x . c - halves[c]` is largest, which is
/// where |x - c| is smallest when `halves[c]` is half the square of c. Ties go to the lower one. The second says
/// that another comes within `close` of it, so that rounding may have decided.
///
/// # Panics
/// When lengths do not fit or there are no vectors.
pub fn nearest(panels: &Panels, halves: &[f32], points: &[f32], close: f32) -> Vec<(u32, bool)> {
    nearest_at(Level::current(), panels, halves, points, close)
}

/// [`nearest`] at a given level, or at this CPU's best one if that is lower.
pub fn nearest_at(
    level: Level,
    panels: &Panels,
    halves: &[f32],
    points: &[f32],
    close: f32,
) -> Vec<(u32, bool)> {
    /// Points compared at a time.
    const ROWS: usize = 16;
    let level = level.min(Level::detected());
    assert!(
        halves.len() == panels.len() && !halves.is_empty() && panels.half.is_empty(),
        "nearest: {} halves for {} vectors",
        halves.len(),
        panels.len()
    );
    let dim = panels.dim;
    let mut padded = halves.to_vec();
    padded.resize(halves.len().next_multiple_of(PAGE), f32::INFINITY);
    let mut found = Vec::with_capacity(points.len() / dim);
    let mut products = [0f32; ROWS * PAGE];
    for points in points.chunks(ROWS * dim) {
        let rows = points.len() / dim;
        let mut bests = [Best::NONE; ROWS];
        let pairs = panels.data.chunks_exact(dim * PAGE);
        for (index, (panel, halves)) in pairs.zip(padded.chunks_exact(PAGE)).enumerate() {
            panel_products(level, panel, dim, points, &mut products[..rows * PAGE]);
            let at = (index * PAGE) as u32;
            best_rows(level, &products[..rows * PAGE], halves, at, &mut bests);
        }
        found.extend(bests[..rows].iter().map(|best| best.settle(close)));
    }
    found
}

/// The best and the second best score of a point, by lane.
#[derive(Clone, Copy)]
struct Best {
    first: [f32; PAGE],
    second: [f32; PAGE],
    /// The panel of the first.
    at: [u32; PAGE],
}

impl Best {
    const NONE: Best = Best {
        first: [f32::NEG_INFINITY; PAGE],
        second: [f32::NEG_INFINITY; PAGE],
        at: [0; PAGE],
    };

    fn settle(&self, close: f32) -> (u32, bool) {
        let top = self.first.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let lanes = (0..PAGE).filter(|&lane| self.first[lane] == top);
        let label = lanes.map(|lane| self.at[lane] + lane as u32).min();
        let near = |x: &&f32| **x >= top - close;
        let count =
            self.first.iter().filter(near).count() + self.second.iter().filter(near).count();
        (label.unwrap_or(0), count > 1)
    }
}

at_level! {
    /// Products `[n][64]` less halves `[64]` into the bests of n points.
    fn best_rows(products: &[f32], halves: &[f32], at: u32, bests: &mut [Best]) best_body
}

#[inline(always)]
fn best_body<const FMA: bool>(products: &[f32], halves: &[f32], at: u32, bests: &mut [Best]) {
    let halves: &[f32; PAGE] = halves.try_into().expect("a panel's width");
    for (row, best) in products.chunks_exact(PAGE).zip(bests) {
        for lane in 0..PAGE {
            let x = row[lane] - halves[lane];
            let first = best.first[lane];
            let more = x > first;
            let less = if more { first } else { x };
            let second = best.second[lane];
            best.second[lane] = if less > second { less } else { second };
            best.first[lane] = if more { x } else { first };
            best.at[lane] = if more { at } else { best.at[lane] };
        }
    }
}

/// The twin of [`nearest`] in f64, without the second answer. centres: `[k, dim]`.
pub fn nearest_naive(centres: &[f64], points: &[f64], dim: usize) -> Vec<u32> {
    let distance = |a: &[f64], b: &[f64]| -> f64 {
        let halves: f64 = b.iter().map(|x| x * x).sum::<f64>() / 2.0;
        halves - a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>()
    };
    let nearest = |point: &[f64]| {
        let mut best = (f64::INFINITY, 0);
        for (index, centre) in centres.chunks_exact(dim).enumerate() {
            let d = distance(point, centre);
            if d < best.0 {
                best = (d, index as u32);
            }
        }
        best.1
    };
    points.chunks_exact(dim).map(nearest).collect()
}

/// Products of queries `[n, dim]` with some of rows `[count, dim]`, whole runs of them: out `[n][rows of all runs]`,
/// n at most 16.
///
/// # Panics
/// When there are more queries or a run leaves the rows.
pub fn run_products(
    rows: &[f32],
    dim: usize,
    runs: &[Range<usize>],
    queries: &[f32],
    out: &mut [f32],
) {
    assert!(
        queries.len() <= 16 * dim,
        "run_products: {} queries, expected at most 16",
        queries.len() / dim
    );
    let level = Level::current().min(Level::detected());
    let stride = runs.iter().map(|run| run.len()).sum();
    let mut column = 0;
    for run in runs {
        let rows = &rows[run.start * dim..run.end * dim];
        some_products(level, rows, dim, queries, stride, column, out);
        column += run.len();
    }
}

at_level! {
    fn some_products(
        rows: &[f32],
        dim: usize,
        queries: &[f32],
        stride: usize,
        column: usize,
        out: &mut [f32],
    ) some_body
}

#[inline(always)]
fn some_body<const FMA: bool>(
    rows: &[f32],
    dim: usize,
    queries: &[f32],
    stride: usize,
    column: usize,
    out: &mut [f32],
) {
    const N: usize = 16;
    for (index, row) in rows.chunks_exact(dim).enumerate() {
        for (query, x) in queries.chunks_exact(dim).enumerate() {
            let mut sums = [0f32; N];
            let (wide, wide_x) = (row.chunks_exact(N), x.chunks_exact(N));
            let rest = wide.remainder().iter().zip(wide_x.remainder());
            for (a, b) in wide.zip(wide_x) {
                for lane in 0..N {
                    sums[lane] = if FMA {
                        a[lane].mul_add(b[lane], sums[lane])
                    } else {
                        a[lane] * b[lane] + sums[lane]
                    };
                }
            }
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    sums[lane] += sums[lane + half];
                }
            }
            out[query * stride + column + index] = sums[0] + rest.map(|(a, b)| a * b).sum::<f32>();
        }
    }
}

/// What a key of each cluster gets of the queries' attention if it were its centroid:
/// `out[c] = mean over queries q of exp(scale q.C_c) / sum_c' n_c' exp(scale q.C_c')`, 0 for empty
/// clusters. logits: `[n][stride]` products of n queries with the centroids, overwritten; counts:
/// keys of each cluster.
pub fn cluster_scores(
    logits: &mut [f32],
    stride: usize,
    counts: &[f32],
    scale: f32,
    out: &mut [f32],
) {
    let level = Level::current().min(Level::detected());
    let rows = logits.len() / stride;
    out.fill(0.0);
    for row in logits.chunks_exact_mut(stride) {
        cluster_row(level, &mut row[..counts.len()], counts, scale, rows, out);
    }
}

at_level! {
    /// Adds one query's share of [`cluster_scores`].
    fn cluster_row(
        row: &mut [f32],
        counts: &[f32],
        scale: f32,
        rows: usize,
        out: &mut [f32],
    ) cluster_body
}

#[inline(always)]
fn cluster_body<const FMA: bool>(
    row: &mut [f32],
    counts: &[f32],
    scale: f32,
    rows: usize,
    out: &mut [f32],
) {
    const N: usize = 16;
    // Lanes in fixed order, so that compilers need not reorder sums.
    let mut tops = [f32::NEG_INFINITY; N];
    for (row, counts) in row.chunks_mut(N).zip(counts.chunks(N)) {
        for ((x, &count), top) in row.iter_mut().zip(counts).zip(&mut tops) {
            *x = if count > 0.0 {
                *x * scale
            } else {
                f32::NEG_INFINITY
            };
            *top = if *x > *top { *x } else { *top };
        }
    }
    let max = tops.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return;
    }
    let mut sums = [0f64; N];
    for (row, counts) in row.chunks_mut(N).zip(counts.chunks(N)) {
        for ((x, &count), sum) in row.iter_mut().zip(counts).zip(&mut sums) {
            *x = if count > 0.0 { exp(*x - max) } else { 0.0 };
            *sum += f64::from(*x) * f64::from(count);
        }
    }
    let factor = (1.0 / (sums.iter().sum::<f64>() * rows as f64)) as f32;
    for (out, &x) in out.iter_mut().zip(row.iter()) {
        *out += x * factor;
    }
}

/// The twin of [`cluster_scores`] from the queries and centroids themselves, in f64.
pub fn cluster_scores_naive(
    queries: &[f32],
    centroids: &[f32],
    dim: usize,
    counts: &[f32],
    scale: f32,
) -> Vec<f64> {
    let mut out = vec![0f64; counts.len()];
    let rows = queries.len() / dim;
    for query in queries.chunks_exact(dim) {
        let logits: Vec<f64> = centroids
            .chunks_exact(dim)
            .map(|c| {
                let products = query.iter().zip(c).map(|(&q, &c)| q as f64 * c as f64);
                scale as f64 * products.sum::<f64>()
            })
            .collect();
        let seen = || logits.iter().zip(counts).filter(|(_, n)| **n > 0.0);
        let max = seen().fold(f64::NEG_INFINITY, |max, (&l, _)| max.max(l));
        let total: f64 = seen().map(|(&l, &n)| n as f64 * (l - max).exp()).sum();
        for ((out, l), &n) in out.iter_mut().zip(&logits).zip(counts) {
            if n > 0.0 {
                *out += (l - max).exp() / total / rows as f64;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_nearest_vector_is_the_naive_one(
            dim in 1usize..70,
            count in 1usize..200,
            points in 1usize..40,
            seed in any::<u32>(),
        ) {
            let (centres, points) = (numbers(count * dim, seed), numbers(points * dim, !seed));
            let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
            let want = nearest_naive(&wide(&centres), &wide(&points), dim);
            let halves: Vec<f32> = centres
                .chunks_exact(dim)
                .map(|c| c.iter().map(|x| x * x).sum::<f32>() / 2.0)
                .collect();
            let panels = Panels::new(&centres, dim);
            for level in Level::available() {
                let found = nearest_at(level, &panels, &halves, &points, 1e-4);
                prop_assert_eq!(found.len(), want.len());
                for (&(label, close), &want) in found.iter().zip(&want) {
                    prop_assert!(label == want || close, "{level:?}: {label}, expected {want}");
                }
                // Two of the same are close, and the lower one is taken.
                let twice = Panels::new(&centres.repeat(2), dim);
                let again = nearest_at(level, &twice, &halves.repeat(2), &points, 1e-4);
                for (&(label, close), &(other, _)) in again.iter().zip(&found) {
                    prop_assert!(close && label == other);
                }
            }
        }

        #[test]
        fn products_with_runs_of_rows_are_plain_products(
            dim in 1usize..80,
            count in 1usize..60,
            queries in 1usize..5,
            seed in any::<u32>(),
        ) {
            let (rows, queries) = (numbers(count * dim, seed), numbers(queries * dim, !seed));
            let runs = [0..count / 3, count / 2..count];
            let chosen: Vec<usize> = runs.iter().cloned().flatten().collect();
            let mut found = vec![0f32; queries.len() / dim * chosen.len()];
            run_products(&rows, dim, &runs, &queries, &mut found);
            let mut found = found.into_iter();
            for query in queries.chunks_exact(dim) {
                for &row in &chosen {
                    let row = &rows[row * dim..(row + 1) * dim];
                    let want: f64 = query.iter().zip(row).map(|(&a, &b)| a as f64 * b as f64).sum();
                    prop_assert!((found.next().unwrap() as f64 - want).abs() <= 1e-5 * dim as f64);
                }
            }
        }

        #[test]
        fn cluster_scores_are_the_naive_ones(
            dim in 1usize..70,
            clusters in 1usize..150,
            rows in 1usize..7,
            scale in prop::sample::select(vec![0.1f32, 1.0, 100.0]),
            seed in any::<u32>(),
        ) {
            let (queries, centroids) = (numbers(rows * dim, seed), numbers(clusters * dim, !seed));
            let mut counts: Vec<f32> = (0..clusters).map(|c| ((c * 7 + 3) % 5) as f32).collect();
            counts[clusters / 2] = 2.0;
            let want = cluster_scores_naive(&queries, &centroids, dim, &counts, scale);
            let panels = Panels::new(&centroids, dim);
            prop_assert_eq!(panels.len(), clusters);
            // f16 has 11 bits.
            let (mut exact, mut rounded) = (Vec::new(), Vec::new());
            let half = Panels::half(&centroids, dim);
            let stride = panels.products(&queries, &mut exact);
            prop_assert!(half.bytes() * 2 == panels.bytes());
            for level in Level::available() {
                prop_assert_eq!(half.products_at(level, &queries, &mut rounded), stride);
                for (a, b) in exact.iter().zip(&rounded) {
                    prop_assert!((a - b).abs() <= 1e-3 * dim as f32, "{level:?}: {b}, expected {a}");
                }
            }
            for level in Level::available() {
                let mut logits = Vec::new();
                let stride = panels.products_at(level, &queries, &mut logits);
                let mut found = vec![0f32; clusters];
                cluster_scores(&mut logits, stride, &counts, scale, &mut found);
                for (&found, &want) in found.iter().zip(&want) {
                    // Logits of up to some hundreds: their rounding shows in the exponential.
                    let tolerance = 1e-6 + 2e-6 * scale * dim as f32;
                    prop_assert!(found.is_finite());
                    prop_assert!((found - want as f32).abs() <= tolerance, "{found}, expected {want}");
                }
            }
        }
    }
}

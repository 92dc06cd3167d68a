//! Choosing keys: how well short runs of cached keys, or the centroids of clusters of keys, answer
//! a few queries.
//!
//! Both work on *panels* of 64 columns, `[head_dim][64]` in f32: runs of keys are copied together
//! to one, whatever their storage type, so that the products always fill whole vectors.

use crate::attention::{KvDtype, KvLayout, PAGE};
use crate::cpu::Level;
use crate::elementwise::exp;
use crate::slots::Run;
use std::cell::RefCell;

/// A run of keys on one page.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The kv head's section of the page's K plane ([`KvLayout::section`]).
    pub keys: &'a [u8],
    /// First slot.
    pub slot: usize,
    /// Number of slots, at least 1.
    pub count: usize,
}

#[derive(Default)]
struct Scratch {
    section: Vec<u8>,
    panel: Vec<f32>,
    products: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out[i] = max over queries and over the keys of pieces[i] of query . key`.
/// queries: `[n, head_dim]`, n at least 1; out: `[pieces]`.
///
/// # Panics
/// When lengths do not fit or a piece leaves its page.
pub fn best_scores(layout: &KvLayout, pieces: &[Piece], queries: &[f32], out: &mut [f32]) {
    best_scores_at(Level::current(), layout, pieces, queries, out);
}

/// [`best_scores`] at a given level, or at this CPU's best one if that is lower.
pub fn best_scores_at(
    level: Level,
    layout: &KvLayout,
    pieces: &[Piece],
    queries: &[f32],
    out: &mut [f32],
) {
    let level = level.min(Level::detected());
    let dim = layout.head_dim;
    assert_eq!(pieces.len(), out.len(), "best_scores: one score per piece");
    assert!(
        !queries.is_empty() && queries.len().is_multiple_of(dim),
        "best_scores: {} elements of queries, expected a multiple of {dim}",
        queries.len()
    );
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch {
            section,
            panel,
            products,
        } = scratch;
        section.resize(layout.section(0).len(), 0);
        panel.resize(dim * PAGE, 0.0);
        products.resize(queries.len() / dim * PAGE, 0.0);
        let mut first = 0;
        while first < pieces.len() {
            let (mut used, mut end) = (0, first);
            while let Some(piece) = pieces.get(end) {
                if used + piece.count > PAGE {
                    break;
                }
                let run = Run {
                    from: piece.slot,
                    to: used,
                    count: piece.count,
                };
                layout.copy_keys(piece.keys, section, run);
                used += piece.count;
                end += 1;
            }
            assert!(end > first, "a piece of more than {PAGE} keys");
            expand(level, layout, section, panel);
            panel_products(level, panel, dim, queries, products);
            let (best, rest) = products.split_at_mut(PAGE);
            for row in rest.chunks_exact(PAGE) {
                for (best, &x) in best.iter_mut().zip(row) {
                    *best = if x > *best { x } else { *best };
                }
            }
            let mut slot = 0;
            for (piece, out) in pieces[first..end].iter().zip(&mut out[first..end]) {
                let scores = &best[slot..slot + piece.count];
                *out = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                slot += piece.count;
            }
            first = end;
        }
    });
}

/// The twin of [`best_scores`]: the definition, in f64.
pub fn best_scores_naive(layout: &KvLayout, pieces: &[Piece], queries: &[f32], out: &mut [f32]) {
    let mut plane = vec![0u8; layout.plane_bytes()];
    let mut key = vec![0f32; layout.head_dim];
    for (piece, out) in pieces.iter().zip(out) {
        plane[layout.section(0)].copy_from_slice(piece.keys);
        let mut best = f64::NEG_INFINITY;
        for slot in piece.slot..piece.slot + piece.count {
            layout.read_key(&plane, 0, slot, &mut key);
            for query in queries.chunks_exact(layout.head_dim) {
                let products = query.iter().zip(&key).map(|(&q, &k)| q as f64 * k as f64);
                best = best.max(products.sum());
            }
        }
        *out = best as f32;
    }
}

/// Vectors in panels: `[ceil(count / 64)][dim][64]`, zeros after the last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Panels {
    dim: usize,
    count: usize,
    data: Vec<f32>,
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
        Panels { dim, count, data }
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True without vectors.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Products of queries `[n, dim]` with every vector: `[n][out_stride]`, of which the first
    /// [`Panels::len`] rounded up to 64 are written.
    pub fn products(&self, queries: &[f32], out: &mut Vec<f32>) -> usize {
        self.products_at(Level::current(), queries, out)
    }

    /// [`Panels::products`] at a given level, or at this CPU's best one if that is lower.
    pub fn products_at(&self, level: Level, queries: &[f32], out: &mut Vec<f32>) -> usize {
        let level = level.min(Level::detected());
        let (rows, stride) = (queries.len() / self.dim, self.count.div_ceil(PAGE) * PAGE);
        out.resize(rows * stride, 0.0);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.products.resize(rows * PAGE, 0.0);
            for (index, panel) in self.data.chunks_exact(self.dim * PAGE).enumerate() {
                panel_products(level, panel, self.dim, queries, &mut scratch.products);
                for (row, products) in scratch.products.chunks_exact(PAGE).enumerate() {
                    out[row * stride + index * PAGE..][..PAGE].copy_from_slice(products);
                }
            }
        });
        stride
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
    let rows = logits.len() / stride;
    out.fill(0.0);
    for row in logits.chunks_exact_mut(stride) {
        let row = &mut row[..counts.len()];
        let mut max = f32::NEG_INFINITY;
        for (x, &count) in row.iter_mut().zip(counts) {
            *x = if count > 0.0 {
                *x * scale
            } else {
                f32::NEG_INFINITY
            };
            max = if *x > max { *x } else { max };
        }
        if max == f32::NEG_INFINITY {
            continue;
        }
        exp_all(row, max);
        let total: f64 = row
            .iter()
            .zip(counts)
            .filter(|&(_, &count)| count > 0.0)
            .map(|(&x, &count)| f64::from(x) * f64::from(count))
            .sum();
        let factor = (1.0 / (total * rows as f64)) as f32;
        for ((out, &x), &count) in out.iter_mut().zip(row.iter()).zip(counts) {
            *out += if count > 0.0 { x * factor } else { 0.0 };
        }
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

macro_rules! at_level {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:ident) => {
        $(#[$doc])*
        fn $name(level: Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                unsafe fn wide($($arg: $ty),*) { $body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn middle($($arg: $ty),*) { $body::<true>($($arg),*) }
                // SAFETY: callers bound the level by the detected one.
                match level {
                    Level::Amx | Level::Avx512 => return unsafe { wide($($arg),*) },
                    Level::Avx2 => return unsafe { middle($($arg),*) },
                    Level::Portable => {}
                }
            }
            let _ = level;
            $body::<false>($($arg),*)
        }
    };
}

at_level! {
    /// out `[n][64]` = queries `[n, dim]` times panel `[dim][64]`.
    fn panel_products(panel: &[f32], dim: usize, queries: &[f32], out: &mut [f32]) products_body
}

#[inline(always)]
fn products_body<const FMA: bool>(panel: &[f32], dim: usize, queries: &[f32], out: &mut [f32]) {
    let rows = queries.len() / dim;
    let mut row = 0;
    while row < rows {
        let (queries, out) = (&queries[row * dim..], &mut out[row * PAGE..]);
        row += match rows - row {
            1 => rows_body::<FMA, 1>(panel, dim, queries, out),
            2 => rows_body::<FMA, 2>(panel, dim, queries, out),
            3 => rows_body::<FMA, 3>(panel, dim, queries, out),
            _ => rows_body::<FMA, 4>(panel, dim, queries, out),
        };
    }
}

#[inline(always)]
fn rows_body<const FMA: bool, const R: usize>(
    panel: &[f32],
    dim: usize,
    queries: &[f32],
    out: &mut [f32],
) -> usize {
    const HALF: usize = PAGE / 2;
    for half in [0, HALF] {
        let mut sums = [[0f32; HALF]; R];
        for (d, keys) in panel.chunks_exact(PAGE).take(dim).enumerate() {
            let keys: &[f32; HALF] = keys[half..half + HALF].try_into().expect("half a panel");
            for r in 0..R {
                let x = queries[r * dim + d];
                for s in 0..HALF {
                    sums[r][s] = if FMA {
                        x.mul_add(keys[s], sums[r][s])
                    } else {
                        x * keys[s] + sums[r][s]
                    };
                }
            }
        }
        for r in 0..R {
            out[r * PAGE + half..][..HALF].copy_from_slice(&sums[r]);
        }
    }
    R
}

/// `x = e^(x - max)`.
fn exp_all(x: &mut [f32], max: f32) {
    exp_rows(Level::current().min(Level::detected()), x, max)
}

at_level! {
    fn exp_rows(x: &mut [f32], max: f32) exp_body
}

#[inline(always)]
fn exp_body<const FMA: bool>(x: &mut [f32], max: f32) {
    for x in x {
        *x = exp(*x - max);
    }
}

/// A section of keys as a panel.
fn expand(level: Level, layout: &KvLayout, section: &[u8], panel: &mut [f32]) {
    match layout.dtype {
        KvDtype::F32 => {
            for (x, bytes) in panel.iter_mut().zip(section.chunks_exact(4)) {
                *x = f32::from_ne_bytes(bytes.try_into().expect("four bytes"));
            }
        }
        KvDtype::F16 => expand_f16(level, section, panel),
        KvDtype::Bf16 => expand_bf16(level, section, panel),
        KvDtype::Int8 => expand_int8(level, section, panel),
    }
}

at_level! {
    fn expand_bf16(section: &[u8], panel: &mut [f32]) bf16_body
}

#[inline(always)]
fn bf16_body<const FMA: bool>(section: &[u8], panel: &mut [f32]) {
    for (rows, pairs) in panel
        .chunks_exact_mut(2 * PAGE)
        .zip(section.chunks_exact(4 * PAGE))
    {
        let (even, odd) = rows.split_at_mut(PAGE);
        for slot in 0..PAGE {
            let pair = u32_at(pairs, slot);
            even[slot] = f32::from_bits(pair << 16);
            odd[slot] = f32::from_bits(pair & 0xffff_0000);
        }
    }
}

at_level! {
    fn expand_int8(section: &[u8], panel: &mut [f32]) int8_body
}

#[inline(always)]
fn int8_body<const FMA: bool>(section: &[u8], panel: &mut [f32]) {
    // head_dim may end within a row of fours; the scales come after the last such row.
    let dims = panel.len() / PAGE;
    let scales = &section[dims.next_multiple_of(16) * PAGE..];
    for (dim, row) in panel.chunks_exact_mut(PAGE).enumerate() {
        let fours = &section[dim / 4 * PAGE * 4..][..PAGE * 4];
        for slot in 0..PAGE {
            let code = (u32_at(fours, slot) >> (dim % 4 * 8)) as u8 ^ 0x80;
            row[slot] = f32::from(code as i8) * f32::from_bits(u32_at(scales, slot));
        }
    }
}

#[inline(always)]
fn u32_at(bytes: &[u8], index: usize) -> u32 {
    u32::from_ne_bytes(
        bytes[index * 4..index * 4 + 4]
            .try_into()
            .expect("four bytes"),
    )
}

/// f16 needs its own instruction: compilers do not find it in plain code.
fn expand_f16(level: Level, section: &[u8], panel: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::*;

        #[target_feature(enable = "avx512f,avx512bw")]
        unsafe fn wide(pairs: &[u8], even: &mut [f32], odd: &mut [f32]) {
            for slot in (0..PAGE).step_by(16) {
                let x = _mm512_loadu_si512(pairs.as_ptr().add(slot * 4).cast());
                let low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
                let high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(x)));
                _mm512_storeu_ps(even.as_mut_ptr().add(slot), low);
                _mm512_storeu_ps(odd.as_mut_ptr().add(slot), high);
            }
        }

        #[target_feature(enable = "avx2,f16c")]
        unsafe fn middle(pairs: &[u8], even: &mut [f32], odd: &mut [f32]) {
            let convert = |x: __m256i| {
                let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(x, x));
                _mm256_cvtph_ps(_mm256_castsi256_si128(packed))
            };
            for slot in (0..PAGE).step_by(8) {
                let x = _mm256_loadu_si256(pairs.as_ptr().add(slot * 4).cast());
                let low = convert(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
                let high = convert(_mm256_srli_epi32::<16>(x));
                _mm256_storeu_ps(even.as_mut_ptr().add(slot), low);
                _mm256_storeu_ps(odd.as_mut_ptr().add(slot), high);
            }
        }

        if level >= Level::Avx2 {
            for (rows, pairs) in panel
                .chunks_exact_mut(2 * PAGE)
                .zip(section.chunks_exact(4 * PAGE))
            {
                let (even, odd) = rows.split_at_mut(PAGE);
                // SAFETY: callers bound the level by the detected one; each slice has 64 entries.
                unsafe {
                    match level {
                        Level::Avx2 => middle(pairs, even, odd),
                        _ => wide(pairs, even, odd),
                    }
                }
            }
            return;
        }
    }
    let _ = level;
    for (rows, pairs) in panel
        .chunks_exact_mut(2 * PAGE)
        .zip(section.chunks_exact(4 * PAGE))
    {
        let (even, odd) = rows.split_at_mut(PAGE);
        for slot in 0..PAGE {
            let pair = u32_at(pairs, slot);
            even[slot] = half::f16::from_bits(pair as u16).to_f32();
            odd[slot] = half::f16::from_bits((pair >> 16) as u16).to_f32();
        }
    }
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
        fn best_scores_are_the_naive_ones_at_every_level(
            dtype in prop::sample::select(vec![KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8]),
            half_dim in 1usize..40,
            queries in 1usize..10,
            runs in prop::collection::vec((0usize..3, 0usize..64, 1usize..9), 1..60),
            seed in any::<u32>(),
        ) {
            let layout = KvLayout { num_kv_heads: 2, head_dim: 2 * half_dim, dtype };
            let width = 2 * layout.head_dim;
            let planes: Vec<Vec<u8>> = (0..3)
                .map(|page| {
                    let mut plane = vec![0u8; layout.plane_bytes()];
                    let rows = numbers(PAGE * width, seed ^ page);
                    layout.write_keys(&mut plane, 0, &rows, width);
                    plane
                })
                .collect();
            let pieces: Vec<Piece> = runs
                .iter()
                .map(|&(page, slot, count)| Piece {
                    keys: &planes[page][layout.section(1)],
                    slot,
                    count: count.min(PAGE - slot),
                })
                .collect();
            let queries = numbers(queries * layout.head_dim, !seed);
            let mut want = vec![0f32; pieces.len()];
            best_scores_naive(&layout, &pieces, &queries, &mut want);
            for level in Level::available() {
                let mut found = vec![0f32; pieces.len()];
                best_scores_at(level, &layout, &pieces, &queries, &mut found);
                for (found, want) in found.iter().zip(&want) {
                    prop_assert!((found - want).abs() <= 2e-5 * layout.head_dim as f32, "{level:?}: {found}, expected {want}");
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

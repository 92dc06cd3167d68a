//! Choosing keys: how well short runs of cached keys answer some queries.
//!
//! Runs of keys are copied together to panels of 64 columns, whatever their storage type, so that the
//! products always fill whole vectors.

use crate::attention::{KvDtype, KvLayout, PAGE};
use crate::cpu::Level;
use crate::panel::{at_level, expand, panel_products};
use crate::slots::Run;
#[cfg(target_arch = "x86_64")]
use crate::words::{self, CHUNK};
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
    /// Of keys as 16-bit integers, and their scales; see [`Prober`].
    codes: Vec<i16>,
    scales: Vec<f32>,
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
    Prober::at(level, layout, queries).best_scores(pieces, out);
}

/// From this many queries on f16 and bf16 keys are compared as 16-bit integers, where the CPU multiplies
/// those twice as fast.
const WORD_ROWS: usize = 13;

/// Queries made ready to be compared with many pieces of keys, as a search does round after round.
///
/// At the AVX-512 level many queries against f16 or bf16 keys are multiplied as integers, as attention
/// itself does (relative error about 1e-4 of the largest terms); else in f32.
pub struct Prober<'a> {
    level: Level,
    layout: KvLayout,
    /// `[n, head_dim]`
    queries: &'a [f32],
    /// The same as integers, with factors `[chunks, n]`; empty where f32 is used.
    codes: Vec<i16>,
    factors: Vec<f32>,
}

impl<'a> Prober<'a> {
    /// queries: `[n, head_dim]`, n at least 1.
    ///
    /// # Panics
    /// When the length of `queries` does not fit.
    pub fn new(layout: &KvLayout, queries: &'a [f32]) -> Self {
        Self::at(Level::current(), layout, queries)
    }

    /// [`Prober::new`] at a given level, or at this CPU's best one if that is lower.
    pub fn at(level: Level, layout: &KvLayout, queries: &'a [f32]) -> Self {
        let level = level.min(Level::detected());
        let dim = layout.head_dim;
        assert!(
            !queries.is_empty() && queries.len().is_multiple_of(dim),
            "best_scores: {} elements of queries, expected a multiple of {dim}",
            queries.len()
        );
        #[allow(unused_mut)]
        let (mut codes, mut factors) = (Vec::new(), Vec::new());
        #[cfg(target_arch = "x86_64")]
        {
            let rows = queries.len() / dim;
            let half = matches!(layout.dtype, KvDtype::F16 | KvDtype::Bf16);
            if half && rows >= WORD_ROWS && level >= Level::Avx512 {
                codes.resize(rows * dim, 0);
                factors.resize(dim.div_ceil(CHUNK) * rows, 0.0);
                for (row, from) in queries.chunks_exact(dim).enumerate() {
                    let to: *mut i16 = codes[row * dim..].as_mut_ptr();
                    // SAFETY: the level has the instructions; codes and factors have a place for each row.
                    unsafe {
                        words::quantise_row(from, to, dim, factors.as_mut_ptr().add(row), rows)
                    };
                }
            }
        }
        Prober {
            level,
            layout: *layout,
            queries,
            codes,
            factors,
        }
    }

    /// `out[i] = max over queries and over the keys of pieces[i] of query . key`.
    ///
    /// # Panics
    /// When lengths do not fit or a piece leaves its page.
    pub fn best_scores(&self, pieces: &[Piece], out: &mut [f32]) {
        assert_eq!(pieces.len(), out.len(), "best_scores: one score per piece");
        let (dim, rows) = (
            self.layout.head_dim,
            self.queries.len() / self.layout.head_dim,
        );
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.section.resize(self.layout.section(0).len(), 0);
            scratch.panel.resize(dim * PAGE, 0.0);
            scratch.products.resize(rows * PAGE, 0.0);
            let mut first = 0;
            let (mut end, mut used) = panel_end(pieces, first);
            while first < pieces.len() {
                let (next, next_used) = panel_end(pieces, end);
                for piece in &pieces[end..next] {
                    (self.layout).fetch_keys(piece.keys, piece.slot, piece.count);
                }
                self.panel(&pieces[first..end], used, scratch);
                let (best, rest) = scratch.products.split_at_mut(PAGE);
                columns_best(self.level, rest, best);
                let mut slot = 0;
                for (piece, out) in pieces[first..end].iter().zip(&mut out[first..end]) {
                    let scores = &best[slot..slot + piece.count];
                    *out = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    slot += piece.count;
                }
                (first, end, used) = (end, next, next_used);
            }
        });
    }

    /// Products `[n][64]` with the `used` keys of pieces, side by side.
    fn panel(&self, pieces: &[Piece], used: usize, scratch: &mut Scratch) {
        let layout = &self.layout;
        #[cfg(target_arch = "x86_64")]
        if !self.codes.is_empty() {
            match layout.dtype {
                KvDtype::F16 => self.words::<words::F16Bits>(pieces, used, scratch),
                _ => self.words::<words::Bf16Bits>(pieces, used, scratch),
            }
            return;
        }
        let _ = used;
        copy_pieces(layout, pieces, &mut scratch.section);
        expand(self.level, layout, &scratch.section, &mut scratch.panel);
        let (panel, products) = (&scratch.panel, &mut scratch.products);
        panel_products(self.level, panel, layout.head_dim, self.queries, products);
    }

    #[cfg(target_arch = "x86_64")]
    fn words<H: words::Half>(&self, pieces: &[Piece], used: usize, scratch: &mut Scratch) {
        const STEP: usize = CHUNK / 2;
        let layout = &self.layout;
        let (dim, rows) = (layout.head_dim, self.queries.len() / layout.head_dim);
        let (pairs, chunks) = (dim / 2, dim.div_ceil(CHUNK));
        scratch.codes.resize(dim * PAGE, 0);
        scratch.scales.resize(chunks * PAGE, 0.0);
        let (codes, scales) = (scratch.codes.as_mut_ptr(), scratch.scales.as_mut_ptr());
        // SAFETY: the level has the instructions (`codes` is empty otherwise); sections hold `pairs` rows of 64
        // pairs, and columns come in whole groups of 16 within them.
        unsafe {
            let column = |section: *const u8, from: usize, to: usize| {
                for (chunk, pair) in (0..pairs).step_by(STEP).enumerate() {
                    let count = STEP.min(pairs - pair);
                    let from = section.add((pair * PAGE + from) * 4);
                    let to_codes = codes.add((pair * PAGE + to) * 2);
                    let scale = scales.add(chunk * PAGE + to);
                    words::expand_columns::<H>(from, 2 * PAGE, count, to_codes, 2 * PAGE, scale);
                }
            };
            let mut to = 0;
            let whole = |piece: &Piece| (piece.slot | piece.count).is_multiple_of(16);
            if pieces.iter().all(whole) {
                for piece in pieces {
                    assert!(piece.slot + piece.count <= PAGE, "a piece leaves its page");
                    let section = &piece.keys[..layout.section(0).len()];
                    for from in (piece.slot..piece.slot + piece.count).step_by(16) {
                        column(section.as_ptr(), from, to);
                        to += 16;
                    }
                }
            } else {
                copy_pieces(layout, pieces, &mut scratch.section);
                (0..used)
                    .step_by(16)
                    .for_each(|at| column(scratch.section.as_ptr(), at, at));
            }
            words::product(&words::WordProduct {
                a: self.codes.as_ptr(),
                a_stride: dim,
                rows,
                b: codes,
                b_cols: PAGE,
                pairs: (0, pairs),
                cols: (0, used.next_multiple_of(16)),
                factor: self.factors.as_ptr(),
                factor_stride: rows,
                scale: scales,
                scale_stride: PAGE,
                c: scratch.products.as_mut_ptr(),
                c_stride: PAGE,
                add: false,
            });
        }
    }
}

/// The end of the pieces from `first` on that fill a panel together, and their keys.
fn panel_end(pieces: &[Piece], first: usize) -> (usize, usize) {
    let (mut used, mut end) = (0, first);
    while let Some(piece) = pieces.get(end).filter(|p| used + p.count <= PAGE) {
        used += piece.count;
        end += 1;
    }
    assert!(
        end > first || end == pieces.len(),
        "a piece of more than {PAGE} keys"
    );
    (end, used)
}

/// Copies pieces to one section, side by side.
fn copy_pieces(layout: &KvLayout, pieces: &[Piece], section: &mut [u8]) {
    let mut used = 0;
    for piece in pieces {
        let run = Run {
            from: piece.slot,
            to: used,
            count: piece.count,
        };
        layout.copy_keys(piece.keys, section, run);
        used += piece.count;
    }
}

at_level! {
    /// best `[64]` = the largest of it and of each row of rows `[n][64]`.
    fn columns_best(rows: &[f32], best: &mut [f32]) best_body
}

#[inline(always)]
fn best_body<const FMA: bool>(rows: &[f32], best: &mut [f32]) {
    let best: &mut [f32; PAGE] = best.try_into().expect("a panel's width");
    let mut top = *best;
    for row in rows.chunks_exact(PAGE) {
        for (top, &x) in top.iter_mut().zip(row) {
            *top = if x > *top { x } else { *top };
        }
    }
    *best = top;
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

    fn planes(layout: &KvLayout, seed: u32) -> Vec<Vec<u8>> {
        let width = layout.num_kv_heads * layout.head_dim;
        (0..3)
            .map(|page| {
                let mut plane = vec![0u8; layout.plane_bytes()];
                let rows = numbers(PAGE * width, seed ^ page);
                layout.write_keys(&mut plane, 0, &rows, width);
                plane
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
            let planes = planes(&layout, seed);
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
        fn many_queries_rate_pieces_as_the_naive_twin_does(
            dtype in prop::sample::select(vec![KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8]),
            half_dim in 1usize..80,
            queries in WORD_ROWS..50,
            aligned in any::<bool>(),
            runs in prop::collection::vec((0usize..3, 0usize..64, 1usize..33), 1..20),
            seed in any::<u32>(),
        ) {
            let layout = KvLayout { num_kv_heads: 2, head_dim: 2 * half_dim, dtype };
            let planes = planes(&layout, seed);
            let pieces: Vec<Piece> = runs
                .iter()
                .map(|&(page, slot, count)| {
                    let (slot, count) = match aligned {
                        true => (slot / 16 * 16, count.next_multiple_of(16)),
                        false => (slot, count),
                    };
                    Piece {
                        keys: &planes[page][layout.section(1)],
                        slot,
                        count: count.min(PAGE - slot),
                    }
                })
                .collect();
            let queries = numbers(queries * layout.head_dim, !seed);
            let mut want = vec![0f32; pieces.len()];
            best_scores_naive(&layout, &pieces, &queries, &mut want);
            for level in Level::available() {
                let prober = Prober::at(level, &layout, &queries);
                let mut found = vec![0f32; pieces.len()];
                // Twice, as a search does.
                for _ in 0..2 {
                    prober.best_scores(&pieces, &mut found);
                }
                // Integers have 13 bits at worst: a rounding of 2^-14 of the largest element for each product.
                let tolerance = 2e-4 * (layout.head_dim as f32).sqrt() + 2e-5 * layout.head_dim as f32;
                for (found, want) in found.iter().zip(&want) {
                    prop_assert!((found - want).abs() <= tolerance, "{level:?}: {found}, expected {want}");
                }
            }
        }
    }
}

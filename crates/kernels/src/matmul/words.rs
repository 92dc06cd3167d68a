//! Prefill by 16-bit integers (AVX-512 VNNI, see [`crate::words`]): the codes of a few panels become
//! words once, and many rows of `x` meet them while they are in cache.
//!
//! Both integer paths spend two dot products on 32 weights and 16 rows. But here scales apply once
//! per 64 inputs and not once per 32, on words that already carry `d` and `m`: a third faster from
//! a few hundred rows on. Weights are rounded to 2^-14 of their bound within 64 inputs of a row.

use super::format::{BLOCK, Format, LANES};
use super::{Epilogue, PackedMatrix, avx512};
use crate::pool::{Pool, SharedMut};
use crate::words::{Bf16Bits, CHUNK, TOP, WordProduct, expand_columns, product, quantise_row};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// From this many rows on, words pay.
pub(super) const MIN_ROWS: usize = 96;

/// Panels of a unit of work: as many columns as the product takes at a time.
const PANELS: usize = 4;
const COLS: usize = PANELS * LANES;
/// Blocks of inputs of a slab: its words (128 KiB) stay in a core's second-level cache.
const SLAB: usize = 16;
/// Fewest rows of a unit, most rows (their results stay in the cache too), and units per thread that
/// even out unequal cores.
const UNIT_ROWS: usize = 128;
const MOST_UNIT_ROWS: usize = 512;
const UNITS_PER_THREAD: usize = 8;

const _: () = assert!(BLOCK == CHUNK);

/// Buffers kept between calls, so that no call touches fresh pages.
#[derive(Default)]
struct Room {
    /// The rows of a call, `[m][blocks * 64]`.
    codes: Vec<Line>,
    /// `[blocks][m]`.
    factors: Vec<f32>,
    /// Words of a slab of a unit's panels, `[inputs / 2][COLS][2]`.
    words: Vec<Line>,
    /// Results of a unit, `[rows][COLS]`.
    sums: Vec<Line>,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i16; 32]);

thread_local! {
    static CALL: RefCell<Room> = RefCell::default();
    static UNIT: RefCell<Room> = RefCell::default();
}

fn grow(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line([0; 32]));
    }
}

/// `out (=|+=) x . W^T (+ bias)`, the slices' lengths checked by the caller.
///
/// # Safety
/// The CPU has AVX-512 with VNNI.
pub(super) unsafe fn run(
    matrix: &PackedMatrix,
    x: &[f32],
    m: usize,
    out: &mut [f32],
    how: Epilogue<'_>,
) {
    let (cols, blocks) = (matrix.cols, matrix.blocks());
    let stride = blocks * BLOCK;
    let mut call = CALL.take();
    grow(&mut call.codes, m * stride / 32);
    if call.factors.len() < m * blocks {
        call.factors.resize(m * blocks, 0.0);
    }
    let codes = SharedMut::new(&mut call.codes);
    let factors = SharedMut::new(&mut call.factors);
    Pool::global().for_each_in_runs(m.div_ceil(16), |tile| {
        for row in tile * 16..(tile * 16 + 16).min(m) {
            // SAFETY: each row is one task's; its factors are strided, and no other task's.
            unsafe {
                let to = codes.slice(row * stride / 32, stride / 32).as_mut_ptr();
                let factor = factors.slice(row, 1).as_mut_ptr();
                quantise_row(&x[row * cols..][..cols], to.cast(), stride, factor, m);
            }
        }
    });
    let codes: *const i16 = call.codes.as_ptr().cast();
    let codes = codes as usize;
    let factors: &[f32] = &call.factors;

    let groups = groups(matrix);
    let threads = Pool::global().threads();
    let mut parts = m.div_ceil(MOST_UNIT_ROWS);
    while groups.len() * parts < UNITS_PER_THREAD * threads && m / (2 * parts) >= UNIT_ROWS {
        parts *= 2;
    }
    let out = SharedMut::new(out);
    Pool::global().for_each_in_runs(parts * groups.len(), |unit| {
        let (part, group) = (unit / groups.len(), &groups[unit % groups.len()]);
        let rows = (part * m / parts, (part + 1) * m / parts);
        UNIT.with_borrow_mut(|room| {
            // SAFETY: the unit's columns and rows of the output are its own.
            unsafe {
                let left = Left {
                    codes: codes as *const i16,
                    stride,
                    factors,
                    m,
                    rows,
                };
                let (segment, _, row, _) = matrix.panel(group.0);
                let width = (segment.row + segment.rows - row).min(COLS);
                // Whole panels without a bias go straight to the output.
                if how.bias.is_none() && width.is_multiple_of(LANES) {
                    let to = out.at(rows.0 * matrix.rows + row);
                    multiply(
                        matrix,
                        group,
                        &left,
                        room,
                        (to, matrix.rows),
                        how.accumulate,
                    );
                    return;
                }
                grow(&mut room.sums, left.count() * COLS / 16);
                let sums: *mut f32 = room.sums.as_mut_ptr().cast();
                multiply(matrix, group, &left, room, (sums, COLS), false);
                for r in 0..left.count() {
                    let to = out.slice((rows.0 + r) * matrix.rows + row, width);
                    store(to, sums.add(r * COLS), row, how);
                }
            }
        });
    });
    CALL.set(call);
}

/// Stores results of one row of `x`, from row `row` of the matrix on; `sums` takes whole vectors.
///
/// # Safety
/// The CPU has the features named.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn store(out: &mut [f32], sums: *const f32, row: usize, how: Epilogue) {
    for at in (0..out.len()).step_by(LANES) {
        let mask = ((1u32 << (out.len() - at).min(LANES)) - 1) as u16;
        let mut value = _mm512_loadu_ps(sums.add(at));
        if let Some(bias) = how.bias {
            value = _mm512_add_ps(
                value,
                _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(row + at)),
            );
        }
        let to = out.as_mut_ptr().add(at);
        if how.accumulate {
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
        }
        _mm512_mask_storeu_ps(to, mask, value);
    }
}

/// Runs of at most [`PANELS`] panels of one segment.
fn groups(matrix: &PackedMatrix) -> Vec<(usize, usize)> {
    let mut groups = Vec::with_capacity(matrix.panels / PANELS + matrix.segments.len());
    for segment in &matrix.segments {
        let end = segment.panel + segment.rows.div_ceil(LANES);
        let starts = (segment.panel..end).step_by(PANELS);
        groups.extend(starts.map(|from| (from, end.min(from + PANELS))));
    }
    groups
}

/// Rows of a call as words.
struct Left<'a> {
    /// `[m][stride]`.
    codes: *const i16,
    stride: usize,
    /// `[blocks][m]`.
    factors: &'a [f32],
    m: usize,
    /// Those of a unit.
    rows: (usize, usize),
}

impl Left<'_> {
    fn count(&self) -> usize {
        self.rows.1 - self.rows.0
    }
}

/// `to (=|+=)` the products of a unit's rows with a group of panels; rows of `to` are `to.1` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn multiply(
    matrix: &PackedMatrix,
    group: &(usize, usize),
    left: &Left,
    room: &mut Room,
    to: (*mut f32, usize),
    accumulate: bool,
) {
    let blocks = matrix.blocks();
    grow(&mut room.words, SLAB * BLOCK * COLS / 32);
    room.factors.resize(SLAB * COLS, 0.0);
    let words: *mut i16 = room.words.as_mut_ptr().cast();
    let scales = room.factors.as_mut_ptr();
    let width = (group.1 - group.0) * LANES;
    for from in (0..blocks).step_by(SLAB) {
        let slab = SLAB.min(blocks - from);
        for (index, panel) in (group.0..group.1).enumerate() {
            let (segment, data, ..) = matrix.panel(panel);
            let multipliers = _mm512_loadu_ps(matrix.multipliers[panel * LANES..].as_ptr());
            for block in 0..slab {
                let at = data
                    .as_ptr()
                    .add((from + block) * segment.format.block_bytes());
                let to = words.add(block * BLOCK * COLS + index * LANES * 2);
                let scale = scales.add(block * COLS + index * LANES);
                if segment.format.dense() {
                    expand_columns::<Bf16Bits>(at, 2 * LANES, BLOCK / 2, to, 2 * COLS, scale);
                } else {
                    expand(segment.format, at, to, scale);
                }
                _mm512_storeu_ps(scale, _mm512_mul_ps(_mm512_loadu_ps(scale), multipliers));
            }
        }
        product(&WordProduct {
            a: left.codes.add(left.rows.0 * left.stride + from * BLOCK),
            a_stride: left.stride,
            rows: left.count(),
            b: words,
            b_cols: COLS,
            pairs: (0, slab * BLOCK / 2),
            cols: (0, width),
            factor: left.factors.as_ptr().add(from * left.m + left.rows.0),
            factor_stride: left.m,
            scale: scales,
            scale_stride: COLS,
            c: to.0,
            c_stride: to.1,
            add: accumulate || from > 0,
        });
    }
}

/// The weights of one block of a panel as words, rows of `COLS` pairs. `scale`: `[16]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn expand(format: Format, block: *const u8, to: *mut i16, scale: *mut f32) {
    match format.bits {
        4 => expand_bits::<4>(format, block, to, scale),
        5 => expand_bits::<5>(format, block, to, scale),
        6 => expand_bits::<6>(format, block, to, scale),
        _ => expand_bits::<8>(format, block, to, scale),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn expand_bits<const BITS: u8>(
    format: Format,
    block: *const u8,
    to: *mut i16,
    scale: *mut f32,
) {
    let halves = if format.halves { 2 } else { 1 };
    let load = |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(block.add(at).cast()));
    // w = d * u + m for each group and half, and what |w| cannot exceed.
    let most = ((1u32 << BITS) - 1) as f32;
    let mut rule = [[[_mm512_setzero_ps(); 2]; 2]; 2];
    let mut bound = _mm512_setzero_ps();
    for group in 0..2 {
        for half in 0..halves {
            let at = 32 * (group * halves + half);
            let d = load(format.scales_at() + at);
            let m = match format.min {
                true => load(format.mins_at() + at),
                false => _mm512_mul_ps(d, _mm512_set1_ps(-f32::from(format.offset))),
            };
            rule[group][half] = [d, m];
            let end = _mm512_fmadd_ps(d, _mm512_set1_ps(most), m);
            let larger = _mm512_max_ps(_mm512_abs_ps(m), _mm512_abs_ps(end));
            bound = _mm512_max_ps(bound, larger);
        }
    }
    let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(bound, _mm512_set1_ps(1e-30));
    let inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(TOP), bound);
    _mm512_storeu_ps(scale, _mm512_mul_ps(bound, _mm512_set1_ps(1.0 / TOP)));
    let byte = _mm512_set1_epi32(255);
    let low_half = _mm512_set1_epi32(0xffff);
    for group in 0..2 {
        let codes = avx512::unpack::<BITS>(block, group);
        for (i, codes) in codes.into_iter().enumerate() {
            let [d, m] = rule[group][i / (8 / halves)];
            let (d, m) = (_mm512_mul_ps(d, inverse), _mm512_mul_ps(m, inverse));
            let word = |code: __m512i| {
                let x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), d, m);
                _mm512_cvtps_epi32(x)
            };
            let w = [
                word(_mm512_and_si512(codes, byte)),
                word(_mm512_and_si512(_mm512_srli_epi32::<8>(codes), byte)),
                word(_mm512_and_si512(_mm512_srli_epi32::<16>(codes), byte)),
                word(_mm512_srli_epi32::<24>(codes)),
            ];
            for pair in 0..2 {
                let low = _mm512_and_si512(w[2 * pair], low_half);
                let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(w[2 * pair + 1]));
                let to = to.add((group * 16 + 2 * i + pair) * 2 * COLS);
                _mm512_storeu_si512(to.cast(), both);
            }
        }
    }
}

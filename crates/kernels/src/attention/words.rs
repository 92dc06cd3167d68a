//! Products of many rows with f16 and bf16 pages by 16-bit integer dot products: see
//! [`crate::words`]. A tile is turned into integers once for a block of rows, each slot with its own
//! scale. That is as exact as the f16 that is stored (the tests compare with f64).

use super::micro::Running;
use crate::words::{Half, column_scales, expand_columns, row_step, to_codes};
use core::arch::x86_64::*;

/// A K section `[pairs][64][2]` to codes in the same order. `scale`: `[chunks][64]`.
///
/// # Safety
/// The CPU has the features named; pointers are valid for the shapes above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn expand_keys<H: Half>(
    section: *const u8,
    pairs: usize,
    to: *mut i16,
    scale: *mut f32,
) {
    const STEP: usize = crate::words::CHUNK / 2;
    for (chunk, from) in (0..pairs).step_by(STEP).enumerate() {
        let count = STEP.min(pairs - from);
        for col in (0..64).step_by(16) {
            let at = from * 128 + col * 2;
            let (section, to) = (section.add(2 * at), to.add(at));
            expand_columns::<H>(section, 128, count, to, 128, scale.add(chunk * 64 + col));
        }
    }
}

/// A V section `[32][width][2]` to codes in the same order, slots `pairs.0 * 2..pairs.1 * 2` only;
/// the others get a scale of 0. `scale`: `[64]`.
///
/// # Safety
/// The CPU has the features named; pointers are valid for the shapes above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn expand_values<H: Half>(
    section: *const u8,
    pairs: (usize, usize),
    width: usize,
    to: *mut i16,
    scale: *mut f32,
) {
    let magnitude = _mm512_set1_epi16(0x7fff);
    let mut tops = [0u32; 32];
    for pair in pairs.0..pairs.1 {
        let from = section.add(pair * width * 4);
        let mut top = _mm512_setzero_si512();
        for at in (0..width).step_by(16) {
            let both = _mm512_loadu_si512(from.add(at * 4).cast());
            top = _mm512_max_epu16(top, _mm512_and_si512(both, magnitude));
        }
        let top = _mm256_max_epu16(
            _mm512_castsi512_si256(top),
            _mm512_extracti64x4_epi64::<1>(top),
        );
        let top = _mm_max_epu16(
            _mm256_castsi256_si128(top),
            _mm256_extracti128_si256::<1>(top),
        );
        let top = _mm_max_epu16(top, _mm_unpackhi_epi64(top, top));
        let top = _mm_max_epu16(top, _mm_shuffle_epi32::<1>(top));
        tops[pair] = _mm_cvtsi128_si32(top) as u32;
    }
    let mut inverses = [[0f32; 16]; 4];
    for part in 0..4 {
        let bits = _mm256_loadu_si256(tops.as_ptr().add(part * 8).cast());
        let (scales, inverse) = column_scales(H::widen(bits));
        _mm512_storeu_ps(scale.add(part * 16), scales);
        _mm512_storeu_ps(inverses[part].as_mut_ptr(), inverse);
    }
    let inverses: *const i64 = inverses.as_ptr().cast();
    for pair in pairs.0..pairs.1 {
        let inverse = _mm512_castsi512_ps(_mm512_set1_epi64(inverses.add(pair).read_unaligned()));
        for at in (pair * width..(pair + 1) * width).step_by(8) {
            to_codes::<H>(section.add(at * 4), inverse, to.add(at * 2));
        }
    }
}

/// The running softmax of [`Running`] over 64 slots, whose probabilities (times value scales) go
/// to `codes`, `[row][64]`, each row with a factor.
///
/// # Safety
/// As [`expand_values`]; all pointers of `r` are valid for what they say, and `r.cols` is 64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn softmax(r: &Running, codes: *mut i16, factor: *mut f32) {
    use super::lanes::{Avx512, Lanes};
    use super::micro::LAZY;
    let value_scale: [__m512; 4] =
        std::array::from_fn(|i| _mm512_loadu_ps(r.value_scale.add(16 * i)));
    for row in r.rows.0..r.rows.1 {
        let s = r.s.add(row * r.stride);
        let logits: [__m512; 4] = std::array::from_fn(|i| _mm512_loadu_ps(s.add(16 * i)));
        let top = _mm512_max_ps(
            _mm512_max_ps(logits[0], logits[1]),
            _mm512_max_ps(logits[2], logits[3]),
        );
        let sum = r.sum.add(row * 16);
        let max = &mut *r.max.add(row);
        if Avx512::any_gt(top, _mm512_set1_ps(*max + LAZY)) {
            let new = _mm512_reduce_max_ps(top);
            if *max != f32::NEG_INFINITY {
                let factor = _mm512_set1_ps((*max - new).exp2());
                _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), factor));
                let out = r.out.add(row * r.out_cols);
                for col in (0..r.out_cols).step_by(16) {
                    let to = out.add(col);
                    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), factor));
                }
            }
            *max = new;
        }
        // A row that has seen no key yet subtracts 0, so that its hidden logits stay -infinity.
        let base = _mm512_set1_ps(if *max == f32::NEG_INFINITY { 0.0 } else { *max });
        let p = logits.map(|logits| Avx512::exp2(_mm512_sub_ps(logits, base)));
        let total = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total));
        let p: [__m512; 4] = std::array::from_fn(|i| _mm512_mul_ps(p[i], value_scale[i]));
        let total = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        let top = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
        let (step, inverse) = row_step(_mm512_reduce_max_ps(top), _mm512_reduce_add_ps(total));
        *factor.add(row - r.rows.0) = step;
        let inverse = _mm512_set1_ps(inverse);
        let to = codes.add((row - r.rows.0) * 64);
        for (i, p) in p.into_iter().enumerate() {
            let code = _mm512_cvtps_epi32(_mm512_mul_ps(p, inverse));
            _mm256_storeu_si256(to.add(16 * i).cast(), _mm512_cvtsepi32_epi16(code));
        }
    }
}

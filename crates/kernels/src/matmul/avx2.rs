//! The panel kernel for AVX2: 16-bit multiply-add pairs, 8 rows of the panel at a time.

use super::activation::RowBlock;
use super::format::{BLOCK, Format, LANES};
use super::{Kernel, ROW_BLOCK};
use std::arch::x86_64::*;

pub(super) fn kernel(format: Format) -> Kernel {
    macro_rules! select {
        ($($bits:literal $min:literal $halves:literal),+) => {
            match (format.bits, format.min, format.halves) {
                (16, ..) => dense,
                $(($bits, $min, $halves) => quantized::<$bits, $min, $halves>,)+
                other => unreachable!("no format {other:?}"),
            }
        };
    }
    select!(
        4 false false, 4 true false, 5 false false, 5 true false, 6 false true, 8 false false,
        4 true true, 4 false true
    )
}

/// Codes of inputs `4 quad .. 4 quad + 4` of rows `8 side .. 8 side + 8`, one byte each.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: u8>(
    block: *const u8,
    group: usize,
    quad: usize,
    side: usize,
) -> __m256i {
    let load = |at: usize| _mm256_loadu_si256(block.add(at + 32 * side).cast());
    if BITS == 8 {
        return load(512 * group + 64 * quad);
    }
    let pair = load(256 * group + 64 * (quad % 4));
    let pair = if quad < 4 {
        pair
    } else {
        _mm256_srli_epi16::<4>(pair)
    };
    let low = _mm256_and_si256(pair, _mm256_set1_epi8(15));
    if BITS == 5 {
        let mask = block
            .add(512 + 64 * group + 8 * quad + 4 * side)
            .cast::<i32>();
        // Byte j of the register gets byte j / 8 of the mask, then bit j % 8 of that.
        #[rustfmt::skip]
        let spread = _mm256_setr_epi8(
            0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
        );
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(mask.read_unaligned()), spread);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
    if BITS == 6 {
        let pairs = load(512 + 128 * group + 64 * (quad / 4));
        let pairs = match quad % 4 {
            0 => _mm256_slli_epi16::<4>(pairs),
            1 => _mm256_slli_epi16::<2>(pairs),
            2 => pairs,
            _ => _mm256_srli_epi16::<2>(pairs),
        };
        return _mm256_or_si256(low, _mm256_and_si256(pairs, _mm256_set1_epi8(0x30)));
    }
    low
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantized<const BITS: u8, const MIN: bool, const HALVES: bool>(
    panel: *const u8,
    blocks: usize,
    x: &RowBlock,
    sums: *mut [f32; LANES],
) {
    let format = Format {
        bits: BITS,
        min: MIN,
        halves: HALVES,
        offset: 0,
    };
    let bytes = format.block_bytes();
    let parts = if HALVES { 2 } else { 1 };
    let quads = 8 / parts;
    let bytes_of_words = _mm256_set1_epi16(255);
    for group in 0..2 * blocks {
        let block = panel.add(group / 2 * bytes);
        if group % 2 == 0 {
            for line in (0..bytes).step_by(64) {
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(2048 + line).cast());
            }
        }
        for part in 0..parts {
            for side in 0..2 {
                let scales = |at: usize| {
                    let start = at + 32 * (group % 2 * parts + part) + 16 * side;
                    _mm256_cvtph_ps(_mm_loadu_si128(block.add(start).cast()))
                };
                let d = scales(format.scales_at());
                let m = if MIN { scales(format.mins_at()) } else { d };
                let terms = x.terms.add((group * parts + part) * x.rows);
                // Unpacked once: even inputs (0 and 2 of a quad) and odd ones as 16-bit words.
                let mut codes = [[_mm256_setzero_si256(); 2]; 8];
                for (i, codes) in codes[..quads].iter_mut().enumerate() {
                    let quad = unpack::<BITS>(block, group % 2, quads * part + i, side);
                    codes[0] = _mm256_and_si256(quad, bytes_of_words);
                    codes[1] = _mm256_srli_epi16::<8>(quad);
                }
                for r in 0..x.rows {
                    let cell = group * x.rows + r;
                    let line: *const i32 = x.values.add(64 * cell).cast();
                    let term = *terms.add(r);
                    let mut even = _mm256_setzero_si256();
                    let mut odd = match MIN {
                        true => even,
                        false => _mm256_set1_epi32(term as i32),
                    };
                    for (i, codes) in codes[..quads].iter().enumerate() {
                        let at = line.add(2 * (quads * part + i));
                        let first = _mm256_madd_epi16(codes[0], _mm256_set1_epi32(*at));
                        let second = _mm256_madd_epi16(codes[1], _mm256_set1_epi32(*at.add(1)));
                        even = _mm256_add_epi32(even, first);
                        odd = _mm256_add_epi32(odd, second);
                    }
                    let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd));
                    let sum = sums.add(r).cast::<f32>().add(8 * side);
                    let scale = _mm256_set1_ps(*x.scales.add(cell));
                    let product = _mm256_mul_ps(dot, d);
                    let mut value = _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(sum));
                    if MIN {
                        let term = _mm256_set1_ps(f32::from_bits(term));
                        value = _mm256_fmadd_ps(m, term, value);
                    }
                    _mm256_storeu_ps(sum, value);
                }
            }
        }
    }
}

/// Dense bf16 panels with f32 activations.
#[target_feature(enable = "avx2,fma")]
unsafe fn dense(panel: *const u8, blocks: usize, x: &RowBlock, sums: *mut [f32; LANES]) {
    const ROWS: usize = 4;
    const { assert!(ROW_BLOCK.is_multiple_of(ROWS)) };
    let mut r = 0;
    while r + ROWS <= x.rows {
        dense_rows::<ROWS>(panel, blocks, x, r, sums);
        r += ROWS;
    }
    while r < x.rows {
        dense_rows::<1>(panel, blocks, x, r, sums);
        r += 1;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dense_rows<const R: usize>(
    panel: *const u8,
    blocks: usize,
    x: &RowBlock,
    r: usize,
    sums: *mut [f32; LANES],
) {
    let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
    let mut total = [[_mm256_setzero_ps(); 2]; R];
    for pair in 0..blocks * BLOCK / 2 {
        let (group, k) = (pair / 16, 2 * (pair % 16));
        let at = panel.add(64 * pair);
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(2048).cast());
        for side in 0..2 {
            let both = _mm256_loadu_si256(at.add(32 * side).cast());
            let first = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both));
            let second = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
            for i in 0..R {
                let value = x
                    .values
                    .cast::<f32>()
                    .add(32 * (group * x.rows + r + i) + k);
                let sum = &mut total[i][side];
                *sum = _mm256_fmadd_ps(first, _mm256_set1_ps(*value), *sum);
                *sum = _mm256_fmadd_ps(second, _mm256_set1_ps(*value.add(1)), *sum);
            }
        }
    }
    for i in 0..R {
        for side in 0..2 {
            _mm256_storeu_ps(sums.add(r + i).cast::<f32>().add(8 * side), total[i][side]);
        }
    }
}

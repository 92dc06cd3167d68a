//! The panel kernel for AVX-512 with VNNI: two 8-bit dot products per 64 codes and row of `x`.
//!
//! Codes are unpacked once per group into eight registers and used for every row of the block,
//! so the same code serves one row (bound by memory) and sixteen (bound by the dot products).

use super::Kernel;
use super::activation::RowBlock;
use super::format::{Format, LANES};
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

/// Bytes ahead of the current block that are asked for.
const AHEAD: usize = 4096;

/// Rows in lockstep: sixteen chains of dot products keep both ports busy, and fit the registers.
const WIDE: usize = 8;

/// The 32 codes of 16 rows: register `i` holds inputs `4 i .. 4 i + 4` of each row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn unpack<const BITS: u8>(block: *const u8, group: usize) -> [__m512i; 8] {
    let load = |at: usize| _mm512_loadu_si512(block.add(at).cast());
    let mut codes = [_mm512_setzero_si512(); 8];
    if BITS == 8 {
        for i in 0..8 {
            codes[i] = load(512 * group + 64 * i);
        }
        return codes;
    }
    let nibble = _mm512_set1_epi8(15);
    for i in 0..4 {
        let pair = load(256 * group + 64 * i);
        codes[i] = _mm512_and_si512(pair, nibble);
        codes[i + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(pair), nibble);
    }
    if BITS == 5 {
        let sixteen = _mm512_set1_epi8(16);
        let masks = block.add(512 + 64 * group).cast::<u64>();
        for i in 0..8 {
            let mask = masks.add(i).read_unaligned();
            codes[i] = _mm512_mask_add_epi8(codes[i], mask, codes[i], sixteen);
        }
    }
    if BITS == 6 {
        let bits = _mm512_set1_epi8(0x30);
        for i in 0..2 {
            let pairs = load(512 + 128 * group + 64 * i);
            // 0xf8: first | second & third
            let or = |low, pairs| _mm512_ternarylogic_epi32::<0xf8>(low, pairs, bits);
            codes[4 * i] = or(codes[4 * i], _mm512_slli_epi16::<4>(pairs));
            codes[4 * i + 1] = or(codes[4 * i + 1], _mm512_slli_epi16::<2>(pairs));
            codes[4 * i + 2] = or(codes[4 * i + 2], pairs);
            codes[4 * i + 3] = or(codes[4 * i + 3], _mm512_srli_epi16::<2>(pairs));
        }
    }
    codes
}

/// Adds one group's products for rows `r .. r + R` of `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn rows<const MIN: bool, const HALVES: bool, const R: usize>(
    codes: &[__m512i; 8],
    d: &[__m512; 2],
    m: &[__m512; 2],
    x: &RowBlock,
    group: usize,
    r: usize,
    sums: *mut [f32; LANES],
) {
    let parts = if HALVES { 2 } else { 1 };
    let quads = 8 / parts;
    let cell = group * x.rows + r;
    let lines: *const i32 = x.values.add(64 * cell).cast();
    let mut product = [_mm512_setzero_ps(); R];
    for part in 0..parts {
        let terms = x
            .terms
            .add((group * parts + part) * x.rows + r)
            .cast::<i32>();
        let mut high = [_mm512_setzero_si512(); R];
        let mut low = high;
        if !MIN {
            for i in 0..R {
                low[i] = _mm512_set1_epi32(*terms.add(i));
            }
        }
        for quad in quads * part..quads * (part + 1) {
            for i in 0..R {
                let line = lines.add(16 * i);
                high[i] =
                    _mm512_dpbusd_epi32(high[i], codes[quad], _mm512_set1_epi32(*line.add(quad)));
                low[i] = _mm512_dpbusd_epi32(
                    low[i],
                    codes[quad],
                    _mm512_set1_epi32(*line.add(8 + quad)),
                );
            }
        }
        for i in 0..R {
            let dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[i]), low[i]);
            let dot = _mm512_cvtepi32_ps(dot);
            product[i] = match part {
                0 => _mm512_mul_ps(dot, d[0]),
                _ => _mm512_fmadd_ps(dot, d[1], product[i]),
            };
        }
    }
    for i in 0..R {
        let sum = sums.add(r + i).cast::<f32>();
        let scale = _mm512_set1_ps(*x.scales.add(cell + i));
        let mut value = _mm512_fmadd_ps(product[i], scale, _mm512_loadu_ps(sum));
        if MIN {
            for part in 0..parts {
                let term = x
                    .terms
                    .add((group * parts + part) * x.rows + r + i)
                    .cast::<f32>();
                value = _mm512_fmadd_ps(m[part], _mm512_set1_ps(*term), value);
            }
        }
        _mm512_storeu_ps(sum, value);
    }
}

/// As [`rows`] for the only row of `x`, returned as its sum. Four chains of dot products and a sum in a register:
/// one row alone would wait for its own results. Integer sums are the same in any order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn one_row<const MIN: bool, const HALVES: bool>(
    codes: &[__m512i; 8],
    d: &[__m512; 2],
    m: &[__m512; 2],
    x: &RowBlock,
    group: usize,
    sum: __m512,
) -> __m512 {
    let parts = if HALVES { 2 } else { 1 };
    let quads = 8 / parts;
    let line: *const i32 = x.values.add(64 * group).cast();
    let terms = x.terms.add(group * parts);
    let mut product = _mm512_setzero_ps();
    for part in 0..parts {
        let mut high = [_mm512_setzero_si512(); 2];
        let mut low = high;
        if !MIN {
            low[0] = _mm512_set1_epi32(*terms.add(part).cast());
        }
        for quad in quads * part..quads * (part + 1) {
            let (first, second) = (line.add(quad), line.add(8 + quad));
            let (high, low) = (&mut high[quad % 2], &mut low[quad % 2]);
            *high = _mm512_dpbusd_epi32(*high, codes[quad], _mm512_set1_epi32(*first));
            *low = _mm512_dpbusd_epi32(*low, codes[quad], _mm512_set1_epi32(*second));
        }
        let high = _mm512_slli_epi32::<8>(_mm512_add_epi32(high[0], high[1]));
        let dot = _mm512_add_epi32(high, _mm512_add_epi32(low[0], low[1]));
        let dot = _mm512_cvtepi32_ps(dot);
        product = match part {
            0 => _mm512_mul_ps(dot, d[0]),
            _ => _mm512_fmadd_ps(dot, d[1], product),
        };
    }
    let mut sum = _mm512_fmadd_ps(product, _mm512_set1_ps(*x.scales.add(group)), sum);
    if MIN {
        for part in 0..parts {
            let term = _mm512_set1_ps(*terms.add(part).cast());
            sum = _mm512_fmadd_ps(m[part], term, sum);
        }
    }
    sum
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
    let halves = |at: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
    let prefetch = |block: *const u8| {
        for line in (0..bytes).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD + line).cast());
        }
    };
    let scales = |block: *const u8, group: usize| {
        let at = |at: usize| {
            let start = block.add(at + if HALVES { 64 } else { 32 } * group);
            [
                halves(start),
                if HALVES {
                    halves(start.add(32))
                } else {
                    _mm512_setzero_ps()
                },
            ]
        };
        let d = at(format.scales_at());
        (d, if MIN { at(format.mins_at()) } else { d })
    };
    if x.rows == 1 {
        let mut sum = _mm512_loadu_ps(sums.cast());
        for index in 0..blocks {
            let block = panel.add(index * bytes);
            prefetch(block);
            for group in 0..2 {
                let codes = unpack::<BITS>(block, group);
                let (d, m) = scales(block, group);
                sum = one_row::<MIN, HALVES>(&codes, &d, &m, x, 2 * index + group, sum);
            }
        }
        _mm512_storeu_ps(sums.cast(), sum);
        return;
    }
    for index in 0..blocks {
        let block = panel.add(index * bytes);
        prefetch(block);
        for group in 0..2 {
            let codes = unpack::<BITS>(block, group);
            let (d, m) = scales(block, group);
            let (group, mut r) = (2 * index + group, 0);
            while r + WIDE <= x.rows {
                rows::<MIN, HALVES, WIDE>(&codes, &d, &m, x, group, r, sums);
                r += WIDE;
            }
            while r + 4 <= x.rows {
                rows::<MIN, HALVES, 4>(&codes, &d, &m, x, group, r, sums);
                r += 4;
            }
            if r + 2 <= x.rows {
                rows::<MIN, HALVES, 2>(&codes, &d, &m, x, group, r, sums);
                r += 2;
            }
            if r < x.rows {
                rows::<MIN, HALVES, 1>(&codes, &d, &m, x, group, r, sums);
            }
        }
    }
}

/// Dense bf16 panels with f32 activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dense(panel: *const u8, blocks: usize, x: &RowBlock, sums: *mut [f32; LANES]) {
    let mut r = 0;
    while r + 8 <= x.rows {
        dense_rows::<8>(panel, blocks, x, r, sums);
        r += 8;
    }
    while r + 4 <= x.rows {
        dense_rows::<4>(panel, blocks, x, r, sums);
        r += 4;
    }
    while r < x.rows {
        dense_rows::<1>(panel, blocks, x, r, sums);
        r += 1;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dense_rows<const R: usize>(
    panel: *const u8,
    blocks: usize,
    x: &RowBlock,
    r: usize,
    sums: *mut [f32; LANES],
) {
    let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
    // Even and odd inputs are summed apart: shorter chains of additions.
    let mut even = [_mm512_setzero_ps(); R];
    let mut odd = even;
    for group in 0..2 * blocks {
        let weights = panel.add(1024 * group);
        let values: *const f32 = x.values.cast::<f32>().add(32 * (group * x.rows + r));
        for pair in 0..16 {
            let at = weights.add(64 * pair);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            let both = _mm512_loadu_si512(at.cast());
            let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both));
            let second = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
            for i in 0..R {
                let value = values.add(32 * i + 2 * pair);
                even[i] = _mm512_fmadd_ps(first, _mm512_set1_ps(*value), even[i]);
                odd[i] = _mm512_fmadd_ps(second, _mm512_set1_ps(*value.add(1)), odd[i]);
            }
        }
    }
    for i in 0..R {
        _mm512_storeu_ps(sums.add(r + i).cast(), _mm512_add_ps(even[i], odd[i]));
    }
}

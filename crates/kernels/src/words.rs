//! Matrix products of 16-bit integers with scales (AVX-512 VNNI): twice the multiply-adds of an f32
//! instruction, for attention over 16-bit pages and for prefill from packed weights.
//!
//! Inputs are cut into chunks of 64. Within a chunk each column of the right-hand side and each row
//! of the left-hand side has its own scale. Columns take 14 bits. Rows take what is left of the 32
//! bits of a sum, by the sum of their magnitudes: 15 to 16 bits when few elements dominate, 13 at
//! worst. Sums over a chunk are exact, chunks are added in f32.

use core::arch::x86_64::*;

/// Inputs of a chunk.
pub(crate) const CHUNK: usize = 64;
/// Largest code of columns.
pub(crate) const TOP: f32 = 8191.0;
/// Largest code of rows.
const ROW_TOP: f32 = 32767.0;
/// Largest sum of magnitudes of a row's codes of a chunk: times `TOP` it stays below 2^31, the
/// rounding of each code included.
const ROW_SUM: f32 = (262_143 - CHUNK) as f32;

/// Registers of 16 columns, and rows of a block.
const WIDE: usize = 4;
const ROWS: usize = 6;

/// `c[r][j] (+)= sum over chunks of factor[chunk][r] * scale[chunk][j] * sum over k of
/// a[r][k] * b[k][j]`.
pub(crate) struct WordProduct {
    pub a: *const i16,
    pub a_stride: usize,
    pub rows: usize,
    /// `[k / 2][b_cols][2]`.
    pub b: *const i16,
    pub b_cols: usize,
    /// Range of `k / 2`; chunks are counted from its start.
    pub pairs: (usize, usize),
    /// Multiples of 16.
    pub cols: (usize, usize),
    pub factor: *const f32,
    pub factor_stride: usize,
    /// Null for ones.
    pub scale: *const f32,
    pub scale_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Add to `c` instead of overwriting it.
    pub add: bool,
}

/// One row `[dim]` to codes `[codes]`, zeros beyond dim. `factor`: one for each chunk, `stride` apart.
///
/// # Safety
/// The CPU has the features named; pointers are valid for the shapes above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn quantise_row(
    from: &[f32],
    to: *mut i16,
    codes: usize,
    factor: *mut f32,
    stride: usize,
) {
    // Sixteen inputs from `at` on, zeros beyond the row.
    let mask = |len: usize, at: usize| ((1u32 << len.saturating_sub(at).min(16)) - 1) as u16;
    for (index, chunk) in (0..codes).step_by(CHUNK).enumerate() {
        let at: [usize; 4] = std::array::from_fn(|i| chunk + 16 * i);
        let x = at
            .map(|at| _mm512_maskz_loadu_ps(mask(from.len(), at), from.as_ptr().wrapping_add(at)));
        let size = x.map(|x| _mm512_abs_ps(x));
        let top = _mm512_max_ps(
            _mm512_max_ps(size[0], size[1]),
            _mm512_max_ps(size[2], size[3]),
        );
        let sum = _mm512_add_ps(
            _mm512_add_ps(size[0], size[1]),
            _mm512_add_ps(size[2], size[3]),
        );
        let (step, inverse) = row_step(_mm512_reduce_max_ps(top), _mm512_reduce_add_ps(sum));
        *factor.add(index * stride) = step;
        let inverse = _mm512_set1_ps(inverse);
        for i in 0..4 {
            let code = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse));
            let to = to.wrapping_add(at[i]).cast();
            _mm512_mask_cvtsepi32_storeu_epi16(to, mask(codes, at[i]), code);
        }
    }
}

/// The value of a code of 1 of a row, and its inverse, from its largest magnitude and the sum of
/// magnitudes. Codes cannot hold NaN or infinity: the step does.
#[inline(always)]
pub(crate) fn row_step(top: f32, sum: f32) -> (f32, f32) {
    let step = (top * (1.0 / ROW_TOP)).max(sum * (1.0 / ROW_SUM));
    let inverse = if step > 1e-36 { 1.0 / step } else { 0.0 };
    (step + 0.0 * sum, inverse)
}

/// 16-bit floats of one kind.
pub(crate) trait Half {
    unsafe fn widen(bits: __m256i) -> __m512;
}

pub(crate) struct F16Bits;
pub(crate) struct Bf16Bits;

impl Half for F16Bits {
    #[inline(always)]
    unsafe fn widen(bits: __m256i) -> __m512 {
        _mm512_cvtph_ps(bits)
    }
}

impl Half for Bf16Bits {
    #[inline(always)]
    unsafe fn widen(bits: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }
}

/// Sixteen neighbouring halves to codes.
#[inline(always)]
pub(crate) unsafe fn to_codes<H: Half>(from: *const u8, inverse: __m512, to: *mut i16) {
    let x = _mm512_mul_ps(H::widen(_mm256_loadu_si256(from.cast())), inverse);
    let code = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x));
    _mm256_storeu_si256(to.cast(), code);
}

/// Scales of columns and their inverses from largest magnitudes.
#[inline(always)]
pub(crate) unsafe fn column_scales(top: __m512) -> (__m512, __m512) {
    let some = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(top, _mm512_set1_ps(1e-30));
    let inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(TOP), top);
    (_mm512_mul_ps(top, _mm512_set1_ps(1.0 / TOP)), inverse)
}

/// Sixteen columns of `pairs` rows of interleaved pairs to codes in the same order; rows of pairs
/// are `stride` elements apart, in `to` likewise. `scale`: `[16]`.
///
/// # Safety
/// As [`quantise_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn expand_columns<H: Half>(
    from: *const u8,
    from_stride: usize,
    pairs: usize,
    to: *mut i16,
    to_stride: usize,
    scale: *mut f32,
) {
    let magnitude = _mm512_set1_epi16(0x7fff);
    let twice = [
        _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
        _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15),
    ];
    let mut top = _mm512_setzero_si512();
    for pair in 0..pairs {
        let both = _mm512_loadu_si512(from.add(2 * pair * from_stride).cast());
        top = _mm512_max_epu16(top, _mm512_and_si512(both, magnitude));
    }
    let top = _mm512_max_epu16(top, _mm512_srli_epi32::<16>(top));
    let (scales, inverse) = column_scales(H::widen(_mm512_cvtepi32_epi16(top)));
    _mm512_storeu_ps(scale, scales);
    let inverse = twice.map(|order| _mm512_permutexvar_ps(order, inverse));
    for pair in 0..pairs {
        let (from, to) = (from.add(2 * pair * from_stride), to.add(pair * to_stride));
        to_codes::<H>(from, inverse[0], to);
        to_codes::<H>(from.add(32), inverse[1], to.add(16));
    }
}

/// See [`WordProduct`].
///
/// # Safety
/// As [`quantise_row`]; all pointers of `p` are valid for what they say, `a` and `b` hold codes
/// made by this module.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn product(p: &WordProduct) {
    let mut col = p.cols.0;
    while col < p.cols.1 {
        let wide = if p.cols.1 - col >= WIDE * 16 { WIDE } else { 1 };
        let shares = p.rows.div_ceil(ROWS);
        for share in 0..shares {
            let row = share * p.rows / shares;
            let rows = (share + 1) * p.rows / shares - row;
            match (rows, wide) {
                (1, WIDE) => block::<1, WIDE>(p, row, col),
                (2, WIDE) => block::<2, WIDE>(p, row, col),
                (3, WIDE) => block::<3, WIDE>(p, row, col),
                (4, WIDE) => block::<4, WIDE>(p, row, col),
                (5, WIDE) => block::<5, WIDE>(p, row, col),
                (_, WIDE) => block::<6, WIDE>(p, row, col),
                (1, _) => block::<1, 1>(p, row, col),
                (2, _) => block::<2, 1>(p, row, col),
                (3, _) => block::<3, 1>(p, row, col),
                (4, _) => block::<4, 1>(p, row, col),
                (5, _) => block::<5, 1>(p, row, col),
                (_, _) => block::<6, 1>(p, row, col),
            }
        }
        col += wide * 16;
    }
}

/// `sum[j] += a[2 j] * b[2 j] + a[2 j + 1] * b[2 j + 1]`. Written out because compilers turn the
/// intrinsic into a product and an addition, which costs a third of the speed.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    core::arch::asm!(
        "vpdpwssd {sum}, {a}, {b}",
        sum = inout(zmm_reg) sum,
        a = in(zmm_reg) a,
        b = in(zmm_reg) b,
        options(pure, nomem, nostack, preserves_flags)
    );
    sum
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<const R: usize, const W: usize>(p: &WordProduct, row: usize, col: usize) {
    let a = p.a.add(row * p.a_stride);
    let c = p.c.add(row * p.c_stride + col);
    let chunks = (p.pairs.1 - p.pairs.0).div_ceil(CHUNK / 2);
    for chunk in 0..chunks {
        let from = p.pairs.0 + chunk * (CHUNK / 2);
        let mut sums = [[_mm512_setzero_si512(); W]; R];
        for pair in from..p.pairs.1.min(from + CHUNK / 2) {
            let from = p.b.add((pair * p.b_cols + col) * 2);
            let mut b = [_mm512_setzero_si512(); W];
            for w in 0..W {
                b[w] = _mm512_loadu_si512(from.add(w * 32).cast());
            }
            for r in 0..R {
                let both = a.add(r * p.a_stride + 2 * pair).cast::<i32>();
                let x = _mm512_set1_epi32(both.read_unaligned());
                for w in 0..W {
                    sums[r][w] = dot(sums[r][w], x, b[w]);
                }
            }
        }
        let scale: [__m512; W] = std::array::from_fn(|w| match p.scale.is_null() {
            true => _mm512_set1_ps(1.0),
            false => _mm512_loadu_ps(p.scale.add(chunk * p.scale_stride + col + w * 16)),
        });
        let add = p.add || chunk > 0;
        for r in 0..R {
            let factor = _mm512_set1_ps(*p.factor.add(chunk * p.factor_stride + row + r));
            for w in 0..W {
                let c = c.add(r * p.c_stride + w * 16);
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][w]), scale[w]);
                let start = if add {
                    _mm512_loadu_ps(c)
                } else {
                    _mm512_setzero_ps()
                };
                _mm512_storeu_ps(c, _mm512_fmadd_ps(sum, factor, start));
            }
        }
    }
}

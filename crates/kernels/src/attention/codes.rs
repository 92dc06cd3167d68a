//! Products with int8 pages by integer dot products (AVX-512 VNNI): four times the multiply-adds
//! of an f32 instruction, and no expansion, so that int8 pages are read at memory speed.
//!
//! The f32 operand (queries, or probabilities times value scales) becomes 16-bit integers, each row
//! with its own scale, split into two bytes that are multiplied separately: both products are
//! exact, so the only new error is that of 16 bits, 250 times below the error of the stored codes.

use core::arch::x86_64::*;

/// Largest head size whose sums fit 32 bits.
pub(super) const MOST_DIMS: usize = 512;

/// Registers of 16 columns and rows of a block: 2 sums each.
const WIDE: usize = 4;
const ROWS: usize = 3;

/// `c[r][j] (+)= factor[r] * sum over k of a[r][k] * b[k][j]`, `a` in two bytes.
pub(super) struct CodeProduct {
    /// Rows of `2 * half` bytes: all high bytes, then all low bytes.
    pub a: *const u8,
    pub half: usize,
    pub rows: usize,
    /// `[k / 4][b_cols][4]` bytes.
    pub b: *const u8,
    pub b_cols: usize,
    /// Range of `k / 4`.
    pub quads: (usize, usize),
    /// Multiples of 16.
    pub cols: (usize, usize),
    pub factor: *const f32,
    /// Where the two sums of a row start.
    pub start: *const [i32; 2],
    pub c: *mut f32,
    pub c_stride: usize,
    /// Add to `c` instead of overwriting it.
    pub add: bool,
    /// The section read as `b` later.
    pub ahead: Option<*const u8>,
}

/// Rows of queries: signed bytes against keys stored with 128 added, whose share the start of the
/// sums takes away again. `from`: `[rows][dim]`; `to`: `[rows][2][half]`, zeros from dim on.
///
/// # Safety
/// The CPU has the features named; pointers are valid for the shapes above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn quantise_queries(
    from: &[f32],
    dim: usize,
    half: usize,
    to: *mut u8,
    factor: &mut [f32],
    start: &mut [[i32; 2]],
) {
    // The largest number whose low byte is a signed one as well.
    const TOP: f32 = (127 * 256 + 127) as f32;
    let no_sign = _mm512_set1_epi32(i32::MAX);
    for (row, from) in from.chunks_exact(dim).enumerate() {
        // Sixteen dims from `at` on, zeros beyond the row.
        let load = |at: usize| {
            let left = (dim - at.min(dim)).min(16);
            _mm512_maskz_loadu_ps(((1u32 << left) - 1) as u16, from.as_ptr().wrapping_add(at))
        };
        let (mut top, mut total) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for at in (0..half).step_by(16) {
            let x = load(at);
            total = _mm512_add_ps(total, x);
            let size = _mm512_and_si512(_mm512_castps_si512(x), no_sign);
            top = _mm512_max_ps(top, _mm512_castsi512_ps(size));
        }
        let max = _mm512_reduce_max_ps(top);
        let inverse = _mm512_set1_ps(if max > 0.0 { TOP / max } else { 0.0 });
        let (mut above, mut below) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        for at in (0..half).step_by(16) {
            let code = _mm512_cvtps_epi32(_mm512_mul_ps(load(at), inverse));
            let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(code));
            let high = _mm512_srai_epi32::<8>(_mm512_sub_epi32(code, low));
            (above, below) = (_mm512_add_epi32(above, high), _mm512_add_epi32(below, low));
            let to = to.add(row * 2 * half + at);
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(to.add(half).cast(), _mm512_cvtepi32_epi8(low));
        }
        // Codes cannot hold NaN or infinity: the factor does.
        factor[row] = max / TOP + 0.0 * _mm512_reduce_add_ps(total);
        start[row] = [above, below].map(|sum| -128 * _mm512_reduce_add_epi32(sum));
    }
}

/// Rows of probabilities, which are not negative: unsigned bytes. `s`: `[rows][64]`;
/// `to`: `[rows][2][64]`.
///
/// # Safety
/// As [`quantise_queries`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn quantise_probabilities(
    s: *const f32,
    rows: usize,
    to: *mut u8,
    factor: *mut f32,
) {
    for row in 0..rows {
        let s = s.add(row * 64);
        let p = [0, 16, 32, 48].map(|at| _mm512_loadu_ps(s.add(at)));
        let top = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
        let max = _mm512_reduce_max_ps(top);
        *factor.add(row) = max * (1.0 / 65535.0);
        let inverse = _mm512_set1_ps(if max > 0.0 { 65535.0 / max } else { 0.0 });
        for (i, p) in p.into_iter().enumerate() {
            let code = _mm512_cvtps_epi32(_mm512_mul_ps(p, inverse));
            let to = to.add(row * 128 + i * 16);
            _mm_storeu_si128(
                to.cast(),
                _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(code)),
            );
            _mm_storeu_si128(to.add(64).cast(), _mm512_cvtepi32_epi8(code));
        }
    }
}

/// Queries (signed) against keys (unsigned).
///
/// # Safety
/// As [`quantise_queries`]; all pointers of `p` are valid for what they say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn key_product(p: &CodeProduct) {
    product::<true>(p)
}

/// Probabilities (unsigned) against values (signed).
///
/// # Safety
/// As [`key_product`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn value_product(p: &CodeProduct) {
    product::<false>(p)
}

#[inline(always)]
unsafe fn product<const KEYS: bool>(p: &CodeProduct) {
    let mut col = p.cols.0;
    while col < p.cols.1 {
        let wide = if p.cols.1 - col >= WIDE * 16 { WIDE } else { 1 };
        for row in (0..p.rows).step_by(ROWS) {
            let ahead = if row == 0 { p.ahead } else { None };
            match (p.rows - row, wide) {
                (1, WIDE) => block::<KEYS, 1, WIDE>(p, row, col, ahead),
                (2, WIDE) => block::<KEYS, 2, WIDE>(p, row, col, ahead),
                (_, WIDE) => block::<KEYS, 3, WIDE>(p, row, col, ahead),
                (1, _) => block::<KEYS, 1, 1>(p, row, col, ahead),
                (2, _) => block::<KEYS, 2, 1>(p, row, col, ahead),
                (_, _) => block::<KEYS, 3, 1>(p, row, col, ahead),
            }
        }
        col += wide * 16;
    }
}

#[inline(always)]
unsafe fn dot<const KEYS: bool>(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    if KEYS {
        _mm512_dpbusd_epi32(sum, b, a)
    } else {
        _mm512_dpbusd_epi32(sum, a, b)
    }
}

#[inline(always)]
unsafe fn block<const KEYS: bool, const R: usize, const W: usize>(
    p: &CodeProduct,
    row: usize,
    col: usize,
    ahead: Option<*const u8>,
) {
    let mut high = [[_mm512_setzero_si512(); W]; R];
    let mut low = high;
    if !p.start.is_null() {
        for r in 0..R {
            let [h, l] = *p.start.add(row + r);
            high[r] = [_mm512_set1_epi32(h); W];
            low[r] = [_mm512_set1_epi32(l); W];
        }
    }
    let a = p.a.add(row * 2 * p.half);
    for quad in p.quads.0..p.quads.1 {
        let at = (quad * p.b_cols + col) * 4;
        if let Some(ahead) = ahead {
            for w in 0..W {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(at + w * 64).cast());
            }
        }
        let mut b = [_mm512_setzero_si512(); W];
        for w in 0..W {
            b[w] = _mm512_loadu_si512(p.b.add(at + w * 64).cast());
        }
        for r in 0..R {
            let a = a.add(r * 2 * p.half + quad * 4).cast::<i32>();
            let x = _mm512_set1_epi32(a.read_unaligned());
            for w in 0..W {
                high[r][w] = dot::<KEYS>(high[r][w], x, b[w]);
            }
            let x = _mm512_set1_epi32(a.byte_add(p.half).read_unaligned());
            for w in 0..W {
                low[r][w] = dot::<KEYS>(low[r][w], x, b[w]);
            }
        }
    }
    for r in 0..R {
        let factor = _mm512_set1_ps(*p.factor.add(row + r));
        for w in 0..W {
            let c = p.c.add((row + r) * p.c_stride + col + w * 16);
            // Below 2^31: 512 * 127 * (127 * 257) for keys, 64 * 65535 * 127 for values.
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[r][w]), low[r][w]);
            let sum = _mm512_cvtepi32_ps(sum);
            let start = if p.add {
                _mm512_loadu_ps(c)
            } else {
                _mm512_setzero_ps()
            };
            _mm512_storeu_ps(c, _mm512_fmadd_ps(sum, factor, start));
        }
    }
}

//! One SIMD vocabulary for three instruction sets, so that every kernel of this module is
//! written once: portable arrays, AVX2 and AVX-512.
//!
//! All operations are `inline(always)` and are only ever reached from inside a function compiled
//! for the instruction set in question (see `micro::Entries`); that is their safety condition.

use super::layout::bf16_bits;
use crate::elementwise::EXP2;

/// [`EXP2`] of the third degree: 7.5e-5.
#[cfg(target_arch = "x86_64")]
const EXP2_SHORT: [f32; 4] = [0.999_925_2, 0.695_833_5, 0.226_067_16, 0.078_024_52];

/// A vector of `N` f32 and what the kernels do with it.
///
/// # Safety
/// Callers run on a CPU with the instruction set, in code compiled for it; pointers are valid for
/// the `N` elements they name. No alignment is needed.
pub(super) trait Lanes: Copy + Send + Sync + 'static {
    type V: Copy;
    /// f32 elements of a vector.
    const N: usize;
    /// Vectors a register block spans in columns (4, 2 or 1), and the most rows it spans.
    const WIDE: usize;
    const ROWS: usize;
    /// Whether integer dot products serve where they pay (see `codes`, `words`).
    const CODES: bool = false;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// 2^x; 0 for x below the normal range and for -infinity.
    unsafe fn exp2(x: Self::V) -> Self::V;
    /// The same to 2^-13, finer than bf16, where that is cheaper.
    #[inline(always)]
    unsafe fn exp2_short(x: Self::V) -> Self::V {
        Self::exp2(x)
    }
    /// Is any lane of `a` greater than that of `b`?
    unsafe fn any_gt(a: Self::V, b: Self::V) -> bool;
    unsafe fn reduce_max(v: Self::V) -> f32;
    /// Lanes of `v` whose bit is set in the low `N` bits, `other` elsewhere.
    unsafe fn select(bits: u64, v: Self::V, other: Self::V) -> Self::V;
    /// The even (low) bf16 of `N` interleaved pairs.
    unsafe fn bf16_even(from: *const u8) -> Self::V;
    /// The odd (high) bf16 of `N` interleaved pairs.
    unsafe fn bf16_odd(from: *const u8) -> Self::V;
    /// The even (low) f16 of `N` interleaved pairs.
    unsafe fn f16_even(from: *const u8) -> Self::V;
    /// The odd (high) f16 of `N` interleaved pairs.
    unsafe fn f16_odd(from: *const u8) -> Self::V;
    /// Byte `byte` of each of `N` fours of bytes, as a signed number; FLIP takes off 128 first.
    unsafe fn int8<const FLIP: bool>(from: *const u8, byte: usize) -> Self::V;
    /// Rounds `2 * N` numbers to bf16, `first` before `second`.
    unsafe fn store_bf16(to: *mut u16, first: Self::V, second: Self::V);
    /// `N` interleaved pairs of numbers that bf16 holds exactly.
    unsafe fn store_bf16_pairs(to: *mut u8, even: Self::V, odd: Self::V);
    /// Asks for the cache line at `at` (any address) into L2: what comes next is too much for L1.
    unsafe fn prefetch(at: *const u8);
}

/// Plain Rust that compilers turn into whatever vectors the target has.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Adding it rounds a small f32 to an integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn map(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut out = a;
    for lane in 0..8 {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

impl Lanes for Portable {
    type V = [f32; 8];
    const N: usize = 8;
    const WIDE: usize = 2;
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        from.cast::<[f32; 8]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 8]) {
        to.cast::<[f32; 8]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        map(map(a, b, |a, b| a * b), c, |product, c| product + c)
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn exp2(x: [f32; 8]) -> [f32; 8] {
        let mut out = x;
        for lane in 0..8 {
            let x = if x[lane] < -126.0 { -127.0 } else { x[lane] };
            let shifted = (x - 0.5) + ROUND;
            let r = x - (shifted - ROUND);
            let mut p = EXP2[5];
            for k in (0..5).rev() {
                p = p * r + EXP2[k];
            }
            let n = shifted
                .to_bits()
                .wrapping_sub(ROUND.to_bits())
                .wrapping_add(127);
            let power = f32::from_bits(n.wrapping_shl(23));
            out[lane] = if x < -126.0 { 0.0 } else { p * power };
        }
        out
    }
    #[inline(always)]
    unsafe fn any_gt(a: [f32; 8], b: [f32; 8]) -> bool {
        let mut any = false;
        for lane in 0..8 {
            any |= a[lane] > b[lane];
        }
        any
    }
    #[inline(always)]
    unsafe fn reduce_max(v: [f32; 8]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn select(bits: u64, v: [f32; 8], other: [f32; 8]) -> [f32; 8] {
        let mut out = v;
        for lane in 0..8 {
            out[lane] = if bits >> lane & 1 == 1 {
                v[lane]
            } else {
                other[lane]
            };
        }
        out
    }
    #[inline(always)]
    unsafe fn f16_even(from: *const u8) -> [f32; 8] {
        let pairs = from.cast::<[u32; 8]>().read_unaligned();
        pairs.map(|pair| half::f16::from_bits(pair as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn f16_odd(from: *const u8) -> [f32; 8] {
        let pairs = from.cast::<[u32; 8]>().read_unaligned();
        pairs.map(|pair| half::f16::from_bits((pair >> 16) as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn bf16_even(from: *const u8) -> [f32; 8] {
        let pairs = from.cast::<[u32; 8]>().read_unaligned();
        pairs.map(|pair| f32::from_bits(pair << 16))
    }
    #[inline(always)]
    unsafe fn bf16_odd(from: *const u8) -> [f32; 8] {
        let pairs = from.cast::<[u32; 8]>().read_unaligned();
        pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn int8<const FLIP: bool>(from: *const u8, byte: usize) -> [f32; 8] {
        let flip = if FLIP { 0x80 } else { 0 };
        let fours = from.cast::<[u32; 8]>().read_unaligned();
        fours.map(|four| f32::from(((four >> (8 * byte)) as u8 ^ flip) as i8))
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, first: [f32; 8], second: [f32; 8]) {
        to.cast::<[u16; 8]>().write_unaligned(first.map(bf16_bits));
        to.add(8)
            .cast::<[u16; 8]>()
            .write_unaligned(second.map(bf16_bits));
    }
    #[inline(always)]
    unsafe fn store_bf16_pairs(to: *mut u8, even: [f32; 8], odd: [f32; 8]) {
        for lane in 0..8 {
            let pair = even[lane].to_bits() >> 16 | odd[lane].to_bits() & 0xffff_0000;
            to.cast::<u32>().add(lane).write_unaligned(pair);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{EXP2_SHORT, Lanes, Portable};
    use crate::elementwise::EXP2;
    use core::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub struct Avx2;

    /// Eight f16 in the low halves of 32-bit lanes.
    #[inline(always)]
    unsafe fn f16_to_f32(lanes: __m256i) -> __m256 {
        let packed = _mm256_packus_epi32(lanes, lanes);
        _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(
            packed,
        )))
    }

    impl Lanes for Avx2 {
        type V = __m256;
        const N: usize = 8;
        const WIDE: usize = 2;
        const ROWS: usize = 6;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            _mm256_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m256) {
            _mm256_storeu_ps(to, v)
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            _mm256_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            _mm256_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            _mm256_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: __m256, b: __m256) -> __m256 {
            _mm256_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn exp2(x: __m256) -> __m256 {
            // At -127 the biased exponent is 0, so the factor below is exactly 0. The operand
            // order of `max` lets NaN through.
            let x = _mm256_max_ps(_mm256_set1_ps(-127.0), x);
            let floor = _mm256_floor_ps(x);
            let r = _mm256_sub_ps(x, floor);
            let mut p = _mm256_set1_ps(EXP2[5]);
            for k in (0..5).rev() {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP2[k]));
            }
            let n = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
            _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n)))
        }
        #[inline(always)]
        unsafe fn any_gt(a: __m256, b: __m256) -> bool {
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m256) -> f32 {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
        #[inline(always)]
        unsafe fn select(bits: u64, v: __m256, other: __m256) -> __m256 {
            let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as u8 as i32), lanes);
            let mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
            _mm256_blendv_ps(other, v, mask)
        }
        #[inline(always)]
        unsafe fn f16_even(from: *const u8) -> __m256 {
            let low = _mm256_set1_epi32(0xffff);
            f16_to_f32(_mm256_and_si256(_mm256_loadu_si256(from.cast()), low))
        }
        #[inline(always)]
        unsafe fn f16_odd(from: *const u8) -> __m256 {
            f16_to_f32(_mm256_srli_epi32::<16>(_mm256_loadu_si256(from.cast())))
        }
        #[inline(always)]
        unsafe fn bf16_even(from: *const u8) -> __m256 {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast())))
        }
        #[inline(always)]
        unsafe fn bf16_odd(from: *const u8) -> __m256 {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(from.cast()), high))
        }
        #[inline(always)]
        unsafe fn int8<const FLIP: bool>(from: *const u8, byte: usize) -> __m256 {
            let flip = _mm256_set1_epi32(if FLIP { 0x8080_8080_u32 as i32 } else { 0 });
            let fours = _mm256_xor_si256(_mm256_loadu_si256(from.cast()), flip);
            let top = _mm256_sllv_epi32(fours, _mm256_set1_epi32(24 - 8 * byte as i32));
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(top))
        }
        #[inline(always)]
        unsafe fn store_bf16(to: *mut u16, first: __m256, second: __m256) {
            let (mut a, mut b) = ([0f32; 8], [0f32; 8]);
            Self::store(a.as_mut_ptr(), first);
            Self::store(b.as_mut_ptr(), second);
            Portable::store_bf16(to, a, b)
        }
        #[inline(always)]
        unsafe fn store_bf16_pairs(to: *mut u8, even: __m256, odd: __m256) {
            let even = _mm256_srli_epi32::<16>(_mm256_castps_si256(even));
            let pairs = _mm256_blend_epi16::<0xaa>(even, _mm256_castps_si256(odd));
            _mm256_storeu_si256(to.cast(), pairs)
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            _mm_prefetch::<_MM_HINT_T1>(at.cast())
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Lanes for Avx512 {
        type V = __m512;
        const N: usize = 16;
        const WIDE: usize = 4;
        const ROWS: usize = 6;
        const CODES: bool = true;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            _mm512_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m512) {
            _mm512_storeu_ps(to, v)
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            _mm512_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn exp2(x: __m512) -> __m512 {
            // `reduce` leaves x - floor(x) and `scalef` multiplies by 2^floor(x): no clamps, and
            // -infinity gives 0.
            let r = _mm512_reduce_ps::<0x09>(x);
            let mut p = _mm512_set1_ps(EXP2[5]);
            for k in (0..5).rev() {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[k]));
            }
            _mm512_scalef_ps(p, x)
        }
        #[inline(always)]
        unsafe fn exp2_short(x: __m512) -> __m512 {
            let r = _mm512_reduce_ps::<0x09>(x);
            let mut p = _mm512_set1_ps(EXP2_SHORT[3]);
            for k in (0..3).rev() {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2_SHORT[k]));
            }
            _mm512_scalef_ps(p, x)
        }
        #[inline(always)]
        unsafe fn any_gt(a: __m512, b: __m512) -> bool {
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m512) -> f32 {
            _mm512_reduce_max_ps(v)
        }
        #[inline(always)]
        unsafe fn select(bits: u64, v: __m512, other: __m512) -> __m512 {
            _mm512_mask_blend_ps(bits as u16, other, v)
        }
        #[inline(always)]
        unsafe fn f16_even(from: *const u8) -> __m512 {
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_loadu_si512(from.cast())))
        }
        #[inline(always)]
        unsafe fn f16_odd(from: *const u8) -> __m512 {
            let high = _mm512_srli_epi32::<16>(_mm512_loadu_si512(from.cast()));
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high))
        }
        #[inline(always)]
        unsafe fn bf16_even(from: *const u8) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast())))
        }
        #[inline(always)]
        unsafe fn bf16_odd(from: *const u8) -> __m512 {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), high))
        }
        #[inline(always)]
        unsafe fn int8<const FLIP: bool>(from: *const u8, byte: usize) -> __m512 {
            let flip = _mm512_set1_epi32(if FLIP { 0x8080_8080_u32 as i32 } else { 0 });
            let fours = _mm512_xor_si512(_mm512_loadu_si512(from.cast()), flip);
            let top = _mm512_sllv_epi32(fours, _mm512_set1_epi32(24 - 8 * byte as i32));
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top))
        }
        #[inline(always)]
        unsafe fn store_bf16(to: *mut u16, first: __m512, second: __m512) {
            // The intrinsic puts its second operand into the low half.
            let both = _mm512_cvtne2ps_pbh(second, first);
            to.cast::<__m512bh>().write_unaligned(both)
        }
        #[inline(always)]
        unsafe fn store_bf16_pairs(to: *mut u8, even: __m512, odd: __m512) {
            let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, even, _mm512_castps_si512(odd));
            _mm512_storeu_si512(to.cast(), pairs)
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            _mm_prefetch::<_MM_HINT_T1>(at.cast())
        }
    }
}

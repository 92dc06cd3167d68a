//! Panels: 64 columns of vectors, `[dim][64]` in f32, whatever they are stored as, so that products with a few
//! queries always fill whole vectors. Shared by the search for keys and the comparison with centroids.

use crate::attention::{KvDtype, KvLayout, PAGE};
use crate::cpu::Level;

/// Compiles a plain-loop body for each vector width; the level is given and no higher than the detected one.
macro_rules! at_level {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:ident) => {
        $(#[$doc])*
        $vis fn $name(level: Level, $($arg: $ty),*) {
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

pub(crate) use at_level;

at_level! {
    /// out `[n][64]` = queries `[n, dim]` times panel `[dim][64]`.
    pub(crate) fn panel_products(panel: &[f32], dim: usize, queries: &[f32], out: &mut [f32]) products_body
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

/// out `[n][64]` = queries `[n, dim]` times a panel `[dim][64]` of f16, which is widened on the way.
pub(crate) fn half_products(
    level: Level,
    panel: &[u16],
    dim: usize,
    queries: &[f32],
    out: &mut [f32],
) {
    assert!(panel.len() == dim * PAGE && out.len() == queries.len() / dim * PAGE);
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::*;

        #[target_feature(enable = "avx512f")]
        unsafe fn wide<const R: usize>(
            panel: &[u16],
            dim: usize,
            queries: &[f32],
            out: &mut [f32],
        ) {
            let mut sums = [[_mm512_setzero_ps(); PAGE / 16]; R];
            for d in 0..dim {
                let row = panel.as_ptr().add(d * PAGE);
                let keys: [__m512; PAGE / 16] = std::array::from_fn(|part| {
                    _mm512_cvtph_ps(_mm256_loadu_si256(row.add(part * 16).cast()))
                });
                for r in 0..R {
                    let x = _mm512_set1_ps(*queries.get_unchecked(r * dim + d));
                    for part in 0..PAGE / 16 {
                        sums[r][part] = _mm512_fmadd_ps(x, keys[part], sums[r][part]);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (part, &sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(out.as_mut_ptr().add(r * PAGE + part * 16), sum);
                }
            }
        }

        #[target_feature(enable = "avx2,f16c,fma")]
        unsafe fn middle<const R: usize>(
            panel: &[u16],
            dim: usize,
            queries: &[f32],
            out: &mut [f32],
        ) {
            const QUARTER: usize = PAGE / 4;
            for first in (0..PAGE).step_by(QUARTER) {
                let mut sums = [[_mm256_setzero_ps(); QUARTER / 8]; R];
                for d in 0..dim {
                    let row = panel.as_ptr().add(d * PAGE + first);
                    let keys: [__m256; QUARTER / 8] = std::array::from_fn(|part| {
                        _mm256_cvtph_ps(_mm_loadu_si128(row.add(part * 8).cast()))
                    });
                    for r in 0..R {
                        let x = _mm256_set1_ps(*queries.get_unchecked(r * dim + d));
                        for part in 0..QUARTER / 8 {
                            sums[r][part] = _mm256_fmadd_ps(x, keys[part], sums[r][part]);
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (part, &sum) in sums.iter().enumerate() {
                        _mm256_storeu_ps(out.as_mut_ptr().add(r * PAGE + first + part * 8), sum);
                    }
                }
            }
        }

        if level >= Level::Avx2 {
            let rows = queries.chunks(4 * dim);
            for (queries, out) in rows.zip(out.chunks_mut(4 * PAGE)) {
                // SAFETY: callers bound the level by the detected one; lengths are checked above.
                unsafe {
                    match (level, queries.len() / dim) {
                        (Level::Avx2, 1) => middle::<1>(panel, dim, queries, out),
                        (Level::Avx2, 2) => middle::<2>(panel, dim, queries, out),
                        (Level::Avx2, 3) => middle::<3>(panel, dim, queries, out),
                        (Level::Avx2, _) => middle::<4>(panel, dim, queries, out),
                        (_, 1) => wide::<1>(panel, dim, queries, out),
                        (_, 2) => wide::<2>(panel, dim, queries, out),
                        (_, 3) => wide::<3>(panel, dim, queries, out),
                        (_, _) => wide::<4>(panel, dim, queries, out),
                    }
                }
            }
            return;
        }
    }
    let _ = level;
    out.fill(0.0);
    for (query, out) in queries.chunks_exact(dim).zip(out.chunks_exact_mut(PAGE)) {
        for (x, row) in query.iter().zip(panel.chunks_exact(PAGE)) {
            for (sum, &key) in out.iter_mut().zip(row) {
                *sum += x * half::f16::from_bits(key).to_f32();
            }
        }
    }
}

/// A section of keys as a panel.
pub(crate) fn expand(level: Level, layout: &KvLayout, section: &[u8], panel: &mut [f32]) {
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
pub(crate) fn expand_f16(level: Level, section: &[u8], panel: &mut [f32]) {
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

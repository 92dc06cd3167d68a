//! Every GGUF block type back to f32, one weight at a time, with ggml's own order of operations.

use super::{GgmlType, QuantError};
use half::{bf16, f16};

/// Writes the weights of `bytes` (whole blocks of type `ty`) to `out`, in order.
///
/// The values are bit for bit those of ggml's reference functions.
///
/// # Errors
/// [`QuantError`] when `out` is no whole number of blocks or `bytes` has another length.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let elements = out.len();
    let expected = ty
        .bytes(elements)
        .ok_or(QuantError::PartialBlock { ty, elements })?;
    if bytes.len() != expected {
        return Err(QuantError::Length {
            ty,
            elements,
            expected,
            found: bytes.len(),
        });
    }
    let blocks = bytes
        .chunks_exact(ty.block_bytes())
        .zip(out.chunks_exact_mut(ty.block_elements()));
    for (block, out) in blocks {
        match ty {
            GgmlType::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            GgmlType::F16 => out[0] = half_at(block, 0),
            GgmlType::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            GgmlType::Q4_0 => q4_0(block, out),
            GgmlType::Q4_1 => q4_1(block, out),
            GgmlType::Q5_0 => q5_0(block, out),
            GgmlType::Q5_1 => q5_1(block, out),
            GgmlType::Q8_0 => q8_0(block, out),
            GgmlType::Q2K => q2_k(block, out),
            GgmlType::Q3K => q3_k(block, out),
            GgmlType::Q4K => q4_k(block, out),
            GgmlType::Q5K => q5_k(block, out),
            GgmlType::Q6K => q6_k(block, out),
        }
    }
    Ok(())
}

/// The f16 at byte `at`.
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

// 32-weight blocks: the low nibbles are weights 0..16, the high nibbles weights 16..32.

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (j, &q) in block[2..18].iter().enumerate() {
        out[j] = d * (f32::from(q & 15) - 8.0);
        out[j + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, &q) in block[4..20].iter().enumerate() {
        out[j] = d * f32::from(q & 15) + m;
        out[j + 16] = d * f32::from(q >> 4) + m;
    }
}

/// The 32 five-bit codes of a Q5_0 or Q5_1 block, whose high bits start at byte `at`.
pub(crate) fn five_bits(block: &[u8], at: usize) -> [u8; 32] {
    let high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    std::array::from_fn(|j| {
        let q = block[at + 4 + j % 16];
        let low = if j < 16 { q & 15 } else { q >> 4 };
        low | ((high >> j & 1) as u8) << 4
    })
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, code) in out.iter_mut().zip(five_bits(block, 2)) {
        *out = d * (f32::from(code) - 16.0);
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (out, code) in out.iter_mut().zip(five_bits(block, 4)) {
        *out = d * f32::from(code) + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &code) in out.iter_mut().zip(&block[2..34]) {
        *out = d * f32::from(code as i8);
    }
}

// 256-weight super-blocks.

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (i, out) in out.iter_mut().enumerate() {
        // Each half of 128 weights keeps its four runs of 32 in the four bit pairs of 32 bytes.
        let (part, run, l) = (i / 128, i / 32 % 4, i % 32);
        let scale = scales[i / 16];
        let code = qs[32 * part + l] >> (2 * run) & 3;
        *out = d * f32::from(scale & 15) * f32::from(code) - dmin * f32::from(scale >> 4);
    }
}

/// The 16 six-bit scales of a Q3_K block, 32 subtracted.
pub(crate) fn q3_k_scales(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = if i < 8 {
            packed[i] & 15
        } else {
            packed[i - 8] >> 4
        };
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

fn q3_k(block: &[u8], out: &mut [f32]) {
    let (hmask, qs) = (&block[..32], &block[32..96]);
    let scales = q3_k_scales(&block[96..108]);
    let d = half_at(block, 108);
    for (i, out) in out.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i / 32 % 4, i % 32);
        let low = qs[32 * part + l] >> (2 * run) & 3;
        let high = hmask[l] >> (4 * part + run) & 1;
        *out = d * f32::from(scales[i / 16]) * (f32::from(low | high << 2) - 4.0);
    }
}

/// Scale and minimum (6 bits each) of run `j` in 0..8 of a Q4_K or Q5_K block.
pub(crate) fn k4_scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    }
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let run = i / 32;
        let (scale, min) = k4_scale_min(&block[4..16], run);
        let code = block[16 + 32 * (run / 2) + i % 32] >> (4 * (run % 2)) & 15;
        *out = d * f32::from(scale) * f32::from(code) - dmin * f32::from(min);
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let run = i / 32;
        let (scale, min) = k4_scale_min(&block[4..16], run);
        let low = block[48 + 32 * (run / 2) + i % 32] >> (4 * (run % 2)) & 15;
        let high = block[16 + i % 32] >> run & 1;
        *out = d * f32::from(scale) * f32::from(low | high << 4) - dmin * f32::from(min);
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i / 32 % 4, i % 32);
        let nibble = low[64 * part + 32 * (run % 2) + l] >> (4 * (run / 2)) & 15;
        let bits = high[32 * part + l] >> (2 * run) & 3;
        let code = nibble | bits << 4;
        *out = d * f32::from(scales[i / 16] as i8) * (f32::from(code) - 32.0);
    }
}

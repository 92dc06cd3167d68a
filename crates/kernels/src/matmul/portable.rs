//! The panel kernel in plain Rust: the same integers as the vector kernels, one by one.

use super::Kernel;
use super::activation::{RowBlock, plane_value};
use super::format::{BLOCK, Format, GROUP, LANES};
use half::bf16;

pub(super) fn kernel(format: Format) -> Kernel {
    // A kernel is a plain function, so each format has its own.
    macro_rules! select {
        ($($bits:literal $min:literal $halves:literal $offset:literal),+) => {
            match (format.bits, format.min, format.halves, format.offset) {
                (16, ..) => dense,
                $(($bits, $min, $halves, $offset) => quantized::<$bits, $min, $halves, $offset>,)+
                other => unreachable!("no format {other:?}"),
            }
        };
    }
    select!(
        4 false false 8, 4 true false 0, 5 false false 16, 5 true false 0, 6 false true 32,
        8 false false 128, 4 true true 0, 4 false true 4
    )
}

/// The 32 codes of 16 rows, `[input / 4][4 row + input % 4]`.
fn unpack(format: Format, block: &[u8], group: usize) -> [[u8; 4 * LANES]; 8] {
    let line = |at: usize| -> &[u8; 64] { block[at..at + 64].try_into().expect("64 bytes") };
    let mut codes = [[0; 4 * LANES]; 8];
    for (quad, codes) in codes.iter_mut().enumerate() {
        if format.bits == 8 {
            *codes = *line(512 * group + 64 * quad);
            continue;
        }
        let shift = 4 * (quad / 4);
        for (code, pair) in codes.iter_mut().zip(line(256 * group + 64 * (quad % 4))) {
            *code = pair >> shift & 15;
        }
        if format.bits == 5 {
            let bits = &block[512 + 64 * group + 8 * quad..][..8];
            for (byte, code) in codes.iter_mut().enumerate() {
                *code |= (bits[byte / 8] >> (byte % 8) & 1) << 4;
            }
        }
        if format.bits == 6 {
            let shift = 2 * (quad % 4);
            for (code, pairs) in codes
                .iter_mut()
                .zip(line(512 + 128 * group + 64 * (quad / 4)))
            {
                *code |= (pairs >> shift & 3) << 4;
            }
        }
    }
    codes
}

unsafe fn quantized<const BITS: u8, const MIN: bool, const HALVES: bool, const OFFSET: u8>(
    panel: *const u8,
    blocks: usize,
    x: &RowBlock,
    sums: *mut [f32; LANES],
) {
    let format = Format {
        bits: BITS,
        min: MIN,
        halves: HALVES,
        offset: OFFSET,
    };
    let parts = if HALVES { 2 } else { 1 };
    let quads = 8 / parts;
    for group in 0..2 * blocks {
        let bytes = format.block_bytes();
        let block = std::slice::from_raw_parts(panel.add(group / 2 * bytes), bytes);
        let codes = unpack(format, block, group % 2);
        for part in 0..parts {
            let scales: [[f32; 2]; LANES] =
                std::array::from_fn(|row| format.scale_of(block, group % 2, part, row));
            for r in 0..x.rows {
                let cell = group * x.rows + r;
                let line = std::slice::from_raw_parts(x.values.add(64 * cell), 64);
                let term = *x.terms.add((group * parts + part) * x.rows + r);
                let scale = *x.scales.add(cell);
                // Four running sums a row, one for each input of a quad.
                let mut dots = [0i32; 4 * LANES];
                for quad in quads * part..quads * (part + 1) {
                    let q: [i32; 4] = std::array::from_fn(|k| plane_value(line, 4 * quad + k));
                    for (dots, codes) in dots.chunks_exact_mut(4).zip(codes[quad].chunks_exact(4)) {
                        for k in 0..4 {
                            dots[k] += i32::from(codes[k]) * q[k];
                        }
                    }
                }
                for (row, sum) in (*sums.add(r)).iter_mut().enumerate() {
                    let start = if MIN { 0 } else { term as i32 };
                    let dot = start + dots[4 * row..][..4].iter().sum::<i32>();
                    *sum += dot as f32 * scales[row][0] * scale;
                    if MIN {
                        *sum += scales[row][1] * f32::from_bits(term);
                    }
                }
            }
        }
    }
}

unsafe fn dense(panel: *const u8, blocks: usize, x: &RowBlock, sums: *mut [f32; LANES]) {
    for input in 0..blocks * BLOCK {
        let weights: [f32; LANES] = std::array::from_fn(|row| {
            let at = panel.add(64 * (input / 2) + 4 * row + 2 * (input % 2));
            bf16::from_le_bytes([*at, *at.add(1)]).to_f32()
        });
        let (group, k) = (input / GROUP, input % GROUP);
        for r in 0..x.rows {
            let value = *x.values.cast::<f32>().add((group * x.rows + r) * GROUP + k);
            for (sum, weight) in (*sums.add(r)).iter_mut().zip(weights) {
                *sum += weight * value;
            }
        }
    }
}

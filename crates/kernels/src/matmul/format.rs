//! Panel formats: how 16 rows of weights are interleaved so that every level reads them in order.
//!
//! A matrix is cut into panels of 16 output rows, a panel into blocks of 64 inputs, a block into
//! two groups of 32. A weight is `d * (u - offset)` or `d * u + m` with an unsigned code `u`; `d`
//! and `m` are f16, one per row and group (per row and 16 inputs in the `halves` formats).
//!
//! One block holds, in order:
//!
//! | plane | bytes | content |
//! |---|---|---|
//! | codes, 4 bits | 2 x 256 | byte `64 i + 4 row + k` of a group: low nibble is input `4 i + k`, high nibble input `16 + 4 i + k` |
//! | codes, 8 bits | 2 x 512 | byte `64 i + 4 row + k` of a group is input `4 i + k` |
//! | fifth bits | 2 x 64 | bit `4 row + k` of 64-bit word `i` belongs to input `4 i + k` |
//! | bits 4 and 5 | 2 x 128 | bits `2 (i % 4)` of byte `64 (i / 4) + 4 row + k` belong to input `4 i + k` |
//! | `d`, then `m` | 32 each | 16 rows, group after group, half after half |
//!
//! so that one 64-byte load and one mask yield 16 rows x 4 consecutive inputs, the operand of the
//! 8-bit dot-product instructions. The dense format is bf16: byte `64 j + 4 row + 2 k` of a panel
//! is input `2 j + k`, the order of an AMX tile.

use crate::quant::GgmlType;
use half::f16;

/// Rows of a panel.
pub(super) const LANES: usize = 16;
/// Inputs that share an activation scale.
pub(super) const GROUP: usize = 32;
/// Inputs of a block.
pub(super) const BLOCK: usize = 64;

/// How the weights of a panel are stored. See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// 4, 5, 6 or 8 bits of a code; 16 is dense bf16.
    pub bits: u8,
    /// `w = d * u + m` instead of `w = d * (u - offset)`.
    pub min: bool,
    /// Scales per 16 inputs instead of 32.
    pub halves: bool,
    /// Subtracted from each code when there is no `m`.
    pub offset: u8,
}

impl Format {
    pub fn of(ty: GgmlType) -> Self {
        let (bits, min, halves, offset) = match ty {
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => (16, false, false, 0),
            GgmlType::Q4_0 => (4, false, false, 8),
            GgmlType::Q4_1 | GgmlType::Q4K => (4, true, false, 0),
            GgmlType::Q5_0 => (5, false, false, 16),
            GgmlType::Q5_1 | GgmlType::Q5K => (5, true, false, 0),
            GgmlType::Q8_0 => (8, false, false, 128),
            GgmlType::Q2K => (4, true, true, 0),
            GgmlType::Q3K => (4, false, true, 4),
            GgmlType::Q6K => (6, false, true, 32),
        };
        Format {
            bits,
            min,
            halves,
            offset,
        }
    }

    pub fn dense(self) -> bool {
        self.bits == 16
    }

    /// Byte of a block at which the planes above the low codes start.
    pub fn high_at(self) -> usize {
        match self.bits {
            8 => 1024,
            _ => 512,
        }
    }

    /// Byte of a block at which the scales start.
    pub fn scales_at(self) -> usize {
        self.high_at()
            + match self.bits {
                5 => 128,
                6 => 256,
                _ => 0,
            }
    }

    /// Byte of a block at which the minima start, when it has any.
    pub fn mins_at(self) -> usize {
        self.scales_at() + if self.halves { 128 } else { 64 }
    }

    /// Bytes of a block of 16 rows x 64 inputs: a multiple of 64.
    pub fn block_bytes(self) -> usize {
        if self.dense() {
            return LANES * BLOCK * 2;
        }
        let scales = self.mins_at() - self.scales_at();
        self.mins_at() + if self.min { scales } else { 0 }
    }

    /// Writes the 32 codes of one row and group.
    ///
    /// `block` was zero there before.
    pub fn put_codes(self, block: &mut [u8], group: usize, row: usize, codes: &[u8; GROUP]) {
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|k| codes[4 * i + k]));
        let mut or = |at: usize, bits: u32| {
            let field: &mut [u8; 4] = (&mut block[at..at + 4]).try_into().expect("four bytes");
            *field = (u32::from_le_bytes(*field) | bits).to_le_bytes();
        };
        if self.bits == 8 {
            (0..8).for_each(|i| or(512 * group + 64 * i + 4 * row, word(i)));
            return;
        }
        for i in 0..4 {
            let low = word(i) & 0x0f0f_0f0f | (word(i + 4) & 0x0f0f_0f0f) << 4;
            or(256 * group + 64 * i + 4 * row, low);
        }
        match self.bits {
            5 => {
                for i in 0..8 {
                    let nibble = (0..4).fold(0, |bits, k| bits | (codes[4 * i + k] >> 4) << k);
                    block[512 + 64 * group + 8 * i + row / 2] |= nibble << (4 * (row % 2));
                }
            }
            6 => {
                for i in 0..8 {
                    let pairs = (word(i) & 0x3030_3030) >> 4 << (2 * (i % 4));
                    or(512 + 128 * group + 64 * (i / 4) + 4 * row, pairs);
                }
            }
            _ => {}
        }
    }

    /// The code of one weight: the plain inverse of [`Format::put_codes`].
    pub fn code_of(self, block: &[u8], group: usize, input: usize, row: usize) -> u8 {
        let (i, byte) = (input / 4, 4 * row + input % 4);
        let low = match self.bits {
            8 => block[512 * group + 64 * i + byte],
            _ => block[256 * group + 64 * (i % 4) + byte] >> (4 * (i / 4)) & 15,
        };
        let high = match self.bits {
            5 => block[512 + 64 * group + 8 * i + byte / 8] >> (byte % 8) & 1,
            6 => block[512 + 128 * group + 64 * (i / 4) + byte] >> (2 * (i % 4)) & 3,
            _ => 0,
        };
        low | high << 4
    }

    /// Index of the scales of inputs `16 * half ..` of a group.
    fn scale_index(self, group: usize, half: usize) -> usize {
        if self.halves { 2 * group + half } else { group }
    }

    /// Writes `d` and `m` of one row. `half` is 0 where the format has none.
    pub fn put_scales(
        self,
        block: &mut [u8],
        group: usize,
        half: usize,
        row: usize,
        d: f32,
        m: f32,
    ) {
        let at = 32 * self.scale_index(group, half) + 2 * row;
        let mut put = |at: usize, value: f32| {
            block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        };
        put(self.scales_at() + at, d);
        if self.min {
            put(self.mins_at() + at, m);
        }
    }

    /// `d` and `m` of one row for inputs `16 * half ..` of a group; `m` is 0 where there is none.
    pub fn scale_of(self, block: &[u8], group: usize, half: usize, row: usize) -> [f32; 2] {
        let at = 32 * self.scale_index(group, half) + 2 * row;
        let get = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        [
            get(self.scales_at() + at),
            if self.min {
                get(self.mins_at() + at)
            } else {
                0.0
            },
        ]
    }
}

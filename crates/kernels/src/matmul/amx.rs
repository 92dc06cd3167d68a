//! Prefill on bf16 tiles (AMX): `x` is packed once into left-hand tiles, and the codes of a few
//! panels at a time become right-hand tiles that all rows of `x` meet while they are in cache.
//!
//! A group of 32 inputs of a panel is one tile of 16 x 32 weights, in the order in which dense
//! panels are stored already. Both sides are rounded to bf16 (dense weights are bf16), products
//! are summed in f32: an output is off by at most 2^-8 of `sum |x| |w|`, typically far less, where
//! the integer kernels stay within 2^-16 of each group's largest `x`.

use super::format::{Format, GROUP, LANES};
use super::{Epilogue, PackedMatrix, share};
use crate::pool::{Pool, SharedMut};
use crate::tile::{TileUnit, square};
use std::cell::RefCell;
use std::ops::Range;

/// From this many rows on, tiles are faster than dot products on the codes.
pub(super) const MIN_ROWS: usize = 32;

// A unit of work is some row tiles times some panels. Over `DEPTH` tiles of inputs at a time its
// left tiles (1 MiB), right tiles of two panels (32 KiB) and sums (512 KiB) stay in a core's
// second-level cache, and each weight is unpacked once for all the rows.
const ROW_TILES: usize = 64;
const PANELS: usize = 8;
const DEPTH: usize = 16;

/// 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile([u8; 1024]);

const ROW_BYTES: usize = 64;

thread_local! {
    /// Left-hand tiles, filled and read by all threads on behalf of the one that calls.
    static LEFT: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
    /// Right-hand tiles of two panels, then the sums `[row tile][PANELS]` of a unit.
    static ROOM: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

fn grow(tiles: &mut Vec<Tile>, len: usize) {
    if tiles.len() < len {
        tiles.resize(len, Tile([0; 1024]));
    }
}

/// Fills tiles. `to` is `[groups][16][32]` of bf16 bits.
pub(super) trait Fill {
    /// 1 to 16 rows of `x` `[rows, cols]`; missing rows and columns become zeros.
    unsafe fn left(x: &[f32], rows: usize, cols: usize, groups: usize, to: *mut u8);
    /// The weights of some groups of a panel, times the rows' multipliers.
    unsafe fn right(
        format: Format,
        panel: *const u8,
        multipliers: &[f32; LANES],
        groups: Range<usize>,
        to: *mut u8,
    );
    /// Stores results of one row of `x`, from row `row` of the matrix on.
    unsafe fn store(out: &mut [f32], sums: *const f32, row: usize, how: Epilogue);
}

/// `out (=|+=) x . W^T (+ bias)`, the slices' lengths checked by the caller.
///
/// # Safety
/// The CPU has the instructions of `T` and `F`.
pub(super) unsafe fn product<T: TileUnit, F: Fill>(
    matrix: &PackedMatrix,
    x: &[f32],
    m: usize,
    out: &mut [f32],
    how: Epilogue<'_>,
) {
    let cols = matrix.cols;
    let groups = cols.div_ceil(GROUP);
    let row_tiles = m.div_ceil(LANES);
    let mut tiles = LEFT.take();
    grow(&mut tiles, row_tiles * groups);
    let left = SharedMut::new(&mut tiles);
    Pool::global().for_each(row_tiles, |tile| {
        let first = tile * LANES;
        let rows = LANES.min(m - first);
        // SAFETY: each row tile is one task's.
        unsafe {
            let to = left.slice(tile * groups, groups).as_mut_ptr();
            F::left(
                &x[first * cols..][..rows * cols],
                rows,
                cols,
                groups,
                to.cast(),
            );
        }
    });
    let left: &[Tile] = &tiles;
    let out = SharedMut::new(out);
    let chunks = row_tiles.div_ceil(ROW_TILES);
    let chunk = row_tiles.div_ceil(chunks).next_multiple_of(2);
    // Fewer panels at a time when there would be less than four units for each thread.
    let even = chunks * matrix.panels / (4 * Pool::global().threads());
    let width = (even / 2 * 2).clamp(2, PANELS);
    let columns = matrix.panels.div_ceil(width);
    share(chunks * columns, |unit| {
        let first = unit / columns * chunk;
        let panel = unit % columns * width;
        let unit = Unit {
            matrix,
            left,
            groups,
            m,
            rows: first..(first + chunk).min(row_tiles),
            panels: panel..(panel + width).min(matrix.panels),
            how,
        };
        ROOM.with_borrow_mut(|room| {
            grow(room, 2 * DEPTH + chunk * PANELS);
            // SAFETY: units write disjoint outputs, and the CPU has what `T` and `F` need.
            unsafe { unit.run::<T, F>(room, &out) };
        });
    });
    LEFT.set(tiles);
}

/// Some row tiles by some panels.
struct Unit<'a> {
    matrix: &'a PackedMatrix,
    /// `[row tile][group]`.
    left: &'a [Tile],
    groups: usize,
    m: usize,
    /// Row tiles.
    rows: Range<usize>,
    panels: Range<usize>,
    how: Epilogue<'a>,
}

impl Unit<'_> {
    /// Every pair of panels over every pair of row tiles, `DEPTH` groups deep at a time. Whole
    /// squares go straight to the output; others by way of `room`, which holds the right-hand
    /// tiles of two panels first, then results `[row tile][PANELS]`.
    unsafe fn run<T: TileUnit, F: Fill>(&self, room: &mut [Tile], out: &SharedMut<f32>) {
        let (tiles, sums) = room.split_at_mut(2 * DEPTH);
        let (tiles, sums) = (tiles.as_mut_ptr(), sums.as_mut_ptr());
        let stride = self.matrix.rows;
        T::configure();
        for start in (0..self.groups).step_by(DEPTH) {
            let range = start..(start + DEPTH).min(self.groups);
            for panel in self.panels.clone().step_by(2) {
                // The last panel may stand for itself twice.
                let pair = [panel, (panel + 1).min(self.panels.end - 1)];
                let b = [0, 1].map(|i| self.right::<F>(pair[i], &range, tiles.add(i * DEPTH)));
                for row in self.rows.clone().step_by(2) {
                    let lower = row + 1 < self.rows.end;
                    let (c, c_stride, add) = if self.whole(pair, row) {
                        let at = |row: usize, panel: usize| {
                            out.at(row * LANES * stride + self.matrix.panel(panel).2)
                                .cast::<u8>()
                        };
                        let low = if lower { row + 1 } else { row };
                        let c = [
                            at(row, pair[0]),
                            at(row, pair[1]),
                            at(low, pair[0]),
                            at(low, pair[1]),
                        ];
                        (c, 4 * stride, self.how.accumulate || start > 0)
                    } else {
                        // The lower half of a lone row tile is not touched.
                        let at = (row - self.rows.start) * PANELS + panel - self.panels.start;
                        let c = [0, 1, PANELS, PANELS + 1];
                        let c = c.map(|i| sums.wrapping_add(at + i).cast::<u8>());
                        (c, ROW_BYTES, start > 0)
                    };
                    let tile = |row: usize, i: usize| -> *const u8 {
                        self.left[row * self.groups + range.start + i].0.as_ptr()
                    };
                    let b = |i: usize| b.map(|tiles| tiles.add(i * size_of::<Tile>()));
                    if lower {
                        let a = |i: usize| [tile(row, i), tile(row + 1, i)];
                        square::<T, true>(
                            a,
                            ROW_BYTES,
                            b,
                            ROW_BYTES,
                            range.len(),
                            c,
                            c_stride,
                            add,
                        );
                    } else {
                        let a = |i: usize| [tile(row, i); 2];
                        square::<T, false>(
                            a,
                            ROW_BYTES,
                            b,
                            ROW_BYTES,
                            range.len(),
                            c,
                            c_stride,
                            add,
                        );
                    }
                }
            }
        }
        T::release();
        for panel in self.panels.clone() {
            let first = panel - (panel - self.panels.start) % 2;
            let pair = [first, (first + 1).min(self.panels.end - 1)];
            let (.., row, count) = self.matrix.panel(panel);
            for tile in self.rows.clone() {
                if self.whole(pair, tile - (tile - self.rows.start) % 2) {
                    continue;
                }
                let at = (tile - self.rows.start) * PANELS + panel - self.panels.start;
                let sums: *const f32 = sums.add(at).cast();
                for r in tile * LANES..self.m.min((tile + 1) * LANES) {
                    let out = out.slice(r * stride + row, count);
                    F::store(out, sums.add(r % LANES * LANES), row, self.how);
                }
            }
        }
    }

    /// Whether the square of two panels and of the row tiles from `row` on is stored as it is.
    fn whole(&self, panels: [usize; 2], row: usize) -> bool {
        let rows = self.rows.end.min(row + 2) * LANES;
        let full = |panel: usize| self.matrix.panel(panel).3 == LANES;
        self.how.bias.is_none() && rows <= self.m && full(panels[0]) && full(panels[1])
    }

    /// The right-hand tiles of some groups of a panel, in `room` if need be.
    unsafe fn right<F: Fill>(
        &self,
        panel: usize,
        groups: &Range<usize>,
        room: *mut Tile,
    ) -> *const u8 {
        let (segment, data, ..) = self.matrix.panel(panel);
        if segment.format.dense() {
            return data.as_ptr().add(groups.start * size_of::<Tile>());
        }
        let multipliers = &self.matrix.multipliers[panel * LANES..][..LANES];
        let multipliers = multipliers.try_into().expect("sixteen rows");
        F::right(
            segment.format,
            data.as_ptr(),
            multipliers,
            groups.clone(),
            room.cast(),
        );
        room.cast_const().cast()
    }
}

/// Tiles filled with AVX-512 instructions.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Fill for Avx512 {
    unsafe fn left(x: &[f32], rows: usize, cols: usize, groups: usize, to: *mut u8) {
        vectors::left(x, rows, cols, groups, to);
    }

    unsafe fn store(out: &mut [f32], sums: *const f32, row: usize, how: Epilogue) {
        super::words::store(out, sums, row, how);
    }

    unsafe fn right(
        format: Format,
        panel: *const u8,
        multipliers: &[f32; LANES],
        groups: Range<usize>,
        to: *mut u8,
    ) {
        macro_rules! select {
            ($($bits:literal $min:literal $halves:literal),+) => {
                match (format.bits, format.min, format.halves) {
                    $(($bits, $min, $halves) => {
                        vectors::right::<$bits, $min, $halves>(
                            format.offset, panel, multipliers, groups, to,
                        )
                    })+
                    other => unreachable!("no format {other:?}"),
                }
            };
        }
        select!(
            4 false false, 4 true false, 5 false false, 5 true false, 6 false true,
            8 false false, 4 true true, 4 false true
        )
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use super::super::avx512::unpack;
    use super::{Format, GROUP, ROW_BYTES, Tile};
    use std::arch::x86_64::*;
    use std::ops::Range;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn left(x: &[f32], rows: usize, cols: usize, groups: usize, to: *mut u8) {
        for r in 0..16 {
            for group in 0..groups {
                let left = match r < rows {
                    true => (cols - group * GROUP).min(GROUP),
                    false => 0,
                };
                let mask = ((1u64 << left) - 1) as u32;
                let start = x.as_ptr().wrapping_add(r * cols + group * GROUP);
                let first = _mm512_maskz_loadu_ps(mask as u16, start);
                let second = _mm512_maskz_loadu_ps((mask >> 16) as u16, start.wrapping_add(16));
                // The intrinsic puts its second operand into the low half.
                let both = _mm512_cvtne2ps_pbh(second, first);
                let to = to.add(group * size_of::<Tile>() + r * ROW_BYTES);
                to.cast::<__m512bh>().write(both);
            }
        }
    }

    /// `d * u + m` per row and group.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn right<const BITS: u8, const MIN: bool, const HALVES: bool>(
        offset: u8,
        panel: *const u8,
        multipliers: &[f32; 16],
        groups: Range<usize>,
        mut to: *mut u8,
    ) {
        let format = Format {
            bits: BITS,
            min: MIN,
            halves: HALVES,
            offset,
        };
        // A code in bits 15 to 22 of this f32 makes it `256 + code`, without a conversion.
        const MAGIC: f32 = 256.0;
        let magic = _mm512_castps_si512(_mm512_set1_ps(MAGIC));
        let field = _mm512_set1_epi32(0xff << 15);
        let shift = _mm512_set1_ps(-MAGIC - if MIN { 0.0 } else { f32::from(offset) });
        // Word `2 i` of a tile's row from the first half of a register, `2 i + 1` from the other.
        let words: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
        let interleave = _mm512_loadu_si512(words.as_ptr().cast());
        let multipliers = _mm512_loadu_ps(multipliers.as_ptr());
        for group in groups {
            let block = panel.add(group / 2 * format.block_bytes());
            let group = group % 2;
            let codes = unpack::<BITS>(block, group);
            let scale = |at: usize, half: usize| {
                let at = at
                    + if HALVES {
                        64 * group + 32 * half
                    } else {
                        32 * group
                    };
                let scales = _mm512_cvtph_ps(_mm256_loadu_si256(block.add(at).cast()));
                _mm512_mul_ps(scales, multipliers)
            };
            for half in 0..2 {
                let part = if HALVES { half } else { 0 };
                let d = scale(format.scales_at(), part);
                let m = match MIN {
                    true => _mm512_fmadd_ps(d, shift, scale(format.mins_at(), part)),
                    false => _mm512_mul_ps(d, shift),
                };
                for codes in &codes[4 * half..][..4] {
                    let weight = |shifted: __m512i| {
                        // 0xea: first & second | third
                        let code = _mm512_ternarylogic_epi32::<0xea>(shifted, field, magic);
                        _mm512_fmadd_ps(_mm512_castsi512_ps(code), d, m)
                    };
                    let weights = [
                        weight(_mm512_slli_epi32::<15>(*codes)),
                        weight(_mm512_slli_epi32::<7>(*codes)),
                        weight(_mm512_srli_epi32::<1>(*codes)),
                        weight(_mm512_srli_epi32::<9>(*codes)),
                    ];
                    for pair in [0, 2] {
                        let both = _mm512_cvtne2ps_pbh(weights[pair + 1], weights[pair]);
                        let both: __m512i = std::mem::transmute(both);
                        let both = _mm512_permutexvar_epi16(interleave, both);
                        _mm512_storeu_si512(to.cast(), both);
                        to = to.add(ROW_BYTES);
                    }
                }
            }
        }
    }
}

/// Tiles filled number by number: the twin of [`Avx512`].
#[cfg(test)]
pub(super) struct Plain;

#[cfg(test)]
impl Fill for Plain {
    unsafe fn left(x: &[f32], rows: usize, cols: usize, groups: usize, to: *mut u8) {
        for (r, group, k) in (0..16)
            .flat_map(|r| (0..groups).map(move |g| (r, g)))
            .flat_map(|(r, group)| (0..GROUP).map(move |k| (r, group, k)))
        {
            let input = group * GROUP + k;
            let value = match r < rows && input < cols {
                true => x[r * cols + input],
                false => 0.0,
            };
            let to = to.add(group * size_of::<Tile>() + r * ROW_BYTES + 2 * k);
            to.cast::<half::bf16>().write(half::bf16::from_f32(value));
        }
    }

    unsafe fn store(out: &mut [f32], sums: *const f32, row: usize, how: Epilogue) {
        let sums = &*sums.cast::<[f32; LANES]>();
        super::store(out, sums, &[1.0; LANES], row, how);
    }

    unsafe fn right(
        format: Format,
        panel: *const u8,
        multipliers: &[f32; LANES],
        groups: Range<usize>,
        to: *mut u8,
    ) {
        let bytes = format.block_bytes();
        for (index, group) in groups.enumerate() {
            let block = std::slice::from_raw_parts(panel.add(group / 2 * bytes), bytes);
            for (row, k) in (0..LANES).flat_map(|row| (0..GROUP).map(move |k| (row, k))) {
                let [d, m] = format.scale_of(block, group % 2, k / 16, row);
                let code = f32::from(format.code_of(block, group % 2, k, row));
                let weight = match format.min {
                    true => d * code + m,
                    false => d * (code - f32::from(format.offset)),
                };
                let at = index * size_of::<Tile>() + ROW_BYTES * (k / 2) + 4 * row + 2 * (k % 2);
                let to = to.add(at).cast::<half::bf16>();
                to.write(half::bf16::from_f32(weight * multipliers[row]));
            }
        }
    }
}

//! Prefill on bf16 tiles (AMX): `x` is packed once into left-hand tiles, and the codes of a few
//! panels at a time become right-hand tiles that all rows of `x` meet while they are in cache.
//!
//! A group of 32 inputs of a panel is one tile of 16 x 32 weights, in the order in which dense
//! panels are stored already. Both sides are rounded to bf16 (dense weights are bf16), products
//! are summed in f32: an output is off by at most 2^-8 of `sum |x| |w|`, typically far less, where
//! the integer kernels stay within 2^-16 of each group's largest `x`.

use super::format::{Format, GROUP, LANES};
use super::{Epilogue, PackedMatrix};
#[cfg(target_arch = "x86_64")]
use crate::elementwise::Gate;
use crate::pool::{Pool, SharedMut};
use crate::tile::{self, TileUnit};
use std::cell::RefCell;
use std::ops::Range;

/// From this many rows on, tiles are faster than dot products on the codes.
pub(super) const MIN_ROWS: usize = 32;

// A unit of work is some row tiles times some pairs of panels. At most `DEPTH` tiles of inputs at
// a time: the right tiles of a pair (40 KiB) stay in a core's first-level cache or near it, the
// left tiles (1.25 MiB) and sums (512 KiB) in the second, and each weight is unpacked once for all
// the rows.
const ROW_TILES: usize = 64;
const PAIRS: usize = 4;
/// Row tiles that are worth unpacking the weights once more for.
const LEAST_ROW_TILES: usize = 32;
const DEPTH: usize = 20;
/// Tiles of a square of results: upper left, upper right, lower left, lower right.
const SQUARE: usize = 4;

/// 16 rows of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile([u8; 1024]);

const ROW_BYTES: usize = 64;

thread_local! {
    /// Left-hand tiles, filled and read by all threads on behalf of the one that calls.
    static LEFT: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
    /// The same between the two products of an MLP.
    static HIDDEN: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
    /// Two squares of results, right-hand tiles of a pair of panels, then the sums of a unit.
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
    /// Finishes some rows of a square of results `[2][2][16][16]` and stores them.
    unsafe fn store(square: *const f32, rows: Range<usize>, place: &Place, how: Epilogue);
}

/// Where a square of results goes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    to: Rows,
    /// 1 to 32.
    rows: usize,
    /// First row of the matrix of the left and of the right half.
    first: [usize; 2],
    /// Rows of the matrix in each half; the right one may be empty.
    count: [usize; 2],
}

/// Rows of an output, from a square's first on.
#[derive(Clone, Copy)]
enum Rows {
    /// f32, elements from one row to the next.
    Plain(*mut f32, usize),
    /// Left-hand tiles of a next product, one or two row tiles of so many groups.
    Tiles(*mut u8, usize),
}

/// The whole output.
#[derive(Clone, Copy)]
enum Sink {
    /// `[m][width]`
    Plain(SharedMut<f32>, usize),
    /// `[row tile][groups]`
    Tiles(SharedMut<Tile>, usize),
}

impl Sink {
    unsafe fn rows(self, row_tile: usize) -> Rows {
        match self {
            Sink::Plain(out, width) => Rows::Plain(out.at(row_tile * LANES * width), width),
            Sink::Tiles(out, groups) => Rows::Tiles(out.at(row_tile * groups).cast(), groups),
        }
    }
}

/// `out (=|+=) x . W^T (+ bias)`, the slices' lengths checked by the caller.
///
/// # Safety
/// The CPU has the instructions of `T` and `F`; a gated matrix passed [`pairs_gates`].
pub(super) unsafe fn product<T: TileUnit, F: Fill>(
    matrix: &PackedMatrix,
    x: &[f32],
    m: usize,
    out: &mut [f32],
    how: Epilogue<'_>,
) {
    let mut left = LEFT.take();
    fill_left::<F>(&mut left, x, m, matrix.cols);
    let sink = Sink::Plain(SharedMut::new(out), how.width(matrix.rows));
    multiply::<T, F>(matrix, &left, m, sink, how);
    LEFT.set(left);
}

/// `out += down(gated(x))`, the slices' lengths checked by the caller: what the gated product
/// leaves is rounded to bf16 at once, as tiles for the second product. Written as f32 it would not
/// fit a core's second-level cache, and its lines would take longer than its products.
///
/// # Safety
/// As [`product`], and `gated` has a gate and passed [`pairs_gates`].
pub(super) unsafe fn mlp<T: TileUnit, F: Fill>(
    gate_up: (&PackedMatrix, Epilogue<'_>),
    down: (&PackedMatrix, Epilogue<'_>),
    x: &[f32],
    m: usize,
    out: &mut [f32],
) {
    let mut left = LEFT.take();
    fill_left::<F>(&mut left, x, m, gate_up.0.cols);
    let groups = down.0.cols.div_ceil(GROUP);
    let mut hidden = HIDDEN.take();
    grow(&mut hidden, m.div_ceil(LANES) * groups);
    let sink = Sink::Tiles(SharedMut::new(&mut hidden), groups);
    multiply::<T, F>(gate_up.0, &left, m, sink, gate_up.1);
    LEFT.set(left);
    let sink = Sink::Plain(SharedMut::new(out), down.0.rows);
    multiply::<T, F>(down.0, &hidden, m, sink, down.1);
    HIDDEN.set(hidden);
}

/// Rows of `x` `[m, cols]` as left-hand tiles `[row tile][group]`.
unsafe fn fill_left<F: Fill>(tiles: &mut Vec<Tile>, x: &[f32], m: usize, cols: usize) {
    let groups = cols.div_ceil(GROUP);
    let row_tiles = m.div_ceil(LANES);
    grow(tiles, row_tiles * groups);
    let left = SharedMut::new(tiles);
    Pool::global().for_each_in_runs(row_tiles, |tile| {
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
}

unsafe fn multiply<T: TileUnit, F: Fill>(
    matrix: &PackedMatrix,
    left: &[Tile],
    m: usize,
    sink: Sink,
    how: Epilogue<'_>,
) {
    let groups = matrix.cols.div_ceil(GROUP);
    let row_tiles = m.div_ceil(LANES);
    // Each thread has rows of its own where there are enough: it reads what it has written itself.
    let threads = Pool::global().threads();
    let own = threads.min(row_tiles / LEAST_ROW_TILES);
    let chunks = row_tiles.div_ceil(ROW_TILES).next_multiple_of(own.max(1));
    let chunk = row_tiles.div_ceil(chunks).next_multiple_of(2);
    let chunks = row_tiles.div_ceil(chunk);
    let depth = groups.div_ceil(groups.div_ceil(DEPTH));
    let pairs = matrix.panels.div_ceil(2);
    // Fewer pairs at a time when there would be less than four units for each thread.
    let width = (chunks * pairs / (4 * threads)).clamp(1, PAIRS);
    let columns = pairs.div_ceil(width);
    Pool::global().for_each_in_runs(chunks * columns, |unit| {
        let first = unit / columns * chunk;
        let pair = unit % columns * width;
        let unit = Unit {
            matrix,
            left,
            groups,
            depth,
            m,
            rows: first..(first + chunk).min(row_tiles),
            pairs: pair..(pair + width).min(pairs),
            how,
        };
        ROOM.with_borrow_mut(|room| {
            grow(room, 2 * SQUARE + 2 * depth + chunk / 2 * PAIRS * SQUARE);
            // SAFETY: units write disjoint outputs, and the CPU has what `T` and `F` need.
            unsafe { unit.run::<T, F>(room, sink) };
        });
    });
}

/// Whether a gated product can be fused: every panel is whole, so that the panel of a gate and
/// that of its factor lie half the panels apart, and two pairs of them fill whole tiles.
pub(super) fn pairs_gates(matrix: &PackedMatrix) -> bool {
    matrix.panels.is_multiple_of(4) && matrix.panels * LANES == matrix.rows
}

/// Some row tiles by some pairs of panels.
struct Unit<'a> {
    matrix: &'a PackedMatrix,
    /// `[row tile][group]`.
    left: &'a [Tile],
    groups: usize,
    /// Groups at a time.
    depth: usize,
    m: usize,
    /// Row tiles.
    rows: Range<usize>,
    pairs: Range<usize>,
    how: Epilogue<'a>,
}

impl Unit<'_> {
    /// The panels of a pair: neighbours, or a gate's and its factor's. The last panel of an odd
    /// number stands alone.
    fn panels(&self, pair: usize) -> [Option<usize>; 2] {
        let second = match self.how.gate {
            Some(_) => return [Some(pair), Some(pair + self.matrix.panels / 2)],
            None => 2 * pair + 1,
        };
        [
            Some(2 * pair),
            (second < self.matrix.panels).then_some(second),
        ]
    }

    /// Every pair of panels over every two row tiles, `depth` groups at a time. Results go by way
    /// of a square in the first-level cache: tiles stored straight to the rows of the output wait
    /// for its lines.
    unsafe fn run<T: TileUnit, F: Fill>(&self, room: &mut [Tile], sink: Sink) {
        let (squares, room) = room.split_at_mut(2 * SQUARE);
        let (tiles, sums) = room.split_at_mut(2 * self.depth);
        let squares = squares.as_mut_ptr();
        let (tiles, sums) = (tiles.as_mut_ptr(), sums.as_mut_ptr());
        // The square that is finished row by row while the tile unit works on the next one.
        let mut waiting: Option<(*const f32, Place)> = None;
        let mut turn = 0;
        T::configure();
        for start in (0..self.groups).step_by(self.depth) {
            let range = start..(start + self.depth).min(self.groups);
            let depth = range.len();
            let last = range.end == self.groups;
            for pair in self.pairs.clone() {
                let panels = self.panels(pair);
                let left = self.right::<F>(panels[0].expect("a pair has a first"), &range, tiles);
                let right = match panels[1] {
                    Some(panel) => self.right::<F>(panel, &range, tiles.add(self.depth)),
                    None => left,
                };
                let b = |i: usize| [left, right].map(|tiles| tiles.add(i * size_of::<Tile>()));
                for row in self.rows.clone().step_by(2) {
                    let at = (row - self.rows.start) / 2 * PAIRS + pair - self.pairs.start;
                    let kept = sums.wrapping_add(at * SQUARE);
                    let to = match last {
                        true => squares.add(turn * SQUARE),
                        false => kept,
                    };
                    let square =
                        |first: *mut Tile| [0, 1, 2, 3].map(|i| first.wrapping_add(i).cast::<u8>());
                    let from = (start > 0).then(|| square(kept));
                    let tile = |row: usize, i: usize| -> *const u8 {
                        self.left[row * self.groups + range.start + i].0.as_ptr()
                    };
                    let before = waiting;
                    let between = |i: usize| {
                        if let Some((sums, place)) = &before {
                            let rows = place.rows * i / depth..place.rows * (i + 1) / depth;
                            F::store(*sums, rows, place, self.how);
                        }
                    };
                    waiting = None;
                    let (to_square, bytes) = (square(to), ROW_BYTES);
                    if row + 1 < self.rows.end {
                        let a = |i: usize| [tile(row, i), tile(row + 1, i)];
                        tile::square::<T, true>(
                            a, bytes, b, bytes, depth, from, to_square, bytes, between,
                        );
                    } else {
                        let a = |i: usize| [tile(row, i); 2];
                        tile::square::<T, false>(
                            a, bytes, b, bytes, depth, from, to_square, bytes, between,
                        );
                    }
                    if last {
                        waiting = Some((to.cast_const().cast(), self.place(panels, row, sink)));
                        turn = 1 - turn;
                    }
                }
            }
        }
        T::release();
        if let Some((sums, place)) = waiting {
            F::store(sums, 0..place.rows, &place, self.how);
        }
    }

    unsafe fn place(&self, panels: [Option<usize>; 2], row: usize, sink: Sink) -> Place {
        let at = panels.map(|panel| {
            panel.map_or((0, 0), |panel| {
                let (.., first, count) = self.matrix.panel(panel);
                (first, count)
            })
        });
        Place {
            to: sink.rows(row),
            rows: (self.m - row * LANES).min(2 * LANES),
            first: at.map(|(first, _)| first),
            count: at.map(|(_, count)| count),
        }
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

    unsafe fn store(square: *const f32, rows: Range<usize>, place: &Place, how: Epilogue) {
        vectors::store(square, rows, place, how);
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
    use super::{Epilogue, Format, GROUP, Gate, Place, ROW_BYTES, Rows, Tile};
    use crate::elementwise::EXP2;
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

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    pub unsafe fn store(square: *const f32, rows: Range<usize>, place: &Place, how: Epilogue) {
        let bias = [0, 1].map(|half| match how.bias {
            Some(bias) => {
                let mask = lanes(place.count[half]);
                _mm512_maskz_loadu_ps(mask, bias.as_ptr().wrapping_add(place.first[half]))
            }
            None => _mm512_setzero_ps(),
        });
        for r in rows {
            let value = |half: usize| {
                let at = (r / 16 * 2 + half) * 256 + r % 16 * 16;
                _mm512_add_ps(_mm512_load_ps(square.add(at)), bias[half])
            };
            let halves = match how.gate {
                Some(gate) => [Some(gated(gate, value(0), value(1))), None],
                None => [Some(value(0)), Some(value(1))],
            };
            for half in 0..2 {
                let (Some(value), column) = (halves[half], place.first[half]) else {
                    continue;
                };
                match place.to {
                    Rows::Plain(to, stride) => {
                        let to = to.wrapping_add(r * stride + column);
                        let mask = lanes(place.count[half]);
                        let value = match how.accumulate {
                            true => _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to)),
                            false => value,
                        };
                        _mm512_mask_storeu_ps(to, mask, value);
                    }
                    Rows::Tiles(to, groups) => {
                        let tile = r / 16 * groups + column / GROUP;
                        let at = tile * size_of::<Tile>() + r % 16 * ROW_BYTES + column % GROUP * 2;
                        let to = to.add(at).cast::<__m256bh>();
                        to.write(_mm512_cvtneps_pbh(value));
                    }
                }
            }
        }
    }

    /// `factor act(x)`, as [`Gate::apply`], `act(x) = x / (1 + e^-z)`: a division takes as long as all the rest, an
    /// approximate reciprocal and one step of Newton's do not.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn gated(gate: Gate, x: __m512, factor: __m512) -> __m512 {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        let z = match gate {
            Gate::Silu => _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)),
            Gate::GeluTanh => {
                let cubic = _mm512_set1_ps(-1.595_769 * LOG2_E * 0.044715);
                let linear = _mm512_set1_ps(-1.595_769 * LOG2_E);
                _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubic, linear))
            }
        };
        // Finite, so that no infinity meets a zero below; the operand order lets NaN through.
        let z = _mm512_min_ps(_mm512_set1_ps(126.0), z);
        let r = _mm512_reduce_ps::<0x09>(z);
        let mut p = _mm512_set1_ps(EXP2[5]);
        for k in (0..5).rev() {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP2[k]));
        }
        let below = _mm512_add_ps(_mm512_scalef_ps(p, z), _mm512_set1_ps(1.0));
        let about = _mm512_rcp14_ps(below);
        let left = _mm512_fnmadd_ps(below, about, _mm512_set1_ps(2.0));
        let inverse = _mm512_mul_ps(about, left);
        _mm512_mul_ps(_mm512_mul_ps(x, inverse), factor)
    }

    fn lanes(count: usize) -> __mmask16 {
        ((1u32 << count) - 1) as __mmask16
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

    unsafe fn store(square: *const f32, rows: Range<usize>, place: &Place, how: Epilogue) {
        let value = |r: usize, half: usize, lane: usize| {
            let value = *square.add((r / 16 * 2 + half) * 256 + r % 16 * 16 + lane);
            value + how.bias.map_or(0.0, |bias| bias[place.first[half] + lane])
        };
        for r in rows {
            let store = |column: usize, value: f32| match place.to {
                Rows::Plain(to, stride) => {
                    let to = &mut *to.add(r * stride + column);
                    *to = if how.accumulate { *to + value } else { value };
                }
                Rows::Tiles(to, groups) => {
                    let tile = r / 16 * groups + column / GROUP;
                    let at = tile * size_of::<Tile>() + r % 16 * ROW_BYTES + column % GROUP * 2;
                    let to = to.add(at).cast::<half::bf16>();
                    to.write(half::bf16::from_f32(value));
                }
            };
            for lane in 0..place.count[0] {
                match how.gate {
                    Some(gate) => {
                        let [gated, factor] = [0, 1].map(|half| value(r, half, lane));
                        store(place.first[0] + lane, gate.apply(gated) * factor);
                    }
                    None => store(place.first[0] + lane, value(r, 0, lane)),
                }
            }
            if how.gate.is_none() {
                (0..place.count[1])
                    .for_each(|lane| store(place.first[1] + lane, value(r, 1, lane)));
            }
        }
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

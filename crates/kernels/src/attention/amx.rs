//! The same block step on bf16 tiles (AMX): logits and outputs are products of 16 x 32 by 32 x 16
//! tiles, and a section of the cache already is a row of right-hand tiles.
//!
//! Rows go in twos of 16 and keys in chunks of up to four tiles of slots, so that four
//! accumulators stay in registers, each operand tile is used twice, and the output tiles are
//! loaded and stored once in 256 keys. Queries and probabilities are rounded to bf16; sums,
//! maxima and outputs stay f32. Int8 codes are exact in bf16: they are expanded to tiles, and
//! their scales multiply logits and probabilities as everywhere.
//!
//! The walk is generic over [`TileUnit`], so that it is tested with an emulated unit on any CPU.

use super::flash::{Scratch, Segment};
use super::layout::PAGE;
use super::micro::{Entries, Format, Int8Key, Int8Value, Logits, Rounded, Running};
use super::sight::{Sight, sight, tile_bias, visible_bits};
use super::{Attention, KvDtype, Tile};
use crate::tile::{TileUnit, square};
use std::f32::consts::LOG2_E;

/// Rows of a step: two tiles.
pub(super) const STEP_ROWS: usize = 32;
/// Tiles of slots whose probabilities are multiplied with their values at once.
pub(super) const CHUNK: usize = 4;

/// Whether tiles fit this storage and head size; other shapes take the vector path.
pub(super) fn fits<T: TileUnit>(args: &Attention) -> bool {
    let held = matches!(args.layout.dtype, KvDtype::Bf16 | KvDtype::Int8);
    T::PRESENT && held && args.layout.head_dim.is_multiple_of(32)
}

/// The tile at `upper` and the one 16 rows below it.
#[inline(always)]
unsafe fn rows_of_tiles(upper: *const u8, stride: usize) -> [*const u8; 2] {
    [upper, upper.add(16 * stride)]
}

/// The tile at `left` and the next one in the same rows.
#[inline(always)]
unsafe fn neighbours(left: *const u8) -> [*const u8; 2] {
    [left, left.add(64)]
}

/// The four tiles of a square of 32 x 32 f32, rows `stride` elements apart.
#[inline(always)]
unsafe fn corners(square: *mut f32, stride: usize) -> [*mut u8; 4] {
    let lower = square.add(16 * stride);
    [square, square.add(16), lower, lower.add(16)].map(|tile| tile.cast())
}

/// Logits of 32 rows and the 64 slots of one K section. `query`: bf16 `[32][dim]`; `s`: f32 rows
/// `stride` elements apart.
#[inline(always)]
unsafe fn key_logits<T: TileUnit>(
    query: *const u16,
    dim: usize,
    key: *const u8,
    s: *mut f32,
    stride: usize,
    mut between: impl FnMut(usize),
) {
    const ROW: usize = PAGE * 4;
    for half in 0..2 {
        square::<T, true>(
            |i| rows_of_tiles(query.cast::<u8>().add(i * 64), dim * 2),
            dim * 2,
            |i| neighbours(key.add(i * 16 * ROW + half * 128)),
            ROW,
            dim / 32,
            None,
            corners(s.add(half * 32), stride),
            stride * 4,
            &mut between,
        );
    }
}

/// A tile that some row sees, as tiles of the unit.
#[derive(Clone, Copy)]
struct Chosen {
    keys: *const u8,
    values: *const u8,
    /// Int8 only.
    value_scale: *const f32,
    /// What its logits need before they become probabilities: its own part.
    logits: Option<Logits>,
}

impl Chosen {
    const NONE: Self = Chosen {
        keys: std::ptr::null(),
        values: std::ptr::null(),
        value_scale: std::ptr::null(),
        logits: None,
    };
}

/// A K or V section as bf16 tiles: itself, or int8 codes expanded into `room`.
#[inline(always)]
unsafe fn as_tiles<L: Entries, F: Format>(
    args: &Attention,
    section: *const u8,
    pairs: usize,
    cols: usize,
    room: *mut f32,
) -> *const u8 {
    if args.layout.dtype == KvDtype::Bf16 {
        return section;
    }
    L::interleave::<F>(section, pairs, cols, room.cast());
    room.cast()
}

unsafe fn scale_of(args: &Attention, section: *const u8) -> *const f32 {
    match args.layout.dtype {
        KvDtype::Int8 => section.add(PAGE * args.layout.padded_dim()).cast(),
        _ => std::ptr::null(),
    }
}

/// What the next tiles hold, asked into L2 a few lines at a time: it lies too far apart for the
/// hardware to foresee.
struct Ahead {
    /// Keys and values of each tile, then the lines of a section.
    sections: [*const u8; 2 * CHUNK],
    lines: usize,
    /// Lines asked for, of all.
    done: usize,
    count: usize,
}

impl Ahead {
    fn of(tiles: &[Tile], offset: usize, args: &Attention) -> Self {
        let lines = args.layout.section_bytes() / 64;
        let mut sections = [std::ptr::null(); 2 * CHUNK];
        for (to, tile) in sections.chunks_exact_mut(2).zip(tiles) {
            to[0] = tile.keys.as_ptr().wrapping_add(offset);
            to[1] = tile.values.as_ptr().wrapping_add(offset);
        }
        Ahead {
            sections,
            lines,
            done: 0,
            count: 2 * tiles.len().min(CHUNK) * lines,
        }
    }

    #[inline(always)]
    unsafe fn advance<L: Entries>(&mut self, lines: usize) {
        let to = (self.done + lines).min(self.count);
        for line in self.done..to {
            L::prefetch(self.sections[line / self.lines].wrapping_add(line % self.lines * 64));
        }
        self.done = to;
    }
}

/// Logits of up to 32 rows and one tile that wait to become probabilities, a few rows whenever the
/// tile unit is busy.
struct Waiting {
    /// What to do to the logits first; `rows` are filled in.
    logits: Option<Logits>,
    softmax: Rounded,
    /// Rows done, of rows used.
    done: usize,
    used: usize,
}

impl Waiting {
    #[inline(always)]
    unsafe fn advance<L: Entries>(&mut self, rows: usize) {
        let rows = (self.done, (self.done + rows).min(self.used));
        if rows.0 == rows.1 {
            return;
        }
        if let Some(logits) = self.logits {
            L::logits(&Logits { rows, ..logits });
        }
        let mut softmax = self.softmax;
        softmax.running.rows = rows;
        L::rounded_softmax(&softmax);
        self.done = rows.1;
    }

    /// Rows for each of `times` calls.
    fn share(&self, times: usize) -> usize {
        (self.used - self.done).div_ceil(times)
    }
}

/// Runs the rows `rows` of a block against the tiles `tiles.0..tiles.1` of a segment.
/// `scratch.query_bf16` holds the packed queries with 32 rows to spare; `scratch.out` likewise.
///
/// The tile unit and the vector units take turns no more than they must: while the unit computes
/// the logits of one tile, those of the tile before become probabilities, and while it adds the
/// values of 32 rows, the next rows' first logits do.
///
/// # Safety
/// As `flash::run`, and [`fits`] holds, and `T` is configured.
pub(super) unsafe fn run_segment<L: Entries, T: TileUnit>(
    args: &Attention,
    kv_head: usize,
    queries: (usize, usize),
    segment: &Segment,
    tiles: (usize, usize),
    rows: (usize, usize),
    scratch: &mut Scratch,
) {
    let dim = args.layout.head_dim;
    let offset = kv_head * args.layout.section_bytes();
    let width = CHUNK * PAGE;
    let mut index = tiles.0;
    while index < tiles.1 {
        // The next tiles that any row sees.
        let mut chunk = [Chosen::NONE; CHUNK];
        let mut count = 0;
        while index < tiles.1 && count < CHUNK {
            let tile = &segment.tiles[index];
            index += 1;
            let partial = match sight(args, segment.part, queries, tile) {
                Sight::Nothing => continue,
                Sight::All => false,
                Sight::Some(..) => true,
            };
            let section = PAGE * dim / 2;
            let [key, value] = [&tile.keys, &tile.values].map(|plane| plane.as_ptr().add(offset));
            let room = scratch.keys.room(CHUNK * section)[count * section..].as_mut_ptr();
            let keys = as_tiles::<L, Int8Key>(args, key, dim / 2, PAGE, room);
            let room = scratch.values.room(CHUNK * section)[count * section..].as_mut_ptr();
            let values = as_tiles::<L, Int8Value>(args, value, PAGE / 2, dim, room);
            let key_scale = scale_of(args, key);
            let bias = &mut scratch.bias[count];
            let bias = tile_bias(args, segment.part, kv_head, queries, tile, rows, bias);
            let mut visible = std::ptr::null();
            if partial {
                let bits = &mut scratch.visible[count];
                visible_bits(args, segment.part, queries, tile, rows, bits);
                visible = bits.as_ptr();
            }
            let plain = key_scale.is_null() && bias.is_null() && !partial;
            chunk[count] = Chosen {
                keys,
                values,
                value_scale: scale_of(args, value),
                logits: (!plain || args.softcap.is_some()).then_some(Logits {
                    s: std::ptr::null_mut(),
                    stride: PAGE,
                    rows: (0, 0),
                    key_scale,
                    softcap: args.softcap.map(|cap| cap * LOG2_E),
                    bias,
                    visible,
                }),
            };
            count += 1;
        }
        if count == 0 {
            return;
        }
        let square = STEP_ROWS * PAGE;
        let logits = scratch.logits.room(2 * square).as_mut_ptr();
        let probabilities = scratch.probabilities.room(STEP_ROWS * width).as_mut_ptr();
        let probabilities = probabilities.cast::<u16>();
        let out = scratch.out.room((rows.1 + STEP_ROWS) * dim).as_mut_ptr();
        let max = scratch.max.room(rows.1).as_mut_ptr();
        let sum = scratch.sum.room(rows.1 * 16).as_mut_ptr();
        let query = scratch.query_bf16.room((rows.1 + STEP_ROWS) * dim / 2);
        let query = query.as_ptr().cast::<u16>();
        // Two turns of each buffer: what waits stands in the other one.
        let buffer = |step: usize| probabilities.add(step % 2 * STEP_ROWS * width);
        let mut turn = 0;
        let mut waiting: Option<Waiting> = None;
        let starts = (rows.0..rows.1).step_by(STEP_ROWS).enumerate();
        let mut before: Option<(usize, usize)> = None;
        let mut ahead = Ahead::of(&segment.tiles[index..tiles.1], offset, args);
        let calls = (rows.1 - rows.0).div_ceil(STEP_ROWS) * count * (dim / 16);
        let lines = ahead.count.div_ceil(calls);
        for (step, first) in starts {
            let used = STEP_ROWS.min(rows.1 - first);
            for (i, chosen) in chunk[..count].iter().enumerate() {
                let s = logits.add(turn * square);
                turn = 1 - turn;
                let share = waiting.as_ref().map_or(0, |w| w.share(dim / 16));
                key_logits::<T>(query.add(first * dim), dim, chosen.keys, s, PAGE, |_| {
                    ahead.advance::<L>(lines);
                    if let Some(waiting) = &mut waiting {
                        waiting.advance::<L>(share);
                    }
                });
                let mut next = Waiting {
                    logits: chosen.logits.map(|logits| Logits {
                        s,
                        bias: logits.bias.wrapping_add(if logits.bias.is_null() {
                            0
                        } else {
                            first
                        }),
                        visible: logits.visible.wrapping_add(match logits.visible.is_null() {
                            true => 0,
                            false => first,
                        }),
                        ..logits
                    }),
                    softmax: Rounded {
                        running: Running {
                            s,
                            stride: PAGE,
                            cols: PAGE,
                            rows: (0, 0),
                            max: max.add(first),
                            sum: sum.add(first * 16),
                            out: out.add(first * dim),
                            out_cols: dim,
                            value_scale: chosen.value_scale,
                        },
                        to: buffer(step).add(i * PAGE),
                        stride: width,
                        before: i * PAGE,
                    },
                    done: 0,
                    used,
                };
                if let Some((step, first)) = before.take() {
                    // The step before has all its probabilities; its rows are not those of `next`.
                    let used = STEP_ROWS.min(rows.1 - first);
                    let share = next.share(dim / 16 * count);
                    let out = out.add(first * dim);
                    add_values::<T>(&chunk[..count], dim, buffer(step), used, out, || {
                        next.advance::<L>(share);
                    });
                }
                waiting = Some(next);
            }
            before = Some((step, first));
        }
        if let (Some(mut waiting), Some((step, first))) = (waiting, before) {
            waiting.advance::<L>(STEP_ROWS);
            let out = out.add(first * dim);
            add_values::<T>(&chunk[..count], dim, buffer(step), waiting.used, out, || ());
        }
    }
}

/// `out += p v` for 32 rows: `p` bf16 `[32][CHUNK * 64]`, of which `used` rows count; `out` `[32][dim]`.
/// `between` runs whenever the tile unit has got its next tiles.
#[inline(always)]
unsafe fn add_values<T: TileUnit>(
    chunk: &[Chosen],
    dim: usize,
    p: *mut u16,
    used: usize,
    out: *mut f32,
    mut between: impl FnMut(),
) {
    let width = CHUNK * PAGE;
    // Rows beyond the used ones may belong to another head: they must add nothing.
    p.add(used * width)
        .write_bytes(0, (STEP_ROWS - used) * width);
    for col in (0..dim).step_by(32) {
        square::<T, true>(
            |i| rows_of_tiles(p.cast::<u8>().add(i * 64), width * 2),
            width * 2,
            |i| neighbours(chunk[i / 2].values.add(i % 2 * 16 * dim * 4 + col * 4)),
            dim * 4,
            2 * chunk.len(),
            Some(corners(out.add(col), dim)),
            corners(out.add(col), dim),
            dim * 4,
            |_| between(),
        );
    }
}

/// Logits of `rows` rows and one tile for the second pass: `s` is `[rows + 31][64]`, base 2 before
/// scales, caps and masks.
///
/// # Safety
/// As [`run_segment`].
pub(super) unsafe fn tile_logits<L: Entries, T: TileUnit>(
    args: &Attention,
    key: *const u8,
    rows: usize,
    query: *const u16,
    room: *mut f32,
    s: *mut f32,
) {
    let dim = args.layout.head_dim;
    let key = as_tiles::<L, Int8Key>(args, key, dim / 2, PAGE, room);
    for first in (0..rows).step_by(STEP_ROWS) {
        key_logits::<T>(
            query.add(first * dim),
            dim,
            key,
            s.add(first * PAGE),
            PAGE,
            |_| (),
        );
    }
}

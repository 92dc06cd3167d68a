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
use super::micro::{Entries, Format, Int8Key, Int8Value, Logits, Running};
use super::sight::{Sight, sight, tile_bias, visible_bits};
use super::{Attention, KvDtype, Tile};
use crate::tile::{TileUnit, square};
use std::f32::consts::LOG2_E;

/// Rows of a step: two tiles.
pub(super) const STEP_ROWS: usize = 32;
/// Tiles of slots whose probabilities are multiplied with their values at once.
const CHUNK: usize = 4;

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
            |_| (),
        );
    }
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

/// Runs the rows `rows` of a block against the tiles `tiles.0..tiles.1` of a segment.
/// `scratch.query_bf16` holds the packed queries with 32 rows to spare; `scratch.out` likewise.
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
    let mut chunk: [Option<(&Tile, bool)>; CHUNK] = [None; CHUNK];
    let mut index = tiles.0;
    while index < tiles.1 {
        // The next tiles that any row sees, and whether they need a mask.
        let mut count = 0;
        while index < tiles.1 && count < CHUNK {
            let tile = &segment.tiles[index];
            index += 1;
            match sight(args, segment.part, queries, tile) {
                Sight::Nothing => continue,
                Sight::All => chunk[count] = Some((tile, false)),
                Sight::Some(..) => chunk[count] = Some((tile, true)),
            }
            count += 1;
        }
        if count == 0 {
            return;
        }
        // Per tile of the chunk: keys, values, their scales, the visible slots of each row.
        let mut keys = [std::ptr::null(); CHUNK];
        let mut values = [std::ptr::null(); CHUNK];
        let mut value_scales = [0f32; CHUNK * PAGE];
        for (i, (tile, _)) in chunk[..count].iter().flatten().enumerate() {
            let section = PAGE * dim / 2;
            let room = scratch.keys.room(CHUNK * section)[i * section..].as_mut_ptr();
            keys[i] =
                as_tiles::<L, Int8Key>(args, tile.keys.as_ptr().add(offset), dim / 2, PAGE, room);
            let room = scratch.values.room(CHUNK * section)[i * section..].as_mut_ptr();
            let value = tile.values.as_ptr().add(offset);
            values[i] = as_tiles::<L, Int8Value>(args, value, PAGE / 2, dim, room);
            let scales = scale_of(args, value);
            if !scales.is_null() {
                std::ptr::copy_nonoverlapping(scales, value_scales[i * PAGE..].as_mut_ptr(), PAGE);
            }
        }
        let width = CHUNK * PAGE;
        let s = scratch.logits.room(STEP_ROWS * width).as_mut_ptr();
        let p = scratch
            .probabilities
            .room(STEP_ROWS * width / 2)
            .as_mut_ptr()
            .cast::<u16>();
        for first in (rows.0..rows.1).step_by(STEP_ROWS) {
            let used = STEP_ROWS.min(rows.1 - first);
            let query = scratch
                .query_bf16
                .room((first + STEP_ROWS) * dim / 2)
                .as_ptr();
            let query = query.cast::<u16>().add(first * dim);
            for (i, (tile, partial)) in chunk[..count].iter().flatten().enumerate() {
                key_logits::<T>(query, dim, keys[i], s.add(i * PAGE), width);
                let key_scale = scale_of(args, tile.keys.as_ptr().add(offset));
                let step = (first, first + used);
                let bias = &mut scratch.bias;
                let bias = tile_bias(args, segment.part, kv_head, queries, tile, step, bias);
                if *partial || !key_scale.is_null() || args.softcap.is_some() || !bias.is_null() {
                    let visible = if *partial {
                        let bits = &mut scratch.visible;
                        visible_bits(args, segment.part, queries, tile, rows, bits);
                        scratch.visible.as_ptr().add(first)
                    } else {
                        std::ptr::null()
                    };
                    L::logits(&Logits {
                        s: s.add(i * PAGE),
                        stride: width,
                        rows: (0, used),
                        key_scale,
                        softcap: args.softcap.map(|cap| cap * LOG2_E),
                        bias: match bias.is_null() {
                            true => bias,
                            false => bias.add(first),
                        },
                        visible,
                    });
                }
            }
            let out = scratch
                .out
                .room((first + STEP_ROWS) * dim)
                .as_mut_ptr()
                .add(first * dim);
            L::softmax(&Running {
                s,
                stride: width,
                cols: count * PAGE,
                rows: (0, used),
                max: scratch.max.room(rows.1).as_mut_ptr().add(first),
                sum: scratch.sum.room(rows.1 * 16).as_mut_ptr().add(first * 16),
                out,
                out_cols: dim,
                value_scale: match args.layout.dtype {
                    KvDtype::Int8 => value_scales.as_ptr(),
                    _ => std::ptr::null(),
                },
                bf16: p,
            });
            // Rows beyond the used ones may belong to another head: they must add nothing.
            p.add(used * width)
                .write_bytes(0, (STEP_ROWS - used) * width);
            for col in (0..dim).step_by(32) {
                square::<T, true>(
                    |i| rows_of_tiles(p.cast::<u8>().add(i * 64), width * 2),
                    width * 2,
                    |i| neighbours(values[i / 2].add(i % 2 * 16 * dim * 4 + col * 4)),
                    dim * 4,
                    2 * count,
                    Some(corners(out.add(col), dim)),
                    corners(out.add(col), dim),
                    dim * 4,
                    |_| (),
                );
            }
        }
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
        key_logits::<T>(query.add(first * dim), dim, key, s.add(first * PAGE), PAGE);
    }
}

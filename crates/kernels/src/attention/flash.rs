//! One block of query rows of one kv head against a run of key tiles, with a running softmax.
//!
//! Rows of a block are (head of the group, query) pairs, head-major, so that every key and value
//! read serves all of them, and a list of one query head serves a contiguous share of them.

use super::amx;
#[cfg(target_arch = "x86_64")]
use super::codes::{self, CodeProduct};
use super::layout::{PAGE, bf16_bits};
use super::micro::{Bf16, Entries, F16, F32, Format, Int8Key, Int8Value, Logits, Product, Running};
use super::sight::{Sight, sight, tile_bias, visible_bits};
#[cfg(target_arch = "x86_64")]
use super::words;
use super::{Attention, KvDtype, Tile, Tiles};
use crate::tile::TileUnit;
#[cfg(target_arch = "x86_64")]
use crate::words::{Bf16Bits, CHUNK, F16Bits, WordProduct, quantise_row};
use std::f32::consts::LOG2_E;

/// From this many rows on, a tile is expanded to f32 once instead of by each share of rows.
const EXPAND_ROWS: usize = 13;

/// A share of the work: queries `queries.0..queries.1` of one kv head's group against the tiles
/// `tiles.0..tiles.1` of the concatenation of all lists that kv head reads (see [`segments`]).
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub kv_head: usize,
    pub queries: (usize, usize),
    pub tiles: (usize, usize),
}

impl Block {
    pub(super) fn rows(&self, args: &Attention) -> usize {
        (self.queries.1 - self.queries.0) * args.group()
    }
}

/// A list of tiles of one part: for the whole group or for one head of it.
pub(super) struct Segment<'a> {
    pub part: usize,
    pub head_of_group: Option<usize>,
    pub tiles: &'a [Tile<'a>],
}

/// All lists a kv head reads, in a fixed order.
pub(super) fn segments<'a>(
    args: &Attention<'a>,
    kv_head: usize,
) -> impl Iterator<Item = Segment<'a>> {
    let group = args.group();
    args.parts.iter().enumerate().flat_map(move |(part, p)| {
        let lists = if matches!(p.tiles, Tiles::PerQueryHead(_)) {
            group
        } else {
            1
        };
        (0..lists).map(move |g| match p.tiles {
            Tiles::Shared(tiles) => Segment {
                part,
                head_of_group: None,
                tiles,
            },
            Tiles::PerKvHead(l) => Segment {
                part,
                head_of_group: None,
                tiles: &l[kv_head],
            },
            Tiles::PerQueryHead(l) => Segment {
                part,
                head_of_group: Some(g),
                tiles: &l[kv_head * group + g],
            },
        })
    })
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// A growing buffer of f32 on cache-line boundaries; contents are kept only between growths.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    pub(super) fn room(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0.0; 16]));
        }
        // SAFETY: a `Line` is sixteen f32 without padding.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// What a thread keeps between calls.
#[derive(Default)]
pub(super) struct Scratch {
    pub query: Buffer,
    /// Two bf16 in the place of each f32.
    pub query_bf16: Buffer,
    pub logits: Buffer,
    /// Two bf16 in the place of each f32.
    pub probabilities: Buffer,
    pub keys: Buffer,
    pub values: Buffer,
    pub max: Buffer,
    pub sum: Buffer,
    pub out: Buffer,
    /// Of each row, for as many tiles as are worked on at a time.
    pub visible: [Vec<u64>; amx::CHUNK],
    /// ALiBi likewise; see [`tile_bias`].
    pub bias: [Vec<[f32; 2]>; amx::CHUNK],
    /// Queries as 16-bit integers, four bytes in the place of each f32; see `codes`.
    query_codes: Buffer,
    query_factor: Buffer,
    query_start: Vec<[i32; 2]>,
    /// Probabilities likewise.
    probability_codes: Buffer,
    probability_factor: Buffer,
    /// Slot scales of a tile of words, `[chunks, 64]`; see `words`.
    slot_scale: Buffer,
}

/// The outcome of a block: not yet divided by the sums.
pub(super) struct Outcome<'s> {
    /// `[rows, padded_dim]`.
    pub out: &'s [f32],
    /// `[rows]`, base 2; -infinity where no key was seen.
    pub max: &'s [f32],
    /// `[rows, 16]`: the row's sum is that of its 16 entries.
    pub sum: &'s [f32],
}

/// Logits of single queries, wanted for column sums: called with (part, head of the group, tile
/// index in its list, the 64 logits in base 2).
pub(super) type Tap<'t> = &'t dyn Fn(usize, usize, usize, &[f32]);

/// Runs `block`.
///
/// # Safety
/// `args` passed its check, the block lies inside, and the CPU has `L`'s instruction set.
pub(super) unsafe fn run<'s, L: Entries, T: TileUnit>(
    args: &Attention,
    block: &Block,
    scratch: &'s mut Scratch,
    tap: Option<Tap>,
) -> Outcome<'s> {
    let rows = block.rows(args);
    let (dim, width) = (args.layout.head_dim, args.layout.padded_dim());
    scratch.max.room(rows).fill(f32::NEG_INFINITY);
    scratch.sum.room(rows * 16).fill(0.0);
    let tiled = rows >= EXPAND_ROWS && !args.by_row() && amx::fits::<T>(args);
    scratch.out.room((rows + amx::STEP_ROWS) * width)[..rows * width].fill(0.0);
    scratch.logits.room(rows * PAGE);
    scratch.query.room(rows * dim);
    let queries = block.queries.1 - block.queries.0;
    let mut packed = None;
    let mut passed = 0;
    for segment in segments(args, block.kv_head) {
        let end = passed + segment.tiles.len();
        let from = block.tiles.0.clamp(passed, end) - passed;
        let to = block.tiles.1.clamp(passed, end) - passed;
        passed = end;
        if from == to {
            continue;
        }
        let part = &args.parts[segment.part];
        if packed != Some(part.query.as_ptr()) {
            pack_queries::<L>(args, block, segment.part, scratch.query.room(rows * dim));
            if tiled {
                round_queries(scratch, rows, dim);
            } else if by_codes::<L>(args) {
                quantise_queries(scratch, rows, dim, width);
            } else if by_words::<L>(args, rows) {
                words_of_queries(scratch, rows, dim);
            }
            packed = Some(part.query.as_ptr());
        }
        let rows = match segment.head_of_group {
            None => (0, rows),
            Some(g) => (g * queries, (g + 1) * queries),
        };
        if tiled {
            let (head, queries, tiles) = (block.kv_head, block.queries, (from, to));
            amx::run_segment::<L, T>(args, head, queries, &segment, tiles, rows, scratch);
            continue;
        }
        for index in from..to {
            let next = segment.tiles[..to].get(index + 1);
            let tap = tap.filter(|_| part.column_sums);
            let step = Step {
                args,
                block,
                segment: &segment,
                index,
                next,
                rows,
            };
            match args.layout.dtype {
                KvDtype::F32 => step.run::<L, F32, F32>(scratch, tap),
                KvDtype::F16 => step.run::<L, F16, F16>(scratch, tap),
                KvDtype::Bf16 => step.run::<L, Bf16, Bf16>(scratch, tap),
                KvDtype::Int8 => step.run::<L, Int8Key, Int8Value>(scratch, tap),
            }
        }
    }
    Outcome {
        out: scratch.out.room(rows * width),
        max: scratch.max.room(rows),
        sum: scratch.sum.room(rows * 16),
    }
}

/// The factor folded into packed queries: logits come out in base 2, or divided by the softcap.
pub(super) fn query_factor(args: &Attention) -> f32 {
    match args.softcap {
        None => args.scale * LOG2_E,
        Some(cap) => args.scale / cap,
    }
}

/// Copies the block's queries of one part to `to`: `[head of group][query][head_dim]`, scaled.
unsafe fn pack_queries<L: Entries>(args: &Attention, block: &Block, part: usize, to: &mut [f32]) {
    let (dim, group) = (args.layout.head_dim, args.group());
    let query = args.parts[part].query;
    let queries = block.queries.1 - block.queries.0;
    for g in 0..group {
        for t in 0..queries {
            let head = block.kv_head * group + g;
            let from = &query[((block.queries.0 + t) * args.num_heads + head) * dim..][..dim];
            let to = &mut to[(g * queries + t) * dim..][..dim];
            L::scale(from.as_ptr(), query_factor(args), dim, to.as_mut_ptr());
        }
    }
}

/// The packed queries in bf16, with zeros for the rows that a last step reads beyond them.
fn round_queries(scratch: &mut Scratch, rows: usize, dim: usize) {
    let from = scratch.query.room(rows * dim);
    let to = scratch.query_bf16.room((rows + amx::STEP_ROWS) * dim / 2);
    for (to, pair) in to.iter_mut().zip(from.chunks_exact(2)) {
        let bits = u32::from(bf16_bits(pair[0])) | u32::from(bf16_bits(pair[1])) << 16;
        *to = f32::from_bits(bits);
    }
    to[rows * dim / 2..].fill(0.0);
}

/// One tile against some rows of a block.
struct Step<'a> {
    args: &'a Attention<'a>,
    block: &'a Block,
    segment: &'a Segment<'a>,
    index: usize,
    next: Option<&'a Tile<'a>>,
    rows: (usize, usize),
}

impl Step<'_> {
    #[inline(always)]
    unsafe fn run<L: Entries, K: Format, V: Format>(
        &self,
        scratch: &mut Scratch,
        tap: Option<Tap>,
    ) {
        let Step {
            args,
            block,
            segment,
            rows,
            ..
        } = *self;
        let tile = &segment.tiles[self.index];
        let (start, end) = match sight(args, segment.part, block.queries, tile) {
            Sight::Nothing => return,
            Sight::All => (0, PAGE),
            Sight::Some(start, end) => {
                let bits = &mut scratch.visible[0];
                visible_bits(args, segment.part, block.queries, tile, rows, bits);
                (start, end)
            }
        };
        let partial = matches!(
            sight(args, segment.part, block.queries, tile),
            Sight::Some(..)
        );
        let layout = &args.layout;
        let (dim, width) = (layout.head_dim, layout.padded_dim());
        let offset = block.kv_head * layout.section_bytes();
        let key = tile.keys.as_ptr().add(offset);
        let value = tile.values.as_ptr().add(offset);
        let scales_at = PAGE * width;
        let scale_of = |section: *const u8| match layout.dtype {
            KvDtype::Int8 => section.add(scales_at).cast::<f32>(),
            _ => std::ptr::null(),
        };
        let count = rows.1 - rows.0;
        let s = scratch.logits.room(rows.1 * PAGE).as_mut_ptr();
        let by_words = by_words::<L>(args, count);

        let mut product = Product {
            a: scratch.query.room(rows.1 * dim).as_ptr().add(rows.0 * dim),
            a_stride: dim,
            rows: count,
            b: key,
            b_cols: PAGE,
            pairs: (0, dim / 2),
            cols: (start / 16 * 16, end.next_multiple_of(16)),
            c: s.add(rows.0 * PAGE),
            c_stride: PAGE,
            add: false,
            ahead: self.next.map(|next| {
                // Where the next tile's valid slots are.
                let columns = isize::from(next.lo) / 16 * 16 - start as isize / 16 * 16;
                let section = next.keys.as_ptr().add(offset);
                section.wrapping_offset(columns * K::PAIR as isize)
            }),
        };
        let by_codes = by_codes::<L>(args);
        let expand = count >= EXPAND_ROWS && layout.dtype != KvDtype::F32;
        if by_codes {
            key_codes(&product, rows.0, width, scratch);
        } else if by_words {
            key_words(
                &product,
                (rows.0, rows.1, block.rows(args)),
                layout.dtype,
                scratch,
            );
        } else if expand {
            let keys = scratch.keys.room(dim * PAGE).as_mut_ptr();
            L::expand::<K>(key, product.pairs, PAGE, keys);
            product.b = keys.cast();
            product.ahead = None;
            L::product::<F32>(&product);
        } else {
            L::product::<K>(&product);
        }

        let key_scale = scale_of(key);
        let bias = tile_bias(
            args,
            segment.part,
            block.kv_head,
            block.queries,
            tile,
            rows,
            &mut scratch.bias[0],
        );
        if partial || !key_scale.is_null() || args.softcap.is_some() || !bias.is_null() {
            let softcap = args.softcap.map(|cap| cap * LOG2_E);
            let visible = if partial {
                scratch.visible[0].as_ptr()
            } else {
                std::ptr::null()
            };
            L::logits(&Logits {
                s,
                stride: PAGE,
                rows,
                key_scale,
                softcap,
                bias,
                visible,
            });
        }
        if let Some(tap) = tap {
            for row in rows.0..rows.1 {
                let logits = std::slice::from_raw_parts(s.add(row * PAGE), PAGE);
                tap(segment.part, row, self.index, logits);
            }
        }
        let out = scratch.out.room(rows.1 * width).as_mut_ptr();
        let running = Running {
            s,
            stride: PAGE,
            cols: PAGE,
            rows,
            max: scratch.max.room(rows.1).as_mut_ptr(),
            sum: scratch.sum.room(rows.1 * 16).as_mut_ptr(),
            out,
            out_cols: width,
            value_scale: scale_of(value),
        };
        let pairs = (start / 2, end.div_ceil(2));
        if by_words {
            value_words(&running, value, pairs, layout.dtype, scratch);
            return;
        }
        L::softmax(&running);

        let mut product = Product {
            a: s.add(rows.0 * PAGE),
            a_stride: PAGE,
            rows: count,
            b: value,
            b_cols: width,
            pairs,
            cols: (0, width),
            c: out.add(rows.0 * width),
            c_stride: width,
            add: true,
            ahead: self.next.map(|next| {
                let rows = isize::from(next.lo) / 2 - pairs.0 as isize;
                let section = next.values.as_ptr().add(offset);
                section.wrapping_offset(rows * (width * V::PAIR) as isize)
            }),
        };
        if by_codes {
            value_codes(&product, scratch);
        } else if expand {
            // The keys' room again: it is in L1.
            let values = scratch.keys.room(PAGE * width).as_mut_ptr();
            L::expand::<V>(value, pairs, width, values);
            product.b = values.cast();
            product.ahead = None;
            L::product::<F32>(&product);
        } else {
            L::product::<V>(&product);
        }
    }
}

/// Whether products with this storage are done in integers.
fn by_codes<L: Entries>(args: &Attention) -> bool {
    #[cfg(target_arch = "x86_64")]
    let fits = L::CODES && args.layout.head_dim <= codes::MOST_DIMS;
    #[cfg(not(target_arch = "x86_64"))]
    let fits = false;
    fits && args.layout.dtype == KvDtype::Int8
}

#[cfg(target_arch = "x86_64")]
unsafe fn quantise_queries(scratch: &mut Scratch, rows: usize, dim: usize, width: usize) {
    let from = scratch.query.room(rows * dim);
    let to = scratch
        .query_codes
        .room(rows * width / 2)
        .as_mut_ptr()
        .cast();
    let factor = scratch.query_factor.room(rows);
    let start = &mut scratch.query_start;
    start.resize(start.len().max(rows), [0; 2]);
    codes::quantise_queries(from, dim, width, to, factor, start);
}

/// Logits from the quantised queries, whose rows begin with `first`; the rest is as `product` says.
#[cfg(target_arch = "x86_64")]
unsafe fn key_codes(product: &Product, first: usize, width: usize, scratch: &mut Scratch) {
    let end = first + product.rows;
    codes::key_product(&CodeProduct {
        a: scratch
            .query_codes
            .room(end * width / 2)
            .as_ptr()
            .cast::<u8>()
            .add(first * 2 * width),
        half: width,
        rows: product.rows,
        b: product.b,
        b_cols: product.b_cols,
        quads: (0, product.pairs.1.div_ceil(2)),
        cols: product.cols,
        factor: scratch.query_factor.room(end).as_ptr().add(first),
        start: scratch.query_start.as_ptr().add(first),
        c: product.c,
        c_stride: product.c_stride,
        add: false,
        ahead: product.ahead,
    });
}

/// Output from probabilities, which are quantised here; the rest is as `product` says.
#[cfg(target_arch = "x86_64")]
unsafe fn value_codes(product: &Product, scratch: &mut Scratch) {
    let rows = product.rows;
    let a = scratch
        .probability_codes
        .room(rows * PAGE / 2)
        .as_mut_ptr()
        .cast();
    let factor = scratch.probability_factor.room(rows).as_mut_ptr();
    codes::quantise_probabilities(product.a, rows, a, factor);
    codes::value_product(&CodeProduct {
        a,
        half: PAGE,
        rows,
        b: product.b,
        b_cols: product.b_cols,
        quads: (product.pairs.0 / 2, product.pairs.1.div_ceil(2)),
        cols: product.cols,
        factor,
        start: std::ptr::null(),
        c: product.c,
        c_stride: product.c_stride,
        add: true,
        ahead: product.ahead,
    });
}

/// Whether this storage and number of rows go by words: 16-bit integers, on CPUs with their dot
/// products.
fn by_words<L: Entries>(args: &Attention, rows: usize) -> bool {
    let half = matches!(args.layout.dtype, KvDtype::F16 | KvDtype::Bf16);
    cfg!(target_arch = "x86_64") && L::CODES && half && rows >= EXPAND_ROWS && !args.by_row()
}

#[cfg(target_arch = "x86_64")]
unsafe fn words_of_queries(scratch: &mut Scratch, rows: usize, dim: usize) {
    let from = scratch.query.room(rows * dim);
    let to = scratch.query_codes.room(rows * dim / 2);
    let to: *mut i16 = to.as_mut_ptr().cast();
    // [chunks, rows]
    let factor = scratch.query_factor.room(dim.div_ceil(CHUNK) * rows);
    for (row, from) in from.chunks_exact(dim).enumerate() {
        let factor = factor.as_mut_ptr().add(row);
        quantise_row(from, to.add(row * dim), dim, factor, rows);
    }
}

/// Logits from the words of a block's queries, `rows.0..rows.1` of `rows.2`; the rest is as
/// `product` says.
#[cfg(target_arch = "x86_64")]
unsafe fn key_words(
    product: &Product,
    rows: (usize, usize, usize),
    dtype: KvDtype,
    scratch: &mut Scratch,
) {
    let (pairs, dim) = (product.pairs.1, 2 * product.pairs.1);
    let chunks = dim.div_ceil(CHUNK);
    let keys = scratch.keys.room(dim * PAGE / 2).as_mut_ptr().cast();
    let scale = scratch.slot_scale.room(chunks * PAGE).as_mut_ptr();
    match dtype {
        KvDtype::F16 => words::expand_keys::<F16Bits>(product.b, pairs, keys, scale),
        _ => words::expand_keys::<Bf16Bits>(product.b, pairs, keys, scale),
    }
    let codes = scratch.query_codes.room(rows.2 * dim / 2).as_ptr();
    let factor = scratch.query_factor.room(chunks * rows.2).as_ptr();
    crate::words::product(&WordProduct {
        a: codes.cast::<i16>().add(rows.0 * dim),
        a_stride: dim,
        rows: rows.1 - rows.0,
        b: keys,
        b_cols: PAGE,
        pairs: product.pairs,
        cols: product.cols,
        factor: factor.add(rows.0),
        factor_stride: rows.2,
        scale,
        scale_stride: PAGE,
        c: product.c,
        c_stride: product.c_stride,
        add: false,
    });
}

/// The softmax of a tile, and its probabilities times its values.
#[cfg(target_arch = "x86_64")]
unsafe fn value_words(
    running: &Running,
    section: *const u8,
    pairs: (usize, usize),
    dtype: KvDtype,
    scratch: &mut Scratch,
) {
    let (rows, width) = (running.rows.1 - running.rows.0, running.out_cols);
    // The keys' room again: it is in L1.
    let values = scratch.keys.room(PAGE * width / 2).as_mut_ptr().cast();
    let scale = scratch.slot_scale.room(PAGE).as_mut_ptr();
    match dtype {
        KvDtype::F16 => words::expand_values::<F16Bits>(section, pairs, width, values, scale),
        _ => words::expand_values::<Bf16Bits>(section, pairs, width, values, scale),
    }
    let running = Running {
        value_scale: scale,
        ..*running
    };
    let codes = scratch.probability_codes.room(rows * PAGE / 2);
    let codes: *mut i16 = codes.as_mut_ptr().cast();
    let factor = scratch.probability_factor.room(rows).as_mut_ptr();
    words::softmax(&running, codes, factor);
    crate::words::product(&WordProduct {
        a: codes,
        a_stride: PAGE,
        rows,
        b: values,
        b_cols: width,
        pairs,
        cols: (0, width),
        factor,
        factor_stride: 0,
        scale: std::ptr::null(),
        scale_stride: 0,
        c: running.out.add(running.rows.0 * width),
        c_stride: width,
        add: true,
    });
}

// `by_codes` and `by_words` are false elsewhere.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn words_of_queries(_: &mut Scratch, _: usize, _: usize) {}
#[cfg(not(target_arch = "x86_64"))]
unsafe fn key_words(_: &Product, _: (usize, usize, usize), _: KvDtype, _: &mut Scratch) {}
#[cfg(not(target_arch = "x86_64"))]
unsafe fn value_words(_: &Running, _: *const u8, _: (usize, usize), _: KvDtype, _: &mut Scratch) {}
#[cfg(not(target_arch = "x86_64"))]
unsafe fn quantise_queries(_: &mut Scratch, _: usize, _: usize, _: usize) {}
#[cfg(not(target_arch = "x86_64"))]
unsafe fn key_codes(_: &Product, _: usize, _: usize, _: &mut Scratch) {}
#[cfg(not(target_arch = "x86_64"))]
unsafe fn value_codes(_: &Product, _: &mut Scratch) {}

/// Adds the column sums of the tiles `tiles` of a shared part for one kv head's group, from the
/// final log-sum-exps. `sums`: one run of `tiles * 64` columns per head of the group.
/// `lse`: `[queries, num_heads]`, base 2.
///
/// # Safety
/// As [`run`]; `queries_per_block` is above 0.
pub(super) unsafe fn column_sums<L: Entries, T: TileUnit>(
    args: &Attention,
    part: usize,
    kv_head: usize,
    tiles: (usize, usize),
    lse: &[f32],
    queries_per_block: usize,
    scratch: &mut Scratch,
    sums: &mut dyn FnMut(usize) -> *mut f32,
) {
    let Tiles::Shared(list) = args.parts[part].tiles else {
        return;
    };
    let (layout, group) = (&args.layout, args.group());
    let (dim, width) = (layout.head_dim, layout.padded_dim());
    let mut from = 0;
    while from < args.queries {
        let queries = (from, (from + queries_per_block).min(args.queries));
        from = queries.1;
        let block = Block {
            kv_head,
            queries,
            tiles,
        };
        let rows = block.rows(args);
        let count = queries.1 - queries.0;
        pack_queries::<L>(args, &block, part, scratch.query.room(rows * dim));
        // As in the first pass, so that the logits are the same.
        let tiled = rows >= EXPAND_ROWS && !args.by_row() && amx::fits::<T>(args);
        let worded = !tiled && by_words::<L>(args, rows);
        if tiled {
            round_queries(scratch, rows, dim);
        } else if worded {
            words_of_queries(scratch, rows, dim);
        }
        let query = scratch.query.room(rows * dim).as_ptr();
        let query_bf16 = scratch.query_bf16.room(0).as_ptr().cast();
        let row_lse = scratch.max.room(rows);
        for g in 0..group {
            for t in 0..count {
                let x = lse[(queries.0 + t) * args.num_heads + kv_head * group + g];
                row_lse[g * count + t] = if x == f32::NEG_INFINITY { 0.0 } else { x };
            }
        }
        let row_lse = row_lse.as_ptr();
        let s = scratch
            .logits
            .room((rows + amx::STEP_ROWS) * PAGE)
            .as_mut_ptr();
        for index in tiles.0..tiles.1 {
            let tile = &list[index];
            let partial = match sight(args, part, queries, tile) {
                Sight::Nothing => continue,
                Sight::All => false,
                Sight::Some(..) => true,
            };
            let key = tile.keys.as_ptr().add(kv_head * layout.section_bytes());
            let product = Product {
                a: query,
                a_stride: dim,
                rows,
                b: key,
                b_cols: PAGE,
                pairs: (0, dim / 2),
                cols: (0, PAGE),
                c: s,
                c_stride: PAGE,
                add: false,
                ahead: None,
            };
            let room = scratch.keys.room(dim * PAGE).as_mut_ptr();
            match layout.dtype {
                _ if tiled => amx::tile_logits::<L, T>(args, key, rows, query_bf16, room, s),
                _ if worded => key_words(&product, (0, rows, rows), layout.dtype, scratch),
                KvDtype::F32 => L::product::<F32>(&product),
                KvDtype::F16 => expanded::<L, F16>(product, &mut scratch.keys),
                KvDtype::Bf16 => expanded::<L, Bf16>(product, &mut scratch.keys),
                KvDtype::Int8 => expanded::<L, Int8Key>(product, &mut scratch.keys),
            }
            let key_scale = match layout.dtype {
                KvDtype::Int8 => key.add(PAGE * width).cast::<f32>(),
                _ => std::ptr::null(),
            };
            let bias = tile_bias(
                args,
                part,
                kv_head,
                queries,
                tile,
                (0, rows),
                &mut scratch.bias[0],
            );
            if partial || !key_scale.is_null() || args.softcap.is_some() || !bias.is_null() {
                let rows = (0, rows);
                let visible = if partial {
                    visible_bits(args, part, queries, tile, rows, &mut scratch.visible[0]);
                    scratch.visible[0].as_ptr()
                } else {
                    std::ptr::null()
                };
                let softcap = args.softcap.map(|cap| cap * LOG2_E);
                L::logits(&Logits {
                    s,
                    stride: PAGE,
                    rows,
                    key_scale,
                    softcap,
                    bias,
                    visible,
                });
            }
            for g in 0..group {
                let to = sums(g).add(index * PAGE);
                L::column_sums(s, (g * count, (g + 1) * count), row_lse, to);
            }
        }
    }
}

/// `product` with `b` expanded to f32 first.
unsafe fn expanded<L: Entries, F: Format>(mut product: Product, keys: &mut Buffer) {
    let keys = keys.room(2 * product.pairs.1 * PAGE).as_mut_ptr();
    L::expand::<F>(product.b, product.pairs, PAGE, keys);
    product.b = keys.cast();
    L::product::<F32>(&product);
}

//! What a block of query rows sees of a tile: none, all or some of its slots, and the terms that ALiBi
//! adds to their logits.

use super::layout::PAGE;
use super::{Attention, Tile};

/// How a block of queries sees a tile.
pub(super) enum Sight {
    Nothing,
    All,
    /// Some row sees only part of the slots `start..end` that any row sees.
    Some(usize, usize),
}

pub(super) fn sight(args: &Attention, part: usize, queries: (usize, usize), tile: &Tile) -> Sight {
    let mask = args.parts[part].mask;
    let first = mask.span(tile, args.query_start + queries.0 as u64);
    let last = mask.span(tile, args.query_start + queries.1 as u64 - 1);
    if first.0 >= last.1 {
        Sight::Nothing
    } else if last.0 == 0 && first.1 == PAGE as u64 {
        Sight::All
    } else {
        Sight::Some(first.0 as usize, last.1 as usize)
    }
}

/// The visible slots of each row in `rows` as bits; rows repeat every `queries`.
pub(super) fn visible_bits(
    args: &Attention,
    part: usize,
    queries: (usize, usize),
    tile: &Tile,
    rows: (usize, usize),
    to: &mut Vec<u64>,
) {
    let mask = args.parts[part].mask;
    let count = queries.1 - queries.0;
    to.resize(to.len().max(rows.1), 0);
    for row in rows.0..rows.1 {
        to[row] = if row >= rows.0 + count {
            to[row - count]
        } else {
            let t = queries.0 + row % count;
            let (start, end) = mask.span(tile, args.query_start + t as u64);
            let below = |slot: u64| {
                if slot >= 64 {
                    u64::MAX
                } else {
                    (1 << slot) - 1
                }
            };
            below(end) & !below(start)
        };
    }
}

/// What ALiBi adds to the rows `rows.0..rows.1` of a block against a tile: the term of slot 0 and the step
/// from slot to slot, base 2. Null for parts without. Rows are (head of the group, query) pairs.
pub(super) fn tile_bias(
    args: &Attention,
    part: usize,
    kv_head: usize,
    queries: (usize, usize),
    tile: &Tile,
    rows: (usize, usize),
    to: &mut Vec<[f32; 2]>,
) -> *const [f32; 2] {
    let Some(alibi) = &args.parts[part].alibi else {
        return std::ptr::null();
    };
    let count = queries.1 - queries.0;
    to.resize(to.len().max(rows.1), [0.0; 2]);
    for row in rows.0..rows.1 {
        let head = kv_head * args.group() + row / count;
        let query = args.query_start + (queries.0 + row % count) as u64;
        let slope = f64::from(alibi.slopes[head]) * std::f64::consts::LOG2_E;
        let (first, step) = match alibi.keys_at {
            None => (tile.first, slope),
            Some(place) => (place, 0.0),
        };
        // The distance is exact in f64; only its product with the slope is rounded.
        let distance = first as f64 - alibi.query.of(query) as f64;
        to[row] = [(slope * distance) as f32, step as f32];
    }
    to.as_ptr()
}

//! One layer's attention over paged stores: rotate, append, ask the policy, run the kernel.
//!
//! Prefill and decode are the same loop with more or fewer queries; sequences of a batch are
//! rows that share kernel launches and nothing else.

use crate::context::{Angle, ColumnSums, ContextPolicy, Keys, LayerAt, Plan, Queries, Window};
use crate::kv::{KeyForm, KvStore, Rows};
use longspan_kernels::attention::{self, Alibi, Attention, Place, Tile, Tiles};
use longspan_kernels::elementwise::split_rows;
use longspan_kernels::measure::{Stage, stage};
use longspan_kernels::pool::SharedMut;
use longspan_nn::position::{Frequencies, RopeLayout, RopeTable, rotate};
use std::cell::RefCell;
use std::io;

/// What attention needs to know of one layer.
#[derive(Clone, Copy)]
pub struct LayerShape<'a> {
    /// Layer index.
    pub layer: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Soft cap of the logits.
    pub softcap: Option<f32>,
    /// The layer sees only so many tokens by construction; policies leave it alone.
    pub sliding_window: Option<usize>,
    /// ALiBi's slope of each query head, for models without rotation.
    pub alibi: Option<&'a [f32]>,
}

impl<'a> LayerShape<'a> {
    /// ALiBi of a part. Distances are those that rotation would show: raw keys are at angle zero.
    fn alibi(&self, angle: Angle, form: KeyForm) -> Option<Alibi<'a>> {
        Some(Alibi {
            slopes: self.alibi?,
            query: match angle {
                Angle::Own => Place::Own,
                Angle::AtMost(limit) => Place::AtMost(limit),
                Angle::Fixed(position) => Place::At(position),
            },
            keys_at: (form == KeyForm::Raw).then_some(0),
        })
    }
}

/// One sequence's share of a call.
pub struct Row<'a> {
    /// Keys and values so far.
    pub store: &'a mut KvStore,
    /// What the sequence sees.
    pub policy: &'a mut dyn ContextPolicy,
    /// The layer's rotary frequencies; None = no position encoding.
    pub rope: Option<&'a Frequencies>,
    /// cos and sin of the call's positions, [count, rotary_dim / 2] each; empty without rope. Where keys turn
    /// otherwise than queries, those of the keys follow: [2, count, rotary_dim / 2].
    pub tables: (&'a [f32], &'a [f32]),
    /// Tokens of this call.
    pub count: usize,
}

impl<'a> Row<'a> {
    /// cos and sin of the queries, then of the keys.
    fn tables(&self) -> [(&'a [f32], &'a [f32]); 2] {
        let (cos, sin) = self.tables;
        if self.rope.is_none_or(Frequencies::keys_are_as_queries) {
            return [self.tables; 2];
        }
        let ((query_cos, key_cos), (query_sin, key_sin)) =
            (cos.split_at(cos.len() / 2), sin.split_at(sin.len() / 2));
        [(query_cos, query_sin), (key_cos, key_sin)]
    }
}

/// Rotates rows [count, heads head_dim] to `out` with one cos/sin row per token.
fn rotate_rows(
    x: Rows<'_>,
    count: usize,
    width: usize,
    head_dim: usize,
    tables: (&[f32], &[f32]),
    out: &mut [f32],
) {
    let half = tables.0.len() / count.max(1);
    let shared = SharedMut::new(out);
    split_rows(count, width, |first, rows| {
        for index in first..first + rows {
            // SAFETY: pieces are disjoint row ranges.
            let out = unsafe { shared.slice(index * width, width) };
            out.copy_from_slice(x.row(index, width));
            if half > 0 {
                let (cos, sin) = (
                    &tables.0[index * half..(index + 1) * half],
                    &tables.1[index * half..(index + 1) * half],
                );
                out.chunks_exact_mut(head_dim)
                    .for_each(|head| rotate(RopeLayout::Half, head, cos, sin));
            }
        }
    });
}

/// Fills cos and sin rows for one position.
type ComputeRow = fn(&Frequencies, f64, &mut [f32], &mut [f32]);

thread_local! {
    /// cos and sin of one position: policies turn many queries and keys one by one.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn rotate_heads(
    rope: Option<&Frequencies>,
    compute_row: ComputeRow,
    position: u64,
    head_dim: usize,
    heads: &mut [f32],
) {
    let Some(rope) = rope else { return };
    let half = rope.inv_freq.len();
    ROW.with_borrow_mut(|row| {
        row.resize(2 * half, 0.0);
        let (cos, sin) = row.split_at_mut(half);
        compute_row(rope, position as f64, cos, sin);
        heads
            .chunks_exact_mut(head_dim)
            .for_each(|head| rotate(RopeLayout::Half, head, cos, sin));
    });
}

/// Rotates heads [n head_dim] of queries to one position.
pub(crate) fn rotate_to(
    rope: Option<&Frequencies>,
    position: u64,
    head_dim: usize,
    heads: &mut [f32],
) {
    rotate_heads(rope, RopeTable::compute_row, position, head_dim, heads);
}

/// Rotates cached keys [n head_dim] to one position.
pub(crate) fn rotate_key_to(
    rope: Option<&Frequencies>,
    position: u64,
    head_dim: usize,
    heads: &mut [f32],
) {
    rotate_heads(rope, RopeTable::compute_key_row, position, head_dim, heads);
}

/// Queries of one block turned to a part's angle: [queries, num_heads head_dim].
fn turned(
    row: &Row<'_>,
    at: LayerAt,
    angle: Angle,
    form: KeyForm,
    raw: Rows<'_>,
    own: &[f32],
    first: usize,
    width: usize,
    head_dim: usize,
) -> Vec<f32> {
    let mut out = own[first * width..(first + at.queries) * width].to_vec();
    let constant = |position: u64, index: usize, out: &mut [f32]| {
        let query = &mut out[index * width..(index + 1) * width];
        query.copy_from_slice(raw.row(first + index, width));
        rotate_to(row.rope, position, head_dim, query);
    };
    match (angle, row.rope) {
        (Angle::Own, _) | (_, None) => {}
        (Angle::AtMost(limit), _) => {
            let from = limit.saturating_sub(at.start).min(at.queries as u64) as usize;
            (from..at.queries).for_each(|index| constant(limit, index, &mut out));
        }
        (Angle::Fixed(position), Some(rope)) => {
            let half = rope.inv_freq.len();
            let mut table = vec![0f32; 2 * half];
            let (cos, sin) = table.split_at_mut(half);
            RopeTable::compute_row(rope, position as f64, cos, sin);
            let (cos, sin) = (cos.repeat(at.queries), sin.repeat(at.queries));
            rotate_rows(
                raw.skip(first),
                at.queries,
                width,
                head_dim,
                (&cos, &sin),
                &mut out,
            );
        }
    }
    // A raw key is a key at angle zero, where the rotation still scales by the attention factor.
    if let (KeyForm::Raw, Some(rope)) = (form, row.rope)
        && rope.attention_factor != 1.0
    {
        out.iter_mut()
            .for_each(|q| *q *= rope.attention_factor as f32);
    }
    out
}

/// One row's block in a round: row, first query, place, plan, and per part the queries at another
/// angle than their own.
type Work = (usize, usize, LayerAt, Plan, Vec<Option<Vec<f32>>>);

/// Tiles of one part, as the kernel wants them.
enum PartTiles<'a> {
    Shared(Vec<Tile<'a>>),
    PerQueryHead(Vec<Vec<Tile<'a>>>),
    PerKvHead(Vec<Vec<Tile<'a>>>),
}

/// Attention of all rows. query [tokens, num_heads head_dim], key and value
/// [tokens, num_kv_heads head_dim], un-rotated, rows one after another; out as query, contiguous.
pub fn attend_rows(
    shape: LayerShape<'_>,
    rows: &mut [Row<'_>],
    query: Rows<'_>,
    key: Rows<'_>,
    value: Rows<'_>,
    out: &mut [f32],
) -> io::Result<()> {
    let Some(first) = rows.first() else {
        return Ok(());
    };
    let layout = first.store.layout();
    let (width, kv_width) = (
        shape.num_heads * layout.head_dim,
        layout.num_kv_heads * layout.head_dim,
    );
    let total: usize = rows.iter().map(|row| row.count).sum();
    let layer = shape.layer;

    let mut own = vec![0f32; total * width];
    let mut rotated = vec![0f32; total * kv_width];
    let mut offsets = Vec::with_capacity(rows.len());
    let mut offset = 0;
    for row in rows.iter_mut() {
        refresh(row, layer, layout.head_dim)?;
        let count = row.count;
        let mut store = || {
            rotate_rows(
                query.skip(offset),
                row.count,
                width,
                layout.head_dim,
                row.tables()[0],
                &mut own[offset * width..(offset + row.count) * width],
            );
            let target = &mut rotated[offset * kv_width..(offset + row.count) * kv_width];
            rotate_rows(
                key.skip(offset),
                row.count,
                kv_width,
                layout.head_dim,
                row.tables()[1],
                target,
            );
            let target = Rows {
                data: target,
                stride: kv_width,
            };
            row.store.append(
                layer,
                target,
                key.skip(offset),
                value.skip(offset),
                row.count,
            );
        };
        if count > 0 {
            stage(Stage::Keys, &mut store);
        }
        offsets.push(offset);
        offset += count;
    }

    // Execution blocks: all rows' first blocks together, then their second ones, ...
    let starts: Vec<u64> = rows
        .iter()
        .map(|row| row.store.len(layer) - row.count as u64)
        .collect();
    let mut done = vec![0; rows.len()];
    loop {
        let mut work: Vec<Work> = Vec::with_capacity(rows.len());
        let mut index = 0;
        while let Some(row) = rows.get_mut(index) {
            let first = done[index];
            if first >= row.count {
                index += 1;
                continue;
            }
            let call_start = starts[index];
            let mut at = LayerAt {
                layer,
                start: call_start + first as u64,
                queries: row.count - first,
            };
            if shape.sliding_window.is_none() {
                at.queries = row.policy.block(at).clamp(1, at.queries);
            }
            done[index] += at.queries;
            let raw = query.skip(offsets[index]);
            let rope = row.rope;
            let turn = |position: u64, heads: &mut [f32]| {
                rotate_to(rope, position, layout.head_dim, heads)
            };
            let queries = |first: usize| Queries {
                data: &raw.data[first * raw.stride..],
                stride: raw.stride,
                num_heads: shape.num_heads,
                head_dim: layout.head_dim,
                scale: shape.scale,
                rotate: &turn,
            };
            let plan = match shape.sliding_window {
                Some(size) => Plan {
                    parts: vec![Window::part(at, size as u64)],
                },
                None => {
                    if first == 0 {
                        let call = LayerAt {
                            layer,
                            start: call_start,
                            queries: row.count,
                        };
                        stage(Stage::Policy, || {
                            row.policy.begin_layer(call, &queries(0), row.store)
                        })?;
                    }
                    stage(Stage::Policy, || {
                        row.policy.plan(at, &queries(first), row.store)
                    })?
                }
            };
            let own = &own[offsets[index] * width..];
            let turned = plan
                .parts
                .iter()
                .map(|part| match (part.angle, part.form) {
                    (Angle::Own, KeyForm::Rotated) => None,
                    (angle, form) => Some(turned(
                        row,
                        at,
                        angle,
                        form,
                        raw,
                        own,
                        first,
                        width,
                        layout.head_dim,
                    )),
                })
                .collect();
            work.push((index, first, at, plan, turned));
            // Its next block too, if that does not wait for this one.
            if shape.sliding_window.is_some() || !row.policy.spec().independent_blocks {
                index += 1;
            }
        }
        if work.is_empty() {
            return Ok(());
        }

        let mut sums: Vec<Vec<Option<ColumnSums>>> = Vec::with_capacity(work.len());
        {
            let tiles = work
                .iter()
                .map(|(index, _, _, plan, _)| {
                    let store = &*rows[*index].store;
                    let by_heads = |lists: Vec<_>| match lists.len() == layout.num_kv_heads {
                        true => PartTiles::PerKvHead(lists),
                        false => PartTiles::PerQueryHead(lists),
                    };
                    let tiles = plan.parts.iter().map(|part| {
                        Ok(match &part.keys {
                            Keys::Shared(ranges) => {
                                PartTiles::Shared(store.tiles(layer, ranges, part.form)?)
                            }
                            Keys::PerQueryHead(lists) => by_heads(
                                lists
                                    .iter()
                                    .map(|ranges| store.tiles(layer, ranges, part.form))
                                    .collect::<io::Result<_>>()?,
                            ),
                            Keys::Gathered(gathered) => by_heads(gathered.tiles()),
                        })
                    });
                    tiles.collect::<io::Result<Vec<_>>>()
                })
                .collect::<io::Result<Vec<_>>>()?;
            let parts: Vec<Vec<attention::Part<'_>>> = work
                .iter()
                .zip(&tiles)
                .map(|((index, first, at, plan, turned), tiles)| {
                    let own = &own[(offsets[*index] + first) * width
                        ..(offsets[*index] + first + at.queries) * width];
                    plan.parts
                        .iter()
                        .zip(turned)
                        .zip(tiles)
                        .map(|((part, turned), tiles)| attention::Part {
                            query: turned.as_deref().unwrap_or(own),
                            tiles: match tiles {
                                PartTiles::Shared(tiles) => Tiles::Shared(tiles),
                                PartTiles::PerQueryHead(lists) => Tiles::PerQueryHead(lists),
                                PartTiles::PerKvHead(lists) => Tiles::PerKvHead(lists),
                            },
                            mask: part.mask,
                            column_sums: part.column_sums,
                            alibi: shape.alibi(part.angle, part.form),
                        })
                        .collect()
                })
                .collect();
            let items: Vec<Attention<'_>> = work
                .iter()
                .zip(&parts)
                .map(|((_, _, at, ..), parts)| Attention {
                    layout,
                    num_heads: shape.num_heads,
                    queries: at.queries,
                    query_start: at.start,
                    scale: shape.scale,
                    softcap: shape.softcap,
                    row_exact: false,
                    parts,
                })
                .collect();
            let mut rest = &mut *out;
            let mut end = 0;
            let mut outs: Vec<&mut [f32]> = Vec::with_capacity(work.len());
            for (index, first, at, ..) in &work {
                let start = (offsets[*index] + first) * width;
                let (_, tail) = std::mem::take(&mut rest).split_at_mut(start - end);
                let (mine, tail) = tail.split_at_mut(at.queries * width);
                outs.push(mine);
                rest = tail;
                end = start + at.queries * width;
            }
            let results = stage(Stage::Attention, || {
                attention::attention_batch(&items, &mut outs)
            });
            for (result, tiles) in results.into_iter().zip(&tiles) {
                let of_parts = result
                    .column_sums
                    .into_iter()
                    .zip(tiles)
                    .map(|(values, tiles)| match (values, tiles) {
                        (Some(values), PartTiles::Shared(tiles)) => {
                            let tiles = tiles
                                .iter()
                                .map(|tile| (tile.first, tile.lo as usize..tile.hi as usize))
                                .collect();
                            Some(ColumnSums { tiles, values })
                        }
                        _ => None,
                    });
                sums.push(of_parts.collect());
            }
        }
        for ((index, _, at, ..), sums) in work.iter().zip(&sums) {
            let row = &mut rows[*index];
            match shape.sliding_window {
                Some(size) => row
                    .store
                    .drop_tokens(layer, 0..(at.end() + 1).saturating_sub(size as u64)),
                None => {
                    stage(Stage::Policy, || row.policy.observe(*at, sums, row.store))?;
                    refresh(row, layer, layout.head_dim)?;
                }
            }
        }
    }
}

/// Turns keys that a policy has moved to the angles of their new slots.
fn refresh(row: &mut Row<'_>, layer: usize, head_dim: usize) -> io::Result<()> {
    let rope = row.rope;
    let turn = |slot: u64, keys: &mut [f32]| rotate_key_to(rope, slot, head_dim, keys);
    row.store.refresh(layer, turn)
}

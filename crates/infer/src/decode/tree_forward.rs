//! A tree of guesses verified in one pass, under full attention on the CPU (paper 54's tree mask).
//!
//! All nodes attend to the sequence's cached keys in one kernel call without a mask; what they see of the
//! tree itself, their ancestors, is a second call per unbranched run of nodes. Both are joined by their
//! softmax denominators, so the kernels need no mask of their own and the cache is read once.

use super::session::DraftTree;
use crate::context::ContextConfig;
use crate::engine::{Engine, EngineError, Result, Sequence};
use crate::kv::{KeyForm, KvStore, Rows};
use candle_core::{Device, Tensor};
use longspan_kernels::attention::{self, Attention, Mask, Part, Tile, Tiles};
use longspan_kernels::ops::{with_rows, with_strided_rows};
use longspan_nn::attention::Attend;
use longspan_nn::position::{RopeLayout, RopeTable, rotate};
use std::io;
use std::ops::Range;

/// Keys and values of a tree's nodes, per layer, until a path is chosen.
pub(crate) struct TreeRows {
    /// [layers][nodes, num_kv_heads head_dim], rotated.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl TreeRows {
    /// Appends the nodes of a path to the sequence that the tree was read after.
    pub(crate) fn commit(self, sequence: &mut Sequence, tree: &DraftTree, path: &[u32]) {
        let layout = sequence.store.layout();
        let width = layout.num_kv_heads * layout.head_dim;
        let gather = |rows: &[f32]| -> Vec<f32> {
            path.iter()
                .flat_map(|&node| &rows[node as usize * width..(node as usize + 1) * width])
                .copied()
                .collect()
        };
        for (layer, (keys, values)) in self.keys.iter().zip(&self.values).enumerate() {
            let (keys, values) = (gather(keys), gather(values));
            let rows = |data| Rows {
                data,
                stride: width,
            };
            let store = &mut sequence.store;
            store.append(layer, rows(&keys), rows(&keys), rows(&values), path.len());
        }
        let tokens = path.iter().map(|&node| tree.tokens()[node as usize]);
        sequence.tokens.extend(tokens);
    }
}

/// True if [`tree_forward`] gives what reading the paths would.
pub(crate) fn one_pass(engine: &Engine, sequence: &Sequence) -> bool {
    engine.model().device().is_cpu()
        && engine.model().recurrent().is_none()
        && sequence.options.context == ContextConfig::Full
        // A call that failed half-way leaves layers of different lengths; the plain path says so.
        && (0..sequence.store.num_layers())
            .all(|layer| sequence.store.len(layer) == sequence.tokens.len() as u64)
        && !engine.ropes().depend_on_length()
        && !engine.ropes().keys_differ()
        && (engine.model().config().layers.iter()).all(|layer| layer.sliding_window.is_none())
}

/// Logits [nodes, vocab] after every node. The sequence keeps its length; the rows can extend it.
pub(crate) fn tree_forward(
    engine: &Engine,
    sequence: &mut Sequence,
    tree: &DraftTree,
) -> Result<(Vec<f32>, TreeRows)> {
    let model = engine.model();
    let start = sequence.tokens.len();
    engine.ropes().check_length(start + tree.len())?;
    let depths: Vec<usize> = (0..tree.len() as u32).map(|n| tree.depth(n)).collect();
    let tables = sequence
        .frequencies
        .iter()
        .map(|rope| {
            let half = rope.inv_freq.len();
            let mut cos = vec![0f32; tree.len() * half];
            let mut sin = vec![0f32; tree.len() * half];
            for (node, depth) in depths.iter().enumerate() {
                let span = node * half..(node + 1) * half;
                let position = (start + depth) as f64;
                RopeTable::compute_row(rope, position, &mut cos[span.clone()], &mut sin[span]);
            }
            (half, cos, sin)
        })
        .collect();
    let mut attend = TreeAttend {
        engine,
        store: &mut sequence.store,
        start: start as u64,
        tables,
        runs: runs(tree, start as u64),
        rows: TreeRows {
            keys: Vec::new(),
            values: Vec::new(),
        },
        error: None,
    };
    let hidden = model.hidden(tree.tokens(), &mut attend);
    let (error, rows) = (attend.error.take(), attend.rows);
    sequence.store.truncate(start as u64);
    if let Some(error) = error {
        return Err(EngineError::Io(error));
    }
    let logits = model.logits(&hidden?)?.to_device(&Device::Cpu)?;
    Ok((with_rows(&logits, <[f32]>::to_vec)?, rows))
}

/// Nodes that follow one another without a branch, and the slots of the tree that they see.
struct Run {
    nodes: Range<usize>,
    /// Token ranges in the store: the ancestors of the first node, then the run itself.
    slots: Vec<Range<u64>>,
}

fn runs(tree: &DraftTree, start: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for node in 0..tree.len() {
        if let Some(run) = runs.last_mut()
            && node > 0
            && tree.parents()[node] as usize == node - 1
        {
            run.nodes.end = node + 1;
            run.slots.last_mut().expect("a run sees itself").end += 1;
            continue;
        }
        let mut slots: Vec<Range<u64>> = Vec::new();
        for seen in tree.path(node as u32) {
            let slot = start + u64::from(seen);
            match slots.last_mut() {
                Some(range) if range.end == slot => range.end += 1,
                _ => slots.push(slot..slot + 1),
            }
        }
        runs.push(Run {
            nodes: node..node + 1,
            slots,
        });
    }
    runs
}

struct TreeAttend<'a> {
    engine: &'a Engine,
    store: &'a mut KvStore,
    /// Tokens of the sequence; node i lies in slot `start + i` for the time of the call.
    start: u64,
    /// Per rotary basis: half its dimensions, cos and sin [nodes, half] at the nodes' depths.
    tables: Vec<(usize, Vec<f32>, Vec<f32>)>,
    runs: Vec<Run>,
    rows: TreeRows,
    /// candle's error type cannot carry ours back; it waits here.
    error: Option<io::Error>,
}

impl TreeAttend<'_> {
    /// Rows of a tensor, contiguous, each head turned to its node's depth.
    fn rotated(&self, layer: usize, x: &Tensor) -> candle_core::Result<Vec<f32>> {
        let config = self.engine.model().config();
        let (tokens, width) = x.dims2()?;
        let mut rows = contiguous(x, tokens, width)?;
        if let Some(rope) = self.engine.ropes().of_layer(layer) {
            let (half, cos, sin) = &self.tables[rope];
            for (node, row) in rows.chunks_exact_mut(width).enumerate() {
                let span = node * half..(node + 1) * half;
                row.chunks_exact_mut(config.head_dim).for_each(|head| {
                    rotate(
                        RopeLayout::Half,
                        head,
                        &cos[span.clone()],
                        &sin[span.clone()],
                    )
                });
            }
        }
        Ok(rows)
    }

    /// Attention of all nodes: query [nodes, num_heads head_dim] rotated, out alike.
    fn attend_nodes(&self, layer: usize, query: &[f32], nodes: usize) -> io::Result<Vec<f32>> {
        let config = self.engine.model().config();
        let width = config.num_heads * config.head_dim;
        // [nodes, width] over the sequence, then [nodes, width] over the tree.
        let mut out = vec![0f32; 2 * nodes * width];
        let tiles = |ranges: &[Range<u64>]| self.store.tiles(layer, ranges, KeyForm::Rotated);
        let mut lists: Vec<(Range<usize>, Vec<Tile<'_>>, Mask)> = vec![(
            0..nodes,
            tiles(std::slice::from_ref(&(0..self.start)))?,
            Mask::All,
        )];
        for run in &self.runs {
            // Slots rise along a run and its ancestors lie before it: causal by slot is the tree's mask.
            lists.push((run.nodes.clone(), tiles(&run.slots)?, Mask::Causal));
        }
        let parts: Vec<[Part<'_>; 1]> = lists
            .iter()
            .map(|(nodes, tiles, mask)| {
                [Part {
                    query: &query[nodes.start * width..nodes.end * width],
                    tiles: Tiles::Shared(tiles),
                    mask: *mask,
                    column_sums: false,
                }]
            })
            .collect();
        let items: Vec<Attention<'_>> = lists
            .iter()
            .zip(&parts)
            .map(|((nodes, ..), parts)| Attention {
                layout: self.store.layout(),
                num_heads: config.num_heads,
                queries: nodes.len(),
                query_start: self.start + nodes.start as u64,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                parts,
            })
            .collect();
        let mut outs = Vec::with_capacity(items.len());
        let mut rest = &mut out[..];
        for (nodes, ..) in &lists {
            let (mine, tail) = rest.split_at_mut(nodes.len() * width);
            outs.push(mine);
            rest = tail;
        }
        let results = attention::attention_batch(&items, &mut outs);
        let (over_sequence, over_tree) = out.split_at_mut(nodes * width);
        let heads = results[0].lse.iter();
        let tree_lse = results[1..].iter().flat_map(|result| &result.lse);
        for (index, (&a, &b)) in heads.zip(tree_lse).enumerate() {
            let span = index * config.head_dim..(index + 1) * config.head_dim;
            // The share of the sequence in the joint denominator; 0 if it is empty (a = -inf).
            let share = 1.0 / (1.0 + (b - a).exp());
            for (x, &y) in over_sequence[span.clone()].iter_mut().zip(&over_tree[span]) {
                *x = *x * share + y * (1.0 - share);
            }
        }
        out.truncate(nodes * width);
        Ok(out)
    }
}

fn contiguous(x: &Tensor, tokens: usize, width: usize) -> candle_core::Result<Vec<f32>> {
    with_strided_rows(x, |data, stride| {
        (0..tokens)
            .flat_map(|row| &data[row * stride..row * stride + width])
            .copied()
            .collect()
    })
}

impl Attend for TreeAttend<'_> {
    fn attend(
        &mut self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (nodes, width) = query.dims2()?;
        let (_, kv_width) = key.dims2()?;
        let query = self.rotated(layer, query)?;
        let key = self.rotated(layer, key)?;
        let value = contiguous(value, nodes, kv_width)?;
        let rows = |data| Rows {
            data,
            stride: kv_width,
        };
        self.store
            .append(layer, rows(&key), rows(&key), rows(&value), nodes);
        self.rows.keys.push(key);
        self.rows.values.push(value);
        match self.attend_nodes(layer, &query, nodes) {
            Ok(out) => Tensor::from_vec(out, (nodes, width), &Device::Cpu),
            Err(error) => {
                let message = error.to_string();
                self.error = Some(error);
                candle_core::bail!("{message}")
            }
        }
    }
}

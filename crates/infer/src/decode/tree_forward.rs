//! A tree of guesses verified in one pass, under full attention on the CPU (paper 54's tree mask).
//!
//! Every path from the root to a leaf is a fork of the sequence's pages, so that a node's keys lie where
//! they would if its path had been read token by token. An unbranched run of nodes is one causal kernel
//! call over its fork, each row computed as if alone: the logits are plain decoding's, bit for bit.

use super::session::DraftTree;
use crate::context::ContextConfig;
use crate::engine::{Engine, EngineError, Result, Sequence};
use crate::kv::{KeyForm, KvStore, Rows};
use candle_core::{Device, Tensor};
use longspan_kernels::attention::{self, Attention, Mask, Part, Tile, Tiles};
use longspan_kernels::matmul;
use longspan_kernels::ops::{with_rows, with_strided_rows};
use longspan_nn::attention::Attend;
use longspan_nn::position::{RopeLayout, RopeTable, rotate};
use std::io;
use std::ops::Range;

/// Most nodes of a tree whose products are those of single rows.
pub(crate) fn most_nodes() -> usize {
    matmul::independent_rows()
}

/// A path to a leaf and the sequence with it read.
struct Branch {
    /// Nodes from the root on.
    path: Vec<u32>,
    store: KvStore,
}

/// The branches of a tree that was read, until a path is chosen.
pub(crate) struct TreeRows {
    branches: Vec<Branch>,
}

impl TreeRows {
    /// Makes the sequence that the tree was read after the one that read the nodes of a path.
    pub(crate) fn commit(self, sequence: &mut Sequence, tree: &DraftTree, path: &[u32]) {
        if path.is_empty() {
            return;
        }
        let mut branches = self.branches.into_iter();
        let branch = branches.find(|branch| branch.path.starts_with(path));
        sequence.store = branch.expect("a path lies on a branch").store;
        let tokens = path.iter().map(|&node| tree.tokens()[node as usize]);
        sequence.tokens.extend(tokens);
        sequence.store.truncate(sequence.tokens.len() as u64);
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
        // Siblings share a position, but ALiBi would see their slots.
        && engine.model().config().alibi_max_bias.is_none()
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
    let branches = branches(tree, &sequence.store);
    let mut attend = TreeAttend {
        engine,
        start: start as u64,
        tables,
        runs: runs(tree, &branches),
        branches,
        error: None,
    };
    let hidden = model.hidden(tree.tokens(), &mut attend);
    let (error, branches) = (attend.error.take(), attend.branches);
    if let Some(error) = error {
        return Err(EngineError::Io(error));
    }
    let logits = model.logits(&hidden?)?.to_device(&Device::Cpu)?;
    Ok((with_rows(&logits, <[f32]>::to_vec)?, TreeRows { branches }))
}

fn branches(tree: &DraftTree, store: &KvStore) -> Vec<Branch> {
    let mut inner = vec![false; tree.len()];
    for &parent in &tree.parents()[1..] {
        inner[parent as usize] = true;
    }
    let leaves = (0..tree.len()).filter(|&node| !inner[node]);
    leaves
        .map(|leaf| Branch {
            path: tree.path(leaf as u32),
            store: store.clone(),
        })
        .collect()
}

/// Nodes that follow one another without a branch.
struct Run {
    nodes: Range<usize>,
    /// Depth of the first.
    depth: usize,
    /// A branch that they lie on.
    branch: usize,
}

fn runs(tree: &DraftTree, branches: &[Branch]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for node in 0..tree.len() {
        if let Some(run) = runs.last_mut()
            && node > 0
            && tree.parents()[node] as usize == node - 1
            && branches[run.branch].path.contains(&(node as u32))
        {
            run.nodes.end = node + 1;
            continue;
        }
        let on = |branch: &Branch| branch.path.contains(&(node as u32));
        runs.push(Run {
            nodes: node..node + 1,
            depth: tree.depth(node as u32),
            branch: branches
                .iter()
                .position(on)
                .expect("a node lies on a branch"),
        });
    }
    runs
}

struct TreeAttend<'a> {
    engine: &'a Engine,
    /// Tokens of the sequence.
    start: u64,
    /// Per rotary basis: half its dimensions, cos and sin [nodes, half] at the nodes' depths.
    tables: Vec<(usize, Vec<f32>, Vec<f32>)>,
    runs: Vec<Run>,
    branches: Vec<Branch>,
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

    /// Adds a layer's keys and values [nodes, width] to every branch.
    fn append(&mut self, layer: usize, keys: &[f32], values: &[f32], width: usize) {
        let gather = |rows: &[f32], path: &[u32]| -> Vec<f32> {
            path.iter()
                .flat_map(|&node| &rows[node as usize * width..(node as usize + 1) * width])
                .copied()
                .collect()
        };
        let stride = width;
        for Branch { path, store } in &mut self.branches {
            let (keys, values) = (gather(keys, path), gather(values, path));
            let rows = |data| Rows { data, stride };
            store.append(layer, rows(&keys), rows(&keys), rows(&values), path.len());
        }
    }

    /// Attention of all nodes: query [nodes, num_heads head_dim] rotated, out alike.
    fn attend_nodes(&self, layer: usize, query: &[f32], nodes: usize) -> io::Result<Vec<f32>> {
        let config = self.engine.model().config();
        let width = config.num_heads * config.head_dim;
        let mut out = vec![0f32; nodes * width];
        let tiles = (self.runs.iter())
            .map(|run| {
                let end = self.start + (run.depth + run.nodes.len()) as u64;
                let store = &self.branches[run.branch].store;
                store.tiles(layer, std::slice::from_ref(&(0..end)), KeyForm::Rotated)
            })
            .collect::<io::Result<Vec<Vec<Tile<'_>>>>>()?;
        let parts: Vec<[Part<'_>; 1]> = (self.runs.iter().zip(&tiles))
            .map(|(run, tiles)| {
                [Part {
                    query: &query[run.nodes.start * width..run.nodes.end * width],
                    tiles: Tiles::Shared(tiles),
                    mask: Mask::Causal,
                    column_sums: false,
                    alibi: None,
                }]
            })
            .collect();
        let items: Vec<Attention<'_>> = (self.runs.iter().zip(&parts))
            .map(|(run, parts)| Attention {
                layout: self.branches[run.branch].store.layout(),
                num_heads: config.num_heads,
                queries: run.nodes.len(),
                query_start: self.start + run.depth as u64,
                scale: config.attention_scale,
                softcap: config.attention_softcap,
                row_exact: true,
                parts,
            })
            .collect();
        let mut outs = Vec::with_capacity(items.len());
        let mut rest = &mut out[..];
        for run in &self.runs {
            let (mine, tail) = rest.split_at_mut(run.nodes.len() * width);
            outs.push(mine);
            rest = tail;
        }
        attention::attention_batch(&items, &mut outs);
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
        self.append(layer, &key, &value, kv_width);
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

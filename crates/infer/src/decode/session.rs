//! The seam under all strategies: sequences of one model that can be stepped, forked, rolled back, and
//! asked about a whole tree of guesses. The engine implements it; so does any toy model of a test.

use super::logits::SamplingError;
use crate::engine::EngineError;

/// What can go wrong while decoding.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The engine failed or refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Options of sampling.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// Options of a strategy; the text names the option, the value found and what is expected.
    #[error("--decode {text}: {reason}")]
    Option {
        /// The options as given.
        text: String,
        /// What is wrong with them.
        reason: String,
    },
    /// A file that an option names.
    #[error("{path}: {source}")]
    File {
        /// Its path.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The strategy needs what the session or the request does not give; the text says what.
    #[error("{0}")]
    Refused(String),
}

/// Result of decoding.
pub type Result<T> = std::result::Result<T, DecodeError>;

/// A sequence of a session. Ids of released sequences may come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u32);

/// What a session can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// [`DecodeSession::step_tree`] is one pass over the model, so that guessing can pay.
    pub one_pass_tree: bool,
    /// Nodes of a tree above which one pass rounds otherwise than token by token.
    pub most_tree_nodes: usize,
}

/// Guesses at what comes next: node 0 follows the sequence's last token, every other node its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DraftTree {
    tokens: Vec<u32>,
    /// `parents[0]` is [`DraftTree::NONE`]; `parents[i] < i`.
    parents: Vec<u32>,
}

impl DraftTree {
    /// The parent of the root.
    pub const NONE: u32 = u32::MAX;

    /// A root alone.
    pub fn new(root: u32) -> DraftTree {
        DraftTree {
            tokens: vec![root],
            parents: vec![Self::NONE],
        }
    }

    /// Adds a child and returns its index.
    ///
    /// # Panics
    /// If there is no node `parent`.
    pub fn push(&mut self, parent: u32, token: u32) -> u32 {
        assert!(
            (parent as usize) < self.len(),
            "parent {parent} of {} nodes",
            self.len()
        );
        self.tokens.push(token);
        self.parents.push(parent);
        self.tokens.len() as u32 - 1
    }

    /// Number of nodes, the root included.
    #[allow(clippy::len_without_is_empty)] // there is a root always
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens, node by node.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The parents, node by node; a parent stands before its children.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// Edges between the root and a node. It decides the node's position: siblings share one.
    pub fn depth(&self, node: u32) -> usize {
        self.path(node).len() - 1
    }

    /// The nodes from the root to `node`, both included: what the node's query sees of the tree.
    pub fn path(&self, node: u32) -> Vec<u32> {
        let mut path = vec![node];
        while let Some(&parent) = self.parents.get(path[path.len() - 1] as usize)
            && parent != Self::NONE
        {
            path.push(parent);
        }
        path.reverse();
        path
    }

    /// Children of a node with this token. Several only if branches were laid out side by side.
    pub fn children_with(&self, node: u32, token: u32) -> impl Iterator<Item = u32> + '_ {
        (node + 1..self.len() as u32).filter(move |&child| {
            self.parents[child as usize] == node && self.tokens[child as usize] == token
        })
    }
}

/// One model and many sequences over it. Logits are f32, rows of [vocab].
pub trait DecodeSession {
    /// Entries of a row of logits.
    fn vocab_size(&self) -> usize;

    /// What it can do.
    fn limits(&self) -> SessionLimits;

    /// Tokens read into a sequence.
    fn tokens(&self, seq: SeqId) -> &[u32];

    /// Reads one token into each of several different sequences, in one pass: [rows, vocab].
    fn step(&mut self, rows: &[(SeqId, u32)]) -> Result<Vec<f32>>;

    /// An independent copy; memory is shared until one of the two writes.
    fn fork(&mut self, seq: SeqId) -> Result<SeqId>;

    /// Marks the present length as one that [`DecodeSession::truncate`] can return to.
    fn commit(&mut self, seq: SeqId) -> Result<()>;

    /// Returns to an earlier length. Sessions that forget can return only to what was committed.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()>;

    /// Frees a sequence.
    fn release(&mut self, seq: SeqId);

    /// `seq` becomes what `by` is, and `by` is gone.
    fn replace(&mut self, seq: SeqId, by: SeqId) -> Result<()>;

    /// Logits after every node of a tree of guesses: [nodes, vocab], each as if its path alone had been
    /// read. The sequence itself stays as it is until [`DecodeSession::commit_path`].
    fn step_tree(&mut self, seq: SeqId, tree: &DraftTree) -> Result<Vec<f32>>;

    /// Reads a path of the last tree (nodes from the root on) into the sequence, without computing it
    /// anew. The rest of the tree is forgotten.
    fn commit_path(&mut self, seq: SeqId, nodes: &[u32]) -> Result<()>;

    /// Rows of the model's input embedding [vocab, dim], where it has one.
    fn embedding(&mut self) -> Result<Option<super::diversity::EmbeddingTable>> {
        Ok(None)
    }
}

/// [`DecodeSession::step_tree`] in its naive form: a fork for every node, one step for every level.
/// Right for every session and policy, and the oracle of faster forms.
#[derive(Debug)]
pub struct ForkedTree {
    nodes: Vec<SeqId>,
}

impl ForkedTree {
    /// The logits [nodes, vocab], and the forks to commit or release.
    pub fn step(
        session: &mut dyn DecodeSession,
        seq: SeqId,
        tree: &DraftTree,
    ) -> Result<(ForkedTree, Vec<f32>)> {
        let vocab = session.vocab_size();
        let mut logits = vec![0.0; tree.len() * vocab];
        let mut nodes = vec![seq; tree.len()];
        let depths: Vec<usize> = (0..tree.len() as u32).map(|n| tree.depth(n)).collect();
        for level in 0..=depths.iter().copied().max().unwrap_or(0) {
            let here: Vec<usize> = (0..tree.len()).filter(|&n| depths[n] == level).collect();
            let mut rows = Vec::with_capacity(here.len());
            for &node in &here {
                let parent = tree.parents()[node];
                let from = if parent == DraftTree::NONE {
                    seq
                } else {
                    nodes[parent as usize]
                };
                nodes[node] = session.fork(from)?;
                rows.push((nodes[node], tree.tokens()[node]));
            }
            let found = session.step(&rows)?;
            for (row, &node) in found.chunks_exact(vocab).zip(&here) {
                logits[node * vocab..(node + 1) * vocab].copy_from_slice(row);
            }
        }
        Ok((ForkedTree { nodes }, logits))
    }

    /// Makes `seq` what the last node of the path is; frees the rest.
    pub fn commit(self, session: &mut dyn DecodeSession, seq: SeqId, path: &[u32]) -> Result<()> {
        let last = path.last().map(|&node| self.nodes[node as usize]);
        for &node in self.nodes.iter().filter(|&&node| Some(node) != last) {
            session.release(node);
        }
        match last {
            Some(node) => session.replace(seq, node),
            None => Ok(()),
        }
    }
}

/// That `nodes` is a path of `tree` from its root.
pub fn check_path(tree: &DraftTree, nodes: &[u32]) -> Result<()> {
    let right = match nodes.last() {
        None => true,
        Some(&last) => (last as usize) < tree.len() && tree.path(last) == nodes,
    };
    if right {
        return Ok(());
    }
    Err(DecodeError::Refused(format!(
        "nodes {nodes:?} were found, expected a path from the root of a tree of {} nodes",
        tree.len()
    )))
}

//! The engine's sequences as a [`DecodeSession`]: forks share pages, rows of one step run in one pass, and
//! under full attention a tree of guesses is verified in one pass too (see `tree_forward`).

use super::diversity::EmbeddingTable;
use super::session::{
    DecodeError, DecodeSession, DraftTree, ForkedTree, Result, SeqId, SessionLimits, check_path,
};
use super::tree_forward::{TreeRows, most_nodes, one_pass, tree_forward};
use crate::engine::{Engine, EngineError, Sequence, Want};
use longspan_kernels::ops::with_rows;

enum Slot<'a> {
    Free,
    Root(&'a mut Sequence),
    Own(Box<Sequence>),
}

impl Slot<'_> {
    fn get(&self) -> Option<&Sequence> {
        match self {
            Slot::Free => None,
            Slot::Root(sequence) => Some(sequence),
            Slot::Own(sequence) => Some(sequence),
        }
    }

    fn get_mut(&mut self) -> Option<&mut Sequence> {
        match self {
            Slot::Free => None,
            Slot::Root(sequence) => Some(sequence),
            Slot::Own(sequence) => Some(sequence),
        }
    }
}

/// A tree that was read and not committed yet.
struct Pending {
    seq: SeqId,
    tree: DraftTree,
    state: PendingState,
}

enum PendingState {
    Rows(TreeRows),
    Forks(ForkedTree),
}

/// See the module's text.
pub struct EngineSession<'a> {
    engine: &'a Engine,
    slots: Vec<Slot<'a>>,
    pending: Option<Pending>,
    naive_trees: bool,
}

impl<'a> EngineSession<'a> {
    /// The sequence that a caller lends a session.
    pub const ROOT: SeqId = SeqId(0);

    /// A session over `root`, which becomes [`EngineSession::ROOT`] and holds the prompt already.
    pub fn new(engine: &'a Engine, root: &'a mut Sequence) -> EngineSession<'a> {
        EngineSession {
            engine,
            slots: vec![Slot::Root(root)],
            pending: None,
            naive_trees: false,
        }
    }

    /// A session that holds its root itself, for schedulers; [`EngineSession::into_root`] gives it back.
    pub fn owning(engine: &'a Engine, root: Sequence) -> EngineSession<'a> {
        EngineSession {
            engine,
            slots: vec![Slot::Own(Box::new(root))],
            pending: None,
            naive_trees: false,
        }
    }

    /// The root of a session that owns it.
    pub fn into_root(mut self) -> Option<Sequence> {
        match std::mem::replace(self.slots.first_mut()?, Slot::Free) {
            Slot::Own(sequence) => Some(*sequence),
            Slot::Root(_) | Slot::Free => None,
        }
    }

    /// The root.
    pub fn root(&self) -> Option<&Sequence> {
        self.slots.first().and_then(Slot::get)
    }

    /// The sequences of a step's rows, for a pass that several sessions share. What it reads into them is what
    /// [`DecodeSession::step`] would.
    pub fn lend(&mut self, rows: &[(SeqId, u32)]) -> Result<Vec<&mut Sequence>> {
        self.forget_pending();
        let mut slots: Vec<Option<&mut Sequence>> =
            self.slots.iter_mut().map(Slot::get_mut).collect();
        let lent = rows.iter().map(|&(seq, _)| {
            let sequence = slots.get_mut(seq.0 as usize).and_then(Option::take);
            sequence.ok_or_else(|| unknown(seq))
        });
        lent.collect()
    }

    /// Reads trees by forks, level by level: the oracle of the tests.
    pub fn with_naive_trees(mut self) -> Self {
        self.naive_trees = true;
        self
    }

    /// Sequences alive, the root included.
    pub fn live(&self) -> usize {
        self.slots.iter().filter(|s| s.get().is_some()).count()
    }

    fn get(&self, seq: SeqId) -> Result<&Sequence> {
        self.slots
            .get(seq.0 as usize)
            .and_then(Slot::get)
            .ok_or_else(|| unknown(seq))
    }

    fn get_mut(&mut self, seq: SeqId) -> Result<&mut Sequence> {
        self.slots
            .get_mut(seq.0 as usize)
            .and_then(Slot::get_mut)
            .ok_or_else(|| unknown(seq))
    }

    fn one_pass(&self, seq: SeqId) -> Result<bool> {
        Ok(!self.naive_trees && one_pass(self.engine, self.get(seq)?))
    }

    fn forget_pending(&mut self) {
        if let Some(Pending {
            state: PendingState::Forks(forks),
            seq,
            ..
        }) = self.pending.take()
        {
            // An empty path releases every fork and leaves `seq` alone.
            let _ = forks.commit(self, seq, &[]);
        }
    }
}

fn unknown(seq: SeqId) -> DecodeError {
    DecodeError::Refused(format!("sequence {} is not part of the session", seq.0))
}

impl DecodeSession for EngineSession<'_> {
    fn vocab_size(&self) -> usize {
        self.engine.model().config().vocab_size
    }

    fn limits(&self) -> SessionLimits {
        SessionLimits {
            one_pass_tree: self.one_pass(Self::ROOT).unwrap_or(false),
            most_tree_nodes: most_nodes(),
        }
    }

    fn tokens(&self, seq: SeqId) -> &[u32] {
        self.get(seq).map_or(&[], Sequence::tokens)
    }

    fn step(&mut self, rows: &[(SeqId, u32)]) -> Result<Vec<f32>> {
        let engine = self.engine;
        let tokens: Vec<[u32; 1]> = rows.iter().map(|&(_, token)| [token]).collect();
        let lent = self.lend(rows)?.into_iter();
        let mut batch: Vec<_> = lent.zip(tokens.iter().map(|token| &token[..])).collect();
        if engine.model().device().is_cpu() {
            return Ok(engine.forward(&mut batch, Want::Last)?);
        }
        // Other devices run one sequence at a time.
        let mut logits = Vec::new();
        for row in batch {
            logits.extend(engine.forward(&mut [row], Want::Last)?);
        }
        Ok(logits)
    }

    fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        let fork = Slot::Own(Box::new(self.get(seq)?.fork()));
        let free = self.slots.iter().position(|slot| slot.get().is_none());
        let index = match free {
            Some(index) => {
                self.slots[index] = fork;
                index
            }
            None => {
                self.slots.push(fork);
                self.slots.len() - 1
            }
        };
        Ok(SeqId(index as u32))
    }

    fn commit(&mut self, seq: SeqId) -> Result<()> {
        self.get_mut(seq)?.commit();
        Ok(())
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        let engine = self.engine;
        Ok(engine.truncate(self.get_mut(seq)?, len)?)
    }

    fn release(&mut self, seq: SeqId) {
        // The root is the caller's.
        if seq != Self::ROOT
            && let Some(slot @ Slot::Own(_)) = self.slots.get_mut(seq.0 as usize)
        {
            *slot = Slot::Free;
        }
    }

    fn replace(&mut self, seq: SeqId, by: SeqId) -> Result<()> {
        self.get(seq)?;
        let index = by.0 as usize;
        match self
            .slots
            .get_mut(index)
            .map(|s| std::mem::replace(s, Slot::Free))
        {
            Some(Slot::Own(sequence)) => {
                *self.get_mut(seq)? = *sequence;
                Ok(())
            }
            Some(root @ Slot::Root(_)) => {
                self.slots[index] = root;
                Err(DecodeError::Refused(
                    "the session's root cannot be given up for another sequence".into(),
                ))
            }
            Some(Slot::Free) | None => Err(unknown(by)),
        }
    }

    fn step_tree(&mut self, seq: SeqId, tree: &DraftTree) -> Result<Vec<f32>> {
        self.forget_pending();
        let (logits, state) = if self.one_pass(seq)? {
            let engine = self.engine;
            let (logits, rows) = tree_forward(engine, self.get_mut(seq)?, tree)?;
            (logits, PendingState::Rows(rows))
        } else {
            let (forks, logits) = ForkedTree::step(self, seq, tree)?;
            (logits, PendingState::Forks(forks))
        };
        self.pending = Some(Pending {
            seq,
            tree: tree.clone(),
            state,
        });
        Ok(logits)
    }

    fn commit_path(&mut self, seq: SeqId, nodes: &[u32]) -> Result<()> {
        let Some(pending) = self.pending.take_if(|pending| pending.seq == seq) else {
            return Err(DecodeError::Refused(format!(
                "sequence {} has no tree to commit a path of",
                seq.0
            )));
        };
        check_path(&pending.tree, nodes)?;
        match pending.state {
            PendingState::Forks(forks) => forks.commit(self, seq, nodes),
            PendingState::Rows(rows) => {
                rows.commit(self.get_mut(seq)?, &pending.tree, nodes);
                Ok(())
            }
        }
    }

    fn embedding(&mut self) -> Result<Option<EmbeddingTable>> {
        let model = self.engine.model();
        let config = model.config();
        let mut rows = Vec::with_capacity(config.vocab_size * config.hidden_size);
        let ids: Vec<u32> = (0..config.vocab_size as u32).collect();
        for ids in ids.chunks(4096) {
            let part = model
                .embed(ids)
                .and_then(|part| part.to_dtype(candle_core::DType::F32))
                .and_then(|part| part.to_device(&candle_core::Device::Cpu))
                .and_then(|part| with_rows(&part, |values| rows.extend_from_slice(values)));
            part.map_err(EngineError::from)?;
        }
        Ok(Some(EmbeddingTable::from_f32(rows, config.hidden_size)))
    }
}

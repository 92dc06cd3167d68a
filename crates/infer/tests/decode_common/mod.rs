//! A toy language model for the tests of decoding: logits are sums of table rows, so nothing but the
//! strategies is on trial. It stands behind the same seam as the engine.
#![allow(dead_code)]

use longspan_infer::decode::diversity::EmbeddingTable;
use longspan_infer::decode::session::{ForkedTree, Result, SessionLimits, check_path};
use longspan_infer::decode::{
    Choice, DecodeError, DecodeSession, DraftTree, Event, Outcome, Request, SeqId, Strategy, run,
};
use std::ops::ControlFlow;

/// Logits after tokens c, t = len - 1: t1[c[t]] + t2[c[t-1] or 0] + pos[t mod P].
#[derive(Clone)]
pub struct Table {
    pub vocab: usize,
    pub t1: Vec<f64>,
    pub t2: Vec<f64>,
    pub pos: Vec<f64>,
    pub embedding: Option<EmbeddingTable>,
}

impl Table {
    /// Pseudo-random tables; `sharp` scales the logits.
    pub fn random(vocab: usize, periods: usize, seed: u64, sharp: f64) -> Table {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move || {
            // Splitmix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
        };
        let mut values = |count: usize| (0..count).map(|_| next() * sharp).collect();
        Table {
            vocab,
            t1: values(vocab * vocab),
            t2: values(vocab * vocab),
            pos: values(periods * vocab),
            embedding: None,
        }
    }

    pub fn logits(&self, tokens: &[u32]) -> Vec<f64> {
        let v = self.vocab;
        let t = tokens.len() - 1;
        let last = tokens[t] as usize;
        let before = if t > 0 { tokens[t - 1] as usize } else { 0 };
        let row = t % (self.pos.len() / v);
        (0..v)
            .map(|i| self.t1[last * v + i] + self.t2[before * v + i] + self.pos[row * v + i])
            .collect()
    }

    /// The same in f32 arithmetic, as a model gives it.
    pub fn logits_f32(&self, tokens: &[u32]) -> Vec<f32> {
        let v = self.vocab;
        let t = tokens.len() - 1;
        let last = tokens[t] as usize;
        let before = if t > 0 { tokens[t - 1] as usize } else { 0 };
        let row = t % (self.pos.len() / v);
        (0..v)
            .map(|i| {
                self.t1[last * v + i] as f32
                    + self.t2[before * v + i] as f32
                    + self.pos[row * v + i] as f32
            })
            .collect()
    }

    pub fn log_softmax(&self, tokens: &[u32]) -> Vec<f64> {
        let logits = self.logits(tokens);
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        logits.iter().map(|l| l - total).collect()
    }

    /// Plain greedy decoding without any strategy.
    pub fn greedy(&self, prompt: &[u32], eos: &[u32], max_tokens: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        while tokens.len() < prompt.len() + max_tokens {
            let logits = self.logits_f32(&tokens);
            let mut best = 0;
            for (index, &logit) in logits.iter().enumerate() {
                if logit > logits[best] {
                    best = index;
                }
            }
            tokens.push(best as u32);
            if eos.contains(&(best as u32)) {
                break;
            }
        }
        tokens.split_off(prompt.len())
    }
}

/// One call that reached the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Step(Vec<(SeqId, u32)>),
    Tree(DraftTree),
    Commit(Vec<u32>),
}

/// A session over a [`Table`], with a log of calls.
pub struct TableSession {
    pub table: Table,
    pub seqs: Vec<Option<Vec<u32>>>,
    pub calls: Vec<Call>,
    pub naive_trees: bool,
    pending: Option<(SeqId, DraftTree, Option<ForkedTree>)>,
}

impl TableSession {
    pub fn new(table: Table, prompt: &[u32]) -> TableSession {
        TableSession {
            table,
            seqs: vec![Some(prompt.to_vec())],
            calls: Vec::new(),
            naive_trees: false,
            pending: None,
        }
    }

    pub fn live(&self) -> usize {
        self.seqs.iter().flatten().count()
    }

    fn get(&self, seq: SeqId) -> &Vec<u32> {
        self.seqs[seq.0 as usize].as_ref().expect("a live sequence")
    }

    fn get_mut(&mut self, seq: SeqId) -> &mut Vec<u32> {
        self.seqs[seq.0 as usize].as_mut().expect("a live sequence")
    }

    /// Runs a strategy to its end on sequence 0; what was emitted, and the outcome.
    pub fn decode(
        &mut self,
        strategy: &mut dyn Strategy,
        eos: &[u32],
        max_tokens: usize,
    ) -> (Vec<Choice>, Outcome) {
        let request = Request {
            seq: SeqId(0),
            eos: eos.to_vec(),
            max_tokens,
        };
        let logits = self.table.logits_f32(self.get(SeqId(0)));
        let mut emitted = Vec::new();
        let mut emit = |event: Event| {
            if let Event::Token(choice) = event {
                emitted.push(choice);
            }
            ControlFlow::Continue(())
        };
        let outcome = run(self, strategy, &request, logits, &mut emit).unwrap();
        assert_eq!(self.live(), 1, "sequences were not freed");
        (emitted, outcome)
    }
}

pub fn tokens(choices: &[Choice]) -> Vec<u32> {
    choices.iter().map(|choice| choice.token).collect()
}

impl DecodeSession for TableSession {
    fn vocab_size(&self) -> usize {
        self.table.vocab
    }

    fn limits(&self) -> SessionLimits {
        SessionLimits {
            one_pass_tree: true,
            most_tree_nodes: usize::MAX,
        }
    }

    fn tokens(&self, seq: SeqId) -> &[u32] {
        self.get(seq)
    }

    fn step(&mut self, rows: &[(SeqId, u32)]) -> Result<Vec<f32>> {
        let mut seen: Vec<SeqId> = rows.iter().map(|&(seq, _)| seq).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(
            seen.len(),
            rows.len(),
            "a sequence has two rows of one step"
        );
        self.calls.push(Call::Step(rows.to_vec()));
        let mut logits = Vec::new();
        for &(seq, token) in rows {
            self.get_mut(seq).push(token);
            logits.extend(self.table.logits_f32(self.get(seq)));
        }
        Ok(logits)
    }

    fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        let copy = Some(self.get(seq).clone());
        let free = self.seqs.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.seqs.push(None);
            self.seqs.len() - 1
        });
        self.seqs[index] = copy;
        Ok(SeqId(index as u32))
    }

    fn commit(&mut self, _seq: SeqId) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.get_mut(seq).truncate(len);
        Ok(())
    }

    fn release(&mut self, seq: SeqId) {
        assert!(seq != SeqId(0), "the root is the caller's");
        let freed = self.seqs[seq.0 as usize].take();
        assert!(freed.is_some(), "a sequence was freed twice");
    }

    fn replace(&mut self, seq: SeqId, by: SeqId) -> Result<()> {
        let tokens = self.seqs[by.0 as usize].take();
        *self.get_mut(seq) = tokens.expect("a live sequence");
        Ok(())
    }

    fn step_tree(&mut self, seq: SeqId, tree: &DraftTree) -> Result<Vec<f32>> {
        self.calls.push(Call::Tree(tree.clone()));
        if self.naive_trees {
            let (forks, logits) = ForkedTree::step(self, seq, tree)?;
            self.pending = Some((seq, tree.clone(), Some(forks)));
            return Ok(logits);
        }
        let mut logits = Vec::new();
        for node in 0..tree.len() as u32 {
            let mut tokens = self.get(seq).clone();
            let path = tree.path(node);
            tokens.extend(path.iter().map(|&n| tree.tokens()[n as usize]));
            logits.extend(self.table.logits_f32(&tokens));
        }
        self.pending = Some((seq, tree.clone(), None));
        Ok(logits)
    }

    fn commit_path(&mut self, seq: SeqId, nodes: &[u32]) -> Result<()> {
        self.calls.push(Call::Commit(nodes.to_vec()));
        let Some((of, tree, forks)) = self.pending.take() else {
            return Err(DecodeError::Refused("no tree".into()));
        };
        assert_eq!(of, seq);
        check_path(&tree, nodes)?;
        match forks {
            Some(forks) => forks.commit(self, seq, nodes),
            None => {
                let path = nodes.iter().map(|&n| tree.tokens()[n as usize]);
                self.get_mut(seq).extend(path);
                Ok(())
            }
        }
    }

    fn embedding(&mut self) -> Result<Option<EmbeddingTable>> {
        Ok(self.table.embedding.clone())
    }
}

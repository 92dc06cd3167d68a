//! Prefix reuse in memory: sequences that were read before, found again by their tokens.

use crate::engine::{Engine, Result, Sequence};

/// Sequences kept for reuse, most recently used last, within a limit of memory.
pub struct PrefixCache {
    kept: Vec<Sequence>,
    limit_bytes: u64,
}

impl PrefixCache {
    /// Keeps at most `limit_bytes` of keys and values in memory.
    pub fn new(limit_bytes: u64) -> Self {
        PrefixCache {
            kept: Vec::new(),
            limit_bytes,
        }
    }

    /// A fork of the kept sequence that shares the longest prefix with `tokens`, cut to it and at
    /// least one token short of it (so that there are logits to compute); None if none does.
    /// Policies that forget are reused only where a kept sequence is a prefix as a whole.
    pub fn find(
        &mut self,
        engine: &Engine,
        tokens: &[u32],
        same: impl Fn(&Sequence) -> bool,
    ) -> Result<Option<Sequence>> {
        let usable = |sequence: &Sequence| {
            let common = sequence
                .tokens()
                .iter()
                .zip(tokens)
                .take_while(|(a, b)| a == b)
                .count();
            let common = common.min(tokens.len().saturating_sub(1));
            if common == sequence.len() || sequence.spec().rewinds {
                common
            } else {
                0
            }
        };
        let best = self
            .kept
            .iter()
            .enumerate()
            .filter(|(_, sequence)| same(sequence))
            .max_by_key(|(_, sequence)| usable(sequence));
        let Some((index, common)) = best
            .map(|(index, sequence)| (index, usable(sequence)))
            .filter(|&(_, common)| common > 0)
        else {
            return Ok(None);
        };
        let sequence = self.kept.remove(index);
        let mut fork = sequence.fork();
        self.kept.push(sequence);
        match engine.truncate(&mut fork, common) {
            Ok(()) => {
                // The text to come is another one.
                fork.expect_length(0);
                Ok(Some(fork))
            }
            // A model with sliding layers has dropped what a cut would need.
            Err(crate::EngineError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps a sequence; the least recently used leave when memory is short.
    pub fn keep(&mut self, sequence: Sequence) {
        self.kept.retain(|kept| {
            !sequence.tokens().starts_with(kept.tokens())
                || kept.options().context != sequence.options().context
        });
        self.kept.push(sequence);
        let mut bytes: u64 = self
            .kept
            .iter()
            .map(|sequence| sequence.kv_bytes().memory)
            .sum();
        while bytes > self.limit_bytes && !self.kept.is_empty() {
            bytes -= self.kept.remove(0).kv_bytes().memory;
        }
    }

    /// Number of sequences kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// True if nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

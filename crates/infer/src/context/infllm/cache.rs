//! Which blocks of a layer are in fast memory, and which leaves next (InfLLM, section "offload").

use super::{Evict, InfLlmConfig};
use crate::kv::KvStore;
use std::io;
use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) block: usize,
    /// Stamp of the last pick (lru) or decayed attention received (lru-s).
    pub(super) rank: f32,
}

/// Resident blocks in the order they were loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct BlockCache {
    pub(super) entries: Vec<Entry>,
    pub(super) calls: u64,
    pub(super) loads: u64,
    pub(super) hits: u64,
}

impl BlockCache {
    pub(super) fn blocks(&self) -> Vec<usize> {
        self.entries.iter().map(|entry| entry.block).collect()
    }

    /// Makes room for the picks (ascending), loads those that are missing and refreshes all.
    /// Ties go to the block resident longest; a pick never leaves.
    pub(super) fn admit(
        &mut self,
        layer: usize,
        picks: &[usize],
        st: u64,
        config: &InfLlmConfig,
        store: &mut KvStore,
    ) -> io::Result<()> {
        self.calls += 1;
        let missing: Vec<usize> = picks
            .iter()
            .copied()
            .filter(|&block| self.entries.iter().all(|entry| entry.block != block))
            .collect();
        self.hits += (picks.len() - missing.len()) as u64;
        self.loads += missing.len() as u64;
        // With one pick per head the union may exceed the limit; it must be resident all the same.
        let limit = config.max_cached.max(picks.len());
        let surplus = (self.entries.len() + missing.len()).saturating_sub(limit);
        for _ in 0..surplus {
            let victim = self
                .entries
                .iter()
                .enumerate()
                .filter(|(_, entry)| picks.binary_search(&entry.block).is_err())
                .min_by(|(a_at, a), (b_at, b)| a.rank.total_cmp(&b.rank).then(a_at.cmp(b_at)))
                .map(|(at, _)| at)
                .expect("more blocks are resident than are picked");
            let block = self.entries.remove(victim).block;
            self.settle(layer, tokens(block, config), st, config, store)?;
        }
        for &block in &missing {
            self.entries.push(Entry { block, rank: 0.0 });
            store.promote(layer, tokens(block, config))?;
        }
        let rank = match config.evict {
            Evict::Lru => self.calls as f32,
            Evict::LruS => 0.0,
        };
        for entry in &mut self.entries {
            if picks.binary_search(&entry.block).is_ok() {
                entry.rank = rank;
            }
        }
        Ok(())
    }

    /// lru-s: every rank decays, then grows by the attention its block received.
    pub(super) fn receive(&mut self, decay: f32, received: &[(u64, f32)]) {
        for entry in &mut self.entries {
            entry.rank *= decay;
            if let Some((_, sum)) = received
                .iter()
                .find(|(block, _)| *block == entry.block as u64)
            {
                entry.rank += sum;
            }
        }
    }

    /// Moves the pages that hold these tokens to the disk tier, unless a resident block or a
    /// token not yet in a block shares them.
    pub(super) fn settle(
        &self,
        layer: usize,
        range: Range<u64>,
        st: u64,
        config: &InfLlmConfig,
        store: &mut KvStore,
    ) -> io::Result<()> {
        let mut token = range.start;
        while token < range.end {
            let page = store.page_of(token);
            let resident = |entry: &Entry| {
                let block = tokens(entry.block, config);
                block.start < page.end && page.start < block.end
            };
            if page.end <= st && page.start >= config.n_init && !self.entries.iter().any(resident) {
                store.demote(layer, page.clone())?;
            }
            token = page.end;
        }
        Ok(())
    }
}

fn tokens(block: usize, config: &InfLlmConfig) -> Range<u64> {
    let start = config.n_init + block as u64 * config.block;
    start..start + config.block
}

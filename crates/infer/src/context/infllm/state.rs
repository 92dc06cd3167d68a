//! InfLLM's state as bytes, for saved sessions: little-endian, one record per layer.

use super::cache::{BlockCache, Entry};
use super::{InfLlm, LayerState};
use crate::wire::{read_f32s, read_u64, write_f32s, write_u64};
use std::io::{self, Read, Write};

pub(super) fn save(policy: &InfLlm, out: &mut dyn Write) -> io::Result<()> {
    write_u64(out, policy.layers.len() as u64)?;
    write_u64(out, policy.report.loads)?;
    write_u64(out, policy.report.hits)?;
    for layer in &policy.layers {
        for value in [
            layer.n0,
            layer.st,
            layer.blocks as u64,
            layer.scores.len() as u64,
        ] {
            write_u64(out, value)?;
        }
        for scores in &layer.scores {
            write_f32s(out, scores)?;
        }
        write_f32s(out, &layer.repr)?;
        write_u64(out, layer.cache.calls)?;
        write_u64(out, layer.cache.entries.len() as u64)?;
        for entry in &layer.cache.entries {
            write_u64(out, entry.block as u64)?;
            write_f32s(out, &[entry.rank])?;
        }
    }
    Ok(())
}

pub(super) fn load(policy: &mut InfLlm, input: &mut dyn Read) -> io::Result<()> {
    let wrong = |what: &str, found: u64| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("InfLLM state: {what} is {found}, which is impossible"),
        )
    };
    let count = read_u64(input)?;
    if count > 10_000 {
        return Err(wrong("the number of layers", count));
    }
    policy.report.loads = read_u64(input)?;
    policy.report.hits = read_u64(input)?;
    let mut layers = Vec::new();
    for _ in 0..count {
        let (n0, st, blocks, heads) = (
            read_u64(input)?,
            read_u64(input)?,
            read_u64(input)?,
            read_u64(input)?,
        );
        if heads > 10_000 {
            return Err(wrong("the number of heads", heads));
        }
        if n0 > policy.config.n_init
            || Some(st)
                != blocks
                    .checked_mul(policy.config.block)
                    .and_then(|b| b.checked_add(n0))
        {
            return Err(wrong("the first free token", st));
        }
        let scores = (0..heads)
            .map(|_| read_f32s(input))
            .collect::<io::Result<Vec<_>>>()?;
        let repr = read_f32s(input)?;
        if blocks > 0 && (!(repr.len() as u64).is_multiple_of(blocks) || repr.is_empty()) {
            return Err(wrong("the number of blocks", blocks));
        }
        let mut cache = BlockCache {
            calls: read_u64(input)?,
            ..BlockCache::default()
        };
        let entries = read_u64(input)?;
        if entries > blocks {
            return Err(wrong("the number of resident blocks", entries));
        }
        for _ in 0..entries {
            let block = read_u64(input)?;
            let rank = read_f32s(input)?;
            if block >= blocks || rank.len() != 1 {
                return Err(wrong("a resident block", block));
            }
            cache.entries.push(Entry {
                block: block as usize,
                rank: rank[0],
            });
        }
        layers.push(LayerState {
            n0,
            st,
            scores,
            repr,
            blocks: blocks as usize,
            cache,
            ..LayerState::default()
        });
    }
    policy.layers = layers;
    Ok(())
}

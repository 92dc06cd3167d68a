//! The index of a sealed prefix as bytes, for saved sessions.

use super::{Cached, Clusters, Index, Squeezed, Thresholds};
use crate::context::{read_lists, write_lists};
use crate::wire::{read_f32s, read_u64, write_f32s, write_u64};
use std::io::{self, Read, Write};
use std::sync::Arc;

pub(super) fn save(policy: &Squeezed, out: &mut dyn Write) -> io::Result<()> {
    for value in [
        policy.num_heads as u64,
        policy.scored,
        policy.offered,
        policy.taken,
    ] {
        write_u64(out, value)?;
    }
    write_f32s(out, &[policy.scale])?;
    write_u64(out, policy.queries.len() as u64)?;
    for rows in &policy.queries {
        write_f32s(out, rows)?;
    }
    let Some(index) = &policy.index else {
        return write_u64(out, 0);
    };
    write_u64(out, 1)?;
    write_u64(out, index.prefix)?;
    write_u64(out, index.sinks)?;
    write_u64(out, index.clustered)?;
    let levels = [index.thresholds, index.shared];
    let thresholds = levels.map(|t| std::iter::once(t.fine).chain(t.coarse));
    write_f32s(out, &thresholds.into_iter().flatten().collect::<Vec<_>>())?;
    write_u64(out, u64::from(index.exact))?;
    write_u64(out, index.clusters.len() as u64)?;
    for layer in &index.clusters {
        write_u64(out, layer.len() as u64)?;
        for clusters in layer {
            write_f32s(out, &clusters.centroids)?;
            write_starts(out, &clusters.starts)?;
            write_f32s(out, &clusters.coarse)?;
            write_starts(out, &clusters.coarse_starts)?;
        }
    }
    for cached in &policy.cached {
        write_u64(out, cached.next)?;
        write_u64(out, cached.age)?;
        write_lists(out, &cached.slots)?;
    }
    Ok(())
}

pub(super) fn load(policy: &mut Squeezed, input: &mut dyn Read) -> io::Result<()> {
    policy.num_heads = read_u64(input)? as usize;
    policy.scored = read_u64(input)?;
    policy.offered = read_u64(input)?;
    policy.taken = read_u64(input)?;
    policy.scale = *read_f32s(input)?
        .first()
        .ok_or_else(|| wrong("the scale is missing"))?;
    policy.queries.clear();
    for _ in 0..read_u64(input)? {
        policy.queries.push(read_f32s(input)?);
    }
    policy.index = None;
    policy.cached.clear();
    if read_u64(input)? == 0 {
        return Ok(());
    }
    let (prefix, sinks, clustered) = (read_u64(input)?, read_u64(input)?, read_u64(input)?);
    let thresholds = read_f32s(input)?;
    let levels = 1 + usize::from(policy.config.lower.is_some());
    if clustered > prefix || sinks > clustered || thresholds.len() != 2 * levels {
        return Err(wrong(&format!(
            "{clustered} of {prefix} tokens are clustered with {} thresholds, expected {}",
            thresholds.len(),
            2 * levels
        )));
    }
    let of = |values: &[f32]| Thresholds {
        fine: values[0],
        coarse: values.get(1).copied(),
    };
    // As they were compared when they were made.
    let exact = read_u64(input)? == 1;
    let mut layers = Vec::new();
    for _ in 0..read_u64(input)? {
        let mut layer = Vec::new();
        for _ in 0..read_u64(input)? {
            let clusters = Clusters {
                centroids: read_f32s(input)?,
                starts: read_starts(input)?,
                coarse: read_f32s(input)?,
                coarse_starts: read_starts(input)?,
                ..Clusters::default()
            };
            let count = clusters.starts.len().saturating_sub(1);
            let coarse = clusters.coarse_starts.len().saturating_sub(1);
            let dim = clusters.centroids.len() / count.max(1);
            let sound = dim > 0
                && clusters.centroids.len() == count * dim
                && clusters.coarse.len() == coarse * dim
                && clusters.starts.last() == Some(&((clustered - sinks) as u32))
                && (coarse == 0) == (levels == 1)
                && clusters
                    .coarse_starts
                    .last()
                    .is_none_or(|&end| end == count as u32);
            if !sound {
                return Err(wrong(&format!(
                    "{count} clusters in {coarse} coarse ones do not fit {clustered} tokens"
                )));
            }
            layer.push(clusters.with_panels(dim, exact));
        }
        layers.push(layer);
    }
    for _ in 0..layers.len() {
        let cached = Cached {
            next: read_u64(input)?,
            age: read_u64(input)?,
            slots: read_lists(input)?,
            copies: None,
        };
        if let Some(range) = cached.slots.iter().flatten().find(|r| r.end > clustered) {
            return Err(wrong(&format!("slots {range:?} are chosen of {clustered}")));
        }
        policy.cached.push(cached);
    }
    policy.index = Some(Arc::new(Index {
        prefix,
        sinks,
        clustered,
        thresholds: of(&thresholds[..levels]),
        shared: of(&thresholds[levels..]),
        exact,
        clusters: layers,
    }));
    Ok(())
}

fn write_starts(out: &mut dyn Write, starts: &[u32]) -> io::Result<()> {
    write_u64(out, starts.len() as u64)?;
    starts
        .iter()
        .try_for_each(|start| out.write_all(&start.to_le_bytes()))
}

/// Ascending numbers.
fn read_starts(input: &mut dyn Read) -> io::Result<Vec<u32>> {
    let mut starts = Vec::new();
    for _ in 0..read_u64(input)? {
        let mut bytes = [0; 4];
        input.read_exact(&mut bytes)?;
        let start = u32::from_le_bytes(bytes);
        if starts.last().is_some_and(|&last| start < last) {
            return Err(wrong("the clusters are out of order"));
        }
        starts.push(start);
    }
    Ok(starts)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("Squeezed Attention's state: {what}"),
    )
}

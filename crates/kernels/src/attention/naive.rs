//! The twin of the fast kernels: what attention means, in plain f64 loops.

use super::{Attention, AttentionOutput, PAGE, Tile, Tiles};

/// [`super::attention`] as its definition says, one query, head and key at a time.
///
/// # Panics
/// When [`Attention::check`] refuses the arguments.
pub fn attention_naive(args: &Attention, out: &mut [f32]) -> AttentionOutput {
    args.check(out.len()).expect("sound attention arguments");
    let (dim, heads) = (args.layout.head_dim, args.num_heads);
    let mut column_sums: Vec<Option<Vec<f64>>> = (args.parts.iter())
        .map(|part| match part.tiles {
            Tiles::Shared(tiles) if part.column_sums => Some(vec![0.0; heads * tiles.len() * PAGE]),
            _ => None,
        })
        .collect();
    let mut lse = vec![f32::NEG_INFINITY; args.queries * heads];
    let mut key = vec![0f32; dim];
    out.fill(0.0);
    for t in 0..args.queries {
        for head in 0..heads {
            let kv_head = head / args.group();
            let at = (t * heads + head) * dim;
            // (logit, part, tile index, slot) of each visible key.
            let mut seen: Vec<(f64, usize, usize, usize)> = Vec::new();
            for (index, part) in args.parts.iter().enumerate() {
                let query = &part.query[at..at + dim];
                for (number, tile) in tiles_of(&part.tiles, head, kv_head).iter().enumerate() {
                    let (start, end) = part.mask.span(tile, args.query_start + t as u64);
                    for slot in start..end {
                        let slot = slot as usize;
                        args.layout.read_key(tile.keys, kv_head, slot, &mut key);
                        let dot: f64 = query
                            .iter()
                            .zip(&key)
                            .map(|(&q, &k)| f64::from(q) * f64::from(k))
                            .sum();
                        let mut logit = dot * f64::from(args.scale);
                        if let Some(cap) = args.softcap {
                            logit = f64::from(cap) * (logit / f64::from(cap)).tanh();
                        }
                        if let Some(alibi) = &part.alibi {
                            let query = args.query_start + t as u64;
                            logit += alibi.bias(head, query, tile.first + slot as u64);
                        }
                        seen.push((logit, index, number, slot));
                    }
                }
            }
            if seen.is_empty() {
                continue;
            }
            let max = seen
                .iter()
                .fold(f64::NEG_INFINITY, |max, key| max.max(key.0));
            let total: f64 = seen.iter().map(|key| (key.0 - max).exp()).sum();
            lse[t * heads + head] = (max + total.ln()) as f32;
            let mut sum = vec![0f64; dim];
            let mut value = vec![0f32; dim];
            for (logit, index, number, slot) in seen {
                let probability = (logit - max).exp() / total;
                let tiles = tiles_of(&args.parts[index].tiles, head, kv_head);
                args.layout
                    .read_value(tiles[number].values, kv_head, slot, &mut value);
                for (sum, &v) in sum.iter_mut().zip(&value) {
                    *sum += probability * f64::from(v);
                }
                if let Some(columns) = &mut column_sums[index] {
                    columns[(head * tiles.len() + number) * PAGE + slot] += probability;
                }
            }
            for (x, sum) in out[at..at + dim].iter_mut().zip(sum) {
                *x = sum as f32;
            }
        }
    }
    let column_sums = (column_sums.into_iter())
        .map(|sums| sums.map(|sums| sums.into_iter().map(|x| x as f32).collect()))
        .collect();
    AttentionOutput { column_sums, lse }
}

fn tiles_of<'a>(tiles: &Tiles<'a>, head: usize, kv_head: usize) -> &'a [Tile<'a>] {
    match *tiles {
        Tiles::Shared(tiles) => tiles,
        Tiles::PerKvHead(lists) => &lists[kv_head],
        Tiles::PerQueryHead(lists) => &lists[head],
    }
}

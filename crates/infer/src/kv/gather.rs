//! Scattered keys and values copied to whole pages of their own, for policies that pick tokens one
//! by one: the copy is paid once and read by every query, and every head, that shares the pick.

use super::{KeyForm, KvStore};
use crate::kv::plane::AlignedBytes;
use longspan_kernels::attention::{PAGE, Tile};
use longspan_kernels::pool::{Pool, SharedMut};
use longspan_kernels::slots::Run;
use std::io;
use std::ops::Range;

/// Copies of some tokens' keys and values, a list for each query head, or for each kv head.
pub struct Gathered {
    /// Which tokens, [num_heads] or [num_kv_heads] lists of ranges.
    pub tokens: Vec<Vec<Range<u64>>>,
    /// Tokens of each list.
    counts: Vec<usize>,
    /// Lists per kv head: the pages of the j-th of every group lie in set j.
    group: usize,
    /// [group][pages]: planes of keys and of values.
    sets: Vec<Vec<[AlignedBytes; 2]>>,
}

impl Gathered {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let planes = self.sets.iter().flatten().flatten();
        planes.map(|plane| plane.as_slice().len() as u64).sum()
    }

    /// The pages of each list, for the attention kernel. Their positions mean nothing.
    pub(crate) fn tiles(&self) -> Vec<Vec<Tile<'_>>> {
        let tiles = |(head, &count): (usize, &usize)| {
            let pages = self.sets[head % self.group].iter();
            let used = pages.take(count.div_ceil(PAGE)).enumerate();
            used.map(|(index, [keys, values])| Tile {
                keys: keys.as_slice(),
                values: values.as_slice(),
                first: 0,
                lo: 0,
                hi: (count - index * PAGE).min(PAGE) as u8,
            })
            .collect()
        };
        self.counts.iter().enumerate().map(tiles).collect()
    }
}

impl KvStore {
    /// Copies tokens, one list of ranges (ascending, disjoint) for each query head or kv head. Errors if a
    /// plane was dropped or fails its checksum.
    pub fn gather(
        &self,
        layer: usize,
        tokens: Vec<Vec<Range<u64>>>,
        form: KeyForm,
    ) -> io::Result<Gathered> {
        let layout = self.layout();
        let group = (tokens.len() / layout.num_kv_heads).max(1);
        let count = |ranges: &Vec<Range<u64>>| -> usize {
            ranges.iter().map(|r| (r.end - r.start) as usize).sum()
        };
        let len = self.len(layer);
        if let Some(range) = tokens.iter().flatten().find(|range| range.end > len) {
            return Err(io::Error::other(format!(
                "layer {layer}: tokens {range:?} are asked for, {len} are there"
            )));
        }
        let counts: Vec<usize> = tokens.iter().map(count).collect();
        let plane = || AlignedBytes::zeroed(layout.plane_bytes());
        let mut sets: Vec<Vec<[AlignedBytes; 2]>> = (0..group)
            .map(|set| {
                let most = counts.iter().skip(set).step_by(group).max();
                let pages = most.copied().unwrap_or(0).div_ceil(PAGE);
                (0..pages).map(|_| [plane(), plane()]).collect()
            })
            .collect();
        // Each head writes its own section of the pages of its set.
        let shared: Vec<Vec<[SharedMut<u8>; 2]>> = sets
            .iter_mut()
            .map(|pages| {
                let pages = pages.iter_mut();
                pages
                    .map(|planes| planes.each_mut().map(|p| SharedMut::new(p.as_mut_slice())))
                    .collect()
            })
            .collect();
        let mut results: Vec<io::Result<()>> = tokens.iter().map(|_| Ok(())).collect();
        let slots = SharedMut::new(&mut results);
        let copy = |head: usize| {
            let section = layout.section(head / group);
            let pages = &shared[head % group];
            let mut done = 0;
            let result = tokens[head].iter().try_for_each(|range| {
                self.runs(range.clone(), |page, slot, mut count| {
                    let (key, value) = self.planes_of(layer, page, form)?;
                    let (key, value) = (&key[section.clone()], &value[section.clone()]);
                    let mut from = slot;
                    while count > 0 {
                        let to = done % PAGE;
                        let run = Run {
                            from,
                            to,
                            count: count.min(PAGE - to),
                        };
                        let [keys, values] = &pages[done / PAGE];
                        // SAFETY: heads of one set have sections of their own.
                        let (keys, values) = unsafe {
                            (
                                keys.slice(section.start, section.len()),
                                values.slice(section.start, section.len()),
                            )
                        };
                        layout.copy_keys(key, keys, run);
                        layout.copy_values(value, values, run);
                        (done, from, count) =
                            (done + run.count, from + run.count, count - run.count);
                    }
                    Ok(())
                })
            });
            // SAFETY: each head has a slot of its own.
            unsafe { slots.slice(head, 1)[0] = result };
        };
        if counts.iter().sum::<usize>() > 4 * PAGE {
            Pool::global().for_each(tokens.len(), copy);
        } else {
            (0..tokens.len()).for_each(copy);
        }
        drop(shared);
        results.into_iter().collect::<io::Result<()>>()?;
        Ok(Gathered {
            tokens,
            counts,
            group,
            sets,
        })
    }

    /// Calls `f(page, slot, count)` for the pieces of a range that lie on one page each.
    fn runs(
        &self,
        range: Range<u64>,
        mut f: impl FnMut(usize, usize, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut token = range.start;
        while token < range.end {
            let (page, slot) = self.place(token);
            let end = self.tokens_of(page).end.min(range.end);
            f(page, slot, (end - token) as usize)?;
            token = end;
        }
        Ok(())
    }

    /// The bytes of a page's keys and values.
    pub(crate) fn planes_of(
        &self,
        layer: usize,
        index: usize,
        form: KeyForm,
    ) -> io::Result<(&[u8], &[u8])> {
        let page = self.layers[layer].pages.get(index);
        let key = page.and_then(|page| match form {
            KeyForm::Rotated => page.rotated.as_ref(),
            KeyForm::Raw => page.raw.as_ref(),
        });
        let value = page.and_then(|page| page.value.as_ref());
        let (Some(key), Some(value)) = (key, value) else {
            return Err(io::Error::other(format!(
                "layer {layer}: the {form:?} keys or the values of page {index} were released but are asked for"
            )));
        };
        key.verify()?;
        value.verify()?;
        Ok((key.bytes(), value.bytes()))
    }
}

//! The paged key/value store of one sequence.
//!
//! A page holds [`PAGE`] tokens of one layer in up to three planes: keys rotated at their true
//! positions, un-rotated keys (for policies that attend at other angles), and values. Pages are
//! reference-counted, so a fork copies page tables only; a shared page is copied before it is
//! written. Policies move, release and drop pages; tokens keep their absolute index for life,
//! unless a policy rearranges them: then what is called a token here is a slot.

pub mod gather;
pub mod plane;

pub use gather::Gathered;

use longspan_kernels::attention::{KvLayout, PAGE, Tile};
use longspan_kernels::pool::{Pool, SharedMut};
use longspan_kernels::slots::{Run, prefetch};
use plane::{AlignedBytes, Plane, TierFile};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Which keys a part of a plan reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyForm {
    /// Rotated at their true positions.
    Rotated,
    /// Not rotated, that is at angle zero.
    Raw,
}

/// The planes of one page; a page without a value plane has been dropped.
#[derive(Clone, Default)]
pub struct Page {
    /// Rotated keys.
    pub rotated: Option<Arc<Plane>>,
    /// Un-rotated keys.
    pub raw: Option<Arc<Plane>>,
    /// Values.
    pub value: Option<Arc<Plane>>,
}

impl Page {
    /// The planes present, in a fixed order.
    pub fn planes(&self) -> [&Option<Arc<Plane>>; 3] {
        [&self.rotated, &self.raw, &self.value]
    }
}

#[derive(Clone, Default)]
pub(crate) struct LayerPages {
    pub(crate) len: u64,
    pub(crate) pages: Vec<Page>,
    /// Rotated keys from this slot on stand at other angles than their slots.
    pub(crate) stale_from: Option<u64>,
}

/// Bytes held, by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvBytes {
    /// In memory.
    pub memory: u64,
    /// In the tier file.
    pub disk: u64,
}

/// Keys and values of one sequence, all layers. See the module's text.
#[derive(Clone)]
pub struct KvStore {
    layout: KvLayout,
    keep_raw: bool,
    /// Tokens of the first page, so that blocks counted from there fall on page borders.
    first_page: usize,
    pub(crate) layers: Vec<LayerPages>,
    tier: Option<Arc<TierFile>>,
}

impl KvStore {
    /// An empty store. `first_page` in 1..=PAGE; `keep_raw` also stores un-rotated keys.
    pub fn new(
        layout: KvLayout,
        layers: usize,
        keep_raw: bool,
        first_page: usize,
        tier: Option<Arc<TierFile>>,
    ) -> Self {
        assert!(
            (1..=PAGE).contains(&first_page),
            "first_page is {first_page}, expected 1..={PAGE}"
        );
        KvStore {
            layout,
            keep_raw,
            first_page,
            layers: vec![LayerPages::default(); layers],
            tier,
        }
    }

    /// Shape and type of the planes.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// True if un-rotated keys are stored.
    pub fn keeps_raw(&self) -> bool {
        self.keep_raw
    }

    /// Tokens of the first page.
    pub fn first_page(&self) -> usize {
        self.first_page
    }

    /// Tokens appended to a layer, dropped ones included; slots in use where a policy rearranges.
    pub fn len(&self, layer: usize) -> u64 {
        self.layers[layer].len
    }

    /// The file cold pages move to, if any.
    pub fn tier(&self) -> Option<&Arc<TierFile>> {
        self.tier.as_ref()
    }

    /// Page and slot of a token.
    pub fn place(&self, token: u64) -> (usize, usize) {
        let first = self.first_page as u64;
        if token < first {
            (0, token as usize)
        } else {
            (
                1 + ((token - first) / PAGE as u64) as usize,
                ((token - first) % PAGE as u64) as usize,
            )
        }
    }

    /// Tokens of a page.
    fn tokens_of(&self, page: usize) -> Range<u64> {
        let start = |page: usize| {
            if page == 0 {
                0
            } else {
                self.first_page as u64 + (page as u64 - 1) * PAGE as u64
            }
        };
        start(page)..start(page + 1)
    }

    /// The tokens that share a token's page.
    pub fn page_of(&self, token: u64) -> Range<u64> {
        self.tokens_of(self.place(token).0)
    }

    /// Pages that lie wholly inside a token range.
    fn whole_pages(&self, layer: usize, tokens: Range<u64>) -> Range<usize> {
        let (mut first, slot) = self.place(tokens.start);
        if slot > 0 {
            first += 1;
        }
        let end = self.place(tokens.end).0.min(self.layers[layer].pages.len());
        first.min(end)..end
    }

    /// Appends tokens to a layer: rows of [num_kv_heads head_dim] with the given strides.
    /// `raw` must be given exactly if the store keeps raw keys.
    pub fn append(
        &mut self,
        layer: usize,
        rotated: Rows<'_>,
        raw: Rows<'_>,
        values: Rows<'_>,
        count: usize,
    ) {
        let (layout, keep_raw, bytes) = (self.layout, self.keep_raw, self.layout.plane_bytes());
        if count == 0 {
            return;
        }
        let start = self.layers[layer].len;
        let (first, _) = self.place(start);
        let (last, _) = self.place(start + count as u64 - 1);
        // Of each page the slot and the row it begins with, and its rows.
        let mut pieces = Vec::with_capacity(last - first + 1);
        let mut done = 0;
        for page in first..=last {
            let slot = self.place(start + done as u64).1;
            let capacity = if page == 0 { self.first_page } else { PAGE };
            let n = (capacity - slot).min(count - done);
            pieces.push((slot, done, n));
            done += n;
        }
        let pages = &mut self.layers[layer].pages;
        pages.resize_with(pages.len().max(last + 1), Page::default);
        let pages = SharedMut::new(pages);
        Pool::global().for_each_in_runs(pieces.len(), |index| {
            let (slot, from, n) = pieces[index];
            // SAFETY: each page is one piece's.
            let page = &mut unsafe { pages.slice(first + index, 1) }[0];
            let keys = |plane: &mut Option<Arc<Plane>>, rows: Rows<'_>| {
                layout.write_keys(
                    writable(plane, bytes),
                    slot,
                    rows.from(from, n),
                    rows.stride,
                );
            };
            keys(&mut page.rotated, rotated);
            if keep_raw {
                keys(&mut page.raw, raw);
            }
            let to = writable(&mut page.value, bytes);
            layout.write_values(to, slot, values.from(from, n), values.stride);
        });
        self.layers[layer].len += count as u64;
    }

    /// Tiles that cover token ranges (ascending, disjoint), for the attention kernel. Errors if a
    /// plane was dropped (a policy's mistake) or fails its checksum.
    pub fn tiles(
        &self,
        layer: usize,
        ranges: &[Range<u64>],
        form: KeyForm,
    ) -> io::Result<Vec<Tile<'_>>> {
        let mut tiles = Vec::with_capacity(
            ranges
                .iter()
                .map(|r| (r.end.saturating_sub(r.start)) as usize / PAGE + 2)
                .sum(),
        );
        // Where the planes lie is a miss each: all are asked for at once.
        let pages = &self.layers[layer].pages;
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let touched = self.place(range.start).0..self.place(range.end - 1).0 + 1;
            for page in pages.get(touched).unwrap_or_default() {
                let keys = match form {
                    KeyForm::Rotated => &page.rotated,
                    KeyForm::Raw => &page.raw,
                };
                for plane in keys.iter().chain(&page.value) {
                    prefetch(Arc::as_ptr(plane));
                }
            }
        }
        for range in ranges {
            let mut token = range.start;
            while token < range.end {
                let (index, slot) = self.place(token);
                let tokens = self.tokens_of(index);
                let end = tokens.end.min(range.end);
                let page = self.layers[layer].pages.get(index);
                let key = page.and_then(|page| match form {
                    KeyForm::Rotated => page.rotated.as_ref(),
                    KeyForm::Raw => page.raw.as_ref(),
                });
                let value = page.and_then(|page| page.value.as_ref());
                let (Some(key), Some(value)) = (key, value) else {
                    return Err(io::Error::other(format!(
                        "layer {layer}: the {form:?} keys or the values of token {token} were released but are asked for"
                    )));
                };
                key.verify()?;
                value.verify()?;
                tiles.push(Tile {
                    keys: key.bytes(),
                    values: value.bytes(),
                    first: tokens.start,
                    lo: slot as u8,
                    hi: (slot as u64 + end - token) as u8,
                });
                token = end;
            }
        }
        Ok(tiles)
    }

    /// K planes of the pages that hold tokens 0..end; a dropped page's is empty. Errors if a plane
    /// fails its checksum.
    pub fn key_planes(&self, layer: usize, end: u64, form: KeyForm) -> io::Result<Vec<&[u8]>> {
        let count = end.checked_sub(1).map_or(0, |last| self.place(last).0 + 1);
        let pages = self.layers[layer].pages.iter().take(count);
        pages
            .map(|page| {
                let plane = match form {
                    KeyForm::Rotated => &page.rotated,
                    KeyForm::Raw => &page.raw,
                };
                let Some(plane) = plane else {
                    return Ok(&[][..]);
                };
                plane.verify()?;
                Ok(plane.bytes())
            })
            .collect()
    }

    /// Copies the un-rotated key of one token and head to `out` [head_dim].
    pub fn raw_key(
        &self,
        layer: usize,
        token: u64,
        kv_head: usize,
        out: &mut [f32],
    ) -> io::Result<()> {
        let (page, slot) = self.place(token);
        let Some(plane) = self.layers[layer]
            .pages
            .get(page)
            .and_then(|page| page.raw.as_ref())
        else {
            return Err(io::Error::other(format!(
                "layer {layer}: the raw key of token {token} is not kept"
            )));
        };
        plane.verify()?;
        self.layout.read_key(plane.bytes(), kv_head, slot, out);
        Ok(())
    }

    /// Frees the rotated keys of pages that lie wholly inside the range.
    pub fn release_rotated(&mut self, layer: usize, tokens: Range<u64>) {
        for page in self.whole_pages(layer, tokens) {
            self.layers[layer].pages[page].rotated = None;
        }
    }

    /// Drops pages that lie wholly inside the range: their tokens can never be attended again.
    pub fn drop_tokens(&mut self, layer: usize, tokens: Range<u64>) {
        for page in self.whole_pages(layer, tokens) {
            self.layers[layer].pages[page] = Page::default();
        }
    }

    /// Moves the raw keys and values of pages wholly inside the range to the tier file; pages
    /// loaded from a file just leave memory. Without a tier file the others stay.
    pub fn demote(&mut self, layer: usize, tokens: Range<u64>) -> io::Result<()> {
        for index in self.whole_pages(layer, tokens) {
            let page = &mut self.layers[layer].pages[index];
            for plane in [&mut page.raw, &mut page.value].into_iter().flatten() {
                let home = match &**plane {
                    Plane::Mapped(_) => continue,
                    Plane::Loaded(_, home) => home.clone(),
                    Plane::Heap(bytes) => match &self.tier {
                        Some(tier) => Arc::new(tier.append(bytes.as_slice())?),
                        None => continue,
                    },
                };
                *plane = home;
            }
        }
        Ok(())
    }

    /// Copies demoted planes of the pages that hold tokens of the range back into memory. Their
    /// copy in the file stays, so moving them out again is free.
    pub fn promote(&mut self, layer: usize, tokens: Range<u64>) -> io::Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        for index in self.place(tokens.start).0..=self.place(tokens.end - 1).0 {
            let Some(page) = self.layers[layer].pages.get_mut(index) else {
                break;
            };
            for plane in [&mut page.raw, &mut page.value].into_iter().flatten() {
                if plane.is_mapped() {
                    plane.verify()?;
                    *plane = Arc::new(Plane::Loaded(
                        AlignedBytes::copy_of(plane.bytes()),
                        plane.clone(),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Rearranges a layer: slot s of kv head h holds from now on what slot `order[h][s]` held, and
    /// slots past the lists' common length are free. With `renumber` the rotated keys of moved
    /// slots are then turned to the angles of their new slots (see [`KvStore::refresh`]).
    pub fn rearrange(
        &mut self,
        layer: usize,
        order: &[Vec<u64>],
        renumber: bool,
    ) -> io::Result<()> {
        let (layout, bytes) = (self.layout, self.layout.plane_bytes());
        let len = order.first().map_or(0, Vec::len);
        assert!(
            order.len() == layout.num_kv_heads && order.iter().all(|list| list.len() == len),
            "one list of {len} slots for each of {} kv heads",
            layout.num_kv_heads
        );
        let before = self.layers[layer].pages.clone();
        let mut pages = before.clone();
        pages.truncate(if len == 0 {
            0
        } else {
            self.place(len as u64 - 1).0 + 1
        });
        let mut first_moved = len;
        for (head, list) in order.iter().enumerate() {
            let section = layout.section(head);
            let mut slot = 0;
            while slot < len {
                if list[slot] == slot as u64 {
                    slot += 1;
                    continue;
                }
                first_moved = first_moved.min(slot);
                let ((from_page, from), (to_page, to)) =
                    (self.place(list[slot]), self.place(slot as u64));
                let room = (self.tokens_of(from_page).end - list[slot])
                    .min(self.tokens_of(to_page).end - slot as u64);
                let follows = (slot + 1..len.min(slot + room as usize))
                    .take_while(|&next| list[next] == list[slot] + (next - slot) as u64);
                let run = Run {
                    from,
                    to,
                    count: 1 + follows.count(),
                };
                let Some(source) = before.get(from_page) else {
                    return Err(io::Error::other(format!(
                        "layer {layer}: slot {} is moved but was never filled",
                        list[slot]
                    )));
                };
                let target = &mut pages[to_page];
                let key_planes = [
                    (&source.rotated, &mut target.rotated),
                    (&source.raw, &mut target.raw),
                ];
                for (from, to) in key_planes {
                    if let Some(from) = from {
                        from.verify()?;
                        layout.copy_keys(
                            &from.bytes()[section.clone()],
                            &mut writable(to, bytes)[section.clone()],
                            run,
                        );
                    }
                }
                if let Some(from) = &source.value {
                    from.verify()?;
                    layout.copy_values(
                        &from.bytes()[section.clone()],
                        &mut writable(&mut target.value, bytes)[section.clone()],
                        run,
                    );
                }
                slot += run.count;
            }
        }
        let layer = &mut self.layers[layer];
        layer.pages = pages;
        layer.len = len as u64;
        if renumber && first_moved < len {
            let first = first_moved as u64;
            layer.stale_from = Some(layer.stale_from.map_or(first, |stale| stale.min(first)));
        }
        Ok(())
    }

    /// Turns rotated keys that [`KvStore::rearrange`] moved to the angles of their slots:
    /// `rotate(slot, keys)` turns raw keys [num_kv_heads head_dim]. Needs raw keys.
    pub fn refresh(&mut self, layer: usize, rotate: impl Fn(u64, &mut [f32])) -> io::Result<()> {
        match self.layers[layer].stale_from.take() {
            Some(first) => self.rerotate(layer, first, rotate),
            None => Ok(()),
        }
    }

    /// Re-rotates every cached key of the pages from token `first` on, after its angle changed:
    /// `rotate(token, keys)` turns raw keys [num_kv_heads head_dim] into rotated ones. Needs raw
    /// keys.
    pub fn rerotate(
        &mut self,
        layer: usize,
        first: u64,
        rotate: impl Fn(u64, &mut [f32]),
    ) -> io::Result<()> {
        let (layout, bytes) = (self.layout, self.layout.plane_bytes());
        let width = layout.num_kv_heads * layout.head_dim;
        let mut rows = Vec::new();
        for index in self.place(first).0..self.layers[layer].pages.len() {
            let tokens = self.tokens_of(index);
            let end = tokens.end.min(self.layers[layer].len);
            let page = &mut self.layers[layer].pages[index];
            let (Some(raw), Some(_)) = (&page.raw, &page.rotated) else {
                continue;
            };
            raw.verify()?;
            rows.resize((end - tokens.start) as usize * width, 0.0);
            for (slot, row) in rows.chunks_exact_mut(width).enumerate() {
                for (head, key) in row.chunks_exact_mut(layout.head_dim).enumerate() {
                    layout.read_key(raw.bytes(), head, slot, key);
                }
                rotate(tokens.start + slot as u64, row);
            }
            layout.write_keys(writable(&mut page.rotated, bytes), 0, &rows, width);
        }
        Ok(())
    }

    /// Forgets tokens from `len` on. Their pages must not have been dropped.
    pub fn truncate(&mut self, len: u64) {
        let keep = if len == 0 {
            0
        } else {
            self.place(len - 1).0 + 1
        };
        for layer in &mut self.layers {
            layer.pages.truncate(keep);
            layer.len = layer.len.min(len);
        }
    }

    /// Bytes held now. A page shared with a fork counts in both.
    pub fn bytes(&self) -> KvBytes {
        let mut bytes = KvBytes::default();
        for plane in self
            .layers
            .iter()
            .flat_map(|layer| &layer.pages)
            .flat_map(Page::planes)
            .flatten()
        {
            let len = plane.bytes().len() as u64;
            if !plane.is_mapped() {
                bytes.memory += len;
            }
            if plane.place().is_some() {
                bytes.disk += len;
            }
        }
        bytes
    }
}

/// Rows of f32 with a stride: row i starts at `data[i * stride]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Elements from the first row on.
    pub data: &'a [f32],
    /// Distance between rows.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows `first .. first + count`: the slice ends at the last row's end or the data's.
    fn from(&self, first: usize, count: usize) -> &'a [f32] {
        &self.data[first * self.stride..((first + count) * self.stride).min(self.data.len())]
    }

    /// The rows from `count` on.
    pub fn skip(&self, count: usize) -> Rows<'a> {
        Rows {
            data: self.data.get(count * self.stride..).unwrap_or(&[]),
            stride: self.stride,
        }
    }

    /// Row i, `width` elements.
    pub fn row(&self, index: usize, width: usize) -> &'a [f32] {
        &self.data[index * self.stride..index * self.stride + width]
    }
}

/// The bytes of a plane for writing: on the heap and not shared, copied if need be.
fn writable(plane: &mut Option<Arc<Plane>>, bytes: usize) -> &mut [u8] {
    let plane = plane.get_or_insert_with(|| Arc::new(Plane::heap(bytes)));
    if !matches!(**plane, Plane::Heap(_)) || Arc::get_mut(plane).is_none() {
        *plane = Arc::new(Plane::Heap(AlignedBytes::copy_of(plane.bytes())));
    }
    match Arc::get_mut(plane) {
        Some(Plane::Heap(bytes)) => bytes.as_mut_slice(),
        _ => unreachable!("the plane was just made a heap plane of its own"),
    }
}

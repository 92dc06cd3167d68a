//! From GGUF blocks to panels: one pass over the file's bytes, in parallel over panels.
//!
//! The scales of the K types (super-block scale times integer scale) are folded into one f16 per
//! group. To keep them away from f16's subnormal numbers each row of a K type carries a power of
//! two, applied to the row's result: the largest scale of the row lies near 2^14, so a folded
//! scale is rounded by at most 2^-11 of itself, or by 2^-39 of the row's largest scale. The other
//! types keep their own f16 scales, exactly.

use super::format::{BLOCK, Format, GROUP, LANES};
use super::{MatrixSource, PackError, PackedMatrix};
use crate::pool::{Pool, SharedMut};
use crate::quant::{GgmlType, dequantize, five_bits, half_at, k4_scale_min, q3_k_scales};
use half::bf16;
use std::mem::MaybeUninit;

/// Rows of one source, packed: consecutive panels of one format.
#[derive(Debug)]
pub(super) struct Segment {
    pub format: Format,
    /// First output row.
    pub row: usize,
    /// Output rows; the last panel may be partly empty.
    pub rows: usize,
    /// First panel, counted over the whole matrix.
    pub panel: usize,
    /// Where that panel starts in the buffer.
    pub offset: usize,
}

/// Bytes aligned to cache lines, and to huge pages where that pays.
pub(super) struct Buffer {
    start: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: the buffer is plain memory owned by this value.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Memory whose content is undefined until it was written.
    fn new(bytes: usize) -> Self {
        const HUGE: usize = 2 << 20;
        let align = if bytes >= 2 * HUGE { HUGE } else { 64 };
        let layout = std::alloc::Layout::from_size_align(bytes.max(64), align).expect("checked");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { std::alloc::alloc(layout) };
        if start.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        #[cfg(target_os = "linux")]
        if align == HUGE {
            // SAFETY: advice about memory owned here; a refusal changes nothing.
            unsafe { libc::madvise(start.cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        Buffer { start, layout }
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.start
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

pub(super) fn pack(cols: usize, parts: &[MatrixSource]) -> Result<PackedMatrix, PackError> {
    if cols == 0 || parts.is_empty() {
        return Err(PackError::Empty {
            cols,
            parts: parts.len(),
        });
    }
    let too_large = |part: usize| PackError::TooLarge {
        part,
        rows: parts[part].rows,
        cols,
    };
    let blocks = cols.div_ceil(BLOCK);
    let (mut segments, mut row, mut panel, mut offset) = (Vec::new(), 0, 0usize, 0usize);
    for (part, source) in parts.iter().enumerate() {
        let ty = source.ty;
        let row_bytes = ty
            .bytes(cols)
            .ok_or(PackError::PartialBlock { part, ty, cols })?;
        let expected = row_bytes
            .checked_mul(source.rows)
            .ok_or_else(|| too_large(part))?;
        if expected != source.bytes.len() {
            let (rows, found) = (source.rows, source.bytes.len());
            return Err(PackError::Length {
                part,
                ty,
                rows,
                cols,
                expected,
                found,
            });
        }
        let format = Format::of(ty);
        segments.push(Segment {
            format,
            row,
            rows: source.rows,
            panel,
            offset,
        });
        row += source.rows;
        let panels = source.rows.div_ceil(LANES);
        panel += panels;
        offset = (blocks * format.block_bytes())
            .checked_mul(panels)
            .and_then(|bytes| bytes.checked_add(offset))
            .filter(|&bytes| bytes < isize::MAX as usize / 2)
            .ok_or_else(|| too_large(part))?;
    }
    let data = Buffer::new(offset);
    let mut multipliers = vec![1.0f32; panel * LANES];
    // SAFETY: `data` owns these bytes; they are written before they are read.
    let bytes = SharedMut::new(unsafe {
        std::slice::from_raw_parts_mut(data.start.cast::<MaybeUninit<u8>>(), offset)
    });
    let shared_multipliers = SharedMut::new(&mut multipliers);
    let matrix = PackedMatrix {
        rows: row,
        cols,
        panels: panel,
        segments,
        data,
        multipliers: Vec::new(),
    };
    Pool::global().for_each(panel, |panel| {
        let index = matrix.segment_of(panel);
        let (segment, source) = (&matrix.segments[index], &parts[index]);
        let first = (panel - segment.panel) * LANES;
        let panel_bytes = blocks * segment.format.block_bytes();
        // SAFETY: panels are disjoint, and each is one task.
        let (out, multipliers) = unsafe {
            let start = segment.offset + (panel - segment.panel) * panel_bytes;
            (
                bytes.slice(start, panel_bytes),
                shared_multipliers.slice(panel * LANES, LANES),
            )
        };
        out.fill(MaybeUninit::new(0));
        // SAFETY: just written.
        let out = unsafe { &mut *(out as *mut [MaybeUninit<u8>] as *mut [u8]) };
        let row_bytes = source.bytes.len() / source.rows;
        for lane in 0..LANES.min(source.rows - first) {
            let bytes = &source.bytes[(first + lane) * row_bytes..][..row_bytes];
            if segment.format.dense() {
                pack_dense_row(source.ty, cols, bytes, lane, out);
            } else {
                multipliers[lane] = pack_row(source.ty, bytes, lane, out);
            }
        }
    });
    Ok(PackedMatrix {
        multipliers,
        ..matrix
    })
}

fn pack_dense_row(ty: GgmlType, cols: usize, bytes: &[u8], lane: usize, panel: &mut [u8]) {
    let mut values = vec![0.0; cols];
    dequantize(ty, bytes, &mut values).expect("the length was checked");
    for (input, value) in values.into_iter().enumerate() {
        let at = 64 * (input / 2) + 4 * lane + 2 * (input % 2);
        panel[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
}

/// Packs one row and returns the power of two its results are multiplied with.
fn pack_row(ty: GgmlType, bytes: &[u8], lane: usize, panel: &mut [u8]) -> f32 {
    let format = Format::of(ty);
    let blocks = bytes.chunks_exact(ty.block_bytes());
    // Bound of the row's folded scales; only K types have any.
    let bound = blocks
        .clone()
        .fold(0.0f32, |bound, block| bound.max(folded_bound(ty, block)));
    let exponent = match bound > 0.0 && bound.is_finite() {
        true => 14 - bound.log2().floor() as i32,
        false => 0,
    };
    let scale = 2f32.powi(exponent);
    for (index, block) in blocks.enumerate() {
        decode(ty, block, |group, codes, d, m| {
            let group = index * (ty.block_elements() / GROUP) + group;
            let out = &mut panel[group / 2 * format.block_bytes()..][..format.block_bytes()];
            format.put_codes(out, group % 2, lane, codes);
            for half in 0..if format.halves { 2 } else { 1 } {
                format.put_scales(out, group % 2, half, lane, d[half] * scale, m[half] * scale);
            }
        });
    }
    2f32.powi(-exponent)
}

/// An upper bound of the folded scales and minima of a K block, 0 for other types.
fn folded_bound(ty: GgmlType, block: &[u8]) -> f32 {
    let (d_at, d_max, min_at, min_max) = match ty {
        GgmlType::Q2K => (80, 15.0, 82, 15.0),
        GgmlType::Q3K => (108, 32.0, 108, 0.0),
        GgmlType::Q4K | GgmlType::Q5K => (0, 63.0, 2, 63.0),
        GgmlType::Q6K => (208, 128.0, 208, 0.0),
        _ => return 0.0,
    };
    f32::max(
        half_at(block, d_at).abs() * d_max,
        half_at(block, min_at).abs() * min_max,
    )
}

/// Calls `sink(group, codes, d, m)` for each 32 weights of one block.
///
/// `d` and `m` hold one value per 16 weights in formats with halves, else the first counts.
fn decode(
    ty: GgmlType,
    block: &[u8],
    mut sink: impl FnMut(usize, &[u8; GROUP], [f32; 2], [f32; 2]),
) {
    let nibbles = |at: usize| -> [u8; GROUP] {
        std::array::from_fn(|j| {
            if j < 16 {
                block[at + j] & 15
            } else {
                block[at + j - 16] >> 4
            }
        })
    };
    let d = |at: usize| [half_at(block, at); 2];
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => unreachable!("dense rows have no codes"),
        GgmlType::Q4_0 => sink(0, &nibbles(2), d(0), [0.0; 2]),
        GgmlType::Q4_1 => sink(0, &nibbles(4), d(0), d(2)),
        GgmlType::Q5_0 => sink(0, &five_bits(block, 2), d(0), [0.0; 2]),
        GgmlType::Q5_1 => sink(0, &five_bits(block, 4), d(0), d(2)),
        GgmlType::Q8_0 => {
            let codes = std::array::from_fn(|j| block[2 + j] ^ 128); // i8 + 128
            sink(0, &codes, d(0), [0.0; 2]);
        }
        GgmlType::Q2K => {
            let (d, dmin) = (half_at(block, 80), half_at(block, 82));
            for group in 0..8 {
                let codes = std::array::from_fn(|l| {
                    block[16 + 32 * (group / 4) + l] >> (2 * (group % 4)) & 3
                });
                let scales = [block[2 * group], block[2 * group + 1]];
                let fold = scales.map(|scale| d * f32::from(scale & 15));
                sink(
                    group,
                    &codes,
                    fold,
                    scales.map(|scale| -dmin * f32::from(scale >> 4)),
                );
            }
        }
        GgmlType::Q3K => {
            let scales = q3_k_scales(&block[96..108]);
            let d = half_at(block, 108);
            for group in 0..8 {
                let codes = std::array::from_fn(|l| {
                    let low = block[32 + 32 * (group / 4) + l] >> (2 * (group % 4)) & 3;
                    low | (block[l] >> group & 1) << 2
                });
                let fold = [scales[2 * group], scales[2 * group + 1]].map(|s| d * f32::from(s));
                sink(group, &codes, fold, [0.0; 2]);
            }
        }
        GgmlType::Q4K | GgmlType::Q5K => {
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let low_at = if ty == GgmlType::Q4K { 16 } else { 48 };
            for group in 0..8 {
                let (scale, min) = k4_scale_min(&block[4..16], group);
                let codes = std::array::from_fn(|l| {
                    let low = block[low_at + 32 * (group / 2) + l] >> (4 * (group % 2)) & 15;
                    let high = if ty == GgmlType::Q5K {
                        block[16 + l] >> group & 1
                    } else {
                        0
                    };
                    low | high << 4
                });
                sink(
                    group,
                    &codes,
                    [d * f32::from(scale); 2],
                    [-dmin * f32::from(min); 2],
                );
            }
        }
        GgmlType::Q6K => {
            let (scales, d) = (&block[192..208], half_at(block, 208));
            for group in 0..8 {
                let (part, run) = (group / 4, group % 4);
                let codes = std::array::from_fn(|l| {
                    let low = block[64 * part + 32 * (run % 2) + l] >> (4 * (run / 2)) & 15;
                    low | (block[128 + 32 * part + l] >> (2 * run) & 3) << 4
                });
                let fold = |half: usize| d * f32::from(scales[2 * group + half] as i8);
                sink(group, &codes, [fold(0), fold(1)], [0.0; 2]);
            }
        }
    }
}

impl PackedMatrix {
    /// The segment that holds a panel.
    pub(super) fn segment_of(&self, panel: usize) -> usize {
        self.segments
            .partition_point(|segment| segment.panel <= panel)
            - 1
    }

    /// Inputs, padded to whole blocks, over [`BLOCK`].
    pub(super) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Segment, bytes, first output row and number of rows of a panel.
    pub(super) fn panel(&self, panel: usize) -> (&Segment, &[u8], usize, usize) {
        // Segments without rows share their first panel with the next one, which comes later.
        let segment = &self.segments[self.segment_of(panel)];
        let bytes = self.blocks() * segment.format.block_bytes();
        let first = (panel - segment.panel) * LANES;
        // SAFETY: `pack` allocated and wrote this range.
        let data = unsafe {
            let start = segment.offset + (panel - segment.panel) * bytes;
            std::slice::from_raw_parts(self.data.as_ptr().add(start), bytes)
        };
        (
            segment,
            data,
            segment.row + first,
            LANES.min(segment.rows - first),
        )
    }

    pub(super) fn unpack_row(&self, row: usize, out: &mut [f32]) {
        let index = self.segments.partition_point(|segment| segment.row <= row) - 1;
        let segment = &self.segments[index];
        let panel = segment.panel + (row - segment.row) / LANES;
        let lane = (row - segment.row) % LANES;
        let (segment, data, ..) = self.panel(panel);
        if segment.format.dense() {
            for (input, out) in out.iter_mut().enumerate() {
                let at = 64 * (input / 2) + 4 * lane + 2 * (input % 2);
                *out = bf16::from_le_bytes([data[at], data[at + 1]]).to_f32();
            }
            return;
        }
        let multiplier = self.multipliers[panel * LANES + lane];
        for (index, out) in out.chunks_mut(GROUP).enumerate() {
            let bytes = segment.format.block_bytes();
            let block = &data[index / 2 * bytes..][..bytes];
            segment
                .format
                .row_of_group(block, index % 2, lane, multiplier, out);
        }
    }
}

impl Format {
    /// The weights of one row and group.
    fn row_of_group(self, block: &[u8], group: usize, lane: usize, scale: f32, out: &mut [f32]) {
        for (input, out) in out.iter_mut().enumerate() {
            let [d, m] = self.scale_of(block, group, input / 16, lane);
            let code = f32::from(self.code_of(block, group, input, lane));
            *out = match self.min {
                true => scale * (d * code + m),
                false => scale * (d * (code - f32::from(self.offset))),
            };
        }
    }
}

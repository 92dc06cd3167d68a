//! Activations as 16-bit integers: `x = scale * q`, one scale per row and group of 32 inputs.
//!
//! `|q| <= 32512 = 127 * 256`, so that `q` splits into two signed bytes, `256 * high + low`, for
//! the 8-bit dot products. The error of one `x` is at most 2^-16 of its group's largest.
//!
//! Rows are interleaved by row blocks of 16: all rows of a block for group 0, then for group 1,
//! which keeps a kernel's reads in order whatever the width of the matrix.

use super::format::{BLOCK, Format, GROUP};
use super::{LANES, ROW_BLOCK};
use crate::cpu::Level;
use crate::pool::{Pool, SharedMut};

/// Largest quantised activation.
pub(super) const LIMIT: f32 = 32512.0;

/// Order of the 64 bytes that hold one row of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    /// 32 high bytes, then 32 low bytes.
    #[default]
    Planes,
    /// 16-bit integers; of four neighbours the first and third come first.
    Pairs,
}

/// A term that depends on the activations of a group alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    /// `-offset * sum(q)` as an i32, the start of an integer sum.
    Offset(u8),
    /// `scale * sum(q)` as an f32, multiplied by `m`.
    Sum,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Line([0; 64])
    }
}

/// The activations of one product, in every form its panels need.
#[derive(Default)]
pub(super) struct Activations {
    rows: usize,
    groups: usize,
    order: Order,
    /// `[row block][group][row]`
    quantized: Vec<Line>,
    /// `[row block][group][row]`
    scales: Vec<f32>,
    /// For each term and resolution, `[row block][group][half, if any][row]`.
    terms: Vec<(Term, bool, Vec<u32>)>,
    used_terms: usize,
    /// `[row block][group][row][32]`, for dense panels.
    dense: Vec<[Line; 2]>,
}

/// What a kernel sees of one row block.
pub(super) struct RowBlock {
    /// 1 to 16.
    pub rows: usize,
    /// `[group][row]` of 64 bytes; for dense panels `[group][row]` of 32 f32.
    pub values: *const u8,
    /// `[group][row]`
    pub scales: *const f32,
    /// `[group][half, if any][row]`
    pub terms: *const u32,
}

impl Format {
    fn term(self) -> Term {
        if self.min {
            Term::Sum
        } else {
            Term::Offset(self.offset)
        }
    }
}

impl Activations {
    /// Fills in `x` `[m, cols]` for panels of these formats.
    pub fn prepare(
        &mut self,
        level: Level,
        x: &[f32],
        m: usize,
        cols: usize,
        formats: impl Iterator<Item = Format>,
    ) {
        self.rows = m;
        self.groups = cols.div_ceil(BLOCK) * (BLOCK / GROUP);
        self.order = if level == Level::Avx2 {
            Order::Pairs
        } else {
            Order::Planes
        };
        self.used_terms = 0;
        let (mut dense, mut quantized) = (false, false);
        for format in formats {
            if format.dense() {
                dense = true;
                continue;
            }
            quantized = true;
            let wanted = (format.term(), format.halves);
            let found = self.terms[..self.used_terms]
                .iter()
                .any(|(t, h, _)| (*t, *h) == wanted);
            if !found {
                if self.terms.len() == self.used_terms {
                    self.terms.push((wanted.0, wanted.1, Vec::new()));
                }
                let slot = &mut self.terms[self.used_terms];
                (slot.0, slot.1) = wanted;
                self.used_terms += 1;
            }
        }
        let cells = m * self.groups;
        if quantized {
            grow(&mut self.quantized, cells);
            grow(&mut self.scales, cells);
            for (_, _, term) in &mut self.terms[..self.used_terms] {
                grow(term, 2 * cells);
            }
        }
        if dense {
            grow(&mut self.dense, cells);
        }
        let job = Job {
            x,
            cols,
            groups: self.groups,
            order: self.order,
            quantized: quantized.then(|| SharedMut::new(&mut self.quantized)),
            scales: SharedMut::new(&mut self.scales),
            terms: self.terms[..self.used_terms]
                .iter_mut()
                .map(|(term, halves, values)| (*term, *halves, SharedMut::new(values)))
                .collect(),
            dense: dense.then(|| SharedMut::new(&mut self.dense)),
        };
        let run = |block: usize| {
            let first = block * ROW_BLOCK;
            let rows = ROW_BLOCK.min(m - first);
            match level {
                // SAFETY: the caller checked the level.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { job.rows_avx2(first, rows) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Amx => unsafe { job.rows_avx512(first, rows) },
                _ => job.rows(first, rows),
            }
        };
        Pool::global().for_each_in_runs(m.div_ceil(ROW_BLOCK), run);
    }

    /// Row block `index` as panels of `format` need it.
    pub fn block(&self, index: usize, format: Format) -> RowBlock {
        let first = index * ROW_BLOCK;
        let rows = ROW_BLOCK.min(self.rows - first);
        let cell = first * self.groups;
        if format.dense() {
            let values = self.dense[cell..].as_ptr().cast();
            return RowBlock {
                rows,
                values,
                scales: std::ptr::null(),
                terms: std::ptr::null(),
            };
        }
        let terms = &self.terms[..self.used_terms];
        let term = terms
            .iter()
            .find(|term| (term.0, term.1) == (format.term(), format.halves));
        let (_, halves, terms) = term.expect("`prepare` saw this format");
        RowBlock {
            rows,
            values: self.quantized[cell..].as_ptr().cast(),
            scales: self.scales[cell..].as_ptr(),
            terms: terms[cell * if *halves { 2 } else { 1 }..].as_ptr(),
        }
    }
}

fn grow<T: Clone + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() < len {
        values.resize(len, T::default());
    }
}

/// The work of [`Activations::prepare`], shared by threads.
struct Job<'a> {
    x: &'a [f32],
    cols: usize,
    groups: usize,
    order: Order,
    quantized: Option<SharedMut<Line>>,
    scales: SharedMut<f32>,
    terms: Vec<(Term, bool, SharedMut<u32>)>,
    dense: Option<SharedMut<[Line; 2]>>,
}

impl Job<'_> {
    /// The scalar code, compiled for each level by the two functions below.
    #[inline(always)]
    fn rows(&self, first: usize, rows: usize) {
        for r in 0..rows {
            let x = &self.x[(first + r) * self.cols..][..self.cols];
            for group in 0..self.groups {
                let mut values = [0.0f32; GROUP];
                let start = group * GROUP;
                if let Some(x) = x.get(start..start + GROUP) {
                    values.copy_from_slice(x);
                } else if start < self.cols {
                    values[..self.cols - start].copy_from_slice(&x[start..]);
                }
                let cell = first * self.groups + group * rows + r;
                if let Some(dense) = &self.dense {
                    // SAFETY: each cell is one row's, each row one task's; lines hold 32 f32.
                    unsafe {
                        let line = dense.slice(cell, 1).as_mut_ptr();
                        line.cast::<[f32; GROUP]>().write(values);
                    }
                }
                if let Some(quantized) = &self.quantized {
                    // SAFETY: as above.
                    let line = unsafe { &mut quantized.slice(cell, 1)[0] };
                    self.quantize(&values, line, first, rows, group, r);
                }
            }
        }
    }

    #[inline(always)]
    fn quantize(
        &self,
        x: &[f32; GROUP],
        line: &mut Line,
        first: usize,
        rows: usize,
        group: usize,
        r: usize,
    ) {
        // As integers, so that infinities and NaN are the largest and the loop vectorises.
        let bits = x
            .iter()
            .fold(0, |bits, x| (x.to_bits() & 0x7fff_ffff).max(bits));
        let (scale, inverse) = scale_of(f32::from_bits(bits));
        // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
        const ROUND: f32 = 12_582_912.0;
        let mut q = [0i32; GROUP];
        for (q, x) in q.iter_mut().zip(x) {
            *q = (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        }
        if inverse == 0.0 {
            q = [0; GROUP]; // 0 * NaN is no number
        }
        match self.order {
            Order::Planes => {
                for (k, &q) in q.iter().enumerate() {
                    line.0[k] = ((q + 128) >> 8) as u8;
                    line.0[GROUP + k] = q as u8;
                }
            }
            Order::Pairs => {
                for quad in 0..GROUP / 4 {
                    for (slot, k) in [0, 2, 1, 3].into_iter().enumerate() {
                        let at = 8 * quad + 2 * slot;
                        line.0[at..at + 2].copy_from_slice(&(q[4 * quad + k] as i16).to_le_bytes());
                    }
                }
            }
        }
        let half = |half: usize| q[16 * half..][..16].iter().sum::<i32>();
        self.put_terms(first, rows, group, r, scale, [half(0), half(1)]);
    }

    /// Stores the scale of a row's group and the terms that follow from the sums of its halves.
    #[inline(always)]
    fn put_terms(
        &self,
        first: usize,
        rows: usize,
        group: usize,
        r: usize,
        scale: f32,
        sums: [i32; 2],
    ) {
        let cell = first * self.groups + group * rows + r;
        let encode = |term: Term, sum: i32| match term {
            Term::Offset(offset) => (-i32::from(offset) * sum) as u32,
            Term::Sum => (scale * sum as f32).to_bits(),
        };
        // SAFETY: each cell is one row's, each row one task's.
        unsafe {
            self.scales.slice(cell, 1)[0] = scale;
            for (term, halves, values) in &self.terms {
                if *halves {
                    let cell = 2 * first * self.groups + 2 * group * rows + r;
                    values.slice(cell, 1)[0] = encode(*term, sums[0]);
                    values.slice(cell + rows, 1)[0] = encode(*term, sums[1]);
                } else {
                    values.slice(cell, 1)[0] = encode(*term, sums[0] + sums[1]);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows_avx2(&self, first: usize, rows: usize) {
        self.rows(first, rows);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn rows_avx512(&self, first: usize, rows: usize) {
        use std::arch::x86_64::*;
        for r in 0..rows {
            let x = &self.x[(first + r) * self.cols..][..self.cols];
            for group in 0..self.groups {
                let left = self.cols.saturating_sub(group * GROUP).min(GROUP);
                let mask = ((1u64 << left) - 1) as u32;
                let start = x.as_ptr().wrapping_add(group * GROUP);
                let values = [
                    _mm512_maskz_loadu_ps(mask as u16, start),
                    _mm512_maskz_loadu_ps((mask >> 16) as u16, start.wrapping_add(16)),
                ];
                let cell = first * self.groups + group * rows + r;
                if let Some(dense) = &self.dense {
                    let line = dense.slice(cell, 1).as_mut_ptr().cast::<f32>();
                    _mm512_storeu_ps(line, values[0]);
                    _mm512_storeu_ps(line.add(16), values[1]);
                }
                let Some(quantized) = &self.quantized else {
                    continue;
                };
                let bits = |v| _mm512_castps_si512(_mm512_abs_ps(v));
                let largest = _mm512_max_epu32(bits(values[0]), bits(values[1]));
                let (scale, inverse) = scale_of(f32::from_bits(_mm512_reduce_max_epu32(largest)));
                let keep = if inverse == 0.0 { 0 } else { 0xffff };
                let line = quantized.slice(cell, 1).as_mut_ptr().cast::<u8>();
                let mut sums = [0; 2];
                for (half, sum) in sums.iter_mut().enumerate() {
                    let scaled = _mm512_mul_ps(values[half], _mm512_set1_ps(inverse));
                    let q = _mm512_maskz_cvtps_epi32(keep, scaled);
                    let high = _mm512_add_epi32(q, _mm512_set1_epi32(128));
                    let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(high));
                    _mm_storeu_si128(line.add(16 * half).cast(), high);
                    _mm_storeu_si128(line.add(GROUP + 16 * half).cast(), _mm512_cvtepi32_epi8(q));
                    *sum = _mm512_reduce_add_epi32(q);
                }
                self.put_terms(first, rows, group, r, scale, sums);
            }
        }
    }
}

/// The scale of a group and its inverse (0: every value becomes 0), from its largest magnitude.
#[inline(always)]
fn scale_of(largest: f32) -> (f32, f32) {
    if !largest.is_finite() {
        (f32::NAN, 0.0)
    } else if largest < 1e-30 {
        (0.0, 0.0)
    } else {
        (largest * (1.0 / LIMIT), LIMIT / largest)
    }
}

/// A row's quantised activation `k` of a line in [`Order::Planes`].
pub(super) fn plane_value(line: &[u8], k: usize) -> i32 {
    256 * i32::from(line[k] as i8) + i32::from(line[GROUP + k] as i8)
}

const _: () = assert!(LANES == ROW_BLOCK);

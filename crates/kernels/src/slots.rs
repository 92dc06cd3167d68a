//! Moves single slots between pages of cached keys and values, whatever their storage type.
//!
//! For policies that renumber what they keep, and for gathering scattered keys to whole pages.

use crate::attention::{KvDtype, KvLayout, PAGE};

/// A run of slots: `count` of them from slot `from` of one plane to slot `to` of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First slot read.
    pub from: usize,
    /// First slot written.
    pub to: usize,
    /// Number of slots.
    pub count: usize,
}

impl Run {
    fn check(&self) {
        assert!(
            self.from + self.count <= PAGE && self.to + self.count <= PAGE,
            "slots {}..{} to {}..{} exceed a page of {PAGE}",
            self.from,
            self.from + self.count,
            self.to,
            self.to + self.count
        );
    }
}

/// Asks for the cache line at an address that will be read soon; any address may be given.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

impl KvLayout {
    /// The bytes of a plane that belong to one kv head.
    pub fn section(&self, kv_head: usize) -> std::ops::Range<usize> {
        kv_head * self.section_bytes()..(kv_head + 1) * self.section_bytes()
    }

    /// Rows of 64 four-byte units, one for each slot, in a kv head's section of a key plane.
    fn key_rows(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => self.head_dim,
            KvDtype::F16 | KvDtype::Bf16 => self.head_dim / 2,
            KvDtype::Int8 => self.padded_dim() / 4 + 1,
        }
    }

    /// Asks for the keys of `count` slots of one kv head's section, which will be read soon. Scattered runs are a
    /// miss a row, which the CPU does not foresee.
    pub(crate) fn fetch_keys(&self, section: &[u8], slot: usize, count: usize) {
        for row in 0..self.key_rows() {
            let at = (row * PAGE + slot) * 4;
            for line in (at & !63..at + count * 4).step_by(64) {
                prefetch(section.as_ptr().wrapping_add(line));
            }
        }
    }

    /// Copies keys of one kv head; `from` and `to` are that head's sections of two key planes.
    ///
    /// # Panics
    /// When the sections or the slots do not fit.
    pub fn copy_keys(&self, from: &[u8], to: &mut [u8], run: Run) {
        run.check();
        // Rows of 64 four-byte units, one for each slot: elements, pairs or fours of elements, and
        // for int8 a last row of scales.
        let rows = self.key_rows();
        let (from, to) = (&from[..rows * PAGE * 4], &mut to[..rows * PAGE * 4]);
        let pairs = from
            .chunks_exact(PAGE * 4)
            .zip(to.chunks_exact_mut(PAGE * 4));
        // Short runs of a constant length compile to single moves.
        match run.count {
            1 => pairs.for_each(|(from, to)| copy::<4>(from, to, run)),
            2 => pairs.for_each(|(from, to)| copy::<8>(from, to, run)),
            16 => pairs.for_each(|(from, to)| copy::<64>(from, to, run)),
            _ => pairs.for_each(|(from, to)| {
                to[run.to * 4..(run.to + run.count) * 4]
                    .copy_from_slice(&from[run.from * 4..(run.from + run.count) * 4]);
            }),
        }
    }

    /// Copies values of one kv head; arguments as for [`Self::copy_keys`].
    ///
    /// # Panics
    /// When the sections or the slots do not fit.
    pub fn copy_values(&self, from: &[u8], to: &mut [u8], run: Run) {
        run.check();
        let width = self.padded_dim();
        match self.dtype {
            KvDtype::F32 => {
                let row = width * 4;
                to[run.to * row..(run.to + run.count) * row]
                    .copy_from_slice(&from[run.from * row..(run.from + run.count) * row]);
            }
            KvDtype::F16 | KvDtype::Bf16 => {
                let row = width * 4;
                let mut done = 0;
                while done < run.count {
                    let (a, b) = (run.from + done, run.to + done);
                    let (source, target) = (
                        &from[a / 2 * row..(a / 2 + 1) * row],
                        &mut to[b / 2 * row..(b / 2 + 1) * row],
                    );
                    if a % 2 == 0 && b % 2 == 0 && run.count - done >= 2 {
                        target.copy_from_slice(source);
                        done += 2;
                        continue;
                    }
                    let (a, b) = (a % 2 * 2, b % 2 * 2);
                    for (target, source) in target.chunks_exact_mut(4).zip(source.chunks_exact(4)) {
                        target[b..b + 2].copy_from_slice(&source[a..a + 2]);
                    }
                    done += 1;
                }
            }
            KvDtype::Int8 => {
                let (row, scales) = (width * 4, width * PAGE);
                for index in 0..run.count {
                    let (a, b) = (run.from + index, run.to + index);
                    let source = &from[a / 4 * row..(a / 4 + 1) * row];
                    let target = &mut to[b / 4 * row..(b / 4 + 1) * row];
                    for (target, source) in target.chunks_exact_mut(4).zip(source.chunks_exact(4)) {
                        target[b % 4] = source[a % 4];
                    }
                    to[scales + b * 4..][..4].copy_from_slice(&from[scales + a * 4..][..4]);
                }
            }
        }
    }
}

#[inline(always)]
fn copy<const N: usize>(from: &[u8], to: &mut [u8], run: Run) {
    let bytes: [u8; N] = from[run.from * 4..run.from * 4 + N]
        .try_into()
        .expect("N bytes");
    to[run.to * 4..run.to * 4 + N].copy_from_slice(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The twin: reading a slot back and writing it elsewhere, element by element.
        #[test]
        fn copied_slots_read_back_the_same(
            dtype in prop::sample::select(vec![KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8]),
            half_dim in 1usize..20,
            num_kv_heads in 1usize..4,
            from in 0usize..64,
            to in 0usize..64,
            count in 1usize..64,
            seed in any::<u32>(),
        ) {
            let layout = KvLayout { num_kv_heads, head_dim: 2 * half_dim, dtype };
            let count = count.min(PAGE - from).min(PAGE - to);
            let width = num_kv_heads * layout.head_dim;
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) ^ seed) as i32 as f32 / 1e9;
            let rows: Vec<f32> = (0..PAGE * width).map(value).collect();
            let other: Vec<f32> = rows.iter().map(|x| x * 0.5 + 1.0).collect();
            let plane = |keys: bool, rows: &[f32]| {
                let mut plane = vec![0u8; layout.plane_bytes()];
                if keys {
                    layout.write_keys(&mut plane, 0, rows, width);
                } else {
                    layout.write_values(&mut plane, 0, rows, width);
                }
                plane
            };
            let run = Run { from, to, count };
            for keys in [true, false] {
                let source = plane(keys, &rows);
                let before = plane(keys, &other);
                let mut target = before.clone();
                let head = seed as usize % num_kv_heads;
                let section = layout.section(head);
                if keys {
                    layout.copy_keys(&source[section.clone()], &mut target[section], run);
                } else {
                    layout.copy_values(&source[section.clone()], &mut target[section], run);
                }
                let read = |plane: &[u8], head: usize, slot: usize| {
                    let mut out = vec![0f32; layout.head_dim];
                    if keys {
                        layout.read_key(plane, head, slot, &mut out);
                    } else {
                        layout.read_value(plane, head, slot, &mut out);
                    }
                    out
                };
                for h in 0..num_kv_heads {
                    for slot in 0..PAGE {
                        let moved = h == head && (to..to + count).contains(&slot);
                        let want = if moved {
                            read(&source, h, from + slot - to)
                        } else {
                            read(&before, h, slot)
                        };
                        prop_assert_eq!(read(&target, h, slot), want);
                    }
                }
            }
        }
    }
}

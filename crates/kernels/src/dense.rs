//! Products of plain f32 (and f64) matrices inside kernels that learn: recurrences, scans, weight gradients.
//!
//! The right-hand side is packed once into panels of 32 columns; the left-hand side is read where it lies, with any strides, so a
//! transposed matrix needs no copy. A row's sums run over k in one order at every level and for any number of rows, so how
//! rows are shared among threads does not change results.

use crate::autograd::Real;
use crate::cpu::Level;
use crate::elementwise::split_rows;
use crate::pool::SharedMut;
use candle_core::WithDType;
use std::any::TypeId;

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Inner dimension of a block: a panel of it stays in the first cache.
const BLOCK: usize = 320;
/// Rows of a block: they stay in the second cache while all panels pass.
const ROWS: usize = 64;
/// Most rows that are summed at once.
const HIGH: usize = 8;

/// B [k, n] in panels: [n / 32][k][32], zeros beyond n.
pub struct Packed<T> {
    panels: Vec<T>,
    k: usize,
    n: usize,
}

impl<T: Real> Packed<T> {
    /// Element (i, j) of B lies at `i * row + j * col` of `b`. Large ones are packed by all threads.
    pub fn new(b: &[T], k: usize, n: usize, row: usize, col: usize) -> Self {
        let count = n.div_ceil(PANEL);
        let mut panels = uninit(count * k * PANEL);
        let shared = SharedMut::new(&mut panels);
        split_rows(count, k * PANEL, |first, count| {
            // SAFETY: pieces are disjoint panels.
            let panels = unsafe { shared.slice(first * k * PANEL, count * k * PANEL) };
            for (at, out) in panels.chunks_exact_mut((k * PANEL).max(1)).enumerate() {
                let first = (first + at) * PANEL;
                let cols = PANEL.min(n - first);
                for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
                    let (out, beyond) = out.split_at_mut(cols);
                    if col == 1 {
                        out.copy_from_slice(&b[i * row + first..][..cols]);
                    } else {
                        for (j, out) in out.iter_mut().enumerate() {
                            *out = b[i * row + (first + j) * col];
                        }
                    }
                    beyond.fill(T::zero());
                }
            }
        });
        Packed { panels, k, n }
    }

    /// Rows of B.
    pub fn rows(&self) -> usize {
        self.k
    }

    /// Columns of B.
    pub fn cols(&self) -> usize {
        self.n
    }
}

/// Elements that are written before they are read.
pub(crate) fn uninit<T: WithDType>(count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    // SAFETY: every pattern of bits is a float, and callers write all of them first.
    #[allow(clippy::uninit_vec)]
    unsafe {
        values.set_len(count);
    }
    values
}

/// A [m, k]: element (i, j) lies at `i * row + j * col`.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    /// All elements.
    pub data: &'a [T],
    /// Distance of rows.
    pub row: usize,
    /// Distance of columns.
    pub col: usize,
}

/// C [m, n] += A B. Rows of C lie `stride` apart.
pub fn add_product<T: Real>(
    level: Level,
    a: Left<'_, T>,
    m: usize,
    b: &Packed<T>,
    c: &mut [T],
    stride: usize,
) {
    add_product_part(level, a, m, b, (b.k, b.n), c, stride);
}

/// As [`add_product`], with the first k rows and n columns of B alone.
pub fn add_product_part<T: Real>(
    level: Level,
    a: Left<'_, T>,
    m: usize,
    b: &Packed<T>,
    (k, n): (usize, usize),
    c: &mut [T],
    stride: usize,
) {
    product(level, a, m, b, (k, n), c, stride, false);
}

/// As [`add_product_part`]; `fresh`: C = A B, whatever C held.
pub(crate) fn product<T: Real>(
    level: Level,
    a: Left<'_, T>,
    m: usize,
    b: &Packed<T>,
    (k, n): (usize, usize),
    c: &mut [T],
    stride: usize,
    fresh: bool,
) {
    assert!(
        k <= b.k && n <= b.n,
        "product: a part of {k} by {n} of a matrix of {} by {}",
        b.k,
        b.n
    );
    if fresh && k == 0 {
        let rows = c.chunks_mut(stride.max(1)).take(m);
        rows.for_each(|row| row[..n].fill(T::zero()));
    }
    if m == 0 || k == 0 || n == 0 {
        return;
    }
    assert!(
        (m - 1) * a.row + (k - 1) * a.col < a.data.len() && (m - 1) * stride + n <= c.len(),
        "product: a matrix is shorter than its shape"
    );
    let panels = |first: usize, depth: usize| {
        let panels = b.panels.chunks_exact(b.k * PANEL).take(n.div_ceil(PANEL));
        panels.map(move |panel| &panel[first * PANEL..(first + depth) * PANEL])
    };
    // Blocks of equal depth.
    let block = k.div_ceil(k.div_ceil(BLOCK));
    // Columns of a transposed matrix lie apart: they are gathered once for all panels.
    let gathers = a.col != 1 && n > PANEL;
    let mut gathered = uninit(if gathers {
        m.min(ROWS).next_multiple_of(HIGH) * block
    } else {
        0
    });
    for first in (0..k).step_by(block) {
        let depth = block.min(k - first);
        for top in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - top);
            let mut a = Left {
                data: &a.data[top * a.row + first * a.col..],
                ..a
            };
            if gathers {
                a.gather(rows, depth, &mut gathered);
                a = Left {
                    data: &gathered,
                    row: 1,
                    col: HIGH,
                };
            }
            for (index, panel) in panels(first, depth).enumerate() {
                let (col, cols) = (index * PANEL, PANEL.min(n - index * PANEL));
                let mut done = 0;
                while done < rows {
                    let start = match gathers {
                        true => done / HIGH * HIGH * depth + done % HIGH,
                        false => done * a.row,
                    };
                    let block = Block {
                        a: &a.data[start..],
                        row: a.row,
                        col: a.col,
                        rows: rows - done,
                        panel,
                        cols,
                        stride,
                        fresh: fresh && first == 0,
                    };
                    done += block.run(level, &mut c[(top + done) * stride + col..]);
                }
            }
        }
    }
}

impl<T: Real> Left<'_, T> {
    /// The first rows and columns as [rows / HIGH][depth][HIGH]; what is beyond the rows is left as it is.
    fn gather(&self, rows: usize, depth: usize, out: &mut [T]) {
        for l in 0..depth {
            let column = &self.data[l * self.col..];
            for first in (0..rows).step_by(HIGH) {
                let out = &mut out[first * depth + l * HIGH..][..HIGH];
                if self.row == 1 && first + HIGH <= rows {
                    out.copy_from_slice(&column[first..first + HIGH]);
                    continue;
                }
                for (r, out) in out.iter_mut().enumerate().take(rows - first) {
                    *out = column[(first + r) * self.row];
                }
            }
        }
    }
}

/// The naive twin of [`add_product`].
pub fn add_product_naive<T: Real>(
    a: Left<'_, T>,
    m: usize,
    b: &[T],
    (k, n): (usize, usize),
    c: &mut [T],
    stride: usize,
) {
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                c[i * stride + j] += a.data[i * a.row + l * a.col] * b[l * n + j];
            }
        }
    }
}

/// Some rows of A against one panel.
struct Block<'a, T> {
    a: &'a [T],
    row: usize,
    col: usize,
    rows: usize,
    panel: &'a [T],
    cols: usize,
    stride: usize,
    fresh: bool,
}

impl<T: Real> Block<'_, T> {
    /// Sums of one row to C.
    #[inline(always)]
    fn put(&self, c: &mut [T], sums: &[T; PANEL]) {
        if self.fresh {
            c.copy_from_slice(&sums[..c.len()]);
        } else {
            c.iter_mut().zip(sums).for_each(|(c, &sum)| *c += sum);
        }
    }

    /// Adds to as many rows of C as fit in registers; returns how many.
    fn run(&self, level: Level, c: &mut [T]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if TypeId::of::<T>() == TypeId::of::<f32>() && level > Level::Portable {
            // SAFETY: T is f32, and the level says that the CPU has the features.
            return unsafe {
                let block = &*std::ptr::from_ref(self).cast::<Block<'_, f32>>();
                let c = std::slice::from_raw_parts_mut(c.as_mut_ptr().cast::<f32>(), c.len());
                block.run_f32(level, c)
            };
        }
        let _ = (level, TypeId::of::<T>());
        let mut sums = [T::zero(); PANEL];
        for (l, panel) in self.panel.chunks_exact(PANEL).enumerate() {
            let a = self.a[l * self.col];
            for (sum, &b) in sums.iter_mut().zip(panel) {
                *sum += a * b;
            }
        }
        self.put(&mut c[..self.cols], &sums);
        1
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Block, HIGH, PANEL};
    use crate::cpu::Level;
    use core::arch::x86_64::*;

    impl Block<'_, f32> {
        /// # Safety
        /// The CPU has the level's features.
        pub(super) unsafe fn run_f32(&self, level: Level, c: &mut [f32]) -> usize {
            let mut sums = [[0f32; PANEL]; HIGH];
            let rows = if level >= Level::Avx512 {
                match self.rows {
                    HIGH.. => self.wide::<HIGH>(&mut sums),
                    4.. => self.wide::<4>(&mut sums),
                    2.. => self.wide::<2>(&mut sums),
                    _ => self.wide::<1>(&mut sums),
                }
            } else {
                match self.rows {
                    2.. => self.middle::<2>(&mut sums),
                    _ => self.middle::<1>(&mut sums),
                }
            };
            for (r, sums) in sums[..rows].iter().enumerate() {
                self.put(&mut c[r * self.stride..][..self.cols], sums);
            }
            rows
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn wide<const R: usize>(&self, out: &mut [[f32; PANEL]; HIGH]) -> usize {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            let (mut a, mut b) = (self.a.as_ptr(), self.panel.as_ptr());
            for _ in 0..self.panel.len() / PANEL {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for r in 0..R {
                    let a = _mm512_set1_ps(*a.add(r * self.row));
                    sums[r][0] = _mm512_fmadd_ps(a, b0, sums[r][0]);
                    sums[r][1] = _mm512_fmadd_ps(a, b1, sums[r][1]);
                }
                b = b.add(PANEL);
                a = a.wrapping_add(self.col);
            }
            for r in 0..R {
                _mm512_storeu_ps(out[r].as_mut_ptr(), sums[r][0]);
                _mm512_storeu_ps(out[r].as_mut_ptr().add(16), sums[r][1]);
            }
            R
        }

        #[target_feature(enable = "avx2,fma")]
        unsafe fn middle<const R: usize>(&self, out: &mut [[f32; PANEL]; HIGH]) -> usize {
            let mut sums = [[_mm256_setzero_ps(); 4]; R];
            let (mut a, mut b) = (self.a.as_ptr(), self.panel.as_ptr());
            for _ in 0..self.panel.len() / PANEL {
                let b4: [__m256; 4] = std::array::from_fn(|i| _mm256_loadu_ps(b.add(8 * i)));
                for r in 0..R {
                    let a = _mm256_set1_ps(*a.add(r * self.row));
                    for i in 0..4 {
                        sums[r][i] = _mm256_fmadd_ps(a, b4[i], sums[r][i]);
                    }
                }
                b = b.add(PANEL);
                a = a.wrapping_add(self.col);
            }
            for r in 0..R {
                for i in 0..4 {
                    _mm256_storeu_ps(out[r].as_mut_ptr().add(8 * i), sums[r][i]);
                }
            }
            R
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(count: usize, salt: usize) -> Vec<f64> {
        let value = |i: usize| ((i * 7919 + salt * 104_729) % 1009) as f64 / 504.5 - 1.0;
        (0..count).map(value).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_level_agrees_with_the_naive_twin(
            m in 0usize..20, k in 0usize..40, deep in any::<bool>(), n in 1usize..70, transposed in any::<bool>(), salt in 0usize..99,
        ) {
            let k = if deep { k + 600 } else { k };
            let (row, col) = if transposed { (1, m.max(1)) } else { (k.max(1), 1) };
            let (a, b, c) = (values(m * k, salt), values(k * n, salt + 1), values(m * (n + 3), salt + 2));
            let mut wanted = c.clone();
            let left = Left { data: &a[..], row, col };
            add_product_naive(left, m, &b, (k, n), &mut wanted, n + 3);
            // B is stored the other way round than the packing of the next lines reads it.
            let turned: Vec<f64> = (0..n).flat_map(|j| (0..k).map(move |i| (i, j))).map(|(i, j)| b[i * n + j]).collect();
            let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
            let (a32, b32, t32) = (narrow(&a), narrow(&b), narrow(&turned));
            for level in Level::available() {
                let mut found = c.clone();
                add_product(level, left, m, &Packed::new(&turned, k, n, 1, k), &mut found, n + 3);
                // A larger B of which a part is asked gives the same.
                let larger: Vec<f64> = (0..k + 2).flat_map(|i| (0..n + 40).map(move |j| (i, j)))
                    .map(|(i, j)| if i < k && j < n { b[i * n + j] } else { 7.0 }).collect();
                let larger = Packed::new(&larger, k + 2, n + 40, n + 40, 1);
                let mut set = c.clone();
                product(level, left, m, &Packed::new(&b, k, n, n, 1), (k, n), &mut set, n + 3, true);
                let mut sums = vec![0.0; m * (n + 3)];
                add_product(level, left, m, &Packed::new(&b, k, n, n, 1), &mut sums, n + 3);
                for (row, wanted) in set.chunks_exact(n + 3).zip(sums.chunks_exact(n + 3)) {
                    prop_assert_eq!(&row[..n], &wanted[..n]);
                }
                let mut part = c.clone();
                add_product_part(level, left, m, &larger, (k, n), &mut part, n + 3);
                prop_assert_eq!(&part, &found);
                for (found, wanted) in found.iter().zip(&wanted) {
                    prop_assert!((found - wanted).abs() < 1e-12 * (k + 1) as f64, "{level:?}");
                }
                for packed in [Packed::new(&b32, k, n, n, 1), Packed::new(&t32, k, n, 1, k)] {
                    let mut found = narrow(&c);
                    add_product(level, Left { data: &a32[..], row, col }, m, &packed, &mut found, n + 3);
                    for (&found, wanted) in found.iter().zip(&wanted) {
                        prop_assert!((f64::from(found) - wanted).abs() < 1e-6 * (k + 1) as f64, "{level:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_do_not_depend_on_their_neighbours() {
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        let (m, k, n) = (13, 700, 40);
        let (a, b) = (narrow(values(m * k, 1)), narrow(values(k * n, 2)));
        let packed = Packed::new(&b, k, n, n, 1);
        for level in Level::available() {
            let mut whole = vec![0f32; m * n];
            let left = |row: usize| Left {
                data: &a[row * k..],
                row: k,
                col: 1,
            };
            add_product(level, left(0), m, &packed, &mut whole, n);
            for row in 0..m {
                let mut alone = vec![0f32; n];
                add_product(level, left(row), 1, &packed, &mut alone, n);
                assert_eq!(alone, whole[row * n..][..n], "{level:?} row {row}");
            }
        }
    }
}

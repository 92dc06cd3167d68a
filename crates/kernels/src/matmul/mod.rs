//! Matrix products straight from packed low-bit weights: one copy serves decoding and prefill.
//!
//! [`PackedMatrix`] holds the rows of one or more GGUF tensors as interleaved panels (`format.rs`).
//! Each group of 32 activations becomes 16-bit integers with one f32 scale (`activation.rs`), and
//! integer dot products run on the codes as they are, for one row as for thousands. Integer sums
//! are exact, so the only errors are a 16-bit rounding of `x` and f32 sums over groups. Dense
//! panels (bf16) multiply f32 activations. Many rows on AVX-512 go by 16-bit integers on both sides
//! (`words.rs`), on AMX by bf16 (`amx.rs`).

mod activation;
#[cfg(any(test, target_arch = "x86_64"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod format;
mod naive;
mod pack;
mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod words;

pub use naive::matmul_naive;

use crate::cpu::Level;
use crate::elementwise::{self, Gate};
use crate::pool::{Pool, SharedMut};
use crate::quant::GgmlType;
#[cfg(target_arch = "x86_64")]
use crate::tile::Hardware;
use activation::{Activations, RowBlock};
use format::{Format, LANES};
use std::cell::RefCell;

/// One tensor of a GGUF file: row-major `[rows, cols]`, blocks along the columns.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// Element type.
    pub ty: GgmlType,
    /// Output features.
    pub rows: usize,
    /// The tensor's bytes: `ty.bytes(rows * cols)`.
    pub bytes: &'a [u8],
}

/// What happens to the products on their way out. The default stores them as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[rows]`, added to each row of the output.
    pub bias: Option<&'a [f32]>,
    /// Adds to the output instead of overwriting it.
    pub accumulate: bool,
    /// The matrix is `[gate | up]`, halves of its rows: the output is `act(gate) * up`, half as
    /// wide. Not with `accumulate`.
    pub gate: Option<Gate>,
}

impl Epilogue<'_> {
    /// Columns of the output of a matrix of `rows` rows.
    fn width(&self, rows: usize) -> usize {
        if self.gate.is_some() { rows / 2 } else { rows }
    }
}

/// Why tensors could not be packed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Nothing to pack.
    #[error("a matrix of {cols} columns from {parts} parts is empty; give at least one of each")]
    Empty {
        /// Columns asked for.
        cols: usize,
        /// Parts given.
        parts: usize,
    },
    /// The columns are no whole number of blocks.
    #[error(
        "part {part}: rows of {cols} weights of type {} do not fill whole blocks of {}; the tensor's shape and type disagree",
        ty.name(), ty.block_elements()
    )]
    PartialBlock {
        /// Index of the part.
        part: usize,
        /// Its type.
        ty: GgmlType,
        /// Columns asked for.
        cols: usize,
    },
    /// The data is shorter or longer than its shape says.
    #[error(
        "part {part}: [{rows}, {cols}] of type {} takes {expected} bytes but {found} were given; the file may be cut short",
        ty.name()
    )]
    Length {
        /// Index of the part.
        part: usize,
        /// Its type.
        ty: GgmlType,
        /// Its rows.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Bytes the shape takes.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The size does not fit the address space.
    #[error("part {part}: [{rows}, {cols}] is too large for this machine's address space")]
    TooLarge {
        /// Index of the part.
        part: usize,
        /// Its rows.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
}

/// A weight matrix `[rows = out_features, cols = in_features]`, packed. See the module's text.
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    panels: usize,
    segments: Vec<pack::Segment>,
    data: pack::Buffer,
    /// `[panels * 16]`, a power of two for each row's results.
    multipliers: Vec<f32>,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedMatrix")
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

thread_local! {
    /// Kept between calls, so that no call touches fresh pages.
    static ACTIVATIONS: RefCell<Activations> = RefCell::default();
    /// `[m, gate | up]` where the gate is a pass of its own.
    static BOTH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// `[m, width]` between the two products of an MLP.
    static HIDDEN: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Most rows of `x` that are surely computed as each would be alone, bit for bit, at the level in
/// force: integer products whose order of sums does not depend on the number of rows.
pub fn independent_rows() -> usize {
    independent_rows_at(Level::current())
}

fn independent_rows_at(level: Level) -> usize {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Amx => amx::MIN_ROWS - 1,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => words::MIN_ROWS - 1,
        _ => usize::MAX,
    }
}

/// Rows of `x` that share a pass over a panel.
const ROW_BLOCK: usize = 16;
/// Panels that take turns with one block of rows.
const PANEL_GROUP: usize = 4;
/// Bytes of activations worked on at a time: about half of a core's second-level cache.
const ACTIVATION_BYTES: usize = 1 << 20;

impl PackedMatrix {
    /// Packs tensors of `cols` columns, their rows one under another. Types may differ.
    ///
    /// Runs on all threads of the pool. F32 and F16 weights are rounded to bf16; the f16 scales of
    /// K types are rounded to 2^-11 of themselves; the rest is kept exactly.
    ///
    /// # Errors
    /// [`PackError`] when there is nothing to pack or a part's bytes do not fit its shape.
    pub fn pack(cols: usize, parts: &[MatrixSource]) -> Result<Self, PackError> {
        pack::pack(cols, parts)
    }

    /// Output features of all parts.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of heap memory held.
    pub fn bytes(&self) -> usize {
        self.data.len() + std::mem::size_of_val(&self.multipliers[..])
    }

    /// Writes the weights of one row to `out` `[cols]`: the lookup of an embedding.
    ///
    /// # Panics
    /// When `row` or the length of `out` is wrong.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows,
            "row {row} of a matrix of {} rows",
            self.rows
        );
        assert_eq!(out.len(), self.cols, "out must hold one row");
        self.unpack_row(row, out);
    }

    /// `out[m, rows] (=|+=) x[m, cols] . W^T (+ bias)` at the level in force; half as wide when
    /// gated.
    ///
    /// # Panics
    /// When a slice's length does not fit `m`.
    pub fn matmul(&self, x: &[f32], m: usize, out: &mut [f32], epilogue: Epilogue<'_>) {
        self.matmul_at(Level::current(), x, m, out, epilogue);
    }

    /// [`PackedMatrix::matmul`] at a given level, for tests and benches.
    ///
    /// # Panics
    /// When a slice's length does not fit `m`, or the CPU lacks `level`.
    pub fn matmul_at(
        &self,
        level: Level,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        epilogue: Epilogue<'_>,
    ) {
        assert!(
            level <= Level::detected(),
            "this CPU lacks level {}",
            level.name()
        );
        assert_eq!(
            x.len(),
            m * self.cols,
            "x must be [m = {m}, cols = {}]",
            self.cols
        );
        let width = epilogue.width(self.rows);
        assert_eq!(out.len(), m * width, "out must be [m = {m}, {width}]");
        if let Some(bias) = epilogue.bias {
            assert_eq!(bias.len(), self.rows, "bias must be [rows]");
        }
        if epilogue.gate.is_some() {
            assert!(
                self.rows.is_multiple_of(2) && !epilogue.accumulate,
                "a gated product has two halves and overwrites"
            );
        }
        if m == 0 || self.rows == 0 {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if level == Level::Amx
            && m >= amx::MIN_ROWS
            && (epilogue.gate.is_none() || amx::pairs_gates(self))
        {
            // SAFETY: the level was checked, and it implies AVX-512.
            unsafe { amx::product::<Hardware, amx::Avx512>(self, x, m, out, epilogue) };
            return;
        }
        if let Some(gate) = epilogue.gate {
            let plain = Epilogue {
                gate: None,
                ..epilogue
            };
            BOTH.with(|cell| {
                let mut both = cell.take();
                both.resize(both.len().max(m * self.rows), 0.0);
                self.matmul_at(level, x, m, &mut both[..m * self.rows], plain);
                elementwise::gated(gate, &both[..m * self.rows], width, out);
                cell.replace(both);
            });
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if level == Level::Avx512 && m >= words::MIN_ROWS {
            // SAFETY: the level was checked.
            unsafe { words::run(self, x, m, out, epilogue) };
            return;
        }
        // A task that itself calls matmul (nested jobs) finds the cell borrowed: give it its own.
        ACTIVATIONS.with(|cell| match cell.try_borrow_mut() {
            Ok(mut activations) => self.product(level, &mut activations, x, m, out, epilogue),
            Err(_) => self.product(level, &mut Activations::default(), x, m, out, epilogue),
        });
    }

    /// `out += down(act(gate) * up)` with `[gate | up] = x . W^T (+ bias)`: the two products of a
    /// gated MLP. x: [m, cols], out: [m, down.rows]; `how` of `self` has the gate, that of `down`
    /// accumulates or not.
    ///
    /// # Panics
    /// As [`PackedMatrix::matmul`], or when `down` does not take what `self` gives.
    pub fn mlp(
        &self,
        how: Epilogue<'_>,
        down: (&PackedMatrix, Epilogue<'_>),
        x: &[f32],
        m: usize,
        out: &mut [f32],
    ) {
        self.mlp_at(Level::current(), how, down, x, m, out);
    }

    /// [`PackedMatrix::mlp`] at a given level.
    ///
    /// # Panics
    /// As [`PackedMatrix::mlp`], or when the CPU lacks `level`.
    pub fn mlp_at(
        &self,
        level: Level,
        how: Epilogue<'_>,
        down: (&PackedMatrix, Epilogue<'_>),
        x: &[f32],
        m: usize,
        out: &mut [f32],
    ) {
        let width = how.width(self.rows);
        assert!(how.gate.is_some() && down.0.cols == width, "gate and down");
        #[cfg(target_arch = "x86_64")]
        if level == Level::Amx && m >= amx::MIN_ROWS && amx::pairs_gates(self) {
            assert!(level <= Level::detected(), "this CPU lacks level amx");
            assert_eq!(x.len(), m * self.cols, "x must be [m, cols]");
            assert_eq!(out.len(), m * down.0.rows, "out must be [m, down.rows]");
            for (matrix, how) in [(self, how), down] {
                assert!(how.bias.is_none_or(|bias| bias.len() == matrix.rows));
            }
            // SAFETY: the level was checked, and it implies AVX-512.
            unsafe { amx::mlp::<Hardware, amx::Avx512>((self, how), down, x, m, out) };
            return;
        }
        HIDDEN.with(|cell| {
            let mut hidden = cell.take();
            hidden.resize(hidden.len().max(m * width), 0.0);
            let rows = &mut hidden[..m * width];
            self.matmul_at(level, x, m, rows, how);
            down.0.matmul_at(level, rows, m, out, down.1);
            cell.replace(hidden);
        });
    }

    /// The integer path: quantise `x` once, then run every panel over every row block.
    fn product(
        &self,
        level: Level,
        activations: &mut Activations,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        epilogue: Epilogue<'_>,
    ) {
        let formats = self.segments.iter().map(|segment| segment.format);
        activations.prepare(level, x, m, self.cols, formats);
        let activations = &*activations;
        let out = SharedMut::new(out);
        let row_blocks = m.div_ceil(ROW_BLOCK);
        let chunk = (ACTIVATION_BYTES / (self.cols * 2 * ROW_BLOCK)).clamp(1, row_blocks);
        let chunks = row_blocks.div_ceil(chunk);
        // One unit is some panels over one chunk of rows; panels run fastest, so that a thread
        // streams weights while its activations stay in cache. Several panels at a time write
        // whole runs of each output row, which spares address translations.
        let width = if row_blocks > 1 { PANEL_GROUP } else { 1 };
        let panel_groups = self.panels.div_ceil(width);
        Pool::global().for_each_in_runs(chunks * panel_groups, |unit| {
            let first = unit / panel_groups * chunk;
            let panel = unit % panel_groups * width;
            for index in first..(first + chunk).min(row_blocks) {
                for panel in panel..(panel + width).min(self.panels) {
                    self.panel_product(level, panel, activations, index, &out, epilogue);
                }
            }
        });
    }

    /// One panel over one row block.
    fn panel_product(
        &self,
        level: Level,
        panel: usize,
        activations: &Activations,
        index: usize,
        out: &SharedMut<f32>,
        epilogue: Epilogue<'_>,
    ) {
        let (segment, data, row, rows) = self.panel(panel);
        let multipliers = &self.multipliers[panel * LANES..][..LANES];
        let block = activations.block(index, segment.format);
        let mut sums = Sums([[0.0; LANES]; ROW_BLOCK]);
        let kernel = kernel(level, segment.format);
        // SAFETY: the level was checked; panel and block cover the same inputs.
        unsafe { kernel(data.as_ptr(), self.blocks(), &block, sums.0.as_mut_ptr()) };
        for (r, sums) in sums.0[..block.rows].iter().enumerate() {
            let start = (index * ROW_BLOCK + r) * self.rows + row;
            // SAFETY: each output is one panel's, each panel and row block one unit's.
            store(
                unsafe { out.slice(start, rows) },
                sums,
                multipliers,
                row,
                epilogue,
            );
        }
    }
}

/// Adds a panel's results for one row of `x` to the output.
#[inline]
fn store(out: &mut [f32], sums: &[f32; LANES], multipliers: &[f32], row: usize, how: Epilogue) {
    for (lane, out) in out.iter_mut().enumerate() {
        let mut value = sums[lane] * multipliers[lane];
        if let Some(bias) = how.bias {
            value += bias[row + lane];
        }
        *out = if how.accumulate { *out + value } else { value };
    }
}

/// Results of a panel, `[row of x][row of the panel]`.
#[repr(align(64))]
struct Sums([[f32; LANES]; ROW_BLOCK]);

/// Adds `x . W^T` of one panel to `sums`. Arguments: panel, its blocks, activations, sums.
type Kernel = unsafe fn(*const u8, usize, &RowBlock, *mut [f32; LANES]);

fn kernel(level: Level, format: Format) -> Kernel {
    match level {
        Level::Portable => portable::kernel(format),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => avx2::kernel(format),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx => avx512::kernel(format),
        #[cfg(not(target_arch = "x86_64"))]
        _ => portable::kernel(format),
    }
}

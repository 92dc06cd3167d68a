//! The few loops all attention is made of, each written once over [`Lanes`] and storage format,
//! and compiled for each instruction set: a small matrix product that reads the cache as it lies,
//! its expansion to f32, and the three passes over a block of logits.

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};
use super::layout::{PAGE, bf16_bits};

/// Base-2 logarithm of a rescale that is not worth doing: probabilities may grow to 2^8 before
/// the running maximum moves.
pub(super) const LAZY: f32 = 8.0;

/// How a section stores rows (see `layout`): rows 2p and 2p+1 of `cols` columns.
pub(super) trait Format: Copy + 'static {
    /// Bytes of one pair of rows of one column.
    const PAIR: usize;
    unsafe fn even<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V;
    unsafe fn odd<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V;
}

#[derive(Clone, Copy)]
pub(super) struct F32;
#[derive(Clone, Copy)]
pub(super) struct F16;
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// Keys, stored with 128 added.
#[derive(Clone, Copy)]
pub(super) struct Int8Key;
#[derive(Clone, Copy)]
pub(super) struct Int8Value;

impl Format for F32 {
    const PAIR: usize = 8;
    #[inline(always)]
    unsafe fn even<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::load(base.cast::<f32>().add(2 * pair * cols + col))
    }
    #[inline(always)]
    unsafe fn odd<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::load(base.cast::<f32>().add((2 * pair + 1) * cols + col))
    }
}

impl Format for F16 {
    const PAIR: usize = 4;
    #[inline(always)]
    unsafe fn even<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::f16_even(base.add((pair * cols + col) * 4))
    }
    #[inline(always)]
    unsafe fn odd<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::f16_odd(base.add((pair * cols + col) * 4))
    }
}

impl Format for Bf16 {
    const PAIR: usize = 4;
    #[inline(always)]
    unsafe fn even<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::bf16_even(base.add((pair * cols + col) * 4))
    }
    #[inline(always)]
    unsafe fn odd<L: Lanes>(base: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
        L::bf16_odd(base.add((pair * cols + col) * 4))
    }
}

macro_rules! int8_format {
    ($name:ty, $flip:literal) => {
        impl Format for $name {
            const PAIR: usize = 2;
            #[inline(always)]
            unsafe fn even<L: Lanes>(b: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
                L::int8::<$flip>(b.add((pair / 2 * cols + col) * 4), pair % 2 * 2)
            }
            #[inline(always)]
            unsafe fn odd<L: Lanes>(b: *const u8, cols: usize, pair: usize, col: usize) -> L::V {
                L::int8::<$flip>(b.add((pair / 2 * cols + col) * 4), pair % 2 * 2 + 1)
            }
        }
    };
}
int8_format!(Int8Key, true);
int8_format!(Int8Value, false);

/// `c[r][j] (+)= sum over k in 2*pairs of a[r][k] * b[k][j]`, `r < rows`, `j` in `cols`.
///
/// Used as logits = query . keys (k: dims, j: slots) and as out += probability . values
/// (k: slots, j: dims).
pub(super) struct Product {
    pub a: *const f32,
    pub a_stride: usize,
    pub rows: usize,
    pub b: *const u8,
    /// Columns of a row of `b`.
    pub b_cols: usize,
    pub pairs: (usize, usize),
    /// Multiples of 16.
    pub cols: (usize, usize),
    pub c: *mut f32,
    pub c_stride: usize,
    /// Add to `c` instead of overwriting it.
    pub add: bool,
    /// The section that will be read as `b` later: fetched while this one is used.
    pub ahead: Option<*const u8>,
}

/// Which rows of a block of logits a pass works on: 64 slots of each.
#[derive(Clone, Copy)]
pub(super) struct Logits {
    pub s: *mut f32,
    /// Elements from row to row.
    pub stride: usize,
    pub rows: (usize, usize),
    /// Int8 only: key scales to multiply each row with, `[64]`.
    pub key_scale: *const f32,
    /// `c * log2(e)`: logits become `c * tanh`, in base 2.
    pub softcap: Option<f32>,
    /// ALiBi, or null: of each row of the block the term of slot 0 and the step from slot to slot, base 2.
    pub bias: *const [f32; 2],
    /// Visible slots of each row of the block, or null when all are.
    pub visible: *const u64,
}

/// The numbers of a tile's slots.
const SLOTS: [f32; PAGE] = {
    let mut slots = [0.0; PAGE];
    let mut slot = 0;
    while slot < PAGE {
        slots[slot] = slot as f32;
        slot += 1;
    }
    slots
};

/// Running softmax of the rows of a block.
#[derive(Clone, Copy)]
pub(super) struct Running {
    pub s: *mut f32,
    /// Elements from row to row.
    pub stride: usize,
    /// Slots of a row, a multiple of 64.
    pub cols: usize,
    pub rows: (usize, usize),
    /// Reference maximum per row, base 2; -infinity before the first visible key.
    pub max: *mut f32,
    /// Sum of probabilities per row, spread over 16 lanes.
    pub sum: *mut f32,
    pub out: *mut f32,
    pub out_cols: usize,
    /// Int8 only: value scales, folded into the probabilities after they are summed.
    pub value_scale: *const f32,
}

/// The same for 64 slots whose probabilities go to a matrix of bf16.
#[derive(Clone, Copy)]
pub(super) struct Rounded {
    /// `[rows][64]`; `cols` is 64.
    pub running: Running,
    /// Where the probabilities of these slots go, rows `stride` apart.
    pub to: *mut u16,
    pub stride: usize,
    /// Columns before `to` whose values are yet to be added: they follow the maximum.
    pub before: usize,
}

/// The loops, compiled for one instruction set.
///
/// # Safety
/// The CPU has the instruction set; all pointers are valid for what the argument structs say.
pub(super) trait Entries: Lanes {
    unsafe fn product<F: Format>(p: &Product);
    unsafe fn expand<F: Format>(b: *const u8, pairs: (usize, usize), cols: usize, to: *mut f32);
    /// Numbers that bf16 holds exactly, as `pairs` rows of `cols` interleaved pairs.
    unsafe fn interleave<F: Format>(b: *const u8, pairs: usize, cols: usize, to: *mut u8);
    unsafe fn logits(l: &Logits);
    /// Probabilities replace the logits.
    unsafe fn softmax(r: &Running);
    unsafe fn rounded_softmax(r: &Rounded);
    /// `x = 2^(x - lse)`.
    unsafe fn normalise(x: *mut f32, len: usize, lse: f32);
    /// `sums[slot] += sum over rows of 2^(s[row][slot] - lse[row])`.
    unsafe fn column_sums(s: *const f32, rows: (usize, usize), lse: *const f32, sums: *mut f32);
    /// `to[i] = from[i] * factor`.
    unsafe fn scale(from: *const f32, factor: f32, len: usize, to: *mut f32);
}

macro_rules! entries {
    ($lanes:ty $(, $features:literal)?) => {
        impl Entries for $lanes {
            unsafe fn product<F: Format>(p: &Product) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run<F: Format>(p: &Product) {
                    product::<$lanes, F>(p)
                }
                run::<F>(p)
            }
            unsafe fn expand<F: Format>(b: *const u8, k: (usize, usize), cols: usize, to: *mut f32) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run<F: Format>(b: *const u8, k: (usize, usize), cols: usize, to: *mut f32) {
                    expand::<$lanes, F>(b, k, cols, to)
                }
                run::<F>(b, k, cols, to)
            }
            unsafe fn interleave<F: Format>(b: *const u8, pairs: usize, cols: usize, to: *mut u8) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run<F: Format>(b: *const u8, pairs: usize, cols: usize, to: *mut u8) {
                    interleave::<$lanes, F>(b, pairs, cols, to)
                }
                run::<F>(b, pairs, cols, to)
            }
            unsafe fn logits(l: &Logits) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(l: &Logits) {
                    logits::<$lanes>(l)
                }
                run(l)
            }
            unsafe fn softmax(r: &Running) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(r: &Running) {
                    softmax::<$lanes>(r)
                }
                run(r)
            }
            unsafe fn rounded_softmax(r: &Rounded) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(r: &Rounded) {
                    rounded_softmax::<$lanes>(r)
                }
                run(r)
            }
            unsafe fn normalise(x: *mut f32, len: usize, lse: f32) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(x: *mut f32, len: usize, lse: f32) {
                    normalise::<$lanes>(x, len, lse)
                }
                run(x, len, lse)
            }
            unsafe fn column_sums(
                s: *const f32,
                rows: (usize, usize),
                lse: *const f32,
                sums: *mut f32,
            ) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(
                    s: *const f32,
                    rows: (usize, usize),
                    lse: *const f32,
                    sums: *mut f32,
                ) {
                    column_sums::<$lanes>(s, rows, lse, sums)
                }
                run(s, rows, lse, sums)
            }
            unsafe fn scale(from: *const f32, factor: f32, len: usize, to: *mut f32) {
                $(#[target_feature(enable = $features)])?
                unsafe fn run(from: *const f32, factor: f32, len: usize, to: *mut f32) {
                    for i in 0..len {
                        *to.add(i) = *from.add(i) * factor;
                    }
                }
                run(from, factor, len, to)
            }
        }
    };
}

entries!(Portable);
#[cfg(target_arch = "x86_64")]
entries!(Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");

#[inline(always)]
unsafe fn product<L: Lanes, F: Format>(p: &Product) {
    // A few rows more than a block has: tall and narrow blocks read (and expand) `b` only once.
    let tall = L::WIDE == 4 && F::PAIR < 8 && p.rows > L::ROWS && p.rows <= 2 * L::ROWS;
    let (most_rows, widest) = if tall {
        (2 * L::ROWS, 2)
    } else {
        (L::ROWS, L::WIDE)
    };
    let mut col = p.cols.0;
    while col < p.cols.1 {
        let left = (p.cols.1 - col) / L::N;
        let wide = if left >= widest {
            widest
        } else {
            1 << left.ilog2()
        };
        // Rows in equal shares, so that no share of one row repeats the expansion of `b`.
        let shares = p.rows.div_ceil(most_rows);
        for share in 0..shares {
            let (from, to) = (share * p.rows / shares, (share + 1) * p.rows / shares);
            let ahead = if share == 0 { p.ahead } else { None };
            match wide {
                4 => share_of_rows::<L, F, 4>(p, from, to, col, ahead),
                2 => share_of_rows::<L, F, 2>(p, from, to, col, ahead),
                _ => share_of_rows::<L, F, 1>(p, from, to, col, ahead),
            }
        }
        col += wide * L::N;
    }
}

#[inline(always)]
unsafe fn share_of_rows<L: Lanes, F: Format, const W: usize>(
    p: &Product,
    from: usize,
    to: usize,
    col: usize,
    ahead: Option<*const u8>,
) {
    // The guards are constants: each instruction set compiles only the blocks it uses.
    if W > L::WIDE {
        return;
    }
    let tall = L::WIDE == 4 && F::PAIR < 8 && W <= 2;
    match to - from {
        1 => block::<L, F, 1, W>(p, from, col, ahead),
        2 => block::<L, F, 2, W>(p, from, col, ahead),
        3 if L::ROWS > 2 => block::<L, F, 3, W>(p, from, col, ahead),
        4 if L::ROWS > 2 => block::<L, F, 4, W>(p, from, col, ahead),
        5 if L::ROWS > 2 => block::<L, F, 5, W>(p, from, col, ahead),
        6 if L::ROWS > 2 => block::<L, F, 6, W>(p, from, col, ahead),
        7 if tall => block::<L, F, 7, W>(p, from, col, ahead),
        8 if tall => block::<L, F, 8, W>(p, from, col, ahead),
        9 if tall => block::<L, F, 9, W>(p, from, col, ahead),
        10 if tall => block::<L, F, 10, W>(p, from, col, ahead),
        11 if tall => block::<L, F, 11, W>(p, from, col, ahead),
        12 if tall => block::<L, F, 12, W>(p, from, col, ahead),
        rows => unreachable!("a share of {rows} rows"),
    }
}

#[inline(always)]
unsafe fn block<L: Lanes, F: Format, const R: usize, const W: usize>(
    p: &Product,
    row: usize,
    col: usize,
    ahead: Option<*const u8>,
) {
    let mut acc = [[L::splat(0.0); W]; R];
    let c = p.c.add(row * p.c_stride + col);
    if p.add {
        for r in 0..R {
            for w in 0..W {
                acc[r][w] = L::load(c.add(r * p.c_stride + w * L::N));
            }
        }
    }
    let a = p.a.add(row * p.a_stride);
    for pair in p.pairs.0..p.pairs.1 {
        if let Some(ahead) = ahead {
            let line = ahead.wrapping_add((pair * p.b_cols + col) * F::PAIR);
            for at in (0..W * L::N * F::PAIR).step_by(64) {
                L::prefetch(line.wrapping_add(at));
            }
        }
        let mut b = [L::splat(0.0); W];
        for w in 0..W {
            b[w] = F::even::<L>(p.b, p.b_cols, pair, col + w * L::N);
        }
        for r in 0..R {
            let x = L::splat(*a.add(r * p.a_stride + 2 * pair));
            for w in 0..W {
                acc[r][w] = L::fma(x, b[w], acc[r][w]);
            }
        }
        for w in 0..W {
            b[w] = F::odd::<L>(p.b, p.b_cols, pair, col + w * L::N);
        }
        for r in 0..R {
            let x = L::splat(*a.add(r * p.a_stride + 2 * pair + 1));
            for w in 0..W {
                acc[r][w] = L::fma(x, b[w], acc[r][w]);
            }
        }
    }
    for r in 0..R {
        for w in 0..W {
            L::store(c.add(r * p.c_stride + w * L::N), acc[r][w]);
        }
    }
}

#[inline(always)]
unsafe fn expand<L: Lanes, F: Format>(
    b: *const u8,
    pairs: (usize, usize),
    cols: usize,
    to: *mut f32,
) {
    for pair in pairs.0..pairs.1 {
        for col in (0..cols).step_by(L::N) {
            L::store(
                to.add(2 * pair * cols + col),
                F::even::<L>(b, cols, pair, col),
            );
            L::store(
                to.add((2 * pair + 1) * cols + col),
                F::odd::<L>(b, cols, pair, col),
            );
        }
    }
}

#[inline(always)]
unsafe fn interleave<L: Lanes, F: Format>(b: *const u8, pairs: usize, cols: usize, to: *mut u8) {
    for pair in 0..pairs {
        for col in (0..cols).step_by(L::N) {
            let even = F::even::<L>(b, cols, pair, col);
            let odd = F::odd::<L>(b, cols, pair, col);
            L::store_bf16_pairs(to.add((pair * cols + col) * 4), even, odd);
        }
    }
}

#[inline(always)]
unsafe fn logits<L: Lanes>(l: &Logits) {
    let hidden = L::splat(f32::NEG_INFINITY);
    for row in l.rows.0..l.rows.1 {
        let bits = if l.visible.is_null() {
            u64::MAX
        } else {
            *l.visible.add(row)
        };
        let bias = if l.bias.is_null() {
            None
        } else {
            Some(*l.bias.add(row))
        };
        let s = l.s.add(row * l.stride);
        for col in (0..PAGE).step_by(L::N) {
            let mut x = L::load(s.add(col));
            if !l.key_scale.is_null() {
                x = L::mul(x, L::load(l.key_scale.add(col)));
            }
            if let Some(cap) = l.softcap {
                x = L::mul(tanh::<L>(x), L::splat(cap));
            }
            if let Some([start, step]) = bias {
                let slots = L::load(SLOTS.as_ptr().add(col));
                x = L::add(x, L::fma(L::splat(step), slots, L::splat(start)));
            }
            L::store(s.add(col), L::select(bits >> col, x, hidden));
        }
    }
}

/// `tanh(x) = 1 - 2 / (e^2x + 1)`: within 2e-7 in absolute terms.
#[inline(always)]
unsafe fn tanh<L: Lanes>(x: L::V) -> L::V {
    let exponent = L::mul(x, L::splat(2.0 * std::f32::consts::LOG2_E));
    // Beyond 2^64 the quotient no longer matters; the bound keeps every `exp2` finite. The operand
    // order lets NaN through.
    let e = L::exp2(L::min(L::splat(64.0), exponent));
    L::sub(
        L::splat(1.0),
        L::div(L::splat(2.0), L::add(e, L::splat(1.0))),
    )
}

#[inline(always)]
unsafe fn softmax<L: Lanes>(r: &Running) {
    for row in r.rows.0..r.rows.1 {
        let s = r.s.add(row * r.stride);
        let mut top = L::load(s);
        for col in (L::N..r.cols).step_by(L::N) {
            top = L::max(top, L::load(s.add(col)));
        }
        let sum = r.sum.add(row * 16);
        let max = &mut *r.max.add(row);
        if L::any_gt(top, L::splat(*max + LAZY)) {
            let new = L::reduce_max(top);
            if *max != f32::NEG_INFINITY {
                rescale::<L>(r, row, (*max - new).exp2());
            }
            *max = new;
        }
        // A row that has seen no key yet subtracts 0, so that its hidden logits stay -infinity.
        let base = L::splat(if *max == f32::NEG_INFINITY { 0.0 } else { *max });
        let mut total = L::load(sum);
        for col in (0..r.cols).step_by(2 * L::N) {
            let mut p = L::exp2(L::sub(L::load(s.add(col)), base));
            let mut q = L::exp2(L::sub(L::load(s.add(col + L::N)), base));
            total = L::add(total, L::add(p, q));
            if !r.value_scale.is_null() {
                p = L::mul(p, L::load(r.value_scale.add(col)));
                q = L::mul(q, L::load(r.value_scale.add(col + L::N)));
            }
            L::store(s.add(col), p);
            L::store(s.add(col + L::N), q);
        }
        L::store(sum, total);
    }
}

/// Multiplies a row's sum and output.
#[inline(always)]
unsafe fn rescale<L: Lanes>(r: &Running, row: usize, factor: f32) {
    let factor = L::splat(factor);
    let sum = r.sum.add(row * 16);
    L::store(sum, L::mul(L::load(sum), factor));
    let out = r.out.add(row * r.out_cols);
    for col in (0..r.out_cols).step_by(L::N) {
        L::store(out.add(col), L::mul(L::load(out.add(col)), factor));
    }
}

/// Maxima are whole numbers here: rescaling is exact in bf16 too.
#[inline(always)]
unsafe fn rounded_softmax<L: Lanes>(rounded: &Rounded) {
    let r = &rounded.running;
    for row in r.rows.0..r.rows.1 {
        let s = r.s.add(row * PAGE);
        let to = rounded.to.add(row * rounded.stride);
        let mut top = L::load(s);
        for col in (L::N..PAGE).step_by(L::N) {
            top = L::max(top, L::load(s.add(col)));
        }
        let max = &mut *r.max.add(row);
        if L::any_gt(top, L::splat(*max + LAZY)) {
            let new = L::reduce_max(top).ceil();
            if *max != f32::NEG_INFINITY {
                let factor = (*max - new).exp2();
                rescale::<L>(r, row, factor);
                for p in std::slice::from_raw_parts_mut(to.sub(rounded.before), rounded.before) {
                    *p = bf16_bits(f32::from_bits(u32::from(*p) << 16) * factor);
                }
            }
            *max = new;
        }
        let base = L::splat(if *max == f32::NEG_INFINITY { 0.0 } else { *max });
        let sum = r.sum.add(row * 16);
        let mut total = L::load(sum);
        for col in (0..PAGE).step_by(2 * L::N) {
            let mut p = L::exp2_short(L::sub(L::load(s.add(col)), base));
            let mut q = L::exp2_short(L::sub(L::load(s.add(col + L::N)), base));
            total = L::add(total, L::add(p, q));
            if !r.value_scale.is_null() {
                p = L::mul(p, L::load(r.value_scale.add(col)));
                q = L::mul(q, L::load(r.value_scale.add(col + L::N)));
            }
            L::store_bf16(to.add(col), p, q);
        }
        L::store(sum, total);
    }
}

#[inline(always)]
unsafe fn normalise<L: Lanes>(x: *mut f32, len: usize, lse: f32) {
    for at in (0..len).step_by(L::N) {
        L::store(
            x.add(at),
            L::exp2(L::sub(L::load(x.add(at)), L::splat(lse))),
        );
    }
}

#[inline(always)]
unsafe fn column_sums<L: Lanes>(
    s: *const f32,
    rows: (usize, usize),
    lse: *const f32,
    sums: *mut f32,
) {
    for col in (0..PAGE).step_by(L::N) {
        let mut total = L::load(sums.add(col));
        for row in rows.0..rows.1 {
            let x = L::load(s.add(row * PAGE + col));
            total = L::add(total, L::exp2(L::sub(x, L::splat(*lse.add(row)))));
        }
        L::store(sums.add(col), total);
    }
}

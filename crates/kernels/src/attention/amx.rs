//! The same block step on bf16 tiles (AMX): logits and outputs are products of 16 x 32 by 32 x 16
//! tiles, and a section of the cache already is a row of right-hand tiles.
//!
//! Rows go in twos of 16 and keys in chunks of up to four tiles of slots, so that four
//! accumulators stay in registers, each operand tile is used twice, and the output tiles are
//! loaded and stored once in 256 keys. Queries and probabilities are rounded to bf16; sums,
//! maxima and outputs stay f32. Int8 codes are exact in bf16: they are expanded to tiles, and
//! their scales multiply logits and probabilities as everywhere.
//!
//! [`TileUnit`] separates the walk from the instructions, so that the walk is tested with an
//! emulated unit on any CPU.

use super::flash::{Scratch, Segment, Sight, sight, visible_bits};
use super::layout::PAGE;
use super::micro::{Entries, Format, Int8Key, Int8Value, Logits, Running};
use super::{Attention, KvDtype, Tile};
use std::f32::consts::LOG2_E;

/// Rows of a step: two tiles.
pub(super) const STEP_ROWS: usize = 32;
/// Tiles of slots whose probabilities are multiplied with their values at once.
const CHUNK: usize = 4;

/// Eight tile registers of 16 rows of 64 bytes, numbered by the const parameters.
///
/// # Safety
/// `configure` comes first and `release` last on the same thread; pointers are valid for 16 rows
/// of 64 bytes at the given stride in bytes.
pub(super) trait TileUnit: 'static {
    /// Whether there is such a unit at all.
    const PRESENT: bool;
    unsafe fn configure();
    unsafe fn release();
    unsafe fn zero<const T: usize>();
    unsafe fn load<const T: usize>(from: *const u8, stride: usize);
    unsafe fn store<const T: usize>(to: *mut u8, stride: usize);
    /// `C[m][n] += sum over k of A[m][2k] * B[k][2n] + A[m][2k+1] * B[k][2n+1]`, bf16 to f32.
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>();
}

/// Stands for the lack of a tile unit.
pub(super) struct NoTiles;

impl TileUnit for NoTiles {
    const PRESENT: bool = false;
    unsafe fn configure() {}
    unsafe fn release() {}
    unsafe fn zero<const T: usize>() {}
    unsafe fn load<const T: usize>(_: *const u8, _: usize) {}
    unsafe fn store<const T: usize>(_: *mut u8, _: usize) {}
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {}
}

/// The CPU's tile unit.
#[cfg(target_arch = "x86_64")]
pub(super) struct Hardware;

// The compiler never touches tile registers by itself, so their contents last from one `asm!` to
// the next; each block still declares the registers it may change.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_asm {
    ($text:literal, $($operand:tt)*) => {
        core::arch::asm!(
            $text, $($operand)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

#[cfg(target_arch = "x86_64")]
impl TileUnit for Hardware {
    const PRESENT: bool = true;

    #[inline(always)]
    unsafe fn configure() {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        static CONFIG: Config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        tile_asm!("ldtilecfg [{}]", in(reg) &CONFIG,);
    }
    #[inline(always)]
    unsafe fn release() {
        tile_asm!("tilerelease",);
    }
    #[inline(always)]
    unsafe fn zero<const T: usize>() {
        tile_asm!("tilezero tmm{t}", t = const T,);
    }
    #[inline(always)]
    unsafe fn load<const T: usize>(from: *const u8, stride: usize) {
        tile_asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) from, s = in(reg) stride,);
    }
    #[inline(always)]
    unsafe fn store<const T: usize>(to: *mut u8, stride: usize) {
        tile_asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) to, s = in(reg) stride,);
    }
    #[inline(always)]
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {
        tile_asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,);
    }
}

/// Whether tiles fit this storage and head size; other shapes take the vector path.
pub(super) fn fits<T: TileUnit>(args: &Attention) -> bool {
    let held = matches!(args.layout.dtype, KvDtype::Bf16 | KvDtype::Int8);
    T::PRESENT && held && args.layout.head_dim.is_multiple_of(32)
}

/// `c[2*16][2*16 of f32] (+)= a[2*16][32 * depth] * b`: one square of four accumulators.
///
/// `a`: bf16 rows, `a_stride` bytes apart; `b(i)`: the i-th left tile of B, the right one lying 64
/// bytes further, rows `b_stride` bytes apart; `c`: f32 rows, `c_stride` bytes apart.
#[inline(always)]
unsafe fn square<T: TileUnit>(
    a: *const u8,
    a_stride: usize,
    b: impl Fn(usize) -> *const u8,
    b_stride: usize,
    depth: usize,
    c: *mut u8,
    c_stride: usize,
    add: bool,
) {
    let lower = c.add(16 * c_stride);
    if add {
        T::load::<0>(c, c_stride);
        T::load::<1>(c.add(64), c_stride);
        T::load::<2>(lower, c_stride);
        T::load::<3>(lower.add(64), c_stride);
    } else {
        T::zero::<0>();
        T::zero::<1>();
        T::zero::<2>();
        T::zero::<3>();
    }
    for i in 0..depth {
        let from = b(i);
        T::load::<4>(a.add(i * 64), a_stride);
        T::load::<6>(from, b_stride);
        T::load::<7>(from.add(64), b_stride);
        T::load::<5>(a.add(16 * a_stride + i * 64), a_stride);
        T::multiply::<0, 4, 6>();
        T::multiply::<1, 4, 7>();
        T::multiply::<2, 5, 6>();
        T::multiply::<3, 5, 7>();
    }
    T::store::<0>(c, c_stride);
    T::store::<1>(c.add(64), c_stride);
    T::store::<2>(lower, c_stride);
    T::store::<3>(lower.add(64), c_stride);
}

/// Logits of 32 rows and the 64 slots of one K section. `query`: bf16 `[32][dim]`; `s`: f32 rows
/// `stride` elements apart.
#[inline(always)]
unsafe fn key_logits<T: TileUnit>(
    query: *const u16,
    dim: usize,
    key: *const u8,
    s: *mut f32,
    stride: usize,
) {
    const ROW: usize = PAGE * 4;
    for half in 0..2 {
        square::<T>(
            query.cast(),
            dim * 2,
            |i| key.add(i * 16 * ROW + half * 128),
            ROW,
            dim / 32,
            s.add(half * 32).cast(),
            stride * 4,
            false,
        );
    }
}

/// A K or V section as bf16 tiles: itself, or int8 codes expanded into `room`.
#[inline(always)]
unsafe fn as_tiles<L: Entries, F: Format>(
    args: &Attention,
    section: *const u8,
    pairs: usize,
    cols: usize,
    room: *mut f32,
) -> *const u8 {
    if args.layout.dtype == KvDtype::Bf16 {
        return section;
    }
    L::interleave::<F>(section, pairs, cols, room.cast());
    room.cast()
}

unsafe fn scale_of(args: &Attention, section: *const u8) -> *const f32 {
    match args.layout.dtype {
        KvDtype::Int8 => section.add(PAGE * args.layout.padded_dim()).cast(),
        _ => std::ptr::null(),
    }
}

/// Runs the rows `rows` of a block against the tiles `tiles.0..tiles.1` of a segment.
/// `scratch.query_bf16` holds the packed queries with 32 rows to spare; `scratch.out` likewise.
///
/// # Safety
/// As `flash::run`, and [`fits`] holds, and `T` is configured.
pub(super) unsafe fn run_segment<L: Entries, T: TileUnit>(
    args: &Attention,
    kv_head: usize,
    queries: (usize, usize),
    segment: &Segment,
    tiles: (usize, usize),
    rows: (usize, usize),
    scratch: &mut Scratch,
) {
    let dim = args.layout.head_dim;
    let offset = kv_head * args.layout.section_bytes();
    let mut chunk: [Option<(&Tile, bool)>; CHUNK] = [None; CHUNK];
    let mut index = tiles.0;
    while index < tiles.1 {
        // The next tiles that any row sees, and whether they need a mask.
        let mut count = 0;
        while index < tiles.1 && count < CHUNK {
            let tile = &segment.tiles[index];
            index += 1;
            match sight(args, segment.part, queries, tile) {
                Sight::Nothing => continue,
                Sight::All => chunk[count] = Some((tile, false)),
                Sight::Some(..) => chunk[count] = Some((tile, true)),
            }
            count += 1;
        }
        if count == 0 {
            return;
        }
        // Per tile of the chunk: keys, values, their scales, the visible slots of each row.
        let mut keys = [std::ptr::null(); CHUNK];
        let mut values = [std::ptr::null(); CHUNK];
        let mut value_scales = [0f32; CHUNK * PAGE];
        for (i, (tile, _)) in chunk[..count].iter().flatten().enumerate() {
            let section = PAGE * dim / 2;
            let room = scratch.keys.room(CHUNK * section)[i * section..].as_mut_ptr();
            keys[i] =
                as_tiles::<L, Int8Key>(args, tile.keys.as_ptr().add(offset), dim / 2, PAGE, room);
            let room = scratch.values.room(CHUNK * section)[i * section..].as_mut_ptr();
            let value = tile.values.as_ptr().add(offset);
            values[i] = as_tiles::<L, Int8Value>(args, value, PAGE / 2, dim, room);
            let scales = scale_of(args, value);
            if !scales.is_null() {
                std::ptr::copy_nonoverlapping(scales, value_scales[i * PAGE..].as_mut_ptr(), PAGE);
            }
        }
        let width = CHUNK * PAGE;
        let s = scratch.logits.room(STEP_ROWS * width).as_mut_ptr();
        let p = scratch
            .probabilities
            .room(STEP_ROWS * width / 2)
            .as_mut_ptr()
            .cast::<u16>();
        for first in (rows.0..rows.1).step_by(STEP_ROWS) {
            let used = STEP_ROWS.min(rows.1 - first);
            let query = scratch
                .query_bf16
                .room((first + STEP_ROWS) * dim / 2)
                .as_ptr();
            let query = query.cast::<u16>().add(first * dim);
            for (i, (tile, partial)) in chunk[..count].iter().flatten().enumerate() {
                key_logits::<T>(query, dim, keys[i], s.add(i * PAGE), width);
                let key_scale = scale_of(args, tile.keys.as_ptr().add(offset));
                if *partial || !key_scale.is_null() || args.softcap.is_some() {
                    let visible = if *partial {
                        let bits = &mut scratch.visible;
                        visible_bits(args, segment.part, queries, tile, rows, bits);
                        scratch.visible.as_ptr().add(first)
                    } else {
                        std::ptr::null()
                    };
                    L::logits(&Logits {
                        s: s.add(i * PAGE),
                        stride: width,
                        rows: (0, used),
                        key_scale,
                        softcap: args.softcap.map(|cap| cap * LOG2_E),
                        visible,
                    });
                }
            }
            let out = scratch
                .out
                .room((first + STEP_ROWS) * dim)
                .as_mut_ptr()
                .add(first * dim);
            L::softmax(&Running {
                s,
                stride: width,
                cols: count * PAGE,
                rows: (0, used),
                max: scratch.max.room(rows.1).as_mut_ptr().add(first),
                sum: scratch.sum.room(rows.1 * 16).as_mut_ptr().add(first * 16),
                out,
                out_cols: dim,
                value_scale: match args.layout.dtype {
                    KvDtype::Int8 => value_scales.as_ptr(),
                    _ => std::ptr::null(),
                },
                bf16: p,
            });
            // Rows beyond the used ones may belong to another head: they must add nothing.
            p.add(used * width)
                .write_bytes(0, (STEP_ROWS - used) * width);
            for col in (0..dim).step_by(32) {
                let b = |i: usize| values[i / 2].add(i % 2 * 16 * dim * 4 + col * 4);
                let to = out.add(col).cast();
                square::<T>(
                    p.cast(),
                    width * 2,
                    b,
                    dim * 4,
                    2 * count,
                    to,
                    dim * 4,
                    true,
                );
            }
        }
    }
}

/// Logits of `rows` rows and one tile for the second pass: `s` is `[rows + 31][64]`, base 2 before
/// scales, caps and masks.
///
/// # Safety
/// As [`run_segment`].
pub(super) unsafe fn tile_logits<L: Entries, T: TileUnit>(
    args: &Attention,
    key: *const u8,
    rows: usize,
    query: *const u16,
    room: *mut f32,
    s: *mut f32,
) {
    let dim = args.layout.head_dim;
    let key = as_tiles::<L, Int8Key>(args, key, dim / 2, PAGE, room);
    for first in (0..rows).step_by(STEP_ROWS) {
        key_logits::<T>(query.add(first * dim), dim, key, s.add(first * PAGE), PAGE);
    }
}

#[cfg(test)]
pub(super) mod emulated {
    //! What the tile instructions compute, after Intel's description of them.

    use super::TileUnit;
    use std::cell::RefCell;

    thread_local! {
        static TILES: RefCell<Option<[[u8; 1024]; 8]>> = const { RefCell::new(None) };
    }

    pub struct Emulated;

    fn with<R>(work: impl FnOnce(&mut [[u8; 1024]; 8]) -> R) -> R {
        TILES.with_borrow_mut(|tiles| work(tiles.as_mut().expect("tiles are configured")))
    }

    fn bf16(tile: &[u8; 1024], at: usize) -> f32 {
        f32::from_bits(u32::from(u16::from_ne_bytes([tile[2 * at], tile[2 * at + 1]])) << 16)
    }

    impl TileUnit for Emulated {
        const PRESENT: bool = true;
        unsafe fn configure() {
            TILES.set(Some([[0xff; 1024]; 8]));
        }
        unsafe fn release() {
            TILES.set(None);
        }
        unsafe fn zero<const T: usize>() {
            with(|tiles| tiles[T].fill(0));
        }
        unsafe fn load<const T: usize>(from: *const u8, stride: usize) {
            with(|tiles| {
                for row in 0..16 {
                    let from = std::slice::from_raw_parts(from.add(row * stride), 64);
                    tiles[T][row * 64..][..64].copy_from_slice(from);
                }
            });
        }
        unsafe fn store<const T: usize>(to: *mut u8, stride: usize) {
            with(|tiles| {
                for row in 0..16 {
                    let to = std::slice::from_raw_parts_mut(to.add(row * stride), 64);
                    to.copy_from_slice(&tiles[T][row * 64..][..64]);
                }
            });
        }
        unsafe fn multiply<const C: usize, const A: usize, const B: usize>() {
            with(|tiles| {
                let (a, b) = (tiles[A], tiles[B]);
                for m in 0..16 {
                    for k in 0..16 {
                        for n in 0..16 {
                            let at = (m * 16 + n) * 4;
                            let c = &mut tiles[C][at..at + 4];
                            let mut sum = f32::from_ne_bytes(c.try_into().expect("four bytes"));
                            sum += bf16(&a, m * 32 + 2 * k) * bf16(&b, k * 32 + 2 * n);
                            sum += bf16(&a, m * 32 + 2 * k + 1) * bf16(&b, k * 32 + 2 * n + 1);
                            c.copy_from_slice(&sum.to_ne_bytes());
                        }
                    }
                }
            });
        }
    }
}

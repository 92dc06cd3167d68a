//! The tile unit (AMX): eight registers of 16 rows of 64 bytes, and the square of four
//! accumulators that every product is made of.
//!
//! [`TileUnit`] separates what a kernel does from the instructions, so that the same kernel runs
//! on the CPU's unit, and in tests on an emulated one on any CPU.

/// Eight tile registers of 16 rows of 64 bytes, numbered by the const parameters.
///
/// # Safety
/// `configure` comes first and `release` last on the same thread; pointers are valid for 16 rows
/// of 64 bytes at the given stride in bytes.
pub(crate) trait TileUnit: 'static {
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
pub(crate) struct NoTiles;

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
pub(crate) struct Hardware;

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

/// One square of four accumulators: `to = from + a * b`, bf16 to f32.
///
/// `a(i)`: upper and lower left-hand tile of step `i`, rows `a_stride` bytes apart; `b(i)`: left
/// and right right-hand tile; `from` (nothing: zeros) and `to`: upper left, upper right, lower
/// left and lower right result. `LOWER` false leaves out the lower half. `between(i)` runs after
/// the instructions of step `i` are under way: vector work that the tile unit need not wait for.
///
/// # Safety
/// `T` is configured and all tiles are valid at their strides.
#[inline(always)]
pub(crate) unsafe fn square<T: TileUnit, const LOWER: bool>(
    a: impl Fn(usize) -> [*const u8; 2],
    a_stride: usize,
    b: impl Fn(usize) -> [*const u8; 2],
    b_stride: usize,
    depth: usize,
    from: Option<[*mut u8; 4]>,
    to: [*mut u8; 4],
    c_stride: usize,
    mut between: impl FnMut(usize),
) {
    if let Some(from) = from {
        T::load::<0>(from[0], c_stride);
        T::load::<1>(from[1], c_stride);
        if LOWER {
            T::load::<2>(from[2], c_stride);
            T::load::<3>(from[3], c_stride);
        }
    } else {
        T::zero::<0>();
        T::zero::<1>();
        if LOWER {
            T::zero::<2>();
            T::zero::<3>();
        }
    }
    for i in 0..depth {
        let ([upper, lower], [left, right]) = (a(i), b(i));
        T::load::<4>(upper, a_stride);
        T::load::<6>(left, b_stride);
        T::load::<7>(right, b_stride);
        T::multiply::<0, 4, 6>();
        T::multiply::<1, 4, 7>();
        if LOWER {
            T::load::<5>(lower, a_stride);
            T::multiply::<2, 5, 6>();
            T::multiply::<3, 5, 7>();
        }
        between(i);
    }
    T::store::<0>(to[0], c_stride);
    T::store::<1>(to[1], c_stride);
    if LOWER {
        T::store::<2>(to[2], c_stride);
        T::store::<3>(to[3], c_stride);
    }
}

#[cfg(test)]
pub(crate) mod emulated {
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

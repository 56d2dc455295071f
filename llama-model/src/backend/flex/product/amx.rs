//! Matrix products with operands rounded to bf16 on Intel's matrix unit (AMX, from Sapphire Rapids): eight times the
//! multiply-adds that the vectors of the same core do in f32.
//!
//! The unit multiplies tiles of 16 rows: of `a`, rows of 32 terms;
//! of `b`, pairs of terms of 16 columns; it adds to 16 x 16 sums in f32. Its instructions are written in assembly, since
//! Rust's intrinsics for them are not stable.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::super::vector::Vector;
use super::avx512::{Pairs, has_dot};
use super::blocks::{Kernel, Span, Target};
use super::matrix::{Matrix, Operand, View, by_elements};
use super::simd;
use super::strip::{Steps, each_step, multiply_strip};
use super::tile::pack;

/// Rows and columns of a hardware tile of sums, and pairs of terms in a step.
pub(super) const TILE: usize = 16;
/// Rows and columns that the kernel sums at a time, two by two tiles; also terms in a step.
pub(super) const UNIT: usize = 2 * TILE;
/// Lanes (pairs of terms) of a tile of `a`, and of half a step of `b`.
pub(super) const TILE_LANES: usize = TILE * TILE;
/// Rows of a block of `a`, at most, and its lanes: 768 KB, that strips of `b` and sums have room beside it in the second-level cache.
pub(super) const BLOCK: usize = 512;
pub(super) const BLOCK_LANES: usize = 3 << 16;

/// Whether the CPU has the unit and the system lets this process use it.
pub(super) fn available() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` for the tiles' data: the state is large, so Linux saves it only for those who ask.
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx & (BF16 | TILES);
        // SAFETY: the call changes nothing but this permission, for all threads of the process.
        let granted = || unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0;
        simd::has_amx() && has_dot() && features == BF16 | TILES && granted()
    })
}

/// The shapes of the eight tile registers, all of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// The kernel; the unit must be [`available`].
pub(super) struct MatrixUnit;

impl Kernel for MatrixUnit {
    const ROWS: usize = UNIT;
    const COLS: usize = UNIT;
    const TERMS: usize = UNIT;
    const BLOCK: usize = BLOCK;
    const PACKED_TERMS: usize = 2048;
    const BLOCK_LANES: usize = BLOCK_LANES;

    fn lanes(terms: usize) -> usize {
        terms.div_ceil(UNIT) * TILE
    }

    unsafe fn pack_a(panels: *mut f32, a: Matrix, rows: Span, terms: Span) {
        unsafe { by_elements!(a => pack_rows(panels, a, rows, terms)) }
    }

    unsafe fn pack_b(strips: *mut f32, b: Matrix, cols: Span, terms: Span) {
        unsafe { by_elements!(b => pack_columns(strips, b, cols, terms)) }
    }

    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target) {
        const STEPS: Steps = Steps { kernel, panel: TILE_LANES, strip: 2 * TILE_LANES, stretch: 8 };
        unsafe { multiply_strip(&STEPS, panels, strip, terms.div_ceil(UNIT), target) }
    }

    unsafe fn begin() {
        // SAFETY: the tile registers are this thread's; the compiler never uses them.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &TILES, options(nostack, readonly)) }
    }

    unsafe fn end() {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// Calls `each` for the first of every 16 rows of `x`, up to a whole unit, and every step of 32 terms, in the order that they have
/// in memory.
pub(super) fn each_tile<T: Copy>(x: View<T>, rows: usize, steps: usize, each: impl Fn(usize, usize)) {
    let firsts = (0..rows.next_multiple_of(UNIT)).step_by(TILE);
    if x.row_stride == 1 {
        (0..steps).for_each(|step| firsts.clone().for_each(|first| each(first, step)));
    } else {
        firsts.for_each(|first| (0..steps).for_each(|step| each(first, step)));
    }
}

/// Fetches the step after the next of a row.
#[inline(always)]
pub(super) fn fetch_ahead<T>(src: *const T) {
    for line in (0..UNIT * size_of::<T>()).step_by(64) {
        // SAFETY: fetching reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(2 * UNIT).cast::<i8>().wrapping_add(line)) };
    }
}

/// Rows as tiles of 16: for each step of 32 terms, 16 rows of them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_rows<T: Operand>(panels: *mut f32, x: View<T>, rows: Span, terms: Span) {
    let steps = terms.1.div_ceil(UNIT);
    let tile = |first: usize, step: usize| panels.wrapping_add((first / TILE * steps + step) * TILE_LANES);
    let pack_tile = |first: usize, step: usize| {
        let (count, left) = (TILE.min(rows.1.saturating_sub(first)), terms.1 - step * UNIT);
        let (row, term, tile) = (rows.0 + first, terms.0 + step * UNIT, tile(first, step));
        // SAFETY: the caller's promise; only what is inside the matrix is read.
        unsafe {
            if x.col_stride == 1 {
                for r in 0..TILE {
                    let src = x.at(row + r, term);
                    let lanes = if r < count { T::pairs(src, left) } else { _mm512_setzero_ps() };
                    fetch_ahead(src);
                    _mm512_store_ps(tile.add(r * TILE), lanes);
                }
                return;
            }
            let mut lanes = [_mm512_setzero_ps(); TILE];
            if count > 0 {
                // Pairs of terms of neighbouring rows, then turned round.
                pack::<__m512, Pairs, T>(tile, x, (row, count), (term, left.min(UNIT)), TILE);
                for (pair, lanes) in lanes.iter_mut().enumerate().take(left.min(UNIT).div_ceil(2)) {
                    *lanes = _mm512_load_ps(tile.add(pair * TILE));
                }
            }
            for (r, lanes) in __m512::transpose(lanes).into_iter().enumerate() {
                _mm512_store_ps(tile.add(r * TILE), lanes);
            }
        }
    };
    each_tile(x, rows.1, steps, pack_tile);
}

/// Columns as strips of 32: for each pair of terms, 32 columns of it, up to a whole step.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_columns<T: Operand>(strips: *mut f32, x: View<T>, cols: Span, terms: Span) {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = MatrixUnit::lanes(terms.1);
        let pairs = terms.1.div_ceil(2);
        if pairs == lanes {
            return pack::<__m512, Pairs, T>(strips, x, cols, terms, UNIT);
        }
        for first in (0..cols.1).step_by(UNIT) {
            let strip = strips.add(first * lanes);
            pack::<__m512, Pairs, T>(strip, x, (cols.0 + first, UNIT.min(cols.1 - first)), terms, UNIT);
            strip.add(pairs * UNIT).write_bytes(0, (lanes - pairs) * UNIT);
        }
    }
}

/// Adds the products over `steps` of 32 terms to the tiles of sums.
///
/// # Safety
/// The panels must hold the steps; the tile registers must be configured.
#[inline(always)]
pub(super) unsafe fn kernel(steps: usize, upper: *const f32, lower: *const f32, b: *const f32) {
    // SAFETY: the caller's promise.
    unsafe {
        each_step!(
            steps, upper, lower, b, 1 x 1:
            "tileloadd tmm4, [{upper} + {row}]",
            "tileloadd tmm6, [{b} + 2*{row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 2*{row} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
        );
    }
}

/// The same for the first 16 columns alone: adds to `tmm0` and `tmm2`.
///
/// # Safety
/// As of [`kernel`].
#[inline(always)]
pub(super) unsafe fn left_kernel(steps: usize, upper: *const f32, lower: *const f32, b: *const f32) {
    // SAFETY: the caller's promise.
    unsafe {
        each_step!(
            steps, upper, lower, b, 1 x 1:
            "tileloadd tmm4, [{upper} + {row}]",
            "tileloadd tmm6, [{b} + 2*{row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
        );
    }
}

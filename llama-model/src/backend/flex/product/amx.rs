//! Matrix products with operands rounded to bf16 on Intel's matrix unit (AMX, from Sapphire Rapids): eight times the
//! multiply-adds that the vectors of the same core do in f32.
//!
//! The unit multiplies tiles of 16 rows: of `a`, rows of 32 terms;
//! of `b`, pairs of terms of 16 columns; it adds to 16 x 16 sums in f32. Its instructions are written in assembly, since
//! Rust's intrinsics for them are not stable.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use super::super::vector::{LINE, Vector, mask};
use super::avx512::{Pairs, has_dot, pairs};
use super::blocks::{Kernel, Span, Target};
use super::matrix::{Matrix, Operand, Place, View, by_elements};
use super::simd;
use super::tile::pack;

/// Rows and columns of a hardware tile of sums, and pairs of terms in a step.
pub(super) const TILE: usize = 16;
/// Rows and columns that the kernel sums at a time, two by two tiles; also terms in a step.
pub(super) const UNIT: usize = 2 * TILE;
/// Lanes (pairs of terms) of a tile of `a`, and of half a step of `b`.
pub(super) const TILE_LANES: usize = TILE * TILE;
/// Pairs of panels from which fetching the next stretch of a strip pays: fewer take as long for it as they gain.
const WORTH_FETCHING: usize = 4;
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
///
/// # Safety
/// None: fetching reads nothing.
#[inline(always)]
pub(super) unsafe fn fetch_ahead<T>(src: *const T) {
    for line in (0..UNIT * size_of::<T>()).step_by(64) {
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

/// What a kernel does in steps of 32 terms.
pub(super) struct Steps {
    /// Adds the products of so many steps of two panels and a strip to the tiles of sums, `tmm0` to `tmm3`.
    pub kernel: unsafe fn(usize, *const f32, *const f32, *const f32),
    /// Lanes of a step of a panel of 16 rows, and of a strip.
    pub panel: usize,
    pub strip: usize,
    /// Steps of a strip that all panels take before any takes the next, so that the first-level cache keeps them.
    pub stretch: usize,
}

/// The products of all panels with a strip, of so many steps.
///
/// # Safety
/// As [`Kernel::strip`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply_strip(
    steps: &Steps,
    panels: *const f32,
    strip: *const f32,
    count: usize,
    target: Target,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if count <= steps.stretch {
            multiply_stretch(steps, panels, strip, 0..count, count, std::ptr::null_mut(), target);
        } else {
            multiply_in_stretches(steps, panels, strip, count, target);
        }
    }
}

/// [`multiply_strip`] of many steps. Between stretches the sums of all panels lie together, and not in rows as far apart as the result's.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn multiply_in_stretches(steps: &Steps, panels: *const f32, strip: *const f32, count: usize, target: Target) {
    debug_assert!(target.rows <= BLOCK);
    let mut kept = Sums::<{ BLOCK * UNIT }>::unwritten();
    let stretch = count.div_ceil(count.div_ceil(steps.stretch));
    for start in (0..count).step_by(stretch) {
        let end = count.min(start + stretch);
        // SAFETY: the caller's promise; there is room for the sums of a block, which the first stretch writes.
        unsafe { multiply_stretch(steps, panels, strip, start..end, count, kept.as_mut_ptr(), target) };
    }
}

/// Some of `count` steps of all panels, whose sums are at `kept` before and after, 32 rows of 32 after the other.
///
/// # Safety
/// As of [`multiply_strip`]; there must be room at `kept`, unless these are all steps.
#[inline(always)]
unsafe fn multiply_stretch(
    steps: &Steps,
    panels: *const f32,
    strip: *const f32,
    stretch: Range<usize>,
    count: usize,
    kept: *mut f32,
    target: Target,
) {
    let mut sums = Sums::<{ UNIT * UNIT }>::unwritten();
    let (first, last) = (stretch.start == 0, stretch.end == count);
    let strip = strip.wrapping_add(stretch.start * steps.strip);
    let mut following = strip.wrapping_add(stretch.len() * steps.strip);
    let pairs = target.rows.div_ceil(UNIT);
    // Cache lines of what follows in memory, the next stretch or strip, that come meanwhile.
    let ahead = if pairs >= WORTH_FETCHING { (steps.strip / LINE).div_ceil(pairs) } else { 0 };
    for i in (0..target.rows).step_by(UNIT) {
        let upper = panels.wrapping_add((i / TILE * count + stretch.start) * steps.panel);
        let lower = upper.wrapping_add(count * steps.panel);
        let out = target.at(i, 0);
        let kept = kept.wrapping_add(i * UNIT);
        let rows = UNIT.min(target.rows - i);
        // Sums that need not go through a place of their own.
        let whole = out.f32().filter(|_| rows == UNIT && target.cols == UNIT);
        if last {
            // The next tile of the result comes from memory while this one is summed.
            for r in UNIT..(2 * UNIT).min(target.rows - i) {
                let next = target.at(i + r, 0);
                // SAFETY: fetching reads nothing.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(next.address().cast());
                    if let Some(next) = next.f32() {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(LINE).cast());
                    }
                }
            }
        }
        // SAFETY: the caller's promise; sums that are not written as they are have a place of their own.
        unsafe {
            match whole {
                _ if !first => load_sums(kept, UNIT as isize, true),
                Some(out) => load_sums(out, target.row_stride, target.add),
                None => load_sums(kept, UNIT as isize, false),
            }
            for step in 0..stretch.len() {
                for _ in 0..ahead {
                    _mm_prefetch::<_MM_HINT_T1>(following.cast());
                    following = following.wrapping_add(LINE);
                }
                let (upper, lower) = (upper.wrapping_add(step * steps.panel), lower.wrapping_add(step * steps.panel));
                (steps.kernel)(1, upper, lower, strip.wrapping_add(step * steps.strip));
            }
            match whole {
                _ if !last => store_sums(kept, UNIT as isize),
                Some(out) => store_sums(out, target.row_stride),
                None => {
                    store_sums(sums.as_mut_ptr(), UNIT as isize);
                    for r in 0..rows {
                        finish_row(target.at(i + r, 0), sums.as_mut_ptr().add(r * UNIT), target);
                    }
                }
            }
        }
    }
}

/// Sums in memory, from a cache line on.
#[repr(align(64))]
struct Sums<const LEN: usize>([MaybeUninit<f32>; LEN]);

impl<const LEN: usize> Sums<LEN> {
    const fn unwritten() -> Self {
        Self([const { MaybeUninit::uninit() }; LEN])
    }

    fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// A row of sums to its place.
#[inline(always)]
unsafe fn finish_row(out: Place, sums: *const f32, target: Target) {
    unsafe {
        match out {
            Place::F32(out) => {
                for at in (0..target.cols).step_by(TILE) {
                    let (mask, out) = (mask(target.cols - at), out.wrapping_add(at));
                    let sums = _mm512_load_ps(sums.add(at));
                    let before = if target.add { _mm512_maskz_loadu_ps(mask, out) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(sums, before));
                }
            }
            Place::Bf16(out) => {
                let mask = if target.cols >= UNIT { !0 } else { (1 << target.cols) - 1 };
                _mm512_mask_storeu_epi16(out.cast(), mask, _mm512_castps_si512(pairs(sums, UNIT)));
            }
        }
    }
}

/// The four tiles of 32 rows and columns from `out`.
fn tiles(out: *mut f32, row_stride: isize) -> [*mut f32; 4] {
    let below = out.wrapping_offset(TILE as isize * row_stride);
    [out, out.wrapping_add(TILE), below, below.wrapping_add(TILE)]
}

/// Makes the tiles of sums, `tmm0` to `tmm3`, what is at `out`, or zero.
///
/// # Safety
/// `out` must be readable for `add`; the tile registers must be configured.
#[inline(always)]
pub(super) unsafe fn load_sums(out: *mut f32, row_stride: isize, add: bool) {
    let [left, right, below, below_right] = tiles(out, row_stride);
    // SAFETY: the caller's promise.
    unsafe {
        if add {
            asm!(
                "tileloadd tmm0, [{0} + {4}]",
                "tileloadd tmm1, [{1} + {4}]",
                "tileloadd tmm2, [{2} + {4}]",
                "tileloadd tmm3, [{3} + {4}]",
                in(reg) left, in(reg) right, in(reg) below, in(reg) below_right, in(reg) 4 * row_stride,
                options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
    }
}

/// Writes the tiles of sums.
///
/// # Safety
/// `out` must be writable; the tile registers must be configured.
#[inline(always)]
pub(super) unsafe fn store_sums(out: *mut f32, row_stride: isize) {
    let [left, right, below, below_right] = tiles(out, row_stride);
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{0} + {4}], tmm0",
            "tilestored [{1} + {4}], tmm1",
            "tilestored [{2} + {4}], tmm2",
            "tilestored [{3} + {4}], tmm3",
            in(reg) left, in(reg) right, in(reg) below, in(reg) below_right, in(reg) 4 * row_stride,
            options(nostack),
        );
    }
}

/// Runs instructions for each step of two panels and a strip, which have so many parts. Tiles of `a` are in tmm4 and tmm5, of `b` in tmm6 and
/// tmm7.
macro_rules! each_step {
    ($steps:ident, $upper:ident, $lower:ident, $b:ident, $a_parts:literal x $b_parts:literal: $($instruction:expr,)*) => {
        asm!(
            "2:",
            $($instruction,)*
            concat!("add {upper}, ", $a_parts, "*1024"),
            concat!("add {lower}, ", $a_parts, "*1024"),
            concat!("add {b}, ", $b_parts, "*2048"),
            "dec {steps}",
            "jnz 2b",
            upper = inout(reg) $upper => _,
            lower = inout(reg) $lower => _,
            b = inout(reg) $b => _,
            steps = inout(reg) $steps => _,
            row = in(reg) 64usize,
            options(nostack, readonly),
        )
    };
}

pub(super) use each_step;

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

//! A strip of columns past all panels of rows on Intel's matrix unit, whose sums are in four tiles.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::vector::{LINE, mask};
use super::amx::{BLOCK, TILE, UNIT};
use super::avx512::pairs;
use super::blocks::Target;
use super::matrix::Place;

/// Pairs of panels from which fetching the next stretch of a strip pays: fewer take as long for it as they gain.
const WORTH_FETCHING: usize = 4;

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
/// As [`Kernel::strip`](super::blocks::Kernel::strip).
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

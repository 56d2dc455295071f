//! Matrix products in f32 on Intel's matrix unit, which multiplies bf16: an operand is the sum of three bf16 numbers, each the
//! rounding of what the ones before it leave (Henry, Tang and Heinecke, 2019). They hold all 24 bits of a mantissa, and of the
//! nine products of parts the six that matter are summed; what is left out is below 2^-26 of a product. The unit adds 32
//! products before it rounds into a sum, so the result is nearer to the exact one than by fused multiply-adds in f32, at
//! up to twice their rate.
//!
//! Unlike there, an infinity times a number without lower parts is NaN, and numbers below 2^-126 count as zero.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::vector::Vector;
use super::amx::{BLOCK, BLOCK_LANES, MatrixUnit, TILE, TILE_LANES, UNIT, each_tile, fetch_ahead};
use super::avx512::to_bf16;
use super::blocks::{Kernel, Span, Target};
use super::matrix::{Matrix, Operand, View, by_elements};
use super::strip::{Steps, each_step, multiply_strip};
use super::tile::ROWS_AHEAD;

/// Parts of an operand.
const PARTS: usize = 3;
/// Multiply-adds below which packing three parts of both operands costs more than it gains.
const FEW: usize = 1 << 20;
/// Multiply-adds for each element of the operands, below which it does, too.
const FEW_OF_EACH: usize = 96;

/// Whether a product is large enough, in both directions of the result.
pub(super) fn worthwhile((m, n, k): (usize, usize, usize)) -> bool {
    m * n >= FEW_OF_EACH * (m + n) && k >= TILE && m * n * k >= FEW
}

/// Terms that are packed together, at most.
const PACKED_TERMS: usize = 768;
/// All of their steps: several products for each tile that is loaded do not wait for the second-level cache.
const STRETCH: usize = PACKED_TERMS / UNIT;

/// The kernel; the unit must be [`available`](super::amx::available).
pub(super) struct ThreeParts;

impl Kernel for ThreeParts {
    const ROWS: usize = UNIT;
    const COLS: usize = UNIT;
    const TERMS: usize = UNIT;
    const BLOCK: usize = BLOCK;
    const PACKED_TERMS: usize = PACKED_TERMS;
    const BLOCK_LANES: usize = BLOCK_LANES;

    fn lanes(terms: usize) -> usize {
        PARTS * MatrixUnit::lanes(terms)
    }

    unsafe fn pack_a(panels: *mut f32, a: Matrix, rows: Span, terms: Span) {
        unsafe { by_elements!(a => pack_rows(panels, a, rows, terms)) }
    }

    unsafe fn pack_b(strips: *mut f32, b: Matrix, cols: Span, terms: Span) {
        unsafe { by_elements!(b => pack_columns(strips, b, cols, terms)) }
    }

    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target) {
        const STEPS: Steps =
            Steps { kernel, panel: PARTS * TILE_LANES, strip: 2 * PARTS * TILE_LANES, stretch: STRETCH };
        unsafe { multiply_strip(&STEPS, panels, strip, terms.div_ceil(UNIT), target) }
    }

    unsafe fn begin() {
        unsafe { MatrixUnit::begin() }
    }

    unsafe fn end() {
        unsafe { MatrixUnit::end() }
    }
}

/// The kernel for a right operand in bf16, which has no lower parts.
pub(super) struct ByBf16;

impl Kernel for ByBf16 {
    const ROWS: usize = ThreeParts::ROWS;
    const COLS: usize = ThreeParts::COLS;
    const TERMS: usize = ThreeParts::TERMS;
    /// A megabyte with 512 terms: callers pack all rows and take so many at a time.
    const BLOCK: usize = 10 * UNIT;

    fn lanes(terms: usize) -> usize {
        ThreeParts::lanes(terms)
    }

    fn lanes_of_columns(terms: usize) -> usize {
        MatrixUnit::lanes(terms)
    }

    unsafe fn pack_a(panels: *mut f32, a: Matrix, rows: Span, terms: Span) {
        unsafe { by_elements!(a => pack_rows(panels, a, rows, terms)) }
    }

    unsafe fn pack_b(strips: *mut f32, b: Matrix, cols: Span, terms: Span) {
        unsafe { MatrixUnit::pack_b(strips, b, cols, terms) }
    }

    unsafe fn strip(panels: *const f32, strip: *const f32, terms: usize, target: Target) {
        const STEPS: Steps =
            Steps { kernel: kernel_by_bf16, panel: PARTS * TILE_LANES, strip: 2 * TILE_LANES, stretch: STRETCH };
        unsafe { multiply_strip(&STEPS, panels, strip, terms.div_ceil(UNIT), target) }
    }

    unsafe fn begin() {
        unsafe { MatrixUnit::begin() }
    }

    unsafe fn end() {
        unsafe { MatrixUnit::end() }
    }
}

/// 32 terms of 16 rows.
type Block = [[__m512; TILE]; 2];

/// 32 neighbouring terms of a row, in two halves. What does not exist is zero.
#[inline(always)]
unsafe fn load_row<T: Operand>(x: View<T>, row: usize, exists: bool, (term, terms): Span) -> [__m512; 2] {
    let src = x.at(row, term);
    let terms = if exists { terms } else { 0 };
    unsafe {
        fetch_ahead(src);
        let low = T::load_first(src, terms);
        [low, T::load_first(src.wrapping_add(TILE), terms.saturating_sub(TILE))]
    }
}

/// The same of 16 rows: first the first halves.
#[inline(always)]
unsafe fn load_rows<T: Operand>(x: View<T>, (row, rows): Span, terms: Span) -> Block {
    unsafe {
        let (mut low, mut high) = ([_mm512_setzero_ps(); TILE], [_mm512_setzero_ps(); TILE]);
        for (r, (low, high)) in low.iter_mut().zip(&mut high).enumerate().take(rows) {
            [*low, *high] = load_row(x, row + r, true, terms);
        }
        [low, high]
    }
}

/// Of neighbouring rows, or rows somewhere: the rows of each of the terms 0 to 15, then of 16 to 31.
#[inline(always)]
unsafe fn load_terms<T: Operand>(x: View<T>, (row, rows): Span, (term, terms): Span) -> Block {
    unsafe {
        let mut halves = [[_mm512_setzero_ps(); TILE]; 2];
        for t in 0..terms.min(UNIT) {
            let src = x.at(row, term + t);
            halves[t / TILE][t % TILE] = if x.row_stride == 1 {
                _mm_prefetch::<_MM_HINT_T0>(src.wrapping_offset(ROWS_AHEAD * x.col_stride).cast());
                T::load_first(src, rows)
            } else {
                let mut values = [0.0f32; TILE];
                for (r, value) in values.iter_mut().enumerate().take(rows) {
                    *value = (*x.at(row + r, term + t)).value();
                }
                _mm512_loadu_ps(values.as_ptr())
            };
        }
        halves
    }
}

#[inline(always)]
unsafe fn transposed([low, high]: Block) -> Block {
    unsafe { [__m512::transpose(low), __m512::transpose(high)] }
}

/// Which numbers leave something when they are rounded: nothing is left of what is not finite.
#[inline(always)]
unsafe fn finite(x: __m512) -> __mmask16 {
    /// NaN, infinities.
    const NOT_FINITE: i32 = 0x99;
    unsafe { !_mm512_fpclass_ps_mask::<NOT_FINITE>(x) }
}

/// What is left of numbers without those that their bf16, in the low half of each lane, is.
#[inline(always)]
unsafe fn left_of(x: __m512, finite: __mmask16, short: __m512i) -> __m512 {
    unsafe { _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(short))) }
}

/// Rows as tiles of 16: for each step of 32 terms the three parts of 16 rows of them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_rows<T: Operand>(panels: *mut f32, x: View<T>, rows: Span, terms: Span) {
    let steps = terms.1.div_ceil(UNIT);
    let pack_tile = |first: usize, step: usize| {
        let rows = (rows.0 + first, TILE.min(rows.1.saturating_sub(first)));
        let terms = (terms.0 + step * UNIT, terms.1 - step * UNIT);
        let tiles = panels.wrapping_add((first / TILE * steps + step) * PARTS * TILE_LANES);
        // SAFETY: the caller's promise; only what is inside the matrix is read.
        unsafe {
            if x.col_stride == 1 {
                for r in 0..TILE {
                    pack_row(tiles.add(r * TILE), load_row(x, rows.0 + r, r < rows.1, terms));
                }
                return;
            }
            let [low, high] = transposed(load_terms(x, rows, terms));
            for (r, halves) in low.into_iter().zip(high).enumerate() {
                pack_row(tiles.add(r * TILE), halves.into());
            }
        }
    };
    each_tile(x, rows.1, steps, pack_tile);
}

/// Writes the parts of 32 numbers, each to a tile of its own.
#[inline(always)]
unsafe fn pack_row(tile: *mut f32, [mut low, mut high]: [__m512; 2]) {
    unsafe {
        let (low_finite, high_finite) = (finite(low), finite(high));
        for part in 0..PARTS {
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_store_si512(tile.add(part * TILE_LANES).cast(), both);
            low = left_of(low, low_finite, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)));
            high = left_of(high, high_finite, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(both)));
        }
    }
}

/// Columns as strips of 32: for each step of 32 terms the three parts of 16 pairs of terms of 32 columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_columns<T: Operand>(strips: *mut f32, x: View<T>, cols: Span, terms: Span) {
    let steps = terms.1.div_ceil(UNIT);
    let pack_tile = |first: usize, step: usize| {
        let cols = (cols.0 + first, TILE.min(cols.1.saturating_sub(first)));
        let terms = (terms.0 + step * UNIT, terms.1 - step * UNIT);
        let strip = strips.wrapping_add((first / UNIT * steps + step) * 2 * PARTS * TILE_LANES + first % UNIT);
        // SAFETY: the caller's promise; only what is inside the matrix is read.
        unsafe {
            let halves =
                if x.col_stride == 1 { transposed(load_rows(x, cols, terms)) } else { load_terms(x, cols, terms) };
            for (pair, values) in halves.as_flattened().as_chunks::<2>().0.iter().enumerate() {
                let [mut even, mut odd] = *values;
                let (even_finite, odd_finite) = (finite(even), finite(odd));
                for part in 0..PARTS {
                    let (even_part, odd_part) = (to_bf16(even), to_bf16(odd));
                    let both = _mm512_or_si512(even_part, _mm512_slli_epi32::<16>(odd_part));
                    _mm512_store_si512(strip.add((part * TILE + pair) * UNIT).cast(), both);
                    even = left_of(even, even_finite, even_part);
                    odd = left_of(odd, odd_finite, odd_part);
                }
            }
        }
    };
    each_tile(x, cols.1, steps, pack_tile);
}

/// Loads a part of the upper or the lower tile of `a`.
macro_rules! a {
    ($part:literal upper) => {
        concat!("tileloadd tmm4, [{upper} + {row} + ", $part, "*1024]")
    };
    ($part:literal lower) => {
        concat!("tileloadd tmm5, [{lower} + {row} + ", $part, "*1024]")
    };
}
/// Loads a part of the left or the right tile of `b`.
macro_rules! b {
    ($part:literal left) => {
        concat!("tileloadd tmm6, [{b} + 2*{row} + ", $part, "*2048]")
    };
    ($part:literal right) => {
        concat!("tileloadd tmm7, [{b} + 2*{row} + 64 + ", $part, "*2048]")
    };
}
/// Adds the product of a tile of `a` and one of `b`.
macro_rules! product {
    (upper left) => {
        "tdpbf16ps tmm0, tmm4, tmm6"
    };
    (upper right) => {
        "tdpbf16ps tmm1, tmm4, tmm7"
    };
    (lower left) => {
        "tdpbf16ps tmm2, tmm5, tmm6"
    };
    (lower right) => {
        "tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Adds the products over `steps` of 32 terms to the tiles of sums, `tmm0` to `tmm3`.
///
/// # Safety
/// The panels must hold the steps; the tile registers must be configured.
#[inline(always)]
unsafe fn kernel(steps: usize, upper: *const f32, lower: *const f32, b: *const f32) {
    // Of `a` and `b` one part each at a time, in an order that changes one of them, a tile as soon as it has been used: parts 0 2, 0 1, 1 1, 1 0,
    // 0 0 and 2 0.
    // SAFETY: the caller's promise.
    unsafe {
        each_step!(
            steps, upper, lower, b, 3 x 3:
            a!(0 upper), b!(2 left), product!(upper left),
            b!(2 right), product!(upper right),
            a!(0 lower), product!(lower left), b!(1 left), product!(lower right),
            product!(upper left), b!(1 right), product!(lower left),
            product!(upper right), a!(1 upper), product!(lower right), a!(1 lower),
            product!(upper left), product!(lower left), b!(0 left),
            product!(upper right), product!(lower right), b!(0 right),
            product!(upper left), product!(upper right), a!(0 upper),
            product!(lower left), product!(lower right), a!(0 lower),
            product!(upper left), product!(upper right), a!(2 upper),
            product!(lower left), product!(lower right), a!(2 lower),
            product!(upper left), product!(upper right), product!(lower left), product!(lower right),
        );
    }
}

/// The same for a `b` of one part.
///
/// # Safety
/// As of [`kernel`].
#[inline(always)]
unsafe fn kernel_by_bf16(steps: usize, upper: *const f32, lower: *const f32, b: *const f32) {
    // SAFETY: the caller's promise.
    unsafe {
        each_step!(
            steps, upper, lower, b, 3 x 1:
            a!(2 upper), b!(0 left), product!(upper left),
            b!(0 right), product!(upper right), a!(1 upper),
            a!(2 lower), product!(lower left), product!(lower right), a!(1 lower),
            product!(upper left), product!(upper right), a!(0 upper),
            product!(lower left), product!(lower right), a!(0 lower),
            product!(upper left), product!(upper right), product!(lower left), product!(lower right),
        );
    }
}

//! Products of many rows with weights as inference stores them, in bf16, where the CPU multiplies that faster than floats. The rows are packed
//! once for all weights, and a weight from the form that it has in memory. Rows are rounded to bf16, or are sums of three such numbers that have
//! all of their bits: with a weight that is bf16 the matrix unit then gives the products of floats, for half of what two floats cost it.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::stored::avx512::Widened;
use super::super::stored::{Stored, Symmetric};
use super::super::vector::{Vector, widen};
use super::super::{Buffer, Output, team};
use super::avx512::Pairs;
use super::blocks::{Kernel, OWN, TERMS, Target, with_buffer};
use super::matrix::{Matrix, Place};
use super::tile::Tiles;
use crate::backend::QUANT_BLOCK;

/// Columns of a strip: of both kernels.
const STRIP: usize = 32;
/// Terms that are packed together, those of a block.
const STEP: usize = QUANT_BLOCK;
/// Rows of a weight that are packed at a time: 256 KB with their terms.
const PACKED: usize = 8 * STRIP;
/// Rows of the input that a task packs, at most.
const ROWS: usize = 64;

/// What multiplies pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend::flex) enum Bf16Unit {
    #[cfg(target_os = "linux")]
    Matrix,
    /// The matrix unit with rows that are not rounded.
    #[cfg(target_os = "linux")]
    MatrixUnrounded,
    Vectors,
}

impl Bf16Unit {
    /// The fastest, if it is faster than the multiplication of floats.
    pub fn fastest() -> Option<Self> {
        #[cfg(target_os = "linux")]
        if super::amx::available() {
            return Some(Self::Matrix);
        }
        (super::simd::has_avx512() && super::avx512::fast_dot()).then_some(Self::Vectors)
    }

    /// What multiplies floats with weights in bf16 faster than with floats.
    pub fn unrounded() -> Option<Self> {
        #[cfg(target_os = "linux")]
        if super::amx::available() {
            return Some(Self::MatrixUnrounded);
        }
        None
    }

    /// All that this CPU has and that round.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let mut units = Vec::new();
        #[cfg(target_os = "linux")]
        if super::amx::available() {
            units.push(Self::Matrix);
        }
        if super::simd::has_avx512() && super::avx512::has_dot() {
            units.push(Self::Vectors);
        }
        units
    }
}

/// Rows of the input, packed.
pub(in crate::backend::flex) struct PackedRows {
    unit: Bf16Unit,
    rows: usize,
    terms: usize,
    panels: Buffer,
}

impl PackedRows {
    /// Packs rows of `terms` numbers, whole blocks, for a unit that the CPU must have.
    pub fn new(xs: &[f32], terms: usize, unit: Bf16Unit) -> Self {
        assert!(terms.is_multiple_of(STEP), "rows of {terms} numbers are not whole blocks");
        let x = Matrix::rows(xs, xs.len() / terms, terms);
        match unit {
            #[cfg(target_os = "linux")]
            Bf16Unit::Matrix => Self::pack::<super::amx::MatrixUnit>(unit, x),
            #[cfg(target_os = "linux")]
            Bf16Unit::MatrixUnrounded => Self::pack::<super::split::ByBf16>(unit, x),
            Bf16Unit::Vectors => Self::pack::<Tiles<__m512, Pairs>>(unit, x),
        }
    }

    fn pack<K: Kernel>(unit: Bf16Unit, x: Matrix) -> Self {
        let (rows, terms, padded) = (x.rows, x.cols, x.rows.next_multiple_of(K::ROWS));
        // SAFETY: whole panels are written below.
        let mut panels = unsafe { Buffer::unwritten(padded * K::lanes(terms)) };
        let out = Output(panels.as_mut_ptr());
        let group = ROWS.next_multiple_of(K::ROWS);
        let places = stretches(terms).flat_map(|stretch| (0..rows).step_by(group).map(move |first| (first, stretch)));
        team::each(places, |(first, (start, len))| {
            let panels = out.at(padded * K::lanes(start) + first * K::lanes(len));
            // SAFETY: the rows exist, and every place of the panels is of one task; the CPU was asked.
            unsafe { K::pack_a(panels, x, (first, group.min(rows - first)), (start, len)) };
        });
        Self { unit, rows, terms, panels }
    }

    /// Writes `x · weightᵀ` to rows of `stride` from `out` on. Rows that are not rounded take weights in bf16 alone.
    ///
    /// # Safety
    /// There must be room, which nobody else uses meanwhile.
    pub unsafe fn multiply(&self, out: *mut f32, stride: usize, weight: Stored) {
        // SAFETY: the caller's promise.
        unsafe {
            match weight {
                #[cfg(target_os = "linux")]
                Stored::Bf16(w) if matches!(self.unit, Bf16Unit::MatrixUnrounded) => {
                    self.by::<super::split::ByBf16, _>(out, stride, w, &[]);
                }
                Stored::Bf16(w) => self.by_unit(out, stride, w, &[]),
                Stored::F16(w) => self.by_unit(out, stride, w, &[]),
                Stored::Q8(w, scales) => self.by_unit(out, stride, w, scales),
                Stored::Q4(w, scales) => self.by_unit(out, stride, w, scales),
                Stored::Q4Symmetric(w, scales) => self.by_unit(out, stride, w, scales),
                Stored::F32(_) => unreachable!("weights in f32 are multiplied where they are"),
            }
        }
    }

    /// # Safety
    /// As of [`multiply`](Self::multiply); `scales` must have the floats of `w`.
    unsafe fn by_unit<T: Short>(&self, out: *mut f32, stride: usize, w: &[T], scales: &[f16]) {
        // SAFETY: the caller's promise, and the CPU was asked.
        unsafe {
            match self.unit {
                #[cfg(target_os = "linux")]
                Bf16Unit::Matrix => self.by::<super::amx::MatrixUnit, T>(out, stride, w, scales),
                #[cfg(target_os = "linux")]
                Bf16Unit::MatrixUnrounded => unreachable!("weights of other types are rounded to bf16"),
                Bf16Unit::Vectors => self.by::<Tiles<__m512, Pairs>, T>(out, stride, w, scales),
            }
        }
    }

    /// # Safety
    /// As of [`by_unit`](Self::by_unit); the CPU must have the kernel's instructions.
    unsafe fn by<K: Kernel, T: Short>(&self, out: *mut f32, stride: usize, w: &[T], scales: &[f16]) {
        const { assert!(K::COLS == STRIP) };
        let (width, per_row) = (self.terms / STEP * T::LEN, self.terms / STEP * T::SCALES);
        let (cols, padded) = (w.len() / width, self.rows.next_multiple_of(K::ROWS));
        with_buffer(&OWN, PACKED * TERMS / 2, |strips| unsafe {
            // SAFETY: the caller's promise; strips and panels are of as many terms.
            K::begin();
            for (start, len) in stretches(self.terms) {
                let panels = self.panels.as_ptr().add(padded * K::lanes(start));
                let (w, scales) =
                    (w.as_ptr().add(start / STEP * T::LEN), scales.as_ptr().add(start / STEP * T::SCALES));
                for first in (0..cols).step_by(PACKED) {
                    let here = PACKED.min(cols - first);
                    for col in (0..here).step_by(STRIP) {
                        let (w, scales) = (w.add((first + col) * width), scales.add((first + col) * per_row));
                        let source =
                            Source { w, scales, width, per_row, rows: STRIP.min(here - col), steps: len / STEP };
                        pack_strip(strips.add(col * K::lanes_of_columns(len)), source);
                    }
                    for row in (0..self.rows).step_by(K::BLOCK) {
                        for col in (0..here).step_by(STRIP) {
                            let target = Target {
                                out: Place::F32(out.add(row * stride + first + col)),
                                row_stride: stride as isize,
                                rows: K::BLOCK.min(self.rows - row),
                                cols: STRIP.min(here - col),
                                add: start > 0,
                            };
                            K::strip(
                                panels.add(row * K::lanes(len)),
                                strips.add(col * K::lanes_of_columns(len)),
                                len,
                                target,
                            );
                        }
                    }
                }
            }
            K::end();
        });
    }
}

/// Start and length of stretches of whole steps that are packed together.
fn stretches(terms: usize) -> impl Iterator<Item = (usize, usize)> {
    let len = terms.div_ceil(terms.div_ceil(TERMS)).next_multiple_of(STEP);
    (0..terms).step_by(len).map(move |start| (start, len.min(terms - start)))
}

/// A form that weights are stored in.
pub(super) trait Short: Copy {
    /// Elements of 32 weights, and the floats that describe them.
    const LEN: usize;
    const SCALES: usize;
    /// 16 pairs of bf16.
    ///
    /// # Safety
    /// 32 weights must follow, and their floats; the CPU must have AVX-512 with bf16.
    unsafe fn pairs(w: *const Self, scales: *const f32) -> __m512;
}

impl Short for bf16 {
    const LEN: usize = STEP;
    const SCALES: usize = 0;
    #[inline(always)]
    unsafe fn pairs(w: *const bf16, _: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(w.cast()) }
    }
}

impl Short for f16 {
    const LEN: usize = STEP;
    const SCALES: usize = 0;
    #[inline(always)]
    unsafe fn pairs(w: *const f16, _: *const f32) -> __m512 {
        unsafe { rounded([__m512::load_f16(w), __m512::load_f16(w.add(STEP / 2))]) }
    }
}

/// Integers in blocks.
macro_rules! short_blocks {
    ($($integer:ty, $len:expr, $scales:expr);*) => {
        $(impl Short for $integer {
            const LEN: usize = $len;
            const SCALES: usize = $scales;
            #[inline(always)]
            unsafe fn pairs(w: *const Self, scales: *const f32) -> __m512 {
                unsafe { rounded(Widened::load(w, scales)) }
            }
        })*
    };
}
short_blocks!(i8, STEP, 1; u8, STEP / 2, 2; Symmetric, STEP / 2, 1);

/// 32 numbers in bf16.
#[inline(always)]
pub(super) unsafe fn rounded([low, high]: [__m512; 2]) -> __m512 {
    unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Some steps of up to a strip of rows of a weight.
struct Source<T> {
    w: *const T,
    scales: *const f16,
    /// Elements from a row to the next, and floats.
    width: usize,
    per_row: usize,
    rows: usize,
    steps: usize,
}

/// Packs a strip: for each pair of terms that of every row, nothing for rows that there are not.
///
/// # Safety
/// The rows must be there and the strip have room; the CPU must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pack_strip<T: Short>(strip: *mut f32, source: Source<T>) {
    const LANES: usize = <__m512 as Vector>::LANES;
    let Source { w, scales, width, per_row, rows, steps } = source;
    let mut floats = [[0.0; 2 * TERMS / STEP]; LANES];
    for half in (0..STRIP).step_by(LANES) {
        let here = rows.saturating_sub(half).min(LANES);
        // SAFETY: the caller's promise; fetching reads nothing.
        unsafe {
            for (row, floats) in floats.iter_mut().enumerate().take(here) {
                let scales = scales.add((half + row) * per_row);
                widen::<__m512>(floats, std::slice::from_raw_parts(scales, steps * T::SCALES));
            }
            for step in 0..steps {
                let mut square = [_mm512_setzero_ps(); LANES];
                for (row, (pairs, floats)) in square.iter_mut().zip(&floats).enumerate().take(here) {
                    let w = w.add((half + row) * width + step * T::LEN);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(LANES * width).cast());
                    *pairs = T::pairs(w, floats.as_ptr().add(step * T::SCALES));
                }
                for (pair, lanes) in __m512::transpose(square).into_iter().enumerate() {
                    _mm512_store_ps(strip.add((step * LANES + pair) * STRIP + half), lanes);
                }
            }
        }
    }
}

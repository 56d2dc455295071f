//! Products of few rows with weights as inference stores them, on Intel's matrix unit. It wants rows of its left operand as they lie in
//! memory, and pairs of terms of its right one, so the weight is the left one here: what comes out is `weight · xᵀ`, and turned round.
//! Packing a weight as the right operand takes several times as long as multiplying it with few rows.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::stored::avx512::Widened;
use super::super::stored::{Stored, Symmetric};
use super::super::vector::{Vector, mask};
use super::super::{Buffer, Output};
use super::amx::{self, MatrixUnit, TILE, TILE_LANES, UNIT};
use super::blocks::{Kernel, OWN, with_buffer};
use super::matrix::Matrix;
use super::stored::{Short, rounded};
use super::strip::{load_sums, store_sums};
use crate::backend::QUANT_BLOCK;

/// Steps of 32 terms that are widened at a time, for the first-level cache: 16 KB, and as much of the rows.
const STEPS: usize = 8;

/// Few rows of the input, packed.
pub(in crate::backend::flex) struct TurnedRows {
    rows: usize,
    terms: usize,
    /// Of each pair of terms that of 32 rows, or of as many as there are.
    strip: Buffer,
}

impl TurnedRows {
    /// Rows that are few.
    pub const MAX: usize = UNIT;

    /// Packs rows of `terms` numbers, whole blocks. The CPU must have the unit.
    pub fn new(xs: &[f32], terms: usize) -> Self {
        let rows = xs.len() / terms;
        assert!(rows <= Self::MAX && terms.is_multiple_of(QUANT_BLOCK), "{rows} rows of {terms} numbers");
        // SAFETY: all of it is written: a strip of whole steps.
        let mut strip = unsafe { Buffer::unwritten(UNIT * terms / 2) };
        with_buffer(&OWN, UNIT * terms, |parts| {
            // SAFETY: the buffer has room for them.
            let parts = unsafe { std::slice::from_raw_parts_mut(parts, UNIT * terms) };
            for (to, x) in parts.chunks_exact_mut(terms).zip(xs.chunks_exact(terms)) {
                in_order(to, x);
            }
            parts[xs.len()..].fill(0.0);
            // SAFETY: the strip has room, and the CPU was asked.
            unsafe {
                MatrixUnit::pack_b(strip.as_mut_ptr(), Matrix::rows(parts, UNIT, terms), (0, UNIT), (0, terms));
            }
        });
        Self { rows, terms, strip }
    }

    /// Writes `x · weightᵀ` to rows of `stride` from `out` on.
    ///
    /// # Safety
    /// There must be room, which nobody else uses meanwhile.
    pub unsafe fn multiply(&self, out: *mut f32, stride: usize, weight: Stored) {
        // SAFETY: the caller's promise, and the CPU was asked.
        unsafe {
            match weight {
                Stored::Bf16(w) => self.by(out, stride, w, &[]),
                Stored::F16(w) => self.by(out, stride, w, &[]),
                Stored::Q8(w, scales) => self.by(out, stride, w, scales),
                Stored::Q4(w, scales) => self.by(out, stride, w, scales),
                Stored::Q4Symmetric(w, scales) => self.by(out, stride, w, scales),
                Stored::F32(_) => unreachable!("weights in f32 are multiplied where they are"),
            }
        }
    }

    /// # Safety
    /// As of [`multiply`](Self::multiply); `scales` must have the floats of `w`; the CPU must have the unit.
    unsafe fn by<T: Turned>(&self, out: *mut f32, stride: usize, w: &[T], scales: &[f16]) {
        let blocks = self.terms / QUANT_BLOCK;
        let (width, per_row) = (blocks * T::LEN, blocks * T::SCALES);
        let cols = w.len() / width;
        #[repr(align(64))]
        struct Sums([f32; UNIT * UNIT]);
        let mut sums = Sums([0.0; UNIT * UNIT]);
        let stretches = || (0..blocks).step_by(STEPS);
        with_buffer(&OWN, 4 * STEPS * TILE_LANES, |panels| unsafe {
            // SAFETY: the caller's promise; panels and strip are of as many terms.
            MatrixUnit::begin();
            // What is multiplied was written a while ago: the unit waits for what is on its way to the cache.
            let widen = |panels: *mut f32, first: usize, start: usize| {
                let steps = STEPS.min(blocks - start);
                for row in 0..UNIT.min(cols - first) {
                    let w = &w[(first + row) * width + start * T::LEN..][..steps * T::LEN];
                    let scales = &scales[(first + row) * per_row + start * T::SCALES..][..steps * T::SCALES];
                    let tile = panels.add(row / TILE * STEPS * TILE_LANES + row % TILE * TILE);
                    widen_row(tile, w, scales, UNIT * width);
                }
            };
            let mut places = (0..cols).step_by(UNIT).flat_map(|first| stretches().map(move |start| (first, start)));
            let (mut now, mut then) = (panels, panels.add(2 * STEPS * TILE_LANES));
            let mut next = places.next();
            if let Some((first, start)) = next {
                widen(now, first, start);
            }
            while let Some((first, start)) = next {
                next = places.next();
                if let Some((first, start)) = next {
                    widen(then, first, start);
                }
                if start == 0 {
                    load_sums(sums.0.as_mut_ptr(), UNIT as isize, false);
                }
                let steps = STEPS.min(blocks - start);
                let strip = self.strip.as_ptr().add(start * TILE * UNIT);
                let lower = now.add(STEPS * TILE_LANES);
                if self.rows > TILE {
                    amx::kernel(steps, now, lower, strip);
                } else {
                    amx::left_kernel(steps, now, lower, strip);
                }
                if start + steps == blocks {
                    store_sums(sums.0.as_mut_ptr(), UNIT as isize);
                    self.turn(Output(out.add(first)), stride, &sums.0, UNIT.min(cols - first));
                }
                std::mem::swap(&mut now, &mut then);
            }
            MatrixUnit::end();
        });
    }

    /// Writes the sums of `cols` rows of a weight to columns of the result.
    ///
    /// # Safety
    /// There must be room; the CPU must have AVX-512.
    #[target_feature(enable = "avx512f")]
    unsafe fn turn(&self, out: Output, stride: usize, sums: &[f32], cols: usize) {
        for first in (0..cols).step_by(TILE) {
            let mask = mask(cols - first);
            for from in (0..self.rows).step_by(TILE) {
                // SAFETY: the caller's promise; there are as many columns of sums for each of a tile's rows.
                unsafe {
                    let mut square = [_mm512_setzero_ps(); TILE];
                    for (col, lanes) in square.iter_mut().enumerate() {
                        *lanes = _mm512_loadu_ps(sums.as_ptr().add((first + col) * UNIT + from));
                    }
                    let rows = __m512::transpose(square).into_iter().enumerate();
                    for (row, lanes) in rows.take(self.rows - from) {
                        _mm512_mask_storeu_ps(out.at((from + row) * stride + first), mask, lanes);
                    }
                }
            }
        }
    }
}

/// Terms as a weight's are widened: the first halves of two blocks, then their second; a last one by itself.
fn in_order(to: &mut [f32], x: &[f32]) {
    let (whole, rest) = x.as_chunks::<{ 2 * QUANT_BLOCK }>();
    let (to, to_rest) = to.as_chunks_mut::<{ 2 * QUANT_BLOCK }>();
    for (to, x) in to.iter_mut().zip(whole) {
        for (to, from) in to.chunks_exact_mut(HALF).zip([0, 2, 1, 3]) {
            to.copy_from_slice(&x[from * HALF..][..HALF]);
        }
    }
    to_rest.copy_from_slice(rest);
}

/// Writes up to [`STEPS`] steps of a row in bf16, each to a tile of its own, and asks for what lies so many elements further on.
///
/// # Safety
/// There must be tiles; the CPU must have the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn widen_row<T: Turned>(tiles: *mut f32, w: &[T], scales: &[f16], ahead: usize) {
    let bytes = T::LEN * size_of::<T>();
    let mut floats = std::mem::MaybeUninit::<[f32; 2 * STEPS]>::uninit();
    let floats = floats.as_mut_ptr().cast::<f32>();
    // SAFETY: the caller's promise; fetching reads nothing.
    unsafe {
        let scales = _mm256_maskz_loadu_epi16(mask(scales.len()), scales.as_ptr().cast());
        _mm512_storeu_ps(floats, _mm512_cvtph_ps(scales));
        let steps = w.len() / T::LEN;
        let at = |step: usize| (w.as_ptr().add(step * T::LEN), floats.add(step * T::SCALES));
        for line in (0..steps * bytes).step_by(64) {
            __m512::prefetch_far(w.as_ptr().wrapping_add(ahead).cast::<u8>().wrapping_add(line).cast());
        }
        for step in (0..steps / 2 * 2).step_by(2) {
            let (w, floats) = at(step);
            let [first, second] = T::pairs_of_two(w, floats);
            _mm512_store_ps(tiles.add(step * TILE_LANES), first);
            _mm512_store_ps(tiles.add((step + 1) * TILE_LANES), second);
        }
        if steps % 2 == 1 {
            let (w, floats) = at(steps - 1);
            _mm512_store_ps(tiles.add((steps - 1) * TILE_LANES), T::pairs(w, floats));
        }
    }
}

/// A form of weights that is widened two blocks at a time.
trait Turned: Short {
    /// Pairs of bf16 of two blocks: of their first halves, and of their second.
    ///
    /// # Safety
    /// As of [`Short::pairs`], with 64 weights.
    unsafe fn pairs_of_two(w: *const Self, scales: *const f32) -> [__m512; 2];
}

const HALF: usize = QUANT_BLOCK / 2;

impl Turned for bf16 {
    #[inline(always)]
    unsafe fn pairs_of_two(w: *const bf16, _: *const f32) -> [__m512; 2] {
        unsafe { [halves(w, w.add(2 * HALF)), halves(w.add(HALF), w.add(3 * HALF))] }
    }
}

impl Turned for f16 {
    #[inline(always)]
    unsafe fn pairs_of_two(w: *const f16, _: *const f32) -> [__m512; 2] {
        unsafe {
            let first = [__m512::load_f16(w), __m512::load_f16(w.add(2 * HALF))];
            let second = [__m512::load_f16(w.add(HALF)), __m512::load_f16(w.add(3 * HALF))];
            [rounded(first), rounded(second)]
        }
    }
}

impl Turned for i8 {
    #[inline(always)]
    unsafe fn pairs_of_two(w: *const i8, scales: *const f32) -> [__m512; 2] {
        unsafe {
            let (first, second) = (Widened::load(w, scales), Widened::load(w.add(QUANT_BLOCK), scales.add(1)));
            [rounded([first[0], second[0]]), rounded([first[1], second[1]])]
        }
    }
}

impl Turned for u8 {
    #[inline(always)]
    unsafe fn pairs_of_two(w: *const u8, scales: *const f32) -> [__m512; 2] {
        unsafe {
            let counts = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
            let first = _mm512_fmadd_ps(counts, _mm512_set1_ps(*scales), _mm512_set1_ps(*scales.add(1)));
            let second = _mm512_fmadd_ps(counts, _mm512_set1_ps(*scales.add(2)), _mm512_set1_ps(*scales.add(3)));
            of_four_bits(w, first, second)
        }
    }
}

impl Turned for Symmetric {
    #[inline(always)]
    unsafe fn pairs_of_two(w: *const Symmetric, scales: *const f32) -> [__m512; 2] {
        unsafe {
            let counts = _mm512_set_ps(7., 6., 5., 4., 3., 2., 1., 0., -1., -2., -3., -4., -5., -6., -7., -8.);
            let first = _mm512_mul_ps(counts, _mm512_set1_ps(*scales));
            of_four_bits(w.cast(), first, _mm512_mul_ps(counts, _mm512_set1_ps(*scales.add(1))))
        }
    }
}

/// Two blocks of 4 bits, of the 16 values that each may have.
#[inline(always)]
unsafe fn of_four_bits(bytes: *const u8, first: __m512, second: __m512) -> [__m512; 2] {
    unsafe {
        let table = _mm512_castps_si512(rounded([first, second]));
        // The second block's indices are of the upper half of the table.
        let upper = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
        let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.cast()));
        let low = _mm512_ternarylogic_epi32::<0xea>(bytes, _mm512_set1_epi16(15), upper);
        let high = _mm512_or_si512(_mm512_srli_epi16::<4>(bytes), upper);
        let (low, high) = (_mm512_permutexvar_epi16(low, table), _mm512_permutexvar_epi16(high, table));
        [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
    }
}

/// 16 numbers and 16 others.
#[inline(always)]
unsafe fn halves(low: *const bf16, high: *const bf16) -> __m512 {
    unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.cast()));
        _mm512_castsi512_ps(_mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.cast())))
    }
}

//! Products of many rows with weights in blocks, as sums of whole numbers by AVX2: an instruction multiplies twice as many words, or four
//! times as many bytes, as one that multiplies floats.
//!
//! The input is rounded by blocks of its own. In words it has 15 bits, as for few rows, and a result has the digits of a sum in floats. In
//! bytes it has 8, which is what is asked for with a short precision: less than bf16 has, but for weights of 4 bits a small part of
//! what they lack themselves. Weights of 8 bits gain nothing from bytes, whose products two at a time are all that 16 bits hold.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::f16;

use super::super::simd::{self, vectorized};
use super::super::stored::Stored;
use super::super::team;
use super::super::vector::{MAX_LANES, Vector};
use super::Columns;
use super::rounded::{Block, LARGEST, scale};
use crate::Precision;
use crate::backend::QUANT_BLOCK;

/// Rows of a weight that are multiplied at a time, in two vectors.
const PANEL: usize = 16;
/// Units of four bytes, of each of its rows, that are packed at a time: 16 KB, half of a first-level cache.
const DEPTH: usize = 256;
/// Rows of the input at a time: their sums and those of the block they are in take twelve registers of sixteen.
const ROWS: usize = 3;
/// Rows of the input that meet a packed panel: 120 KB, in the second-level cache.
const HEIGHT: usize = 40 * ROWS;

/// How a block of weights is multiplied with one of the input.
///
/// # Safety
/// Of all functions: the CPU must have AVX2.
trait Form {
    /// Integers of the weights.
    type Weight: Block;
    /// Units of four bytes that a block has, of either: pairs of words, or four bytes.
    const UNITS: usize;

    /// Rounds blocks to units. Of each there are the scale and the sum of its values.
    fn round(x: &[f32], units: &mut [i32], scales: &mut [f32], sums: &mut [f32]);
    /// The units of the block at `w`, which must be there, in vectors of eight.
    unsafe fn widen(w: *const Self::Weight) -> [__m256i; 2];
    /// `sum + w · x`
    unsafe fn multiply_add(w: __m256i, x: __m256i, sum: __m256i) -> __m256i;
    /// The sums of a block as numbers of 32 bits.
    unsafe fn total(sum: __m256i) -> __m256i;
}

/// 8 bits by words.
struct EightByWords;
/// 4 bits by words.
struct FourByWords;
/// 4 bits by bytes.
struct FourByBytes;

impl Form for EightByWords {
    type Weight = i8;
    const UNITS: usize = 16;

    fn round(x: &[f32], units: &mut [i32], scales: &mut [f32], sums: &mut [f32]) {
        round_to_words(x, bytemuck::cast_slice_mut(units), scales, sums);
    }
    #[inline(always)]
    unsafe fn widen(w: *const i8) -> [__m256i; 2] {
        unsafe {
            let [first, second] = [_mm_loadu_si128(w.cast()), _mm_loadu_si128(w.add(16).cast())];
            [_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second)]
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(w: __m256i, x: __m256i, sum: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)) }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256i) -> __m256i {
        sum
    }
}

impl Form for FourByWords {
    type Weight = u8;
    const UNITS: usize = 16;

    fn round(x: &[f32], units: &mut [i32], scales: &mut [f32], sums: &mut [f32]) {
        EightByWords::round(x, units, scales, sums);
    }
    #[inline(always)]
    unsafe fn widen(w: *const u8) -> [__m256i; 2] {
        unsafe {
            let both = _mm256_cvtepu8_epi16(_mm_loadu_si128(w.cast()));
            [_mm256_and_si256(both, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(both)]
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(w: __m256i, x: __m256i, sum: __m256i) -> __m256i {
        unsafe { EightByWords::multiply_add(w, x, sum) }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256i) -> __m256i {
        sum
    }
}

impl Form for FourByBytes {
    type Weight = u8;
    const UNITS: usize = 8;

    fn round(x: &[f32], units: &mut [i32], scales: &mut [f32], sums: &mut [f32]) {
        round_to_bytes(x, bytemuck::cast_slice_mut(units), scales, sums);
    }
    #[inline(always)]
    unsafe fn widen(w: *const u8) -> [__m256i; 2] {
        unsafe {
            let w = _mm_loadu_si128(w.cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(w), w);
            [_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_setzero_si256()]
        }
    }
    /// 16 bits hold the sums of a block, which are 16 · 15 · 127 at most.
    #[inline(always)]
    unsafe fn multiply_add(w: __m256i, x: __m256i, sum: __m256i) -> __m256i {
        unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)) }
    }
    #[inline(always)]
    unsafe fn total(sum: __m256i) -> __m256i {
        unsafe { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) }
    }
}

/// The input in the forms that its products with some weights need; none where whole numbers are no faster.
#[derive(Default)]
pub(super) struct Inputs {
    words: Option<Whole>,
    bytes: Option<Whole>,
}

impl Inputs {
    pub fn new(xs: &[f32], width: usize, weights: &[Stored], precision: Precision) -> Self {
        let (faster, short) = (simd::multiplies_whole(), precision != Precision::F32);
        let by_words = |weight: &Stored| match weight {
            Stored::Q8(..) => true,
            Stored::Q4(..) => !short,
            _ => false,
        };
        let by_bytes = |weight: &Stored| short && matches!(weight, Stored::Q4(..));
        Self {
            words: (faster && weights.iter().any(by_words)).then(|| Whole::new::<EightByWords>(xs, width)),
            bytes: (faster && weights.iter().any(by_bytes)).then(|| Whole::new::<FourByBytes>(xs, width)),
        }
    }

    /// Adds `x · weightᵀ` to the columns, or says that it does not.
    ///
    /// # Safety
    /// The columns must be inside the result, one for each row of the weight, and nobody else's.
    pub unsafe fn add(&self, columns: Columns, weight: Stored) -> bool {
        // SAFETY: the caller's promise; there is an input where the CPU was asked.
        unsafe {
            match (weight, &self.words, &self.bytes) {
                (Stored::Q8(w, scales), Some(x), _) => add::<EightByWords>(columns, x, w, scales),
                (Stored::Q4(w, scales), _, Some(x)) => add::<FourByBytes>(columns, x, w, scales),
                (Stored::Q4(w, scales), Some(x), None) => add::<FourByWords>(columns, x, w, scales),
                _ => return false,
            }
        }
        true
    }
}

/// The input in whole numbers.
struct Whole {
    /// Blocks of a row.
    blocks: usize,
    pieces: Vec<Piece>,
}

/// Some blocks of some rows, row by row.
struct Piece {
    first_row: usize,
    first_block: usize,
    /// Blocks of each row.
    depth: usize,
    units: Vec<i32>,
    /// The scale of each block, and the sum of its values.
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Whole {
    /// Rounds rows of `width` numbers, whole blocks. A value that is not finite makes the sums that need it NaN or infinite.
    pub fn new<F: Form>(xs: &[f32], width: usize) -> Self {
        let (blocks, step) = (width / QUANT_BLOCK, DEPTH / F::UNITS);
        let heights = xs.chunks(HEIGHT * width).enumerate();
        let places = heights.flat_map(|(height, xs)| (0..blocks).step_by(step).map(move |first| (height, xs, first)));
        let piece = |(height, xs, first_block): (usize, &[f32], usize)| {
            let depth = step.min(blocks - first_block);
            let all = xs.len() / width * depth;
            let (mut units, mut scales, mut sums) = (vec![0; all * F::UNITS], vec![0.0; all], vec![0.0; all]);
            let floats = scales.chunks_exact_mut(depth).zip(sums.chunks_exact_mut(depth));
            let rows = xs.chunks_exact(width).zip(units.chunks_exact_mut(depth * F::UNITS));
            for ((x, units), (scales, sums)) in rows.zip(floats) {
                F::round(&x[first_block * QUANT_BLOCK..][..depth * QUANT_BLOCK], units, scales, sums);
            }
            Piece { first_row: height * HEIGHT, first_block, depth, units, scales, sums }
        };
        Self { blocks, pieces: team::map(places, piece) }
    }
}

/// Rounds whole blocks to numbers that are `largest` at most. Of each block there are the scale and the sum of its values.
#[inline(always)]
fn round_to<T>(
    x: &[f32],
    whole: &mut [T],
    scales: &mut [f32],
    sums: &mut [f32],
    largest: f32,
    narrow: impl Fn(i32) -> T,
) {
    let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(whole.as_chunks_mut::<QUANT_BLOCK>().0);
    for (((x, whole), to_scale), to_sum) in blocks.zip(scales).zip(sums) {
        let (inverse, scale) = scale(x, largest).unwrap_or_default();
        let mut sum = 0;
        for (x, to) in x.iter().zip(whole) {
            let whole = (x * inverse).round_ties_even() as i32;
            *to = narrow(whole);
            sum += whole;
        }
        (*to_scale, *to_sum) = (scale, scale * sum as f32);
    }
}

vectorized! {
    fn round_to_words<'a>(x: &'a [f32], words: &'a mut [i16], scales: &'a mut [f32], sums: &'a mut [f32]) -> () {
        round_to(x, words, scales, sums, LARGEST, |whole| whole as i16);
    }
}

vectorized! {
    fn round_to_bytes<'a>(x: &'a [f32], bytes: &'a mut [i8], scales: &'a mut [f32], sums: &'a mut [f32]) -> () {
        round_to(x, bytes, scales, sums, 127.0, |whole| whole as i8);
    }
}

/// Some blocks of a panel's rows, side by side.
struct Packed {
    /// Of each unit that of all rows.
    units: [[__m256i; 2]; DEPTH],
    /// Of each block the scales of all rows, and the minima.
    scales: [[[__m256; 2]; 2]; DEPTH / 8],
}

/// Adds `x · wᵀ` to the columns.
///
/// # Safety
/// The columns must be inside the result, one for each row of `w`, and nobody else's; `scales` must have the floats of its blocks, and `x`
/// be of this form. The CPU must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add<F: Form>(columns: Columns, x: &Whole, w: &[F::Weight], scales: &[f16]) {
    let (width, per_row) = (x.blocks * F::Weight::BYTES, x.blocks * F::Weight::SCALES);
    // SAFETY: zeros are values of both.
    let mut packed: Packed = unsafe { std::mem::zeroed() };
    for piece in &x.pieces {
        for (panel, (w, scales)) in w.chunks(PANEL * width).zip(scales.chunks(PANEL * per_row)).enumerate() {
            let columns = Columns { start: columns.start + panel * PANEL, ..columns };
            let (rows, first, height) = (w.len() / width, piece.first_block, piece.scales.len() / piece.depth);
            let (w, scales) = (&w[first * F::Weight::BYTES..], &scales[first * F::Weight::SCALES..]);
            // SAFETY: the blocks are inside of each row; the caller's promise.
            unsafe {
                pack::<F>(&mut packed, w, scales, rows, x.blocks, piece.depth);
                for row in (0..height).step_by(ROWS) {
                    match height - row {
                        1 => tile::<F, 1>(columns, rows, piece, row, &packed),
                        2 => tile::<F, 2>(columns, rows, piece, row, &packed),
                        _ => tile::<F, ROWS>(columns, rows, piece, row, &packed),
                    }
                }
            }
        }
    }
}

/// Packs the first `depth` blocks of some rows, and nothing for those that the panel lacks.
///
/// # Safety
/// They must be there; the CPU must have AVX2 and F16C.
#[inline(always)]
unsafe fn pack<F: Form>(
    packed: &mut Packed,
    w: &[F::Weight],
    scales: &[f16],
    rows: usize,
    blocks: usize,
    depth: usize,
) {
    let (width, per_row) = (blocks * F::Weight::BYTES, blocks * F::Weight::SCALES);
    for vector in 0..2 {
        let row = |i: usize| 8 * vector + i;
        let here = rows.saturating_sub(8 * vector).min(8);
        for block in 0..depth {
            // SAFETY: the CPU has the instruction.
            let mut eights = [[unsafe { _mm256_setzero_ps() }; MAX_LANES]; 2];
            let mut floats = [[0u16; 8]; 2];
            for i in 0..here {
                // SAFETY: the caller's promise; the vectors are of one size.
                unsafe {
                    let units = F::widen(w.as_ptr().add(row(i) * width + block * F::Weight::BYTES));
                    for (eight, units) in eights.iter_mut().zip(units) {
                        eight[i] = _mm256_castsi256_ps(units);
                    }
                    for (kind, floats) in floats.iter_mut().enumerate().take(F::Weight::SCALES) {
                        let at = row(i) * per_row + block * F::Weight::SCALES + kind;
                        floats[i] = scales.get_unchecked(at).to_bits();
                    }
                }
            }
            // SAFETY: the CPU has the instructions.
            unsafe {
                for (eight, square) in eights.into_iter().enumerate().take(F::UNITS / 8) {
                    for (i, unit) in __m256::transpose(square).into_iter().enumerate().take(8) {
                        packed.units[block * F::UNITS + 8 * eight + i][vector] = _mm256_castps_si256(unit);
                    }
                }
                for (kind, floats) in floats.into_iter().enumerate() {
                    packed.scales[block][kind][vector] = _mm256_cvtph_ps(transmute::<[u16; 8], __m128i>(floats));
                }
            }
        }
    }
}

/// Adds the products of `N` rows of a piece with what is packed.
///
/// # Safety
/// As of [`add`].
#[inline(always)]
unsafe fn tile<F: Form, const N: usize>(columns: Columns, rows: usize, x: &Piece, row: usize, packed: &Packed) {
    // SAFETY: the caller's promise.
    unsafe {
        let start: [usize; N] = std::array::from_fn(|n| (row + n) * x.depth);
        let units = start.map(|start| x.units.as_ptr().add(start * F::UNITS));
        let scales = start.map(|start| x.scales.as_ptr().add(start));
        let sums = start.map(|start| x.sums.as_ptr().add(start));
        let mut totals = [[_mm256_setzero_ps(); 2]; N];
        for block in 0..x.depth {
            let mut products = [[_mm256_setzero_si256(); 2]; N];
            for unit in block * F::UNITS..(block + 1) * F::UNITS {
                let w = packed.units.get_unchecked(unit);
                for (units, products) in units.iter().zip(&mut products) {
                    let x = _mm256_set1_epi32(*units.add(unit));
                    for (w, sum) in w.iter().zip(products) {
                        *sum = F::multiply_add(*w, x, *sum);
                    }
                }
            }
            let [of_rows, minima] = packed.scales.get_unchecked(block);
            for n in 0..N {
                let (scale, sum) = (_mm256_set1_ps(*scales[n].add(block)), _mm256_set1_ps(*sums[n].add(block)));
                for vector in 0..2 {
                    let total = &mut totals[n][vector];
                    let products = _mm256_cvtepi32_ps(F::total(products[n][vector]));
                    *total = _mm256_fmadd_ps(products, _mm256_mul_ps(of_rows[vector], scale), *total);
                    if F::Weight::SCALES == 2 {
                        *total = _mm256_fmadd_ps(minima[vector], sum, *total);
                    }
                }
            }
        }
        for (n, totals) in totals.into_iter().enumerate() {
            let out = columns.out.0.add((x.first_row + row + n) * columns.stride + columns.start);
            for (vector, total) in totals.into_iter().enumerate().take(rows.div_ceil(8)) {
                let (out, here) = (out.add(8 * vector), rows - 8 * vector);
                __m256::load(out, here).add(total).store(out, here);
            }
        }
    }
}

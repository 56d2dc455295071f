//! Products of many rows with weights in blocks, as sums of whole numbers by AVX2: an instruction multiplies twice as many words as one
//! that multiplies floats.
//!
//! The input has 15 bits, by blocks of its own, as for few rows, so that a result has the digits of a sum in floats. Bytes would be
//! multiplied twice as fast again, but what 8 bits lose beside an input's outliers changes what a model says.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::f16;

use super::super::simd::vectorized;
use super::super::stored::Stored;
use super::super::team;
use super::super::vector::{MAX_LANES, Vector};
use super::Columns;
use super::rounded::{Block, scale};
use crate::backend::QUANT_BLOCK;

/// Rows of a weight that are multiplied at a time, in two vectors.
const PANEL: usize = 16;
/// Blocks of theirs that are packed at a time: 16 KB, half of a first-level cache.
const DEPTH: usize = 16;
/// Rows of the input at a time: their sums and those of the block they are in take twelve registers of sixteen.
const ROWS: usize = 3;
/// Rows of the input that meet a packed panel: 120 KB, in the second-level cache.
const HEIGHT: usize = 40 * ROWS;

/// Pairs of words in a block.
const PAIRS: usize = QUANT_BLOCK / 2;

/// Integers of weights that become words.
trait Widened: Block {
    /// The halves of the block at `w`.
    ///
    /// # Safety
    /// It must be there; the CPU must have AVX2.
    unsafe fn widen(w: *const Self) -> [__m256i; 2];
}

impl Widened for i8 {
    #[inline(always)]
    unsafe fn widen(w: *const i8) -> [__m256i; 2] {
        unsafe {
            let [first, second] = [_mm_loadu_si128(w.cast()), _mm_loadu_si128(w.add(16).cast())];
            [_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second)]
        }
    }
}

impl Widened for u8 {
    #[inline(always)]
    unsafe fn widen(w: *const u8) -> [__m256i; 2] {
        unsafe {
            let both = _mm256_cvtepu8_epi16(_mm_loadu_si128(w.cast()));
            [_mm256_and_si256(both, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(both)]
        }
    }
}

/// The input in whole numbers.
pub(super) struct Words {
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
    words: Vec<i16>,
    /// The scale of each block, and the sum of its values.
    floats: Vec<[f32; 2]>,
}

impl Words {
    /// Rounds rows of `width` numbers, whole blocks. A value that is not finite makes the sums that need it NaN or infinite.
    pub fn new(xs: &[f32], width: usize) -> Self {
        let blocks = width / QUANT_BLOCK;
        let heights = xs.chunks(HEIGHT * width).enumerate();
        let places = heights.flat_map(|(height, xs)| (0..blocks).step_by(DEPTH).map(move |first| (height, xs, first)));
        let piece = |(height, xs, first_block): (usize, &[f32], usize)| {
            let depth = DEPTH.min(blocks - first_block);
            let (rows, columns) = (xs.len() / width, depth * QUANT_BLOCK);
            let (mut words, mut floats) = (vec![0; rows * columns], vec![[0.0; 2]; rows * depth]);
            let rows = words.chunks_exact_mut(columns).zip(floats.chunks_exact_mut(depth));
            for (x, (words, floats)) in xs.chunks_exact(width).zip(rows) {
                round(&x[first_block * QUANT_BLOCK..][..columns], words, floats);
            }
            Piece { first_row: height * HEIGHT, first_block, depth, words, floats }
        };
        Self { blocks, pieces: team::map(places, piece) }
    }

    /// Adds `x · weightᵀ` to the columns, if the weight is in blocks.
    ///
    /// # Safety
    /// The columns must be inside the result, one for each row of the weight, and nobody else's; the CPU must have AVX2, FMA and F16C.
    pub unsafe fn add(&self, columns: Columns, weight: Stored) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match weight {
                Stored::Q8(w, scales) => add(columns, self, w, scales),
                Stored::Q4(w, scales) => add(columns, self, w, scales),
                _ => return false,
            }
        }
        true
    }
}

vectorized! {
    /// Of each block there are the scale and the sum of its values.
    fn round<'a>(x: &'a [f32], words: &'a mut [i16], floats: &'a mut [[f32; 2]]) -> () {
        let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(words.as_chunks_mut::<QUANT_BLOCK>().0);
        for ((x, words), floats) in blocks.zip(floats) {
            let (inverse, scale) = scale(x).unwrap_or_default();
            let mut sum = 0;
            for (x, word) in x.iter().zip(words) {
                let whole = (x * inverse).round_ties_even() as i32;
                *word = whole as i16;
                sum += whole;
            }
            *floats = [scale, scale * sum as f32];
        }
    }
}

/// Some blocks of a panel's rows, side by side.
struct Packed {
    /// Of each pair of columns the words of all rows.
    pairs: [[__m256i; 2]; DEPTH * PAIRS],
    /// Of each block the scales of all rows, and the minima.
    scales: [[[__m256; 2]; 2]; DEPTH],
}

/// Adds `x · wᵀ` to the columns.
///
/// # Safety
/// As of [`Words::add`]; `scales` must have the floats of `w`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add<T: Widened>(columns: Columns, x: &Words, w: &[T], scales: &[f16]) {
    let (width, per_row) = (x.blocks * T::BYTES, x.blocks * T::SCALES);
    // SAFETY: zeros are values of both.
    let mut packed: Packed = unsafe { std::mem::zeroed() };
    for piece in &x.pieces {
        for (panel, (w, scales)) in w.chunks(PANEL * width).zip(scales.chunks(PANEL * per_row)).enumerate() {
            let columns = Columns { start: columns.start + panel * PANEL, ..columns };
            let (rows, first, height) = (w.len() / width, piece.first_block, piece.floats.len() / piece.depth);
            let (w, scales) = (&w[first * T::BYTES..], &scales[first * T::SCALES..]);
            // SAFETY: the blocks are inside of each row; the caller's promise.
            unsafe {
                pack(&mut packed, w, scales, rows, x.blocks, piece.depth);
                for row in (0..height).step_by(ROWS) {
                    match height - row {
                        1 => tile::<T, 1>(columns, rows, piece, row, &packed),
                        2 => tile::<T, 2>(columns, rows, piece, row, &packed),
                        _ => tile::<T, ROWS>(columns, rows, piece, row, &packed),
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
unsafe fn pack<T: Widened>(packed: &mut Packed, w: &[T], scales: &[f16], rows: usize, blocks: usize, depth: usize) {
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    for vector in 0..2 {
        let row = |i: usize| 8 * vector + i;
        let here = rows.saturating_sub(8 * vector).min(8);
        for block in 0..depth {
            // SAFETY: the CPU has the instruction.
            let mut halves = [[unsafe { _mm256_setzero_ps() }; MAX_LANES]; 2];
            let mut floats = [[0u16; 8]; 2];
            for i in 0..here {
                // SAFETY: the caller's promise; the vectors are of one size.
                unsafe {
                    let [first, second] = T::widen(w.as_ptr().add(row(i) * width + block * T::BYTES));
                    halves[0][i] = _mm256_castsi256_ps(first);
                    halves[1][i] = _mm256_castsi256_ps(second);
                    for (kind, floats) in floats.iter_mut().enumerate().take(T::SCALES) {
                        let at = row(i) * per_row + block * T::SCALES + kind;
                        floats[i] = scales.get_unchecked(at).to_bits();
                    }
                }
            }
            // SAFETY: the CPU has the instructions.
            unsafe {
                for (half, square) in halves.into_iter().enumerate() {
                    for (i, pair) in __m256::transpose(square).into_iter().enumerate().take(8) {
                        packed.pairs[block * PAIRS + 8 * half + i][vector] = _mm256_castps_si256(pair);
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
unsafe fn tile<T: Widened, const N: usize>(columns: Columns, rows: usize, x: &Piece, row: usize, packed: &Packed) {
    // SAFETY: the caller's promise.
    unsafe {
        let start: [usize; N] = std::array::from_fn(|n| (row + n) * x.depth);
        let words = start.map(|start| x.words.as_ptr().add(start * QUANT_BLOCK).cast::<i32>());
        let floats = start.map(|start| x.floats.as_ptr().add(start));
        let mut totals = [[_mm256_setzero_ps(); 2]; N];
        for block in 0..x.depth {
            let mut products = [[_mm256_setzero_si256(); 2]; N];
            for pair in block * PAIRS..(block + 1) * PAIRS {
                let w = packed.pairs.get_unchecked(pair);
                for (words, products) in words.iter().zip(&mut products) {
                    let x = _mm256_set1_epi32(words.add(pair).read_unaligned());
                    for (w, sum) in w.iter().zip(products) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*w, x));
                    }
                }
            }
            let [of_rows, minima] = packed.scales.get_unchecked(block);
            for n in 0..N {
                let [scale, sum] = *floats[n].add(block);
                let (scale, sum) = (_mm256_set1_ps(scale), _mm256_set1_ps(sum));
                for vector in 0..2 {
                    let total = &mut totals[n][vector];
                    let products = _mm256_cvtepi32_ps(products[n][vector]);
                    *total = _mm256_fmadd_ps(products, _mm256_mul_ps(of_rows[vector], scale), *total);
                    if T::SCALES == 2 {
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

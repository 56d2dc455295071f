//! Products of many rows with weights in blocks, as sums of whole numbers: an instruction multiplies twice as many words as one
//! that multiplies floats.
//!
//! The input has 15 bits, by blocks of its own, as for few rows, so that a result has the digits of a sum in floats. Bytes would be
//! multiplied twice as fast again, but what 8 bits lose beside an input's outliers changes what a model says.

use std::marker::PhantomData;

use half::f16;

use super::super::simd::{WordUnit, vectorized};
use super::super::stored::{Stored, Symmetric};
use super::super::team;
use super::super::vector::{MAX_LANES, Task, Vector};
use super::Columns;
use super::rounded::{Block, scale};
use super::words::{Avx2, Avx512Vnni, AvxVnni, Words};
use crate::backend::QUANT_BLOCK;
use crate::backend::rounding::nearest;

/// Vectors of a weight's rows that are multiplied at a time.
const VECTORS: usize = 2;
/// Blocks of theirs that are packed at a time: 16 or 32 KB, no more than what is left of a first-level cache.
const DEPTH: usize = 16;
/// Rows of the input that meet a packed panel: 120 KB, in the second-level cache. A multiple of what is multiplied at a time.
const HEIGHT: usize = 120;

/// Pairs of words in a block.
const PAIRS: usize = QUANT_BLOCK / 2;

/// Integers of weights that become words.
trait ToWords: Block {
    /// Part `part` of the block at `w`.
    ///
    /// # Safety
    /// As of [`Words`]'s.
    unsafe fn to_words<V: Words>(w: *const Self, part: usize) -> V;
}

impl ToWords for i8 {
    #[inline(always)]
    unsafe fn to_words<V: Words>(w: *const i8, part: usize) -> V {
        unsafe { V::of_8(w, part) }
    }
}

impl ToWords for u8 {
    #[inline(always)]
    unsafe fn to_words<V: Words>(w: *const u8, part: usize) -> V {
        unsafe { V::of_4(w, part) }
    }
}

impl ToWords for Symmetric {
    #[inline(always)]
    unsafe fn to_words<V: Words>(w: *const Symmetric, part: usize) -> V {
        unsafe { V::of_4(w.cast(), part).less(8) }
    }
}

/// Rows of the input in whole numbers.
pub(super) struct WordRows {
    unit: WordUnit,
    /// Blocks of a row.
    blocks: usize,
    pieces: Vec<Piece>,
}

/// Some blocks of some rows, row by row, with room for [`DEPTH`] in each.
struct Piece {
    first_row: usize,
    first_block: usize,
    /// Blocks of each row.
    depth: usize,
    words: Vec<i16>,
    /// The scale of each block, and the sum of its values.
    floats: Vec<[f32; 2]>,
}

impl WordRows {
    /// Rounds rows of `width` numbers, whole blocks, for a unit that the CPU must have. A value that is not finite makes the sums that need it NaN
    /// or infinite.
    pub fn new(xs: &[f32], width: usize, unit: WordUnit) -> Self {
        let blocks = width / QUANT_BLOCK;
        let heights = xs.chunks(HEIGHT * width).enumerate();
        let places = heights.flat_map(|(height, xs)| (0..blocks).step_by(DEPTH).map(move |first| (height, xs, first)));
        let piece = |(height, xs, first_block): (usize, &[f32], usize)| {
            let depth = DEPTH.min(blocks - first_block);
            let rows = xs.len() / width;
            let (mut words, mut floats) = (vec![0; rows * DEPTH * QUANT_BLOCK], vec![[0.0; 2]; rows * DEPTH]);
            let rows = words.chunks_exact_mut(DEPTH * QUANT_BLOCK).zip(floats.chunks_exact_mut(DEPTH));
            for (x, (words, floats)) in xs.chunks_exact(width).zip(rows) {
                round(&x[first_block * QUANT_BLOCK..][..depth * QUANT_BLOCK], words, floats);
            }
            Piece { first_row: height * HEIGHT, first_block, depth, words, floats }
        };
        Self { unit, blocks, pieces: team::map(places, piece) }
    }

    /// Writes `x · weightᵀ` to the columns, if the weight is in blocks.
    ///
    /// # Safety
    /// The columns must be inside the result, one for each row of the weight, and nobody else's; the CPU must have the vectors.
    pub unsafe fn multiply(&self, columns: Columns, weight: Stored) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match weight {
                Stored::Q8(w, scales) => self.by_unit(columns, w, scales),
                Stored::Q4(w, scales) => self.by_unit(columns, w, scales),
                Stored::Q4Symmetric(w, scales) => self.by_unit(columns, w, scales),
                _ => return false,
            }
        }
        true
    }

    /// # Safety
    /// As of [`multiply`](Self::multiply); `scales` must have the floats of `w`.
    unsafe fn by_unit<T: ToWords>(&self, columns: Columns, w: &[T], scales: &[f16]) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.unit {
                WordUnit::Avx2 => self.by::<Avx2, T>(columns, w, scales),
                WordUnit::AvxVnni => self.by::<AvxVnni, T>(columns, w, scales),
                WordUnit::Avx512Vnni => self.by::<Avx512Vnni, T>(columns, w, scales),
            }
        }
    }

    /// # Safety
    /// As of [`by_unit`](Self::by_unit); the CPU must have the vectors.
    unsafe fn by<V: Words, T: ToWords>(&self, columns: Columns, w: &[T], scales: &[f16]) {
        // SAFETY: the caller's promise.
        unsafe { V::run(Multiply::<V, T> { columns, x: self, w, scales, kind: PhantomData }) }
    }
}

vectorized! {
    /// Of each block there are the scale and the sum of its values.
    fn round<'a>(x: &'a [f32], words: &'a mut [i16], floats: &'a mut [[f32; 2]]) -> () {
        let blocks = x.as_chunks::<QUANT_BLOCK>().0.iter().zip(words.as_chunks_mut::<QUANT_BLOCK>().0);
        for ((x, words), floats) in blocks.zip(floats) {
            let (inverse, scale) = scale(x).unwrap_or_default();
            let mut sum = 0i32;
            for (x, word) in x.iter().zip(words) {
                let whole = nearest(x * inverse);
                *word = whole as i16;
                // Of what is no number it may be anything: so is then the scale.
                sum = sum.wrapping_add(whole);
            }
            *floats = [scale, scale * sum as f32];
        }
    }
}

/// Some blocks of a panel's rows, side by side.
struct Packed<V: Words> {
    /// Of each pair of columns the words of all rows.
    pairs: [[V; VECTORS]; DEPTH * PAIRS],
    /// Of each block the scales of all rows, and the minima.
    scales: [[[V::Floats; VECTORS]; 2]; DEPTH],
}

/// Writes `x · wᵀ` to the columns.
struct Multiply<'a, V, T> {
    columns: Columns,
    x: &'a WordRows,
    w: &'a [T],
    scales: &'a [f16],
    kind: PhantomData<V>,
}

impl<V: Words, T: ToWords> Task for Multiply<'_, V, T> {
    #[inline(always)]
    unsafe fn run(self) {
        let Self { columns, x, w, scales, .. } = self;
        let (width, per_row, panel) = (x.blocks * T::BYTES, x.blocks * T::SCALES, VECTORS * V::Floats::LANES);
        // SAFETY: zeros are values of both.
        let mut packed: Packed<V> = unsafe { std::mem::zeroed() };
        for piece in &x.pieces {
            for (index, (w, scales)) in w.chunks(panel * width).zip(scales.chunks(panel * per_row)).enumerate() {
                let columns = Columns { start: columns.start + index * panel, ..columns };
                let (rows, first, height) = (w.len() / width, piece.first_block, piece.floats.len() / DEPTH);
                let (w, scales) = (&w[first * T::BYTES..], &scales[first * T::SCALES..]);
                // SAFETY: the blocks are inside of each row; the caller's promise.
                unsafe {
                    pack(&mut packed, w, scales, rows, x.blocks, piece.depth);
                    for row in (0..height).step_by(V::ROWS) {
                        macro_rules! by_rows {
                            ($($count:literal)*) => {
                                match V::ROWS.min(height - row) {
                                    // Nothing is compiled for rows that there are not.
                                    $($count if const { $count <= V::ROWS } => {
                                        tile::<V, T, $count>(columns, rows, piece, row, &packed)
                                    })*
                                    _ => unreachable!("as many rows as vectors multiply at a time, at most"),
                                }
                            };
                        }
                        by_rows!(1 2 3 4 5 6 7 8);
                    }
                }
            }
        }
    }
}

/// Packs the first `depth` blocks of some rows, and nothing for those that the panel lacks.
///
/// # Safety
/// They must be there; the CPU must have the vectors.
#[inline(always)]
unsafe fn pack<V: Words, T: ToWords>(
    packed: &mut Packed<V>,
    w: &[T],
    scales: &[f16],
    rows: usize,
    blocks: usize,
    depth: usize,
) {
    let lanes = V::Floats::LANES;
    let (width, per_row) = (blocks * T::BYTES, blocks * T::SCALES);
    for vector in 0..VECTORS {
        let row = |i: usize| lanes * vector + i;
        let here = rows.saturating_sub(lanes * vector).min(lanes);
        for block in 0..depth {
            // SAFETY: the caller's promise; the vectors are of one size.
            unsafe {
                for part in 0..PAIRS / lanes {
                    let mut square = [V::zeros().to_bits(); MAX_LANES];
                    for (i, words) in square.iter_mut().enumerate().take(here) {
                        *words = T::to_words::<V>(w.as_ptr().add(row(i) * width + block * T::BYTES), part).to_bits();
                    }
                    for (i, pair) in V::Floats::transpose(square).into_iter().enumerate().take(lanes) {
                        packed.pairs[block * PAIRS + lanes * part + i][vector] = V::from_bits(pair);
                    }
                }
                for kind in 0..T::SCALES {
                    let mut floats = [f16::ZERO; MAX_LANES];
                    for (i, float) in floats.iter_mut().enumerate().take(here) {
                        *float = *scales.get_unchecked(row(i) * per_row + block * T::SCALES + kind);
                    }
                    packed.scales[block][kind][vector] = V::Floats::load_f16(floats.as_ptr());
                }
            }
        }
    }
}

/// Writes the products of `N` rows of a piece with what is packed, or adds them to those of the pieces before.
///
/// # Safety
/// As of [`WordRows::multiply`].
#[inline(always)]
unsafe fn tile<V: Words, T: ToWords, const N: usize>(
    columns: Columns,
    rows: usize,
    x: &Piece,
    row: usize,
    packed: &Packed<V>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let words = x.words.as_ptr().add(row * DEPTH * QUANT_BLOCK).cast::<i32>();
        let floats = x.floats.as_ptr().add(row * DEPTH);
        let mut totals = [[V::Floats::splat(0.0); VECTORS]; N];
        for block in 0..x.depth {
            let mut products = [[V::zeros(); VECTORS]; N];
            for pair in block * PAIRS..(block + 1) * PAIRS {
                let w = packed.pairs.get_unchecked(pair);
                for (n, products) in products.iter_mut().enumerate() {
                    let x = V::splat(words.add(n * DEPTH * PAIRS + pair).read_unaligned());
                    for (w, sum) in w.iter().zip(products) {
                        *sum = sum.add_products(*w, x);
                    }
                }
            }
            let [of_rows, minima] = packed.scales.get_unchecked(block);
            for n in 0..N {
                let [scale, sum] = *floats.add(n * DEPTH + block);
                let (scale, sum) = (V::Floats::splat(scale), V::Floats::splat(sum));
                for vector in 0..VECTORS {
                    let total = &mut totals[n][vector];
                    *total = products[n][vector].floats().multiply_add(of_rows[vector].multiply(scale), *total);
                    if T::SCALES == 2 {
                        *total = minima[vector].multiply_add(sum, *total);
                    }
                }
            }
        }
        for (n, totals) in totals.into_iter().enumerate() {
            let out = columns.out.0.add((x.first_row + row + n) * columns.stride + columns.start);
            for (vector, total) in totals.into_iter().enumerate().take(rows.div_ceil(V::Floats::LANES)) {
                let first = vector * V::Floats::LANES;
                let (out, here) = (out.add(first), rows - first);
                let sum = if x.first_block == 0 { total } else { V::Floats::load(out, here).add(total) };
                sum.store(out, here);
            }
        }
    }
}

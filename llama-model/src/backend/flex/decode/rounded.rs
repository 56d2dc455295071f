//! An input in whole numbers, for dots with weights in blocks: 15 bits, by blocks of its own. That is finer than the 8 bits of
//! the weights by a factor of a hundred, so that a result has the digits of a sum in floats. Instructions multiply bytes, so the 15
//! bits are a high and a low byte: `x ≈ scale · (128 · high + low)`.

use super::super::simd::vectorized;
use super::super::stored::Symmetric;
use crate::backend::QUANT_BLOCK;
use crate::backend::rounding::nearest;

/// The largest whole number: 127 · 128.
const LARGEST: f32 = 16256.0;
/// Below it the inverse of a scale would overflow; such blocks count as zeros.
const SMALLEST: f32 = 1e-30;

/// The high bytes of a block, then its low ones.
pub(in crate::backend::flex) type Bytes = [i8; 2 * QUANT_BLOCK];

/// The high or low bytes that meet one half of a block of 4 bits.
pub(super) type Half = [i8; QUANT_BLOCK / 2];
/// Of a block.
pub(super) const HALVES: usize = 4;

/// A row of the input in whole numbers.
#[derive(Default)]
pub(in crate::backend::flex) struct Rounded {
    pub bytes: Vec<Bytes>,
    /// The same for blocks that are multiplied together: of all of them the first halves of the high bytes, the second ones, and those of
    /// the low bytes. Blocks that are too few for a group are left out.
    pub halves: Vec<Half>,
    /// The sums of a block's high bytes and of its low ones.
    pub sums: Vec<[i32; 2]>,
    /// The scale of each block, with room for whole registers.
    pub scales: Vec<f32>,
    /// The scale of each block and the sum of its values.
    pub scales_and_sums: Vec<f32>,
    /// What each block's scale is multiplied with for weights that count from -8.
    pub offsets: Vec<f32>,
}

impl Rounded {
    /// Rounds a row of whole blocks. A value that is not finite makes the sums that need it NaN or infinite.
    pub fn set(&mut self, x: &[f32]) {
        let blocks = x.len() / QUANT_BLOCK;
        self.bytes.resize(blocks, [0; 2 * QUANT_BLOCK]);
        self.sums.resize(blocks, [0; 2]);
        self.scales.resize(blocks.next_multiple_of(16), 0.0);
        self.scales_and_sums.resize((2 * blocks).next_multiple_of(16), 0.0);
        self.offsets.resize(blocks.next_multiple_of(16), 0.0);
        // What a longer row left there.
        self.scales[blocks..].fill(0.0);
        self.scales_and_sums[2 * blocks..].fill(0.0);
        self.offsets[blocks..].fill(0.0);
        round(x, self);
    }

    /// Fills [`halves`](Self::halves), for groups of so many blocks; of single ones nobody reads them.
    pub fn group(&mut self, blocks: usize) {
        self.halves.clear();
        if blocks == 1 {
            return;
        }
        for group in self.bytes.chunks_exact(blocks) {
            for half in 0..HALVES {
                self.halves.extend(group.iter().map(|bytes| bytes.as_chunks().0[half]));
            }
        }
    }

    pub fn blocks(&self) -> usize {
        self.bytes.len()
    }
}

/// The integers of weights in blocks.
pub(in crate::backend::flex) trait Block: Copy {
    /// Bytes of a block.
    const BYTES: usize;
    /// Floats that describe a block: its scale, and perhaps its minimum.
    const SCALES: usize;
    /// What the floats of blocks are multiplied with.
    fn factors(x: &Rounded) -> &[f32];
    /// What the products of scales are multiplied with for the minima, where those are not stored.
    fn offsets(_: &Rounded) -> Option<&[f32]> {
        None
    }
}

impl Block for i8 {
    const BYTES: usize = QUANT_BLOCK;
    const SCALES: usize = 1;
    fn factors(x: &Rounded) -> &[f32] {
        &x.scales
    }
}

impl Block for u8 {
    const BYTES: usize = QUANT_BLOCK / 2;
    const SCALES: usize = 2;
    fn factors(x: &Rounded) -> &[f32] {
        &x.scales_and_sums
    }
}

impl Block for Symmetric {
    const BYTES: usize = QUANT_BLOCK / 2;
    const SCALES: usize = 1;
    fn factors(x: &Rounded) -> &[f32] {
        &x.scales
    }
    fn offsets(x: &Rounded) -> Option<&[f32]> {
        Some(&x.offsets)
    }
}

/// What values are multiplied with to become whole numbers, and whole numbers to become values; none for zeros.
#[inline(always)]
pub(super) fn scale(x: &[f32; QUANT_BLOCK]) -> Option<(f32, f32)> {
    // As whole numbers absolute values have the same order, and NaN is the largest.
    let max = x.iter().fold(0, |max, x| x.abs().to_bits().max(max));
    let max = f32::from_bits(max);
    (max >= SMALLEST || max.is_nan()).then_some((LARGEST / max, max / LARGEST))
}

vectorized! {
    fn round<'a>(x: &'a [f32], rounded: &'a mut Rounded) -> () {
        for (block, x) in x.as_chunks::<QUANT_BLOCK>().0.iter().enumerate() {
            let (inverse, scale) = scale(x).unwrap_or_default();
            let (highs, lows) = rounded.bytes[block].split_at_mut(QUANT_BLOCK);
            let mut sums = [0; 2];
            for ((x, high), low) in x.iter().zip(highs).zip(lows) {
                let whole = nearest(x * inverse);
                let upper = (whole + 64) >> 7;
                let lower = whole - (upper << 7);
                (*high, *low) = (upper as i8, lower as i8);
                sums = [sums[0] + upper, sums[1] + lower];
            }
            rounded.sums[block] = sums;
            let sum = 128.0 * sums[0] as f32 + sums[1] as f32;
            rounded.scales[block] = scale;
            rounded.scales_and_sums[2 * block] = scale;
            rounded.scales_and_sums[2 * block + 1] = scale * sum;
            rounded.offsets[block] = -8.0 * sum;
        }
    }
}

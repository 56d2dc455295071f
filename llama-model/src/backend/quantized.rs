//! Weights in 8 or 4 bits, for inference: the rows of a matrix in blocks of [`QUANT_BLOCK`] values.
//!
//! | bits | a block's value | bytes a weight |
//! | --- | --- | --- |
//! | 8 | `scale · q`, `q` from -127 to 127 | 1.0625 |
//! | 4 | `scale · q + min`, `q` from 0 to 15 | 0.625 |
//!
//! The integers are kept in words of 32 bits, little-endian, which every backend has. In 4 bits the byte `i` of a block has
//! value `i` in its low half and value `i + 16` in its high half, as in llama.cpp's files. Scales and minima are half
//! precision where the device has it.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{ElementConversion, Int, Tensor, TensorMetadata};
use half::f16;

use super::LlamaBackend;
use super::ops::{primitive, tensor};
use crate::Precision;

/// Values that share a scale.
pub const QUANT_BLOCK: usize = 32;

/// Bits of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// A scale for each block; zero stays zero.
    Eight,
    /// A scale and a smallest value for each block.
    Four,
}

impl Bits {
    /// Words of a block.
    pub const fn words(self) -> usize {
        match self {
            Self::Eight => QUANT_BLOCK / 4,
            Self::Four => QUANT_BLOCK / 8,
        }
    }

    /// Floats that describe a block.
    pub const fn scales(self) -> usize {
        match self {
            Self::Eight => 1,
            Self::Four => 2,
        }
    }
}

/// A weight `[d_out, d_in]` in blocks along its rows.
#[derive(Clone, Debug)]
pub struct QuantizedWeight<B: Backend> {
    /// Bits of a value.
    pub bits: Bits,
    /// The values, [`Bits::words`] for each block: `[d_out, d_in / 32 · words]`.
    pub words: IntTensor<B>,
    /// [`Bits::scales`] for each block: `[d_out, d_in / 32 · scales]`, the scale first.
    pub scales: FloatTensor<B>,
}

impl<B: Backend> QuantizedWeight<B> {
    /// `[d_out, d_in]`
    pub fn dims(&self) -> [usize; 2] {
        let [d_out, words] = self.words.shape().dims();
        [d_out, words / self.bits.words() * QUANT_BLOCK]
    }

    /// The weight in f32.
    pub fn dense(self) -> FloatTensor<B> {
        let [d_out, d_in] = self.dims();
        let words = Tensor::<B, 2, Int>::from_primitive(self.words);
        let blocks = d_out * d_in / QUANT_BLOCK;
        let words = words.reshape([blocks, self.bits.words()]);
        // The values of a word's bytes are neighbours.
        let byte = |i: i32| words.clone().bitwise_right_shift_scalar((8 * i).elem()).bitwise_and_scalar(255.elem());
        let bytes = Tensor::stack::<3>((0..4).map(byte).collect(), 2).reshape([blocks, 4 * self.bits.words()]);
        let scales = tensor::<B, 2>(self.scales).cast(burn::tensor::DType::F32).reshape([blocks, self.bits.scales()]);
        let values = match self.bits {
            Bits::Eight => {
                // Two's complement: the highest bit counts -128 instead of 128.
                let sign = bytes.clone().bitwise_and_scalar(128.elem()).mul_scalar(2);
                (bytes - sign).float() * scales
            }
            Bits::Four => {
                let low = bytes.clone().bitwise_and_scalar(15.elem());
                let high = bytes.bitwise_right_shift_scalar(4.elem());
                let [scale, min] = [0, 1].map(|i| scales.clone().narrow(1, i, 1));
                Tensor::cat(vec![low, high], 1).float() * scale + min
            }
        };
        primitive(values.reshape([d_out, d_in]))
    }
}

/// A matrix `[d_out, d_in]` as inference stores it.
#[derive(Clone, Debug)]
pub enum Matrix<B: Backend> {
    /// In the dtype of what it is multiplied with, or a shorter one.
    Floats(FloatTensor<B>),
    /// In 8 or 4 bits.
    Blocks(QuantizedWeight<B>),
}

impl<B: LlamaBackend> Matrix<B> {
    /// `x · weightᵀ` for each, in one go where all are stored alike.
    pub(crate) fn project_all<const N: usize>(
        x: FloatTensor<B>,
        weights: [Self; N],
        precision: Precision,
    ) -> [FloatTensor<B>; N] {
        let (mut floats, mut blocks) = (Vec::new(), Vec::new());
        for weight in weights.clone() {
            match weight {
                Self::Floats(weight) => floats.push(weight),
                Self::Blocks(weight) => blocks.push(weight),
            }
        }
        let products = if blocks.is_empty() {
            B::project_all(x, floats, precision)
        } else if floats.is_empty() {
            B::project_quantized(x, blocks, precision)
        } else {
            let one = |weight| Self::project_all(x.clone(), [weight], precision);
            weights.into_iter().flat_map(one).collect()
        };
        products.try_into().unwrap_or_else(|_| unreachable!("each weight has a product"))
    }
}

/// Blocks of values as words and scales.
///
/// # Panics
/// If the values are not whole blocks.
pub(crate) fn quantize(bits: Bits, weights: &[f32]) -> (Vec<i32>, Vec<f16>) {
    let (blocks, rest) = weights.as_chunks::<QUANT_BLOCK>();
    assert!(rest.is_empty(), "{} weights are not whole blocks of {QUANT_BLOCK}", weights.len());
    let mut bytes = Vec::with_capacity(4 * bits.words() * blocks.len());
    let mut scales = Vec::with_capacity(bits.scales() * blocks.len());
    for block in blocks {
        match bits {
            Bits::Eight => {
                let (scale, inverse) = scale(block.iter().fold(0.0f32, |max, w| max.max(w.abs())) / 127.0);
                bytes.extend(block.iter().map(|w| nearest(w * inverse).clamp(-127, 127) as u8));
                scales.push(scale);
            }
            Bits::Four => {
                let min = block.iter().copied().fold(f32::INFINITY, f32::min);
                let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let steps = steps(block, min, max);
                let min = f16::from_f32(min);
                let (scale, inverse) = scale((max - min.to_f32()) / steps);
                let low = min.to_f32();
                let value = |w: &f32| nearest((w - low) * inverse).clamp(0, 15) as u8;
                let (first, second) = block.split_at(QUANT_BLOCK / 2);
                bytes.extend(first.iter().zip(second).map(|(a, b)| value(a) | value(b) << 4));
                scales.extend([scale, min]);
            }
        }
    }
    let words = bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)).collect();
    (words, scales)
}

/// Steps from the smallest to the largest value: 15, or fewer if the values were rounded to 4 bits before and have not all of them, so
/// that rounding again changes nothing.
fn steps(block: &[f32; QUANT_BLOCK], min: f32, max: f32) -> f32 {
    let all_on = |steps: f32| {
        let inverse = steps / (max - min);
        let off = |w: &f32| {
            let x = (w - min) * inverse;
            (x - nearest(x) as f32).abs()
        };
        block.iter().all(|w| off(w) < 0.01)
    };
    (1..=15u8).rev().map(f32::from).find(|steps| all_on(*steps)).unwrap_or(15.0)
}

/// A scale in half precision and its inverse, 0 for 0.
fn scale(scale: f32) -> (f16, f32) {
    let scale = f16::from_f32(scale.min(f16::MAX.to_f32()));
    (scale, if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 })
}

/// The nearest integer to a small number. Adding 1.5 · 2²³ leaves it in the last bits; unlike a call of `round` this is
/// vectorised everywhere.
fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::TensorData;

    use super::*;

    fn dense(bits: Bits, weights: &[f32], d_out: usize) -> Vec<f32> {
        let (words, scales) = quantize(bits, weights);
        let device = Default::default();
        let (width, per_block) = (words.len() / d_out, scales.len() / d_out);
        let words = Tensor::<Flex, 2, Int>::from_data(TensorData::new(words, [d_out, width]), &device);
        let scales = Tensor::<Flex, 2>::from_data(TensorData::new(scales, [d_out, per_block]), &device);
        let weight = QuantizedWeight::<Flex> { bits, words: words.into_primitive(), scales: primitive(scales) };
        assert_eq!(weight.dims(), [d_out, weights.len() / d_out]);
        tensor::<Flex, 2>(weight.dense()).into_data().to_vec().unwrap()
    }

    /// No value is further off than half a step, and half precision's rounding of the scale.
    #[test]
    fn values_are_nearly_what_they_were() {
        let noise = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 0.7;
        let weights: Vec<f32> = (0..3 * 96).map(|i| noise(i) * 10f32.powi(i as i32 / 32 % 5 - 3)).collect();
        for (bits, steps) in [(Bits::Eight, 254.0), (Bits::Four, 15.0)] {
            let found = dense(bits, &weights, 3);
            for (found, exact) in found.chunks(QUANT_BLOCK).zip(weights.chunks(QUANT_BLOCK)) {
                let max = exact.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                let tolerance = 2.0 * max / steps * 0.51 + 2e-3 * max;
                for (found, exact) in found.iter().zip(exact) {
                    assert!((found - exact).abs() <= tolerance, "{bits:?}: {exact} became {found}");
                }
            }
        }
    }

    /// What was in blocks once stays what it is.
    #[test]
    fn rounded_values_are_not_rounded_again() {
        let weights: Vec<f32> = (0..128).map(|i| ((i * 7919) % 257) as f32 / 128.0 - 1.0).collect();
        for bits in [Bits::Eight, Bits::Four] {
            let once = dense(bits, &weights, 1);
            let twice = dense(bits, &once, 1);
            assert!(once.iter().zip(&twice).all(|(a, b)| (a - b).abs() < 1e-6), "{bits:?}");
        }
    }

    /// Nor those of other programs' 4 bits, whose largest or smallest value need not occur.
    #[test]
    fn values_on_any_grid_of_four_bits_stay() {
        for steps in 1..=15u32 {
            for (scale, min) in [(0.0123f32, -0.1), (3.1e-4, -2.4e-3), (0.5, 2.0)] {
                let (scale, min) = (f16::from_f32(scale).to_f32(), f16::from_f32(min).to_f32());
                let value = |i: u32| ((i * 7919) % 257 % (steps + 1)).max(u32::from(i == 3)) as f32;
                let weights: Vec<f32> = (0..64).map(|i| min + scale * value(i)).collect();
                let found = dense(Bits::Four, &weights, 1);
                let worst = found.iter().zip(&weights).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // What half precision makes of the smallest value.
                assert!(worst <= 0.01 * scale, "{steps} steps of {scale}: off by {worst}");
            }
        }
    }

    #[test]
    fn zeros_and_extremes_stay_finite() {
        for bits in [Bits::Eight, Bits::Four] {
            assert_eq!(dense(bits, &[0.0; 32], 1), [0.0; 32]);
            assert!(dense(bits, &[1e-30; 32], 1).iter().all(|w| *w == 0.0));
            assert!(dense(bits, &[3e4; 32], 1).iter().all(|w| (w - 3e4).abs() < 300.0));
        }
    }
}

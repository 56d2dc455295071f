//! Matrices in 8 or 4 bits on the host, and how floats become them. [`quantized`](super::quantized) has the layout.

use burn::tensor::TensorData;
use half::f16;
use rayon::prelude::*;

use super::quantized::{Bits, QUANT_BLOCK};
use crate::copy::{fill, widen};

/// A matrix `[d_out, d_in]` in blocks along its rows.
pub(crate) struct BlockData {
    pub bits: Bits,
    /// `[d_out, d_in / 32 · words]`, i32.
    pub words: TensorData,
    /// `[d_out, d_in / 32 · scales]`, f16.
    pub scales: TensorData,
}

impl BlockData {
    /// Made row by row, by all threads: `write` gets a row's number, and fills the bytes of its values and its scales.
    ///
    /// # Panics
    /// If the rows are not whole blocks.
    pub fn by_rows(bits: Bits, [d_out, d_in]: [usize; 2], write: impl Fn(usize, &mut [u8], &mut [f16]) + Sync) -> Self {
        assert!(d_in.is_multiple_of(QUANT_BLOCK), "rows of {d_in} are not whole blocks of {QUANT_BLOCK}");
        let [width, per_row] = [bits.words(), bits.scales()].map(|of_block| d_in / QUANT_BLOCK * of_block);
        let mut scales = vec![f16::ZERO; d_out * per_row];
        let rows = scales.par_chunks_mut(per_row.max(1)).enumerate();
        let words = fill(d_out * width, width, rows, |words: &mut [i32], (row, scales)| {
            write(row, bytemuck::cast_slice_mut(words), scales);
        });
        Self { bits, words: TensorData::new(words, [d_out, width]), scales: TensorData::new(scales, [d_out, per_row]) }
    }

    /// Rounds a matrix of floats.
    ///
    /// # Panics
    /// If the rows are not whole blocks, or the data is no matrix of floats.
    pub fn round(data: &TensorData, bits: Bits) -> Self {
        let dims @ [_, d_in] = data.shape.dims();
        let (bytes, row_bytes) = (data.as_bytes(), d_in * data.dtype.size());
        Self::by_rows(bits, dims, |row, values, scales| {
            round(bits, &widen(data.dtype, &bytes[row * row_bytes..][..row_bytes]), values, scales);
        })
    }
}

/// Writes the values and scales of whole blocks.
pub(crate) fn round(bits: Bits, weights: &[f32], values: &mut [u8], scales: &mut [f16]) {
    let blocks = weights.as_chunks::<QUANT_BLOCK>().0.iter();
    let values = values.chunks_exact_mut(4 * bits.words());
    for ((block, values), scales) in blocks.zip(values).zip(scales.chunks_exact_mut(bits.scales())) {
        match bits {
            Bits::Eight => {
                let (scale, inverse) = scale(largest(block, f32::abs) / 127.0);
                values.iter_mut().zip(block).for_each(|(q, w)| *q = nearest(w * inverse).clamp(-127, 127) as u8);
                scales[0] = scale;
            }
            Bits::Four => {
                let (min, max) = (-largest(block, |w| -w), largest(block, |w| w));
                let steps = steps(block, min, max);
                let min = f16::from_f32(min);
                let (scale, inverse) = scale((max - min.to_f32()) / steps);
                let low = min.to_f32();
                let value = |w: &f32| nearest((w - low) * inverse).clamp(0, 15) as u8;
                let (first, second) = block.split_at(QUANT_BLOCK / 2);
                let pairs = first.iter().zip(second);
                values.iter_mut().zip(pairs).for_each(|(q, (a, b))| *q = value(a) | value(b) << 4);
                scales.copy_from_slice(&[scale, min]);
            }
            Bits::FourSymmetric => scales[0] = round_symmetric(block, values),
        }
    }
}

/// Writes the values of a block; its scale. The value furthest from zero, the first of two, becomes -8, and halves go up, as in llama.cpp's
/// `Q4_0`, whose integers come from the scale before it is in half precision.
pub(crate) fn round_symmetric(block: &[f32; QUANT_BLOCK], values: &mut [u8]) -> f16 {
    let furthest = largest(block, f32::abs);
    let d = block.iter().find(|x| x.abs() == furthest).map_or(0.0, |x| x / -8.0);
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let below = |x: f32| nearest(x) - i32::from(nearest(x) as f32 > x);
    let quantise = |x: f32| below((x * inverse + 8.5).clamp(0.0, 15.0)) as u8;
    let pairs = block[..QUANT_BLOCK / 2].iter().zip(&block[QUANT_BLOCK / 2..]);
    values.iter_mut().zip(pairs).for_each(|(q, (low, high))| *q = quantise(*low) | quantise(*high) << 4);
    f16::from_f32(d)
}

/// The largest of what `of` makes of the values, eight at a time.
pub(crate) fn largest(block: &[f32; QUANT_BLOCK], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    for eight in block.as_chunks::<8>().0 {
        lanes.iter_mut().zip(eight).for_each(|(max, w)| *max = max.max(of(*w)));
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Steps from the smallest to the largest value: 15, or fewer if the values were rounded to 4 bits before and have not all of them, so
/// that rounding again changes nothing.
fn steps(block: &[f32; QUANT_BLOCK], min: f32, max: f32) -> f32 {
    let inverse = 1.0 / (max - min);
    // For each number of steps, the furthest that a value is off. Of values that were not rounded, the first few are off every step.
    let mut furthest = [0.0f32; 16];
    for w in block {
        let x = (w - min) * inverse;
        for (steps, furthest) in furthest.iter_mut().enumerate() {
            let x = x * steps as f32;
            *furthest = furthest.max((x - nearest(x) as f32).abs());
        }
        if furthest[1..].iter().all(|off| *off >= ON) {
            break;
        }
    }
    (1..16).rev().find(|steps| furthest[*steps] < ON).unwrap_or(15) as f32
}

/// Parts of a step that a value on it may be off.
const ON: f32 = 0.01;

/// A scale in half precision and its inverse, 0 for 0.
fn scale(scale: f32) -> (f16, f32) {
    let scale = f16::from_f32(scale.min(f16::MAX.to_f32()));
    (scale, if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 })
}

/// The nearest integer to a small number. Adding 1.5 · 2²³ leaves it in the last bits; unlike a call of `round` this is
/// vectorised everywhere, as is no conversion by `as`.
pub(crate) fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

#[cfg(test)]
#[cfg(feature = "flex")]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::{Int, Tensor};

    use super::*;
    use crate::backend::QuantizedWeight;
    use crate::backend::ops::{primitive, tensor};

    fn dense(bits: Bits, weights: &[f32], d_out: usize) -> Vec<f32> {
        let dims = [d_out, weights.len() / d_out];
        let BlockData { words, scales, .. } = BlockData::round(&TensorData::new(weights.to_vec(), dims), bits);
        let device = Default::default();
        let words = Tensor::<Flex, 2, Int>::from_data(words, &device);
        let scales = Tensor::<Flex, 2>::from_data(scales, &device);
        let weight = QuantizedWeight::<Flex> { bits, words: words.into_primitive(), scales: primitive(scales) };
        assert_eq!(weight.dims(), dims);
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

    /// Symmetric blocks have one value further on one side of zero than on the other.
    #[test]
    fn symmetric_values_are_nearly_what_they_were() {
        let weights: Vec<f32> = (0..96).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 0.7).collect();
        let found = dense(Bits::FourSymmetric, &weights, 3);
        for (found, exact) in found.chunks(QUANT_BLOCK).zip(weights.chunks(QUANT_BLOCK)) {
            let furthest =
                exact.iter().fold(0.0f32, |furthest, w| if w.abs() > furthest.abs() { *w } else { furthest });
            let step = furthest / -8.0;
            for (found, exact) in found.iter().zip(exact) {
                let nearest = exact.clamp((7.0 * step).min(furthest), (7.0 * step).max(furthest));
                assert!((found - nearest).abs() <= 0.51 * step.abs(), "{exact} became {found}, by steps of {step}");
            }
        }
    }

    /// What was in blocks once stays what it is.
    #[test]
    fn rounded_values_are_not_rounded_again() {
        let weights: Vec<f32> = (0..128).map(|i| ((i * 7919) % 257) as f32 / 128.0 - 1.0).collect();
        for bits in [Bits::Eight, Bits::Four, Bits::FourSymmetric] {
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
        for bits in [Bits::Eight, Bits::Four, Bits::FourSymmetric] {
            assert_eq!(dense(bits, &[0.0; 32], 1), [0.0; 32]);
            assert!(dense(bits, &[1e-30; 32], 1).iter().all(|w| *w == 0.0));
            assert!(dense(bits, &[3e4; 32], 1).iter().all(|w| (w - 3e4).abs() < 300.0));
        }
    }
}

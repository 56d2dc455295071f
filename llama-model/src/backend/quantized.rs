//! Weights in 8 or 4 bits, for inference: the rows of a matrix in blocks of [`QUANT_BLOCK`] values.
//!
//! | bits | a block's value | bytes a weight |
//! | --- | --- | --- |
//! | 8 | `scale · q`, `q` from -127 to 127 | 1.0625 |
//! | 4 | `scale · q + min`, `q` from 0 to 15 | 0.625 |
//! | 4, symmetric | `scale · (q - 8)` | 0.5625 |
//!
//! The integers are kept in words of 32 bits, little-endian, which every backend has. In 4 bits the byte `i` of a block has
//! value `i` in its low half and value `i + 16` in its high half, as in llama.cpp's files. Scales and minima are half
//! precision where the device has it.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, ElementConversion, Int, Tensor, TensorMetadata};

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
    /// A scale for each block, as llama.cpp's `Q4_0`.
    FourSymmetric,
}

impl Bits {
    /// Words of a block.
    pub const fn words(self) -> usize {
        match self {
            Self::Eight => QUANT_BLOCK / 4,
            Self::Four | Self::FourSymmetric => QUANT_BLOCK / 8,
        }
    }

    /// Floats that describe a block.
    pub const fn scales(self) -> usize {
        match self {
            Self::Eight | Self::FourSymmetric => 1,
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
        let scales = tensor::<B, 2>(self.scales).cast(DType::F32).reshape([blocks, self.bits.scales()]);
        let values = match self.bits {
            Bits::Eight => {
                // Two's complement: the highest bit counts -128 instead of 128.
                let sign = bytes.clone().bitwise_and_scalar(128.elem()).mul_scalar(2);
                (bytes - sign).float() * scales
            }
            Bits::Four | Bits::FourSymmetric => {
                let low = bytes.clone().bitwise_and_scalar(15.elem());
                let high = bytes.bitwise_right_shift_scalar(4.elem());
                let scale = scales.clone().narrow(1, 0, 1);
                let min = if self.bits == Bits::Four { scales.narrow(1, 1, 1) } else { scale.clone() * -8.0 };
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
    /// `[d_out, d_in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Floats(weight) => weight.shape().dims(),
            Self::Blocks(weight) => weight.dims(),
        }
    }

    /// `x · weightᵀ` for each, in one go where all are stored alike.
    pub(crate) fn project_all<const N: usize>(
        x: FloatTensor<B>,
        weights: [Self; N],
        precision: Precision,
    ) -> [FloatTensor<B>; N] {
        let products = Self::project_each(x, weights.into(), precision);
        products.try_into().unwrap_or_else(|_| unreachable!("each weight has a product"))
    }

    /// The same of any number.
    pub(crate) fn project_each(x: FloatTensor<B>, weights: Vec<Self>, precision: Precision) -> Vec<FloatTensor<B>> {
        let (mut floats, mut blocks) = (Vec::new(), Vec::new());
        for weight in weights.clone() {
            match weight {
                Self::Floats(weight) => floats.push(weight),
                Self::Blocks(weight) => blocks.push(weight),
            }
        }
        if blocks.is_empty() {
            B::project_all(x, floats, precision)
        } else if floats.is_empty() {
            B::project_quantized(x, blocks, precision)
        } else {
            let one = |weight| Self::project_each(x.clone(), vec![weight], precision);
            weights.into_iter().flat_map(one).collect()
        }
    }

    /// `grad · weight`, the gradient of the input, in its dtype.
    pub(crate) fn backward_input(self, grad: FloatTensor<B>, precision: Precision, dtype: DType) -> FloatTensor<B> {
        match self {
            Self::Floats(weight) => B::project_backward_input(vec![(grad, weight)], precision, dtype),
            Self::Blocks(weight) => B::project_quantized_backward(grad, weight, precision, dtype),
        }
    }
}

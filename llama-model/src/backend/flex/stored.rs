//! The forms that a weight is stored in for inference, and their values as floats.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use burn::backend::Flex;
use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;
use half::{bf16, f16};

use super::simd::vectorized;
use super::vector::{by_vectors, widen};
use super::{Buffer, team, whole};
use crate::backend::{Bits, Matrix, QUANT_BLOCK, QuantizedWeight};

/// Rows of a weight in one of the forms it can be stored in.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    /// Values, and one scale for each [`QUANT_BLOCK`] of them.
    Q8(&'a [i8], &'a [f16]),
    /// Pairs of values, and scale and minimum for each [`QUANT_BLOCK`] of them.
    Q4(&'a [u8], &'a [f16]),
    /// Pairs of values, and one scale for each [`QUANT_BLOCK`] of them.
    Q4Symmetric(&'a [Symmetric], &'a [f16]),
}

/// Two values of 4 bits that count from -8.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Symmetric(pub u8);

// SAFETY: it is a byte.
unsafe impl bytemuck::Zeroable for Symmetric {}
unsafe impl bytemuck::Pod for Symmetric {}

impl<'a> Stored<'a> {
    /// A matrix that [`whole`](super::whole) gave, in floats.
    pub(super) fn floats(weight: &'a FlexTensor) -> Self {
        match weight.dtype() {
            DType::BF16 => Self::Bf16(weight.storage()),
            DType::F16 => Self::F16(weight.storage()),
            _ => Self::F32(weight.storage()),
        }
    }

    /// A matrix in blocks, of tensors that [`whole`](super::whole) gave.
    pub(super) fn blocks(weight: &'a QuantizedWeight<Flex>) -> Self {
        let (words, scales) = (weight.words.storage::<i32>(), weight.scales.storage::<f16>());
        match weight.bits {
            Bits::Eight => Self::Q8(bytemuck::cast_slice(words), scales),
            Bits::Four => Self::Q4(bytemuck::cast_slice(words), scales),
            Bits::FourSymmetric => Self::Q4Symmetric(bytemuck::cast_slice(words), scales),
        }
    }

    /// Either.
    pub(super) fn of(weight: &'a Matrix<Flex>) -> Self {
        match weight {
            Matrix::Floats(weight) => Self::floats(weight),
            Matrix::Blocks(weight) => Self::blocks(weight),
        }
    }

    /// Of values in blocks.
    pub(super) fn bits(self) -> Option<Bits> {
        match self {
            Self::F32(_) | Self::Bf16(_) | Self::F16(_) => None,
            Self::Q8(..) => Some(Bits::Eight),
            Self::Q4(..) => Some(Bits::Four),
            Self::Q4Symmetric(..) => Some(Bits::FourSymmetric),
        }
    }

    /// Weights there are.
    pub(super) fn len(self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
            Self::F16(w) => w.len(),
            Self::Q8(w, _) => w.len(),
            Self::Q4(w, _) => 2 * w.len(),
            Self::Q4Symmetric(w, _) => 2 * w.len(),
        }
    }

    /// Rows `start..end`, each of `width` elements.
    pub(super) fn rows(self, start: usize, end: usize, width: usize) -> Self {
        let range = start * width..end * width;
        let blocks = width / QUANT_BLOCK;
        match self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::Bf16(w) => Self::Bf16(&w[range]),
            Self::F16(w) => Self::F16(&w[range]),
            Self::Q8(w, scales) => Self::Q8(&w[range], &scales[start * blocks..end * blocks]),
            Self::Q4(w, scales) => {
                Self::Q4(&w[range.start / 2..range.end / 2], &scales[2 * start * blocks..2 * end * blocks])
            }
            Self::Q4Symmetric(w, scales) => {
                Self::Q4Symmetric(&w[range.start / 2..range.end / 2], &scales[start * blocks..end * blocks])
            }
        }
    }

    /// Writes the values as floats.
    pub(super) fn widen(self, out: &mut [f32]) {
        debug_assert_eq!(out.len(), self.len());
        #[cfg(target_arch = "x86_64")]
        if super::simd::has_avx512() {
            match self {
                // SAFETY: the CPU was asked; values and scales are of as many blocks as `out`.
                Self::Q8(w, scales) => return unsafe { avx512::widen(out, w, scales) },
                Self::Q4(w, scales) => return unsafe { avx512::widen(out, w, scales) },
                Self::Q4Symmetric(w, scales) => return unsafe { avx512::widen(out, w, scales) },
                _ => {}
            }
        }
        match self {
            Self::F32(w) => out.copy_from_slice(w),
            // SAFETY: the CPU was asked; there are as many.
            Self::Bf16(w) => unsafe { by_vectors!(widen(out, w)) },
            Self::F16(w) => unsafe { by_vectors!(widen(out, w)) },
            Self::Q8(w, scales) => widen_q8(out, w, scales),
            Self::Q4(w, scales) => widen_q4(out, w, scales),
            Self::Q4Symmetric(w, scales) => widen_q4_symmetric(out, w, scales),
        }
    }
}

impl Matrix<Flex> {
    /// As [`Stored`] reads it.
    pub(super) fn whole(self) -> Self {
        match self {
            Self::Floats(weight) => Self::Floats(whole(weight)),
            Self::Blocks(weight) => Self::Blocks(whole_blocks(weight)),
        }
    }
}

/// Values that a thread widens at a time.
const PIECE: usize = 1 << 16;

/// A matrix as floats, by all threads.
pub(super) fn widened(matrix: Matrix<Flex>) -> FlexTensor {
    let matrix = matrix.whole();
    let (dims @ [_, width], stored) = (matrix.dims(), Stored::of(&matrix));
    // SAFETY: every row is written.
    let mut out = unsafe { Buffer::unwritten(stored.len()) };
    let piece = (PIECE / width.max(1)).max(1);
    team::each(out.chunks_mut((piece * width).max(1)).enumerate(), |(index, out)| {
        let first = index * piece;
        stored.rows(first, first + out.len() / width, width).widen(out);
    });
    out.into_tensor(Shape::new(dims))
}

/// Whether the kernels read a weight in blocks.
pub(super) fn reads(weight: &QuantizedWeight<Flex>) -> bool {
    weight.words.dtype() == DType::I32 && weight.scales.dtype() == DType::F16
}

/// As [`Stored`] reads it.
pub(super) fn whole_blocks(weight: QuantizedWeight<Flex>) -> QuantizedWeight<Flex> {
    QuantizedWeight { words: whole(weight.words), scales: whole(weight.scales), bits: weight.bits }
}

vectorized! {
    pub(super) fn widen_q8<'a>(out: &'a mut [f32], w: &'a [i8], scales: &'a [f16]) -> () {
        let blocks = out.as_chunks_mut::<QUANT_BLOCK>().0.iter_mut().zip(w.as_chunks::<QUANT_BLOCK>().0);
        for ((out, w), scale) in blocks.zip(scales) {
            let scale = scale.to_f32();
            for (out, w) in out.iter_mut().zip(w) {
                *out = scale * f32::from(*w);
            }
        }
    }
}

vectorized! {
    pub(super) fn widen_q4<'a>(out: &'a mut [f32], w: &'a [u8], scales: &'a [f16]) -> () {
        let blocks = out.as_chunks_mut::<QUANT_BLOCK>().0.iter_mut().zip(w.as_chunks::<{ QUANT_BLOCK / 2 }>().0);
        for ((out, w), [scale, min]) in blocks.zip(scales.as_chunks::<2>().0) {
            widen_block(out, w, scale.to_f32(), min.to_f32());
        }
    }
}

vectorized! {
    pub(super) fn widen_q4_symmetric<'a>(out: &'a mut [f32], w: &'a [Symmetric], scales: &'a [f16]) -> () {
        let w = bytemuck::cast_slice(w).as_chunks::<{ QUANT_BLOCK / 2 }>().0;
        for ((out, w), scale) in out.as_chunks_mut::<QUANT_BLOCK>().0.iter_mut().zip(w).zip(scales) {
            widen_block(out, w, scale.to_f32(), -8.0 * scale.to_f32());
        }
    }
}

#[inline(always)]
fn widen_block(out: &mut [f32; QUANT_BLOCK], w: &[u8; QUANT_BLOCK / 2], scale: f32, min: f32) {
    let (low, high) = out.split_at_mut(QUANT_BLOCK / 2);
    for ((low, high), w) in low.iter_mut().zip(high).zip(w) {
        *low = scale.mul_add(f32::from(w & 15), min);
        *high = scale.mul_add(f32::from(w >> 4), min);
    }
}

//! Types of numbers in files.

use std::io::Write;

use burn::tensor::{DType, TensorData};
use rayon::prelude::*;

use super::quants;
use crate::copy::{convert, fill, widen};

/// How matrices are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileType {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes, IEEE half precision.
    F16,
    /// 2 bytes, the upper half of an f32.
    Bf16,
    /// 8 bits and a scale for every 32: GGUF only.
    Q8_0,
    /// 4 bits and a scale for every 32: GGUF only.
    Q4_0,
}

crate::compute::names!(FileType, "type", F32 = "f32", F16 = "f16", Bf16 = "bf16", Q8_0 = "q8_0", Q4_0 = "q4_0");

impl FileType {
    /// Burn's name of a float, none for blocks.
    pub(super) fn float(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
            Self::Q8_0 | Self::Q4_0 => None,
        }
    }

    /// Bytes that so many values take.
    pub(super) fn bytes(self, values: usize) -> usize {
        match self {
            Self::F32 => 4 * values,
            Self::F16 | Self::Bf16 => 2 * values,
            Self::Q8_0 => values / quants::BLOCK * quants::Q8_0_BYTES,
            Self::Q4_0 => values / quants::BLOCK * quants::Q4_0_BYTES,
        }
    }

    /// Writes values as they stand in a file.
    pub(super) fn write(self, data: TensorData, out: &mut impl Write) -> std::io::Result<()> {
        if let Some(dtype) = self.float() {
            return out.write_all(convert(data, dtype).as_bytes());
        }
        let encode = if self == Self::Q8_0 { quants::encode_q8_0 } else { quants::encode_q4_0 };
        let pieces = data.as_bytes().par_chunks(quants::PIECE * quants::BLOCK * data.dtype.size());
        let write = |out: &mut [u8], values: &[u8]| encode(&widen(data.dtype, values), out);
        let (len, piece) = (self.bytes(data.num_elements()), self.bytes(quants::PIECE * quants::BLOCK));
        out.write_all(&fill(len, piece, pieces, write))
    }
}

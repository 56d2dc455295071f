//! A matrix in 8 or 4 bits, as linear layers and embeddings have it for inference.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::backend::rounding::BlockData;
use crate::backend::{Bits, LlamaBackend, Matrix, QuantizedWeight, ops};

/// A matrix in blocks along its rows; [`backend::quantized`](crate::backend::quantized) has their layout.
#[derive(Module, Debug)]
pub struct Quantized<B: LlamaBackend> {
    /// `[d_out, d_in / 32 · words]`
    pub words: Tensor<B, 2, Int>,
    /// `[d_out, d_in / 32 · scales]`
    pub scales: Tensor<B, 2>,
    /// Bits of a value.
    #[module(skip)]
    pub bits: Bits,
}

impl<B: LlamaBackend> Quantized<B> {
    /// Rounds a matrix `[d_out, d_in]` of floats.
    ///
    /// # Panics
    /// If the rows are not whole blocks, or the data is no matrix of floats.
    pub fn new(data: TensorData, bits: Bits, device: &B::Device) -> Self {
        Self::from_blocks(BlockData::round(&data, bits), device)
    }

    /// On a device.
    pub(crate) fn from_blocks(blocks: BlockData, device: &B::Device) -> Self {
        let dtype = if B::supports_dtype(device, DType::F16) { DType::F16 } else { DType::F32 };
        Self {
            words: Tensor::from_data(blocks.words, (device, DType::I32)),
            scales: Tensor::from_data(blocks.scales.convert_dtype(dtype), (device, dtype)),
            bits: blocks.bits,
        }
    }

    /// For the operations of the backend.
    pub fn weight(&self) -> QuantizedWeight<B> {
        let (words, scales) = (self.words.clone().into_primitive(), ops::primitive(self.scales.clone()));
        QuantizedWeight { bits: self.bits, words, scales }
    }

    /// A weight as it is stored: in blocks, if it is, else in floats.
    pub(super) fn matrix(blocks: &Option<Self>, floats: &Param<Tensor<B, 2>>) -> Matrix<B> {
        match blocks {
            Some(blocks) => Matrix::Blocks(blocks.weight()),
            None => Matrix::Floats(ops::primitive(floats.val())),
        }
    }

    /// `[d_out, d_in]`
    pub fn dims(&self) -> [usize; 2] {
        self.weight().dims()
    }

    /// The matrix in f32.
    pub fn dense(&self) -> Tensor<B, 2> {
        ops::tensor(B::widen(self.weight(), DType::F32))
    }

    /// Some of its rows in f32.
    ///
    /// # Shapes
    /// `rows [n]`, result `[n, d_in]`.
    pub fn rows(&self, rows: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        let [_, floats] = self.scales.dims();
        if floats == 1 {
            // Of two tensors whose rows are selected together, Burn's fusion reads other rows of the one that is a number wide.
            return self.dense().select(0, rows);
        }
        let words = self.words.clone().select(0, rows.clone());
        Self { words, scales: self.scales.clone().select(0, rows), bits: self.bits }.dense()
    }

    /// What stands in for the parameter of a quantised matrix: it keeps id and width.
    pub(crate) fn placeholder(&self, weight: &Param<Tensor<B, 2>>) -> Param<Tensor<B, 2>> {
        let [_, d_in] = self.dims();
        Param::initialized(weight.id, Tensor::zeros([1, d_in], &self.words.device()))
    }
}

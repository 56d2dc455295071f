//! `y = x Wᵀ`, without bias: LLaMA has none.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::Precision;
use crate::backend::{LlamaBackend, QUANT_BLOCK, ops};
use crate::init::Init;

/// A linear layer without bias. The weight is `[d_out, d_in]`, as in the released checkpoints (Burn's own layer has it
/// transposed).
#[derive(Module, Debug)]
pub struct Linear<B: LlamaBackend> {
    /// `[d_out, d_in]`; one row of zeros where `quantized` has the weight.
    pub weight: Param<Tensor<B, 2>>,
    /// The weight in 8 bits, for inference.
    pub quantized: Option<Quantized<B>>,
}

/// A weight as 8-bit integers, each row in blocks of [`QUANT_BLOCK`] that share a scale: `value · scale`.
#[derive(Module, Debug)]
pub struct Quantized<B: LlamaBackend> {
    /// `[d_out, d_in]`, -127 to 127; 8 bits wide where the backend has such tensors.
    pub values: Tensor<B, 2, Int>,
    /// `[d_out, d_in / QUANT_BLOCK]`
    pub scales: Tensor<B, 2>,
}

impl<B: LlamaBackend> Quantized<B> {
    /// Each block's largest value becomes 127.
    ///
    /// # Panics
    /// If the rows are not whole blocks.
    pub fn new(weight: Tensor<B, 2>) -> Self {
        let [d_out, d_in] = weight.dims();
        assert!(d_in.is_multiple_of(QUANT_BLOCK), "rows of {d_in} are not whole blocks of {QUANT_BLOCK}");
        let device = weight.device();
        let data = weight.into_data().convert::<f32>();
        let weights = data.as_slice::<f32>().expect("it was just converted");
        let mut values = Vec::with_capacity(weights.len());
        let mut scales = Vec::with_capacity(weights.len() / QUANT_BLOCK);
        for block in weights.chunks_exact(QUANT_BLOCK) {
            let scale = block.iter().fold(0.0f32, |max, w| max.max(w.abs())) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            values.extend(block.iter().map(|w| (w * inverse).round_ties_even() as i8));
            scales.push(scale);
        }
        let values = TensorData::new(values, [d_out, d_in]);
        let values = if B::supports_dtype(&device, DType::I8) {
            Tensor::from_data(values, (&device, DType::I8))
        } else {
            Tensor::from_data(values.convert::<i32>(), &device)
        };
        Self { values, scales: Tensor::from_data(TensorData::new(scales, [d_out, d_in / QUANT_BLOCK]), &device) }
    }

    /// The weight in f32.
    pub fn dense(&self) -> Tensor<B, 2> {
        ops::dequantize(self.values.clone(), self.scales.clone())
    }
}

impl<B: LlamaBackend> Linear<B> {
    pub(crate) fn new(d_in: usize, d_out: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([d_out, d_in], std), quantized: None }
    }

    /// The weight, `[d_out, d_in]`, whatever form it is stored in.
    pub fn dense(&self) -> Tensor<B, 2> {
        self.quantized.as_ref().map_or_else(|| self.weight.val(), Quantized::dense)
    }

    /// The layer with its weight in 8 bits.
    pub(crate) fn quantize(&self) -> Self {
        let weight = self.dense();
        let placeholder = Tensor::zeros([1, weight.dims()[1]], &weight.device());
        let weight_id = self.weight.id;
        Self { weight: Param::initialized(weight_id, placeholder), quantized: Some(Quantized::new(weight)) }
    }

    /// Several layers with one input, in one go where the backend can.
    ///
    /// # Shapes
    /// `x [.., d_in]`, each result `[.., d_out]`.
    pub fn forward_all<const D: usize, const N: usize>(
        layers: [&Self; N],
        x: Tensor<B, D>,
        precision: Precision,
    ) -> [Tensor<B, D>; N] {
        if layers.iter().all(|layer| layer.quantized.is_none()) {
            return ops::linear_all(x, layers.map(|layer| layer.weight.val()), precision);
        }
        let quantized = layers.map(|layer| layer.quantized.as_ref().map(|q| (q.values.clone(), q.scales.clone())));
        if quantized.iter().all(Option::is_some) {
            return ops::linear_quantized_all(x, quantized.map(|weight| weight.expect("all are there")));
        }
        layers.map(|layer| match &layer.quantized {
            None => ops::linear(x.clone(), layer.weight.val(), precision),
            Some(Quantized { values, scales }) => ops::linear_quantized(x.clone(), values.clone(), scales.clone()),
        })
    }

    /// # Shapes
    /// `x [.., d_in]`, result `[.., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        let [out] = Self::forward_all([self], x, precision);
        out
    }
}

//! `y = x Wᵀ`, without bias: LLaMA has none.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::Quantized;
use crate::Precision;
use crate::backend::{LlamaBackend, ops};
use crate::init::Init;

/// A linear layer without bias. The weight is `[d_out, d_in]`, as in the released checkpoints (Burn's own layer has it
/// transposed).
#[derive(Module, Debug)]
pub struct Linear<B: LlamaBackend> {
    /// `[d_out, d_in]`; one row of zeros where `quantized` has the weight.
    pub weight: Param<Tensor<B, 2>>,
    /// The weight in 8 or 4 bits, for inference.
    pub quantized: Option<Quantized<B>>,
}

impl<B: LlamaBackend> Linear<B> {
    pub(crate) fn new(d_in: usize, d_out: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([d_out, d_in], std), quantized: None }
    }

    /// The weight, `[d_out, d_in]`, whatever form it is stored in.
    pub fn dense(&self) -> Tensor<B, 2> {
        self.quantized.as_ref().map_or_else(|| self.weight.val(), Quantized::dense)
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
        if layers.iter().all(|layer| layer.quantized.is_some()) {
            let weight = |layer: &Self| layer.quantized.as_ref().expect("all are there").weight();
            return ops::linear_quantized(x, layers.map(weight), precision);
        }
        layers.map(|layer| ops::linear(x.clone(), layer.dense(), precision))
    }

    /// # Shapes
    /// `x [.., d_in]`, result `[.., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        let [out] = Self::forward_all([self], x, precision);
        out
    }
}

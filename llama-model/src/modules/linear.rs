//! `y = x Wᵀ`, without bias: LLaMA has none.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::{Adapter, Quantized};
use crate::Precision;
use crate::backend::{Adapted, LlamaBackend, Matrix, ops};
use crate::init::Init;

/// A linear layer without bias. The weight is `[d_out, d_in]`, as in the released checkpoints (Burn's own layer has it
/// transposed).
#[derive(Module, Debug)]
pub struct Linear<B: LlamaBackend> {
    /// `[d_out, d_in]`; one row of zeros where `quantized` has the weight.
    pub weight: Param<Tensor<B, 2>>,
    /// The weight in 8 or 4 bits, for inference.
    pub quantized: Option<Quantized<B>>,
    /// What fine-tuning adds.
    pub adapter: Option<Adapter<B>>,
}

impl<B: LlamaBackend> Linear<B> {
    pub(crate) fn new(d_in: usize, d_out: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([d_out, d_in], std), quantized: None, adapter: None }
    }

    /// The weight, `[d_out, d_in]`, whatever form it is stored in, without the adapter.
    pub fn dense(&self) -> Tensor<B, 2> {
        self.quantized.as_ref().map_or_else(|| self.weight.val(), Quantized::dense)
    }

    /// The weight as it is stored, without the adapter.
    pub(crate) fn matrix(&self) -> Matrix<B> {
        Quantized::matrix(&self.quantized, &self.weight)
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
        if layers.iter().all(|layer| layer.adapter.is_none()) {
            return ops::linear_all(x, layers.map(Self::matrix), precision);
        }
        let adapted =
            |layer: &Self| Adapted { weight: layer.matrix(), adapter: layer.adapter.as_ref().map(Adapter::low_rank) };
        ops::adapted_all(x, layers.map(adapted), precision)
    }

    /// `[d_out, d_in]`
    pub fn dims(&self) -> [usize; 2] {
        self.quantized.as_ref().map_or_else(|| self.weight.dims(), Quantized::dims)
    }

    /// Whether training may take it as a plain weight.
    pub(crate) fn is_plain(&self) -> bool {
        self.quantized.is_none() && self.adapter.is_none()
    }

    /// # Shapes
    /// `x [.., d_in]`, result `[.., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        let [out] = Self::forward_all([self], x, precision);
        out
    }
}

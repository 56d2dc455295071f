//! `y = x Wᵀ`, without bias: LLaMA has none.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::Precision;
use crate::backend::{LlamaBackend, ops};
use crate::init::Init;

/// A linear layer without bias. The weight is `[d_out, d_in]`, as in the released checkpoints (Burn's own layer has it
/// transposed).
#[derive(Module, Debug)]
pub struct Linear<B: LlamaBackend> {
    /// `[d_out, d_in]`
    pub weight: Param<Tensor<B, 2>>,
}

impl<B: LlamaBackend> Linear<B> {
    pub(crate) fn new(d_in: usize, d_out: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([d_out, d_in], std) }
    }

    /// # Shapes
    /// `x [.., d_in]`, result `[.., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        ops::linear(x, self.weight.val(), precision)
    }
}

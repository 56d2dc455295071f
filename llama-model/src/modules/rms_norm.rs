//! Pre-normalisation (paper, section 2.2; Zhang and Sennrich 2019):
//! `RMSNorm(x) = x / sqrt(mean(x²) + eps) · weight`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::backend::{LlamaBackend, ops};
use crate::init::Init;

/// Root-mean-square normalisation over the last dimension, with a learned gain.
#[derive(Module, Debug)]
pub struct RmsNorm<B: LlamaBackend> {
    /// Gain, `[d_model]`, initially 1.
    pub weight: Param<Tensor<B, 1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl<B: LlamaBackend> RmsNorm<B> {
    pub(crate) fn new(d_model: usize, eps: f64, init: &Init<B>) -> Self {
        Self { weight: init.ones([d_model]), eps }
    }

    /// # Shapes
    /// `x [.., d_model]`, result as `x`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}

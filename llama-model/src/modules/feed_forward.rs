//! SwiGLU feed-forward network (paper, section 2.2; Shazeer 2020): `w2(silu(w1 x) · w3 x)`, inner width 2/3 · 4d.

use burn::module::Module;
use burn::tensor::Tensor;

use super::Linear;
use crate::backend::{LlamaBackend, ops};
use crate::init::Init;
use crate::{LlamaConfig, Precision};

/// Feed-forward network of one block.
#[derive(Module, Debug)]
pub struct FeedForward<B: LlamaBackend> {
    /// Gate, `d_model` to `d_ff`.
    pub w1: Linear<B>,
    /// Back, `d_ff` to `d_model`.
    pub w2: Linear<B>,
    /// Up, `d_model` to `d_ff`.
    pub w3: Linear<B>,
}

impl<B: LlamaBackend> FeedForward<B> {
    pub(crate) fn new(config: &LlamaConfig, init: &Init<B>) -> Self {
        Self {
            w1: Linear::new(config.d_model, config.d_ff, init.std(), &init.at("w1")),
            w2: Linear::new(config.d_ff, config.d_model, init.residual_std(), &init.at("w2")),
            w3: Linear::new(config.d_model, config.d_ff, init.std(), &init.at("w3")),
        }
    }

    /// # Shapes
    /// `x [.., d_model]`, result as `x`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        let [gate, up] = Linear::forward_all([&self.w1, &self.w3], x, precision);
        self.w2.forward(ops::swiglu(gate, up), precision)
    }
}

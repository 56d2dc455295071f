//! A low-rank adapter (Hu et al. 2021, "LoRA"): `y = x Wᵀ + (scale · x Aᵀ) Bᵀ`, where `W` is frozen.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::backend::{LlamaBackend, LowRank, ops};
use crate::init::Init;

/// The adapter of a linear layer.
#[derive(Module, Debug)]
pub struct Adapter<B: LlamaBackend> {
    /// Down, `[rank, d_in]`.
    pub a: Param<Tensor<B, 2>>,
    /// Up, `[d_out, rank]`.
    pub b: Param<Tensor<B, 2>>,
    /// Factor of the product, `alpha / rank`.
    pub scale: f64,
}

impl<B: LlamaBackend> Adapter<B> {
    /// An adapter that changes nothing yet: `A` is drawn from ±1/√d_in as in Microsoft's code and PEFT, `B` is zero.
    pub(crate) fn new([d_out, d_in]: [usize; 2], rank: usize, scale: f64, init: &Init<B>) -> Self {
        let bound = 1.0 / (d_in as f64).sqrt();
        Self { a: init.at("lora_a").uniform([rank, d_in], bound), b: init.at("lora_b").zeros([d_out, rank]), scale }
    }

    /// For the operations of the backend.
    pub(crate) fn low_rank(&self) -> LowRank<B> {
        let [down, up] = [&self.a, &self.b].map(|matrix| ops::primitive(matrix.val()));
        LowRank { down, up, scale: self.scale }
    }

    /// What it adds to the layer's weight, `[d_out, d_in]`.
    pub fn delta(&self) -> Tensor<B, 2> {
        self.b.val().matmul(self.a.val().mul_scalar(self.scale))
    }
}

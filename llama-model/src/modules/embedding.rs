//! Token embedding: a row of the matrix for each token.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor};

use crate::backend::{LlamaBackend, ops};
use crate::init::Init;

/// Token embedding.
#[derive(Module, Debug)]
pub struct Embedding<B: LlamaBackend> {
    /// `[vocab_size, d_model]`
    pub weight: Param<Tensor<B, 2>>,
}

impl<B: LlamaBackend> Embedding<B> {
    pub(crate) fn new(vocab_size: usize, d_model: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([vocab_size, d_model], std) }
    }

    /// # Shapes
    /// `tokens [batch, seq_len]`, result `[batch, seq_len, d_model]`.
    pub fn forward(&self, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let rows = ops::embedding(self.weight.val(), tokens);
        // Weights may be stored in fewer bytes; activations are not.
        if rows.dtype() == DType::BF16 { rows.cast(DType::F32) } else { rows }
    }
}

//! Token embedding: a row of the matrix for each token.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor};

use super::Quantized;
use crate::Precision;
use crate::backend::{LlamaBackend, ops};
use crate::init::Init;

/// Token embedding.
#[derive(Module, Debug)]
pub struct Embedding<B: LlamaBackend> {
    /// `[vocab_size, d_model]`; one row of zeros where `quantized` has the weight.
    pub weight: Param<Tensor<B, 2>>,
    /// The weight in 8 bits, for inference.
    pub quantized: Option<Quantized<B>>,
}

impl<B: LlamaBackend> Embedding<B> {
    pub(crate) fn new(vocab_size: usize, d_model: usize, std: f64, init: &Init<B>) -> Self {
        Self { weight: init.normal([vocab_size, d_model], std), quantized: None }
    }

    /// # Shapes
    /// `tokens [batch, seq_len]`, result `[batch, seq_len, d_model]`.
    pub fn forward(&self, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let Some(quantized) = &self.quantized else {
            let rows = ops::embedding(self.weight.val(), tokens);
            // Weights may be stored in fewer bytes; activations are not.
            return if matches!(rows.dtype(), DType::BF16 | DType::F16) { rows.cast(DType::F32) } else { rows };
        };
        let [batch, seq_len] = tokens.dims();
        let rows = quantized.rows(tokens.reshape([batch * seq_len]));
        let [_, d_model] = rows.dims();
        rows.reshape([batch, seq_len, d_model])
    }

    /// The embedding as a tied head.
    ///
    /// # Shapes
    /// `hidden [.., d_model]`, result `[.., vocab_size]`.
    pub fn logits<const D: usize>(&self, hidden: Tensor<B, D>, precision: Precision) -> Tensor<B, D> {
        let [logits] = ops::linear_all(hidden, [Quantized::matrix(&self.quantized, &self.weight)], precision);
        logits
    }

    /// The weight, `[vocab_size, d_model]`, whatever form it is stored in.
    pub fn dense(&self) -> Tensor<B, 2> {
        self.quantized.as_ref().map_or_else(|| self.weight.val(), Quantized::dense)
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.quantized.as_ref().map_or_else(|| self.weight.dims(), Quantized::dims)[0]
    }
}

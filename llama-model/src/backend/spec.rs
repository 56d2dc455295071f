//! What operations are told beside their tensors, and what attention keeps.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};

use crate::Precision;

/// Hyper-parameters of one AdamW update (Loshchilov and Hutter; values in section 2.3 of the paper).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay: the parameter is first multiplied by `1 - lr · weight_decay`.
    pub weight_decay: f64,
    /// Number of this step, from 1, for the bias corrections.
    pub step: u64,
    /// Multiplies the gradient first: the global clip, and the loss normalisation.
    pub grad_scale: f64,
}

impl AdamWStep {
    /// `(1 - beta_1^step, 1 - beta_2^step)`.
    pub fn bias_corrections(&self) -> (f64, f64) {
        (1.0 - self.beta_1.powf(self.step as f64), 1.0 - self.beta_2.powf(self.step as f64))
    }
}

/// Target of a position that takes no part in the loss.
pub const IGNORE_TARGET: i64 = -100;

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Factor of the scores.
    pub scale: f64,
    /// Precision of the products; softmax and its statistics are in f32 or wider.
    pub precision: Precision,
}

impl AttentionSpec {
    /// Scores divided by the root of the head's width.
    pub fn new(head_dim: usize, precision: Precision) -> Self {
        Self { scale: 1.0 / (head_dim as f64).sqrt(), precision }
    }
}

/// How the loss is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossSpec {
    /// Precision of the products with the head.
    pub precision: Precision,
    /// Factor of the squared log-sum-exp of the logits, added to each token's loss: keeps logits from drifting (Chowdhery
    /// et al. 2022, section 5, use 1e-4). 0 is off.
    pub z_loss: f64,
    /// Whether the head's gradient is wanted: not where the head is frozen.
    pub head_grad: bool,
}

impl Default for LossSpec {
    fn default() -> Self {
        Self { precision: Precision::default(), z_loss: 0.0, head_grad: true }
    }
}

/// What the forward of attention keeps for its backward: O(seq_len · d_model), no quadratic term.
#[derive(Clone, Debug)]
pub struct AttentionSaved<B: Backend> {
    /// Queries.
    pub q: FloatTensor<B>,
    /// Keys.
    pub k: FloatTensor<B>,
    /// Values.
    pub v: FloatTensor<B>,
    /// First key that each query sees, or none.
    pub starts: Option<IntTensor<B>>,
    /// The forward's result.
    pub out: FloatTensor<B>,
    /// The forward's log-sum-exp per query.
    pub lse: FloatTensor<B>,
    /// What the forward was called with.
    pub spec: AttentionSpec,
}

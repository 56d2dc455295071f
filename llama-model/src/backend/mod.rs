//! [`LlamaBackend`]: the operations that make or break LLaMA's speed and memory, as a trait over Burn's `Backend`.
//!
//! Each operation is a forward and an explicit backward on backend primitives (section 2.4 of the paper: what is
//! expensive is saved, what is cheap is computed again).
//!
//! * The trait's default bodies are [`mod@reference`]: plain Burn operations, the specification of every faster body. A
//!   backend without kernels of its own is one empty `impl`.
//! * Faster bodies override them: `flex` (SIMD and threads).
//! * [`Autodiff`](burn::backend::Autodiff) wires each backward once, for all backends (`autodiff`).
//!
//! The [`ops`] module has the same operations on [`Tensor`](burn::tensor::Tensor)s, for use in modules.

pub mod adapted;
mod autodiff;
pub mod block;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
pub mod ops;
pub mod quantized;
pub mod reference;
pub(crate) mod rounding;
mod spec;

use burn::tensor::DType;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::{FloatTensor, IntTensor};

use crate::{GradientTaker, Precision};
pub use adapted::{Adapted, LowRank};
pub use block::{BlockCache, BlockSpec, BlockWeights};
pub use quantized::{Bits, Matrix, QUANT_BLOCK, QuantizedWeight};
pub use spec::{AdamWStep, AttentionSaved, AttentionSpec, IGNORE_TARGET, LossSpec};

/// A backend that can train: its tensors track gradients, and both it and its inner backend have LLaMA's operations.
pub trait TrainBackend: AutodiffBackend<InnerBackend: LlamaBackend> + LlamaBackend {}

impl<B: AutodiffBackend<InnerBackend: LlamaBackend> + LlamaBackend> TrainBackend for B {}

/// LLaMA's fused operations. Shapes and ranks are part of the contract; `ops` reshapes where a module has more
/// dimensions. All float tensors of a call have one dtype.
pub trait LlamaBackend: Backend {
    /// A row of `weight` for each token.
    ///
    /// # Shapes
    /// `weight [vocab_size, d_model]`, `tokens [tokens]`, result `[tokens, d_model]`.
    fn token_embedding(weight: FloatTensor<Self>, tokens: IntTensor<Self>) -> FloatTensor<Self> {
        Self::float_select(weight, 0, tokens)
    }

    /// Gradient of [`token_embedding`](Self::token_embedding) for its weight of `vocab_size` rows, added to `sum`, the
    /// gradient that a tied head already gave it.
    fn token_embedding_backward(
        grad: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab_size: usize,
        sum: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        reference::token_embedding_backward::<Self>(grad, tokens, vocab_size, sum)
    }

    /// Whether products in this precision take operands that are stored in it, so that what lies between a block's products is stored so:
    /// half the memory, and rounded once. Where not, products round what they read.
    fn has_products(_device: &Self::Device, _precision: Precision) -> bool {
        false
    }

    /// What only products read, in their precision where they take that.
    fn operand(x: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        match Self::has_products(&Self::float_device(&x), precision) {
            true => ops::cast::<Self>(x, precision.dtype()),
            false => x,
        }
    }

    /// [`operand`](Self::operand) of several tensors: the weights of a block. As they are, where products of what is stored in the precision
    /// read weights in f32, too.
    fn operands(tensors: Vec<FloatTensor<Self>>, precision: Precision) -> Vec<FloatTensor<Self>> {
        tensors.into_iter().map(|x| Self::operand(x, precision)).collect()
    }

    /// `x · weightᵀ`, with the weight stored as in the released checkpoints, in the dtype of `x` or a shorter one; the result in that of
    /// `x`.
    ///
    /// # Shapes
    /// `x [tokens, d_in]`, `weight [d_out, d_in]`, result `[tokens, d_out]`.
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        reference::project::<Self>(x, weight, precision)
    }

    /// [`project`](Self::project) of one input with several weights.
    fn project_all(
        x: FloatTensor<Self>,
        weights: Vec<FloatTensor<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        weights.into_iter().map(|weight| Self::project(x.clone(), weight, precision)).collect()
    }

    /// `sum + x · weightᵀ`, in place where the caller's is the only handle.
    ///
    /// # Shapes
    /// `sum [tokens, d_out]`, the others as of [`project`](Self::project), all of one dtype.
    fn add_projection(
        sum: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        reference::add_projection::<Self>(sum, x, weight, precision)
    }

    /// Products of one input with frozen weights, some of which have adapters that are trained; see [`mod@adapted`].
    ///
    /// # Shapes
    /// As of [`project_all`](Self::project_all).
    fn project_adapted(
        x: FloatTensor<Self>,
        layers: Vec<Adapted<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        adapted::forward::<Self>(x, layers, precision)
    }

    /// [`project_all`](Self::project_all) for weights in 8 or 4 bits. For inference: it has no backward for the weights.
    fn project_quantized(
        x: FloatTensor<Self>,
        weights: Vec<QuantizedWeight<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        reference::project_quantized::<Self>(x, weights, precision)
    }

    /// A weight in 8 or 4 bits as floats.
    ///
    /// # Shapes
    /// Result `[d_out, d_in]`.
    fn widen(weight: QuantizedWeight<Self>, dtype: DType) -> FloatTensor<Self> {
        ops::cast::<Self>(weight.dense(), dtype)
    }

    /// Gradient of [`project`](Self::project) for its input, summed over the weights that read it: `Σ grad · weight`.
    ///
    /// # Shapes
    /// One pair or more of `grad [tokens, d_out]` and `weight [d_out, d_in]`; result `[tokens, d_in]`, in `dtype`, that of the input.
    fn project_backward_input(
        pairs: Vec<(FloatTensor<Self>, FloatTensor<Self>)>,
        precision: Precision,
        dtype: DType,
    ) -> FloatTensor<Self> {
        reference::project_backward_input::<Self>(pairs, precision, dtype)
    }

    /// Gradient of [`project_quantized`](Self::project_quantized) for its input: `grad · weight`.
    ///
    /// # Shapes
    /// `grad [tokens, d_out]`, result `[tokens, d_in]`, in `dtype`, that of the input.
    fn project_quantized_backward(
        grad: FloatTensor<Self>,
        weight: QuantizedWeight<Self>,
        precision: Precision,
        dtype: DType,
    ) -> FloatTensor<Self> {
        reference::project_quantized_backward::<Self>(grad, weight, precision, dtype)
    }

    /// Gradient of [`project`](Self::project) for its weight: `gradᵀ · x`, in f32 where [`has_products`](Self::has_products), else in the
    /// dtype of `grad`.
    fn project_backward_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        reference::project_backward_weight::<Self>(grad, x, precision)
    }

    /// [`project_backward_weight`](Self::project_backward_weight) for several weights that read one input.
    fn project_backward_weights(
        grads: Vec<FloatTensor<Self>>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        grads.into_iter().map(|grad| Self::project_backward_weight(grad, x.clone(), precision)).collect()
    }

    /// `x / rms(x) · weight` with `rms(x) = sqrt(mean(x²) + eps)`; statistics in f32 or wider.
    ///
    /// Returns the result and `1 / rms` of each row, which the backward needs.
    ///
    /// # Shapes
    /// `x [tokens, d_model]`, `weight [d_model]`; `[tokens, d_model]` and `[tokens, 1]`.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::rms_norm::<Self>(x, weight, eps)
    }

    /// [`rms_norm`](Self::rms_norm) with a result that only products read: an [`operand`](Self::operand).
    fn rms_norm_operand(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (out, inv_rms) = Self::rms_norm(x, weight, eps);
        (Self::operand(out, precision), inv_rms)
    }

    /// Gradients of [`rms_norm`](Self::rms_norm) for `x` and `weight`; `residual`, the gradient that reaches `x` past the
    /// norm, is added to the first.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inv_rms: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        residual: Option<FloatTensor<Self>>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::rms_norm_backward::<Self>(x, weight, inv_rms, grad, residual)
    }

    /// Turns the pairs `(x[i], x[i + head_dim / 2])` of every head by the angles of its position. With
    /// `inverse`, by the negative angles: the backward.
    ///
    /// # Shapes
    /// `x [batch, seq_len, heads, head_dim]`, `cos` and `sin` `[seq_len, head_dim / 2]`, result as `x`.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        reference::rotary::<Self>(x, cos, sin, inverse)
    }

    /// `softmax(scale · q kᵀ + causal mask) v`, grouped-query, masked bottom-right: query `i` of `q_len` sees the keys
    /// `0 ..= kv_len - q_len + i`, so that training, prefill and decoding are the same operation.
    ///
    /// With `starts`, a query sees no key before the one its entry names: the first token of its document, so that attention
    /// is block-causal. No entry is past its query, and along a
    /// sequence they do not fall.
    ///
    /// Returns the result and the log-sum-exp of each query's scores, which the backward needs.
    ///
    /// # Shapes
    /// `q [batch, q_len, n_heads, head_dim]`, `k` and `v` `[batch, kv_len, n_kv_heads, head_dim]` with
    /// `kv_len >= q_len` and `n_heads` a multiple of `n_kv_heads`, `starts [batch, q_len]`;
    /// `[batch, q_len, n_heads, head_dim]` and `[batch, n_heads, q_len]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        starts: Option<IntTensor<Self>>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::causal_attention::<Self>(q, k, v, starts, spec)
    }

    /// Replaces the positions of `cache` from `start` on by those of `new`, rounded to the cache's type, in place where the caller's is the only handle.
    ///
    /// # Shapes
    /// `cache [batch, capacity, n_kv_heads, head_dim]`, `new [batch, len, n_kv_heads, head_dim]`, result as `cache`.
    fn cache_write(cache: FloatTensor<Self>, new: FloatTensor<Self>, start: usize) -> FloatTensor<Self> {
        reference::cache_write::<Self>(cache, new, start)
    }

    /// [`causal_attention`](Self::causal_attention) to the first `len` positions of a cache, of which the last are the queries' own. The cache may
    /// keep them in fewer bits than `q` has.
    ///
    /// # Shapes
    /// `q [batch, q_len, n_heads, head_dim]`, the cache's `[batch, capacity, n_kv_heads, head_dim]`, result as `q`.
    fn cached_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        len: usize,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        reference::cached_attention::<Self>(q, keys, values, len, spec)
    }

    /// Gradients of [`causal_attention`](Self::causal_attention) for `q`, `k` and `v`.
    fn causal_attention_backward(saved: AttentionSaved<Self>, grad: FloatTensor<Self>) -> [FloatTensor<Self>; 3] {
        reference::causal_attention_backward::<Self>(saved, grad)
    }

    /// `x + residual`, in the dtype of the residual stream.
    ///
    /// # Shapes
    /// All alike.
    fn add_residual(x: FloatTensor<Self>, residual: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::add_residual::<Self>(x, residual)
    }

    /// `silu(gate) · up`.
    ///
    /// # Shapes
    /// All `[tokens, d_ff]`.
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::swiglu::<Self>(gate, up)
    }

    /// Gradients of [`swiglu`](Self::swiglu) for `gate` and `up`.
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::swiglu_backward::<Self>(gate, up, grad)
    }

    /// Cross entropy of `softmax(hidden · headᵀ)` against `targets`, for each token, in chunks of rows: the
    /// `[tokens, vocab_size]` logits never exist whole. A target of [`IGNORE_TARGET`] gives 0.
    ///
    /// # Shapes
    /// `hidden [tokens, d_model]`, `head [vocab_size, d_model]`, `targets [tokens]`; result `[tokens]`.
    fn token_losses(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        reference::token_losses::<Self>(hidden, head, targets, spec)
    }

    /// A head as [`token_losses`](Self::token_losses) and [`linear_cross_entropy`](Self::linear_cross_entropy) read it: in `dtype`, that of the
    /// hidden states, or in a shorter one where they read that.
    fn loss_head(head: FloatTensor<Self>, dtype: DType) -> FloatTensor<Self> {
        ops::cast::<Self>(head, dtype)
    }

    /// `ln Σ exp(x)` of each row.
    ///
    /// # Shapes
    /// `x [rows, cols]`, result `[rows]`.
    fn log_sum_exp(x: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::log_sum_exp::<Self>(x)
    }

    /// The sum of [`token_losses`](Self::token_losses) as a tensor `[1]`. This is the one that can be differentiated.
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        Self::float_sum(Self::token_losses(hidden, head, targets, spec))
    }

    /// [`linear_cross_entropy`](Self::linear_cross_entropy) together with its gradients for `hidden` and `head`,
    /// made while each chunk of logits is at hand. Without `spec.head_grad` the last is empty, `[0, d_model]`.
    fn linear_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> [FloatTensor<Self>; 3] {
        reference::linear_cross_entropy_with_grads::<Self>(hidden, head, targets, spec)
    }

    /// `x · factor`, for a factor `[1]`.
    fn scale(x: FloatTensor<Self>, factor: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::scale::<Self>(x, factor)
    }

    /// A whole transformer block; see [`mod@block`].
    ///
    /// # Shapes
    /// `x [batch · seq_len, d_model]`, result as `x`.
    fn block(
        x: FloatTensor<Self>,
        weights: BlockWeights<FloatTensor<Self>>,
        spec: BlockSpec<Self>,
    ) -> FloatTensor<Self> {
        block::forward::<Self>(x, &weights, &spec)
    }

    /// A whole transformer block whose input continues the sequences of a cache, for inference: it has no backward. Returns the cache
    /// with the new positions, written in place where the caller's are the only handles.
    ///
    /// # Shapes
    /// `x [batch · seq_len, d_model]`, result as `x`; the cache has room for `seq_len` positions more. `spec.starts` is not
    /// looked at.
    fn cached_block(
        x: FloatTensor<Self>,
        weights: BlockWeights<Matrix<Self>, FloatTensor<Self>>,
        cache: BlockCache<Self>,
        spec: BlockSpec<Self>,
    ) -> (FloatTensor<Self>, BlockCache<Self>) {
        block::cached::<Self>(x, weights, cache, &spec)
    }

    /// `weight` as it is, whose gradient `taker` gets from a backward as soon as it is made: before the backward comes to what made `x`. For a weight
    /// that is read with `x` or, where there is no `x`, at the beginning. Without autodiff there is none.
    fn take_gradient(
        weight: FloatTensor<Self>,
        _x: Option<&FloatTensor<Self>>,
        _taker: GradientTaker<Self>,
    ) -> FloatTensor<Self> {
        weight
    }

    /// One AdamW update of parameters and their moments, each in one pass where the backend can: `[param, grad, m, v]` to the new
    /// `[param, m, v]`.
    ///
    /// # Shapes
    /// Four tensors of as many elements, each in a shape of its own, which the new ones have, too.
    fn adamw(tensors: Vec<[FloatTensor<Self>; 4]>, step: &AdamWStep) -> Vec<[FloatTensor<Self>; 3]> {
        tensors.into_iter().map(|tensors| reference::adamw::<Self>(tensors, step)).collect()
    }

    /// Sums of the squares of each tensor's elements, `[tensors]`: the gradients' shares of the global norm.
    ///
    /// # Panics
    /// Without tensors.
    fn sums_of_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        reference::sums_of_squares::<Self>(tensors)
    }
}

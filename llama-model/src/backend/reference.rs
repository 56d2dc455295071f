//! The specification: every operation of [`LlamaBackend`] in plain Burn operations, forward and
//! backward. Faster bodies are tested against these; their backwards against finite differences in f64.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Tensor, TensorMetadata, activation};

use super::ops::{cast, primitive, tensor};
use super::{AdamWStep, AttentionSaved, AttentionSpec, IGNORE_TARGET, LlamaBackend, LossSpec, QuantizedWeight};
use crate::Precision;

/// Rows of logits that exist at once in the chunked cross entropy.
pub const CROSS_ENTROPY_CHUNK: usize = 512;

/// Score of a masked pair: small enough to vanish, finite because not every shader language has infinities.
const MASKED: f64 = -1e30;

/// [`LlamaBackend::project`].
pub fn project<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, precision: Precision) -> FloatTensor<B> {
    let weight = if weight.dtype() == x.dtype() { weight } else { B::float_cast(weight, x.dtype().into()) };
    product::<B>(x, B::float_transpose(weight), precision)
}

/// A matrix product with both operands in the precision, the result in the dtype of the first.
fn product<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>, precision: Precision) -> FloatTensor<B> {
    match precision {
        Precision::F32 => B::float_matmul(a, b),
        Precision::Bf16 | Precision::F16 => {
            let dtype = a.dtype();
            let [a, b] = [a, b].map(|x| B::float_cast(x, precision.dtype().into()));
            B::float_cast(B::float_matmul(a, b), dtype.into())
        }
    }
}

/// [`LlamaBackend::project_quantized`].
pub fn project_quantized<B: LlamaBackend>(
    x: FloatTensor<B>,
    weights: Vec<QuantizedWeight<B>>,
    precision: Precision,
) -> Vec<FloatTensor<B>> {
    // What products take as it is, they need not round.
    let dtype = if B::has_products(&B::float_device(&x), precision) { precision.dtype() } else { x.dtype() };
    let weights = weights.into_iter().map(|weight| B::widen(weight, dtype)).collect();
    B::project_all(x, weights, precision)
}

/// [`LlamaBackend::project_quantized_backward`].
pub fn project_quantized_backward<B: LlamaBackend>(
    grad: FloatTensor<B>,
    weight: QuantizedWeight<B>,
    precision: Precision,
    dtype: DType,
) -> FloatTensor<B> {
    B::project_backward_input(vec![(grad, B::widen(weight, dtype))], precision, dtype)
}

/// [`LlamaBackend::project_backward_input`].
///
/// # Panics
/// Without pairs.
pub fn project_backward_input<B: Backend>(
    pairs: Vec<(FloatTensor<B>, FloatTensor<B>)>,
    precision: Precision,
    dtype: DType,
) -> FloatTensor<B> {
    let products = pairs.into_iter().map(|(grad, weight)| {
        // A frozen weight may be stored in fewer bytes.
        let weight = if weight.dtype() == grad.dtype() { weight } else { B::float_cast(weight, grad.dtype().into()) };
        product::<B>(grad, weight, precision)
    });
    cast::<B>(products.reduce(B::float_add).expect("an input is read by a weight"), dtype)
}

/// [`LlamaBackend::project_backward_weight`].
pub fn project_backward_weight<B: Backend>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    precision: Precision,
) -> FloatTensor<B> {
    product::<B>(B::float_transpose(grad), x, precision)
}

fn matmul<B: Backend>(a: Tensor<B, 4>, b: Tensor<B, 4>, precision: Precision) -> Tensor<B, 4> {
    tensor(product::<B>(primitive(a), primitive(b), precision))
}

/// [`LlamaBackend::token_embedding_backward`].
pub fn token_embedding_backward<B: Backend>(
    grad: FloatTensor<B>,
    tokens: IntTensor<B>,
    vocab_size: usize,
    sum: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let grad = tensor::<B, 2>(grad);
    let zeros = || Tensor::<B, 2>::zeros([vocab_size, grad.dims()[1]], (&grad.device(), grad.dtype()));
    let sum = sum.unwrap_or_else(|| primitive(zeros()));
    B::float_select_add(sum, 0, tokens, primitive(grad))
}

/// [`LlamaBackend::scale`].
pub fn scale<B: Backend>(x: FloatTensor<B>, factor: FloatTensor<B>) -> FloatTensor<B> {
    let ones = vec![1; x.shape().num_dims()];
    let factor = B::float_cast(B::float_reshape(factor, ones.into()), x.dtype().into());
    B::float_mul(x, factor)
}

/// The dtype statistics are computed in: f64 stays, everything else is f32.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn widened<B: Backend>(x: FloatTensor<B>) -> Tensor<B, 2> {
    let dtype = wide(x.dtype());
    tensor(cast::<B>(x, dtype))
}

/// [`LlamaBackend::rms_norm`].
pub fn rms_norm<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, eps: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, weight) = (tensor::<B, 2>(x), tensor::<B, 1>(weight));
    let dtype = x.dtype();
    let x = x.cast(wide(dtype));
    let inv_rms = x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip();
    let normed = (x * inv_rms.clone()).cast(dtype);
    (primitive(normed * weight.unsqueeze()), primitive(inv_rms))
}

/// [`LlamaBackend::rms_norm_backward`].
///
/// With `x̂ = x / rms` and `g = grad · weight`: `dx = (g - x̂ · mean(g · x̂)) / rms`, `dweight = Σ grad · x̂`.
pub fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    inv_rms: FloatTensor<B>,
    grad: FloatTensor<B>,
    residual: Option<FloatTensor<B>>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, weight) = (tensor::<B, 2>(x), tensor::<B, 1>(weight));
    let (inv_rms, grad) = (tensor::<B, 2>(inv_rms), tensor::<B, 2>(grad));
    let dtype = x.dtype();
    let normed = x.cast(wide(dtype)) * inv_rms.clone();
    let grad = grad.cast(wide(dtype));
    let d_weight = (grad.clone() * normed.clone()).sum_dim(0).squeeze_dim::<1>(0);
    let g = grad * weight.cast(wide(dtype)).unsqueeze();
    let mean = (g.clone() * normed.clone()).mean_dim(1);
    let d_x = ((g - normed * mean) * inv_rms).cast(dtype);
    let d_x = residual.map_or(d_x.clone(), |residual| d_x + tensor(residual));
    (primitive(d_x), primitive(d_weight.cast(dtype)))
}

/// [`LlamaBackend::rotary`].
pub fn rotary<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    inverse: bool,
) -> FloatTensor<B> {
    let x = tensor::<B, 4>(x);
    let [_, seq_len, _, head_dim] = x.dims();
    let dtype = x.dtype();
    let table = |t| tensor::<B, 2>(t).cast(dtype).reshape([1, seq_len, 1, head_dim / 2]);
    let (cos, sin) = (table(cos), table(sin));
    let sin = if inverse { sin.neg() } else { sin };
    let first = x.clone().narrow(3, 0, head_dim / 2);
    let second = x.narrow(3, head_dim / 2, head_dim / 2);
    primitive(Tensor::cat(
        vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin],
        3,
    ))
}

/// Queries, keys or values as `[batch, n_heads, len, head_dim]`, each key and value head repeated for its group.
fn heads_first<B: Backend>(x: Tensor<B, 4>, n_heads: usize) -> Tensor<B, 4> {
    let [batch, len, n_kv_heads, head_dim] = x.dims();
    let x = x.swap_dims(1, 2);
    if n_kv_heads == n_heads {
        return x;
    }
    let group = n_heads / n_kv_heads;
    x.reshape([batch, n_kv_heads, 1, len, head_dim])
        .expand([batch, n_kv_heads, group, len, head_dim])
        .reshape([batch, n_heads, len, head_dim])
}

/// Scores with the bottom-right causal mask, `[batch, n_heads, q_len, kv_len]`.
fn masked_scores<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    starts: Option<IntTensor<B>>,
    spec: AttentionSpec,
) -> Tensor<B, 4> {
    let [batch, _, q_len, _] = q.dims();
    let [_, _, kv_len, _] = k.dims();
    let device = q.device();
    let scores = matmul(q, k.swap_dims(2, 3), spec.precision).mul_scalar(spec.scale);
    let rows = Tensor::<B, 1, Int>::arange(0..q_len as i64, &device).add_scalar((kv_len - q_len) as i64);
    let columns = Tensor::<B, 1, Int>::arange(0..kv_len as i64, &device);
    let future = columns
        .unsqueeze_dim::<2>(0)
        .expand([q_len, kv_len])
        .greater(rows.unsqueeze_dim::<2>(1).expand([q_len, kv_len]));
    let scores = scores.mask_fill(future.unsqueeze::<4>(), MASKED);
    let Some(starts) = starts else { return scores };
    let starts = Tensor::<B, 2, Int>::from_primitive(starts).reshape([batch, 1, q_len, 1]);
    let columns = Tensor::<B, 1, Int>::arange(0..kv_len as i64, &scores.device()).reshape([1, 1, 1, kv_len]);
    let shape = [batch, 1, q_len, kv_len];
    let before = columns.expand(shape).lower(starts.expand(shape));
    scores.mask_fill(before, MASKED)
}

/// [`LlamaBackend::causal_attention`].
pub fn causal_attention<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    starts: Option<IntTensor<B>>,
    spec: AttentionSpec,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v) = (tensor::<B, 4>(q), tensor::<B, 4>(k), tensor::<B, 4>(v));
    let [batch, q_len, n_heads, _] = q.dims();
    let scores = masked_scores(q.swap_dims(1, 2), heads_first(k, n_heads), starts, spec);
    let dtype = scores.dtype();
    let scores = scores.cast(wide(dtype));
    let max = scores.clone().max_dim(3);
    let exp = (scores - max.clone()).exp();
    let sum = exp.clone().sum_dim(3);
    let weights = (exp / sum.clone()).cast(dtype);
    let out = matmul(weights, heads_first(v, n_heads), spec.precision).swap_dims(1, 2);
    let lse = (sum.log() + max).reshape([batch, n_heads, q_len]);
    (primitive(out), primitive(lse))
}

/// `cache[:, start ..] = new`.
pub fn cache_write<B: Backend>(cache: FloatTensor<B>, new: FloatTensor<B>, start: usize) -> FloatTensor<B> {
    let (cache, new) = (tensor::<B, 4>(cache), tensor::<B, 4>(new));
    let [batch, len, heads, head_dim] = new.dims();
    let new = new.cast(cache.dtype());
    primitive(cache.slice_assign([0..batch, start..start + len, 0..heads, 0..head_dim], new))
}

/// [`LlamaBackend::cached_attention`].
pub fn cached_attention<B: LlamaBackend>(
    q: FloatTensor<B>,
    keys: FloatTensor<B>,
    values: FloatTensor<B>,
    len: usize,
    spec: AttentionSpec,
) -> FloatTensor<B> {
    let dtype = q.dtype();
    let read = |cache| primitive(tensor::<B, 4>(cache).narrow(1, 0, len).cast(dtype));
    let [keys, values] = [keys, values].map(read);
    let (out, _) = B::causal_attention(q, keys, values, None, spec);
    out
}

/// [`LlamaBackend::causal_attention_backward`].
///
/// With `P = exp(S - lse)`: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P · (dP - rowsum(dO · O))`, `dQ = scale dS K`,
/// `dK = scale dSᵀ Q` (Dao et al., FlashAttention, appendix B).
pub fn causal_attention_backward<B: Backend>(saved: AttentionSaved<B>, grad: FloatTensor<B>) -> [FloatTensor<B>; 3] {
    let AttentionSaved { q, k, v, starts, out, lse, spec } = saved;
    let (q, k, v) = (tensor::<B, 4>(q), tensor::<B, 4>(k), tensor::<B, 4>(v));
    let (out, grad, lse) = (tensor::<B, 4>(out), tensor::<B, 4>(grad), tensor::<B, 3>(lse));
    let [batch, kv_len, n_kv_heads, head_dim] = k.dims();
    let n_heads = q.dims()[2];
    let dtype = q.dtype();

    let delta = (out * grad.clone()).cast(wide(dtype)).sum_dim(3).swap_dims(1, 2);
    let (q, grad) = (q.swap_dims(1, 2), grad.swap_dims(1, 2));
    let (k, v) = (heads_first(k, n_heads), heads_first(v, n_heads));
    let scores = masked_scores(q.clone(), k.clone(), starts, spec).cast(wide(dtype));
    let weights = (scores - lse.unsqueeze_dim::<4>(3)).exp();
    let product = |a, b| matmul::<B>(a, b, spec.precision);
    let d_v = product(weights.clone().cast(dtype).swap_dims(2, 3), grad.clone());
    let d_weights = product(grad, v.swap_dims(2, 3)).cast(wide(dtype));
    let d_scores = (weights * (d_weights - delta)).mul_scalar(spec.scale).cast(dtype);
    let d_q = product(d_scores.clone(), k);
    let d_k = product(d_scores.swap_dims(2, 3), q);

    let group_sum = |x: Tensor<B, 4>| {
        x.reshape([batch, n_kv_heads, n_heads / n_kv_heads, kv_len, head_dim])
            .sum_dim(2)
            .squeeze_dim::<4>(2)
            .swap_dims(1, 2)
    };
    [primitive(d_q.swap_dims(1, 2)), primitive(group_sum(d_k)), primitive(group_sum(d_v))]
}

/// [`LlamaBackend::swiglu`].
pub fn swiglu<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = gate.dtype();
    let [gate, up] = [gate, up].map(widened::<B>);
    cast::<B>(primitive(activation::silu(gate) * up), dtype)
}

/// [`LlamaBackend::swiglu_backward`].
///
/// With `σ = sigmoid(gate)`: `dgate = grad · up · σ · (1 + gate · (1 - σ))`, `dup = grad · gate · σ`.
pub fn swiglu_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = gate.dtype();
    let [gate, up, grad] = [gate, up, grad].map(widened::<B>);
    let sigmoid = activation::sigmoid(gate.clone());
    let silu = gate.clone() * sigmoid.clone();
    let d_up = grad.clone() * silu.clone();
    let d_gate = grad * up * (sigmoid.clone() + silu * (sigmoid.neg().add_scalar(1.0)));
    (cast::<B>(primitive(d_gate), dtype), cast::<B>(primitive(d_up), dtype))
}

/// [`LlamaBackend::log_sum_exp`].
pub fn log_sum_exp<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    primitive(log_sum_exps(tensor::<B, 2>(x)).flatten::<1>(0, 1))
}

/// `[rows, 1]`
fn log_sum_exps<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let max = x.clone().max_dim(1);
    (x - max.clone()).exp().sum_dim(1).log() + max
}

/// One chunk of rows of the cross entropy.
struct Chunk<B: Backend> {
    /// `[rows, vocab_size]`
    log_probs: Tensor<B, 2>,
    /// Log-sum-exp of the logits, `[rows, 1]`
    lse: Tensor<B, 2>,
    /// Factor of its square in the loss.
    z_loss: f64,
    /// Column of the target, 0 where it is ignored, `[rows, 1]`
    columns: Tensor<B, 2, Int>,
    /// 1 where the target counts, 0 where it is ignored, `[rows, 1]`
    counts: Tensor<B, 2>,
}

impl<B: Backend> Chunk<B> {
    fn new(logits: Tensor<B, 2>, targets: Tensor<B, 1, Int>, z_loss: f64) -> Self {
        let logits = logits.clone().cast(wide(logits.dtype()));
        let ignored = targets.clone().equal_elem(IGNORE_TARGET);
        let counts = ignored.clone().bool_not().float().cast(logits.dtype()).unsqueeze_dim::<2>(1);
        let lse = log_sum_exps(logits.clone());
        Self {
            log_probs: logits - lse.clone(),
            lse,
            z_loss,
            columns: targets.mask_fill(ignored, 0).unsqueeze_dim::<2>(1),
            counts,
        }
    }

    /// `[rows, 1]`
    fn losses(&self) -> Tensor<B, 2> {
        let losses = self.log_probs.clone().gather(1, self.columns.clone()).neg();
        (losses + self.lse.clone().square().mul_scalar(self.z_loss)) * self.counts.clone()
    }

    /// Gradient of the summed losses for the logits: `softmax · (1 + 2 z lse) - onehot(target)`.
    fn d_logits(self) -> Tensor<B, 2> {
        let ones = Tensor::ones_like(&self.counts);
        let weights = self.log_probs.exp() * self.lse.mul_scalar(2.0 * self.z_loss).add_scalar(1.0);
        let d_logits = weights.scatter(1, self.columns, ones.neg(), burn::tensor::IndexingUpdateOp::Add);
        d_logits * self.counts
    }
}

/// Rows of the hidden state and their targets, [`CROSS_ENTROPY_CHUNK`] at a time.
pub(super) fn chunks<B: Backend>(
    hidden: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
) -> impl Iterator<Item = (Tensor<B, 2>, Tensor<B, 1, Int>)> {
    let rows = hidden.dims()[0];
    (0..rows).step_by(CROSS_ENTROPY_CHUNK).map(move |start| {
        let len = CROSS_ENTROPY_CHUNK.min(rows - start);
        (hidden.clone().narrow(0, start, len), targets.clone().narrow(0, start, len))
    })
}

/// [`LlamaBackend::token_losses`].
pub fn token_losses<B: Backend>(
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: IntTensor<B>,
    spec: LossSpec,
) -> FloatTensor<B> {
    let losses = chunks::<B>(tensor(hidden), Tensor::from_primitive(targets))
        .map(|(hidden, targets)| {
            let logits = tensor(project::<B>(primitive(hidden), head.clone(), spec.precision));
            Chunk::new(logits, targets, spec.z_loss).losses().squeeze_dim::<1>(1)
        })
        .collect();
    primitive(Tensor::cat(losses, 0))
}

/// [`LlamaBackend::linear_cross_entropy_with_grads`].
pub fn linear_cross_entropy_with_grads<B: Backend>(
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: IntTensor<B>,
    spec: LossSpec,
) -> [FloatTensor<B>; 3] {
    chunked_cross_entropy::<B>(hidden, head, targets, spec, |logits, targets| {
        let chunk = Chunk::new(logits, targets, spec.z_loss);
        (chunk.losses().squeeze_dim(1), chunk.d_logits())
    })
}

/// The loss and its gradients, given what makes the losses and their gradients of a chunk of logits.
pub(super) fn chunked_cross_entropy<B: Backend>(
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: IntTensor<B>,
    spec: LossSpec,
    chunk: impl Fn(Tensor<B, 2>, Tensor<B, 1, Int>) -> (Tensor<B, 1>, Tensor<B, 2>),
) -> [FloatTensor<B>; 3] {
    let head = tensor::<B, 2>(head);
    let mut loss = Tensor::<B, 1>::zeros([1], (&head.device(), wide(head.dtype())));
    let rows = if spec.head_grad { head.dims()[0] } else { 0 };
    let mut d_head = Tensor::<B, 2>::zeros([rows, head.dims()[1]], (&head.device(), head.dtype()));
    let mut d_hidden = Vec::new();
    for (hidden, targets) in chunks::<B>(tensor(hidden), Tensor::from_primitive(targets)) {
        let logits = project::<B>(primitive(hidden.clone()), primitive(head.clone()), spec.precision);
        let (losses, d_logits) = chunk(tensor(logits), targets);
        loss = loss + losses.sum();
        let (d_logits, head) = (primitive(d_logits.cast(head.dtype())), primitive(head.clone()));
        d_hidden.push(tensor::<B, 2>(product::<B>(d_logits.clone(), head, spec.precision)));
        if spec.head_grad {
            d_head = d_head + tensor(project_backward_weight::<B>(d_logits, primitive(hidden), spec.precision));
        }
    }
    [primitive(loss), primitive(Tensor::cat(d_hidden, 0)), primitive(d_head)]
}

/// [`LlamaBackend::adamw`] of one parameter.
pub fn adamw<B: Backend>([param, grad, m, v]: [FloatTensor<B>; 4], step: &AdamWStep) -> [FloatTensor<B>; 3] {
    let shapes = [param.shape(), m.shape(), v.shape()];
    let flat = |x: FloatTensor<B>| {
        let len = x.shape().num_elements();
        tensor::<B, 1>(B::float_reshape(x, [len].into()))
    };
    let (param, m, v) = (flat(param), flat(m), flat(v));
    let grad = flat(grad).mul_scalar(step.grad_scale);
    let (correction_1, correction_2) = step.bias_corrections();
    let m = m.mul_scalar(step.beta_1) + grad.clone().mul_scalar(1.0 - step.beta_1);
    let v = v.mul_scalar(step.beta_2) + grad.square().mul_scalar(1.0 - step.beta_2);
    let root = v.clone().div_scalar(correction_2).sqrt().add_scalar(step.epsilon);
    let param =
        param.mul_scalar(1.0 - step.lr * step.weight_decay) - m.clone().div(root).mul_scalar(step.lr / correction_1);
    let [param_shape, m_shape, v_shape] = shapes;
    [(param, param_shape), (m, m_shape), (v, v_shape)].map(|(x, shape)| B::float_reshape(primitive(x), shape))
}

/// [`LlamaBackend::sums_of_squares`].
pub fn sums_of_squares<B: Backend>(tensors: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    B::float_cat(tensors.into_iter().map(|x| B::float_sum(B::float_mul(x.clone(), x))).collect(), 0)
}

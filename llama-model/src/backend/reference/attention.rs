//! Causal attention with all its scores at once.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Int, Tensor, TensorMetadata};

use super::super::ops::{primitive, tensor};
use super::super::{AttentionSaved, AttentionSpec, LlamaBackend};
use super::{matmul, wide};

/// Score of a masked pair: small enough to vanish, finite because not every shader language has infinities.
const MASKED: f64 = -1e30;

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

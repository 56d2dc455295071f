//! The operations of [`LlamaBackend`] on tensors of any rank, as the modules use them.

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Int, Shape, Tensor, TensorMetadata, TensorPrimitive};

use super::{Adapted, AttentionSpec, BlockCache, BlockSpec, BlockWeights, LlamaBackend, LossSpec, Matrix};
use crate::Precision;

/// A primitive as a tensor.
pub fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

/// A tensor as its primitive.
pub fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

/// In another dtype, or as it is.
pub(crate) fn cast<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype { x } else { B::float_cast(x, dtype.into()) }
}

/// All leading dimensions folded into one: `[tokens, features]`. A product on three dimensions would make a weight
/// gradient per batch element.
fn fold<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 2> {
    let dims = x.dims();
    let features = dims[D - 1];
    x.reshape([dims[..D - 1].iter().product(), features])
}

/// A row of `weight` for each token.
///
/// # Shapes
/// `weight [vocab_size, d_model]`, `tokens [batch, seq_len]`, result `[batch, seq_len, d_model]`.
pub fn embedding<B: LlamaBackend>(weight: Tensor<B, 2>, tokens: Tensor<B, 2, Int>) -> Tensor<B, 3> {
    let ([batch, seq_len], [_, d_model]) = (tokens.dims(), weight.dims());
    let tokens = tokens.reshape([batch * seq_len]).into_primitive();
    tensor::<B, 2>(B::token_embedding(primitive(weight), tokens)).reshape([batch, seq_len, d_model])
}

/// `x · weightᵀ`, for a weight in the dtype of `x` or a shorter one.
///
/// # Shapes
/// `x [.., d_in]`, `weight [d_out, d_in]`, result `[.., d_out]`.
///
/// # Panics
/// If the widths or dtypes differ.
pub fn linear<B: LlamaBackend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
    precision: Precision,
) -> Tensor<B, D> {
    let [out] = linear_all(x, [Matrix::Floats(primitive(weight))], precision);
    out
}

/// [`linear`] with several weights, however they are stored, in one go where the backend can.
///
/// # Panics
/// As there.
pub fn linear_all<B: LlamaBackend, const D: usize, const N: usize>(
    x: Tensor<B, D>,
    weights: [Matrix<B>; N],
    precision: Precision,
) -> [Tensor<B, D>; N] {
    let dims = x.dims();
    weights.iter().for_each(|weight| check_width(weight, dims[D - 1]));
    Matrix::project_all(primitive(fold(x)), weights, precision).map(|product| unfold(product, dims))
}

/// Panics if a weight does not take an input of this width.
fn check_width<B: LlamaBackend>(weight: &Matrix<B>, width: usize) {
    let [_, d_in] = weight.dims();
    assert_eq!(width, d_in, "linear: the input has width {width}, a weight takes {d_in}");
}

/// A product with the leading dimensions of its input.
fn unfold<B: Backend, const D: usize>(product: FloatTensor<B>, mut dims: [usize; D]) -> Tensor<B, D> {
    let product = tensor::<B, 2>(product);
    dims[D - 1] = product.dims()[1];
    product.reshape(dims)
}

/// [`linear_all`] with frozen weights that may have adapters.
///
/// # Panics
/// As there.
pub fn adapted_all<B: LlamaBackend, const D: usize, const N: usize>(
    x: Tensor<B, D>,
    layers: [Adapted<B>; N],
    precision: Precision,
) -> [Tensor<B, D>; N] {
    let dims = x.dims();
    layers.iter().for_each(|layer| check_width(&layer.weight, dims[D - 1]));
    let products = B::project_adapted(primitive(fold(x)), layers.into(), precision);
    let products: [_; N] = products.try_into().unwrap_or_else(|_| unreachable!("each weight has a product"));
    products.map(|product| unfold(product, dims))
}

/// Root-mean-square normalisation (Zhang and Sennrich): `x / rms(x) · weight`.
///
/// # Shapes
/// `x [.., d_model]`, `weight [d_model]`, result as `x`.
///
/// # Panics
/// If the widths differ.
pub fn rms_norm<B: LlamaBackend, const D: usize>(x: Tensor<B, D>, weight: Tensor<B, 1>, eps: f64) -> Tensor<B, D> {
    let dims = x.dims();
    assert_eq!(dims[D - 1], weight.dims()[0], "rms_norm: input and weight have different widths");
    let (out, _) = B::rms_norm(primitive(fold(x)), primitive(weight), eps);
    tensor::<B, 2>(out).reshape(dims)
}

/// Rotary position embedding (Su et al.) of queries or keys.
///
/// # Shapes
/// `x [batch, seq_len, heads, head_dim]`, `cos` and `sin` `[seq_len, head_dim / 2]`, result as `x`.
///
/// # Panics
/// If the tables do not fit.
pub fn rotary<B: LlamaBackend>(x: Tensor<B, 4>, cos: Tensor<B, 2>, sin: Tensor<B, 2>) -> Tensor<B, 4> {
    let [_, seq_len, _, head_dim] = x.dims();
    assert_eq!(cos.dims(), [seq_len, head_dim / 2], "rotary: the table does not fit the input");
    assert_eq!(sin.dims(), cos.dims(), "rotary: cosine and sine tables differ");
    tensor(B::rotary(primitive(x), primitive(cos), primitive(sin), false))
}

/// Causal grouped-query attention with scores scaled by `1 / sqrt(head_dim)`; with `starts`, no key before the one a query's entry
/// names.
///
/// # Shapes
/// `q [batch, q_len, n_heads, head_dim]`, `k` and `v` `[batch, kv_len, n_kv_heads, head_dim]`, `starts [batch, q_len]`,
/// result as `q`.
///
/// # Panics
/// If the shapes do not fit or there are more queries than keys.
pub fn causal_attention<B: LlamaBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    starts: Option<Tensor<B, 2, Int>>,
    precision: Precision,
) -> Tensor<B, 4> {
    let [batch, q_len, ..] = q.dims();
    let spec = AttentionSpec::new(check_attention(&q, &k, &v, k.dims()[1]), precision);
    let starts = starts.map(|starts| {
        assert_eq!(starts.dims(), [batch, q_len], "attention: a start for each query");
        starts.into_primitive()
    });
    tensor(B::causal_attention(primitive(q), primitive(k), primitive(v), starts, spec).0)
}

/// Attention to the first `len` positions of a cache, of which the last are the queries' own; see [`LlamaBackend::cached_attention`].
///
/// # Shapes
/// `q [batch, q_len, n_heads, head_dim]`, `keys` and `values` `[batch, capacity, n_kv_heads, head_dim]` in any float type, result as `q`.
///
/// # Panics
/// If the shapes do not fit or the cache ends before `len`.
pub fn cached_attention<B: LlamaBackend>(
    q: Tensor<B, 4>,
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
    len: usize,
    precision: Precision,
) -> Tensor<B, 4> {
    let head_dim = check_attention(&q, &keys, &values, len);
    assert!(len <= keys.dims()[1], "attention: {len} positions of a cache that has {}", keys.dims()[1]);
    let spec = AttentionSpec::new(head_dim, precision);
    tensor(B::cached_attention(primitive(q), primitive(keys), primitive(values), len, spec))
}

/// Checks that the shapes fit, with `len` keys; returns the width of a head.
fn check_attention<B: LlamaBackend>(q: &Tensor<B, 4>, k: &Tensor<B, 4>, v: &Tensor<B, 4>, len: usize) -> usize {
    let ([batch, q_len, n_heads, head_dim], [k_batch, _, n_kv_heads, k_dim]) = (q.dims(), k.dims());
    assert_eq!(k.dims(), v.dims(), "attention: keys and values have different shapes");
    assert_eq!((batch, head_dim), (k_batch, k_dim), "attention: queries and keys do not fit");
    assert!(n_heads % n_kv_heads == 0, "attention: {n_heads} query heads cannot share {n_kv_heads} key heads");
    assert!(q_len <= len, "attention: {q_len} queries but only {len} keys");
    head_dim
}

/// Replaces the positions of a cache of keys or values from `start` on; see [`LlamaBackend::cache_write`].
///
/// # Shapes
/// `cache [batch, capacity, n_kv_heads, head_dim]` in any float type, which `new [batch, len, n_kv_heads, head_dim]` is rounded to, result as `cache`.
///
/// # Panics
/// If the shapes do not fit or the cache ends before the last position.
pub fn cache_write<B: LlamaBackend>(cache: Tensor<B, 4>, new: Tensor<B, 4>, start: usize) -> Tensor<B, 4> {
    let [batch, capacity, heads, head_dim] = cache.dims();
    let [new_batch, len, new_heads, new_dim] = new.dims();
    assert_eq!((batch, heads, head_dim), (new_batch, new_heads, new_dim), "cache: the new positions do not fit it");
    assert!(start + len <= capacity, "cache: {len} positions from {start} on, but it has {capacity}");
    tensor(B::cache_write(primitive(cache), primitive(new), start))
}

/// `silu(gate) · up` (Shazeer, SwiGLU).
///
/// # Shapes
/// All alike, `[.., d_ff]`.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<B: LlamaBackend, const D: usize>(gate: Tensor<B, D>, up: Tensor<B, D>) -> Tensor<B, D> {
    let dims = gate.dims();
    assert_eq!(dims, up.dims(), "swiglu: gate and up have different shapes");
    tensor::<B, 2>(B::swiglu(primitive(fold(gate)), primitive(fold(up)))).reshape(dims)
}

/// A whole transformer block, or the part of it that a member of a team has; see [`mod@super::block`].
///
/// # Shapes
/// `x [.., d_model]` with `spec.batch · spec.seq_len` rows, or the member's part of them, result as `x`.
///
/// # Panics
/// If `x`, the tables or the starts do not fit the sequences, or the weights each other.
pub fn block<B: LlamaBackend, const D: usize>(
    x: Tensor<B, D>,
    weights: BlockWeights<FloatTensor<B>>,
    spec: BlockSpec<B>,
) -> Tensor<B, D> {
    let BlockSpec { batch, seq_len, .. } = spec;
    let (dims, x) = (x.dims(), fold(x));
    assert_eq!(x.dims()[0], spec.team.shard().range(batch * seq_len).len(), "block: rows of other sequences");
    check_tables(&spec);
    if let Some(starts) = &spec.starts {
        assert_eq!(starts.shape(), Shape::new([batch, seq_len]), "block: a start for each token");
    }
    tensor::<B, 2>(B::block(primitive(x), weights, spec)).reshape(dims)
}

/// A whole transformer block that continues the sequences of a cache, or the part of it that a member of a team has; see
/// [`LlamaBackend::cached_block`].
///
/// # Shapes
/// `x [batch, seq_len, d_model]`, result as `x`.
///
/// # Panics
/// If `x` or the tables do not fit the sequences, or the cache has no room for them.
pub fn cached_block<B: LlamaBackend>(
    x: Tensor<B, 3>,
    weights: BlockWeights<Matrix<B>, FloatTensor<B>>,
    cache: BlockCache<B>,
    spec: BlockSpec<B>,
) -> (Tensor<B, 3>, BlockCache<B>) {
    let BlockSpec { batch, seq_len, .. } = spec;
    let dims = x.dims();
    assert_eq!(dims[..2], [batch, seq_len], "block: rows of other sequences");
    check_tables(&spec);
    let [of_cache, capacity, _, _] = cache.keys.shape().dims();
    assert_eq!(batch, of_cache, "block: the cache has another number of sequences");
    assert!(cache.len + seq_len <= capacity, "block: {} positions and {seq_len} more exceed {capacity}", cache.len);
    let (out, cache) = B::cached_block(primitive(fold(x)), weights, cache, spec);
    (tensor::<B, 2>(out).reshape(dims), cache)
}

fn check_tables<B: Backend>(spec: &BlockSpec<B>) {
    let table = Shape::new([spec.seq_len, spec.head_dim / 2]);
    assert_eq!(spec.cos.shape(), table, "block: the rotary table has another length than the sequence");
    assert_eq!(spec.sin.shape(), table, "block: cosine and sine tables differ");
}

/// Summed cross entropy of the next-token distribution `softmax(hidden · headᵀ)`; see
/// [`LlamaBackend::linear_cross_entropy`].
///
/// # Shapes
/// `hidden [.., d_model]`, `head [vocab_size, d_model]`, `targets` with one entry for each row of `hidden`; result `[1]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn linear_cross_entropy<B: LlamaBackend, const D: usize, const T: usize>(
    hidden: Tensor<B, D>,
    head: Tensor<B, 2>,
    targets: Tensor<B, T, Int>,
    spec: LossSpec,
) -> Tensor<B, 1> {
    let (hidden, targets) = loss_inputs(hidden, &head, targets);
    tensor(B::linear_cross_entropy(primitive(hidden), primitive(head), targets.into_primitive(), spec))
}

/// Cross entropy of each token; see [`LlamaBackend::token_losses`]. Not differentiable.
///
/// # Shapes
/// `hidden [.., d_model]`, `head [vocab_size, d_model]`, `targets` with one entry for each row of `hidden`; result
/// `[rows]`.
///
/// # Panics
/// If the shapes do not fit, or a tensor tracks gradients: use a model without autodiff (`model.valid()`).
pub fn token_losses<B: LlamaBackend, const D: usize, const T: usize>(
    hidden: Tensor<B, D>,
    head: Tensor<B, 2>,
    targets: Tensor<B, T, Int>,
    spec: LossSpec,
) -> Tensor<B, 1> {
    let (hidden, targets) = loss_inputs(hidden, &head, targets);
    tensor(B::token_losses(primitive(hidden), primitive(head), targets.into_primitive(), spec))
}

/// [`LlamaBackend::log_sum_exp`].
///
/// # Shapes
/// `x [rows, cols]`, result `[rows]`.
pub fn log_sum_exp<B: LlamaBackend>(x: Tensor<B, 2>) -> Tensor<B, 1> {
    tensor(B::log_sum_exp(primitive(x)))
}

fn loss_inputs<B: Backend, const D: usize, const T: usize>(
    hidden: Tensor<B, D>,
    head: &Tensor<B, 2>,
    targets: Tensor<B, T, Int>,
) -> (Tensor<B, 2>, Tensor<B, 1, Int>) {
    let hidden = fold(hidden);
    let [rows, d_model] = hidden.dims();
    assert_eq!(d_model, head.dims()[1], "cross entropy: hidden states and head have different widths");
    let targets: Tensor<B, 1, Int> = targets.flatten(0, T - 1);
    assert_eq!(rows, targets.dims()[0], "cross entropy: one target is needed for each hidden state");
    (hidden, targets)
}

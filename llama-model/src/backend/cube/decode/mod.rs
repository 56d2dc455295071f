//! Decoding: blocks on a few new positions, with a cache. A block is five launches, because what the host does for each is what limits
//! small models.
//!
//! | kernel | of the paper's block |
//! | --- | --- |
//! | `projection::qkv` | norm, queries, keys and values, rotary embedding, the cache |
//! | `attention::attend` | attention; of long texts in parts, which a sixth launch puts together |
//! | `projection::project` | `wo` and the residual |
//! | `projection::gated` | norm, `w1`, `w3`, SwiGLU |
//! | `projection::project` | `w2` and the residual |

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::ops::reshape;
use burn_cubecl::tensor::CubeTensor;

use super::reduce::planes;
use super::{contiguous, owned};
use crate::backend::{AttentionSpec, Bits, BlockCache, BlockSpec, BlockWeights, Matrix, QuantizedWeight};

mod attention;
mod projection;
mod weight;

use projection::Positions;
use weight::Weight;

/// Most rows: their sums stay in registers.
pub(super) const MAX_ROWS: usize = 8;

/// Whether the kernels take an input: of few rows. That they are whole vectors, a [`Weight`] has looked at.
fn fits<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    planes(&x.client) && x.shape()[0] <= MAX_ROWS && x.dtype != DType::F64
}

/// [`LlamaBackend::project`] of at most [`MAX_ROWS`] rows, summed in f32; none if the kernel does not take it.
pub(super) fn project<R: CubeRuntime>(x: &CubeTensor<R>, weight: &CubeTensor<R>) -> Option<CubeTensor<R>> {
    let weight = Weight::floats(weight).filter(|_| fits(x))?;
    let [x] = contiguous([x.clone()]);
    Some(projection::project(x, weight, None))
}

/// [`project`] for a weight in blocks.
pub(super) fn project_quantized<R: CubeRuntime>(
    x: &CubeTensor<R>,
    bits: Bits,
    words: &CubeTensor<R>,
    scales: &CubeTensor<R>,
) -> Option<CubeTensor<R>> {
    let weight = Weight::blocks(bits, words, scales).filter(|_| fits(x))?;
    let [x] = contiguous([x.clone()]);
    Some(projection::project(x, weight, None))
}

/// [`LlamaBackend::widen`]; none for a weight that kernels do not read.
pub(super) fn widen<R: CubeRuntime>(
    bits: Bits,
    words: &CubeTensor<R>,
    scales: &CubeTensor<R>,
    dtype: DType,
) -> Option<CubeTensor<R>> {
    Some(weight::widen(Weight::blocks(bits, words, scales)?, dtype))
}

/// Whether [`attention`] takes these: few queries of each sequence.
pub(super) fn fits_attention<R: CubeRuntime>(q: &CubeTensor<R>, keys: &CubeTensor<R>, values: &CubeTensor<R>) -> bool {
    let ([_, q_len, heads, head_dim], [_, _, kv_heads, _]) = (q.shape().dims(), keys.shape().dims());
    q.dtype == DType::F32
        && attention::reads([keys, values])
        && planes(&q.client)
        && q_len <= MAX_ROWS
        && attention::fits(&q.client, heads, kv_heads, head_dim)
}

/// [`LlamaBackend::cached_attention`](crate::LlamaBackend::cached_attention).
pub(super) fn attention<R: CubeRuntime>(
    q: CubeTensor<R>,
    keys: CubeTensor<R>,
    values: CubeTensor<R>,
    len: usize,
    scale: f64,
) -> CubeTensor<R> {
    let [q, keys, values] = contiguous([q, keys, values]);
    let (shape, [batch, seq_len, heads, head_dim]) = (q.shape(), q.shape().dims());
    let q = reshape(q, Shape::new([batch * seq_len, heads * head_dim]));
    let positions = Positions { start: len - seq_len, seq_len, capacity: keys.shape()[1] };
    reshape(attention::attend(q, [&keys, &values], positions, scale), shape)
}

/// A block's matrices in the order of [`BlockWeights`].
pub(super) struct Matrices<R: CubeRuntime>([Weight<R>; 7]);

/// The matrices for [`block`], if its kernels take the input, them and the cache.
pub(super) fn matrices<B, R>(
    x: &FloatTensor<B>,
    weights: &BlockWeights<Matrix<B>, FloatTensor<B>>,
    cache: &BlockCache<B>,
    spec: &BlockSpec<B>,
) -> Option<Matrices<R>>
where
    R: CubeRuntime,
    B: Backend<FloatTensorPrimitive = CubeTensor<R>, IntTensorPrimitive = CubeTensor<R>>,
{
    let weight = |matrix: &Matrix<B>| match matrix {
        Matrix::Floats(values) => Weight::floats(values),
        Matrix::Blocks(QuantizedWeight { bits, words, scales }) => Weight::blocks(*bits, words, scales),
    };
    let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = weights;
    let [wq, wk, wv, wo] = [weight(wq)?, weight(wk)?, weight(wv)?, weight(wo)?];
    let [w1, w2, w3] = [weight(w1)?, weight(w2)?, weight(w3)?];
    let alike = wk.is_like(&wq) && wv.is_like(&wq) && w3.is_like(&w1);
    let in_f32 =
        [x, attention_norm, ffn_norm, &spec.cos, &spec.sin].into_iter().all(|tensor| tensor.dtype == DType::F32);
    let head_dim = spec.head_dim;
    let heads = attention::fits(&x.client, wq.d_out / head_dim, wk.d_out / head_dim, head_dim);
    let cached = attention::reads([&cache.keys, &cache.values]);
    (fits(x) && alike && in_f32 && cached && heads && spec.team.is_alone())
        .then(|| Matrices([wq, wk, wv, wo, w1, w2, w3]))
}

/// [`LlamaBackend::cached_block`](crate::LlamaBackend::cached_block) of at most [`MAX_ROWS`] rows.
pub(super) fn block<B, R>(
    x: CubeTensor<R>,
    Matrices([wq, wk, wv, wo, w1, w2, w3]): Matrices<R>,
    norms: [CubeTensor<R>; 2],
    cache: BlockCache<B>,
    spec: BlockSpec<B>,
) -> (CubeTensor<R>, BlockCache<B>)
where
    R: CubeRuntime,
    B: Backend<FloatTensorPrimitive = CubeTensor<R>>,
{
    let BlockSpec { seq_len, head_dim, eps, compute, .. } = spec;
    let ([x], [attention_norm, ffn_norm]) = (contiguous([x]), contiguous(norms));
    let BlockCache { keys, values, len } = cache;
    let [keys, values] = owned([keys, values]);
    let positions = Positions { start: len, seq_len, capacity: keys.shape()[1] };
    let scale = AttentionSpec::new(head_dim, compute.precision).scale;

    let of_cache = [&keys, &values];
    let tables = contiguous([spec.cos, spec.sin]);
    let q = projection::qkv(x.clone(), attention_norm, [wq, wk, wv], tables, of_cache, positions, eps);
    let out = attention::attend(q, of_cache, positions, scale);
    let h = projection::project(out, wo, Some(x));
    let product = projection::gated(h.clone(), ffn_norm, [w1, w3], eps);
    let out = projection::project(product, w2, Some(h));
    (out, BlockCache { keys, values, len: len + seq_len })
}

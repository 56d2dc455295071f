//! CubeCL backends (CUDA, Vulkan, Metal, WebGPU), plain and with fusion.
//!
//! Own kernels where a composition of operations costs memory or passes over it: attention, whose scores never leave the chip; the
//! norm; rotary embeddings; softmax and gradient of the loss in place; AdamW in place; the embeddings' gradient; the global norm. SwiGLU
//! stays a composition: Burn's fusion makes one kernel of it, and joins it with its neighbours.
//!
//! Everything is generic over the float type of its tensors and computes in f32. What needs tensor cores (`product`, `attention::mma`; the
//! `wgmma` beside them needs those of Hopper) or plane operations (`decode`) has a fallback: where the device has them not, and for
//! shapes or types that a kernel does not take, plainer kernels or the default bodies run.

mod attention;
mod decode;
mod elementwise;
mod embedding;
mod fusion;
mod hopper;
mod loss;
mod mma;
mod product;
mod reduce;
mod rows;
mod sums;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape, Tensor, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::CubeCount;

use super::ops::{cast, primitive, tensor};
use super::{
    AdamWStep, AttentionSaved, AttentionSpec, BlockCache, BlockSpec, BlockWeights, LlamaBackend, LossSpec, Matrix,
    QuantizedWeight, block, reference,
};
use crate::Precision;

/// Tensors of a launch that takes several.
const MAX_TENSORS: usize = 16;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> LlamaBackend for CubeBackend<R, F, I, BT> {
    fn has_products(device: &Self::Device, precision: Precision) -> bool {
        product::supported(&R::client(device), precision)
    }

    fn operands(tensors: Vec<FloatTensor<Self>>, precision: Precision) -> Vec<FloatTensor<Self>> {
        match tensors.first() {
            Some(x) if product::supported(&x.client, precision) => elementwise::cast_all(tensors, precision.dtype()),
            _ => tensors,
        }
    }

    fn token_embedding_backward(
        grad: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab_size: usize,
        sum: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        match computes(&[&grad]) && sum.as_ref().is_none_or(|sum| sum.dtype() == grad.dtype()) {
            true => embedding::backward(grad, tokens, vocab_size, sum),
            false => reference::token_embedding_backward::<Self>(grad, tokens, vocab_size, sum),
        }
    }

    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        if let Some(product) = decode::project(&x, &weight) {
            return product;
        }
        if !product::fits([&x, &weight], weight.shape()[0], precision) {
            return reference::project::<Self>(x, weight, precision);
        }
        let dtype = x.dtype();
        product::product((x, false), (weight, true), precision, dtype)
    }

    fn project_all(
        x: FloatTensor<Self>,
        weights: Vec<FloatTensor<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        let few = x.shape()[0] <= decode::MAX_ROWS;
        if few || !weights.iter().all(|weight| product::fits([&x, weight], weight.shape()[0], precision)) {
            return weights.into_iter().map(|weight| Self::project(x.clone(), weight, precision)).collect();
        }
        let dtype = x.dtype();
        let pairs = weights.into_iter().map(|weight| [(x.clone(), false), (weight, true)]).collect();
        product::products(pairs, precision, dtype)
    }

    fn project_quantized(
        x: FloatTensor<Self>,
        weights: Vec<QuantizedWeight<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        let project = |QuantizedWeight { bits, words, scales }: &_| decode::project_quantized(&x, *bits, words, scales);
        let products: Option<Vec<_>> = weights.iter().map(project).collect();
        products.unwrap_or_else(|| reference::project_quantized::<Self>(x, weights, precision))
    }

    fn widen(weight: QuantizedWeight<Self>, dtype: DType) -> FloatTensor<Self> {
        let dense = decode::widen(weight.bits, &weight.words, &weight.scales, dtype);
        dense.unwrap_or_else(|| cast::<Self>(weight.dense(), dtype))
    }

    fn project_backward_input(
        pairs: Vec<(FloatTensor<Self>, FloatTensor<Self>)>,
        precision: Precision,
        dtype: DType,
    ) -> FloatTensor<Self> {
        if !pairs.iter().all(|(grad, weight)| product::fits([grad, weight], weight.shape()[1], precision)) {
            return reference::project_backward_input::<Self>(pairs, precision, dtype);
        }
        let pairs = pairs.into_iter().map(|(grad, weight)| [(grad, false), (weight, false)]).collect();
        product::sum_of_products(pairs, precision, dtype)
    }

    fn project_backward_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        if product::fits([&grad, &x], x.shape()[1], precision) {
            return product::product((grad, true), (x, false), precision, DType::F32);
        }
        let wide = product::supported(&x.client, precision);
        let gradient = reference::project_backward_weight::<Self>(grad, x, precision);
        if wide { cast::<Self>(gradient, DType::F32) } else { gradient }
    }

    fn project_backward_weights(
        grads: Vec<FloatTensor<Self>>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        if !grads.iter().all(|grad| product::fits([grad, &x], x.shape()[1], precision)) {
            let gradient = |grad| Self::project_backward_weight(grad, x.clone(), precision);
            return grads.into_iter().map(gradient).collect();
        }
        let pairs = grads.into_iter().map(|grad| [(grad, true), (x.clone(), false)]).collect();
        product::products(pairs, precision, DType::F32)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match rows::fits(&x) && computes(&[&x, &weight]) {
            true => {
                let dtype = x.dtype;
                rows::rms_norm(x, weight, eps, dtype)
            }
            false => reference::rms_norm::<Self>(x, weight, eps),
        }
    }

    fn rms_norm_operand(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if product::supported(&x.client, precision) && rows::fits(&x) && computes(&[&x, &weight]) {
            return rows::rms_norm(x, weight, eps, precision.dtype());
        }
        let (out, inv_rms) = Self::rms_norm(x, weight, eps);
        (Self::operand(out, precision), inv_rms)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inv_rms: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        residual: Option<FloatTensor<Self>>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let alike = x.dtype == grad.dtype && residual.as_ref().is_none_or(|residual| residual.dtype == x.dtype);
        if !(rows::fits(&x) && alike && computes(&[&x, &weight, &grad])) {
            return reference::rms_norm_backward::<Self>(x, weight, inv_rms, grad, residual);
        }
        let dtype = weight.dtype();
        let (d_x, partial) = rows::rms_norm_backward(x, weight, inv_rms, grad, residual);
        (d_x, cast::<Self>(sums::sum_rows(partial), dtype))
    }

    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        match computes(&[&x, &cos, &sin]) {
            true => elementwise::rotary(x, cos, sin, inverse),
            false => reference::rotary::<Self>(x, cos, sin, inverse),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        starts: Option<IntTensor<Self>>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if attention::wgmma::fits(&[&q, &k, &v], starts.as_ref(), spec.precision) {
            return attention::wgmma::forward(q, k, v, starts, spec.scale);
        }
        if let Some(operand) = attention::mma::operand(&[&q, &k, &v], spec.precision) {
            return attention::mma::forward(q, k, v, starts, spec.scale, operand);
        }
        match attention::tile(&q, attention::forward_bytes).filter(|_| computes(&[&q, &k, &v])) {
            Some(tile) => attention::forward(q, k, v, starts, spec.scale, tile),
            None => reference::causal_attention::<Self>(q, k, v, starts, spec),
        }
    }

    fn cached_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        len: usize,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        match decode::fits_attention(&q, &keys, &values) {
            true => decode::attention(q, keys, values, len, spec.scale),
            false => reference::cached_attention::<Self>(q, keys, values, len, spec),
        }
    }

    fn causal_attention_backward(saved: AttentionSaved<Self>, grad: FloatTensor<Self>) -> [FloatTensor<Self>; 3] {
        let AttentionSaved { q, k, v, starts, out, spec, .. } = &saved;
        if attention::wgmma::fits(&[q, k, v, out, &grad], starts.as_ref(), spec.precision) {
            let AttentionSaved { q, k, v, starts, out, lse, spec } = saved;
            return attention::wgmma::backward([q, k, v, out, grad], starts, lse, spec.scale);
        }
        if let Some(operand) = attention::mma::operand(&[q, k, v, out, &grad], spec.precision) {
            let AttentionSaved { q, k, v, starts, out, lse, spec } = saved;
            return attention::mma::backward([q, k, v, out, grad], starts, lse, spec.scale, operand);
        }
        let tile = attention::tile(&saved.q, attention::backward_bytes);
        let Some(tile) = tile.filter(|_| computes(&[&saved.q, &saved.k, &saved.v, &grad])) else {
            return reference::causal_attention_backward::<Self>(saved, grad);
        };
        let AttentionSaved { q, k, v, starts, out, lse, spec } = saved;
        // What the softmax's backward subtracts: `rowsum(dO · O)`, `[batch, q_len, n_heads, 1]`.
        let product = tensor::<Self, 4>(out).cast(DType::F32) * tensor::<Self, 4>(grad.clone()).cast(DType::F32);
        let delta = primitive(product.sum_dim(3));
        attention::backward([q, k, v, grad], starts, lse, delta, spec.scale, tile)
    }

    fn token_losses(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        if !computes(&[&hidden, &head]) {
            return reference::token_losses::<Self>(hidden, head, targets, spec);
        }
        let hidden = tensor::<Self, 2>(hidden);
        let dtype = hidden.dtype();
        let losses =
            reference::loss::chunks::<Self>(hidden, Tensor::from_primitive(targets)).map(|(hidden, targets)| {
                let logits = Self::project(primitive(hidden), head.clone(), spec.precision);
                let (losses, _) = rows::cross_entropy(logits, targets.into_primitive(), spec.z_loss, false);
                tensor::<Self, 1>(losses)
            });
        primitive(Tensor::cat(losses.collect(), 0).cast(dtype))
    }

    fn linear_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> [FloatTensor<Self>; 3] {
        if !computes(&[&hidden, &head]) {
            return reference::linear_cross_entropy_with_grads::<Self>(hidden, head, targets, spec);
        }
        if product::fits([&hidden, &head], head.shape()[0], spec.precision) && head.shape()[0].is_multiple_of(8) {
            return loss::linear_cross_entropy_with_grads::<R, F, I, BT>(hidden, head, targets, spec);
        }
        reference::loss::chunked_cross_entropy::<Self>(hidden, head, targets, spec, |logits, targets| {
            let (losses, d_logits) =
                rows::cross_entropy(primitive(logits), targets.into_primitive(), spec.z_loss, true);
            (tensor(losses), tensor(d_logits))
        })
    }

    fn cached_block(
        x: FloatTensor<Self>,
        weights: BlockWeights<Matrix<Self>, FloatTensor<Self>>,
        cache: BlockCache<Self>,
        spec: BlockSpec<Self>,
    ) -> (FloatTensor<Self>, BlockCache<Self>) {
        match decode::matrices::<Self, R>(&x, &weights, &cache, &spec) {
            Some(matrices) => decode::block(x, matrices, [weights.attention_norm, weights.ffn_norm], cache, spec),
            None => block::cached(x, weights, cache, &spec),
        }
    }

    fn adamw(tensors: Vec<[FloatTensor<Self>; 4]>, step: &AdamWStep) -> Vec<[FloatTensor<Self>; 3]> {
        match computes(&tensors.iter().flatten().collect::<Vec<_>>()) {
            true => elementwise::adamw(tensors, step),
            false => tensors.into_iter().map(|tensors| reference::adamw::<Self>(tensors, step)).collect(),
        }
    }

    fn sums_of_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        match computes(&tensors.iter().collect::<Vec<_>>()) {
            true => sums::sums_of_squares(tensors),
            false => reference::sums_of_squares::<Self>(tensors),
        }
    }
}

/// Whether kernels that compute in f32 take these tensors: not those of f64.
fn computes<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype != DType::F64)
}

/// A new tensor beside another, rows without padding between them.
fn empty_like<R: CubeRuntime>(x: &CubeTensor<R>, shape: Shape, dtype: DType) -> CubeTensor<R> {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, dtype)
}

/// Without padding between rows.
fn contiguous<R: CubeRuntime, const N: usize>(tensors: [CubeTensor<R>; N]) -> [CubeTensor<R>; N] {
    tensors.map(into_contiguous)
}

/// Without padding, and nobody else's: a kernel may write into them.
fn owned<R: CubeRuntime, const N: usize>(tensors: [CubeTensor<R>; N]) -> [CubeTensor<R>; N] {
    contiguous(tensors).map(|x| if x.can_mut() { x } else { x.copy() })
}

/// Sets of tensors for one launch each time: neighbours of the same types, and of one size of the vectors that they are read by. Each set takes
/// so many bindings of those that the device has.
fn batches<T, R: CubeRuntime>(
    sets: &[T],
    tensors: impl Fn(&T) -> &[CubeTensor<R>] + Copy,
    bindings: usize,
) -> impl Iterator<Item = (&[T], usize)> {
    let room = sets.first().map_or(0, |set| tensors(set)[0].client.properties().hardware.max_bindings as usize);
    let most = (room.saturating_sub(2) / bindings).clamp(1, MAX_TENSORS);
    let size = move |set: &T| reduce::vector_size(tensors(set)[0].shape().num_elements());
    let alike =
        move |a: &T, b: &T| size(a) == size(b) && tensors(a).iter().zip(tensors(b)).all(|(a, b)| a.dtype == b.dtype);
    sets.chunk_by(alike).flat_map(move |alike| alike.chunks(most)).map(move |alike| (alike, size(&alike[0])))
}

/// At least `count` cubes, in no dimension more than every device has.
fn cubes(count: usize) -> CubeCount {
    let x = count.clamp(1, 32_768);
    CubeCount::Static(x as u32, count.div_ceil(x) as u32, 1)
}

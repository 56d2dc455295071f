//! A block on a few new positions, as decoding asks for it: the operations of [`block::cached`](crate::backend::block::cached) on slices of one
//! buffer. Their results as tensors, each allocated, described and shared, take a twentieth of a small model's time.

use std::cell::RefCell;

use burn::backend::Flex;
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_flex::FlexTensor;

use super::super::{Buffer, attention, contiguous, rows, values};
use super::{ROWS, Stored, multiply_into, takes as takes_floats, takes_blocks};
use crate::backend::{AttentionSpec, BlockCache, BlockSpec, BlockWeights, LlamaBackend, Matrix};

type Weights = BlockWeights<Matrix<Flex>, FlexTensor>;

/// Whether [`block`] takes this one.
pub(in crate::backend::flex) fn takes(
    x: &FlexTensor,
    weights: &Weights,
    cache: &BlockCache<Flex>,
    spec: &BlockSpec<Flex>,
) -> bool {
    let [rows, _] = x.shape().dims();
    let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = weights;
    let in_f32 = [x, attention_norm, ffn_norm, &spec.cos, &spec.sin];
    let stored = |matrix: &Matrix<Flex>| match matrix {
        Matrix::Floats(weight) => takes_floats(x, weight),
        Matrix::Blocks(weight) => takes_blocks(x, weight),
    };
    rows <= ROWS
        && spec.team.is_alone()
        && in_f32.iter().all(|x| x.dtype() == DType::F32)
        && [&cache.keys, &cache.values].into_iter().all(attention::reads)
        && [wq, wk, wv, wo, w1, w2, w3].into_iter().all(stored)
}

/// The block's result, and the cache with the new positions.
pub(in crate::backend::flex) fn block(
    x: FlexTensor,
    weights: Weights,
    cache: BlockCache<Flex>,
    spec: &BlockSpec<Flex>,
) -> (FlexTensor, BlockCache<Flex>) {
    let &BlockSpec { batch, seq_len, head_dim, eps, compute, .. } = spec;
    let eps = eps as f32;
    let [x, cos, sin] = [x, spec.cos.clone(), spec.sin.clone()].map(contiguous);
    let shape = x.shape();
    let [count, d_model] = shape.dims();
    let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = weights.map_matrices(Matrix::whole);
    let [attention_norm, ffn_norm] = [attention_norm, ffn_norm].map(contiguous);
    let width = |matrix: &Matrix<Flex>| matrix.dims()[0];
    let (d_q, d_kv, d_ff) = (width(&wq), width(&wk), width(&w1));
    let BlockCache { keys, values: cached, len } = cache;
    let precision = compute.precision;

    // SAFETY: the products write both whole.
    let (mut q, mut h) = unsafe { (Buffer::unwritten(count * d_q), Buffer::unwritten(count * d_model)) };
    with_parts([d_model, d_kv, d_kv, d_ff, d_ff, d_ff, d_model].map(|width| count * width), |parts| {
        let [n, k, v, gate, up, product, back] = parts;
        rows::rms_norm_rows(n, &mut [0.0; ROWS], values(&x), values(&attention_norm), eps);
        multiply_into(&mut [&mut q, k, v], n, d_model, &[&wq, &wk, &wv].map(Stored::of), precision);
        let tables = [values(&cos), values(&sin)];
        rows::rotate_rows(&mut q, d_q, 0, tables, head_dim / 2, 1.0);
        rows::rotate_rows(k, d_kv, 0, tables, head_dim / 2, 1.0);
        let keys = rows::write_positions(keys, k, len);
        let cached = rows::write_positions(cached, v, len);
        let cache = BlockCache::<Flex> { keys, values: cached, len: len + seq_len };
        let q = q.into_tensor(Shape::new([batch, seq_len, d_q / head_dim, head_dim]));
        let spec = AttentionSpec::new(head_dim, precision);
        let out = Flex::cached_attention(q, cache.keys.clone(), cache.values.clone(), cache.len, spec);
        multiply_into(&mut [&mut h], values(&out), d_q, &[Stored::of(&wo)], precision);
        rows::add(&mut h, values(&x));

        rows::rms_norm_rows(n, &mut [0.0; ROWS], &h, values(&ffn_norm), eps);
        multiply_into(&mut [gate, up], n, d_model, &[&w1, &w3].map(Stored::of), precision);
        rows::swiglu_block(product, gate, up);
        multiply_into(&mut [back], product, d_ff, &[Stored::of(&w2)], precision);
        rows::add(&mut h, back);
        (h.into_tensor(shape), cache)
    })
}

/// Lends a thread's memory, in parts of these lengths.
fn with_parts<const N: usize, R>(lens: [usize; N], each: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    thread_local! {
        static PARTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let mut memory = PARTS.take();
    let len = lens.iter().sum();
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    let mut rest = &mut memory[..];
    let parts = lens.map(|len| rest.split_off_mut(..len).expect("there is room for all"));
    let result = each(parts);
    PARTS.set(memory);
    result
}

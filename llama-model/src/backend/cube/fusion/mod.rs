//! With fusion: each kernel as a custom operation, so that Burn joins what lies between.

use burn::tensor::ops::{FloatTensor, FloatTensorOps, IntTensor};
use burn::tensor::{DType, Shape, TensorMetadata};
use burn_fusion::{Fusion, FusionBackend};

use self::custom::{custom, custom_all, custom_list};
use super::super::{
    AdamWStep, AttentionSaved, AttentionSpec, Bits, BlockCache, BlockSpec, BlockWeights, LlamaBackend, LossSpec,
    Matrix, QuantizedWeight, block, reference,
};
use super::decode;
use crate::Precision;
use crate::shard::Team;

mod custom;

impl<B: FusionBackend + LlamaBackend> LlamaBackend for Fusion<B> {
    fn has_products(device: &Self::Device, precision: Precision) -> bool {
        B::has_products(device, precision)
    }

    fn operands(tensors: Vec<FloatTensor<Self>>, precision: Precision) -> Vec<FloatTensor<Self>> {
        let stored = |x: &FloatTensor<Self>| x.dtype() == precision.dtype();
        match tensors.first() {
            Some(x) if Self::has_products(&Self::float_device(x), precision) && !tensors.iter().all(stored) => {}
            _ => return tensors,
        }
        let outputs = tensors.iter().map(|x| (x.shape(), precision.dtype())).collect();
        custom_list::<B>("operands", tensors, vec![], outputs, move |tensors, _| B::operands(tensors, precision))
    }

    fn token_embedding_backward(
        grad: FloatTensor<Self>,
        tokens: IntTensor<Self>,
        vocab_size: usize,
        sum: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        let outputs = [(Shape::new([vocab_size, grad.shape()[1]]), grad.dtype())];
        let inputs = [grad].into_iter().chain(sum).collect();
        let run = move |inputs: Vec<_>, tokens| {
            let mut inputs = inputs.into_iter();
            let grad = inputs.next().expect("the operation was registered with a gradient");
            [B::token_embedding_backward(grad, expect(tokens), vocab_size, inputs.next())]
        };
        let [d_weight] = custom_all::<B, 1>("token_embedding_backward", inputs, Some(tokens), outputs, run);
        d_weight
    }

    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        let few = x.shape()[0] <= decode::MAX_ROWS;
        if !few && !Self::has_products(&Self::float_device(&x), precision) {
            return reference::project::<Self>(x, weight, precision);
        }
        let outputs = [(Shape::new([x.shape()[0], weight.shape()[0]]), x.dtype())];
        let [out] = custom::<B, 2, 1>("project", [x, weight], None, outputs, move |[x, weight], _| {
            [B::project(x, weight, precision)]
        });
        out
    }

    fn project_all(
        x: FloatTensor<Self>,
        weights: Vec<FloatTensor<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        let few = x.shape()[0] <= decode::MAX_ROWS;
        if !few && !Self::has_products(&Self::float_device(&x), precision) {
            return weights.into_iter().map(|weight| Self::project(x.clone(), weight, precision)).collect();
        }
        let outputs = weights.iter().map(|weight| (Shape::new([x.shape()[0], weight.shape()[0]]), x.dtype())).collect();
        let inputs = [x].into_iter().chain(weights).collect();
        custom_list::<B>("project_all", inputs, vec![], outputs, move |mut weights, _| {
            let x = weights.remove(0);
            B::project_all(x, weights, precision)
        })
    }

    fn project_quantized(
        x: FloatTensor<Self>,
        weights: Vec<QuantizedWeight<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        let row = |weight: &QuantizedWeight<Self>| (Shape::new([x.shape()[0], weight.dims()[0]]), x.dtype());
        let outputs = weights.iter().map(row).collect();
        let bits: Vec<Bits> = weights.iter().map(|weight| weight.bits).collect();
        let (words, scales): (Vec<_>, Vec<_>) = weights.into_iter().map(|weight| (weight.words, weight.scales)).unzip();
        let inputs = [x].into_iter().chain(scales).collect();
        custom_list::<B>("project_quantized", inputs, words, outputs, move |mut scales, words| {
            let x = scales.remove(0);
            let parts = bits.iter().zip(words).zip(scales);
            let weights = parts.map(|((&bits, words), scales)| QuantizedWeight { bits, words, scales }).collect();
            B::project_quantized(x, weights, precision)
        })
    }

    fn widen(weight: QuantizedWeight<Self>, dtype: DType) -> FloatTensor<Self> {
        let outputs = [(Shape::new(weight.dims()), dtype)];
        let QuantizedWeight { bits, words, scales } = weight;
        let run =
            move |[scales]: [_; 1], words| [B::widen(QuantizedWeight { bits, words: expect(words), scales }, dtype)];
        let [dense] = custom::<B, 1, 1>("widen", [scales], Some(words), outputs, run);
        dense
    }

    fn project_backward_input(
        pairs: Vec<(FloatTensor<Self>, FloatTensor<Self>)>,
        precision: Precision,
        dtype: DType,
    ) -> FloatTensor<Self> {
        if !pairs.iter().all(|(grad, _)| Self::has_products(&Self::float_device(grad), precision)) {
            return reference::project_backward_input::<Self>(pairs, precision, dtype);
        }
        // One operation for all of them, so that the products after the first are added where they are made.
        let (grad, weight) = pairs.first().expect("an input is read by a weight");
        let outputs = [(Shape::new([grad.shape()[0], weight.shape()[1]]), dtype)];
        let inputs = pairs.into_iter().flat_map(|(grad, weight)| [grad, weight]).collect();
        let [d_x] = custom_all::<B, 1>("project_backward_input", inputs, None, outputs, move |inputs, _| {
            let mut inputs = inputs.into_iter();
            let pairs = std::iter::from_fn(|| Some((inputs.next()?, inputs.next()?))).collect();
            [B::project_backward_input(pairs, precision, dtype)]
        });
        d_x
    }

    fn project_backward_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        if !Self::has_products(&Self::float_device(&x), precision) {
            return reference::project_backward_weight::<Self>(grad, x, precision);
        }
        let outputs = [(Shape::new([grad.shape()[1], x.shape()[1]]), DType::F32)];
        let [d_weight] = custom::<B, 2, 1>("project_backward_weight", [grad, x], None, outputs, move |[grad, x], _| {
            [B::project_backward_weight(grad, x, precision)]
        });
        d_weight
    }

    fn project_backward_weights(
        grads: Vec<FloatTensor<Self>>,
        x: FloatTensor<Self>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        if grads.is_empty() || !Self::has_products(&Self::float_device(&x), precision) {
            let gradient = |grad| Self::project_backward_weight(grad, x.clone(), precision);
            return grads.into_iter().map(gradient).collect();
        }
        let outputs = grads.iter().map(|grad| (Shape::new([grad.shape()[1], x.shape()[1]]), DType::F32)).collect();
        let inputs = [x].into_iter().chain(grads).collect();
        custom_list::<B>("project_backward_weights", inputs, vec![], outputs, move |mut grads, _| {
            let x = grads.remove(0);
            B::project_backward_weights(grads, x, precision)
        })
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let rows = x.shape()[0];
        let outputs = [like(&x), (Shape::new([rows, 1]), DType::F32)];
        let [out, inv_rms] = custom::<B, 2, 2>("rms_norm", [x, weight], None, outputs, move |[x, weight], _| {
            B::rms_norm(x, weight, eps).into()
        });
        (out, inv_rms)
    }

    fn rms_norm_operand(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let dtype = if Self::has_products(&Self::float_device(&x), precision) { precision.dtype() } else { x.dtype() };
        let outputs = [(x.shape(), dtype), (Shape::new([x.shape()[0], 1]), DType::F32)];
        let [out, inv_rms] =
            custom::<B, 2, 2>("rms_norm_operand", [x, weight], None, outputs, move |[x, weight], _| {
                B::rms_norm_operand(x, weight, eps, precision).into()
            });
        (out, inv_rms)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        inv_rms: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        residual: Option<FloatTensor<Self>>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let outputs = [like(&x), like(&weight)];
        let inputs = [x, weight, inv_rms, grad].into_iter().chain(residual).collect();
        let [d_x, d_weight] = custom_all::<B, 2>("rms_norm_backward", inputs, None, outputs, |inputs, _| {
            let mut inputs = inputs.into_iter();
            let mut next = || inputs.next().expect("the operation was registered with these");
            let (x, weight, inv_rms, grad) = (next(), next(), next(), next());
            B::rms_norm_backward(x, weight, inv_rms, grad, inputs.next()).into()
        });
        (d_x, d_weight)
    }

    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let outputs = [like(&x)];
        let [out] = custom::<B, 3, 1>("rotary", [x, cos, sin], None, outputs, move |[x, cos, sin], _| {
            [B::rotary(x, cos, sin, inverse)]
        });
        out
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        starts: Option<IntTensor<Self>>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [batch, q_len, heads, _] = q.shape().dims();
        let outputs = [like(&q), (Shape::new([batch, heads, q_len]), DType::F32)];
        let [out, lse] = custom::<B, 3, 2>("causal_attention", [q, k, v], starts, outputs, move |[q, k, v], starts| {
            B::causal_attention(q, k, v, starts, spec).into()
        });
        (out, lse)
    }

    fn cached_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        len: usize,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        let outputs = [like(&q)];
        let [out] =
            custom::<B, 3, 1>("cached_attention", [q, keys, values], None, outputs, move |[q, keys, values], _| {
                [B::cached_attention(q, keys, values, len, spec)]
            });
        out
    }

    fn causal_attention_backward(saved: AttentionSaved<Self>, grad: FloatTensor<Self>) -> [FloatTensor<Self>; 3] {
        let AttentionSaved { q, k, v, starts, out, lse, spec } = saved;
        let outputs = [like(&q), like(&k), like(&v)];
        let inputs = [q, k, v, out, lse, grad];
        let run = move |[q, k, v, out, lse, grad]: [_; 6], starts| {
            B::causal_attention_backward(AttentionSaved { q, k, v, starts, out, lse, spec }, grad)
        };
        custom::<B, 6, 3>("causal_attention_backward", inputs, starts, outputs, run)
    }

    fn token_losses(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        let outputs = [(Shape::new([hidden.shape()[0]]), hidden.dtype())];
        let [losses] = custom::<B, 2, 1>(
            "token_losses",
            [hidden, head],
            Some(targets),
            outputs,
            move |[hidden, head], targets| [B::token_losses(hidden, head, expect(targets), spec)],
        );
        losses
    }

    fn linear_cross_entropy_with_grads(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> [FloatTensor<Self>; 3] {
        let [rows, d_model] = head.shape().dims();
        let d_head = (Shape::new([if spec.head_grad { rows } else { 0 }, d_model]), head.dtype());
        let outputs = [(Shape::new([1]), DType::F32), like(&hidden), d_head];
        custom::<B, 2, 3>(
            "linear_cross_entropy",
            [hidden, head],
            Some(targets),
            outputs,
            move |[hidden, head], targets| B::linear_cross_entropy_with_grads(hidden, head, expect(targets), spec),
        )
    }

    fn cached_block(
        x: FloatTensor<Self>,
        weights: BlockWeights<Matrix<Self>, FloatTensor<Self>>,
        cache: BlockCache<Self>,
        spec: BlockSpec<Self>,
    ) -> (FloatTensor<Self>, BlockCache<Self>) {
        // Of many rows the parts are worth more than what is between them; members of a team sum between them.
        if x.shape()[0] > decode::MAX_ROWS || !spec.team.is_alone() {
            return block::cached(x, weights, cache, &spec);
        }
        let outputs = vec![like(&x), like(&cache.keys), like(&cache.values)];
        let BlockCache { keys, values, len } = cache;
        let BlockSpec { cos, sin, batch, seq_len, head_dim, eps, compute, .. } = spec;
        let BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 } = weights;
        let mut inputs = vec![x, keys, values, cos, sin, attention_norm, ffn_norm];
        let mut words = Vec::new();
        let stored = [wq, wk, wv, wo, w1, w2, w3].map(|matrix| match matrix {
            Matrix::Floats(weight) => {
                inputs.push(weight);
                None
            }
            Matrix::Blocks(weight) => {
                inputs.push(weight.scales);
                words.push(weight.words);
                Some(weight.bits)
            }
        });
        let results = custom_list::<B>("cached_block", inputs, words, outputs, move |inputs, words| {
            let (mut inputs, mut words) = (inputs.into_iter(), words.into_iter());
            let mut next = || inputs.next().expect("the operation was registered with these");
            let [x, keys, values, cos, sin, attention_norm, ffn_norm] = std::array::from_fn(|_| next());
            let [wq, wk, wv, wo, w1, w2, w3] = stored.map(|bits| match bits {
                None => Matrix::Floats(next()),
                Some(bits) => Matrix::Blocks(QuantizedWeight { bits, words: expect(words.next()), scales: next() }),
            });
            let weights = BlockWeights { attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3 };
            let team = Team::default();
            let spec = BlockSpec { cos, sin, starts: None, batch, seq_len, head_dim, eps, compute, team };
            let (out, BlockCache { keys, values, .. }) =
                B::cached_block(x, weights, BlockCache { keys, values, len }, spec);
            vec![out, keys, values]
        });
        let [out, keys, values] = results.try_into().unwrap_or_else(|_| unreachable!("three outputs are registered"));
        (out, BlockCache { keys, values, len: len + seq_len })
    }

    fn adamw(tensors: Vec<[FloatTensor<Self>; 4]>, step: &AdamWStep) -> Vec<[FloatTensor<Self>; 3]> {
        if tensors.is_empty() {
            return Vec::new();
        }
        let outputs = tensors.iter().flat_map(|[param, _, m, v]| [like(param), like(m), like(v)]).collect();
        let (inputs, step) = (tensors.into_iter().flatten().collect(), *step);
        let updated = custom_list::<B>("adamw", inputs, Vec::new(), outputs, move |inputs, _| {
            B::adamw(sets(inputs), &step).into_iter().flatten().collect()
        });
        sets(updated)
    }

    fn sums_of_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        let dtype = if tensors[0].dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let outputs = [(Shape::new([tensors.len()]), dtype)];
        let [sums] =
            custom_all::<B, 1>("sums_of_squares", tensors, None, outputs, |tensors, _| [B::sums_of_squares(tensors)]);
        sums
    }
}

/// Neighbours, so many at a time.
fn sets<T, const N: usize>(all: Vec<T>) -> Vec<[T; N]> {
    let mut all = all.into_iter();
    std::iter::from_fn(|| {
        let set: Vec<T> = all.by_ref().take(N).collect();
        set.try_into().ok()
    })
    .collect()
}

fn like<T: TensorMetadata>(x: &T) -> (Shape, DType) {
    (x.shape(), x.dtype())
}

fn expect<T>(ints: Option<T>) -> T {
    ints.expect("the operation was registered with integers")
}

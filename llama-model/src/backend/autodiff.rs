//! Each operation's backward, wired into Burn's autodiff once for all backends.

use std::marker::PhantomData;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorMetadata};

use super::adapted::{self, Adapted, AdaptedSaved, LowRank};
use super::block::{self, BlockSaved};
use super::ops::cast;
use super::{
    AdamWStep, AttentionSaved, AttentionSpec, BlockSpec, BlockWeights, LlamaBackend, LossSpec, Matrix, QuantizedWeight,
};
use crate::{GradientTaker, Precision};

impl<B: LlamaBackend, C: CheckpointStrategy> LlamaBackend for Autodiff<B, C> {
    fn token_embedding(weight: FloatTensor<Self>, tokens: IntTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct EmbeddingBackward;
        impl<B: LlamaBackend> Backward<B, 1> for EmbeddingBackward {
            type State = (IntTensor<B>, FloatTensor<Autodiff<B>>);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (tokens, weight) = ops.state;
                let sum = grads.remove::<B>(&weight);
                let d_weight = B::token_embedding_backward(grad, tokens, weight.primitive.shape()[0], sum);
                register::<B, 1>(grads, ops.parents.map(|p| p.map(|n| n.id)), [d_weight]);
            }
        }
        let out = B::token_embedding(weight.primitive.clone(), tokens.clone());
        match EmbeddingBackward.prepare::<C>([weight.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((tokens, weight), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct ProjectBackward;
        impl<B: LlamaBackend> Backward<B, 2> for ProjectBackward {
            type State = (FloatTensor<B>, FloatTensor<B>, Precision);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let [x_node, weight_node] = ops.parents;
                let (x, weight, precision) = ops.state;
                let dtype = x.dtype();
                if let Some(node) = weight_node {
                    grads.register::<B>(node.id, B::project_backward_weight(grad.clone(), x, precision));
                }
                if let Some(node) = x_node {
                    grads.register::<B>(node.id, B::project_backward_input(vec![(grad, weight)], precision, dtype));
                }
            }
        }
        let out = B::project(x.primitive.clone(), weight.primitive.clone(), precision);
        match ProjectBackward.prepare::<C>([x.node, weight.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.primitive, weight.primitive, precision), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    /// The weights are frozen.
    fn project_quantized(
        x: FloatTensor<Self>,
        weights: Vec<QuantizedWeight<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        let frozen = |weight| Adapted { weight: Matrix::Blocks(weight), adapter: None };
        Self::project_adapted(x, weights.into_iter().map(frozen).collect(), precision)
    }

    /// The weights are frozen.
    fn project_adapted(
        x: FloatTensor<Self>,
        layers: Vec<Adapted<Self>>,
        precision: Precision,
    ) -> Vec<FloatTensor<Self>> {
        #[derive(Debug)]
        struct AdaptedBackward;
        impl<B: LlamaBackend> Backward<B, 3> for AdaptedBackward {
            type State = (AdaptedSaved<B>, Precision);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (saved, precision) = ops.state;
                let wanted = ops.parents.each_ref().map(Option::is_some);
                for (node, gradient) in ops.parents.into_iter().zip(adapted::backward(saved, grad, wanted, precision)) {
                    if let (Some(node), Some(gradient)) = (node, gradient) {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        }
        // A weight without adapter has the input in place of one, from which it takes no gradient.
        let nodes_of = |layer: &Adapted<Self>| match &layer.adapter {
            Some(LowRank { down, up, .. }) => [&x, down, up].map(|x| x.node.clone()),
            None => [&x, &x, &x].map(|x| x.node.clone()),
        };
        let nodes: Vec<_> = layers.iter().map(nodes_of).collect();
        let layers = layers.into_iter().map(|Adapted { weight, adapter }| Adapted {
            weight: match weight {
                Matrix::Floats(weight) => Matrix::Floats(weight.primitive),
                Matrix::Blocks(weight) => Matrix::Blocks(inner(weight)),
            },
            adapter: adapter.map(|LowRank { down, up, scale }| LowRank {
                down: down.primitive,
                up: up.primitive,
                scale,
            }),
        });
        let results = adapted::forward_saving::<B>(x.primitive, layers.collect(), precision);
        let track = |((out, saved), nodes)| match AdaptedBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((saved, precision), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        results.into_iter().zip(nodes).map(track).collect()
    }

    /// A constant, as the weight is.
    fn widen(weight: QuantizedWeight<Self>, dtype: DType) -> FloatTensor<Self> {
        <Self as AutodiffBackend>::from_inner(B::widen(inner(weight), dtype))
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct RmsNormBackward;
        impl<B: LlamaBackend> Backward<B, 2> for RmsNormBackward {
            type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (x, weight, inv_rms) = ops.state;
                let (d_x, d_weight) = B::rms_norm_backward(x, weight, inv_rms, grad, None);
                register::<B, 2>(grads, ops.parents.map(|p| p.map(|n| n.id)), [d_x, d_weight]);
            }
        }
        let (out, inv_rms) = B::rms_norm(x.primitive.clone(), weight.primitive.clone(), eps);
        let constant = <Self as AutodiffBackend>::from_inner(inv_rms.clone());
        let out = match RmsNormBackward.prepare::<C>([x.node, weight.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.primitive, weight.primitive, inv_rms), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, constant)
    }

    /// The tables are constants: they take no gradient.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct RotaryBackward;
        impl<B: LlamaBackend> Backward<B, 1> for RotaryBackward {
            type State = (FloatTensor<B>, FloatTensor<B>, bool);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (cos, sin, inverse) = ops.state;
                register::<B, 1>(grads, ops.parents.map(|p| p.map(|n| n.id)), [B::rotary(grad, cos, sin, !inverse)]);
            }
        }
        let (cos, sin) = (cos.primitive, sin.primitive);
        match RotaryBackward.prepare::<C>([x.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out = B::rotary(x.primitive, cos.clone(), sin.clone(), inverse);
                prep.finish((cos, sin, inverse), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotary(x.primitive, cos, sin, inverse)),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        starts: Option<IntTensor<Self>>,
        spec: AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct AttentionBackward;
        impl<B: LlamaBackend> Backward<B, 3> for AttentionBackward {
            type State = AttentionSaved<B>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                register::<B, 3>(
                    grads,
                    ops.parents.map(|p| p.map(|n| n.id)),
                    B::causal_attention_backward(ops.state, grad),
                );
            }
        }
        let inputs = [&q, &k, &v].map(|x| x.primitive.clone());
        let [q_inner, k_inner, v_inner] = inputs;
        let (out, lse) = B::causal_attention(q_inner, k_inner, v_inner, starts.clone(), spec);
        let constant = <Self as AutodiffBackend>::from_inner(lse.clone());
        let out = match AttentionBackward.prepare::<C>([q.node, k.node, v.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (q, k, v) = (q.primitive, k.primitive, v.primitive);
                prep.finish(AttentionSaved { q, k, v, starts, out: out.clone(), lse, spec }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, constant)
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct SwigluBackward;
        impl<B: LlamaBackend> Backward<B, 2> for SwigluBackward {
            type State = (FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (gate, up) = ops.state;
                let (d_gate, d_up) = B::swiglu_backward(gate, up, grad);
                register::<B, 2>(grads, ops.parents.map(|p| p.map(|n| n.id)), [d_gate, d_up]);
            }
        }
        let out = B::swiglu(gate.primitive.clone(), up.primitive.clone());
        match SwigluBackward.prepare::<C>([gate.node, up.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate.primitive, up.primitive), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    /// Has no backward, so it refuses inputs that would silently lose theirs.
    fn token_losses(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        assert!(
            !hidden.is_tracked() && !head.is_tracked(),
            "token_losses has no backward: use linear_cross_entropy to train, or a model without autodiff (`model.valid()`)"
        );
        <Self as AutodiffBackend>::from_inner(B::token_losses(hidden.primitive, head.primitive, targets, spec))
    }

    /// One that is trained has its gradient in the dtype of the hidden states.
    fn loss_head(head: FloatTensor<Self>, dtype: DType) -> FloatTensor<Self> {
        match head.is_tracked() {
            true => cast::<Self>(head, dtype),
            false => <Self as AutodiffBackend>::from_inner(B::loss_head(head.primitive, dtype)),
        }
    }

    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        spec: LossSpec,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct CrossEntropyBackward;
        impl<B: LlamaBackend> Backward<B, 2> for CrossEntropyBackward {
            type State = [FloatTensor<B>; 2];

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                // The gradients were made with the forward, for a loss gradient of 1.
                let scaled = ops.state.map(|d| B::scale(d, grad.clone()));
                register::<B, 2>(grads, ops.parents.map(|p| p.map(|n| n.id)), scaled);
            }
        }
        let spec = LossSpec { head_grad: spec.head_grad && head.is_tracked(), ..spec };
        match CrossEntropyBackward.prepare::<C>([hidden.node, head.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let [loss, d_hidden, d_head] =
                    B::linear_cross_entropy_with_grads(hidden.primitive, head.primitive, targets, spec);
                prep.finish([d_hidden, d_head], loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::linear_cross_entropy(hidden.primitive, head.primitive, targets, spec))
            }
        }
    }

    /// The tables are constants: they take no gradient.
    fn block(
        x: FloatTensor<Self>,
        weights: BlockWeights<FloatTensor<Self>>,
        spec: BlockSpec<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct BlockBackward;
        impl<B: LlamaBackend> Backward<B, 10> for BlockBackward {
            type State = (BlockSaved<B>, BlockWeights<FloatTensor<B>>, BlockSpec<B>);

            fn backward(self, ops: Ops<Self::State, 10>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let [x, weight_nodes @ ..] = ops.parents;
                let (saved, weights, spec) = ops.state;
                let wanted = BlockWeights::from(weight_nodes.each_ref().map(Option::is_some));
                let (d_x, d_weights) = block::backward(saved, &weights, &spec, &wanted, grad);
                for (node, gradient) in weight_nodes.into_iter().zip(d_weights.into_array()) {
                    if let (Some(node), Some(gradient)) = (node, gradient) {
                        grads.register::<B>(node.id, gradient);
                    }
                }
                if let Some(node) = x {
                    grads.register::<B>(node.id, d_x);
                }
            }
        }
        let BlockSpec { cos, sin, starts, batch, seq_len, head_dim, eps, compute, team } = spec;
        let (cos, sin) = (cos.primitive, sin.primitive);
        let spec = BlockSpec { cos, sin, starts, batch, seq_len, head_dim, eps, compute, team };
        let [w0, w1, w2, w3, w4, w5, w6, w7, w8] = weights.clone().map(|weight| weight.node).into_array();
        let weights = weights.map(|weight| weight.primitive);
        let nodes = [x.node, w0, w1, w2, w3, w4, w5, w6, w7, w8];
        match BlockBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (out, saved) = block::forward_saving(x.primitive, &weights, &spec);
                prep.finish((saved, weights, spec), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::block(x.primitive, weights, spec)),
        }
    }

    /// The backward comes to this after what reads the weight, and to what made `x` after both.
    fn take_gradient(
        weight: FloatTensor<Self>,
        x: Option<&FloatTensor<Self>>,
        taker: GradientTaker<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Take<C>(PhantomData<C>);
        impl<B: LlamaBackend, C: CheckpointStrategy> Backward<B, 2> for Take<C> {
            type State = GradientTaker<Autodiff<B, C>>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                ops.state.take(<Autodiff<B, C> as AutodiffBackend>::from_inner(grad));
            }
        }
        let after = x.unwrap_or(&weight).node.clone();
        match Take(PhantomData).prepare::<C>([weight.node, after]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(taker, weight.primitive),
            OpsKind::UnTracked(prep) => prep.finish(weight.primitive),
        }
    }

    /// An update is not differentiated: it runs on the inner backend.
    fn adamw(tensors: Vec<[FloatTensor<Self>; 4]>, step: &AdamWStep) -> Vec<[FloatTensor<Self>; 3]> {
        let tensors = tensors.into_iter().map(|tensors| tensors.map(|x| x.primitive)).collect();
        let updated = B::adamw(tensors, step).into_iter();
        updated.map(|tensors| tensors.map(<Self as AutodiffBackend>::from_inner)).collect()
    }
}

fn inner<B: LlamaBackend, C: CheckpointStrategy>(weight: QuantizedWeight<Autodiff<B, C>>) -> QuantizedWeight<B> {
    let QuantizedWeight { bits, words, scales } = weight;
    QuantizedWeight { bits, words, scales: scales.primitive }
}

/// Adds each gradient to its parent, where the parent asks for one.
fn register<B: LlamaBackend, const N: usize>(
    grads: &mut Gradients,
    parents: [Option<NodeId>; N],
    values: [FloatTensor<B>; N],
) {
    for (parent, value) in parents.into_iter().zip(values) {
        if let Some(id) = parent {
            grads.register::<B>(id, value);
        }
    }
}

//! Each operation's backward, wired into Burn's autodiff once for all backends.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::TensorMetadata;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::{FloatTensor, IntTensor};

use super::{AdamWStep, AttentionSaved, LlamaBackend};

impl<B: LlamaBackend, C: CheckpointStrategy> LlamaBackend for Autodiff<B, C> {
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct ProjectBackward;
        impl<B: LlamaBackend> Backward<B, 2> for ProjectBackward {
            type State = (FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let [x_node, weight_node] = ops.parents;
                let (x, weight) = ops.state;
                if let Some(node) = weight_node {
                    grads.register::<B>(node.id, B::project_backward_weight(grad.clone(), x));
                }
                if let Some(node) = x_node {
                    grads.register::<B>(node.id, B::project_backward_input(grad, weight));
                }
            }
        }
        let out = B::project(x.primitive.clone(), weight.primitive.clone());
        match ProjectBackward.prepare::<C>([x.node, weight.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.primitive, weight.primitive), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn project_backward_input(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        super::reference::project_backward_input::<Self>(grad, weight)
    }

    fn project_backward_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        super::reference::project_backward_weight::<Self>(grad, x)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct RmsNormBackward;
        impl<B: LlamaBackend> Backward<B, 2> for RmsNormBackward {
            type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                let (x, weight, inv_rms) = ops.state;
                let (d_x, d_weight) = B::rms_norm_backward(x, weight, inv_rms, grad);
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
        scale: f64,
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
        let (out, lse) = B::causal_attention(q.primitive.clone(), k.primitive.clone(), v.primitive.clone(), scale);
        let constant = <Self as AutodiffBackend>::from_inner(lse.clone());
        let out = match AttentionBackward.prepare::<C>([q.node, k.node, v.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (q, k, v) = (q.primitive, k.primitive, v.primitive);
                prep.finish(AttentionSaved { q, k, v, out: out.clone(), lse, scale }, out)
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
    fn token_losses(hidden: FloatTensor<Self>, head: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        assert!(
            !hidden.is_tracked() && !head.is_tracked(),
            "token_losses has no backward: use linear_cross_entropy to train, or a model without autodiff (`model.valid()`)"
        );
        <Self as AutodiffBackend>::from_inner(B::token_losses(hidden.primitive, head.primitive, targets))
    }

    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct CrossEntropyBackward;
        impl<B: LlamaBackend> Backward<B, 2> for CrossEntropyBackward {
            type State = [FloatTensor<B>; 2];

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let grad = grads.consume::<B>(&ops.node);
                // The gradients were made with the forward, for a loss gradient of 1.
                let scaled = ops.state.map(|d| {
                    let scale = B::float_cast(B::float_reshape(grad.clone(), [1, 1].into()), d.dtype().into());
                    B::float_mul(d, scale)
                });
                register::<B, 2>(grads, ops.parents.map(|p| p.map(|n| n.id)), scaled);
            }
        }
        match CrossEntropyBackward.prepare::<C>([hidden.node, head.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let [loss, d_hidden, d_head] =
                    B::linear_cross_entropy_with_grads(hidden.primitive, head.primitive, targets);
                prep.finish([d_hidden, d_head], loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::linear_cross_entropy(hidden.primitive, head.primitive, targets)),
        }
    }

    /// An update is not differentiated: it runs on the inner backend.
    fn adamw(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: &AdamWStep,
    ) -> [FloatTensor<Self>; 3] {
        B::adamw(param.primitive, grad.primitive, m.primitive, v.primitive, step)
            .map(<Self as AutodiffBackend>::from_inner)
    }
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

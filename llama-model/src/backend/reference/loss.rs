//! Cross entropy of a linear head, whose logits exist a chunk of rows at a time.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Int, Tensor};

use super::super::ops::{primitive, tensor};
use super::super::{IGNORE_TARGET, LossSpec};
use super::{product, project, project_backward_weight, wide};

/// Rows of logits that exist at once in the chunked cross entropy.
pub const CROSS_ENTROPY_CHUNK: usize = 512;

/// [`LlamaBackend::log_sum_exp`](crate::LlamaBackend::log_sum_exp).
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
pub(in crate::backend) fn chunks<B: Backend>(
    hidden: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
) -> impl Iterator<Item = (Tensor<B, 2>, Tensor<B, 1, Int>)> {
    let rows = hidden.dims()[0];
    (0..rows).step_by(CROSS_ENTROPY_CHUNK).map(move |start| {
        let len = CROSS_ENTROPY_CHUNK.min(rows - start);
        (hidden.clone().narrow(0, start, len), targets.clone().narrow(0, start, len))
    })
}

/// [`LlamaBackend::token_losses`](crate::LlamaBackend::token_losses).
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

/// [`LlamaBackend::linear_cross_entropy_with_grads`](crate::LlamaBackend::linear_cross_entropy_with_grads).
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
pub(in crate::backend) fn chunked_cross_entropy<B: Backend>(
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

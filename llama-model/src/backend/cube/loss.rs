//! The loss where [`product`] multiplies: logits in the precision of products, for many rows at a time.

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Tensor, TensorMetadata};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::super::LossSpec;
use super::super::ops::{cast, primitive, tensor};
use super::product::{add_product, product};
use super::{rows, sums};

/// Rows of logits that exist at once: enough for products to fill the device, and for the head's gradient to be added to seldom.
const CHUNK: usize = 4096;

/// [`LlamaBackend::linear_cross_entropy_with_grads`](crate::LlamaBackend::linear_cross_entropy_with_grads).
pub(super) fn linear_cross_entropy_with_grads<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    hidden: FloatTensor<CubeBackend<R, F, I, BT>>,
    head: FloatTensor<CubeBackend<R, F, I, BT>>,
    targets: IntTensor<CubeBackend<R, F, I, BT>>,
    spec: LossSpec,
) -> [FloatTensor<CubeBackend<R, F, I, BT>>; 3] {
    type Matrix<R, F, I, BT> = Tensor<CubeBackend<R, F, I, BT>, 2>;
    let (dtype, head_dtype, device) = (hidden.dtype(), head.dtype(), head.device.clone());
    let operand = spec.precision.dtype();
    let [hidden, head] = [hidden, head].map(|x| cast::<CubeBackend<R, F, I, BT>>(x, operand));
    let hidden: Matrix<R, F, I, BT> = tensor(hidden);
    let targets = Tensor::<CubeBackend<R, F, I, BT>, 1, Int>::from_primitive(targets);
    let rows = hidden.dims()[0];
    let mut loss = Tensor::<CubeBackend<R, F, I, BT>, 1>::zeros([1], (&device, DType::F32));
    let mut d_hidden = Vec::new();
    let mut d_head = None;
    for start in (0..rows).step_by(CHUNK) {
        let len = CHUNK.min(rows - start);
        let hidden = primitive(hidden.clone().narrow(0, start, len));
        let targets = targets.clone().narrow(0, start, len).into_primitive();
        let logits = product((hidden.clone(), false), (head.clone(), true), spec.precision, operand);
        let (losses, d_logits) = rows::cross_entropy(logits, targets, spec.z_loss, true);
        loss = loss + tensor::<CubeBackend<R, F, I, BT>, 1>(sums::total(losses));
        d_hidden.push(tensor(product((d_logits.clone(), false), (head.clone(), false), spec.precision, dtype)));
        if spec.head_grad {
            d_head = Some(add_product(d_head, (d_logits, true), (hidden, false), spec.precision));
        }
    }
    let d_head = match d_head {
        Some(sum) => tensor::<CubeBackend<R, F, I, BT>, 2>(sum).cast(head_dtype),
        None => {
            Tensor::zeros([if spec.head_grad { head.shape()[0] } else { 0 }, head.shape()[1]], (&device, head_dtype))
        }
    };
    [primitive(loss), primitive(Matrix::<R, F, I, BT>::cat(d_hidden, 0)), primitive(d_head)]
}

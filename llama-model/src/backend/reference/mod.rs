//! The specification: every operation of [`LlamaBackend`] in plain Burn operations, forward and
//! backward. Faster bodies are tested against these; their backwards against finite differences in f64.

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{DType, Tensor, TensorMetadata, activation};

use super::ops::{cast, primitive, tensor};
use super::{AdamWStep, LlamaBackend, QuantizedWeight};
use crate::Precision;

mod attention;
pub(super) mod loss;

pub use attention::{cache_write, cached_attention, causal_attention, causal_attention_backward};
pub use loss::{CROSS_ENTROPY_CHUNK, linear_cross_entropy_with_grads, log_sum_exp, token_losses};

/// [`LlamaBackend::project`].
pub fn project<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, precision: Precision) -> FloatTensor<B> {
    let weight = if weight.dtype() == x.dtype() { weight } else { B::float_cast(weight, x.dtype().into()) };
    product::<B>(x, B::float_transpose(weight), precision)
}

/// A matrix product with both operands in the precision, the result in the dtype of the first.
fn product<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>, precision: Precision) -> FloatTensor<B> {
    match precision {
        Precision::F32 => B::float_matmul(a, b),
        Precision::Bf16 | Precision::F16 => {
            let dtype = a.dtype();
            let [a, b] = [a, b].map(|x| B::float_cast(x, precision.dtype().into()));
            B::float_cast(B::float_matmul(a, b), dtype.into())
        }
    }
}

/// [`LlamaBackend::project_quantized`].
pub fn project_quantized<B: LlamaBackend>(
    x: FloatTensor<B>,
    weights: Vec<QuantizedWeight<B>>,
    precision: Precision,
) -> Vec<FloatTensor<B>> {
    // What products take as it is, they need not round.
    let dtype = if B::has_products(&B::float_device(&x), precision) { precision.dtype() } else { x.dtype() };
    let weights = weights.into_iter().map(|weight| B::widen(weight, dtype)).collect();
    B::project_all(x, weights, precision)
}

/// [`LlamaBackend::project_quantized_backward`].
pub fn project_quantized_backward<B: LlamaBackend>(
    grad: FloatTensor<B>,
    weight: QuantizedWeight<B>,
    precision: Precision,
    dtype: DType,
) -> FloatTensor<B> {
    B::project_backward_input(vec![(grad, B::widen(weight, dtype))], precision, dtype)
}

/// [`LlamaBackend::add_projection`].
pub fn add_projection<B: LlamaBackend>(
    sum: FloatTensor<B>,
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    precision: Precision,
) -> FloatTensor<B> {
    B::float_add(sum, B::project(x, weight, precision))
}

/// [`LlamaBackend::project_backward_input`].
///
/// # Panics
/// Without pairs.
pub fn project_backward_input<B: Backend>(
    pairs: Vec<(FloatTensor<B>, FloatTensor<B>)>,
    precision: Precision,
    dtype: DType,
) -> FloatTensor<B> {
    let products = pairs.into_iter().map(|(grad, weight)| {
        // A frozen weight may be stored in fewer bytes.
        let weight = if weight.dtype() == grad.dtype() { weight } else { B::float_cast(weight, grad.dtype().into()) };
        product::<B>(grad, weight, precision)
    });
    cast::<B>(products.reduce(B::float_add).expect("an input is read by a weight"), dtype)
}

/// [`LlamaBackend::project_backward_weight`].
pub fn project_backward_weight<B: Backend>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    precision: Precision,
) -> FloatTensor<B> {
    product::<B>(B::float_transpose(grad), x, precision)
}

fn matmul<B: Backend>(a: Tensor<B, 4>, b: Tensor<B, 4>, precision: Precision) -> Tensor<B, 4> {
    tensor(product::<B>(primitive(a), primitive(b), precision))
}

/// [`LlamaBackend::token_embedding_backward`].
pub fn token_embedding_backward<B: Backend>(
    grad: FloatTensor<B>,
    tokens: IntTensor<B>,
    vocab_size: usize,
    sum: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let grad = tensor::<B, 2>(grad);
    let zeros = || Tensor::<B, 2>::zeros([vocab_size, grad.dims()[1]], (&grad.device(), grad.dtype()));
    let sum = sum.unwrap_or_else(|| primitive(zeros()));
    B::float_select_add(sum, 0, tokens, primitive(grad))
}

/// [`LlamaBackend::scale`].
pub fn scale<B: Backend>(x: FloatTensor<B>, factor: FloatTensor<B>) -> FloatTensor<B> {
    let ones = vec![1; x.shape().num_dims()];
    let factor = B::float_cast(B::float_reshape(factor, ones.into()), x.dtype().into());
    B::float_mul(x, factor)
}

/// The dtype statistics are computed in: f64 stays, everything else is f32.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn widened<B: Backend>(x: FloatTensor<B>) -> Tensor<B, 2> {
    let dtype = wide(x.dtype());
    tensor(cast::<B>(x, dtype))
}

/// [`LlamaBackend::rms_norm`].
pub fn rms_norm<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, eps: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, weight) = (tensor::<B, 2>(x), tensor::<B, 1>(weight));
    let dtype = x.dtype();
    let x = x.cast(wide(dtype));
    let inv_rms = x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip();
    let normed = (x * inv_rms.clone()).cast(dtype);
    (primitive(normed * weight.unsqueeze()), primitive(inv_rms))
}

/// [`LlamaBackend::rms_norm_backward`].
///
/// With `x̂ = x / rms` and `g = grad · weight`: `dx = (g - x̂ · mean(g · x̂)) / rms`, `dweight = Σ grad · x̂`.
pub fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    inv_rms: FloatTensor<B>,
    grad: FloatTensor<B>,
    residual: Option<FloatTensor<B>>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, weight) = (tensor::<B, 2>(x), tensor::<B, 1>(weight));
    let (inv_rms, grad) = (tensor::<B, 2>(inv_rms), tensor::<B, 2>(grad));
    let dtype = x.dtype();
    let normed = x.cast(wide(dtype)) * inv_rms.clone();
    let grad = grad.cast(wide(dtype));
    let d_weight = (grad.clone() * normed.clone()).sum_dim(0).squeeze_dim::<1>(0);
    let g = grad * weight.cast(wide(dtype)).unsqueeze();
    let mean = (g.clone() * normed.clone()).mean_dim(1);
    let d_x = ((g - normed * mean) * inv_rms).cast(dtype);
    let d_x = residual.map_or(d_x.clone(), |residual| d_x + tensor(residual));
    (primitive(d_x), primitive(d_weight.cast(dtype)))
}

/// [`LlamaBackend::rotary`].
pub fn rotary<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    inverse: bool,
) -> FloatTensor<B> {
    let x = tensor::<B, 4>(x);
    let [_, seq_len, _, head_dim] = x.dims();
    let dtype = x.dtype();
    let table = |t| tensor::<B, 2>(t).cast(dtype).reshape([1, seq_len, 1, head_dim / 2]);
    let (cos, sin) = (table(cos), table(sin));
    let sin = if inverse { sin.neg() } else { sin };
    let first = x.clone().narrow(3, 0, head_dim / 2);
    let second = x.narrow(3, head_dim / 2, head_dim / 2);
    primitive(Tensor::cat(
        vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin],
        3,
    ))
}

/// [`LlamaBackend::add_residual`].
pub fn add_residual<B: Backend>(x: FloatTensor<B>, residual: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(cast::<B>(x, residual.dtype()), residual)
}

/// [`LlamaBackend::swiglu`].
pub fn swiglu<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = gate.dtype();
    let [gate, up] = [gate, up].map(widened::<B>);
    cast::<B>(primitive(activation::silu(gate) * up), dtype)
}

/// [`LlamaBackend::swiglu_backward`].
///
/// With `σ = sigmoid(gate)`: `dgate = grad · up · σ · (1 + gate · (1 - σ))`, `dup = grad · gate · σ`.
pub fn swiglu_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = gate.dtype();
    let [gate, up, grad] = [gate, up, grad].map(widened::<B>);
    let sigmoid = activation::sigmoid(gate.clone());
    let silu = gate.clone() * sigmoid.clone();
    let d_up = grad.clone() * silu.clone();
    let d_gate = grad * up * (sigmoid.clone() + silu * (sigmoid.neg().add_scalar(1.0)));
    (cast::<B>(primitive(d_gate), dtype), cast::<B>(primitive(d_up), dtype))
}

/// [`LlamaBackend::adamw`] of one parameter.
pub fn adamw<B: Backend>([param, grad, m, v]: [FloatTensor<B>; 4], step: &AdamWStep) -> [FloatTensor<B>; 3] {
    let shapes = [param.shape(), m.shape(), v.shape()];
    let flat = |x: FloatTensor<B>| {
        let len = x.shape().num_elements();
        tensor::<B, 1>(B::float_reshape(x, [len].into()))
    };
    let (param, m, v) = (flat(param), flat(m), flat(v));
    let grad = flat(grad).mul_scalar(step.grad_scale);
    let (correction_1, correction_2) = step.bias_corrections();
    let m = m.mul_scalar(step.beta_1) + grad.clone().mul_scalar(1.0 - step.beta_1);
    let v = v.mul_scalar(step.beta_2) + grad.square().mul_scalar(1.0 - step.beta_2);
    let root = v.clone().div_scalar(correction_2).sqrt().add_scalar(step.epsilon);
    let param =
        param.mul_scalar(1.0 - step.lr * step.weight_decay) - m.clone().div(root).mul_scalar(step.lr / correction_1);
    let [param_shape, m_shape, v_shape] = shapes;
    [(param, param_shape), (m, m_shape), (v, v_shape)].map(|(x, shape)| B::float_reshape(primitive(x), shape))
}

/// [`LlamaBackend::sums_of_squares`].
pub fn sums_of_squares<B: Backend>(tensors: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    B::float_cat(tensors.into_iter().map(|x| B::float_sum(B::float_mul(x.clone(), x))).collect(), 0)
}

//! CPU kernels for Burn's Flex backend, in f32, and in bf16 for what lies between products: SIMD chosen at run time, threads
//! over rows or heads, products by kernels of our own. Other dtypes take the default bodies.
//!
//! Every result depends on shapes alone, never on the order in which threads finish, so that a run can be repeated bit
//! for bit.

mod attention;
mod buffer;
mod cross_entropy;
mod decode;
mod product;
mod rows;
mod simd;
mod stored;
mod team;
mod vector;

use burn::backend::Flex;
use burn::tensor::ops::{FloatTensorOps, IntTensor};
use burn::tensor::{DType, Element, FloatDType, TensorData};
use burn_flex::{FlexDevice, FlexTensor, Layout};
use bytemuck::Pod;
use half::bf16;

use self::buffer::{Buffer, Output};
use self::vector::Number;
use super::{
    AdamWStep, AttentionSaved, AttentionSpec, BlockCache, BlockSpec, BlockWeights, LlamaBackend, LossSpec, Matrix,
    QuantizedWeight, block, reference,
};
use crate::Precision;

impl LlamaBackend for Flex {
    fn token_embedding_backward(
        grad: FlexTensor,
        tokens: FlexTensor,
        vocab_size: usize,
        sum: Option<FlexTensor>,
    ) -> FlexTensor {
        if !is_f32(&[&grad]) || !sum.iter().all(|sum| is_f32(&[sum])) {
            return reference::token_embedding_backward::<Flex>(grad, tokens, vocab_size, sum);
        }
        rows::token_embedding_backward(grad, tokens, vocab_size, sum)
    }

    /// Of bf16, whatever vectors the CPU has, so that the numbers are of the same kind on all.
    fn has_products(_device: &FlexDevice, precision: Precision) -> bool {
        precision == Precision::Bf16
    }

    fn operand(x: FlexTensor, precision: Precision) -> FlexTensor {
        match (precision, x.dtype()) {
            (Precision::Bf16, DType::F32) => rows::rounded(x, DType::BF16),
            _ => x,
        }
    }

    /// Products pack weights from f32 in no more time than rounding them takes.
    fn operands(tensors: Vec<FlexTensor>, _: Precision) -> Vec<FlexTensor> {
        tensors
    }

    fn project(x: FlexTensor, weight: FlexTensor, precision: Precision) -> FlexTensor {
        if decode::takes(&x, &weight) {
            return only(decode::project(x, vec![weight], precision));
        }
        match (x.dtype(), weight.dtype()) {
            (DType::F32, DType::F32) => product::product::<f32>(&x, false, &weight, true, precision),
            (DType::BF16, DType::F32 | DType::BF16) => product::product::<bf16>(&x, false, &weight, true, precision),
            (DType::BF16, DType::F16) => rows::rounded(Self::project(wide(x), weight, precision), DType::BF16),
            _ => reference::project::<Flex>(x, weight, precision),
        }
    }

    fn project_all(x: FlexTensor, weights: Vec<FlexTensor>, precision: Precision) -> Vec<FlexTensor> {
        if weights.iter().all(|weight| decode::takes(&x, weight)) {
            return decode::project(x, weights, precision);
        }
        weights.into_iter().map(|weight| Self::project(x.clone(), weight, precision)).collect()
    }

    fn add_projection(sum: FlexTensor, x: FlexTensor, weight: FlexTensor, precision: Precision) -> FlexTensor {
        if !is_f32(&[&sum]) || ![&x, &weight].into_iter().all(is_operand) {
            return reference::add_projection::<Flex>(sum, x, weight, precision);
        }
        product::add_product(sum, &x, &weight, precision)
    }

    fn project_quantized(x: FlexTensor, weights: Vec<QuantizedWeight<Flex>>, precision: Precision) -> Vec<FlexTensor> {
        if x.dtype() == DType::BF16 {
            let products = Self::project_quantized(wide(x), weights, precision);
            return products.into_iter().map(|product| rows::rounded(product, DType::BF16)).collect();
        }
        if weights.iter().all(|weight| decode::takes_blocks(&x, weight)) {
            return decode::project_blocks(x, weights, precision);
        }
        Self::project_all(x, weights.into_iter().map(QuantizedWeight::dense).collect(), precision)
    }

    fn widen(weight: QuantizedWeight<Flex>, dtype: DType) -> FlexTensor {
        let dense = if stored::reads(&weight) { stored::widened(Matrix::Blocks(weight)) } else { weight.dense() };
        if dtype == DType::F32 { dense } else { Self::float_cast(dense, dtype.into()) }
    }

    fn project_backward_input(pairs: Vec<(FlexTensor, FlexTensor)>, precision: Precision, dtype: DType) -> FlexTensor {
        if !pairs.iter().all(|(grad, _)| is_operand(grad)) || !matches!(dtype, DType::F32 | DType::BF16) {
            return reference::project_backward_input::<Flex>(pairs, precision, dtype);
        }
        let of_operands = |(grad, weight): &(FlexTensor, FlexTensor)| {
            matches!((grad.dtype(), weight.dtype()), (_, DType::F32) | (DType::BF16, DType::BF16))
        };
        if pairs.iter().all(of_operands) {
            return match &pairs[..] {
                [(grad, weight)] if dtype == DType::BF16 => {
                    product::product::<bf16>(grad, false, weight, false, precision)
                }
                _ => rows::rounded(product::sum_of_products(&pairs, precision), dtype),
            };
        }
        // A frozen weight may be stored in fewer bytes than the gradient.
        let stored = |(grad, weight): (FlexTensor, FlexTensor)| match weight.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => (wide(grad), Matrix::Floats(weight)),
            _ => (wide(grad), Matrix::Floats(Self::float_cast(weight, FloatDType::F32))),
        };
        rows::rounded(decode::input_gradients(pairs.into_iter().map(stored).collect(), precision), dtype)
    }

    fn project_quantized_backward(
        grad: FlexTensor,
        weight: QuantizedWeight<Flex>,
        precision: Precision,
        dtype: DType,
    ) -> FlexTensor {
        if grad.dtype() == DType::BF16 {
            return Self::project_quantized_backward(wide(grad), weight, precision, dtype);
        }
        if decode::takes_blocks(&grad, &weight) && matches!(dtype, DType::F32 | DType::BF16) {
            return rows::rounded(decode::input_gradients(vec![(grad, Matrix::Blocks(weight))], precision), dtype);
        }
        reference::project_quantized_backward::<Flex>(grad, weight, precision, dtype)
    }

    fn project_backward_weight(grad: FlexTensor, x: FlexTensor, precision: Precision) -> FlexTensor {
        if ![&grad, &x].into_iter().all(is_operand) {
            return reference::project_backward_weight::<Flex>(grad, x, precision);
        }
        product::product::<f32>(&grad, true, &x, false, precision)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> (FlexTensor, FlexTensor) {
        if !is_f32(&[&x, &weight]) {
            return reference::rms_norm::<Flex>(x, weight, eps);
        }
        rows::rms_norm::<f32>(x, weight, eps as f32)
    }

    fn rms_norm_operand(x: FlexTensor, weight: FlexTensor, eps: f64, precision: Precision) -> (FlexTensor, FlexTensor) {
        match precision {
            Precision::Bf16 if is_f32(&[&x, &weight]) => rows::rms_norm::<bf16>(x, weight, eps as f32),
            _ => Self::rms_norm(x, weight, eps),
        }
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        inv_rms: FlexTensor,
        grad: FlexTensor,
        residual: Option<FlexTensor>,
    ) -> (FlexTensor, FlexTensor) {
        if !is_f32(&[&x, &weight, &grad]) {
            return reference::rms_norm_backward::<Flex>(x, weight, inv_rms, grad, residual);
        }
        rows::rms_norm_backward(x, weight, inv_rms, grad, residual)
    }

    fn rotary(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, inverse: bool) -> FlexTensor {
        match x.dtype() {
            DType::F32 if is_f32(&[&cos, &sin]) => rows::rotary::<f32>(x, cos, sin, inverse),
            DType::BF16 if is_f32(&[&cos, &sin]) => rows::rotary::<bf16>(x, cos, sin, inverse),
            _ => reference::rotary::<Flex>(x, cos, sin, inverse),
        }
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        starts: Option<IntTensor<Flex>>,
        spec: AttentionSpec,
    ) -> (FlexTensor, FlexTensor) {
        if !is_f32(&[&q, &k, &v]) && !is_bf16(&[&q, &k, &v]) {
            return reference::causal_attention::<Flex>(q, k, v, starts, spec);
        }
        attention::forward(q, k, v, starts, spec)
    }

    fn cache_write(cache: FlexTensor, new: FlexTensor, start: usize) -> FlexTensor {
        if !is_f32(&[&new]) || !attention::reads(&cache) {
            return reference::cache_write::<Flex>(cache, new, start);
        }
        rows::cache_write(cache, new, start)
    }

    fn cached_attention(
        q: FlexTensor,
        keys: FlexTensor,
        values: FlexTensor,
        len: usize,
        spec: AttentionSpec,
    ) -> FlexTensor {
        if !is_f32(&[&q]) || ![&keys, &values].into_iter().all(attention::reads) {
            return reference::cached_attention::<Flex>(q, keys, values, len, spec);
        }
        attention::cached(q, keys, values, len, spec)
    }

    fn cached_block(
        x: FlexTensor,
        weights: BlockWeights<Matrix<Flex>, FlexTensor>,
        cache: BlockCache<Flex>,
        spec: BlockSpec<Flex>,
    ) -> (FlexTensor, BlockCache<Flex>) {
        match decode::takes_block(&x, &weights, &cache, &spec) {
            true => decode::block(x, weights, cache, &spec),
            false => block::cached::<Flex>(x, weights, cache, &spec),
        }
    }

    fn causal_attention_backward(saved: AttentionSaved<Flex>, grad: FlexTensor) -> [FlexTensor; 3] {
        let tensors = [&saved.q, &saved.k, &saved.v, &saved.out, &grad];
        if is_f32(&tensors) {
            attention::backward::<f32>(saved, grad)
        } else if is_bf16(&tensors) {
            attention::backward::<bf16>(saved, grad)
        } else {
            reference::causal_attention_backward::<Flex>(saved, grad)
        }
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        if is_f32(&[&gate, &up]) {
            rows::swiglu::<f32>(gate, up)
        } else if is_bf16(&[&gate, &up]) {
            rows::swiglu::<bf16>(gate, up)
        } else {
            reference::swiglu::<Flex>(gate, up)
        }
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> (FlexTensor, FlexTensor) {
        if is_f32(&[&gate, &up, &grad]) {
            rows::swiglu_backward::<f32>(gate, up, grad)
        } else if is_bf16(&[&gate, &up, &grad]) {
            rows::swiglu_backward::<bf16>(gate, up, grad)
        } else {
            reference::swiglu_backward::<Flex>(gate, up, grad)
        }
    }

    fn add_residual(x: FlexTensor, residual: FlexTensor) -> FlexTensor {
        match (x.dtype(), residual.dtype()) {
            (DType::BF16, DType::F32) => rows::add_residual(x, residual),
            _ => reference::add_residual::<Flex>(x, residual),
        }
    }

    fn token_losses(hidden: FlexTensor, head: FlexTensor, targets: IntTensor<Flex>, spec: LossSpec) -> FlexTensor {
        if !is_f32(&[&hidden]) || !is_float(&head) {
            return reference::token_losses::<Flex>(hidden, head, targets, spec);
        }
        cross_entropy::token_losses(hidden, head, targets, spec)
    }

    fn loss_head(head: FlexTensor, dtype: DType) -> FlexTensor {
        if is_float(&head) { head } else { Self::float_cast(head, dtype.into()) }
    }

    fn log_sum_exp(x: FlexTensor) -> FlexTensor {
        if is_f32(&[&x]) { cross_entropy::log_sum_exp(x) } else { reference::log_sum_exp::<Flex>(x) }
    }

    fn linear_cross_entropy_with_grads(
        hidden: FlexTensor,
        head: FlexTensor,
        targets: IntTensor<Flex>,
        spec: LossSpec,
    ) -> [FlexTensor; 3] {
        // A head that is trained is in f32.
        if !is_f32(&[&hidden]) || !is_float(&head) || spec.head_grad && !is_f32(&[&head]) {
            return reference::linear_cross_entropy_with_grads::<Flex>(hidden, head, targets, spec);
        }
        cross_entropy::with_grads(hidden, head, targets, spec)
    }

    fn scale(x: FlexTensor, factor: FlexTensor) -> FlexTensor {
        if is_f32(&[&factor]) && values::<f32>(&contiguous(factor.clone()))[0] == 1.0 {
            return x;
        }
        reference::scale::<Flex>(x, factor)
    }

    fn adamw(tensors: Vec<[FlexTensor; 4]>, step: &AdamWStep) -> Vec<[FlexTensor; 3]> {
        let update = |tensors: [FlexTensor; 4]| match is_f32(&tensors.iter().collect::<Vec<_>>()) {
            true => rows::adamw(tensors, step),
            false => reference::adamw::<Flex>(tensors, step),
        };
        tensors.into_iter().map(update).collect()
    }

    fn sums_of_squares(tensors: Vec<FlexTensor>) -> FlexTensor {
        if !is_f32(&tensors.iter().collect::<Vec<_>>()) {
            return reference::sums_of_squares::<Flex>(tensors);
        }
        Flex::float_cat(tensors.into_iter().map(rows::sum_of_squares).collect(), 0)
    }
}

/// The result for one weight.
fn only(mut results: Vec<FlexTensor>) -> FlexTensor {
    results.pop().expect("a weight has a result")
}

fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

fn is_bf16(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::BF16)
}

/// Whether products of many rows read it.
fn is_operand(tensor: &FlexTensor) -> bool {
    matches!(tensor.dtype(), DType::F32 | DType::BF16)
}

/// In f32.
fn wide(x: FlexTensor) -> FlexTensor {
    if is_f32(&[&x]) { x } else { Flex::float_cast(x, FloatDType::F32) }
}

/// Whether kernels read it as a weight in floats.
fn is_float(tensor: &FlexTensor) -> bool {
    matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// The tensor with its elements in order and nothing between them, perhaps inside a larger buffer: to be read by
/// [`values`]. No copy if they are.
fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// The tensor with its elements in order, alone in their buffer: to be written, or read as storage. No copy, and no second
/// owner, if they are.
fn whole(x: FlexTensor) -> FlexTensor {
    let len = x.layout().num_elements() * x.dtype().size();
    if x.is_contiguous() && x.layout().start_offset() == 0 && x.bytes().len() == len { x } else { x.to_contiguous() }
}

/// The elements of a contiguous tensor.
fn values<T: Number>(x: &FlexTensor) -> &[T] {
    &x.storage::<T>()[x.layout().start_offset()..][..x.layout().num_elements()]
}

fn scalar(value: f32) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(vec![value], [1]))
}

/// A view of a tensor's elements with strides.
struct Strided<'a, T = f32> {
    data: &'a [T],
    layout: &'a Layout,
}

impl<'a, T: Element + Pod> Strided<'a, T> {
    fn new(x: &'a FlexTensor) -> Self {
        Self { data: x.storage(), layout: x.layout() }
    }
}

impl<T> Strided<'_, T> {
    /// Pointer to the first element. Positions reached by the strides are inside the buffer.
    fn ptr(&self) -> *const T {
        self.data[self.layout.start_offset()..].as_ptr()
    }

    fn stride(&self, dim: usize) -> isize {
        self.layout.strides()[dim]
    }

    fn dim(&self, dim: usize) -> usize {
        self.layout.shape()[dim]
    }
}

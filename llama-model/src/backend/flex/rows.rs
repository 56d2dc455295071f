//! The operations that go over rows or elements once: limited by memory, so each reads and writes everything once.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::simd::{sigmoid, sum1, sum2, vectorized};
use super::vector::{Float, Number};
use super::{Buffer, Output, contiguous, scalar, team, values, whole};
use crate::backend::AdamWStep;

/// Elements a thread takes at a time: small enough to share evenly, large enough to hide the hand-over. Fixed, so that
/// results do not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// Whole rows of about [`BLOCK`] elements.
fn rows_per_block(width: usize) -> usize {
    BLOCK.div_ceil(width.max(1))
}

/// With a result in `T`.
pub(super) fn rms_norm<T: Number>(x: FlexTensor, weight: FlexTensor, eps: f32) -> (FlexTensor, FlexTensor) {
    let (x, weight) = (contiguous(x), contiguous(weight));
    let shape = x.shape();
    let [rows, width] = shape.dims();
    let (xs, weights) = (values::<f32>(&x), values(&weight));
    // SAFETY: every row is written.
    let (mut out, mut inv_rms) = unsafe { (Buffer::<T>::unwritten(rows * width), Buffer::unwritten(rows)) };
    let block = rows_per_block(width);
    let blocks = out.chunks_mut(block * width).zip(inv_rms.chunks_mut(block)).zip(xs.chunks(block * width));
    team::each(blocks, |((out, inv_rms), x)| rms_norm_rows(out, inv_rms, x, weights, eps));
    (out.into_tensor(shape), inv_rms.into_tensor(Shape::new([rows, 1])))
}

vectorized! {
    /// As many rows as `inv_rms` has room for, at most.
    pub(super) fn rms_norm_rows<'a; T: Number>(out: &'a mut [T], inv_rms: &'a mut [f32], x: &'a [f32], weight: &'a [f32], eps: f32) -> () {
        let width = weight.len();
        for ((out, inv), x) in out.chunks_exact_mut(width).zip(inv_rms).zip(x.chunks_exact(width)) {
            *inv = 1.0 / (sum1(x, |x| x * x) / width as f32 + eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = T::nearest(x * *inv * weight);
            }
        }
    }
}

pub(super) fn rms_norm_backward(
    x: FlexTensor,
    weight: FlexTensor,
    inv_rms: FlexTensor,
    grad: FlexTensor,
    residual: Option<FlexTensor>,
) -> (FlexTensor, FlexTensor) {
    let residual = residual.map(contiguous);
    let [x, weight, inv_rms, grad] = [x, weight, inv_rms, grad].map(contiguous);
    let shape = x.shape();
    let [rows, width] = shape.dims();
    let (xs, weights, invs, grads) = (values(&x), values(&weight), values(&inv_rms), values(&grad));
    // SAFETY: every row is written.
    let mut d_x = unsafe { Buffer::unwritten(rows * width) };
    let block = rows_per_block(width);
    // Each block sums its own part of the weight's gradient; the parts are then added in their order.
    let blocks = d_x
        .chunks_mut(block * width)
        .zip(xs.chunks(block * width))
        .zip(grads.chunks(block * width))
        .zip(invs.chunks(block))
        .enumerate();
    let parts = team::map(blocks, |(index, (((d_x, x), grad), inv))| {
        let residual = residual.as_ref().map_or(&[][..], |rows| &values(rows)[index * block * width..][..x.len()]);
        rms_norm_backward_rows(d_x, x, grad, inv, weights, residual)
    });
    let mut d_weight = Buffer::<f32>::zeros(width);
    for part in parts {
        d_weight.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    (d_x.into_tensor(shape), d_weight.into_tensor(Shape::new([width])))
}

vectorized! {
    /// Fills `d_x` and returns the rows' part of the weight's gradient.
    fn rms_norm_backward_rows<'a>(
        d_x: &'a mut [f32],
        x: &'a [f32],
        grad: &'a [f32],
        inv_rms: &'a [f32],
        weight: &'a [f32],
        residual: &'a [f32],
    ) -> Vec<f32> {
        let width = weight.len();
        let mut d_weight = vec![0.0f32; width];
        let mut weighted = vec![0.0f32; width];
        let rows = d_x.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width)).zip(inv_rms);
        for (((d_x, x), grad), inv) in rows {
            for ((g, grad), weight) in weighted.iter_mut().zip(grad).zip(weight) {
                *g = grad * weight;
            }
            let mean = sum2(&weighted, x, |g, x| g * x) * inv / width as f32;
            let columns = d_x.iter_mut().zip(x).zip(grad).zip(&weighted).zip(&mut d_weight);
            for ((((d_x, x), grad), weighted), d_weight) in columns {
                let normed = x * inv;
                *d_weight += grad * normed;
                *d_x = (weighted - normed * mean) * inv;
            }
        }
        // Without a residual there are no rows of it.
        for (d_x, residual) in d_x.iter_mut().zip(residual) {
            *d_x += residual;
        }
        d_weight
    }
}

/// Each row of the vocabulary belongs to one thread, which adds its tokens' gradients in their order.
pub(super) fn token_embedding_backward(
    grad: FlexTensor,
    tokens: FlexTensor,
    vocab_size: usize,
    sum: Option<FlexTensor>,
) -> FlexTensor {
    let grad = contiguous(grad);
    let [_, d_model] = grad.shape().dims();
    let tokens: Vec<i64> = tokens.into_data().iter::<i64>().collect();
    let zeros = || Buffer::<f32>::zeros(vocab_size * d_model).into_tensor(Shape::new([vocab_size, d_model]));
    let mut d_weight = sum.map_or_else(zeros, whole);
    let share = vocab_size.div_ceil(team::threads());
    team::each(d_weight.storage_mut::<f32>().chunks_mut(share * d_model).enumerate(), |(index, d_weight)| {
        let first = index * share;
        for (token, grad) in tokens.iter().zip(values(&grad).chunks_exact(d_model)) {
            let row = (*token as usize).checked_sub(first).and_then(|row| d_weight.chunks_exact_mut(d_model).nth(row));
            row.into_iter().flatten().zip(grad).for_each(|(sum, grad)| *sum += grad);
        }
    });
    d_weight
}

pub(super) fn rotary<T: Number>(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, inverse: bool) -> FlexTensor {
    let (mut x, cos, sin) = (whole(x), contiguous(cos), contiguous(sin));
    let [_, _, heads, head_dim] = x.shape().dims();
    let half = head_dim / 2;
    let (cos, sin) = (values(&cos), values(&sin));
    let sign = if inverse { -1.0 } else { 1.0 };
    // In place if nobody else holds the input, as after a projection.
    let out = x.storage_mut::<T>();
    let width = heads * head_dim;
    let block = rows_per_block(width);
    team::each(out.chunks_mut(block * width).enumerate(), |(index, rows)| {
        rotate_rows(rows, width, index * block, [cos, sin], half, sign);
    });
    x
}

/// Rotates rows of all heads, of which the first has a number; row after row, the sequences' positions have entries in the tables.
pub(super) fn rotate_rows<T: Number>(
    rows: &mut [T],
    width: usize,
    first: usize,
    [cos, sin]: [&[f32]; 2],
    half: usize,
    sign: f32,
) {
    for (row, x) in rows.chunks_exact_mut(width).enumerate() {
        let entry = (first + row) * half % cos.len();
        rotate_heads(x, &cos[entry..][..half], &sin[entry..][..half], sign);
    }
}

vectorized! {
    /// Rotates all heads of one position.
    fn rotate_heads<'a; T: Number>(x: &'a mut [T], cos: &'a [f32], sin: &'a [f32], sign: f32) -> () {
        for head in x.chunks_exact_mut(2 * cos.len()) {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (x, y, sin) = (a.value(), b.value(), sign * sin);
                *a = T::nearest(x * cos - y * sin);
                *b = T::nearest(y * cos + x * sin);
            }
        }
    }
}

/// Flex's own assignment copies the whole buffer first, which made every token cost as much as all before it.
pub(super) fn cache_write(cache: FlexTensor, new: FlexTensor, start: usize) -> FlexTensor {
    write_positions(cache, values(&contiguous(new)), start)
}

/// [`cache_write`] of as many positions as `new` has for each sequence.
pub(super) fn write_positions(cache: FlexTensor, new: &[f32], start: usize) -> FlexTensor {
    let mut cache = whole(cache);
    let [batch, capacity, heads, head_dim] = cache.shape().dims();
    let (width, len) = (heads * head_dim, new.len() / batch);
    for (b, new) in new.chunks_exact(len).enumerate() {
        let there = (b * capacity + start) * width..(b * capacity + start) * width + len;
        match cache.dtype() {
            DType::BF16 => cache.storage_mut::<bf16>()[there].convert_from_f32_slice(new),
            DType::F16 => cache.storage_mut::<f16>()[there].convert_from_f32_slice(new),
            _ => cache.storage_mut::<f32>()[there].copy_from_slice(new),
        }
    }
    cache
}

pub(super) fn swiglu<T: Number>(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
    let (gate, up) = (contiguous(gate), contiguous(up));
    let (gates, ups) = (values::<T>(&gate), values(&up));
    // SAFETY: every element is written.
    let mut out = unsafe { Buffer::unwritten(gates.len()) };
    let blocks = out.chunks_mut(BLOCK).zip(gates.chunks(BLOCK)).zip(ups.chunks(BLOCK));
    team::each(blocks, |((out, gate), up)| swiglu_block(out, gate, up));
    out.into_tensor(gate.shape())
}

/// A tensor in f32 as one in bf16, if that is asked for.
pub(super) fn rounded(x: FlexTensor, dtype: DType) -> FlexTensor {
    if dtype != DType::BF16 {
        return x;
    }
    let x = contiguous(x);
    let numbers = values(&x);
    // SAFETY: every element is written.
    let mut out = unsafe { Buffer::unwritten(numbers.len()) };
    team::each(out.chunks_mut(BLOCK).zip(numbers.chunks(BLOCK)), |(out, x)| narrow_block(out, x));
    out.into_tensor(x.shape())
}

/// Rows of `width` numbers, in bf16, to rows that are `stride` apart.
///
/// # Safety
/// There must be room, which nobody else uses meanwhile.
pub(super) unsafe fn narrow_rows(out: Output<bf16>, stride: isize, x: &[f32], width: usize) {
    let rows = rows_per_block(width);
    team::each(x.chunks(rows * width).enumerate(), |(index, x)| {
        for (row, x) in x.chunks_exact(width).enumerate() {
            // SAFETY: the caller's promise; each row is one task's.
            narrow_block(unsafe { out.slice((index * rows + row) * stride as usize, width) }, x);
        }
    });
}

vectorized! {
    fn narrow_block<'a>(out: &'a mut [bf16], x: &'a [f32]) -> () {
        for (out, x) in out.iter_mut().zip(x) {
            *out = bf16::nearest(*x);
        }
    }
}

/// `x + residual`, of bf16 and f32, in f32.
pub(super) fn add_residual(x: FlexTensor, residual: FlexTensor) -> FlexTensor {
    let (residual, x) = (contiguous(residual), contiguous(x));
    // SAFETY: every element is written.
    let mut out = unsafe { Buffer::unwritten(values::<f32>(&residual).len()) };
    let inputs = values(&residual).chunks(BLOCK).zip(values(&x).chunks(BLOCK));
    team::each(out.chunks_mut(BLOCK).zip(inputs), |(out, (residual, x))| add_residual_block(out, residual, x));
    out.into_tensor(residual.shape())
}

vectorized! {
    fn add_residual_block<'a>(out: &'a mut [f32], residual: &'a [f32], x: &'a [bf16]) -> () {
        for ((out, residual), x) in out.iter_mut().zip(residual).zip(x) {
            *out = residual + x.value();
        }
    }
}

vectorized! {
    /// `out += x`
    pub(super) fn add<'a>(out: &'a mut [f32], x: &'a [f32]) -> () {
        for (out, x) in out.iter_mut().zip(x) {
            *out += x;
        }
    }
}

vectorized! {
    pub(super) fn swiglu_block<'a; T: Number>(out: &'a mut [T], gate: &'a [T], up: &'a [T]) -> () {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.value();
            *out = T::nearest(gate * sigmoid(gate) * up.value());
        }
    }
}

pub(super) fn swiglu_backward<T: Number>(
    gate: FlexTensor,
    up: FlexTensor,
    grad: FlexTensor,
) -> (FlexTensor, FlexTensor) {
    let [gate, up, grad] = [gate, up, grad].map(contiguous);
    let [gates, ups, grads] = [&gate, &up, &grad].map(values::<T>);
    // SAFETY: every element is written.
    let (mut d_gate, mut d_up) = unsafe { (Buffer::unwritten(gates.len()), Buffer::unwritten(gates.len())) };
    let inputs = gates.chunks(BLOCK).zip(ups.chunks(BLOCK)).zip(grads.chunks(BLOCK));
    let blocks = d_gate.chunks_mut(BLOCK).zip(d_up.chunks_mut(BLOCK)).zip(inputs);
    team::each(blocks, |((d_gate, d_up), ((gate, up), grad))| swiglu_backward_block(d_gate, d_up, gate, up, grad));
    (d_gate.into_tensor(gate.shape()), d_up.into_tensor(gate.shape()))
}

vectorized! {
    fn swiglu_backward_block<'a; T: Number>(
        d_gate: &'a mut [T],
        d_up: &'a mut [T],
        gate: &'a [T],
        up: &'a [T],
        grad: &'a [T],
    ) -> () {
        for ((((d_gate, d_up), gate), up), grad) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(grad) {
            let (gate, up, grad) = (gate.value(), up.value(), grad.value());
            let sigmoid = sigmoid(gate);
            let silu = gate * sigmoid;
            *d_up = T::nearest(grad * silu);
            *d_gate = T::nearest(grad * up * (sigmoid + silu * (1.0 - sigmoid)));
        }
    }
}

pub(super) fn adamw([param, grad, m, v]: [FlexTensor; 4], step: &AdamWStep) -> [FlexTensor; 3] {
    let ([mut param, mut m, mut v], grad) = ([param, m, v].map(whole), contiguous(grad));
    let moments = m.storage_mut::<f32>().chunks_mut(BLOCK).zip(v.storage_mut::<f32>().chunks_mut(BLOCK));
    let params = param.storage_mut::<f32>().chunks_mut(BLOCK).zip(values(&grad).chunks(BLOCK));
    team::each(params.zip(moments), |((param, grad), (m, v))| adamw_block(param, grad, m, v, step));
    [param, m, v]
}

vectorized! {
    fn adamw_block<'a>(
        param: &'a mut [f32],
        grad: &'a [f32],
        m: &'a mut [f32],
        v: &'a mut [f32],
        step: &'a AdamWStep,
    ) -> () {
        let (correction_1, correction_2) = step.bias_corrections();
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        let rate = (step.lr / correction_1) as f32;
        let correction_2 = (1.0 / correction_2) as f32;
        let (beta_1, beta_2) = (step.beta_1 as f32, step.beta_2 as f32);
        let (rest_1, rest_2) = ((1.0 - step.beta_1) as f32, (1.0 - step.beta_2) as f32);
        let (epsilon, scale) = (step.epsilon as f32, step.grad_scale as f32);
        for (((param, grad), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let grad = grad * scale;
            *m = beta_1 * *m + rest_1 * grad;
            *v = beta_2 * *v + rest_2 * (grad * grad);
            *param = *param * keep - rate * *m / ((*v * correction_2).sqrt() + epsilon);
        }
    }
}

pub(super) fn sum_of_squares(x: FlexTensor) -> FlexTensor {
    let x = contiguous(x);
    let parts: Vec<f64> = team::map(values(&x).chunks(BLOCK), |block| f64::from(sum_of_squares_block(block)));
    scalar(parts.iter().sum::<f64>() as f32)
}

vectorized! {
    fn sum_of_squares_block<'a>(x: &'a [f32]) -> f32 {
        sum1(x, |x| x * x)
    }
}

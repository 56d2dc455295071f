//! Cross entropy of the output head in chunks of rows: a chunk's logits are made, used for loss and gradients, and
//! overwritten by the next chunk's. Extra memory is one chunk, whatever tokens and vocabulary.

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;

use super::product::{Matrix, PRODUCT, Place, Product, has_matrix_unit, multiply};
use super::simd::{exp, max, replace, sum1, vectorized};
use super::stored::Stored;
use super::{Buffer, contiguous, decode, scalar, team, values, whole};
use crate::Precision;
use crate::backend::{IGNORE_TARGET, LossSpec};

/// Logits of a chunk: 32 MB.
const CHUNK: usize = 1 << 23;

struct Head<'a> {
    hidden: &'a [f32],
    head: Stored<'a>,
    targets: Vec<i64>,
    d_model: usize,
    vocab_size: usize,
    spec: LossSpec,
}

impl<'a> Head<'a> {
    fn new(hidden: &'a FlexTensor, head: &'a FlexTensor, targets: FlexTensor, spec: LossSpec) -> Self {
        let [tokens, d_model] = hidden.shape().dims();
        let [vocab_size, _] = head.shape().dims();
        let targets: Vec<i64> = targets.into_data().iter::<i64>().collect();
        assert_eq!(targets.len(), tokens, "one target for each row");
        let known = |target: &i64| *target == IGNORE_TARGET || (0..vocab_size as i64).contains(target);
        if let Some(target) = targets.iter().find(|target| !known(target)) {
            panic!("target {target} is outside the vocabulary of {vocab_size}");
        }
        Self { hidden: values(hidden), head: Stored::floats(head), targets, d_model, vocab_size, spec }
    }

    /// The products with the head.
    fn product(&self) -> Product {
        Product { threads: true, precision: self.spec.precision, ..PRODUCT }
    }

    /// Rows of a chunk.
    fn rows(&self) -> usize {
        // The faster the products, the more it costs to read the head for each chunk.
        let fast = self.spec.precision != Precision::F32 || has_matrix_unit();
        let chunk = if fast { 2 * CHUNK } else { CHUNK };
        (chunk / self.vocab_size).clamp(16, 512).min(self.targets.len().max(1))
    }

    /// Writes the logits of hidden states.
    fn logits(&self, hidden: &[f32], logits: &mut [f32]) {
        let (rows, vocab_size, d_model) = (hidden.len() / self.d_model, self.vocab_size, self.d_model);
        let Stored::F32(head) = self.head else {
            return decode::multiply_into(&mut [logits], hidden, d_model, &[self.head], self.spec.precision);
        };
        let (hidden, head) = (Matrix::rows(hidden, rows, d_model), Matrix::rows(head, vocab_size, d_model));
        // SAFETY: the matrices are slices of the right size, `logits` is the caller's own.
        unsafe {
            multiply(Place::F32(logits.as_mut_ptr()), vocab_size as isize, hidden, head.transposed(), self.product())
        };
    }

    /// Writes the gradient of hidden states.
    fn backward(&self, d_logits: &[f32], d_hidden: &mut [f32]) {
        let (rows, vocab_size, d_model) = (d_hidden.len() / self.d_model, self.vocab_size, self.d_model);
        let Stored::F32(head) = self.head else {
            return decode::input_gradient(d_hidden, d_logits, self.head, d_model, self.spec.precision, false);
        };
        let (d_logits, head) = (Matrix::rows(d_logits, rows, vocab_size), Matrix::rows(head, vocab_size, d_model));
        // SAFETY: as above.
        unsafe { multiply(Place::F32(d_hidden.as_mut_ptr()), d_model as isize, d_logits, head, self.product()) };
    }

    /// Calls `each` with first row, hidden states, targets and logits of every chunk.
    fn chunks(&self, mut each: impl FnMut(usize, Matrix, &[i64], &mut [f32])) {
        let rows = self.rows();
        // SAFETY: the product fills it first.
        let mut logits = unsafe { Buffer::unwritten(rows * self.vocab_size) };
        for (index, targets) in self.targets.chunks(rows).enumerate() {
            let first = index * rows;
            let hidden = &self.hidden[first * self.d_model..][..targets.len() * self.d_model];
            let logits = &mut logits[..targets.len() * self.vocab_size];
            self.logits(hidden, logits);
            let hidden = Matrix::rows(hidden, targets.len(), self.d_model);
            each(first, hidden, targets, logits);
        }
    }
}

/// `ln Σ exp(x)`, of values that are `max` at most.
#[inline(always)]
fn row_lse(x: &[f32], max: f32) -> f32 {
    sum1(x, |x| exp(x - max)).ln() + max
}

vectorized! {
    fn row_log_sum_exp<'a>(x: &'a [f32]) -> f32 {
        row_lse(x, max(x, |x| x))
    }
}

vectorized! {
    /// The loss of one row of logits, 0 for a target that is ignored. With `grad` the row becomes its gradient,
    /// `softmax · (1 + 2 z lse) - onehot(target)`.
    fn row_loss<'a>(logits: &'a mut [f32], target: i64, z_loss: f32, grad: bool) -> f32 {
        if target == IGNORE_TARGET {
            if grad {
                logits.fill(0.0);
            }
            return 0.0;
        }
        let target = target as usize;
        let max = max(logits, |x| x);
        let target_logit = logits[target];
        if !grad {
            let lse = row_lse(logits, max);
            return lse - target_logit + z_loss * lse * lse;
        }
        let sum = replace(logits, |x| exp(x - max));
        let lse = sum.ln() + max;
        let scale = (1.0 + 2.0 * z_loss * lse) / sum;
        for x in logits.iter_mut() {
            *x *= scale;
        }
        logits[target] -= 1.0;
        lse - target_logit + z_loss * lse * lse
    }
}

fn chunk_losses(logits: &mut [f32], targets: &[i64], head: &Head, losses: &mut [f32], grad: bool) {
    let z_loss = head.spec.z_loss as f32;
    team::each(logits.chunks_mut(head.vocab_size).zip(targets).zip(losses), |((logits, target), loss)| {
        *loss = row_loss(logits, *target, z_loss, grad);
    });
}

pub(super) fn token_losses(hidden: FlexTensor, head: FlexTensor, targets: FlexTensor, spec: LossSpec) -> FlexTensor {
    let (hidden, head_tensor) = (contiguous(hidden), whole(head));
    let head = Head::new(&hidden, &head_tensor, targets, spec);
    let mut losses = Buffer::zeros(head.targets.len());
    head.chunks(|first, _, targets, logits| {
        chunk_losses(logits, targets, &head, &mut losses[first..][..targets.len()], false);
    });
    let tokens = losses.len();
    losses.into_tensor(Shape::new([tokens]))
}

pub(super) fn log_sum_exp(x: FlexTensor) -> FlexTensor {
    let x = contiguous(x);
    let [rows, cols] = x.shape().dims();
    let mut sums = Buffer::zeros(rows);
    let rows_of_x = values(&x).chunks_exact(cols.max(1));
    team::each(rows_of_x.zip(&mut sums[..]), |(x, sum)| *sum = row_log_sum_exp(x));
    sums.into_tensor(Shape::new([rows]))
}

pub(super) fn with_grads(hidden: FlexTensor, head: FlexTensor, targets: FlexTensor, spec: LossSpec) -> [FlexTensor; 3] {
    let (hidden, head_tensor) = (contiguous(hidden), whole(head));
    let head = Head::new(&hidden, &head_tensor, targets, spec);
    let (tokens, d_model, vocab_size) = (head.targets.len(), head.d_model, head.vocab_size);
    let mut losses = vec![0.0f32; tokens];
    // Without tokens nothing would fill them.
    let head_rows = if spec.head_grad { vocab_size } else { 0 };
    let (mut d_hidden, mut d_head) = (Buffer::zeros(tokens * d_model), Buffer::zeros(head_rows * d_model));
    head.chunks(|first, hidden, targets, logits| {
        chunk_losses(logits, targets, &head, &mut losses[first..][..targets.len()], true);
        head.backward(logits, &mut d_hidden[first * d_model..][..targets.len() * d_model]);
        if spec.head_grad {
            let d_logits = Matrix::rows(logits, targets.len(), vocab_size);
            let add = Product { add: first > 0, ..head.product() };
            // SAFETY: the matrices are slices of the right size; the output is this function's own.
            unsafe { multiply(Place::F32(d_head.as_mut_ptr()), d_model as isize, d_logits.transposed(), hidden, add) };
        }
    });
    let loss: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
    [
        scalar(loss as f32),
        d_hidden.into_tensor(Shape::new([tokens, d_model])),
        d_head.into_tensor(Shape::new([head_rows, d_model])),
    ]
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::{DType, Tensor, TensorData};

    use super::*;
    use crate::backend::ops::{primitive, tensor};

    /// A head in bf16 or f16 gives what the same numbers in f32 give.
    #[test]
    fn heads_are_read_as_they_are_stored() {
        let device = Default::default();
        let noise = |rows: usize, cols: usize| {
            let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect();
            Tensor::<Flex, 2>::from_data(TensorData::new(values, [rows, cols]), &device)
        };
        let numbers = |x: FlexTensor| x.into_data().iter::<f32>().collect::<Vec<_>>();
        let (tokens, vocab_size, d_model) = (37, 700, 64);
        let targets: Vec<i64> = (0..tokens as i64).map(|i| if i % 5 == 0 { IGNORE_TARGET } else { i * 17 }).collect();
        let targets = || FlexTensor::from_data(TensorData::new(targets.clone(), [tokens]));
        for (precision, tolerance) in [(Precision::F32, 1e-4), (Precision::Bf16, 0.05)] {
            let spec = LossSpec { precision, head_grad: false, z_loss: 1e-3 };
            for dtype in [DType::BF16, DType::F16] {
                let short = noise(vocab_size, d_model).cast(dtype);
                let wide: Tensor<Flex, 2> = short.clone().cast(DType::F32);
                let of = |head: Tensor<Flex, 2>| {
                    let (hidden, head) = (primitive(noise(tokens, d_model)), primitive(head));
                    let losses = token_losses(hidden.clone(), head.clone(), targets(), spec);
                    let [loss, d_hidden, d_head] = with_grads(hidden, head, targets(), spec);
                    assert_eq!(tensor::<Flex, 2>(d_head).dims(), [0, d_model]);
                    [numbers(losses), numbers(loss), numbers(d_hidden)].concat()
                };
                for (i, (found, expected)) in of(short).into_iter().zip(of(wide)).enumerate() {
                    let off = (found - expected).abs() / expected.abs().max(1.0);
                    assert!(off < tolerance, "{precision} {dtype:?} {i}: {found} {expected}");
                }
            }
        }
    }
}

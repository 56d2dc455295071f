//! Kernels with a cube for each row, or a few rows: RMSNorm and the loss.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{contiguous, cubes, empty_like};

/// Units of a cube.
pub(super) const UNITS: usize = 256;
/// Rows whose share of the gain's gradient is summed by one cube.
const ROWS: usize = 32;
/// Widest row of the norm: a unit holds its part of it in registers.
const MAX_WIDTH: usize = 64 * UNITS;

/// Whether the norm's kernels take rows of this width.
pub(super) fn fits<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    x.shape()[1] <= MAX_WIDTH
}

/// The sum of all units' values, in every unit.
#[cube]
pub(super) fn cube_sum(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2()) {
        let step = comptime!(UNITS >> (level + 1));
        if unit < step {
            shared[unit] += shared[unit + step];
        }
        sync_cube();
    }
    let sum = shared[0];
    // Nobody writes the next value before all have read this one.
    sync_cube();
    sum
}

#[cube]
fn cube_max(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(UNITS.ilog2()) {
        let step = comptime!(UNITS >> (level + 1));
        if unit < step {
            shared[unit] = max(shared[unit], shared[unit + step]);
        }
        sync_cube();
    }
    let best = shared[0];
    sync_cube();
    best
}

#[cube(launch)]
fn rms_norm_kernel<F: Float, W: Float>(
    x: &Tensor<F>,
    weight: &Tensor<W>,
    out: &mut Tensor<F>,
    inv_rms: &mut Tensor<f32>,
    eps: f32,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    let row = CUBE_POS;
    let width = x.shape(1);
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    if row < x.shape(0) {
        let mut squares = f32::new(0.0);
        let mut at = UNIT_POS as usize;
        while at < width {
            let value = f32::cast_from(x[row * width + at]);
            squares += value * value;
            at += UNITS;
        }
        let mean = cube_sum(squares, &mut shared) / f32::cast_from(width);
        let inv = f32::new(1.0) / (mean + eps).sqrt();
        let mut at = UNIT_POS as usize;
        while at < width {
            // Cast back before the gain, as the reference does.
            let normed = F::cast_from(f32::cast_from(x[row * width + at]) * inv);
            out[row * width + at] = F::cast_from(f32::cast_from(normed) * f32::cast_from(weight[at]));
            at += UNITS;
        }
        if UNIT_POS == 0 {
            inv_rms[row] = inv;
        }
    }
}

/// [`LlamaBackend::rms_norm`](crate::LlamaBackend::rms_norm).
pub(super) fn rms_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    eps: f64,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [x, weight] = contiguous([x, weight]);
    let [rows, _] = x.shape().dims();
    let out = empty_like(&x, x.shape(), x.dtype);
    let inv_rms = empty_like(&x, Shape::new([rows, 1]), DType::F32);
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), weight.dtype.into()]);
    rms_norm_kernel::launch::<R>(
        &client,
        cubes(rows),
        CubeDim::new_1d(UNITS as u32),
        x.into_tensor_arg(),
        weight.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        inv_rms.clone().into_tensor_arg(),
        eps as f32,
        dtypes,
    );
    (out, inv_rms)
}

/// `ROWS` rows a cube: `dx` of each, and the sum of their `grad · x̂` as a row of `partial`.
#[cube(launch)]
fn rms_norm_backward_kernel<F: Float, W: Float>(
    x: &Tensor<F>,
    weight: &Tensor<W>,
    inv_rms: &Tensor<f32>,
    grad: &Tensor<F>,
    d_x: &mut Tensor<F>,
    partial: &mut Tensor<f32>,
    #[comptime] per_unit: usize,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    let first = CUBE_POS * ROWS;
    let width = x.shape(1);
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let mut sums = Array::<f32>::new(per_unit);
    for part in 0..per_unit {
        sums[part] = f32::new(0.0);
    }
    if first < x.shape(0) {
        let last = min(first + ROWS, x.shape(0));
        for row in first..last {
            let inv = inv_rms[row];
            let mut dot = f32::new(0.0);
            for part in 0..per_unit {
                let at = part * UNITS + UNIT_POS as usize;
                if at < width {
                    let normed = f32::cast_from(x[row * width + at]) * inv;
                    let grad = f32::cast_from(grad[row * width + at]);
                    sums[part] += grad * normed;
                    dot += grad * f32::cast_from(weight[at]) * normed;
                }
            }
            let mean = cube_sum(dot, &mut shared) / f32::cast_from(width);
            for part in 0..per_unit {
                let at = part * UNITS + UNIT_POS as usize;
                if at < width {
                    let normed = f32::cast_from(x[row * width + at]) * inv;
                    let scaled = f32::cast_from(grad[row * width + at]) * f32::cast_from(weight[at]);
                    d_x[row * width + at] = F::cast_from((scaled - normed * mean) * inv);
                }
            }
        }
        for part in 0..per_unit {
            let at = part * UNITS + UNIT_POS as usize;
            if at < width {
                partial[CUBE_POS * width + at] = sums[part];
            }
        }
    }
}

/// [`LlamaBackend::rms_norm_backward`](crate::LlamaBackend::rms_norm_backward) without the residual; of the gain's gradient the sums of
/// groups of rows, `[groups, d_model]`, in f32.
pub(super) fn rms_norm_backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    inv_rms: CubeTensor<R>,
    grad: CubeTensor<R>,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [x, weight, inv_rms, grad] = contiguous([x, weight, inv_rms, grad]);
    let [rows, width] = x.shape().dims();
    let groups = rows.div_ceil(ROWS);
    let d_x = empty_like(&x, x.shape(), x.dtype);
    let partial = empty_like(&x, Shape::new([groups, width]), DType::F32);
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), weight.dtype.into()]);
    rms_norm_backward_kernel::launch::<R>(
        &client,
        cubes(groups),
        CubeDim::new_1d(UNITS as u32),
        x.into_tensor_arg(),
        weight.into_tensor_arg(),
        inv_rms.into_tensor_arg(),
        grad.into_tensor_arg(),
        d_x.clone().into_tensor_arg(),
        partial.clone().into_tensor_arg(),
        width.div_ceil(UNITS),
        dtypes,
    );
    (d_x, partial)
}

/// The loss of each row of logits, and, if asked for, its gradient in the logits' place.
#[cube(launch)]
fn cross_entropy_kernel<F: Float, I: Int>(
    logits: &mut Tensor<F>,
    targets: &Tensor<I>,
    losses: &mut Tensor<f32>,
    z_loss: f32,
    #[comptime] gradient: bool,
    #[define(F, I)] _dtypes: [StorageType; 2],
) {
    let row = CUBE_POS;
    let width = logits.shape(1);
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    if row < logits.shape(0) {
        let base = row * width;
        // The greatest logit and the sum of exponentials below it, in one pass.
        let mut best = f32::new(-1e30);
        let mut sum = f32::new(0.0);
        let mut at = UNIT_POS as usize;
        while at < width {
            let value = f32::cast_from(logits[base + at]);
            let higher = max(best, value);
            sum = sum * (best - higher).exp() + (value - higher).exp();
            best = higher;
            at += UNITS;
        }
        let highest = cube_max(best, &mut shared);
        let total = cube_sum(sum * (best - highest).exp(), &mut shared);
        let lse = highest + total.ln();

        let target = i32::cast_from(targets[row]);
        let counts = target >= 0i32;
        if UNIT_POS == 0 {
            let mut loss = f32::new(0.0);
            if counts {
                loss = lse - f32::cast_from(logits[base + target as usize]) + z_loss * lse * lse;
            }
            losses[row] = loss;
        }
        if comptime!(gradient) {
            // The target's logit is read above.
            sync_cube();
            let factor = f32::new(1.0) + f32::new(2.0) * z_loss * lse;
            let mut at = UNIT_POS as usize;
            while at < width {
                let mut value = f32::new(0.0);
                if counts {
                    value = (f32::cast_from(logits[base + at]) - lse).exp() * factor;
                    if at == target as usize {
                        value -= f32::new(1.0);
                    }
                }
                logits[base + at] = F::cast_from(value);
                at += UNITS;
            }
        }
    }
}

/// Losses `[rows]` of `logits [rows, vocab_size]`, and the logits: with `gradient`, replaced by their gradients. A negative target counts for
/// nothing.
pub(super) fn cross_entropy<R: CubeRuntime>(
    logits: CubeTensor<R>,
    targets: CubeTensor<R>,
    z_loss: f64,
    gradient: bool,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [logits, targets] = contiguous([logits, targets]);
    // The kernel writes into the logits, which must be nobody else's.
    let logits = if gradient && !logits.can_mut() { logits.copy() } else { logits };
    let rows = logits.shape()[0];
    let losses = empty_like(&logits, Shape::new([rows]), DType::F32);
    let dtypes = [logits.dtype.into(), targets.dtype.into()];
    cross_entropy_kernel::launch::<R>(
        &logits.client.clone(),
        cubes(rows),
        CubeDim::new_1d(UNITS as u32),
        logits.clone().into_tensor_arg(),
        targets.into_tensor_arg(),
        losses.clone().into_tensor_arg(),
        z_loss as f32,
        gradient,
        dtypes,
    );
    (losses, logits)
}

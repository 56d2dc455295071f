//! Kernels with a cube for each row, or a few rows: RMSNorm and the loss.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::reduce::{UNITS, cube_max, cube_sum, lanes, planes, vector_size};
use super::{contiguous, cubes, empty_like};

/// Rows whose share of the gain's gradient is summed by one cube.
const ROWS: usize = 16;
/// Widest row of the norm: a unit holds its part of it in registers.
const MAX_WIDTH: usize = 64 * UNITS;

/// Whether the norm's kernels take rows of this width.
pub(super) fn fits<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    x.shape()[1] <= MAX_WIDTH
}

#[cube(launch)]
fn rms_norm_kernel<F: Float, W: Float, O: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<W, N>>,
    out: &mut Array<Vector<O, N>>,
    inv_rms: &mut Array<f32>,
    eps: f32,
    #[comptime] per_unit: usize,
    #[comptime] planes: bool,
    #[define(F, W, O)] _dtypes: [StorageType; 3],
) {
    let row = CUBE_POS;
    let width = weight.len();
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    if row < inv_rms.len() {
        let mut values = Array::<Vector<f32, N>>::new(per_unit);
        let mut squares = Vector::<f32, N>::cast_from(0.0f32);
        #[unroll]
        for part in 0..per_unit {
            let at = part * UNITS + UNIT_POS as usize;
            let mut value = Vector::<f32, N>::cast_from(0.0f32);
            if at < width {
                value = Vector::cast_from(x[row * width + at]);
            }
            squares += value * value;
            values[part] = value;
        }
        let mean = cube_sum(lanes(squares), &mut shared, planes) / f32::cast_from(width * N::value());
        let inv = f32::new(1.0) / (mean + eps).sqrt();
        #[unroll]
        for part in 0..per_unit {
            let at = part * UNITS + UNIT_POS as usize;
            if at < width {
                // Cast back before the gain, as the reference does.
                let normed = Vector::<F, N>::cast_from(values[part] * Vector::cast_from(inv));
                let gain = Vector::<f32, N>::cast_from(weight[at]);
                out[row * width + at] = Vector::cast_from(Vector::<f32, N>::cast_from(normed) * gain);
            }
        }
        if UNIT_POS == 0 {
            inv_rms[row] = inv;
        }
    }
}

/// [`LlamaBackend::rms_norm`](crate::LlamaBackend::rms_norm) with a result in a type of its own.
pub(super) fn rms_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    eps: f64,
    dtype: DType,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [x, weight] = contiguous([x, weight]);
    let [rows, width] = x.shape().dims();
    let out = empty_like(&x, x.shape(), dtype);
    let inv_rms = empty_like(&x, Shape::new([rows, 1]), DType::F32);
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), weight.dtype.into(), dtype.into()]);
    let size = vector_size(width);
    rms_norm_kernel::launch::<R>(
        &client,
        cubes(rows),
        CubeDim::new_1d(UNITS as u32),
        size,
        x.into_array_arg(),
        weight.into_array_arg(),
        out.clone().into_array_arg(),
        inv_rms.clone().into_array_arg(),
        eps as f32,
        (width / size).div_ceil(UNITS),
        planes(&client),
        dtypes,
    );
    (out, inv_rms)
}

/// `ROWS` rows a cube: `dx` of each, and the sum of their `grad · x̂` as a row of `partial`.
#[cube(launch)]
fn rms_norm_backward_kernel<F: Float, W: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<W, N>>,
    inv_rms: &Array<f32>,
    grad: &Array<Vector<F, N>>,
    residual: &Array<Vector<F, N>>,
    d_x: &mut Array<Vector<F, N>>,
    partial: &mut Array<Vector<f32, N>>,
    #[comptime] per_unit: usize,
    #[comptime] add: bool,
    #[comptime] planes: bool,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    let first = CUBE_POS * ROWS;
    let width = weight.len();
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let mut sums = Array::<Vector<f32, N>>::new(per_unit);
    let mut normed = Array::<Vector<f32, N>>::new(per_unit);
    let mut scaled = Array::<Vector<f32, N>>::new(per_unit);
    let mut passed = Array::<Vector<f32, N>>::new(per_unit);
    #[unroll]
    for part in 0..per_unit {
        sums[part] = Vector::cast_from(0.0f32);
    }
    if first < inv_rms.len() {
        let last = min(first + ROWS, inv_rms.len());
        for row in first..last {
            let inv = inv_rms[row];
            let mut dot = Vector::<f32, N>::cast_from(0.0f32);
            #[unroll]
            for part in 0..per_unit {
                let at = part * UNITS + UNIT_POS as usize;
                let mut normed_at = Vector::<f32, N>::cast_from(0.0f32);
                let mut scaled_at = Vector::<f32, N>::cast_from(0.0f32);
                if at < width {
                    normed_at = Vector::<f32, N>::cast_from(x[row * width + at]) * Vector::cast_from(inv);
                    let grad = Vector::<f32, N>::cast_from(grad[row * width + at]);
                    // Read now, so that the wait for it is over when the sum is there.
                    if comptime!(add) {
                        passed[part] = Vector::cast_from(residual[row * width + at]);
                    }
                    scaled_at = grad * Vector::cast_from(weight[at]);
                    sums[part] += grad * normed_at;
                }
                dot += scaled_at * normed_at;
                normed[part] = normed_at;
                scaled[part] = scaled_at;
            }
            let mean = cube_sum(lanes(dot), &mut shared, planes) / f32::cast_from(width * N::value());
            #[unroll]
            for part in 0..per_unit {
                let at = part * UNITS + UNIT_POS as usize;
                if at < width {
                    let mut d_x_at = (scaled[part] - normed[part] * Vector::cast_from(mean)) * Vector::cast_from(inv);
                    if comptime!(add) {
                        d_x_at += passed[part];
                    }
                    d_x[row * width + at] = Vector::cast_from(d_x_at);
                }
            }
        }
        #[unroll]
        for part in 0..per_unit {
            let at = part * UNITS + UNIT_POS as usize;
            if at < width {
                partial[CUBE_POS * width + at] = sums[part];
            }
        }
    }
}

/// [`LlamaBackend::rms_norm_backward`](crate::LlamaBackend::rms_norm_backward); of the gain's gradient the sums of groups of rows,
/// `[groups, d_model]`, in f32.
pub(super) fn rms_norm_backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    inv_rms: CubeTensor<R>,
    grad: CubeTensor<R>,
    residual: Option<CubeTensor<R>>,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let add = residual.is_some();
    // A kernel is given something in the place of what it does not read.
    let residual = residual.unwrap_or_else(|| grad.clone());
    let [x, weight, inv_rms, grad, residual] = contiguous([x, weight, inv_rms, grad, residual]);
    let [rows, width] = x.shape().dims();
    let groups = rows.div_ceil(ROWS);
    let d_x = empty_like(&x, x.shape(), x.dtype);
    let partial = empty_like(&x, Shape::new([groups, width]), DType::F32);
    let (client, dtypes) = (x.client.clone(), [x.dtype.into(), weight.dtype.into()]);
    rms_norm_backward_kernel::launch::<R>(
        &client,
        cubes(groups),
        CubeDim::new_1d(UNITS as u32),
        vector_size(width),
        x.into_array_arg(),
        weight.into_array_arg(),
        inv_rms.into_array_arg(),
        grad.into_array_arg(),
        residual.into_array_arg(),
        d_x.clone().into_array_arg(),
        partial.clone().into_array_arg(),
        (width / vector_size(width)).div_ceil(UNITS),
        add,
        planes(&client),
        dtypes,
    );
    (d_x, partial)
}

/// The loss of each row of logits, and, if asked for, its gradient in the logits' place.
#[cube(launch)]
fn cross_entropy_kernel<F: Float, I: Int, N: Size>(
    logits: &mut Array<Vector<F, N>>,
    targets: &Array<I>,
    losses: &mut Array<f32>,
    z_loss: f32,
    #[comptime] gradient: bool,
    #[comptime] planes: bool,
    #[define(F, I)] _dtypes: [StorageType; 2],
) {
    let row = CUBE_POS;
    let width = logits.len() / losses.len();
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    if row < losses.len() {
        let base = row * width;
        // The greatest logit and the sum of exponentials below it, in one pass.
        let mut best = f32::new(-1e30);
        let mut sum = f32::new(0.0);
        let mut at = UNIT_POS as usize;
        while at < width {
            let value = Vector::<f32, N>::cast_from(logits[base + at]);
            let mut higher = best;
            #[unroll]
            for lane in 0..N::value() {
                higher = max(higher, value[lane]);
            }
            sum = sum * (best - higher).exp() + lanes((value - Vector::cast_from(higher)).exp());
            best = higher;
            at += UNITS;
        }
        let highest = cube_max(best, &mut shared, planes);
        let total = cube_sum(sum * (best - highest).exp(), &mut shared, planes);
        let lse = highest + total.ln();

        let target = i32::cast_from(targets[row]);
        let counts = target >= 0i32;
        if UNIT_POS == 0 {
            let mut loss = f32::new(0.0);
            if counts {
                let value = Vector::<f32, N>::cast_from(logits[base + target as usize / N::value()]);
                let mut logit = value[0];
                #[unroll]
                for lane in 1..N::value() {
                    if target as usize % N::value() == lane {
                        logit = value[lane];
                    }
                }
                loss = lse - logit + z_loss * lse * lse;
            }
            losses[row] = loss;
        }
        if comptime!(gradient) {
            // The target's logit is read above.
            sync_cube();
            let factor = f32::new(1.0) + f32::new(2.0) * z_loss * lse;
            let mut at = UNIT_POS as usize;
            while at < width {
                let mut value = Vector::<f32, N>::cast_from(0.0f32);
                if counts {
                    let below = Vector::<f32, N>::cast_from(logits[base + at]) - Vector::cast_from(lse);
                    value = below.exp() * Vector::cast_from(factor);
                    if at == target as usize / N::value() {
                        #[unroll]
                        for lane in 0..N::value() {
                            if target as usize % N::value() == lane {
                                value[lane] -= f32::new(1.0);
                            }
                        }
                    }
                }
                logits[base + at] = Vector::cast_from(value);
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
    let [rows, width] = logits.shape().dims();
    let losses = empty_like(&logits, Shape::new([rows]), DType::F32);
    let dtypes = [logits.dtype.into(), targets.dtype.into()];
    let client = logits.client.clone();
    cross_entropy_kernel::launch::<R>(
        &client,
        cubes(rows),
        CubeDim::new_1d(UNITS as u32),
        vector_size(width),
        logits.clone().into_array_arg(),
        targets.into_array_arg(),
        losses.clone().into_array_arg(),
        z_loss as f32,
        gradient,
        planes(&client),
        dtypes,
    );
    (losses, logits)
}

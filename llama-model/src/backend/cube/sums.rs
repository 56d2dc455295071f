//! Sums over whole tensors and over rows, each in an order that depends on the shape alone.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::rows::{UNITS, cube_sum};
use super::{contiguous, cubes, empty_like};

/// Most cubes that share a tensor.
const MAX_PARTS: usize = 1024;
/// Columns of a cube that sums rows; its units are this many times [`LANES`].
const COLUMNS: usize = 32;
const LANES: usize = UNITS / COLUMNS;

#[cube(launch)]
fn parts_kernel<F: Float>(
    x: &Tensor<F>,
    parts: &mut Tensor<f32>,
    #[comptime] squares: bool,
    #[define(F)] _dtype: StorageType,
) {
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let count = parts.len();
    if CUBE_POS < count {
        let mut sum = f32::new(0.0);
        let mut at = CUBE_POS * UNITS + UNIT_POS as usize;
        while at < x.len() {
            let mut value = f32::cast_from(x[at]);
            if comptime!(squares) {
                value *= value;
            }
            sum += value;
            at += count * UNITS;
        }
        let sum = cube_sum(sum, &mut shared);
        if UNIT_POS == 0 {
            parts[CUBE_POS] = sum;
        }
    }
}

fn parts<R: CubeRuntime>(x: CubeTensor<R>, count: usize, squares: bool) -> CubeTensor<R> {
    let [x] = contiguous([x]);
    let parts = empty_like(&x, Shape::new([count]), DType::F32);
    let (client, dtype) = (x.client.clone(), x.dtype.into());
    parts_kernel::launch::<R>(
        &client,
        cubes(count),
        CubeDim::new_1d(UNITS as u32),
        x.into_tensor_arg(),
        parts.clone().into_tensor_arg(),
        squares,
        dtype,
    );
    parts
}

/// The sum of a short tensor, `[1]` in f32.
pub(super) fn total<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    parts(x, 1, false)
}

/// [`LlamaBackend::sum_of_squares`](crate::LlamaBackend::sum_of_squares), in f32.
pub(super) fn sum_of_squares<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let count = x.shape().num_elements().div_ceil(4 * UNITS).clamp(1, MAX_PARTS);
    total(parts(x, count, true))
}

#[cube(launch)]
fn rows_kernel(x: &Tensor<f32>, out: &mut Tensor<f32>) {
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let width = x.shape(1);
    let unit = UNIT_POS as usize;
    let column = CUBE_POS * COLUMNS + unit % COLUMNS;
    let mut sum = f32::new(0.0);
    if column < width {
        let mut row = unit / COLUMNS;
        while row < x.shape(0) {
            sum += x[row * width + column];
            row += LANES;
        }
    }
    shared[unit] = sum;
    sync_cube();
    if unit < COLUMNS && column < width {
        let mut sum = f32::new(0.0);
        #[unroll]
        for lane in 0..LANES {
            sum += shared[lane * COLUMNS + unit];
        }
        out[column] = sum;
    }
}

/// The sum of the rows of an f32 matrix.
pub(super) fn sum_rows<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let [x] = contiguous([x]);
    let width = x.shape()[1];
    let out = empty_like(&x, Shape::new([width]), DType::F32);
    rows_kernel::launch::<R>(
        &x.client.clone(),
        cubes(width.div_ceil(COLUMNS)),
        CubeDim::new_1d(UNITS as u32),
        x.into_tensor_arg(),
        out.clone().into_tensor_arg(),
    );
    out
}

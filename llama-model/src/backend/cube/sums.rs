//! Sums over whole tensors and over rows, each in an order that depends on the shape alone.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::reduce::{UNITS, cube_sum, lanes, planes, vector_size};
use super::{batches, contiguous, cubes, empty_like};

/// Cubes that share a tensor whose squares are summed.
const PARTS: usize = 256;
/// Columns of a cube that sums rows; its units are this many times [`LANES`]. Few, so that many cubes share the rows.
const COLUMNS: usize = 8;
const LANES: usize = UNITS / COLUMNS;

/// `count` cubes sum each tensor, or the squares of its elements, to as many of `parts`, of which the first tensor's begin at `first`.
#[cube(launch)]
fn parts_kernel<F: Float, N: Size>(
    tensors: &Sequence<Array<Vector<F, N>>>,
    parts: &mut Array<f32>,
    first: usize,
    count: usize,
    #[comptime] squares: bool,
    #[comptime] planes: bool,
    #[define(F)] _dtype: StorageType,
) {
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let mut sum = Vector::<f32, N>::cast_from(0.0f32);
    #[unroll]
    for index in 0..tensors.len() {
        let x = tensors.index(index);
        if CUBE_POS / count == index {
            let mut at = CUBE_POS % count * UNITS + UNIT_POS as usize;
            while at < x.len() {
                let mut value = Vector::<f32, N>::cast_from(x[at]);
                if comptime!(squares) {
                    value *= value;
                }
                sum += value;
                at += count * UNITS;
            }
        }
    }
    let sum = cube_sum(lanes(sum), &mut shared, planes);
    if UNIT_POS == 0 && CUBE_POS < tensors.len() * count {
        parts[first + CUBE_POS] = sum;
    }
}

/// The parts of tensors of one type and of sizes that are multiples of `size`.
fn sum_parts<R: CubeRuntime>(
    tensors: Vec<CubeTensor<R>>,
    size: usize,
    parts: &CubeTensor<R>,
    first: usize,
    count: usize,
    squares: bool,
) {
    let (client, dtype, cubes) = (parts.client.clone(), tensors[0].dtype.into(), cubes(count * tensors.len()));
    let mut list = SequenceArg::new();
    for x in tensors {
        let [x] = contiguous([x]);
        list.push(x.into_array_arg());
    }
    parts_kernel::launch::<R>(
        &client,
        cubes,
        CubeDim::new_1d(UNITS as u32),
        size,
        list,
        parts.clone().into_array_arg(),
        first,
        count,
        squares,
        planes(&client),
        dtype,
    );
}

/// The sum of a short tensor, `[1]` in f32.
pub(super) fn total<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let sum = empty_like(&x, Shape::new([1]), DType::F32);
    let size = vector_size(x.shape().num_elements());
    sum_parts(vec![x], size, &sum, 0, 1, false);
    sum
}

/// [`LlamaBackend::sums_of_squares`](crate::LlamaBackend::sums_of_squares), in f32.
pub(super) fn sums_of_squares<R: CubeRuntime>(tensors: Vec<CubeTensor<R>>) -> CubeTensor<R> {
    let count = tensors.len();
    let parts = empty_like(&tensors[0], Shape::new([count, PARTS]), DType::F32);
    let mut first = 0;
    for (alike, size) in batches(&tensors, std::slice::from_ref, 1) {
        sum_parts(alike.to_vec(), size, &parts, first * PARTS, PARTS, true);
        first += alike.len();
    }
    // The parts of a tensor are neighbours: its row.
    let out = empty_like(&parts, Shape::new([count]), DType::F32);
    let client = parts.client.clone();
    tensors_kernel::launch::<R>(
        &client,
        cubes(count),
        CubeDim::new_1d(UNITS as u32),
        parts.into_array_arg(),
        out.clone().into_array_arg(),
        planes(&client),
    );
    out
}

#[cube(launch)]
fn tensors_kernel(parts: &Array<f32>, out: &mut Array<f32>, #[comptime] planes: bool) {
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    if CUBE_POS < out.len() {
        let mut sum = f32::new(0.0);
        let mut at = UNIT_POS as usize;
        while at < comptime!(PARTS) {
            sum += parts[CUBE_POS * PARTS + at];
            at += UNITS;
        }
        let sum = cube_sum(sum, &mut shared, planes);
        if UNIT_POS == 0 {
            out[CUBE_POS] = sum;
        }
    }
}

#[cube(launch)]
fn rows_kernel(x: &Array<f32>, out: &mut Array<f32>) {
    let mut shared = SharedMemory::<f32>::new(comptime!(UNITS));
    let width = out.len();
    let unit = UNIT_POS as usize;
    let column = CUBE_POS * COLUMNS + unit % COLUMNS;
    let mut sum = f32::new(0.0);
    if column < width {
        let mut row = unit / COLUMNS;
        while row * width < x.len() {
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
        x.into_array_arg(),
        out.clone().into_array_arg(),
    );
    out
}

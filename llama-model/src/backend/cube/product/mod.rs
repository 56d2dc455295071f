//! Matrix products on tensor cores, in bf16 or f16 with sums in f32.
//!
//! A cube makes a tile of the result, 128 rows × 256 columns, each of its planes 64 × 64 of it in registers. Both operands come through
//! shared memory in steps of 64 along the summed dimension, the next steps on their way while one is multiplied, and are read as they
//! lie: either dimension may be the contiguous one. Where the result has too few tiles for the device, as the gradient of a weight has,
//! the sum is split and its parts are added at the end, always in the same order.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::prelude::CubeDim;

use self::kernel::{DEPTH, Layout, SIDE, TILE_ROWS, add_parts_kernel, product_kernel};
use super::mma::operand_type;
use super::rows::vector_size;
use super::{contiguous, cubes, empty_like};
use crate::Precision;

mod kernel;

/// Whether the device has what [`product`] needs.
pub(super) fn supported<R: CubeRuntime>(client: &ComputeClient<R>, precision: Precision) -> bool {
    operand_type(client, precision).is_some()
}

/// Whether these matrices can be multiplied here to a result of so many columns: rows begin at whole vectors.
pub(super) fn fits<R: CubeRuntime>(operands: [&CubeTensor<R>; 2], columns: usize, precision: Precision) -> bool {
    let matrix = |tensor: &CubeTensor<R>| tensor.dtype != DType::F64 && tensor.shape()[1].is_multiple_of(8);
    supported(&operands[0].client, precision) && operands.into_iter().all(matrix) && columns.is_multiple_of(2)
}

/// As [`product`], added to a sum of which nobody else has a handle.
pub(super) fn add_product<R: CubeRuntime>(
    sum: Option<CubeTensor<R>>,
    (a, a_transposed): (CubeTensor<R>, bool),
    (b, b_transposed): (CubeTensor<R>, bool),
    precision: Precision,
    dtype: DType,
) -> CubeTensor<R> {
    let [a, b] = contiguous([a, b].map(|x| burn_cubecl::kernel::cast(x, precision.dtype())));
    let ([a_0, a_1], [b_0, b_1]) = (a.shape().dims(), b.shape().dims());
    let (rows, summed) = if a_transposed { (a_1, a_0) } else { (a_0, a_1) };
    let columns = if b_transposed { b_0 } else { b_1 };
    let row_layout = Layout { summed_inner: !a_transposed, side: TILE_ROWS };
    let column_layout =
        Layout { summed_inner: b_transposed, side: if columns <= 2 * SIDE { 2 * SIDE } else { 4 * SIDE } };
    let tiles = rows.div_ceil(row_layout.side) * columns.div_ceil(column_layout.side);
    let (splits, part) = split(tiles, summed, a.client.properties().hardware.num_streaming_multiprocessors);

    let client = a.client.clone();
    let shape = Shape::new([rows, columns]);
    let add = sum.is_some();
    let out = sum.unwrap_or_else(|| empty_like(&a, shape, dtype));
    let parts = match splits {
        1 => burn_cubecl::ops::reshape(out.clone(), Shape::new([1, rows, columns])),
        _ => empty_like(&a, Shape::new([splits, rows, columns]), DType::F32),
    };
    let units = row_layout.side / SIDE * (column_layout.side / SIDE) * 32;
    let dtypes = [a.dtype.into(), parts.dtype.into()];
    // SAFETY: the kernel reads nothing behind the operands' ends and writes nothing behind the result's.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            &client,
            cubes(tiles * splits),
            CubeDim::new_1d(units as u32),
            a.clone().into_tensor_arg(),
            b.into_tensor_arg(),
            parts.clone().into_tensor_arg(),
            summed,
            part,
            row_layout,
            column_layout,
            add && splits == 1,
            dtypes,
        );
    }
    if splits == 1 {
        return out;
    }
    // SAFETY: units behind the result's end do nothing.
    unsafe {
        let size = vector_size(rows * columns);
        add_parts_kernel::launch_unchecked::<R>(
            &client,
            cubes((rows * columns / size).div_ceil(256)),
            CubeDim::new_1d(256),
            size,
            parts.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            splits,
            add,
            out.dtype.into(),
        );
    }
    out
}

/// `a · b` of `a [rows, summed]` and `b [summed, columns]`, either also as its transpose; the result in a type of its own.
pub(super) fn product<R: CubeRuntime>(
    a: (CubeTensor<R>, bool),
    b: (CubeTensor<R>, bool),
    precision: Precision,
    dtype: DType,
) -> CubeTensor<R> {
    add_product(None, a, b, precision, dtype)
}

/// In how many parts a sum is made so that all multiprocessors have work, and how long each is: whole steps.
fn split(tiles: usize, summed: usize, multiprocessors: Option<u32>) -> (usize, usize) {
    // Shorter parts would spend their time on beginnings and ends.
    const SHORTEST: usize = 4 * DEPTH;
    let multiprocessors = multiprocessors.unwrap_or(1) as usize;
    // Time in tiles that a multiprocessor makes one after the other; a split costs its part's way through memory.
    let time = |splits: &usize| {
        let waves = (tiles * splits).div_ceil(multiprocessors) as f64;
        (1e6 * (waves / *splits as f64 + 0.02 * *splits as f64)) as usize
    };
    let most = (summed / SHORTEST).clamp(1, 16);
    let splits = (1..=most).min_by_key(time).unwrap_or(1);
    let part = summed.div_ceil(splits).next_multiple_of(DEPTH);
    (summed.div_ceil(part), part)
}

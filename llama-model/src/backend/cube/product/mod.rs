//! Matrix products on tensor cores, in bf16 or f16 with sums in f32.
//!
//! A cube makes a tile of the result, 128 rows × 256 columns, each of its planes 64 × 64 of it in registers. Both operands come through
//! shared memory in steps of 64 along the summed dimension, the next steps on their way while one is multiplied, and are read as they
//! lie: either dimension may be the contiguous one. Where the result has too few tiles for the device, as the gradient of a weight has,
//! the sum is split and its parts are added at the end, always in the same order. Hopper has a kernel of its own, [`wgmma`].

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::prelude::CubeDim;

use self::kernel::{DEPTH, Layout, SIDE, TILE_ROWS, add_parts_kernel, product_kernel};
use super::mma::operand_type;
use super::reduce::vector_size;
use super::{contiguous, cubes, empty_like};
use crate::Precision;

mod kernel;
mod wgmma;

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
    let operands = contiguous([a, b].map(|x| burn_cubecl::kernel::cast(x, precision.dtype())));
    let summed_inner = [!a_transposed, b_transposed];
    let ([a_0, a_1], [b_0, b_1]) = (operands[0].shape().dims(), operands[1].shape().dims());
    let (rows, summed) = if a_transposed { (a_1, a_0) } else { (a_0, a_1) };
    let columns = if b_transposed { b_0 } else { b_1 };
    let client = operands[0].client.clone();
    let add = sum.is_some();
    let out = sum.unwrap_or_else(|| empty_like(&operands[0], Shape::new([rows, columns]), dtype));
    let by_warp_groups = wgmma::supported(&client) && columns.is_multiple_of(8) && (!add || out.dtype == DType::F32);
    let plan = |tile_rows, tile_columns: &[_], at_once| {
        let size = [rows, columns, summed];
        tile_columns.iter().map(|&columns| Plan::new(size, [tile_rows, columns], at_once)).min_by_key(|plan| plan.time)
    };
    let plan = match by_warp_groups {
        true => plan(wgmma::PAIR_ROWS, &wgmma::TILE_COLUMNS, multiprocessors(&client) / 2),
        false => plan(TILE_ROWS, &[if columns <= 2 * SIDE { 2 * SIDE } else { 4 * SIDE }], multiprocessors(&client)),
    };
    let Plan { tile_columns, splits, part, .. } = plan.expect("there are tiles to choose from");
    let parts = match splits {
        1 => burn_cubecl::ops::reshape(out.clone(), Shape::new([1, rows, columns])),
        _ => empty_like(&operands[0], Shape::new([splits, rows, columns]), DType::F32),
    };
    let product = Product { operands, summed_inner, parts: parts.clone(), summed, part };
    match by_warp_groups {
        true => wgmma::launch(product, tile_columns, add && splits == 1),
        false => launch(product, tile_columns, add && splits == 1),
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

/// A product of operands in half precision, and the parts that it is to make.
struct Product<R: CubeRuntime> {
    operands: [CubeTensor<R>; 2],
    /// Whether the summed dimension is an operand's contiguous one.
    summed_inner: [bool; 2],
    /// `[splits, rows, columns]`.
    parts: CubeTensor<R>,
    summed: usize,
    /// Length of a part of the sum: whole steps.
    part: usize,
}

fn launch<R: CubeRuntime>(product: Product<R>, tile_columns: usize, add: bool) {
    let Product { operands: [a, b], summed_inner, parts, summed, part, .. } = product;
    let [splits, rows, columns] = parts.shape().dims();
    let layout = |i, side| Layout { summed_inner: summed_inner[i], side };
    let (row_layout, column_layout) = (layout(0, TILE_ROWS), layout(1, tile_columns));
    let tiles = rows.div_ceil(TILE_ROWS) * columns.div_ceil(tile_columns);
    let units = TILE_ROWS / SIDE * (tile_columns / SIDE) * 32;
    let (client, dtypes) = (a.client.clone(), [a.dtype.into(), parts.dtype.into()]);
    // SAFETY: the kernel reads nothing behind the operands' ends and writes nothing behind the result's.
    unsafe {
        product_kernel::launch_unchecked::<R>(
            &client,
            cubes(tiles * splits),
            CubeDim::new_1d(units as u32),
            a.into_tensor_arg(),
            b.into_tensor_arg(),
            parts.into_tensor_arg(),
            summed,
            part,
            row_layout,
            column_layout,
            add,
            dtypes,
        );
    }
}

fn multiprocessors<R: CubeRuntime>(client: &ComputeClient<R>) -> usize {
    client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
}

/// In how many parts a sum is made so that all multiprocessors have work, and how long each is: whole steps.
#[derive(Debug, PartialEq)]
struct Plan {
    tile_columns: usize,
    splits: usize,
    part: usize,
    /// An estimate, in columns of a tile times steps.
    time: usize,
}

impl Plan {
    /// The best for `[rows, columns, summed]` in such tiles, of which the device makes so many at once.
    fn new([rows, columns, summed]: [usize; 3], [tile_rows, tile_columns]: [usize; 2], at_once: usize) -> Self {
        // Shorter parts would spend their time on beginnings and ends, which take as long as these steps.
        const SHORTEST: usize = 4 * DEPTH;
        const ENDS: usize = 3;
        // What goes through memory in the time of a step of 256 columns: parts are written and read.
        const BYTES: usize = 2_000_000;
        let time = |splits: usize| {
            let tiles = rows.div_ceil(tile_rows) * columns.div_ceil(tile_columns) * splits;
            let steps = summed.div_ceil(splits).div_ceil(DEPTH) + ENDS;
            let adding = if splits > 1 { ENDS + splits * rows * columns * 8 / BYTES } else { 0 };
            tiles.div_ceil(at_once.max(1)) * steps * tile_columns + adding * 256
        };
        let most = (summed / SHORTEST).clamp(1, 16);
        let splits = (1..=most).min_by_key(|&splits| time(splits)).unwrap_or(1);
        let part = summed.div_ceil(splits).next_multiple_of(DEPTH);
        Self { tile_columns, splits: summed.div_ceil(part), part, time: time(splits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_split_where_tiles_are_few() {
        // Activations of 16,384 tokens: tiles enough.
        assert_eq!(Plan::new([16_384, 768, 768], [128, 256], 132).splits, 1);
        // The gradient of a weight: 18 tiles for 132 multiprocessors; parts are whole steps and make up the sum.
        let plan = Plan::new([768, 768, 16_384], [128, 256], 132);
        assert!(plan.splits > 1 && plan.part.is_multiple_of(DEPTH));
        assert!((plan.splits - 1) * plan.part < 16_384 && plan.splits * plan.part >= 16_384);
        // A short sum stays whole.
        assert_eq!(Plan::new([64, 64, 96], [128, 256], 132).splits, 1);
    }
}

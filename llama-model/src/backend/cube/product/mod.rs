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
use super::elementwise::cast;
use super::hopper;
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

/// A factor of a product: a matrix, and whether its transpose is meant.
pub(super) type Factor<R> = (CubeTensor<R>, bool);

/// `a · b` of `a [rows, summed]` and `b [summed, columns]`; the result in a type of its own.
pub(super) fn product<R: CubeRuntime>(a: Factor<R>, b: Factor<R>, precision: Precision, dtype: DType) -> CubeTensor<R> {
    sum_of_products(vec![[a, b]], precision, dtype)
}

/// As [`product`], added to a sum in f32 of which nobody else has a handle.
pub(super) fn add_product<R: CubeRuntime>(
    sum: Option<CubeTensor<R>>,
    a: Factor<R>,
    b: Factor<R>,
    precision: Precision,
) -> CubeTensor<R> {
    let Some(sum) = sum else { return product(a, b, precision, DType::F32) };
    multiply(vec![Product::new([a, b], precision)], vec![sum.clone()], true);
    sum
}

/// Some products, all summed over one dimension, in one go where the device can.
pub(super) fn products<R: CubeRuntime>(
    pairs: Vec<[Factor<R>; 2]>,
    precision: Precision,
    dtype: DType,
) -> Vec<CubeTensor<R>> {
    let mut results = Vec::new();
    for products in groups(pairs, precision) {
        let outs: Vec<_> = products.iter().map(|product| product.room(dtype)).collect();
        multiply(products, outs.clone(), false);
        results.extend(outs);
    }
    results
}

/// The sum of some products of one shape, in one go where the device can, rounded once.
pub(super) fn sum_of_products<R: CubeRuntime>(
    pairs: Vec<[Factor<R>; 2]>,
    precision: Precision,
    dtype: DType,
) -> CubeTensor<R> {
    let groups = groups(pairs, precision);
    let sum_dtype = if groups.len() == 1 { dtype } else { DType::F32 };
    let sum = groups.into_iter().fold(None, |sum: Option<CubeTensor<R>>, products| {
        let add = sum.is_some();
        let sum = sum.unwrap_or_else(|| products[0].room(sum_dtype));
        multiply(products, vec![sum.clone()], add);
        Some(sum)
    });
    cast(sum.expect("a sum has products"), dtype)
}

/// Products that are made in one go.
fn groups<R: CubeRuntime>(pairs: Vec<[Factor<R>; 2]>, precision: Precision) -> Vec<Vec<Product<R>>> {
    let products: Vec<_> = pairs.into_iter().map(|factors| Product::new(factors, precision)).collect();
    let together = products.iter().all(Product::fits_warp_groups);
    let most = if together { wgmma::MOST } else { 1 };
    let mut groups = Vec::new();
    for (index, product) in products.into_iter().enumerate() {
        if index % most == 0 {
            groups.push(Vec::new());
        }
        groups.last_mut().expect("a group was begun").push(product);
    }
    groups
}

/// A product of operands in half precision.
struct Product<R: CubeRuntime> {
    operands: [CubeTensor<R>; 2],
    /// Whether the summed dimension is an operand's contiguous one.
    summed_inner: [bool; 2],
    /// Rows and columns of the result, and length of the sum.
    size: [usize; 3],
}

impl<R: CubeRuntime> Product<R> {
    fn new([(a, a_transposed), (b, b_transposed)]: [Factor<R>; 2], precision: Precision) -> Self {
        let operands = contiguous([a, b].map(|x| cast(x, precision.dtype())));
        let ([a_0, a_1], [b_0, b_1]) = (operands[0].shape().dims(), operands[1].shape().dims());
        let (rows, summed) = if a_transposed { (a_1, a_0) } else { (a_0, a_1) };
        let columns = if b_transposed { b_0 } else { b_1 };
        Self { operands, summed_inner: [!a_transposed, b_transposed], size: [rows, columns, summed] }
    }

    /// Where its result may lie.
    fn room(&self, dtype: DType) -> CubeTensor<R> {
        let [rows, columns, _] = self.size;
        empty_like(&self.operands[0], Shape::new([rows, columns]), dtype)
    }

    fn fits_warp_groups(&self) -> bool {
        hopper::supported(&self.operands[0].client) && self.size[1].is_multiple_of(8)
    }
}

/// Writes each product to a result of its own, or their sum to one, or with `add` adds it to what lies there.
fn multiply<R: CubeRuntime>(products: Vec<Product<R>>, outs: Vec<CubeTensor<R>>, add: bool) {
    let client = outs[0].client.clone();
    let sizes: Vec<_> = products.iter().map(|product| product.size).collect();
    let sum = outs.len() < products.len();
    let by_warp_groups = products.iter().all(Product::fits_warp_groups) && (!add || outs[0].dtype == DType::F32);
    let columns = sizes[0][1];
    let (tile_rows, tile_columns, at_once) = match by_warp_groups {
        true => (wgmma::PAIR_ROWS, wgmma::TILE_COLUMNS.to_vec(), multiprocessors(&client) / 2),
        false => (TILE_ROWS, vec![if columns <= 2 * SIDE { 2 * SIDE } else { 4 * SIDE }], multiprocessors(&client)),
    };
    let plans = tile_columns.iter().map(|&columns| Plan::new(&sizes, sum, [tile_rows, columns], at_once));
    let plan = plans.min_by_key(|plan| plan.time).expect("there are tiles to choose from");
    let parts: Vec<_> = outs
        .iter()
        .zip(&sizes)
        .map(|(out, &[rows, columns, _])| match plan.splits {
            1 => burn_cubecl::ops::reshape(out.clone(), Shape::new([1, rows, columns])),
            splits => empty_like(out, Shape::new([splits, rows, columns]), DType::F32),
        })
        .collect();
    let add_to_parts = add && plan.splits == 1;
    match by_warp_groups {
        true => wgmma::launch(products, parts.clone(), &plan, add_to_parts),
        false => {
            products.into_iter().zip(&parts).for_each(|(product, parts)| launch(product, parts, &plan, add_to_parts))
        }
    }
    if plan.splits > 1 {
        parts.into_iter().zip(outs).for_each(|(parts, out)| add_parts(parts, out, add));
    }
}

/// Sums the parts `[splits, rows, columns]` of a product.
fn add_parts<R: CubeRuntime>(parts: CubeTensor<R>, out: CubeTensor<R>, add: bool) {
    let [splits, rows, columns] = parts.shape().dims();
    let size = vector_size(rows * columns);
    let (client, dtype) = (out.client.clone(), out.dtype.into());
    // SAFETY: units behind the result's end do nothing.
    unsafe {
        add_parts_kernel::launch_unchecked::<R>(
            &client,
            cubes((rows * columns / size).div_ceil(256)),
            CubeDim::new_1d(256),
            size,
            parts.into_array_arg(),
            out.into_array_arg(),
            splits,
            add,
            dtype,
        );
    }
}

fn launch<R: CubeRuntime>(product: Product<R>, parts: &CubeTensor<R>, plan: &Plan, add: bool) {
    let Product { operands: [a, b], summed_inner, size: [rows, columns, summed] } = product;
    let &Plan { tile_columns, splits, part, .. } = plan;
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
            a.into_array_arg(),
            b.into_array_arg(),
            parts.clone().into_array_arg(),
            rows,
            columns,
            summed,
            splits,
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
    /// The best for products of `[rows, columns, summed]`, or for their sum, in such tiles, of which the device makes so many at once.
    fn new(sizes: &[[usize; 3]], sum: bool, [tile_rows, tile_columns]: [usize; 2], at_once: usize) -> Self {
        // Shorter parts would spend their time on beginnings and ends, which take as long as these steps.
        const SHORTEST: usize = 4 * DEPTH;
        const ENDS: usize = 3;
        // What goes through memory in the time of a step of 256 columns: parts are written and read.
        const BYTES: usize = 2_000_000;
        let results = if sum { &sizes[..1] } else { sizes };
        let longest = sizes.iter().map(|[_, _, summed]| *summed).max().unwrap_or(0);
        let time = |splits: usize| {
            let tiles = |&[rows, columns, _]: &[usize; 3]| rows.div_ceil(tile_rows) * columns.div_ceil(tile_columns);
            let tiles = results.iter().map(tiles).sum::<usize>() * splits;
            let steps = match sum {
                true => sizes.iter().map(|[_, _, summed]| summed.div_ceil(DEPTH)).sum(),
                false => longest.div_ceil(splits).div_ceil(DEPTH),
            };
            let elements: usize = results.iter().map(|[rows, columns, _]| rows * columns).sum();
            let adding = if splits > 1 { ENDS + splits * elements * 8 / BYTES } else { 0 };
            tiles.div_ceil(at_once.max(1)) * (steps + ENDS) * tile_columns + adding * 256
        };
        // A sum of several products is long as it is.
        let most = if sum { 1 } else { (longest / SHORTEST).clamp(1, 16) };
        let splits = (1..=most).min_by_key(|&splits| time(splits)).unwrap_or(1);
        let part = longest.div_ceil(splits).next_multiple_of(DEPTH);
        Self { tile_columns, splits: longest.div_ceil(part), part, time: time(splits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_split_where_tiles_are_few() {
        // Activations of 16,384 tokens: tiles enough.
        assert_eq!(Plan::new(&[[16_384, 768, 768]], false, [128, 256], 132).splits, 1);
        // The gradient of a weight: 18 tiles for 132 multiprocessors; parts are whole steps and make up the sum.
        let plan = Plan::new(&[[768, 768, 16_384]], false, [128, 256], 132);
        assert!(plan.splits > 1 && plan.part.is_multiple_of(DEPTH));
        assert!((plan.splits - 1) * plan.part < 16_384 && plan.splits * plan.part >= 16_384);
        // A short sum stays whole.
        assert_eq!(Plan::new(&[[64, 64, 96]], false, [128, 256], 132).splits, 1);
    }
}

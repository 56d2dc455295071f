//! Matrix products on tensor cores, in bf16 or f16 with sums in f32.
//!
//! A cube makes a tile of the result, 128 rows × 256 columns, each of its planes 64 × 64 of it in registers. Both operands come through
//! shared memory in steps of 32 along the summed dimension, the next steps on their way while one is multiplied, and are read as they
//! lie: either dimension may be the contiguous one. Where the result has too few tiles for the device, as the gradient of a weight has,
//! the sum is split and its parts are added at the end, always in the same order.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::ComputeClient;
use cubecl::cmma::MmaDefinition;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::barrier::{Barrier, copy_async_checked};
use cubecl::prelude::*;

use super::mma::{Eight, Fragment, Pair, Sums, WIDTH, fragment, half, operand_type, zeros};
use super::{contiguous, cubes, empty_like};
use crate::Precision;

/// Values along the summed dimension that a step multiplies.
const DEPTH: usize = 32;
/// Steps in shared memory.
const STAGES: usize = 4;
/// Side of a plane's square of the result.
const SIDE: usize = 64;
const TILE_ROWS: usize = 2 * SIDE;
/// Row tiles whose columns are done together, so that what they read stays in the cache.
const GROUP: usize = 16;

/// An operand of a product and how it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Whether the summed dimension is the contiguous one.
    summed_inner: bool,
    /// Rows or columns of the result in a tile.
    side: usize,
}

impl Layout {
    /// Lines of a tile in shared memory, and vectors of each.
    fn tile(self) -> (usize, usize) {
        if self.summed_inner { (self.side, DEPTH / 8) } else { (DEPTH, self.side / 8) }
    }

    /// Vectors from a line to the next: one more than it has, so that eight lines lie in different banks.
    fn pitch(self) -> usize {
        self.tile().1 + 1
    }

    /// Vectors of a step in shared memory.
    fn step(self) -> usize {
        self.tile().0 * self.pitch()
    }
}

/// Begins to copy a tile, zeros behind the operand's end.
#[cube]
fn copy<E: Float>(
    from: &Tensor<Vector<E, Eight>>,
    to: &mut SharedMemory<Vector<E, Eight>>,
    side: usize,
    summed: usize,
    #[comptime] base: usize,
    #[comptime] units: usize,
    #[comptime] layout: Layout,
) {
    let (lines, vectors) = comptime!(layout.tile());
    let line_length = from.shape(1) / 8;
    let mut first_line = summed;
    let mut first_vector = side / 8;
    if comptime!(layout.summed_inner) {
        first_line = side;
        first_vector = summed / 8;
    }
    #[unroll]
    for step in 0..comptime!(lines * vectors / units) {
        let index = step * units + UNIT_POS as usize;
        let line = first_line + index / vectors;
        let vector = first_vector + index % vectors;
        let inside = line < from.shape(0) && vector < line_length;
        let start = select(inside, line * line_length + vector, 0);
        let source = from.slice(start, start + usize::cast_from(inside));
        let at = comptime!(base) + index / vectors * comptime!(layout.pitch()) + index % vectors;
        copy_async_checked(&source, &mut to.slice_mut(at, at + 1), 8u32);
    }
}

/// 16 × 16 values of a tile: from `side` on of the result's rows or columns, from `summed` on of the step. The first two of its squares
/// follow each other along the side if `side_first`, as a left operand has them, else along the sum, as two right operands have them.
#[cube]
fn square<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, Eight>>,
    side: usize,
    #[comptime] base: usize,
    #[comptime] summed: usize,
    #[comptime] side_first: bool,
    #[comptime] layout: Layout,
) -> Fragment<E> {
    let lane = UNIT_POS_PLANE as usize;
    let pitch = comptime!(layout.pitch());
    let mut at = comptime!(base + summed / 8) + side * pitch;
    if comptime!(!layout.summed_inner) {
        at = comptime!(base + summed * layout.pitch()) + side / 8;
    }
    // The first two squares are one below the other in lines, or side by side.
    if comptime!(layout.summed_inner == side_first) {
        at += lane % 16 * pitch + lane / 16;
    } else {
        at += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2;
    }
    fragment(definition, tile, at, comptime!(!layout.summed_inner))
}

#[cube(launch_unchecked)]
fn product_kernel<E: Float, O: Float>(
    a: &Tensor<Vector<E, Eight>>,
    b: &Tensor<Vector<E, Eight>>,
    out: &mut Tensor<Vector<O, Pair>>,
    summed: usize,
    part: usize,
    #[comptime] rows: Layout,
    #[comptime] columns: Layout,
    #[define(E, O)] _dtypes: [StorageType; 2],
) {
    let units = comptime!(rows.side / SIDE * (columns.side / SIDE) * 32);
    let n_rows = out.shape(1);
    let n_columns = out.shape(2);
    let row_tiles = n_rows.div_ceil(rows.side);
    let column_tiles = n_columns.div_ceil(columns.side);
    let split = CUBE_POS / (row_tiles * column_tiles);
    if split >= out.shape(0) {
        terminate!();
    }
    let tile = CUBE_POS % (row_tiles * column_tiles);
    let group = tile / (GROUP * column_tiles);
    let group_rows = min(row_tiles - group * GROUP, GROUP);
    let first_row = (group * GROUP + tile % (GROUP * column_tiles) % group_rows) * rows.side;
    let first_column = tile % (GROUP * column_tiles) / group_rows * columns.side;
    let begin = split * part;
    let steps = (min(begin + part, summed) - begin).div_ceil(DEPTH);

    let plane = UNIT_POS as usize / 32;
    let planes_across = comptime!(columns.side / SIDE);
    let row = plane / planes_across * SIDE;
    let column = plane % planes_across * SIDE;

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut a_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(STAGES * rows.step()), 16usize);
    let mut b_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(STAGES * columns.step()), 16usize);
    let mut arrived = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for stage in 0..STAGES {
        arrived.push(Barrier::shared(CUBE_DIM, UNIT_POS == 0));
        if stage < comptime!(STAGES - 1) && stage < steps {
            let at = begin + stage * DEPTH;
            copy(a, &mut a_tile, first_row, at, comptime!(stage * rows.step()), units, rows);
            copy(b, &mut b_tile, first_column, at, comptime!(stage * columns.step()), units, columns);
            arrived.index(stage).commit_copy_async();
            arrived.index(stage).arrive();
        }
    }

    let mut results = Sequence::<Sequence<Sums>>::new();
    #[unroll]
    for _ in 0..comptime!(SIDE / 16) {
        results.push(zeros(SIDE));
    }
    for round in 0..steps.div_ceil(STAGES) {
        #[unroll]
        for stage in 0..STAGES {
            let step = round * STAGES + stage;
            if step < steps {
                arrived.index(stage).wait_parity(round as u32 % 2);
                // All have multiplied the step before, whose place is filled next.
                sync_cube();
                let next = step + comptime!(STAGES - 1);
                let place = comptime!((stage + STAGES - 1) % STAGES);
                if next < steps {
                    let at = begin + next * DEPTH;
                    copy(a, &mut a_tile, first_row, at, comptime!(place * rows.step()), units, rows);
                    copy(b, &mut b_tile, first_column, at, comptime!(place * columns.step()), units, columns);
                    arrived.index(place).commit_copy_async();
                    arrived.index(place).arrive();
                }
                #[unroll]
                for depth in 0..comptime!(DEPTH / 16) {
                    let mut left = Sequence::<Fragment<E>>::new();
                    #[unroll]
                    for i in 0..comptime!(SIDE / 16) {
                        let base = comptime!(stage * rows.step());
                        left.push(square(&definition, &a_tile, row + i * 16, base, comptime!(depth * 16), true, rows));
                    }
                    #[unroll]
                    for j in 0..comptime!(SIDE / 16) {
                        let base = comptime!(stage * columns.step());
                        let right =
                            square(&definition, &b_tile, column + j * 16, base, comptime!(depth * 16), false, columns);
                        let (first, second) = (half(&right, 0usize, 1usize), half(&right, 2usize, 3usize));
                        #[unroll]
                        for i in 0..comptime!(SIDE / 16) {
                            let sums = results.index_mut(i);
                            definition.execute_inplace(left.index(i), &first, sums.index_mut(comptime!(2 * j)));
                            definition.execute_inplace(left.index(i), &second, sums.index_mut(comptime!(2 * j + 1)));
                        }
                    }
                }
            }
        }
    }

    let row = first_row + row + UNIT_POS_PLANE as usize / 4;
    let column = first_column + column + UNIT_POS_PLANE as usize % 4 * 2;
    #[unroll]
    for i in 0..comptime!(SIDE / 16) {
        let sums = results.index(i);
        #[unroll]
        for which in 0..2usize {
            let row = row + i * 16 + which * 8;
            #[unroll]
            for j in 0..comptime!(SIDE / WIDTH) {
                let column = column + j * WIDTH;
                if row < n_rows && column < n_columns {
                    let sum = sums.index(j)[which];
                    out[((split * n_rows + row) * n_columns + column) / 2] = Vector::cast_from(sum);
                }
            }
        }
    }
}

#[cube(launch_unchecked)]
fn add_parts_kernel<O: Float>(
    parts: &Tensor<Vector<f32, Pair>>,
    out: &mut Tensor<Vector<O, Pair>>,
    #[define(O)] _dtype: StorageType,
) {
    let length = parts.shape(1) * parts.shape(2) / 2;
    if ABSOLUTE_POS < length {
        let mut sum = parts[ABSOLUTE_POS];
        for part in 1..parts.shape(0) {
            sum += parts[part * length + ABSOLUTE_POS];
        }
        out[ABSOLUTE_POS] = Vector::cast_from(sum);
    }
}

/// Whether the device has what [`product`] needs.
pub(super) fn supported<R: CubeRuntime>(client: &ComputeClient<R>, precision: Precision) -> bool {
    client.properties().features.copy_async && operand_type(client, precision).is_some()
}

/// Whether these matrices can be multiplied here to a result of so many columns: rows begin at whole vectors.
pub(super) fn fits<R: CubeRuntime>(operands: [&CubeTensor<R>; 2], columns: usize, precision: Precision) -> bool {
    let matrix = |tensor: &CubeTensor<R>| tensor.dtype != DType::F64 && tensor.shape()[1].is_multiple_of(8);
    supported(&operands[0].client, precision) && operands.into_iter().all(matrix) && columns.is_multiple_of(2)
}

/// `a · b` of `a [rows, summed]` and `b [summed, columns]`, either also as its transpose; the result in a type of its own.
pub(super) fn product<R: CubeRuntime>(
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
    let parts = empty_like(&a, Shape::new([splits, rows, columns]), if splits == 1 { dtype } else { DType::F32 });
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
            dtypes,
        );
    }
    let shape = Shape::new([rows, columns]);
    if splits == 1 {
        return burn_cubecl::ops::reshape(parts, shape);
    }
    let out = empty_like(&a, shape, dtype);
    // SAFETY: units behind the result's end do nothing.
    unsafe {
        add_parts_kernel::launch_unchecked::<R>(
            &client,
            cubes((rows * columns / 2).div_ceil(256)),
            CubeDim::new_1d(256),
            parts.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            dtype.into(),
        );
    }
    out
}

/// In how many parts a sum is made so that all multiprocessors have work, and how long each is: whole steps.
fn split(tiles: usize, summed: usize, multiprocessors: Option<u32>) -> (usize, usize) {
    // Shorter parts would spend their time on beginnings and ends.
    const SHORTEST: usize = 8 * DEPTH;
    let wanted = multiprocessors.unwrap_or(1) as usize / tiles;
    let splits = wanted.min(summed / SHORTEST).max(1);
    let part = summed.div_ceil(splits).next_multiple_of(DEPTH);
    (summed.div_ceil(part), part)
}

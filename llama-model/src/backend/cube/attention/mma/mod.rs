//! The same three kernels on tensor cores, in bf16 or f16 with sums in f32: products by the instruction `mma` of 16 × 8 × 16, whose
//! operands lie in registers in a known order, so that scores become weights, and weights an operand, without leaving them.
//!
//! A cube of four planes has 64 rows, a plane 16 of them: of queries, or of keys in the gradients of keys and values. What its rows are
//! multiplied with passes through shared memory, 64 rows at a time, of which the next are on their way while one tile is multiplied.

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::MmaDefinition;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::barrier::{Barrier, copy_async_checked};
use cubecl::prelude::*;

use super::super::mma::{Eight, Fragment, Pair, Sums, WIDTH, fragment, half, operand_type, zeros};
use super::{MASKED, Sizes, SizesLaunch, contiguous, cubes, empty_like, first_key, starts_or_none};
use crate::Precision;

mod backward;
mod forward;

pub(in crate::backend::cube) use backward::backward;
pub(in crate::backend::cube) use forward::forward;

/// Rows of a plane, and the depth of an instruction.
const ROWS: usize = 16;
const PLANES: usize = 4;
/// Rows of a cube, and of a tile in shared memory.
const TILE: usize = ROWS * PLANES;
const UNITS: usize = 32 * PLANES;
/// Operands that are on their way from shared memory.
const AHEAD: usize = 2;
/// Widest head: its results stay in registers.
const MAX_HEAD_DIM: usize = 128;

/// The operands' type, if the device's tensor cores take it, the tensors (queries first) are of one type and heads have a fitting width.
pub(in crate::backend::cube) fn operand<R: CubeRuntime>(
    tensors: &[&CubeTensor<R>],
    precision: Precision,
) -> Option<StorageType> {
    let q = tensors[0];
    let [_, _, _, head_dim] = q.shape().dims();
    let fits = head_dim.is_multiple_of(ROWS) && head_dim <= MAX_HEAD_DIM;
    let alike = q.dtype != DType::F64 && tensors.iter().all(|tensor| tensor.dtype == q.dtype);
    operand_type(&q.client, precision).filter(|_| fits && alike)
}

/// Vectors between rows in shared memory: one more than a row has, so that eight rows lie in different banks.
fn pitch(head_dim: usize) -> usize {
    head_dim / 8 + 1
}

/// Begins to copy the 64 positions of a head from `start` on to as many rows of a tile, zeros behind the end: on its way past the
/// units if it is `stored` as operands are, else rounded by them. It is there when all units have [`arrive`]d.
#[cube]
fn load<F: Float, E: Float>(
    from: &Array<Vector<F, Eight>>,
    to: &mut SharedMemory<Vector<E, Eight>>,
    first_row: usize,
    batch: usize,
    start: usize,
    head: usize,
    shape: (usize, usize),
    #[comptime] head_dim: usize,
    #[comptime] stored: bool,
) {
    let (len, heads) = shape;
    let vectors = comptime!(head_dim / 8);
    #[unroll]
    for step in 0..comptime!(TILE * head_dim / 8 / UNITS) {
        let index = step * UNITS + UNIT_POS as usize;
        let row = index / vectors;
        let column = index % vectors;
        let inside = start + row < len;
        let at = ((batch * len + start + row) * heads + head) * vectors + column;
        let place = (first_row + row) * comptime!(pitch(head_dim)) + column;
        if comptime!(stored) {
            let at = select(inside, at, 0);
            let source = from.slice(at, at + usize::cast_from(inside)).downcast::<Vector<E, Eight>>();
            copy_async_checked(&source, &mut to.slice_mut(place, place + 1), 8u32);
        } else {
            let mut value = Vector::<E, Eight>::cast_from(0.0f32);
            if inside {
                value = Vector::cast_from(from[at]);
            }
            to[place] = value;
        }
    }
}

/// Tells a barrier that this unit has begun all its copies.
#[cube]
fn arrive(barrier: &Barrier, #[comptime] stored: bool) {
    if comptime!(stored) {
        barrier.commit_copy_async();
    }
    barrier.arrive();
}

/// The 16 × 16 values of a tile at a row and a column, the latter in vectors.
#[cube]
fn square<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    column: usize,
    #[comptime] head_dim: usize,
    #[comptime] transposed: bool,
) -> Fragment<E> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % ROWS) * comptime!(pitch(head_dim)) + column + lane / ROWS;
    fragment(definition, tile, at, transposed)
}

/// A plane's 16 rows of a tile, all of their width, as left operands.
#[cube]
fn rows_of<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    #[comptime] head_dim: usize,
) -> Sequence<Fragment<E>> {
    let mut rows = Sequence::<Fragment<E>>::new();
    #[unroll]
    for part in 0..comptime!(head_dim / ROWS) {
        rows.push(square(definition, tile, row, part * 2, head_dim, false));
    }
    rows
}

/// Products of a plane's rows with `blocks` times 16 rows of a tile: two sums for each block.
#[cube]
fn scores<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    rows: &Sequence<Fragment<E>>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    #[comptime] blocks: usize,
    #[comptime] head_dim: usize,
) -> Sequence<Sums> {
    let parts = comptime!(head_dim / ROWS);
    let mut sums = zeros(comptime!(blocks * ROWS));
    // Operands are read from shared memory before the products that precede theirs, which hide the wait.
    let mut squares = Sequence::<Fragment<E>>::new();
    #[unroll]
    for step in 0..comptime!((parts + 1) * blocks) {
        let (part, block) = comptime!((step / blocks, step % blocks));
        if comptime!(part < parts) {
            squares.push(square(definition, tile, row + block * ROWS, part * 2, head_dim, false));
        }
        if comptime!(step >= blocks) {
            let square = squares.index(comptime!(step - blocks));
            let left = rows.index(comptime!(part - 1));
            definition.execute_inplace(left, &half(square, 0usize, 2usize), sums.index_mut(comptime!(2 * block)));
            definition.execute_inplace(left, &half(square, 1usize, 3usize), sums.index_mut(comptime!(2 * block + 1)));
        }
    }
    sums
}

/// The sums of a block, 16 × 16, rounded, as a left operand.
#[cube]
fn rounded<E: Float>(sums: &Sequence<Sums>, #[comptime] block: usize) -> Fragment<E> {
    let mut left = Array::<Vector<E, Pair>>::new(4usize);
    #[unroll]
    for part in 0..4usize {
        let from = sums.index(comptime!(2 * block + part / 2));
        left[part] = Vector::cast_from(from[comptime!(part % 2)]);
    }
    left
}

/// Adds to a plane's results the products of `blocks` left operands with as many times 16 rows of a tile.
#[cube]
fn accumulate<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    sums: &Sequence<Sums>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    results: &mut Sequence<Sums>,
    #[comptime] blocks: usize,
    #[comptime] head_dim: usize,
) {
    let parts = comptime!(head_dim / ROWS);
    let mut left = Sequence::<Fragment<E>>::new();
    #[unroll]
    for block in 0..blocks {
        left.push(rounded(sums, block));
    }
    // As above, two operands ahead.
    let mut squares = Sequence::<Fragment<E>>::new();
    #[unroll]
    for step in 0..comptime!(blocks * parts + AHEAD) {
        if comptime!(step < blocks * parts) {
            let (block, part) = comptime!((step / parts, step % parts));
            squares.push(square(definition, tile, row + block * ROWS, part * 2, head_dim, true));
        }
        if comptime!(step >= AHEAD) {
            let (block, part) = comptime!(((step - AHEAD) / parts, (step - AHEAD) % parts));
            let square = squares.index(comptime!(step - AHEAD));
            let left = left.index(block);
            definition.execute_inplace(left, &half(square, 0usize, 1usize), results.index_mut(comptime!(2 * part)));
            definition.execute_inplace(left, &half(square, 2usize, 3usize), results.index_mut(comptime!(2 * part + 1)));
        }
    }
}

/// Writes one of a unit's two rows of results, times a factor.
#[cube]
fn store<F: Float>(
    results: &Sequence<Sums>,
    to: &mut Array<Vector<F, Pair>>,
    base: usize,
    factor: f32,
    #[comptime] which: usize,
    #[comptime] head_dim: usize,
) {
    let column = UNIT_POS_PLANE as usize % 4;
    #[unroll]
    for part in 0..comptime!(head_dim / WIDTH) {
        let sums = results.index(part);
        to[base / 2 + part * 4 + column] = Vector::cast_from(sums[which] * Vector::cast_from(factor));
    }
}

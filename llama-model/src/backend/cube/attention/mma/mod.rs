//! The same three kernels on tensor cores, in bf16 or f16 with sums in f32: products by the instruction `mma` of 16 × 8 × 16, whose
//! operands lie in registers in a known order, so that scores become weights, and weights an operand, without leaving them.
//!
//! A cube of four planes has 64 rows, a plane 16 of them: of queries, or of keys in the gradients of keys and values. What its rows are
//! multiplied with passes through shared memory, 64 rows at a time, rounded there to the operands' type.

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::MmaDefinition;
use cubecl::cube;
use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::super::mma::{Eight, Fragment, Pair, Sums, WIDTH, fragment, half, operand_type, zeros};
use super::{MASKED, contiguous, cubes, empty_like, first_key, starts_or_none};
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

/// Copies the 64 positions of a head from `start` on, zeros behind the end.
#[cube]
fn load<F: Float, E: Float>(
    from: &Tensor<Vector<F, Eight>>,
    to: &mut SharedMemory<Vector<E, Eight>>,
    batch: usize,
    start: usize,
    head: usize,
    #[comptime] head_dim: usize,
) {
    let len = from.shape(1);
    let heads = from.shape(2);
    let vectors = comptime!(head_dim / 8);
    #[unroll]
    for step in 0..comptime!(TILE * head_dim / 8 / UNITS) {
        let index = step * UNITS + UNIT_POS as usize;
        let row = index / vectors;
        let column = index % vectors;
        let mut value = Vector::<E, Eight>::cast_from(0.0f32);
        if start + row < len {
            value = Vector::cast_from(from[((batch * len + start + row) * heads + head) * vectors + column]);
        }
        to[row * comptime!(pitch(head_dim)) + column] = value;
    }
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

/// Products of a plane's rows with 16 rows of a tile: 16 × 16 sums.
#[cube]
fn scores<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    rows: &Sequence<Fragment<E>>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    #[comptime] head_dim: usize,
) -> Sequence<Sums> {
    let mut sums = zeros(ROWS);
    #[unroll]
    for part in 0..comptime!(head_dim / ROWS) {
        let square = square(definition, tile, row, part * 2, head_dim, false);
        let left = rows.index(part);
        definition.execute_inplace(left, &half(&square, 0usize, 2usize), sums.index_mut(0usize));
        definition.execute_inplace(left, &half(&square, 1usize, 3usize), sums.index_mut(1usize));
    }
    sums
}

/// 16 × 16 sums, rounded, as a left operand.
#[cube]
fn rounded<E: Float>(sums: &Sequence<Sums>) -> Fragment<E> {
    let mut left = Array::<Vector<E, Pair>>::new(4usize);
    #[unroll]
    for part in 0..4usize {
        let from = sums.index(comptime!(part / 2));
        left[part] = Vector::cast_from(from[comptime!(part % 2)]);
    }
    left
}

/// Adds to a plane's results the product of 16 × 16 values with 16 rows of a tile.
#[cube]
fn accumulate<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    left: &Fragment<E>,
    tile: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    results: &mut Sequence<Sums>,
    #[comptime] head_dim: usize,
) {
    #[unroll]
    for part in 0..comptime!(head_dim / ROWS) {
        let square = square(definition, tile, row, part * 2, head_dim, true);
        definition.execute_inplace(left, &half(&square, 0usize, 1usize), results.index_mut(comptime!(2 * part)));
        definition.execute_inplace(left, &half(&square, 2usize, 3usize), results.index_mut(comptime!(2 * part + 1)));
    }
}

/// Writes one of a unit's two rows of results, times a factor.
#[cube]
fn store<F: Float>(
    results: &Sequence<Sums>,
    to: &mut Tensor<Vector<F, Pair>>,
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

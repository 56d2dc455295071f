//! Causal attention in tiles (FlashAttention-2; Dao, 2023): online softmax, scores only in shared memory, tiles above the diagonal
//! never computed, log-sum-exp out; the backward computes the weights again, in one pass for `dQ` and one for `dK` and `dV`.
//!
//! A cube of 8 × 8 units has a tile of `tile` queries (or keys); each unit has `tile / 8` rows of the scores and of the result in
//! registers. Rows in shared memory are one value longer than a head, so that units that read one column do not meet in a bank.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{contiguous, cubes, empty_like};

mod backward;
mod forward;
pub(super) mod mma;
pub(super) mod wgmma;

pub(super) use backward::backward;
pub(super) use forward::forward;

/// Units along each side of a cube.
const SIDE: usize = 8;
const UNITS: usize = SIDE * SIDE;
/// Values of a result that a unit holds in registers, at most.
const MAX_REGISTERS: usize = 32;
/// Score of a masked pair: finite, because not every shader language has infinities.
pub(super) const MASKED: f32 = -1e30;

/// Shapes of a call.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    batch: usize,
    q_len: usize,
    kv_len: usize,
    heads: usize,
    kv_heads: usize,
}

/// Shared memory of the forward.
pub(super) fn forward_bytes(tile: usize, head_dim: usize) -> usize {
    4 * (2 * tile * (head_dim + 1) + tile * (tile + 1) + tile * SIDE)
}

/// Shared memory of each kernel of the backward.
pub(super) fn backward_bytes(tile: usize, head_dim: usize) -> usize {
    4 * (4 * tile * (head_dim + 1) + 2 * tile * (tile + 1))
}

/// The largest tile the device has room for; none for heads that units cannot share evenly, or too wide for any.
pub(super) fn tile<R: CubeRuntime>(q: &CubeTensor<R>, bytes: impl Fn(usize, usize) -> usize) -> Option<usize> {
    let [_, _, _, head_dim] = q.shape().dims();
    let room = q.client.properties().hardware.max_shared_memory_size;
    let fits = |tile: &usize| bytes(*tile, head_dim) <= room && tile * head_dim <= MAX_REGISTERS * UNITS;
    [32, 16, 8].into_iter().find(fits).filter(|_| head_dim.is_multiple_of(SIDE))
}

/// Copies `tile` positions of a head from `start` on, zeros behind the end.
#[cube]
fn load<F: Float>(
    from: &Array<F>,
    to: &mut SharedMemory<f32>,
    batch: usize,
    start: usize,
    head: usize,
    shape: (usize, usize),
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
) {
    let (len, heads) = shape;
    let mut index = UNIT_POS as usize;
    while index < comptime!(tile * head_dim) {
        let row = index / head_dim;
        let column = index % head_dim;
        let mut value = f32::new(0.0);
        if start + row < len {
            value = f32::cast_from(from[((batch * len + start + row) * heads + head) * head_dim + column]);
        }
        to[row * comptime!(head_dim + 1) + column] = value;
        index += UNITS;
    }
}

/// Products of this unit's rows of `a` with its columns' rows of `b`: `[side, side]`.
#[cube]
fn scores(
    a: &SharedMemory<f32>,
    b: &SharedMemory<f32>,
    to: &mut Array<f32>,
    #[comptime] side: usize,
    #[comptime] head_dim: usize,
) {
    let row = UNIT_POS as usize / SIDE * side;
    let column = UNIT_POS as usize % SIDE;
    let pitch = comptime!(head_dim + 1);
    #[unroll]
    for at in 0..comptime!(side * side) {
        to[at] = f32::new(0.0);
    }
    for d in 0..head_dim {
        #[unroll]
        for i in 0..side {
            let value = a[(row + i) * pitch + d];
            #[unroll]
            for j in 0..side {
                to[comptime!(i * side + j)] += value * b[(column + j * SIDE) * pitch + d];
            }
        }
    }
}

/// Adds to this unit's rows and columns of a result the product of a square of weights with the rows of `b`.
#[cube]
fn accumulate(
    weights: &SharedMemory<f32>,
    b: &SharedMemory<f32>,
    to: &mut Array<f32>,
    #[comptime] side: usize,
    #[comptime] head_dim: usize,
) {
    let row = UNIT_POS as usize / SIDE * side;
    let column = UNIT_POS as usize % SIDE;
    let tile = comptime!(side * SIDE);
    let columns = comptime!(head_dim / SIDE);
    for inner in 0..tile {
        #[unroll]
        for i in 0..side {
            let weight = weights[(row + i) * comptime!(tile + 1) + inner];
            #[unroll]
            for c in 0..columns {
                to[comptime!(i * columns + c)] += weight * b[inner * comptime!(head_dim + 1) + column + c * SIDE];
            }
        }
    }
}

/// The first key that a query sees: the first of its document.
#[cube]
fn first_key<I: Int>(
    starts: &Array<I>,
    batch: usize,
    query: usize,
    q_len: usize,
    #[comptime] documents: bool,
) -> usize {
    let mut first = 0usize;
    if comptime!(documents) {
        first = i32::cast_from(starts[batch * q_len + min(query, q_len - 1)]) as usize;
    }
    first
}

/// What a kernel is given in the place of starts: one value that it does not read.
fn starts_or_none<R: CubeRuntime>(starts: Option<CubeTensor<R>>, beside: &CubeTensor<R>) -> CubeTensor<R> {
    let [starts] = contiguous([starts.unwrap_or_else(|| empty_like(beside, Shape::new([1, 1]), DType::I32))]);
    starts
}

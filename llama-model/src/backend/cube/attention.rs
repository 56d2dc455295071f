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

/// Units along each side of a cube.
const SIDE: usize = 8;
const UNITS: usize = SIDE * SIDE;
/// Values of a result that a unit holds in registers, at most.
const MAX_REGISTERS: usize = 32;
/// Score of a masked pair: finite, because not every shader language has infinities.
const MASKED: f32 = -1e30;

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
    from: &Tensor<F>,
    to: &mut SharedMemory<f32>,
    batch: usize,
    start: usize,
    head: usize,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
) {
    let len = from.shape(1);
    let heads = from.shape(2);
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

#[cube(launch)]
fn forward_kernel<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    out: &mut Tensor<F>,
    lse: &mut Tensor<f32>,
    scale: f32,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
    #[define(F)] _dtype: StorageType,
) {
    let side = comptime!(tile / SIDE);
    let columns = comptime!(head_dim / SIDE);
    let q_len = q.shape(1);
    let heads = q.shape(2);
    let kv_len = k.shape(1);
    let tiles = q_len.div_ceil(tile);
    let batch = CUBE_POS / tiles / heads;
    let head = CUBE_POS / tiles % heads;
    let q_start = CUBE_POS % tiles * tile;
    let row = UNIT_POS as usize / SIDE * side;
    let column = UNIT_POS as usize % SIDE;

    let mut q_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    // Keys, then values.
    let mut kv_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut weights = SharedMemory::<f32>::new(comptime!(tile * (tile + 1)));
    let mut rows = SharedMemory::<f32>::new(comptime!(tile * SIDE));
    let mut score = Array::<f32>::new(comptime!(side * side));
    let mut result = Array::<f32>::new(comptime!(side * columns));
    let mut highest = Array::<f32>::new(side);
    // Of this unit's columns; the others' are added at the end.
    let mut sum = Array::<f32>::new(side);
    #[unroll]
    for i in 0..side {
        highest[i] = f32::new(MASKED);
        sum[i] = f32::new(0.0);
    }
    #[unroll]
    for at in 0..comptime!(side * columns) {
        result[at] = f32::new(0.0);
    }

    if batch < q.shape(0) {
        let kv_head = head / (heads / k.shape(2));
        // Query `i` sees the keys up to `shift + i`.
        let shift = kv_len - q_len;
        let seen = min(q_start + tile, q_len) + shift;
        load::<F>(q, &mut q_tile, batch, q_start, head, tile, head_dim);
        for kv_index in 0..seen.div_ceil(tile) {
            let kv_start = kv_index * tile;
            // The values of the tile before are read.
            sync_cube();
            load::<F>(k, &mut kv_tile, batch, kv_start, kv_head, tile, head_dim);
            sync_cube();
            scores(&q_tile, &kv_tile, &mut score, side, head_dim);
            #[unroll]
            for i in 0..side {
                let mut best = f32::new(MASKED);
                #[unroll]
                for j in 0..side {
                    let at = comptime!(i * side + j);
                    let mut value = score[at] * scale;
                    if kv_start + column + j * SIDE > q_start + row + i + shift {
                        value = f32::new(MASKED);
                    }
                    score[at] = value;
                    best = max(best, value);
                }
                rows[(row + i) * SIDE + column] = best;
            }
            sync_cube();
            #[unroll]
            for i in 0..side {
                let mut best = highest[i];
                #[unroll]
                for other in 0..SIDE {
                    best = max(best, rows[(row + i) * SIDE + other]);
                }
                let correction = (highest[i] - best).exp();
                highest[i] = best;
                sum[i] *= correction;
                #[unroll]
                for j in 0..side {
                    let weight = (score[comptime!(i * side + j)] - best).exp();
                    weights[(row + i) * comptime!(tile + 1) + column + j * SIDE] = weight;
                    sum[i] += weight;
                }
                #[unroll]
                for c in 0..columns {
                    result[comptime!(i * columns + c)] *= correction;
                }
            }
            // The keys are read and the weights written.
            sync_cube();
            load::<F>(v, &mut kv_tile, batch, kv_start, kv_head, tile, head_dim);
            sync_cube();
            accumulate(&weights, &kv_tile, &mut result, side, head_dim);
        }

        #[unroll]
        for i in 0..side {
            rows[(row + i) * SIDE + column] = sum[i];
        }
        sync_cube();
        #[unroll]
        for i in 0..side {
            let query = q_start + row + i;
            let mut total = f32::new(0.0);
            #[unroll]
            for other in 0..SIDE {
                total += rows[(row + i) * SIDE + other];
            }
            if query < q_len {
                let base = ((batch * q_len + query) * heads + head) * head_dim;
                #[unroll]
                for c in 0..columns {
                    out[base + column + c * SIDE] = F::cast_from(result[comptime!(i * columns + c)] / total);
                }
                if column == 0 {
                    lse[(batch * heads + head) * q_len + query] = highest[i] + total.ln();
                }
            }
        }
    }
}

/// [`LlamaBackend::causal_attention`](crate::LlamaBackend::causal_attention).
pub(super) fn forward<R: CubeRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    scale: f64,
    tile: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = contiguous([q, k, v]);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let out = empty_like(&q, q.shape(), q.dtype);
    let lse = empty_like(&q, Shape::new([batch, heads, q_len]), DType::F32);
    let (client, dtype) = (q.client.clone(), q.dtype.into());
    forward_kernel::launch::<R>(
        &client,
        cubes(batch * heads * q_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.into_tensor_arg(),
        k.into_tensor_arg(),
        v.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        lse.clone().into_tensor_arg(),
        scale as f32,
        tile,
        head_dim,
        dtype,
    );
    (out, lse)
}

#[cube(launch)]
fn backward_q_kernel<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    grad: &Tensor<F>,
    lse: &Tensor<f32>,
    delta: &Tensor<f32>,
    d_q: &mut Tensor<F>,
    scale: f32,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
    #[define(F)] _dtype: StorageType,
) {
    let side = comptime!(tile / SIDE);
    let columns = comptime!(head_dim / SIDE);
    let q_len = q.shape(1);
    let heads = q.shape(2);
    let kv_len = k.shape(1);
    let tiles = q_len.div_ceil(tile);
    let batch = CUBE_POS / tiles / heads;
    let head = CUBE_POS / tiles % heads;
    let q_start = CUBE_POS % tiles * tile;
    let row = UNIT_POS as usize / SIDE * side;
    let column = UNIT_POS as usize % SIDE;

    let mut q_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut grad_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut k_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut v_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut d_scores = SharedMemory::<f32>::new(comptime!(tile * (tile + 1)));
    let mut score = Array::<f32>::new(comptime!(side * side));
    let mut d_weight = Array::<f32>::new(comptime!(side * side));
    let mut result = Array::<f32>::new(comptime!(side * columns));
    #[unroll]
    for at in 0..comptime!(side * columns) {
        result[at] = f32::new(0.0);
    }

    if batch < q.shape(0) {
        let kv_head = head / (heads / k.shape(2));
        let shift = kv_len - q_len;
        let seen = min(q_start + tile, q_len) + shift;
        load::<F>(q, &mut q_tile, batch, q_start, head, tile, head_dim);
        load::<F>(grad, &mut grad_tile, batch, q_start, head, tile, head_dim);
        for kv_index in 0..seen.div_ceil(tile) {
            let kv_start = kv_index * tile;
            sync_cube();
            load::<F>(k, &mut k_tile, batch, kv_start, kv_head, tile, head_dim);
            load::<F>(v, &mut v_tile, batch, kv_start, kv_head, tile, head_dim);
            sync_cube();
            scores(&q_tile, &k_tile, &mut score, side, head_dim);
            scores(&grad_tile, &v_tile, &mut d_weight, side, head_dim);
            #[unroll]
            for i in 0..side {
                let query = q_start + row + i;
                #[unroll]
                for j in 0..side {
                    let at = comptime!(i * side + j);
                    let mut value = f32::new(0.0);
                    if query < q_len && kv_start + column + j * SIDE <= query + shift {
                        let weight = (score[at] * scale - lse[(batch * heads + head) * q_len + query]).exp();
                        value = weight * (d_weight[at] - delta[(batch * q_len + query) * heads + head]) * scale;
                    }
                    d_scores[(row + i) * comptime!(tile + 1) + column + j * SIDE] = value;
                }
            }
            sync_cube();
            accumulate(&d_scores, &k_tile, &mut result, side, head_dim);
        }
        #[unroll]
        for i in 0..side {
            let query = q_start + row + i;
            if query < q_len {
                let base = ((batch * q_len + query) * heads + head) * head_dim;
                #[unroll]
                for c in 0..columns {
                    d_q[base + column + c * SIDE] = F::cast_from(result[comptime!(i * columns + c)]);
                }
            }
        }
    }
}

#[cube(launch)]
fn backward_kv_kernel<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    grad: &Tensor<F>,
    lse: &Tensor<f32>,
    delta: &Tensor<f32>,
    d_k: &mut Tensor<F>,
    d_v: &mut Tensor<F>,
    scale: f32,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
    #[define(F)] _dtype: StorageType,
) {
    let side = comptime!(tile / SIDE);
    let columns = comptime!(head_dim / SIDE);
    let q_len = q.shape(1);
    let heads = q.shape(2);
    let kv_len = k.shape(1);
    let kv_heads = k.shape(2);
    let tiles = kv_len.div_ceil(tile);
    let batch = CUBE_POS / tiles / kv_heads;
    let kv_head = CUBE_POS / tiles % kv_heads;
    let kv_start = CUBE_POS % tiles * tile;
    let row = UNIT_POS as usize / SIDE * side;
    let column = UNIT_POS as usize % SIDE;

    let mut k_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut v_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut q_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut grad_tile = SharedMemory::<f32>::new(comptime!(tile * (head_dim + 1)));
    let mut weights = SharedMemory::<f32>::new(comptime!(tile * (tile + 1)));
    let mut d_scores = SharedMemory::<f32>::new(comptime!(tile * (tile + 1)));
    let mut score = Array::<f32>::new(comptime!(side * side));
    let mut d_weight = Array::<f32>::new(comptime!(side * side));
    let mut key_result = Array::<f32>::new(comptime!(side * columns));
    let mut value_result = Array::<f32>::new(comptime!(side * columns));
    #[unroll]
    for at in 0..comptime!(side * columns) {
        key_result[at] = f32::new(0.0);
        value_result[at] = f32::new(0.0);
    }

    if batch < k.shape(0) {
        let group = heads / kv_heads;
        let shift = kv_len - q_len;
        // The first query that sees any of these keys.
        let first = max(kv_start, shift) - shift;
        load::<F>(k, &mut k_tile, batch, kv_start, kv_head, tile, head_dim);
        load::<F>(v, &mut v_tile, batch, kv_start, kv_head, tile, head_dim);
        for member in 0..group {
            let head = kv_head * group + member;
            for q_index in first / tile..q_len.div_ceil(tile) {
                let q_start = q_index * tile;
                sync_cube();
                load::<F>(q, &mut q_tile, batch, q_start, head, tile, head_dim);
                load::<F>(grad, &mut grad_tile, batch, q_start, head, tile, head_dim);
                sync_cube();
                // Rows are keys, columns queries.
                scores(&k_tile, &q_tile, &mut score, side, head_dim);
                scores(&v_tile, &grad_tile, &mut d_weight, side, head_dim);
                #[unroll]
                for j in 0..side {
                    let query = q_start + column + j * SIDE;
                    #[unroll]
                    for i in 0..side {
                        let at = comptime!(i * side + j);
                        let mut weight = f32::new(0.0);
                        let mut value = f32::new(0.0);
                        if query < q_len && kv_start + row + i <= query + shift {
                            weight = (score[at] * scale - lse[(batch * heads + head) * q_len + query]).exp();
                            value = weight * (d_weight[at] - delta[(batch * q_len + query) * heads + head]) * scale;
                        }
                        weights[(row + i) * comptime!(tile + 1) + column + j * SIDE] = weight;
                        d_scores[(row + i) * comptime!(tile + 1) + column + j * SIDE] = value;
                    }
                }
                sync_cube();
                accumulate(&weights, &grad_tile, &mut value_result, side, head_dim);
                accumulate(&d_scores, &q_tile, &mut key_result, side, head_dim);
            }
        }
        #[unroll]
        for i in 0..side {
            let key = kv_start + row + i;
            if key < kv_len {
                let base = ((batch * kv_len + key) * kv_heads + kv_head) * head_dim;
                #[unroll]
                for c in 0..columns {
                    let at = comptime!(i * columns + c);
                    d_k[base + column + c * SIDE] = F::cast_from(key_result[at]);
                    d_v[base + column + c * SIDE] = F::cast_from(value_result[at]);
                }
            }
        }
    }
}

/// [`LlamaBackend::causal_attention_backward`](crate::LlamaBackend::causal_attention_backward): `q`, `k`, `v` and the result's gradient in;
/// with `delta [batch, q_len, n_heads, 1]`, the sum over a head of the result times its gradient.
pub(super) fn backward<R: CubeRuntime>(
    inputs: [CubeTensor<R>; 4],
    lse: CubeTensor<R>,
    delta: CubeTensor<R>,
    scale: f64,
    tile: usize,
) -> [CubeTensor<R>; 3] {
    let [q, k, v, grad] = contiguous(inputs);
    let [lse, delta] = contiguous([lse, delta]);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let [_, kv_len, kv_heads, _] = k.shape().dims();
    let [d_q, d_k, d_v] = [&q, &k, &v].map(|x| empty_like(x, x.shape(), x.dtype));
    let client = q.client.clone();
    let dtype = q.dtype;
    backward_q_kernel::launch::<R>(
        &client,
        cubes(batch * heads * q_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.clone().into_tensor_arg(),
        k.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        grad.clone().into_tensor_arg(),
        lse.clone().into_tensor_arg(),
        delta.clone().into_tensor_arg(),
        d_q.clone().into_tensor_arg(),
        scale as f32,
        tile,
        head_dim,
        dtype.into(),
    );
    backward_kv_kernel::launch::<R>(
        &client,
        cubes(batch * kv_heads * kv_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.into_tensor_arg(),
        k.into_tensor_arg(),
        v.into_tensor_arg(),
        grad.into_tensor_arg(),
        lse.into_tensor_arg(),
        delta.into_tensor_arg(),
        d_k.clone().into_tensor_arg(),
        d_v.clone().into_tensor_arg(),
        scale as f32,
        tile,
        head_dim,
        dtype.into(),
    );
    [d_q, d_k, d_v]
}

//! The backward: weights computed again, one kernel for the gradient of the queries, one for keys and values.

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{
    SIDE, Sizes, SizesLaunch, UNITS, accumulate, contiguous, cubes, empty_like, first_key, load, scores, starts_or_none,
};

#[cube(launch)]
fn backward_q_kernel<F: Float, I: Int>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<I>,
    grad: &Array<F>,
    lse: &Array<f32>,
    delta: &Array<f32>,
    d_q: &mut Array<F>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
    #[comptime] documents: bool,
    #[define(F, I)] _dtypes: [StorageType; 2],
) {
    let side = comptime!(tile / SIDE);
    let columns = comptime!(head_dim / SIDE);
    let q_len = sizes.q_len;
    let heads = sizes.heads;
    let kv_len = sizes.kv_len;
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

    if batch < sizes.batch {
        let kv_head = head / (heads / sizes.kv_heads);
        let shift = kv_len - q_len;
        let seen = min(q_start + tile, q_len) + shift;
        load::<F>(q, &mut q_tile, batch, q_start, head, (q_len, heads), tile, head_dim);
        load::<F>(grad, &mut grad_tile, batch, q_start, head, (q_len, heads), tile, head_dim);
        let unseen = first_key(starts, batch, q_start, q_len, documents);
        for kv_index in unseen / tile..seen.div_ceil(tile) {
            let kv_start = kv_index * tile;
            sync_cube();
            load::<F>(k, &mut k_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
            load::<F>(v, &mut v_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
            sync_cube();
            scores(&q_tile, &k_tile, &mut score, side, head_dim);
            scores(&grad_tile, &v_tile, &mut d_weight, side, head_dim);
            #[unroll]
            for i in 0..side {
                let query = q_start + row + i;
                let first = first_key(starts, batch, query, q_len, documents);
                #[unroll]
                for j in 0..side {
                    let at = comptime!(i * side + j);
                    let mut value = f32::new(0.0);
                    let key = kv_start + column + j * SIDE;
                    if query < q_len && key <= query + shift && key >= first {
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
fn backward_kv_kernel<F: Float, I: Int>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<I>,
    grad: &Array<F>,
    lse: &Array<f32>,
    delta: &Array<f32>,
    d_k: &mut Array<F>,
    d_v: &mut Array<F>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] tile: usize,
    #[comptime] head_dim: usize,
    #[comptime] documents: bool,
    #[define(F, I)] _dtypes: [StorageType; 2],
) {
    let side = comptime!(tile / SIDE);
    let columns = comptime!(head_dim / SIDE);
    let q_len = sizes.q_len;
    let heads = sizes.heads;
    let kv_len = sizes.kv_len;
    let kv_heads = sizes.kv_heads;
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

    if batch < sizes.batch {
        let group = heads / kv_heads;
        let shift = kv_len - q_len;
        // The first query that sees any of these keys.
        let first = max(kv_start, shift) - shift;
        load::<F>(k, &mut k_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
        load::<F>(v, &mut v_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
        for member in 0..group {
            let head = kv_head * group + member;
            for q_index in first / tile..q_len.div_ceil(tile) {
                let q_start = q_index * tile;
                sync_cube();
                load::<F>(q, &mut q_tile, batch, q_start, head, (q_len, heads), tile, head_dim);
                load::<F>(grad, &mut grad_tile, batch, q_start, head, (q_len, heads), tile, head_dim);
                sync_cube();
                // Rows are keys, columns queries.
                scores(&k_tile, &q_tile, &mut score, side, head_dim);
                scores(&v_tile, &grad_tile, &mut d_weight, side, head_dim);
                #[unroll]
                for j in 0..side {
                    let query = q_start + column + j * SIDE;
                    let unseen = first_key(starts, batch, query, q_len, documents);
                    #[unroll]
                    for i in 0..side {
                        let at = comptime!(i * side + j);
                        let mut weight = f32::new(0.0);
                        let mut value = f32::new(0.0);
                        let key = kv_start + row + i;
                        if query < q_len && key <= query + shift && key >= unseen {
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
pub(in super::super) fn backward<R: CubeRuntime>(
    inputs: [CubeTensor<R>; 4],
    starts: Option<CubeTensor<R>>,
    lse: CubeTensor<R>,
    delta: CubeTensor<R>,
    scale: f64,
    tile: usize,
) -> [CubeTensor<R>; 3] {
    let [q, k, v, grad] = contiguous(inputs);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [lse, delta] = contiguous([lse, delta]);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let [_, kv_len, kv_heads, _] = k.shape().dims();
    let sizes = || SizesLaunch::new(batch, q_len, kv_len, heads, kv_heads);
    let [d_q, d_k, d_v] = [&q, &k, &v].map(|x| empty_like(x, x.shape(), x.dtype));
    let client = q.client.clone();
    let dtypes = [q.dtype.into(), starts.dtype.into()];
    backward_q_kernel::launch::<R>(
        &client,
        cubes(batch * heads * q_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.clone().into_array_arg(),
        k.clone().into_array_arg(),
        v.clone().into_array_arg(),
        starts.clone().into_array_arg(),
        grad.clone().into_array_arg(),
        lse.clone().into_array_arg(),
        delta.clone().into_array_arg(),
        d_q.clone().into_array_arg(),
        sizes(),
        scale as f32,
        tile,
        head_dim,
        documents,
        dtypes,
    );
    backward_kv_kernel::launch::<R>(
        &client,
        cubes(batch * kv_heads * kv_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.into_array_arg(),
        k.into_array_arg(),
        v.into_array_arg(),
        starts.into_array_arg(),
        grad.into_array_arg(),
        lse.into_array_arg(),
        delta.into_array_arg(),
        d_k.clone().into_array_arg(),
        d_v.clone().into_array_arg(),
        sizes(),
        scale as f32,
        tile,
        head_dim,
        documents,
        dtypes,
    );
    [d_q, d_k, d_v]
}

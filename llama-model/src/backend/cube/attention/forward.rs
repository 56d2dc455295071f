//! The forward: online softmax over tiles of keys.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cube;
use cubecl::prelude::*;

use super::{
    MASKED, SIDE, Sizes, SizesLaunch, UNITS, accumulate, contiguous, cubes, empty_like, first_key, load, scores,
    starts_or_none,
};

#[cube(launch)]
fn forward_kernel<F: Float, I: Int>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<I>,
    out: &mut Array<F>,
    lse: &mut Array<f32>,
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

    if batch < sizes.batch {
        let kv_head = head / (heads / sizes.kv_heads);
        // Query `i` sees the keys up to `shift + i`.
        let shift = kv_len - q_len;
        let seen = min(q_start + tile, q_len) + shift;
        load::<F>(q, &mut q_tile, batch, q_start, head, (q_len, heads), tile, head_dim);
        let unseen = first_key(starts, batch, q_start, q_len, documents);
        for kv_index in unseen / tile..seen.div_ceil(tile) {
            let kv_start = kv_index * tile;
            // The values of the tile before are read.
            sync_cube();
            load::<F>(k, &mut kv_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
            sync_cube();
            scores(&q_tile, &kv_tile, &mut score, side, head_dim);
            #[unroll]
            for i in 0..side {
                let mut best = f32::new(MASKED);
                let first = first_key(starts, batch, q_start + row + i, q_len, documents);
                #[unroll]
                for j in 0..side {
                    let at = comptime!(i * side + j);
                    let mut value = score[at] * scale;
                    let key = kv_start + column + j * SIDE;
                    if key > q_start + row + i + shift || key < first {
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
                    let value = score[comptime!(i * side + j)];
                    let mut weight = (value - best).exp();
                    // A row that sees nothing of this tile has no greater score to vanish against.
                    if comptime!(documents) && value <= f32::new(MASKED) {
                        weight = f32::new(0.0);
                    }
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
            load::<F>(v, &mut kv_tile, batch, kv_start, kv_head, (kv_len, sizes.kv_heads), tile, head_dim);
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
pub(in super::super) fn forward<R: CubeRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    starts: Option<CubeTensor<R>>,
    scale: f64,
    tile: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = contiguous([q, k, v]);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let [_, kv_len, kv_heads, _] = k.shape().dims();
    let sizes = SizesLaunch::new(batch, q_len, kv_len, heads, kv_heads);
    let out = empty_like(&q, q.shape(), q.dtype);
    let lse = empty_like(&q, Shape::new([batch, heads, q_len]), DType::F32);
    let (client, dtypes) = (q.client.clone(), [q.dtype.into(), starts.dtype.into()]);
    forward_kernel::launch::<R>(
        &client,
        cubes(batch * heads * q_len.div_ceil(tile)),
        CubeDim::new_1d(UNITS as u32),
        q.into_array_arg(),
        k.into_array_arg(),
        v.into_array_arg(),
        starts.into_array_arg(),
        out.clone().into_array_arg(),
        lse.clone().into_array_arg(),
        sizes,
        scale as f32,
        tile,
        head_dim,
        documents,
        dtypes,
    );
    (out, lse)
}

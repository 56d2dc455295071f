//! The forward: online softmax over tiles of keys, in registers.

use burn::tensor::Shape;

use super::*;

/// Blocks of 16 keys in a tile.
const BLOCKS: usize = TILE / ROWS;

#[cube(launch_unchecked, fast_math = FastMath::all())]
fn forward_kernel<F: Float, E: Float, I: Int>(
    q: &Array<Vector<F, Eight>>,
    k: &Array<Vector<F, Eight>>,
    v: &Array<Vector<F, Eight>>,
    starts: &Array<I>,
    out: &mut Array<Vector<F, Pair>>,
    lse: &mut Array<f32>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] head_dim: usize,
    #[comptime] documents: bool,
    #[comptime] stored: bool,
    #[define(F, E, I)] _dtypes: [StorageType; 3],
) {
    let q_len = sizes.q_len;
    let heads = sizes.heads;
    let kv_len = sizes.kv_len;
    let tiles = q_len.div_ceil(TILE);
    let batch = CUBE_POS / tiles / heads;
    if batch >= sizes.batch {
        terminate!();
    }
    let head = CUBE_POS / tiles % heads;
    let kv_heads = sizes.kv_heads;
    let kv_head = head / (heads / kv_heads);
    // Those with most keys begin first.
    let q_start = (tiles - 1 - CUBE_POS % tiles) * TILE;
    // Query `i` sees the keys up to `shift + i`.
    let shift = kv_len - q_len;
    let seen = min(q_start + TILE, q_len) + shift;
    let row = UNIT_POS as usize / 32 * ROWS;
    // A unit's rows are this one and the eighth after it; its columns are the two at each of these.
    let query = q_start + row + UNIT_POS_PLANE as usize / 4;
    let column = UNIT_POS_PLANE as usize % 4 * 2;

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut k_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(TILE * pitch(head_dim)), 16usize);
    let mut v_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(TILE * pitch(head_dim)), 16usize);
    let keys = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let values = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    // Queries pass through the place of the first values.
    load::<F, E>(q, &mut v_tile, 0usize, batch, q_start, head, (q_len, heads), head_dim, stored);
    arrive(&values, stored);
    values.wait_parity(0u32);
    let q_rows = rows_of(&definition, &v_tile, row, head_dim);
    sync_cube();

    let mut results = zeros(head_dim);
    let mut highest = Array::<f32>::new(2usize);
    // Of this unit's columns; the others' are added at the end.
    let mut sum = Array::<f32>::new(2usize);
    let mut first = Array::<usize>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        highest[i] = f32::new(MASKED);
        sum[i] = f32::new(0.0);
        first[i] = first_key(starts, batch, query + i * 8, q_len, documents);
    }

    let unseen = first_key(starts, batch, q_start, q_len, documents);
    let (tile, end) = (unseen / TILE, seen.div_ceil(TILE));
    load::<F, E>(k, &mut k_tile, 0usize, batch, tile * TILE, kv_head, (kv_len, kv_heads), head_dim, stored);
    arrive(&keys, stored);
    load::<F, E>(v, &mut v_tile, 0usize, batch, tile * TILE, kv_head, (kv_len, kv_heads), head_dim, stored);
    arrive(&values, stored);
    for kv_index in tile..end {
        let kv_start = kv_index * TILE;
        let next = kv_start + TILE;
        let phase = (kv_index - tile) as u32 % 2;
        keys.wait_parity(phase);
        let mut score = scores(&definition, &q_rows, &k_tile, 0usize, BLOCKS, head_dim);
        // All have read the keys, whose place the next take.
        sync_cube();
        if kv_index + 1 < end {
            load::<F, E>(k, &mut k_tile, 0usize, batch, next, kv_head, (kv_len, kv_heads), head_dim, stored);
            arrive(&keys, stored);
        }
        let whole = !documents && kv_start + TILE <= q_start + shift + 1;
        let mut best = Array::<f32>::new(2usize);
        #[unroll]
        for i in 0..2usize {
            best[i] = highest[i];
        }
        #[unroll]
        for part in 0..comptime!(TILE / WIDTH) {
            let part_score = score.index_mut(part);
            #[unroll]
            for i in 0..2usize {
                let mut value = part_score[i] * Vector::cast_from(scale);
                if !whole {
                    #[unroll]
                    for j in 0..2usize {
                        let key = kv_start + part * WIDTH + column + j;
                        if key > query + i * 8 + shift || key < first[i] {
                            value[j] = f32::new(MASKED);
                        }
                    }
                }
                part_score[i] = value;
                best[i] = max(best[i], max(value[0], value[1]));
            }
        }
        // The four units of a row agree on its highest score.
        #[unroll]
        for i in 0..2usize {
            best[i] = max(best[i], plane_shuffle_xor(best[i], 1));
            best[i] = max(best[i], plane_shuffle_xor(best[i], 2));
            let correction = (highest[i] - best[i]).exp();
            highest[i] = best[i];
            sum[i] *= correction;
            #[unroll]
            for part in 0..comptime!(head_dim / WIDTH) {
                let result = results.index_mut(part);
                result[i] *= Vector::cast_from(correction);
            }
        }
        #[unroll]
        for part in 0..comptime!(TILE / WIDTH) {
            let part_score = score.index_mut(part);
            #[unroll]
            for i in 0..2usize {
                let value = part_score[i];
                let mut weight = (value - Vector::cast_from(best[i])).exp();
                // A row that sees nothing of this tile has no greater score to vanish against.
                if comptime!(documents) {
                    #[unroll]
                    for j in 0..2usize {
                        if value[j] <= f32::new(MASKED) {
                            weight[j] = f32::new(0.0);
                        }
                    }
                }
                sum[i] += weight[0] + weight[1];
                part_score[i] = weight;
            }
        }
        // Before these were the queries.
        values.wait_parity(1 - phase);
        accumulate(&definition, &score, &v_tile, 0usize, &mut results, BLOCKS, head_dim);
        sync_cube();
        if kv_index + 1 < end {
            load::<F, E>(v, &mut v_tile, 0usize, batch, next, kv_head, (kv_len, kv_heads), head_dim, stored);
            arrive(&values, stored);
        }
    }

    #[unroll]
    for i in 0..2usize {
        let mut total = sum[i] + plane_shuffle_xor(sum[i], 1);
        total += plane_shuffle_xor(total, 2);
        let query = query + i * 8;
        if query < q_len {
            store(&results, out, ((batch * q_len + query) * heads + head) * head_dim, 1.0f32 / total, i, head_dim);
            if column == 0 {
                lse[(batch * heads + head) * q_len + query] = highest[i] + total.ln();
            }
        }
    }
}

/// [`LlamaBackend::causal_attention`](crate::LlamaBackend::causal_attention) with operands of this type.
pub(in crate::backend::cube) fn forward<R: CubeRuntime>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    starts: Option<CubeTensor<R>>,
    scale: f64,
    operand: StorageType,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [q, k, v] = contiguous([q, k, v]);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let [_, kv_len, kv_heads, _] = k.shape().dims();
    let sizes = SizesLaunch::new(batch, q_len, kv_len, heads, kv_heads);
    let out = empty_like(&q, q.shape(), q.dtype);
    let lse = empty_like(&q, Shape::new([batch, heads, q_len]), DType::F32);
    let (client, dtypes) = (q.client.clone(), [q.dtype.into(), operand, starts.dtype.into()]);
    let stored = dtypes[0] == operand;
    // SAFETY: the kernel checks every position that it reads or writes against the tensors' lengths.
    unsafe {
        forward_kernel::launch_unchecked::<R>(
            &client,
            cubes(batch * heads * q_len.div_ceil(TILE)),
            CubeDim::new_1d(UNITS as u32),
            q.into_array_arg(),
            k.into_array_arg(),
            v.into_array_arg(),
            starts.into_array_arg(),
            out.clone().into_array_arg(),
            lse.clone().into_array_arg(),
            sizes,
            scale as f32,
            head_dim,
            documents,
            stored,
            dtypes,
        );
    }
    (out, lse)
}

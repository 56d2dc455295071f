//! The backward: weights computed again, one kernel for the gradient of the queries, one for keys and values.

use super::*;

/// Rows of a tile that are looked at together, in blocks of 16.
const BLOCKS: usize = 2;
const STEP: usize = BLOCKS * ROWS;

/// `rowsum(dO · O)` of a plane's 16 rows, which the softmax's backward subtracts: in each unit, of its two rows.
#[cube]
fn deltas<F: Float>(
    out: &Array<Vector<F, Eight>>,
    grad: &Array<Vector<F, Eight>>,
    batch: usize,
    query: usize,
    head: usize,
    shape: (usize, usize),
    #[comptime] head_dim: usize,
) -> Array<f32> {
    let (q_len, heads) = shape;
    let lane = UNIT_POS_PLANE as usize % 4;
    let vectors = comptime!(head_dim / 8);
    let mut deltas = Array::<f32>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let mut sum = f32::new(0.0);
        if query + i * 8 < q_len {
            let base = ((batch * q_len + query + i * 8) * heads + head) * vectors;
            let mut at = lane;
            while at < vectors {
                let product = Vector::<f32, Eight>::cast_from(out[base + at]) * Vector::cast_from(grad[base + at]);
                #[unroll]
                for j in 0..8usize {
                    sum += product[j];
                }
                at += 4;
            }
        }
        sum += plane_shuffle_xor(sum, 1);
        sum += plane_shuffle_xor(sum, 2);
        deltas[i] = sum;
    }
    deltas
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
fn backward_q_kernel<F: Float, E: Float, I: Int>(
    q: &Array<Vector<F, Eight>>,
    k: &Array<Vector<F, Eight>>,
    v: &Array<Vector<F, Eight>>,
    starts: &Array<I>,
    out: &Array<Vector<F, Eight>>,
    grad: &Array<Vector<F, Eight>>,
    lse: &Array<f32>,
    delta: &mut Array<f32>,
    d_q: &mut Array<Vector<F, Pair>>,
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
    let shift = kv_len - q_len;
    let seen = min(q_start + TILE, q_len) + shift;
    let row = UNIT_POS as usize / 32 * ROWS;
    let query = q_start + row + UNIT_POS_PLANE as usize / 4;
    let column = UNIT_POS_PLANE as usize % 4 * 2;

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    // Two tiles each: one is read, the next is on its way.
    let mut k_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(2 * TILE * pitch(head_dim)), 16usize);
    let mut v_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(2 * TILE * pitch(head_dim)), 16usize);
    let arrived = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let unseen = first_key(starts, batch, q_start, q_len, documents);
    let (tile, end) = (unseen / TILE, seen.div_ceil(TILE));
    // Queries and their gradients pass through the second places.
    load::<F, E>(q, &mut k_tile, TILE, batch, q_start, head, (q_len, heads), head_dim, stored);
    load::<F, E>(grad, &mut v_tile, TILE, batch, q_start, head, (q_len, heads), head_dim, stored);
    load::<F, E>(k, &mut k_tile, 0usize, batch, tile * TILE, kv_head, (kv_len, kv_heads), head_dim, stored);
    load::<F, E>(v, &mut v_tile, 0usize, batch, tile * TILE, kv_head, (kv_len, kv_heads), head_dim, stored);
    arrive(&arrived, stored);
    arrived.wait_parity(0u32);
    let q_rows = rows_of(&definition, &k_tile, TILE + row, head_dim);
    let grad_rows = rows_of(&definition, &v_tile, TILE + row, head_dim);

    let deltas = deltas(out, grad, batch, query, head, (q_len, heads), head_dim);
    let mut first = Array::<usize>::new(2usize);
    let mut row_lse = Array::<f32>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let query = query + i * 8;
        first[i] = first_key(starts, batch, query, q_len, documents);
        row_lse[i] = lse[(batch * heads + head) * q_len + min(query, q_len - 1)];
        if column == 0 && query < q_len {
            delta[(batch * heads + head) * q_len + query] = deltas[i];
        }
    }

    let mut results = zeros(head_dim);
    for kv_index in tile..end {
        let kv_start = kv_index * TILE;
        let index = kv_index - tile;
        let place = index % 2 * TILE;
        arrived.wait_parity(index as u32 % 2);
        // All have read the tile before, whose place the next takes.
        sync_cube();
        if kv_index + 1 < end {
            let (next, place) = (kv_start + TILE, TILE - place);
            load::<F, E>(k, &mut k_tile, place, batch, next, kv_head, (kv_len, kv_heads), head_dim, stored);
            load::<F, E>(v, &mut v_tile, place, batch, next, kv_head, (kv_len, kv_heads), head_dim, stored);
            arrive(&arrived, stored);
        }
        for part in 0..comptime!(TILE / STEP) {
            let key_row = part * STEP;
            // A plane's last query sees none of the keys behind its own.
            if kv_start + key_row <= q_start + row + comptime!(ROWS - 1) + shift {
                let mut score = scores(&definition, &q_rows, &k_tile, place + key_row, BLOCKS, head_dim);
                let d_weight = scores(&definition, &grad_rows, &v_tile, place + key_row, BLOCKS, head_dim);
                let whole = !documents && kv_start + key_row + STEP <= q_start + row + shift + 1;
                #[unroll]
                for side in 0..comptime!(2 * BLOCKS) {
                    let score = score.index_mut(side);
                    let d_weight = d_weight.index(side);
                    #[unroll]
                    for i in 0..2usize {
                        let weight = (score[i] * Vector::cast_from(scale) - Vector::cast_from(row_lse[i])).exp();
                        let mut value =
                            weight * (d_weight[i] - Vector::cast_from(deltas[i])) * Vector::cast_from(scale);
                        if !whole {
                            #[unroll]
                            for j in 0..2usize {
                                let key = kv_start + key_row + side * WIDTH + column + j;
                                if key > query + i * 8 + shift || key < first[i] {
                                    value[j] = f32::new(0.0);
                                }
                            }
                        }
                        score[i] = value;
                    }
                }
                accumulate(&definition, &score, &k_tile, place + key_row, &mut results, BLOCKS, head_dim);
            }
        }
    }
    #[unroll]
    for i in 0..2usize {
        let query = query + i * 8;
        if query < q_len {
            store(&results, d_q, ((batch * q_len + query) * heads + head) * head_dim, 1.0f32, i, head_dim);
        }
    }
}

#[cube(launch_unchecked, fast_math = FastMath::all())]
fn backward_kv_kernel<F: Float, E: Float, I: Int>(
    q: &Array<Vector<F, Eight>>,
    k: &Array<Vector<F, Eight>>,
    v: &Array<Vector<F, Eight>>,
    starts: &Array<I>,
    grad: &Array<Vector<F, Eight>>,
    lse: &Array<f32>,
    delta: &Array<f32>,
    d_k: &mut Array<Vector<F, Pair>>,
    d_v: &mut Array<Vector<F, Pair>>,
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
    let kv_heads = sizes.kv_heads;
    let tiles = kv_len.div_ceil(TILE);
    let batch = CUBE_POS / tiles / kv_heads;
    if batch >= sizes.batch {
        terminate!();
    }
    let kv_head = CUBE_POS / tiles % kv_heads;
    let kv_start = CUBE_POS % tiles * TILE;
    let shift = kv_len - q_len;
    let group = heads / kv_heads;
    // The first query that sees any of these keys.
    let first = max(kv_start, shift) - shift;
    let row = UNIT_POS as usize / 32 * ROWS;
    let key = kv_start + row + UNIT_POS_PLANE as usize / 4;
    let column = UNIT_POS_PLANE as usize % 4 * 2;

    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut k_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(TILE * pitch(head_dim)), 16usize);
    let mut v_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(TILE * pitch(head_dim)), 16usize);
    // Two tiles each: one is read, the next is on its way.
    let mut q_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(2 * TILE * pitch(head_dim)), 16usize);
    let mut grad_tile = SharedMemory::<Vector<E, Eight>>::new_aligned(comptime!(2 * TILE * pitch(head_dim)), 16usize);
    let mut lse_tile = SharedMemory::<f32>::new(comptime!(2 * TILE));
    let mut delta_tile = SharedMemory::<f32>::new(comptime!(2 * TILE));
    let arrived = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    load::<F, E>(k, &mut k_tile, 0usize, batch, kv_start, kv_head, (kv_len, kv_heads), head_dim, stored);
    load::<F, E>(v, &mut v_tile, 0usize, batch, kv_start, kv_head, (kv_len, kv_heads), head_dim, stored);

    let mut key_results = zeros(head_dim);
    let mut value_results = zeros(head_dim);
    // Tiles of queries that see any of these keys, of one head of the group after the other.
    let (tile, end) = (first / TILE, q_len.div_ceil(TILE));
    let tiles = (end - tile) * group;
    let unit = UNIT_POS as usize;
    for index in 0..tiles + 1 {
        if index > 0 {
            arrived.wait_parity((index - 1) as u32 % 2);
        }
        // All have read the tile before the last, whose place this one takes.
        sync_cube();
        if index < tiles {
            let head = kv_head * group + index / (end - tile);
            let q_start = (tile + index % (end - tile)) * TILE;
            let place = index % 2 * TILE;
            load::<F, E>(q, &mut q_tile, place, batch, q_start, head, (q_len, heads), head_dim, stored);
            load::<F, E>(grad, &mut grad_tile, place, batch, q_start, head, (q_len, heads), head_dim, stored);
            if unit < TILE {
                let at = (batch * heads + head) * q_len + min(q_start + unit, q_len - 1);
                lse_tile[place + unit] = lse[at];
                delta_tile[place + unit] = delta[at];
            }
            arrive(&arrived, stored);
        }
        if index > 0 {
            let index = index - 1;
            let q_start = (tile + index % (end - tile)) * TILE;
            let place = index % 2 * TILE;
            for part in 0..comptime!(TILE / STEP) {
                let query_row = part * STEP;
                // The last of these queries sees none of the keys behind its own.
                if kv_start + row <= q_start + query_row + comptime!(STEP - 1) + shift {
                    // Rows are keys, columns queries.
                    let mut score = pairs(&definition, &k_tile, row, &q_tile, place + query_row, head_dim);
                    let mut d_score = pairs(&definition, &v_tile, row, &grad_tile, place + query_row, head_dim);
                    let whole = !documents
                        && q_start + query_row + STEP <= q_len
                        && kv_start + row + ROWS <= q_start + query_row + shift + 1;
                    #[unroll]
                    for side in 0..comptime!(2 * BLOCKS) {
                        let score = score.index_mut(side);
                        let d_score = d_score.index_mut(side);
                        let at = query_row + side * WIDTH + column;
                        let mut lse_pair = Vector::<f32, Pair>::cast_from(lse_tile[place + at]);
                        lse_pair[1] = lse_tile[place + at + 1];
                        let mut delta_pair = Vector::<f32, Pair>::cast_from(delta_tile[place + at]);
                        delta_pair[1] = delta_tile[place + at + 1];
                        #[unroll]
                        for i in 0..2usize {
                            let mut weight = (score[i] * Vector::cast_from(scale) - lse_pair).exp();
                            if !whole {
                                #[unroll]
                                for j in 0..2usize {
                                    let query = q_start + at + j;
                                    let unseen = first_key(starts, batch, query, q_len, documents);
                                    let key = key + i * 8;
                                    if query >= q_len || key > query + shift || key < unseen {
                                        weight[j] = f32::new(0.0);
                                    }
                                }
                            }
                            score[i] = weight;
                            d_score[i] = weight * (d_score[i] - delta_pair) * Vector::cast_from(scale);
                        }
                    }
                    accumulate(
                        &definition,
                        &score,
                        &grad_tile,
                        place + query_row,
                        &mut value_results,
                        BLOCKS,
                        head_dim,
                    );
                    accumulate(&definition, &d_score, &q_tile, place + query_row, &mut key_results, BLOCKS, head_dim);
                }
            }
        }
    }
    #[unroll]
    for i in 0..2usize {
        let key = key + i * 8;
        if key < kv_len {
            let base = ((batch * kv_len + key) * kv_heads + kv_head) * head_dim;
            store(&key_results, d_k, base, 1.0f32, i, head_dim);
            store(&value_results, d_v, base, 1.0f32, i, head_dim);
        }
    }
}

/// Products of 16 rows of one tile with [`STEP`] of another. As [`scores`], whose rows stay in registers: here those are full of results.
#[cube]
fn pairs<E: Float>(
    definition: &MmaDefinition<E, E, f32>,
    rows: &SharedMemory<Vector<E, Eight>>,
    row: usize,
    columns: &SharedMemory<Vector<E, Eight>>,
    column: usize,
    #[comptime] head_dim: usize,
) -> Sequence<Sums> {
    let parts = comptime!(head_dim / ROWS);
    let mut sums = zeros(comptime!(BLOCKS * ROWS));
    let mut left = Sequence::<Fragment<E>>::new();
    let mut right = Sequence::<Fragment<E>>::new();
    #[unroll]
    for step in 0..comptime!((parts + 1) * BLOCKS) {
        let (part, block) = comptime!((step / BLOCKS, step % BLOCKS));
        if comptime!(part < parts) {
            if comptime!(block == 0) {
                left.push(square(definition, rows, row, part * 2, head_dim, false));
            }
            right.push(square(definition, columns, column + block * ROWS, part * 2, head_dim, false));
        }
        if comptime!(step >= BLOCKS) {
            let square = right.index(comptime!(step - BLOCKS));
            let left = left.index(comptime!(part - 1));
            definition.execute_inplace(left, &half(square, 0usize, 2usize), sums.index_mut(comptime!(2 * block)));
            definition.execute_inplace(left, &half(square, 1usize, 3usize), sums.index_mut(comptime!(2 * block + 1)));
        }
    }
    sums
}

/// [`LlamaBackend::causal_attention_backward`](crate::LlamaBackend::causal_attention_backward) with operands of this type: `q`, `k`, `v`,
/// the result and its gradient in.
pub(in crate::backend::cube) fn backward<R: CubeRuntime>(
    inputs: [CubeTensor<R>; 5],
    starts: Option<CubeTensor<R>>,
    lse: CubeTensor<R>,
    scale: f64,
    operand: StorageType,
) -> [CubeTensor<R>; 3] {
    let [q, k, v, out, grad] = contiguous(inputs);
    let documents = starts.is_some();
    let starts = starts_or_none(starts, &q);
    let [lse] = contiguous([lse]);
    let [batch, q_len, heads, head_dim] = q.shape().dims();
    let [_, kv_len, kv_heads, _] = k.shape().dims();
    let sizes = || SizesLaunch::new(batch, q_len, kv_len, heads, kv_heads);
    let [d_q, d_k, d_v] = [&q, &k, &v].map(|x| empty_like(x, x.shape(), x.dtype));
    let delta = empty_like(&lse, lse.shape(), DType::F32);
    let client = q.client.clone();
    let dtypes = [q.dtype.into(), operand, starts.dtype.into()];
    let stored = dtypes[0] == operand;
    // SAFETY: the kernels check every position that they read or write against the tensors' lengths.
    unsafe {
        backward_q_kernel::launch_unchecked::<R>(
            &client,
            cubes(batch * heads * q_len.div_ceil(TILE)),
            CubeDim::new_1d(UNITS as u32),
            q.clone().into_array_arg(),
            k.clone().into_array_arg(),
            v.clone().into_array_arg(),
            starts.clone().into_array_arg(),
            out.into_array_arg(),
            grad.clone().into_array_arg(),
            lse.clone().into_array_arg(),
            delta.clone().into_array_arg(),
            d_q.clone().into_array_arg(),
            sizes(),
            scale as f32,
            head_dim,
            documents,
            stored,
            dtypes,
        );
        backward_kv_kernel::launch_unchecked::<R>(
            &client,
            cubes(batch * kv_heads * kv_len.div_ceil(TILE)),
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
            head_dim,
            documents,
            stored,
            dtypes,
        );
    }
    [d_q, d_k, d_v]
}

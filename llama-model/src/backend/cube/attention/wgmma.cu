// Attention on the tensor cores of Hopper, by warp groups of four planes: the forward and the two kernels of the backward.
//
// Before this text come `hopper.cuh` and the definitions of one variant: FORWARD, QUERIES or KEYS, which kernel it is; HEAD_DIM, 64 or 128;
// TILE, rows that are looked at together; DOCUMENTS, whether queries have a first key; and the instructions for a warp group's 64 rows,
// WGMMA_SCORES(sums, a, b, add) with TILE rows, WGMMA_ACCUMULATE(sums, a, b) with HEAD_DIM columns and the left operand in registers.
//
// A cube has 128 rows, of queries, or of keys in the gradients of keys and values: two warp groups multiply, 64 rows each. Their rows lie
// in shared memory throughout. What they are multiplied with passes through it in tiles, copied by a plane beside them.

struct Shape {
    u64 batch, q_len, kv_len, heads, kv_heads, scale;
};

constexpr u32 ROWS = 128;
constexpr u32 BOXES = HEAD_DIM / 64;
constexpr u32 FIXED_BYTES = ROWS * HEAD_DIM * 2;
constexpr u32 TILE_BYTES = TILE * HEAD_DIM * 2;
#if defined(FORWARD)
constexpr u32 FIXED = 1;
// Score of a masked pair: finite, so that a row that sees nothing yet has no infinities to subtract.
constexpr float MASKED = -1e30f;
#else
constexpr u32 FIXED = 2;
#endif
constexpr u32 STAGES = 2;
constexpr float LOG2_E = 1.44269504f;

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Copies rows of a head, from `[length, heads, HEAD_DIM]` as a matrix.
template <u32 LINES>
__device__ __forceinline__ void copy_rows(const TensorMap& map, u32 to, u32 barrier, u32 row, u32 head) {
    for (u32 box = 0; box < BOXES; box++) copy(map, to + box * LINES * 128, barrier, head * HEAD_DIM + box * 64, row);
}

/// Begins the products of a warp group's rows of a fixed tile, from `rows` on, with those of a tile.
__device__ __forceinline__ void scores(float (&sums)[TILE / 2], u32 rows, u32 tile) {
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM / 16; k++) {
        u64 a = descriptor(rows + k / 4 * ROWS * 128 + k % 4 * 32, 0), b = descriptor(tile + k / 4 * TILE * 128 + k % 4 * 32, 0);
        WGMMA_SCORES(sums, a, b, k > 0);
    }
}

/// The sums of a warp group's rows, rounded, as left operands.
__device__ __forceinline__ void round_sums(u32 (&operands)[TILE / 16][4], const float (&sums)[TILE / 2]) {
#pragma unroll
    for (u32 k = 0; k < TILE / 16; k++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) operands[k][i] = rounded(sums[k * 8 + i * 2], sums[k * 8 + i * 2 + 1]);
}

/// Begins to add the products of left operands with the rows of a tile.
__device__ __forceinline__ void accumulate(float (&results)[HEAD_DIM / 2], u32 (&operands)[TILE / 16][4], u32 tile) {
#pragma unroll
    for (u32 k = 0; k < TILE / 16; k++) WGMMA_ACCUMULATE(results, operands[k], descriptor(tile + k * 16 * 128, TILE * 128));
}

/// The first key that a query sees: the first of its document.
__device__ __forceinline__ u32 first_key(const int* starts, u32 batch, u32 query, u32 q_len) {
    return DOCUMENTS ? starts[batch * q_len + min(query, q_len - 1)] : 0;
}

/// The sum of what a row's four units have.
__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

/// The greatest of it.
__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

/// Writes a row of results times a factor.
__device__ __forceinline__ void write_row(unsigned short* row, float (&results)[HEAD_DIM / 2], u32 half, float factor) {
#pragma unroll
    for (u32 j = 0; j < HEAD_DIM / 8; j++) {
        results[j * 4 + half * 2] *= factor;
        results[j * 4 + half * 2 + 1] *= factor;
    }
    write_rounded<HEAD_DIM>(row, results + half * 2, 0, HEAD_DIM);
}

#if !defined(KEYS)
/// `rowsum(dO · O)` of a row, which the softmax's backward subtracts, in each of its four units.
__device__ __forceinline__ float row_delta(const uint4* out, const uint4* grad) {
    float sum = 0;
    for (u32 at = threadIdx.x % 4; at < HEAD_DIM / 8; at += 4) {
        uint4 a = out[at], b = grad[at];
        u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) sum += low(x[i]) * low(y[i]) + high(x[i]) * high(y[i]);
    }
    return row_sum(sum);
}
#endif

extern "C" __global__ void __launch_bounds__(384, 1) attention(
#if defined(FORWARD)
    const __grid_constant__ TensorMap q_map,
    const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map,
    const void*,
    const void*,
    const void*,
    const int* starts,
    unsigned short* out,
    float* lse,
#elif defined(QUERIES)
    const __grid_constant__ TensorMap q_map,
    const __grid_constant__ TensorMap grad_map,
    const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map,
    const void*,
    const unsigned short* grad,
    const void*,
    const void*,
    const int* starts,
    const unsigned short* out,
    const float* lse,
    float* delta,
    unsigned short* d_q,
#else
    const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap q_map,
    const __grid_constant__ TensorMap grad_map,
    const void*,
    const void*,
    const void*,
    const void*,
    const int* starts,
    const float* lse,
    const float* delta,
    unsigned short* d_k,
    unsigned short* d_v,
#endif
    const __grid_constant__ Shape shape) {
    extern __shared__ unsigned char room[];
    __shared__ u64 barriers[2 * STAGES + 1];
    u32 fixed = (shared_address(room) + 1023) / 1024 * 1024, stages = fixed + FIXED * FIXED_BYTES;
    u32 arrived = shared_address(barriers), left = arrived + STAGES * 8, rows_arrived = left + STAGES * 8;
    u32 group = threadIdx.x / 128, lane = threadIdx.x % 32;
    u32 q_len = shape.q_len, kv_len = shape.kv_len, heads = shape.heads, kv_heads = shape.kv_heads, shift = kv_len - q_len;
    float scale = __uint_as_float((u32)shape.scale);
#if defined(KEYS)
    // Queries' statistics, for each stage.
    __shared__ float lse_tile[STAGES][TILE], delta_tile[STAGES][TILE];
    constexpr u32 COPIERS = 32;
    u32 tiles = (kv_len + ROWS - 1) / ROWS;
    u32 batch = blockIdx.x / tiles / kv_heads, kv_head = blockIdx.x / tiles % kv_heads, members = heads / kv_heads;
    u32 kv_start = blockIdx.x % tiles * ROWS;
    // Tiles of queries that see any of these keys, of one head of the group after the other.
    u32 begin = (max(kv_start, shift) - shift) / TILE, end = (q_len + TILE - 1) / TILE;
#else
    constexpr u32 COPIERS = 1;
    u32 tiles = (q_len + ROWS - 1) / ROWS;
    u32 batch = blockIdx.x / tiles / heads, head = blockIdx.x / tiles % heads, kv_head = head / (heads / kv_heads);
    // Those with most keys begin first.
    u32 q_start = (tiles - 1 - blockIdx.x % tiles) * ROWS;
    // Query `i` sees the keys up to `shift + i`.
    u32 begin = first_key(starts, batch, q_start, q_len) / TILE, end = (min(q_start + ROWS, q_len) + shift + TILE - 1) / TILE;
#endif
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            barrier_init(arrived + stage * 8, COPIERS);
            barrier_init(left + stage * 8, 2);
        }
        barrier_init(rows_arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    Turn<STAGES> turn;
    // The registers that the copying group leaves are taken by the others.
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x / 32 % 4 > 0) return;
        if (lane == 0) {
            barrier_expect(rows_arrived, FIXED * FIXED_BYTES);
#if defined(KEYS)
            copy_rows<ROWS>(k_map, fixed, rows_arrived, batch * kv_len + kv_start, kv_head);
            copy_rows<ROWS>(v_map, fixed + FIXED_BYTES, rows_arrived, batch * kv_len + kv_start, kv_head);
#else
            copy_rows<ROWS>(q_map, fixed, rows_arrived, batch * q_len + q_start, head);
#if defined(QUERIES)
            copy_rows<ROWS>(grad_map, fixed + FIXED_BYTES, rows_arrived, batch * q_len + q_start, head);
#endif
#endif
        }
#if defined(KEYS)
        for (u32 member = 0; member < members; member++) {
            u32 head = kv_head * members + member;
            for (u32 tile = begin; tile < end; tile++, turn.next()) {
                u32 barrier = arrived + turn.stage * 8, to = stages + turn.stage * 2 * TILE_BYTES;
                barrier_wait(left + turn.stage * 8, turn.parity ^ 1);
                for (u32 i = lane; i < TILE; i += 32) {
                    u32 at = (batch * heads + head) * q_len + min(tile * TILE + i, q_len - 1);
                    lse_tile[turn.stage][i] = lse[at] * LOG2_E;
                    delta_tile[turn.stage][i] = delta[at];
                }
                if (lane == 0) {
                    barrier_expect(barrier, 2 * TILE_BYTES);
                    copy_rows<TILE>(q_map, to, barrier, batch * q_len + tile * TILE, head);
                    copy_rows<TILE>(grad_map, to + TILE_BYTES, barrier, batch * q_len + tile * TILE, head);
                } else {
                    barrier_arrive(barrier);
                }
            }
        }
#else
        if (lane == 0) {
            for (u32 tile = begin; tile < end; tile++, turn.next()) {
                u32 barrier = arrived + turn.stage * 8, to = stages + turn.stage * 2 * TILE_BYTES;
                barrier_wait(left + turn.stage * 8, turn.parity ^ 1);
                barrier_expect(barrier, 2 * TILE_BYTES);
                copy_rows<TILE>(k_map, to, barrier, batch * kv_len + tile * TILE, kv_head);
                copy_rows<TILE>(v_map, to + TILE_BYTES, barrier, batch * kv_len + tile * TILE, kv_head);
            }
        }
#endif
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    // A unit's rows are this one of the group's and the eighth after it; its columns are the two at each of these.
    u32 side = group * 64, row = side + threadIdx.x % 128 / 32 * 16 + lane / 4, column = lane % 4 * 2;
    u32 own = fixed + side * 128;
#if defined(KEYS)
    float key_results[HEAD_DIM / 2] = {}, value_results[HEAD_DIM / 2] = {};
    u32 key = kv_start + row;
    barrier_wait(rows_arrived, 0);
    for (u32 member = 0; member < members; member++) {
        for (u32 tile = begin; tile < end; tile++, turn.next()) {
            barrier_wait(arrived + turn.stage * 8, turn.parity);
            u32 q_tile = stages + turn.stage * 2 * TILE_BYTES, grad_tile = q_tile + TILE_BYTES, q_start = tile * TILE;
            // The last of these queries sees none of the keys behind its own.
            if (kv_start + side <= q_start + TILE - 1 + shift) {
                float score[TILE / 2], d_score[TILE / 2];
                group_begin();
                scores(score, own, q_tile);
                scores(d_score, own + FIXED_BYTES, grad_tile);
                group_commit();
                group_wait<0>();
                bool whole = !DOCUMENTS && q_start + TILE <= q_len && kv_start + side + 64 <= q_start + shift + 1;
#pragma unroll
                for (u32 j = 0; j < TILE / 8; j++) {
#pragma unroll
                    for (u32 e = 0; e < 2; e++) {
                        u32 at = j * 8 + column + e, query = q_start + at;
                        float row_lse = lse_tile[turn.stage][at], row_delta = delta_tile[turn.stage][at];
                        u32 unseen = first_key(starts, batch, query, q_len);
#pragma unroll
                        for (u32 i = 0; i < 2; i++) {
                            float& weight = score[j * 4 + i * 2 + e];
                            float& value = d_score[j * 4 + i * 2 + e];
                            weight = exp2(weight * (scale * LOG2_E) - row_lse);
                            if (!whole && (query >= q_len || key + i * 8 > query + shift || key + i * 8 < unseen)) weight = 0;
                            value = weight * (value - row_delta) * scale;
                        }
                    }
                }
                u32 weights[TILE / 16][4], d_scores[TILE / 16][4];
                round_sums(weights, score);
                round_sums(d_scores, d_score);
                group_begin();
                accumulate(value_results, weights, grad_tile);
                accumulate(key_results, d_scores, q_tile);
                group_commit();
                group_wait<0>();
            }
            if (threadIdx.x % 128 == 0) barrier_arrive(left + turn.stage * 8);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u64 at = (((u64)batch * kv_len + key + i * 8) * kv_heads + kv_head) * HEAD_DIM;
        bool inside = key + i * 8 < kv_len;
        write_row(inside ? d_k + at : nullptr, key_results, i, 1);
        write_row(inside ? d_v + at : nullptr, value_results, i, 1);
    }
#else
    u32 query = q_start + row, first[2];
    float results[HEAD_DIM / 2] = {};
#pragma unroll
    for (u32 i = 0; i < 2; i++) first[i] = first_key(starts, batch, query + i * 8, q_len);
#if defined(FORWARD)
    float highest[2] = {MASKED, MASKED}, sum[2] = {};
#else
    float row_lse[2], deltas[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 inside = min(query + i * 8, q_len - 1), at = (batch * heads + head) * q_len + inside;
        u64 vectors = (((u64)batch * q_len + inside) * heads + head) * (HEAD_DIM / 8);
        deltas[i] = row_delta((const uint4*)out + vectors, (const uint4*)grad + vectors);
        row_lse[i] = lse[at] * LOG2_E;
        if (column == 0 && query + i * 8 < q_len) delta[at] = deltas[i];
    }
#endif
    barrier_wait(rows_arrived, 0);
    for (u32 tile = begin; tile < end; tile++, turn.next()) {
        barrier_wait(arrived + turn.stage * 8, turn.parity);
        u32 k_tile = stages + turn.stage * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES, kv_start = tile * TILE;
        // The group's last query sees none of the keys behind its own.
        if (kv_start <= q_start + side + 63 + shift) {
            float score[TILE / 2];
            u32 operands[TILE / 16][4];
            bool whole = !DOCUMENTS && kv_start + TILE <= q_start + side + shift + 1;
            group_begin();
            scores(score, own, k_tile);
#if defined(FORWARD)
            group_commit();
            group_wait<0>();
            float best[2] = {highest[0], highest[1]};
#pragma unroll
            for (u32 j = 0; j < TILE / 2; j++) {
                u32 i = j / 2 % 2, seen = kv_start + j / 4 * 8 + column + j % 2;
                score[j] *= scale * LOG2_E;
                if (!whole && (seen > query + i * 8 + shift || seen < first[i])) score[j] = MASKED;
                best[i] = fmaxf(best[i], score[j]);
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                best[i] = row_max(best[i]);
                float correction = exp2(highest[i] - best[i]);
                highest[i] = best[i];
                sum[i] *= correction;
#pragma unroll
                for (u32 j = 0; j < HEAD_DIM / 8; j++) {
                    results[j * 4 + i * 2] *= correction;
                    results[j * 4 + i * 2 + 1] *= correction;
                }
            }
#pragma unroll
            for (u32 j = 0; j < TILE / 2; j++) {
                u32 i = j / 2 % 2;
                // A row that sees nothing of this tile has no greater score to vanish against.
                score[j] = DOCUMENTS && score[j] <= MASKED ? 0 : exp2(score[j] - best[i]);
                sum[i] += score[j];
            }
            round_sums(operands, score);
            group_begin();
            accumulate(results, operands, v_tile);
#else
            float d_weight[TILE / 2];
            scores(d_weight, own + FIXED_BYTES, v_tile);
            group_commit();
            group_wait<0>();
#pragma unroll
            for (u32 j = 0; j < TILE / 2; j++) {
                u32 i = j / 2 % 2, seen = kv_start + j / 4 * 8 + column + j % 2;
                float weight = exp2(score[j] * (scale * LOG2_E) - row_lse[i]);
                score[j] = weight * (d_weight[j] - deltas[i]) * scale;
                if (!whole && (seen > query + i * 8 + shift || seen < first[i])) score[j] = 0;
            }
            round_sums(operands, score);
            group_begin();
            accumulate(results, operands, k_tile);
#endif
            group_commit();
            group_wait<0>();
        }
        if (threadIdx.x % 128 == 0) barrier_arrive(left + turn.stage * 8);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        bool inside = query + i * 8 < q_len;
        u64 at = (((u64)batch * q_len + query + i * 8) * heads + head) * HEAD_DIM;
#if defined(FORWARD)
        float total = row_sum(sum[i]);
        write_row(inside ? out + at : nullptr, results, i, 1 / total);
        if (inside && column == 0) lse[(batch * heads + head) * q_len + query + i * 8] = (highest[i] + log2f(total)) / LOG2_E;
#else
        write_row(inside ? d_q + at : nullptr, results, i, 1);
#endif
    }
#endif
}

// Products on the tensor cores of Hopper, by warp groups of four planes: some at once, or the sum of some.
//
// Before this text come `hopper.cuh` and the definitions of one variant: MEMBERS, how many products, and SUM, whether they are summed; COLUMNS of a tile;
// A_SUMMED_INNER and B_SUMMED_INNER, whether the summed dimension of an operand is its contiguous one; OUT_F32, OUT_BF16 or OUT_F16; ADD,
// whether a result in f32 is added to what lies there; PARAMETERS, A_MAPS, B_MAPS and OUTS, the kernel's parameters and lists of them;
// and the instruction for a warp group's 64 rows, WGMMA(sums, a, b, add).
//
// Two warp groups multiply, 64 rows × COLUMNS each in registers. A unit beside them copies: tiles of both operands by the tensor memory
// accelerator, as many steps ahead as there are stages, on into the next tile of the result. Two cubes make a pair: they have
// neighbouring rows and the same columns, and each copies a half of the columns' operand for both.

/// Of each product; a sum has the same rows and columns for all, products that are not summed have sums of one length.
struct Shape {
    u64 rows[MEMBERS], columns[MEMBERS], summed[MEMBERS];
    u64 part, splits;
};

#if defined(OUT_F32)
typedef float Out;
#else
typedef unsigned short Out;
#endif

constexpr u32 PAIR = 2;
constexpr u32 ROWS = 128;
constexpr u32 DEPTH = 64;
constexpr u32 A_BYTES = ROWS * DEPTH * 2;
constexpr u32 B_BYTES = COLUMNS * DEPTH * 2;
constexpr u32 STAGES = 192 * 1024 / (A_BYTES + B_BYTES);
// A copy of 64 × 64 values, where the summed dimension is the outer one.
constexpr u32 BOX = 64;
constexpr u32 BOX_BYTES = BOX * DEPTH * 2;
// Row tiles, in pairs, whose columns are done together, so that what they read stays in the cache.
constexpr u32 GROUP = 8;

/// Arrives at the barrier in the same place of a cube of the pair. At the default scope: a wider one would wait for all writes to memory,
/// and what was read here was read by the tensor cores, which are done.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ void pair_sync() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// The same to both cubes of the pair.
__device__ __forceinline__ void copy_to_both(const TensorMap& map, u32 to, u32 barrier, int inner, int outer) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(inner), "r"(outer), "h"((unsigned short)3)
        : "memory");
}

/// From 16 values along the sum to the next 16, in the units of a descriptor.
constexpr u64 a_advance = (A_SUMMED_INNER ? 16 * 2 : 16 * 128) >> 4;
constexpr u64 b_advance = (B_SUMMED_INNER ? 16 * 2 : 16 * 128) >> 4;

/// A tile of a result and its part of the sum.
struct Tile {
    u32 member = 0, split, row, column, begin, steps = 0;

    __device__ __forceinline__ Tile(const Shape& shape, u32 number, u32 rank) {
        if (!SUM)
            while (member + 1 < MEMBERS && number >= count(shape, member)) number -= count(shape, member++);
        u32 pairs = row_pairs(shape, member), column_tiles = columns(shape, member);
        split = number / (pairs * column_tiles);
        number %= pairs * column_tiles;
        u32 group = number / (GROUP * column_tiles);
        u32 group_rows = min(pairs - group * GROUP, GROUP);
        number %= GROUP * column_tiles;
        row = ((group * GROUP + number % group_rows) * PAIR + rank) * ROWS;
        column = number / group_rows * COLUMNS;
        begin = split * (u32)shape.part;
        for (u32 i = member; i < (SUM ? MEMBERS : member + 1); i++) steps += steps_of(shape, i);
    }

    /// Steps of a product's part of the sum.
    __device__ __forceinline__ u32 steps_of(const Shape& shape, u32 member) const {
        return (min(begin + (u32)shape.part, (u32)shape.summed[member]) - begin + DEPTH - 1) / DEPTH;
    }

    static __device__ __forceinline__ u32 row_pairs(const Shape& shape, u32 member) {
        return ((u32)shape.rows[member] + PAIR * ROWS - 1) / (PAIR * ROWS);
    }

    static __device__ __forceinline__ u32 columns(const Shape& shape, u32 member) {
        return ((u32)shape.columns[member] + COLUMNS - 1) / COLUMNS;
    }

    /// Pairs of tiles that a product has.
    static __device__ __forceinline__ u32 count(const Shape& shape, u32 member) {
        return row_pairs(shape, member) * columns(shape, member) * (u32)shape.splits;
    }
};

/// One of a list, which stays in registers.
template <typename T, u32 N>
__device__ __forceinline__ T pick(T (&list)[N], u32 index) {
    T picked = list[0];
#pragma unroll
    for (u32 i = 1; i < N; i++) picked = index == i ? list[i] : picked;
    return picked;
}

#if defined(OUT_F32)

/// Writes the sums of a row at `columns`, two neighbours of each eight columns in a unit: units exchange, so that each writes four.
__device__ __forceinline__ void write_row(Out* row, const float* sums, u32 first, u32 columns) {
    u32 lane = threadIdx.x % 4;
    bool odd = lane % 2;
#pragma unroll
    for (u32 j = 0; j < COLUMNS / 8; j += 2) {
        float2 here = make_float2(sums[j * 4], sums[j * 4 + 1]), there = make_float2(sums[j * 4 + 4], sums[j * 4 + 5]);
        float2 give = odd ? here : there, keep = odd ? there : here;
        float2 got = make_float2(__shfl_xor_sync(~0u, give.x, 1), __shfl_xor_sync(~0u, give.y, 1));
        float4 four = odd ? make_float4(got.x, got.y, keep.x, keep.y) : make_float4(keep.x, keep.y, got.x, got.y);
        u32 column = first + (j + odd) * 8 + lane / 2 * 4;
        if (row && column < columns) {
            float4* at = (float4*)(row + column);
#if ADD
            // By the cache, once for each value: nothing here waits for what was there.
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w)
                         : "memory");
#else
            *at = four;
#endif
        }
    }
}
#else

__device__ __forceinline__ void write_row(Out* row, const float* sums, u32 first, u32 columns) {
    write_rounded<COLUMNS>(row, sums, first, columns);
}
#endif

extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(288, 1) product(
    PARAMETERS, const __grid_constant__ Shape shape) {
    const TensorMap* a_maps[] = {A_MAPS};
    const TensorMap* b_maps[] = {B_MAPS};
    Out* outs[] = {OUTS};
    extern __shared__ unsigned char room[];
    __shared__ u64 barriers[2 * STAGES];
    // What is swizzled begins at whole patterns.
    u32 a_at = (shared_address(room) + 1023) / 1024 * 1024, b_at = a_at + STAGES * A_BYTES;
    u32 arrived = shared_address(barriers), left = arrived + STAGES * 8;
    u32 rank = blockIdx.x % PAIR, group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            barrier_init(arrived + stage * 8, 1);
            barrier_init(left + stage * 8, 2 * PAIR);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    pair_sync();

    u32 tiles = 0;
    for (u32 i = 0; i < (SUM ? 1 : MEMBERS); i++) tiles += Tile::count(shape, i);
    Turn<STAGES> turn;
    if (group == 2) {
        if (threadIdx.x % 128 == 0) {
            for (u32 number = blockIdx.x / PAIR; number < tiles; number += gridDim.x / PAIR) {
                Tile tile(shape, number, rank);
                for (u32 i = tile.member; i < (SUM ? MEMBERS : tile.member + 1); i++) {
                    const TensorMap &a_map = *pick(a_maps, i), &b_map = *pick(b_maps, i);
                    for (u32 step = 0; step < tile.steps_of(shape, i); step++) {
                        u32 barrier = arrived + turn.stage * 8;
                        barrier_wait(left + turn.stage * 8, turn.parity ^ 1);
                        barrier_expect(barrier, A_BYTES + B_BYTES);
                        int summed = tile.begin + step * DEPTH;
                        u32 to = a_at + turn.stage * A_BYTES;
                        if (A_SUMMED_INNER) {
                            copy(a_map, to, barrier, summed, tile.row);
                        } else {
                            for (u32 i = 0; i < ROWS / BOX; i++)
                                copy(a_map, to + i * BOX_BYTES, barrier, tile.row + i * BOX, summed);
                        }
                        u32 column = rank * (COLUMNS / PAIR);
                        to = b_at + turn.stage * B_BYTES + column * DEPTH * 2;
                        column += tile.column;
                        if (B_SUMMED_INNER) {
                            copy_to_both(b_map, to, barrier, summed, column);
                        } else {
                            for (u32 i = 0; i < COLUMNS / PAIR / BOX; i++)
                                copy_to_both(b_map, to + i * BOX_BYTES, barrier, column + i * BOX, summed);
                        }
                        turn.next();
                    }
                }
            }
        }
    } else {
        u32 side = group * 64;
        // Sixty-four rows of 128 bytes, or the box of these rows: both as long.
        u64 a_first = descriptor(a_at + side * DEPTH * 2, BOX_BYTES), b_first = descriptor(b_at, BOX_BYTES);
        for (u32 number = blockIdx.x / PAIR; number < tiles; number += gridDim.x / PAIR) {
            Tile tile(shape, number, rank);
            float sums[COLUMNS / 2];
            u32 before = 0;
            for (u32 step = 0; step < tile.steps; step++) {
                barrier_wait(arrived + turn.stage * 8, turn.parity);
                u64 a = a_first + turn.stage * (A_BYTES >> 4), b = b_first + turn.stage * (B_BYTES >> 4);
                group_begin();
#pragma unroll
                for (u32 k = 0; k < DEPTH / 16; k++) WGMMA(sums, a + k * a_advance, b + k * b_advance, step + k > 0);
                group_commit();
                // The step before has been multiplied, in this cube; its place may be filled in both.
                group_wait<1>();
                if (step > 0 && threadIdx.x % 128 < PAIR) barrier_arrive(left + before * 8, threadIdx.x % 128);
                before = turn.stage;
                turn.next();
            }
            group_wait<0>();
            if (threadIdx.x % 128 < PAIR) barrier_arrive(left + before * 8, threadIdx.x % 128);
            u32 row = tile.row + side + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
            Out* out = pick(outs, SUM ? 0 : tile.member);
            u32 rows = shape.rows[tile.member], columns = shape.columns[tile.member];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                Out* at = out + ((u64)tile.split * rows + row + half * 8) * columns;
                write_row(row + half * 8 < rows ? at : nullptr, sums + half * 2, tile.column, columns);
            }
        }
    }
    // Neither may end while the other copies to it or arrives at its barriers.
    pair_sync();
}

// What kernels for Hopper share: the tensor memory accelerator's copies and the barriers that tell of them, operands in shared memory for
// instructions of a warp group, results rounded and written.

typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* at) {
    return (u32)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\n"
        "bra.uni again;\n"
        "over:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Arrives at a barrier of this cube.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/// Copies a box whose first value has these coordinates, the contiguous dimension's first.
__device__ __forceinline__ void copy(const TensorMap& map, u32 to, u32 barrier, int inner, int outer) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(inner), "r"(outer)
        : "memory");
}

/// How an operand lies in shared memory: rows of 128 bytes, swizzled; groups of eight follow each other; boxes of 64 columns are so many
/// bytes apart.
__device__ __forceinline__ u64 descriptor(u32 at, u32 box_bytes) {
    return (u64)(at & 0x3FFFF) >> 4 | (u64)(box_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

/// Before instructions of a warp group that read registers which others wrote.
__device__ __forceinline__ void group_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Until all but so many groups of instructions are done.
template <u32 BUT>
__device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BUT) : "memory");
}

/// A stage of those in turn, and how often all have been used, odd or even.
template <u32 STAGES>
struct Turn {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// Two values in half precision, bf16 with ROUND_BF16.
__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 both;
#if defined(ROUND_BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

/// The two values back.
__device__ __forceinline__ float low(u32 both) {
#if defined(ROUND_BF16)
    return __uint_as_float(both << 16);
#else
    float value;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}\n" : "=f"(value) : "r"(both));
    return value;
#endif
}

__device__ __forceinline__ float high(u32 both) {
#if defined(ROUND_BF16)
    return __uint_as_float(both & 0xFFFF0000);
#else
    return low(both >> 16);
#endif
}

/// Writes the sums of a row, two neighbours of each eight columns in a unit: units exchange, so that each writes eight.
template <u32 WIDTH>
__device__ __forceinline__ void write_rounded(unsigned short* row, const float* sums, u32 first, u32 columns) {
    u32 lane = threadIdx.x % 4;
    bool odd = lane % 2, late = lane / 2;
#pragma unroll
    for (u32 j = 0; j < WIDTH / 8; j += 4) {
        u32 pairs[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) pairs[i] = rounded(sums[(j + i) * 4], sums[(j + i) * 4 + 1]);
        u32 got_0 = __shfl_xor_sync(~0u, odd ? pairs[0] : pairs[1], 1);
        u32 got_1 = __shfl_xor_sync(~0u, odd ? pairs[2] : pairs[3], 1);
        uint2 here = odd ? make_uint2(got_0, pairs[1]) : make_uint2(pairs[0], got_0);
        uint2 there = odd ? make_uint2(got_1, pairs[3]) : make_uint2(pairs[2], got_1);
        uint2 give = late ? here : there, keep = late ? there : here;
        uint2 got = make_uint2(__shfl_xor_sync(~0u, give.x, 2), __shfl_xor_sync(~0u, give.y, 2));
        uint4 eight = late ? make_uint4(got.x, got.y, keep.x, keep.y) : make_uint4(keep.x, keep.y, got.x, got.y);
        u32 column = first + (j + lane) * 8;
        if (row && column < columns) *(uint4*)(row + column) = eight;
    }
}

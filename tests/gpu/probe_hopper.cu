// The same for Hopper's own instructions, which later kernels need: tiles that the tensor memory accelerator (TMA) lays out in shared memory
// with its 128-byte swizzle, and wgmma.m64n64k16 (bf16) on them. Only for sm_90a; the software GPU has no model of these.
#include <stdint.h>

#include "probe.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A swizzled tile starts at a multiple of 1,024 bytes.
extern __shared__ __align__(1024) unsigned char shared[];

struct alignas(64) tensor_map {
    uint64_t opaque[16];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// One thread: loads box (column, row) of a two-dimensional tensor and makes `barrier` count its bytes.
__device__ __forceinline__ void load_box(void* to, const tensor_map* map, int column, int row, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void start_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Waits for the barrier's first phase.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier))
        : "memory");
}

// A tile as TMA lays it out: in[r][c] holds r·64 + c. out: shared memory in order.
extern "C" __global__ void __launch_bounds__(GROUP) probe_tma(const __grid_constant__ tensor_map map, uint64_t out, int row) {
    __shared__ uint64_t barrier;
    for (uint32_t i = threadIdx.x; i < TILE * TILE; i += GROUP) {
        ((uint16_t*)shared)[i] = 0xffff;
    }
    if (threadIdx.x == 0) {
        start_barrier(&barrier);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(&barrier, TILE * TILE * 2);
        load_box(shared, &map, 0, row, &barrier);
    }
    wait_barrier(&barrier);
    for (uint32_t i = threadIdx.x; i < TILE * TILE; i += GROUP) {
        ((uint16_t*)out)[i] = ((const uint16_t*)shared)[i];
    }
}

// Matrix descriptor of a tile with 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, const probe_descriptor& d) {
    return (uint64_t)(address & 0x3ffff) >> 4 | (uint64_t)(d.leading >> 4 & 0x3fff) << 16 | (uint64_t)(d.stride >> 4 & 0x3fff) << 32 | 1ull << 62;
}

#define D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(d) D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24)
#define D32_NAMES                                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
    "%28, %29, %30, %31}"

// d += A·Bᵀ, both in shared memory. TA, TB: 0 if rows of the tile are rows of A (of Bᵀ's columns), k contiguous; 1 if rows of the tile are k.
template <int TA, int TB>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32_NAMES ", %32, %33, 1, 1, 1, %34, %35;"
                 : D32(d)
                 : "l"(a), "l"(b), "n"(TA), "n"(TB));
}
// The same with A in registers.
template <int TB>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32_NAMES ", {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                 : D32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TB));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_finish(float (&d)[32]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" : D32(d)::"memory");
}

// Both tiles by TMA.
__device__ __forceinline__ void load_tiles(const tensor_map* a, const tensor_map* b, uint64_t* barrier) {
    for (uint32_t i = threadIdx.x; i < HOPPER_SHARED / 4; i += GROUP) {
        ((uint32_t*)shared)[i] = 0;
    }
    if (threadIdx.x == 0) {
        start_barrier(barrier);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(barrier, 2 * TILE * TILE * 2);
        load_box(shared, a, 0, 0, barrier);
        load_box(shared + B_AT, b, 0, 0, barrier);
    }
    wait_barrier(barrier);
}

// D of the whole tiles, k = 64 in four slices. out: 32 accumulators of each of 128 threads.
template <int TA, int TB>
__device__ __forceinline__ void probe_wgmma(const tensor_map* a, const tensor_map* b, const probe_wgmma_params& p) {
    __shared__ uint64_t barrier;
    load_tiles(a, b, &barrier);
    float d[32] = {};
    wgmma_fence();
    for (uint32_t k = 0; k < 4; k++) {
        const uint32_t at = shared_address(shared);
        wgmma<TA, TB>(d, descriptor(at + k * p.a.step, p.a), descriptor(at + B_AT + k * p.b.step, p.b));
    }
    wgmma_finish(d);
    for (int i = 0; i < 32; i++) {
        ((float*)p.out)[threadIdx.x * 32 + i] = d[i];
    }
}
#define PROBE_WGMMA(name, TA, TB)                                                                                             \
    extern "C" __global__ void __launch_bounds__(GROUP) name(const __grid_constant__ tensor_map a, const __grid_constant__ tensor_map b, \
                                                             const __grid_constant__ probe_wgmma_params p) {                  \
        probe_wgmma<TA, TB>(&a, &b, p);                                                                                       \
    }
PROBE_WGMMA(probe_wgmma_kk, 0, 0)
PROBE_WGMMA(probe_wgmma_km, 0, 1)
PROBE_WGMMA(probe_wgmma_mk, 1, 0)
PROBE_WGMMA(probe_wgmma_mm, 1, 1)

// A in registers: for each slot in turn, that one is 1, the others 0. B's column k, row 0 holds k + 1, so D (m, 0) = k + 1 if the slot is (m, k).
// out[slot]: accumulator (thread·32 + register) << 8 | value of the only one that is not 0; all ones if there were several.
extern "C" __global__ void __launch_bounds__(GROUP)
    probe_wgmma_registers(const __grid_constant__ tensor_map a, const __grid_constant__ tensor_map b, const __grid_constant__ probe_wgmma_params p) {
    __shared__ uint64_t barrier;
    __shared__ uint32_t found;
    load_tiles(&a, &b, &barrier);
    for (uint32_t slot = 0; slot < WG_A_SLOTS; slot++) {
        if (threadIdx.x == 0) {
            found = 0;
        }
        __syncthreads();
        uint32_t x[4];
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t mine = threadIdx.x * 8 + i * 2;
            x[i] = mine == slot ? 0x3f80u : mine + 1 == slot ? 0x3f800000u : 0u;
        }
        float d[32] = {};
        wgmma_fence();
        wgmma<0>(d, x, descriptor(shared_address(shared + B_AT), p.b));
        wgmma_finish(d);
        for (uint32_t i = 0; i < 32; i++) {
            if (d[i] != 0.0f) {
                const uint32_t word = (threadIdx.x * 32 + i) << 8 | (uint32_t)d[i];
                if (atomicCAS(&found, 0u, word) != 0u) {
                    found = 0xffffffffu;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            ((uint32_t*)p.out)[slot] = found;
        }
    }
}
#endif

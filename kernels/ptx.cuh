// The machine, as the kernels see it: every instruction that is not plain C++ is one function here. On the device they are PTX; in the
// software GPU (tests/softgpu/device.h) they are a model of it. Kernels touch global memory only through this file.
//
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix"; tests/gpu probes them on hardware.
#pragma once
#include <stdint.h>

// Storage types, by their bits.
struct bf16_t {
    uint16_t bits;
};
struct f16_t {
    uint16_t bits;
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// Dynamic shared memory of the block, aligned to 128 bytes.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// d += a·b: 16×16 by 16×8, fp32 accumulators.
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DEVICE void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma_m16n8k16<f16_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8 (16 bytes, aligned).
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// 16 bytes from global to shared memory, later; zeros if not valid, and then `global` is not read.
DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0));
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most N committed groups of this thread are pending.
template <int N>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers rounded to the storage type (nearest, ties to even), `low` in the lower half.
template <class T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<bf16_t>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <>
DEVICE uint32_t pack2<f16_t>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float to_float(bf16_t x) { return __uint_as_float((uint32_t)x.bits << 16); }
DEVICE float to_float(f16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// Whether x holds in any lane of the warp.
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
// x, but the compiler does not know: what is computed from it is computed again where it is needed, instead of being held in registers.
DEVICE uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// Barrier `id` (1 … 15) of `threads` threads of the block, whole warps.
DEVICE void sync_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Global memory. T is 4, 8 or 16 bytes (uint32_t, float, uint2, float2, uint4, float4), 2 (bf16_t, f16_t, uint16_t) or 1 (uint8_t).
template <class T>
DEVICE T load_global(const T* p) {
    return *p;
}
// The same for what no one writes during the launch.
template <class T>
DEVICE T load_constant(const T* p) {
    return __ldg(p);
}
template <class T>
DEVICE void store_global(T* p, T x) {
    *p = x;
}
// *p += x, atomically, in no order.
DEVICE void add_global(float* p, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory"); }
// p[0] += x, p[1] += y, each atomically; p is a multiple of 8.
DEVICE void add_global_2(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
    add_global(p, x);
    add_global(p + 1, y);
#endif
}
DEVICE uint32_t load_acquire(const uint32_t* p) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
DEVICE void add_release(uint32_t* p, uint32_t x) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
// Spins until *p == x. One thread of the block; others wait at a barrier.
DEVICE void wait_for(const uint32_t* p, uint32_t x) {
    while (load_acquire(p) != x) {
    }
}

#else
#include "device.h"
#endif

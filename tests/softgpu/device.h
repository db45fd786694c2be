// The software GPU's device: what kernels/ptx.cuh declares, for a kernel compiled by a host compiler, and softgpu::launch, which runs one.
//
// Every CUDA thread is a fiber. A warp's threads meet in each collective instruction and the last to arrive does the work for all 32, as
// the PTX manual lays it out. The model is stricter than hardware; README.md lists how.
#pragma once
#include "ptx.cuh"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

// CUDA's own names, those that kernels use.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define __align__(n) alignas(n)
#define DEVICE inline __attribute__((always_inline))
#define SHARED_MEMORY(name) unsigned char* const name = softgpu::current->shared

#define SOFTGPU_VECTOR2(type, name)                                    \
    struct alignas(2 * sizeof(type)) name {                            \
        type x, y;                                                     \
    };                                                                 \
    static inline name make_##name(type x, type y) { return {x, y}; }
#define SOFTGPU_VECTOR4(type, name)                                                              \
    struct alignas(16) name {                                                                    \
        type x, y, z, w;                                                                         \
    };                                                                                           \
    static inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SOFTGPU_VECTOR2(int, int2)
SOFTGPU_VECTOR2(unsigned, uint2)
SOFTGPU_VECTOR2(float, float2)
SOFTGPU_VECTOR4(int, int4)
SOFTGPU_VECTOR4(unsigned, uint4)
SOFTGPU_VECTOR4(float, float4)
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SOFTGPU_MINMAX(type)                                             \
    static inline type min(type a, type b) { return b < a ? b : a; }     \
    static inline type max(type a, type b) { return a < b ? b : a; }
SOFTGPU_MINMAX(int)
SOFTGPU_MINMAX(unsigned)
SOFTGPU_MINMAX(long)
SOFTGPU_MINMAX(unsigned long)
SOFTGPU_MINMAX(long long)
SOFTGPU_MINMAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

namespace softgpu {
template <class To, class From>
inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
}  // namespace softgpu
static inline uint32_t __float_as_uint(float x) { return softgpu::bit_cast<uint32_t>(x); }
static inline int __float_as_int(float x) { return softgpu::bit_cast<int>(x); }
static inline float __uint_as_float(uint32_t x) { return softgpu::bit_cast<float>(x); }
static inline float __int_as_float(int x) { return softgpu::bit_cast<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }

namespace softgpu {

// What launch throws: the text names kernel, block, thread and operation.
struct error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Warp;
struct Launch;

// One thread of the kernel, as its code sees itself.
struct Lane {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
    unsigned char* shared;  // dynamic shared memory of the block
    uint32_t shared_bytes;
    uint32_t lane;
    Warp* warp;
    Launch* launch;
    void* races;  // of the block, if races are looked for (race.h)
};
// Set for the fiber that runs on this OS thread.
extern __thread Lane* current __attribute__((tls_model("initial-exec")));

enum Access { READ, CONSTANT, WRITE, ATOMIC };
extern bool track_reads;  // plain loads are recorded, too

// A live piece of device memory: addresses begin … end as kernels see them; this process finds the bytes `shift` higher.
struct Range {
    uintptr_t begin, end;
    ptrdiff_t shift;
};
const uint32_t RANGES = 64;
extern __thread Range* ranges __attribute__((tls_model("initial-exec")));  // cache of the registry, for one launch

// The slow part of `global`: finds the range or fails.
void* find_global(uintptr_t address, uint32_t bytes, Access access);
// The bytes at a global address, checked.
inline void* global(const void* p, uint32_t bytes, Access access) {
    const uintptr_t address = (uintptr_t)p;
    const Range& r = ranges[(address >> 16) % RANGES];
    if (access == READ && !track_reads && address >= r.begin && address + bytes <= r.end && address % bytes == 0) return (char*)p + r.shift;
    return find_global(address, bytes, access);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool f16);
void ldmatrix(uint32_t* r, const void* row, bool transposed);
uint32_t shuffle_from(uint32_t x, uint32_t lane);
uint32_t vote(bool x);  // a bit per lane
void barrier(uint32_t id, uint32_t threads, bool whole_block);
void warp_barrier();
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(uint32_t newest);
uint32_t poll(const uint32_t* p);
void wait_value(const uint32_t* p, uint32_t x);
uint16_t float_to_f16(float x);
float f16_to_float(uint16_t x);

// Memory that kernels may touch: [address, address + bytes), found in this process `shift` bytes higher. `name` appears in errors.
// `device`: only kernels allowed to (Options) reach it; −1: all are. Overlap with live memory is refused.
void register_memory(const void* address, size_t bytes, const char* name, ptrdiff_t shift = 0, int device = -1);
void unregister_memory(const void* address);
// Where the bytes of [address, address + bytes) are; null if that is not inside one live piece.
void* resolve(const void* address, size_t bytes);

// A host buffer of a test program, registered while this lives.
struct Registered {
    const void* address;
    Registered(const void* p, size_t bytes, const char* name) : address(p) { register_memory(p, bytes, name); }
    ~Registered() { unregister_memory(address); }
    Registered(const Registered&) = delete;
    Registered& operator=(const Registered&) = delete;
};

struct Accesses;

// The order of warps and blocks; each block draws its own from the seed unless one is forced.
enum Schedule { ROUND_ROBIN, REVERSED, GREEDY, RANDOM, SCHEDULES };

struct Options {
    const char* name = nullptr;  // for errors; else the symbol's name, if that can be found
    uint64_t seed = 0;           // 0: from SOFTGPU_SEED (default 1) and the number of the launch
    int schedule = -1;           // -1: drawn per block
    uint64_t devices = ~0ull;    // a bit per device whose memory the kernel may touch
    Accesses* accesses = nullptr;  // filled with what the kernel touches (access.h)
    uint32_t resident = 0;       // blocks in flight at once; 0: drawn from 1 … 3
};

// What a launch did, for selftests and measurements.
struct Counts {
    uint64_t switches, mma, ldmatrix, bank_conflicts;
};
Counts counts();

void run(void (*call)(void*), void* context, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Options& options);

template <class... P>
struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> params;
    static void call(void* self) { std::apply(((Call*)self)->kernel, ((Call*)self)->params); }
};

// Runs the grid to its end; throws `error`.
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const Options& options, const std::decay_t<P>&... params) {
    Call<P...> call{kernel, {params...}};
    run(&Call<P...>::call, &call, (const void*)kernel, grid, block, shared_bytes, options);
}
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const std::decay_t<P>&... params) {
    launch(kernel, grid, block, shared_bytes, Options(), params...);
}

}  // namespace softgpu

#define threadIdx (softgpu::current->thread)
#define blockIdx (softgpu::current->block)
#define blockDim (softgpu::current->block_dim)
#define gridDim (softgpu::current->grid_dim)

// The primitives of ptx.cuh.
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - softgpu::current->shared); }

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    softgpu::mma(d, a, b0, b1, std::is_same<T, f16_t>::value);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { softgpu::ldmatrix(r, row, false); }
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { softgpu::ldmatrix(r, row, true); }

DEVICE void cp_async_16(void* shared, const void* global, bool valid) { softgpu::copy_async(shared, global, valid); }
DEVICE void cp_async_commit() { softgpu::copy_commit(); }
template <int N>
DEVICE void cp_async_wait() {
    softgpu::copy_wait(N);
}

// .ftz: subnormal numbers count as zero, in and out.
DEVICE float softgpu_flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
DEVICE float exp2_approx(float x) { return softgpu_flush(exp2f(softgpu_flush(x))); }
DEVICE float log2_approx(float x) { return softgpu_flush(log2f(softgpu_flush(x))); }
DEVICE float reciprocal_approx(float x) { return softgpu_flush(1.0f / softgpu_flush(x)); }

DEVICE uint32_t softgpu_bf16(float x) {
    const uint32_t u = __float_as_uint(x);
    return x != x ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
template <class T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<bf16_t>(float low, float high) {
    return softgpu_bf16(low) | softgpu_bf16(high) << 16;
}
template <>
DEVICE uint32_t pack2<f16_t>(float low, float high) {
    return softgpu::float_to_f16(low) | (uint32_t)softgpu::float_to_f16(high) << 16;
}
DEVICE float to_float(bf16_t x) { return __uint_as_float((uint32_t)x.bits << 16); }
DEVICE float to_float(f16_t x) { return softgpu::f16_to_float(x.bits); }

DEVICE float shuffle_xor(float x, int mask) {
    return __uint_as_float(softgpu::shuffle_from(__float_as_uint(x), softgpu::current->lane ^ (uint32_t)mask));
}
DEVICE uint32_t shuffle(uint32_t x, int lane) { return softgpu::shuffle_from(x, (uint32_t)lane); }
DEVICE bool any_lane(bool x) { return softgpu::vote(x) != 0; }
DEVICE uint32_t opaque(uint32_t x) { return x; }
DEVICE void sync_warp() { softgpu::warp_barrier(); }
DEVICE void sync_block() { softgpu::barrier(0, 0, true); }
DEVICE void sync_some(int id, int threads) { softgpu::barrier((uint32_t)id, (uint32_t)threads, false); }

template <class T>
DEVICE T load_global(const T* p) {
    T x;
    memcpy(&x, softgpu::global(p, sizeof(T), softgpu::READ), sizeof(T));
    return x;
}
template <class T>
DEVICE T load_constant(const T* p) {
    T x;
    memcpy(&x, softgpu::global(p, sizeof(T), softgpu::CONSTANT), sizeof(T));
    return x;
}
template <class T>
DEVICE void store_global(T* p, T x) {
    memcpy(softgpu::global(p, sizeof(T), softgpu::WRITE), &x, sizeof(T));
}
DEVICE void add_global(float* p, float x) {
    float* q = (float*)softgpu::global(p, sizeof(float), softgpu::ATOMIC);
    *q += x;
}
DEVICE void add_global_2(float* p, float x, float y) {
    float* q = (float*)softgpu::global(p, 2 * sizeof(float), softgpu::ATOMIC);
    q[0] += x, q[1] += y;
}
DEVICE uint32_t load_acquire(const uint32_t* p) { return softgpu::poll(p); }
DEVICE void add_release(uint32_t* p, uint32_t x) { *(uint32_t*)softgpu::global(p, sizeof(uint32_t), softgpu::ATOMIC) += x; }
DEVICE void wait_for(const uint32_t* p, uint32_t x) { softgpu::wait_value(p, x); }

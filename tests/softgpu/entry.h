// The kernels compiled into the stand-in for libcuda.so.1, which each register themselves when it is loaded.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct softgpu_kernel {
    const char* name;
    const void* function;
    void (*call)(void* params);
    size_t params_bytes;
    uint32_t max_threads;
    softgpu_kernel* next;
    static softgpu_kernel* first;
    softgpu_kernel(const char* n, const void* f, void (*c)(void*), size_t bytes, uint32_t threads)
        : name(n), function(f), call(c), params_bytes(bytes), max_threads(threads), next(first) {
        first = this;
    }
};

template <auto F>
struct softgpu_entry;
template <class P, void (*F)(P)>
struct softgpu_entry<F> {
    static void call(void* params) { F(*(const P*)params); }
    static const size_t bytes = sizeof(P);
};
// One line per kernel, after its source; `threads` is the first argument of its __launch_bounds__.
#define SOFTGPU_KERNEL(name, threads) \
    static softgpu_kernel softgpu_register_##name(#name, (const void*)name, softgpu_entry<name>::call, softgpu_entry<name>::bytes, threads);

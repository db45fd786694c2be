/* What the probe's kernels and its host program agree on. */
#ifndef PROBE_H
#define PROBE_H
#include <stdint.h>

/* One argument for every kernel but those of Hopper: addresses of device memory. */
struct probe_params {
    uint64_t in, out;
};

enum {
    WARP = 32,
    /* Elements of fragments of mma.m16n8k16, numbered (lane · registers + register) · elements per register + element, lowest bits first. */
    A_SLOTS = 256,
    B_SLOTS = 128,
    D_SLOTS = 128,
    LDMATRIX_ELEMENTS = 256,
    COPY_WORDS = 128,
    CONVERSIONS = 6144,
    POWERS = 2048,

    /* Hopper: one tile of 64 rows of 128 bytes; one warpgroup; accumulators of m64n64, A fragments of m64k16. */
    TILE = 64,
    GROUP = 128,
    WG_D_SLOTS = 4096,
    WG_A_SLOTS = 1024,
    /* Shared memory: tile A at 0, tile B behind it, and room for descriptors that reach too far. */
    HOPPER_SHARED = 192 * 1024,
    B_AT = 64 * 1024,
};

/* Strides of a wgmma descriptor, bytes. */
struct probe_descriptor {
    uint32_t leading, stride, step; /* step: from one k16 slice to the next */
};
struct probe_wgmma_params {
    uint64_t out;
    struct probe_descriptor a, b;
};
#endif

// The compiled shapes: which (dim_qk, dim_v) a kernel is built for, how large its tiles are and what it asks for at the launch.
// A problem takes the first row with dim_qk <= DQK and dim_v <= DV; the kernel's name ends in DQK. Rust reads this table too
// (src/backend/cuda/shapes.rs compares).
#pragma once

// X(DQK, DV, query tile rows, key tile rows, warps). At most 99 KB of shared memory each, so that one set serves every GPU since sm_80.
#define CP_FORWARD_SHAPES(X) \
    X(64, 64, 128, 64, 4)    \
    X(96, 96, 128, 64, 4)    \
    X(128, 128, 128, 64, 4)  \
    X(192, 128, 128, 64, 4)  \
    X(256, 256, 64, 64, 4)

// The same for kernels *_score, which do more between the products: one row block of 16 per warp leaves them the registers.
#define CP_FORWARD_SHAPES_SCORE(X) \
    X(64, 64, 128, 64, 8)          \
    X(96, 96, 128, 64, 8)          \
    X(128, 128, 128, 64, 8)        \
    X(192, 128, 128, 64, 8)        \
    X(256, 256, 64, 64, 4)

// Dynamic shared memory of a forward block, bytes: Q, K and V tiles of 16-bit elements, and two row numbers per query row.
#define CP_FORWARD_SHARED(dqk, dv, q_rows, k_rows) ((q_rows) * (dqk) * 2 + (k_rows) * ((dqk) + (dv)) * 2 + (q_rows) * 8)

// X(DQK, DV, query tile rows, key tile rows, warps, warps along the query rows of S, along the keys of dK and dV, along the query rows of dQ,
// stages of Q, stages of dO); see backward.cuh. The big set is for GPUs with 163 KB of shared memory per block or more, the small for 99 KB.
#define CP_BACKWARD_SHAPES(X)                   \
    X(64, 64, 128, 128, 8, 4, 4, 4, 2, 1)       \
    X(96, 96, 64, 128, 8, 2, 4, 4, 2, 2)        \
    X(128, 128, 64, 128, 8, 2, 4, 2, 2, 2)      \
    X(192, 128, 64, 96, 8, 4, 2, 4, 2, 1)       \
    X(256, 256, 64, 64, 8, 4, 2, 2, 1, 1)
#define CP_BACKWARD_SHAPES_SMALL(X)             \
    X(64, 64, 64, 128, 8, 2, 4, 4, 2, 2)        \
    X(96, 96, 64, 64, 8, 4, 4, 4, 2, 2)         \
    X(128, 128, 64, 64, 8, 4, 2, 2, 2, 1)       \
    X(192, 128, 32, 64, 8, 2, 2, 2, 2, 2)       \
    X(256, 256, 32, 32, 4, 2, 2, 2, 2, 1)
// Kernels *_score, for every GPU: small, so that what they do between the products has registers.
#define CP_BACKWARD_SHAPES_SCORE(X)             \
    X(64, 64, 64, 64, 8, 4, 4, 4, 2, 2)         \
    X(96, 96, 64, 64, 8, 4, 4, 4, 2, 2)         \
    X(128, 128, 64, 64, 8, 4, 2, 2, 2, 1)       \
    X(192, 128, 32, 64, 8, 2, 2, 2, 2, 2)       \
    X(256, 256, 32, 32, 4, 2, 2, 2, 2, 1)

// Dynamic shared memory of a backward block, bytes: K, V, the stages of Q and dO, P and dS, 28 bytes of numbers per query row, and 64.
#define CP_BACKWARD_SHARED(dqk, dv, q_rows, k_rows, q_stages, do_stages) \
    ((k_rows) * ((dqk) + (dv)) * 2 + (q_rows) * ((q_stages) * (dqk) + (do_stages) * (dv)) * 2 + (q_rows) * (k_rows) * 4 + (q_rows) * 28 + 64)
// Kernels *_score: and a token per query row.
#define CP_BACKWARD_SHARED_SCORE(dqk, dv, q_rows, k_rows, q_stages, do_stages) \
    (CP_BACKWARD_SHARED(dqk, dv, q_rows, k_rows, q_stages, do_stages) + (q_rows) * 16)

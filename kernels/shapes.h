// The compiled shapes: which (dim_qk, dim_v) a kernel is built for, how large its tiles are and what it asks for at the launch.
// A problem takes the first row with dim_qk <= DQK and dim_v <= DV; the kernel's name ends in DQK. Rust reads this table too
// (src/backend/cuda/launch.rs compares).
#pragma once

// X(DQK, DV, query tile rows, key tile rows, warps). At most 99 KB of shared memory each, so that one set serves every GPU since sm_80.
#define CP_FORWARD_SHAPES(X) \
    X(64, 64, 128, 64, 4)    \
    X(96, 96, 128, 64, 4)    \
    X(128, 128, 128, 64, 4)  \
    X(192, 128, 128, 64, 4)  \
    X(256, 256, 64, 64, 4)

// Dynamic shared memory of a forward block, bytes: Q, K and V tiles of 16-bit elements, and two row numbers per query row.
#define CP_FORWARD_SHARED(dqk, dv, q_rows, k_rows) ((q_rows) * (dqk) * 2 + (k_rows) * ((dqk) + (dv)) * 2 + (q_rows) * 8)

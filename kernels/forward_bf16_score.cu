// cp_forward_bf16_*_score.
#include "forward.cuh"

#define KERNEL(dqk, dv, q_rows, k_rows, warps) CP_FORWARD_KERNEL_SCORE(cp_forward_bf16_##dqk##_score, bf16_t, dqk, dv, q_rows, k_rows, warps)
CP_FORWARD_SHAPES_SCORE(KERNEL)
#undef KERNEL

// cp_forward_f16_*.
#include "forward.cuh"

#define KERNEL(dqk, dv, q_rows, k_rows, warps) CP_FORWARD_KERNEL(cp_forward_f16_##dqk, f16_t, dqk, dv, q_rows, k_rows, warps)
CP_FORWARD_SHAPES(KERNEL)
#undef KERNEL

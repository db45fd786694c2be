// cp_backward_f16_*, for GPUs with 163 KB of shared memory per block or more.
#include "backward.cuh"
#include "shapes.h"

#define KERNEL(dqk, ...) CP_BACKWARD_KERNEL(cp_backward_f16_##dqk, f16_t, 163, dqk, __VA_ARGS__)
CP_BACKWARD_SHAPES(KERNEL)
#undef KERNEL

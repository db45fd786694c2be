// cp_backward_bf16_*_small, for GPUs with 99 KB of shared memory per block.
#include "backward.cuh"
#include "shapes.h"

#define KERNEL(dqk, ...) CP_BACKWARD_KERNEL(cp_backward_bf16_##dqk##_small, bf16_t, 99, dqk, __VA_ARGS__)
CP_BACKWARD_SHAPES_SMALL(KERNEL)
#undef KERNEL

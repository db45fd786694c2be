// cp_backward_bf16_*_score.
#include "backward.cuh"
#include "shapes.h"

#define KERNEL(dqk, ...) CP_BACKWARD_KERNEL_SCORE(cp_backward_bf16_##dqk##_score, bf16_t, dqk, __VA_ARGS__)
CP_BACKWARD_SHAPES_SCORE(KERNEL)
#undef KERNEL

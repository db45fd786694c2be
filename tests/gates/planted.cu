// Kernels that the gates must refuse, each for the reason in its name (test_kernels.py).
#include "ptx.cuh"

// As bf16 a kernel with everything that is asked for, so that one fault at a time can be planted.
template <class T, bool LOAD, bool COPY, bool EXP2>
DEVICE void attention(const float* in, float* out) {
    SHARED_MEMORY(shared);
    uint32_t a[4] = {}, b[4] = {};
    float d[4] = {};
    if (COPY) {
        cp_async_16(shared + threadIdx.x * 16, in + threadIdx.x * 4, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    if (LOAD) {
        ldmatrix_x4(a, shared + threadIdx.x * 16);
    }
    ldmatrix_x4_trans(b, shared + threadIdx.x * 16);
    mma_m16n8k16<T>(d, a, b[0], b[1]);
    out[threadIdx.x] = EXP2 ? exp2_approx(d[0]) : d[0];
}

#define PARAMETERS const float *in, float *out
extern "C" __global__ void __launch_bounds__(32) cp_forward_bf16_right(PARAMETERS) { attention<bf16_t, true, true, true>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_forward_bf16_no_ldmatrix(PARAMETERS) { attention<bf16_t, false, true, true>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_forward_bf16_no_copy(PARAMETERS) { attention<bf16_t, true, false, true>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_forward_bf16_no_exp2(PARAMETERS) { attention<bf16_t, true, true, false>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_forward_bf16_other_type(PARAMETERS) { attention<f16_t, true, true, true>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_forward_f16_other_type(PARAMETERS) { attention<bf16_t, true, true, true>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_backward_bf16_no_add(PARAMETERS) {
    attention<bf16_t, true, true, true>(in, out);
    add_release((uint32_t*)out, 1);  // a RED too, but of integers
}
extern "C" __global__ void __launch_bounds__(32) cp_expand_bf16_no_copy(PARAMETERS) { attention<bf16_t, true, false, false>(in, out); }
extern "C" __global__ void __launch_bounds__(32) cp_contract_latent_f16_other_type(PARAMETERS) { attention<bf16_t, true, true, false>(in, out); }
extern "C" __global__ void cp_delta_no_bounds(PARAMETERS) { out[threadIdx.x] = in[threadIdx.x]; }

// An array whose index is known only at run time lies in local memory.
extern "C" __global__ void __launch_bounds__(32) cp_delta_local(PARAMETERS) {
    float x[32];
    for (int i = 0; i < 32; i++) {
        x[i] = in[i];
    }
    for (int i = 0; i < 32; i++) {
        x[(int)in[i] % 32] += x[i];
    }
    out[threadIdx.x] = x[threadIdx.x];
}

// 200 sums in the 32 registers that 2,048 threads per multiprocessor leave.
extern "C" __global__ void __launch_bounds__(1024, 2) cp_delta_spills(PARAMETERS) {
    float x[200];
#pragma unroll
    for (int i = 0; i < 200; i++) {
        x[i] = in[i * 1024 + threadIdx.x];
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < 200; i++) {
        out[i * 1024 + threadIdx.x] = x[i] * x[199 - i];
    }
}

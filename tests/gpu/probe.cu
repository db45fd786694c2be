// Which element of a matrix each lane's registers hold, as the machine has it, for the instructions of kernels/ptx.cuh. The host program
// (probe.c) writes the answers down; layouts.py compares them with the PTX manual.
#include "ptx.cuh"

#include "probe.h"

// ldmatrix: four 8×8 matrices, element (m, r, c) holding m·64 + r·8 + c, each row at the address of its lane. out: the registers of the plain
// form, then of .trans.
extern "C" __global__ void __launch_bounds__(WARP) probe_ldmatrix(probe_params p) {
    SHARED_MEMORY(shared);
    const uint32_t lane = threadIdx.x;
    uint16_t* row = (uint16_t*)(shared + lane * 16);
    for (uint32_t c = 0; c < 8; c++) {
        row[c] = (uint16_t)(lane * 8 + c);
    }
    sync_block();
    uint32_t r[4];
    uint32_t* out = (uint32_t*)p.out + lane * 4;
    ldmatrix_x4(r, row);
    for (int i = 0; i < 4; i++) {
        store_global(out + i, r[i]);
    }
    ldmatrix_x4_trans(r, row);
    for (int i = 0; i < 4; i++) {
        store_global(out + 128 + i, r[i]);
    }
}

// mma: for each slot of A in turn, that one is 1, the others 0; slot b of B holds b + 1. out[a][d]: what slot d of D got, that is b + 1 where
// A's slot and B's slot b meet in D's slot d. Last row: A is 0 and slot d of D was d + 1 before.
template <class T>
DEVICE void probe_mma(const probe_params& p) {
    const uint32_t lane = threadIdx.x;
    uint32_t b[2];
    for (uint32_t i = 0; i < 2; i++) {
        const float x = (float)(lane * 4 + i * 2 + 1);
        b[i] = pack2<T>(x, x + 1.0f);
    }
    float* out = (float*)p.out + lane * 4;
    for (uint32_t slot = 0; slot <= A_SLOTS; slot++) {
        uint32_t a[4];
        float d[4];
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t mine = lane * 8 + i * 2;
            a[i] = pack2<T>(mine == slot ? 1.0f : 0.0f, mine + 1 == slot ? 1.0f : 0.0f);
            d[i] = slot == A_SLOTS ? (float)(lane * 4 + i + 1) : 0.0f;
        }
        mma_m16n8k16<T>(d, a, b[0], b[1]);
        for (int i = 0; i < 4; i++) {
            store_global(out + slot * D_SLOTS + i, d[i]);
        }
    }
}
extern "C" __global__ void __launch_bounds__(WARP) probe_mma_bf16(probe_params p) { probe_mma<bf16_t>(p); }
extern "C" __global__ void __launch_bounds__(WARP) probe_mma_f16(probe_params p) { probe_mma<f16_t>(p); }

// cp.async of 16 bytes per lane; those of odd lanes are not valid. The destination is all ones before.
extern "C" __global__ void __launch_bounds__(WARP) probe_cp_async(probe_params p) {
    SHARED_MEMORY(shared);
    const uint32_t lane = threadIdx.x;
    uint32_t* mine = (uint32_t*)(shared + lane * 16);
    for (int i = 0; i < 4; i++) {
        mine[i] = 0xffffffffu;
    }
    sync_block();
    cp_async_16(mine, (const uint32_t*)p.in + lane * 4, lane % 2 == 0);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    for (int i = 0; i < 4; i++) {
        store_global((uint32_t*)p.out + lane * 4 + i, mine[i]);
    }
}

// Rounding to the storage types: in fp32, out bf16 in the lower half and f16 in the upper.
extern "C" __global__ void __launch_bounds__(256) probe_convert(probe_params p) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    const float x = load_global((const float*)p.in + i);
    store_global((uint32_t*)p.out + i, (pack2<bf16_t>(x, 0.0f) & 0xffffu) | pack2<f16_t>(0.0f, x) >> 16 << 16);
}

// 2^x and log2 x of each number, by turns.
extern "C" __global__ void __launch_bounds__(256) probe_powers(probe_params p) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    const float x = load_global((const float*)p.in + i);
    store_global((float*)p.out + 2 * i, exp2_approx(x));
    store_global((float*)p.out + 2 * i + 1, log2_approx(x));
}

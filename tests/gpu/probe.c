/* Runs the probe's kernels through the CUDA driver and writes what they found as JSON. Needs a driver, but no CUDA toolkit.
 *
 *   probe OUT.json probe.fatbin [probe_hopper.fatbin]
 */
#define _GNU_SOURCE
#include "probe.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fputs("probe: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(1);
}

/* The driver, opened at run time. */

typedef uint64_t device_pointer;
static struct {
    int (*init)(unsigned);
    int (*driver_version)(int *);
    int (*device_get)(int *, int);
    int (*device_name)(char *, int, int);
    int (*device_attribute)(int *, int, int);
    int (*context_retain)(void **, int);
    int (*context_set)(void *);
    int (*synchronize)(void);
    int (*module_load)(void **, const void *);
    int (*module_function)(void **, void *, const char *);
    int (*function_attribute)(void *, int, int);
    int (*allocate)(device_pointer *, size_t);
    int (*release)(device_pointer);
    int (*to_device)(device_pointer, const void *, size_t);
    int (*to_host)(void *, device_pointer, size_t);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*error_string)(int, const char **);
    int (*encode_tiled)(void *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *, const uint32_t *, int, int, int, int);
} cu;

enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MAX_DYNAMIC_SHARED = 8 };

static void check(int result, const char *what) {
    const char *text = NULL;
    if (result == 0) return;
    if (cu.error_string) cu.error_string(result, &text);
    fail("%s: error %d (%s)", what, result, text ? text : "no text");
}

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) fail("%s", dlerror());
    struct {
        void *at;
        const char *name;
    } names[] = {
        {&cu.init, "cuInit"},
        {&cu.driver_version, "cuDriverGetVersion"},
        {&cu.device_get, "cuDeviceGet"},
        {&cu.device_name, "cuDeviceGetName"},
        {&cu.device_attribute, "cuDeviceGetAttribute"},
        {&cu.context_retain, "cuDevicePrimaryCtxRetain"},
        {&cu.context_set, "cuCtxSetCurrent"},
        {&cu.synchronize, "cuCtxSynchronize"},
        {&cu.module_load, "cuModuleLoadData"},
        {&cu.module_function, "cuModuleGetFunction"},
        {&cu.function_attribute, "cuFuncSetAttribute"},
        {&cu.allocate, "cuMemAlloc_v2"},
        {&cu.release, "cuMemFree_v2"},
        {&cu.to_device, "cuMemcpyHtoD_v2"},
        {&cu.to_host, "cuMemcpyDtoH_v2"},
        {&cu.launch, "cuLaunchKernel"},
        {&cu.error_string, "cuGetErrorString"},
        {&cu.encode_tiled, "cuTensorMapEncodeTiled"}, /* may be missing */
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *symbol = dlsym(library, names[i].name);
        if (!symbol && names[i].at != (void *)&cu.encode_tiled) fail("%s", dlerror());
        memcpy(names[i].at, &symbol, sizeof symbol);
    }
}

static void *load_module(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("%s cannot be opened", path);
    fseek(file, 0, SEEK_END);
    size_t bytes = (size_t)ftell(file);
    rewind(file);
    void *image = aligned_alloc(16, (bytes + 15) / 16 * 16), *module;
    if (fread(image, 1, bytes, file) != bytes) fail("%s cannot be read", path);
    fclose(file);
    check(cu.module_load(&module, image), path);
    free(image);
    return module;
}

/* Runs one kernel to its end. */
static void run(void *module, const char *name, unsigned blocks, unsigned threads, unsigned shared, void **arguments) {
    void *function;
    check(cu.module_function(&function, module, name), name);
    if (shared > 48 * 1024) check(cu.function_attribute(function, MAX_DYNAMIC_SHARED, (int)shared), name);
    check(cu.launch(function, blocks, 1, 1, threads, 1, 1, shared, NULL, arguments, NULL), name);
    check(cu.synchronize(), name);
}

static device_pointer upload(const void *from, size_t bytes) {
    device_pointer p;
    check(cu.allocate(&p, bytes), "cuMemAlloc");
    check(cu.to_device(p, from, bytes), "cuMemcpyHtoD");
    return p;
}

/* A kernel with probe_params: `in` may be NULL; `out` is all ones before, so that what is not written shows. */
static void run_simple(void *module, const char *name, unsigned blocks, unsigned threads, unsigned shared, const void *in, size_t in_bytes, void *out, size_t out_bytes) {
    memset(out, 0xff, out_bytes);
    struct probe_params p = {in ? upload(in, in_bytes) : 0, upload(out, out_bytes)};
    void *arguments[] = {&p};
    run(module, name, blocks, threads, shared, arguments);
    check(cu.to_host(out, p.out, out_bytes), "cuMemcpyDtoH");
    check(cu.release(p.out), "cuMemFree");
    if (in) check(cu.release(p.in), "cuMemFree");
}

/* JSON */

static FILE *json;
static void numbers(const char *name, const uint32_t *x, size_t count) {
    fprintf(json, ",\n \"%s\": [", name);
    for (size_t i = 0; i < count; i++) fprintf(json, i ? ",%u" : "%u", x[i]);
    fputc(']', json);
}
static void halves(const char *name, const uint32_t *words, size_t count) {
    uint32_t *x = malloc(2 * count * sizeof *x);
    for (size_t i = 0; i < count; i++) {
        x[2 * i] = words[i] & 0xffff;
        x[2 * i + 1] = words[i] >> 16;
    }
    numbers(name, x, 2 * count);
    free(x);
}
static void hexadecimal(const char *name, const uint32_t *x, size_t count) {
    fprintf(json, ",\n \"%s\": \"", name);
    for (size_t i = 0; i < count; i++) fprintf(json, "%08x", x[i]);
    fputc('"', json);
}

/* Every GPU */

static void probe_mma(void *module, const char *kernel, const char *name) {
    static float d[(A_SLOTS + 1) * D_SLOTS];
    run_simple(module, kernel, 1, WARP, 0, NULL, 0, d, sizeof d);
    /* For each slot of A: the pairs of a slot of D and the slot of B that reached it. */
    fprintf(json, ",\n \"%s\": [", name);
    for (int a = 0; a < A_SLOTS; a++) {
        fprintf(json, a ? ",\n  [" : "\n  [");
        const char *comma = "";
        for (int s = 0; s < D_SLOTS; s++) {
            const float x = d[a * D_SLOTS + s];
            if (x == 0) continue;
            fprintf(json, "%s[%d,%d]", comma, s, (int)x - 1);
            comma = ",";
        }
        fputc(']', json);
    }
    fputc(']', json);
    uint32_t kept[D_SLOTS];
    for (int s = 0; s < D_SLOTS; s++) kept[s] = (uint32_t)d[A_SLOTS * D_SLOTS + s] - 1;
    char key[64];
    snprintf(key, sizeof key, "%s_accumulator", name);
    numbers(key, kept, D_SLOTS);
}

static void probe_every_gpu(const char *path) {
    void *module = load_module(path);
    static uint32_t words[LDMATRIX_ELEMENTS];
    run_simple(module, "probe_ldmatrix", 1, WARP, 512, NULL, 0, words, sizeof words);
    halves("ldmatrix_x4", words, 128);
    halves("ldmatrix_x4_trans", words + 128, 128);
    probe_mma(module, "probe_mma_bf16", "mma_bf16");
    probe_mma(module, "probe_mma_f16", "mma_f16");

    uint32_t in[COPY_WORDS], out[COPY_WORDS];
    for (uint32_t i = 0; i < COPY_WORDS; i++) in[i] = i + 1;
    run_simple(module, "probe_cp_async", 1, WARP, 512, in, sizeof in, out, sizeof out);
    numbers("cp_async", out, COPY_WORDS);

    /* Every exponent, both signs, and mantissas around what is exactly between two numbers of either storage type. */
    static const uint32_t mantissas[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0x18000, 0x400000, 0x7fffff};
    static uint32_t x[CONVERSIONS], y[CONVERSIONS];
    uint32_t count = 0;
    for (uint32_t sign = 0; sign < 2; sign++)
        for (uint32_t exponent = 0; exponent < 256; exponent++)
            for (uint32_t m = 0; m < 12; m++) x[count++] = sign << 31 | exponent << 23 | mantissas[m];
    run_simple(module, "probe_convert", CONVERSIONS / 256, 256, 0, x, sizeof x, y, sizeof y);
    hexadecimal("convert_in", x, CONVERSIONS);
    hexadecimal("convert_out_f16_bf16", y, CONVERSIONS);

    static float power_in[POWERS];
    static uint32_t power_out[2 * POWERS];
    for (int i = 0; i < POWERS; i++) power_in[i] = -160.0f + (float)i * 0.14159f;
    power_in[0] = -__builtin_inff();
    power_in[1] = __builtin_inff();
    power_in[2] = 0.0f;
    power_in[3] = -0.0f;
    power_in[4] = __builtin_nanf("");
    power_in[5] = 1e-40f;
    run_simple(module, "probe_powers", POWERS / 256, 256, 0, power_in, sizeof power_in, power_out, sizeof power_out);
    uint32_t bits[POWERS];
    memcpy(bits, power_in, sizeof bits);
    hexadecimal("powers_in", bits, POWERS);
    hexadecimal("powers_out_exp2_log2", power_out, 2 * POWERS);
}

/* Hopper */

struct tensor_map {
    _Alignas(64) uint64_t opaque[16];
};

/* A map of a [TILE, TILE] tensor of 16-bit elements, box as large, 128-byte swizzle. */
static struct tensor_map map_of(device_pointer p) {
    struct tensor_map map;
    const uint64_t dims[] = {TILE, TILE}, strides[] = {TILE * 2};
    const uint32_t box[] = {TILE, TILE}, steps[] = {1, 1};
    const int uint16 = 1, no_interleave = 0, swizzle_128 = 3, no_promotion = 0, no_fill = 0;
    check(cu.encode_tiled(&map, uint16, 2, (void *)(uintptr_t)p, dims, strides, box, steps, no_interleave, swizzle_128, no_promotion, no_fill), "cuTensorMapEncodeTiled");
    return map;
}

static uint16_t bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16); /* only for numbers that are exact */
}

static void probe_tma(void *module, const char *name, int row) {
    static uint16_t in[TILE * TILE], out[TILE * TILE];
    for (int i = 0; i < TILE * TILE; i++) in[i] = (uint16_t)(i + 1); /* 0 is what lies outside */
    device_pointer from = upload(in, sizeof in), to = upload(out, sizeof out);
    struct tensor_map map = map_of(from);
    void *arguments[] = {&map, &to, &row};
    run(module, "probe_tma", 1, GROUP, TILE * TILE * 2, arguments);
    check(cu.to_host(out, to, sizeof out), "cuMemcpyDtoH");
    static uint32_t wide[TILE * TILE];
    for (int i = 0; i < TILE * TILE; i++) wide[i] = out[i];
    numbers(name, wide, TILE * TILE);
    check(cu.release(from), "cuMemFree");
    check(cu.release(to), "cuMemFree");
}

/* out = accumulators of A·Bᵀ, A and B given as [64][64] with k in columns; `ma`, `mb`: their tiles are stored with k in rows. */
static void multiply(void *module, const char *kernel, const float *a, const float *b, int ma, int mb, struct probe_descriptor da, struct probe_descriptor db, void *out, size_t bytes) {
    static uint16_t ta[TILE * TILE], tb[TILE * TILE];
    for (int r = 0; r < TILE; r++)
        for (int k = 0; k < TILE; k++) {
            ta[ma ? k * TILE + r : r * TILE + k] = bf16(a[r * TILE + k]);
            tb[mb ? k * TILE + r : r * TILE + k] = bf16(b[r * TILE + k]);
        }
    memset(out, 0xff, bytes);
    device_pointer pa = upload(ta, sizeof ta), pb = upload(tb, sizeof tb), po = upload(out, bytes);
    struct tensor_map map_a = map_of(pa), map_b = map_of(pb);
    struct probe_wgmma_params p = {po, da, db};
    void *arguments[] = {&map_a, &map_b, &p};
    run(module, kernel, 1, GROUP, HOPPER_SHARED, arguments);
    check(cu.to_host(out, po, bytes), "cuMemcpyDtoH");
    check(cu.release(pa), "cuMemFree");
    check(cu.release(pb), "cuMemFree");
    check(cu.release(po), "cuMemFree");
}

static void probe_hopper(const char *path) {
    void *module = load_module(path);
    probe_tma(module, "tma_swizzle_128", 0);
    probe_tma(module, "tma_swizzle_128_from_row_32", 32);

    static float a[TILE * TILE], b[TILE * TILE], d[WG_D_SLOTS];
    static uint32_t labels[WG_D_SLOTS], slots[WG_A_SLOTS];
    const struct probe_descriptor across = {16, 1024, 32}; /* rows of 128 bytes in groups of eight, 16 columns at a time */
    /* Accumulators: D[m][n] = 64·m + n. */
    for (int r = 0; r < TILE; r++) {
        a[r * TILE] = (float)r;
        a[r * TILE + 1] = 1;
        b[r * TILE] = TILE;
        b[r * TILE + 1] = (float)r;
    }
    multiply(module, "probe_wgmma_kk", a, b, 0, 0, across, across, d, sizeof d);
    for (int i = 0; i < WG_D_SLOTS; i++) labels[i] = d[i] >= 0 && d[i] < WG_D_SLOTS ? (uint32_t)d[i] : 0xffffffffu;
    numbers("wgmma_accumulators", labels, WG_D_SLOTS);

    /* A in registers. */
    memset(b, 0, sizeof b);
    for (int k = 0; k < 16; k++) b[k] = (float)(k + 1);
    multiply(module, "probe_wgmma_registers", a, b, 0, 0, across, across, slots, sizeof slots);
    for (int i = 0; i < WG_A_SLOTS; i++) {
        const uint32_t accumulator = slots[i] >> 8, k = (slots[i] & 0xff) - 1;
        slots[i] = accumulator < WG_D_SLOTS && labels[accumulator] < WG_D_SLOTS ? labels[accumulator] / TILE * 16 + k : 0xffffffffu;
    }
    numbers("wgmma_a_registers", slots, WG_A_SLOTS);

    /* Which strides of a descriptor give the right product, for each way a tile can lie. */
    uint32_t state = 1;
    for (int i = 0; i < TILE * TILE; i++) {
        state = state * 1664525u + 1013904223u;
        a[i] = (float)((int)(state >> 24) % 9 - 4);
        b[i] = (float)((int)(state >> 16 & 0xff) % 9 - 4);
    }
    static const struct {
        const char *name, *kernel;
        int ma, mb, search_b;
    } ways[] = {
        {"wgmma_descriptor_a_k_in_columns", "probe_wgmma_kk", 0, 0, 0},
        {"wgmma_descriptor_b_k_in_columns", "probe_wgmma_kk", 0, 0, 1},
        {"wgmma_descriptor_a_k_in_rows", "probe_wgmma_mk", 1, 0, 0},
        {"wgmma_descriptor_b_k_in_rows", "probe_wgmma_km", 0, 1, 1},
    };
    static const uint32_t strides[] = {16, 128, 1024, 2048, 8192}, steps[] = {32, 2048};
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        fprintf(json, ",\n \"%s\": [", ways[w].name);
        const char *comma = "";
        for (int l = 0; l < 5; l++)
            for (int s = 0; s < 5; s++)
                for (int t = 0; t < 2; t++) {
                    const struct probe_descriptor tried = {strides[l], strides[s], steps[t]};
                    multiply(module, ways[w].kernel, a, b, ways[w].ma, ways[w].mb, ways[w].search_b ? across : tried, ways[w].search_b ? tried : across, d, sizeof d);
                    int wrong = 0;
                    for (int i = 0; i < WG_D_SLOTS; i++) {
                        const uint32_t m = labels[i] / TILE, n = labels[i] % TILE;
                        float want = 0;
                        for (int k = 0; k < TILE && m < TILE; k++) want += a[m * TILE + k] * b[n * TILE + k];
                        wrong += d[i] != want;
                    }
                    fprintf(json, "%s\n  {\"leading\":%u,\"stride\":%u,\"step\":%u,\"wrong\":%d}", comma, tried.leading, tried.stride, tried.step, wrong);
                    comma = ",";
                }
        fputc(']', json);
    }
}

int main(int count, char **arguments) {
    if (count < 3 || count > 4) fail("usage: probe OUT.json probe.fatbin [probe_hopper.fatbin]");
    open_driver();
    int version = 0, device, major = 0, minor = 0;
    char name[256] = "";
    void *context;
    check(cu.init(0), "cuInit");
    check(cu.driver_version(&version), "cuDriverGetVersion");
    check(cu.device_get(&device, 0), "cuDeviceGet");
    check(cu.device_name(name, sizeof name, device), "cuDeviceGetName");
    check(cu.device_attribute(&major, CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
    check(cu.device_attribute(&minor, CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
    check(cu.context_retain(&context, device), "cuDevicePrimaryCtxRetain");
    check(cu.context_set(context), "cuCtxSetCurrent");

    if (!(json = fopen(arguments[1], "w"))) fail("%s cannot be written", arguments[1]);
    fprintf(json, "{\"device\": \"%s\",\n \"driver\": %d,\n \"capability\": \"%d.%d\"", name, version, major, minor);
    probe_every_gpu(arguments[2]);
    const char *not_probed = count < 4 ? "no fat binary given" : major != 9 ? "needs compute capability 9.0" : !cu.encode_tiled ? "the driver has no cuTensorMapEncodeTiled" : NULL;
    const int hopper = !not_probed;
    if (hopper) probe_hopper(arguments[3]);
    fprintf(json, ",\n \"hopper\": %s}\n", hopper ? "true" : "false");
    if (fclose(json)) fail("%s cannot be written", arguments[1]);
    printf("probe: %s, compute capability %d.%d, driver %d; wgmma and TMA %s%s\n", name, major, minor, version, hopper ? "probed" : "not probed: ", hopper ? "" : not_probed);
    return 0;
}

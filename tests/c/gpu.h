/* Device memory for the tests, through the CUDA driver that the library under test opens too: libcuda.so.1, a real one or the software GPU's.
 * A rank's device is that of its thread: gpu_open makes it current and gives it a stream; without that, `here` is NULL and tests run on the CPU. */
#ifndef CP_TEST_GPU_H
#define CP_TEST_GPU_H

#include "context_parallel.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct gpu {
    int device;
    void *stream; /* one that does not wait for the default stream */
} gpu;

static __thread gpu *here;

typedef uint64_t device_pointer;

/* The entries of the driver that are used, by their exported names. */
typedef struct gpu_driver {
    int (*init)(unsigned);
    int (*device_count)(int *);
    int (*device_get)(int *, int);
    int (*retain)(void **, int);
    int (*push)(void *);
    int (*pop)(void **);
    int (*alloc)(device_pointer *, size_t);
    int (*release)(device_pointer);
    int (*to_device)(device_pointer, const void *, size_t);
    int (*to_host)(void *, device_pointer, size_t);
    int (*stream_create)(void **, unsigned);
    int (*stream_destroy)(void *);
    int (*stream_synchronize)(void *);
    int (*context_synchronize)(void);
} gpu_driver;

static inline void gpu_die(const char *what, int status) {
    fprintf(stderr, "test: %s: CUDA error %d\n", what, status);
    exit(2);
}

static inline void gpu_must(int status, const char *what) {
    if (status != 0)
        gpu_die(what, status);
}

/* NULL on a machine without the driver. */
static inline const gpu_driver *gpu_find(void) {
    static const char *const names[] = {"cuInit",
                                        "cuDeviceGetCount",
                                        "cuDeviceGet",
                                        "cuDevicePrimaryCtxRetain",
                                        "cuCtxPushCurrent_v2",
                                        "cuCtxPopCurrent_v2",
                                        "cuMemAlloc_v2",
                                        "cuMemFree_v2",
                                        "cuMemcpyHtoD_v2",
                                        "cuMemcpyDtoH_v2",
                                        "cuStreamCreate",
                                        "cuStreamDestroy_v2",
                                        "cuStreamSynchronize",
                                        "cuCtxSynchronize"};
    static __thread gpu_driver driver;
    static __thread int found;
    void *library, *entry;
    size_t i;
    if (found)
        return &driver;
    library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == NULL)
        return NULL;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        entry = dlsym(library, names[i]);
        if (entry == NULL)
            gpu_die(names[i], 500);
        memcpy((char *)&driver + i * sizeof entry, &entry, sizeof entry); /* C has no cast from one to the other */
    }
    gpu_must(driver.init(0), "cuInit");
    found = 1;
    return &driver;
}

static inline const gpu_driver *gpu_get(void) {
    const gpu_driver *d = gpu_find();
    if (d == NULL)
        gpu_die("no libcuda.so.1 (for the software GPU: LD_LIBRARY_PATH=target/softgpu)", 100);
    return d;
}

/* The calling thread's device from now on: `rank` modulo the number of devices. */
static inline void gpu_open(gpu *g, int rank) {
    const gpu_driver *d = gpu_get();
    int devices = 0, device = 0;
    void *context = NULL;
    gpu_must(d->device_count(&devices), "cuDeviceGetCount");
    if (devices == 0)
        gpu_die("no CUDA device", 100);
    g->device = rank % devices;
    gpu_must(d->device_get(&device, g->device), "cuDeviceGet");
    gpu_must(d->retain(&context, device), "cuDevicePrimaryCtxRetain");
    gpu_must(d->push(context), "cuCtxPushCurrent");
    gpu_must(d->stream_create(&g->stream, 1), "cuStreamCreate");
    here = g;
}

static inline void gpu_close(void) {
    void *context;
    if (here == NULL)
        return;
    gpu_must(gpu_get()->stream_destroy(here->stream), "cuStreamDestroy");
    gpu_must(gpu_get()->pop(&context), "cuCtxPopCurrent");
    here = NULL;
}

static inline device_pointer gpu_alloc(size_t bytes) {
    device_pointer p = 0;
    gpu_must(gpu_get()->alloc(&p, bytes + 1), "cuMemAlloc");
    return p;
}

/* Waits for the device. */
static inline void gpu_free(device_pointer p) {
    if (p == 0)
        return;
    gpu_must(gpu_get()->context_synchronize(), "cuCtxSynchronize");
    gpu_must(gpu_get()->release(p), "cuMemFree");
}

/* Both copies are done when they return; neither waits for the rank's stream. */
static inline void gpu_write(device_pointer p, const void *from, size_t bytes) {
    if (bytes > 0)
        gpu_must(gpu_get()->to_device(p, from, bytes), "cuMemcpyHtoD");
}

static inline void gpu_read(void *to, device_pointer p, size_t bytes) {
    if (bytes > 0)
        gpu_must(gpu_get()->to_host(to, p, bytes), "cuMemcpyDtoH");
}

static inline int gpu_count(void) {
    int devices = 0;
    gpu_must(gpu_get()->device_count(&devices), "cuDeviceGetCount");
    return devices;
}

static inline void gpu_wait(void) {
    gpu_must(gpu_get()->stream_synchronize(here->stream), "cuStreamSynchronize");
}

static inline void *gpu_stream(void) {
    return here == NULL ? NULL : here->stream;
}

/* What configurations say about the place. */
static inline int32_t place_type(void) {
    return here == NULL ? CP_DEVICE_CPU : CP_DEVICE_CUDA;
}

static inline int32_t place_id(void) {
    return here == NULL ? 0 : here->device;
}

#endif /* CP_TEST_GPU_H */

/* context_parallel over MPI: a transport table over your own <mpi.h>.
 *
 *     #include <mpi.h>
 *     #include <context_parallel_mpi.h>
 *     cp_transport_ops ops;
 *     cp_status s = cp_mpi_transport(MPI_COMM_WORLD, &ops);
 *
 * The library itself links no MPI: everything here is static inline and compiled with whichever MPI you use. Then give `ops` to the
 * group's init, with the communicator's rank and size; the group owns it from then on and releases it when it is destroyed, which must
 * be before MPI_Finalize, on all ranks, several groups in the same order. If that init fails, release it yourself: ops.destroy(ops.ctx).
 *
 * - MPI_THREAD_FUNNELED is enough, if the thread that initialised MPI makes the cp_ calls. MPI progresses only inside those calls.
 * - The communicator is duplicated, so no message of yours is ever mixed up with one of ours.
 * - Lengths are checked by the receiver, up to CP_MPI_CHUNK bytes exactly: CP_ERR_MISMATCH.
 * - A rank that dies is the launcher's business: mpirun usually ends the whole job. Without that the others run into their deadline.
 * - MPI cannot take back a message whose receiver never comes. After an error or a timeout the group is lost, and memory that it was
 *   sending from should not be reused for anything but an orderly end.
 *
 * C99 and later, C++11 and later. */
#ifndef CONTEXT_PARALLEL_MPI_H
#define CONTEXT_PARALLEL_MPI_H

#include "context_parallel.h"

#include <limits.h>
#include <mpi.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#define CP_MPI_YIELD() ((void)sched_yield())
#else
#define CP_MPI_YIELD() ((void)0)
#endif

/* Largest MPI message in bytes: below INT_MAX, which is MPI's limit for counts. Both sides cut a stream at the same places, so it is the
 * same on all ranks. Smaller values serve tests. */
#ifndef CP_MPI_CHUNK
#define CP_MPI_CHUNK ((size_t)1 << 30)
#endif

/* Seconds that a cancelled group may take until MPI lets go of its memory. */
#ifndef CP_MPI_CANCEL_SECONDS
#define CP_MPI_CANCEL_SECONDS 0.5
#endif

enum {
    CP_MPI_OK = 0,
    CP_MPI_INVALID_ARGUMENT = 1,
    CP_MPI_INVALID_USAGE = 3,
    CP_MPI_OUT_OF_MEMORY = 6,
    CP_MPI_MISMATCH = 8,
    CP_MPI_TRANSPORT = 11,
    CP_MPI_TIMEOUT = 12,
    CP_MPI_TAG_DATA = 1,
    CP_MPI_TAG_CONTROL = 2
};

/* One MPI request of the group, or of the allgather, in flight. */
typedef struct cp_mpi_request {
    int peer;
    int expected; /* bytes of a receive, -1 for a send */
} cp_mpi_request;

typedef struct cp_mpi_state {
    MPI_Comm comm;
    int lost;     /* a group was cancelled: messages may be pending or unread */
    int any_lost; /* on any rank */
    int waited_for;
    size_t count, capacity; /* of the two arrays */
    size_t active;          /* requests that are not complete */
    MPI_Request *requests;
    cp_mpi_request *infos;
    size_t block_capacity; /* of the two arrays */
    int *block_lengths;
    MPI_Aint *block_addresses;
} cp_mpi_state;

/* What an MPI error means for the caller. */
static inline int32_t cp_mpi_error(int code) {
    int error_class = MPI_ERR_OTHER;
    if (code == MPI_SUCCESS)
        return CP_MPI_OK;
    MPI_Error_class(code, &error_class);
    return error_class == MPI_ERR_TRUNCATE ? CP_MPI_MISMATCH : CP_MPI_TRANSPORT;
}

/* Grows an array to hold `wanted` elements; the arrays stay for the next group. */
static inline int cp_mpi_grow(void **array, size_t wanted, size_t element) {
    void *grown = realloc(*array, wanted * element);
    if (grown == NULL)
        return 0;
    *array = grown;
    return 1;
}

static inline int32_t cp_mpi_reserve(cp_mpi_state *s, size_t wanted) {
    size_t capacity = wanted + wanted / 2 + 8;
    void *requests = s->requests, *infos = s->infos;
    int ok;
    if (wanted <= s->capacity)
        return CP_MPI_OK;
    if (capacity > INT_MAX)
        return CP_MPI_OUT_OF_MEMORY;
    ok = cp_mpi_grow(&requests, capacity, sizeof *s->requests) && cp_mpi_grow(&infos, capacity, sizeof *s->infos);
    s->requests = (MPI_Request *)requests;
    s->infos = (cp_mpi_request *)infos;
    if (!ok)
        return CP_MPI_OUT_OF_MEMORY;
    s->capacity = capacity;
    return CP_MPI_OK;
}

static inline int32_t cp_mpi_reserve_blocks(cp_mpi_state *s, size_t wanted) {
    size_t capacity = wanted + wanted / 2 + 8;
    void *lengths = s->block_lengths, *addresses = s->block_addresses;
    int ok;
    if (wanted <= s->block_capacity)
        return CP_MPI_OK;
    if (capacity > INT_MAX)
        return CP_MPI_OUT_OF_MEMORY;
    ok = cp_mpi_grow(&lengths, capacity, sizeof *s->block_lengths) && cp_mpi_grow(&addresses, capacity, sizeof *s->block_addresses);
    s->block_lengths = (int *)lengths;
    s->block_addresses = (MPI_Aint *)addresses;
    if (!ok)
        return CP_MPI_OUT_OF_MEMORY;
    s->block_capacity = capacity;
    return CP_MPI_OK;
}

/* Starts one send or receive of `bytes` bytes: `count` of `type` at `address`. */
static inline int32_t cp_mpi_post(cp_mpi_state *s, int is_send, int peer, int tag, void *address, int count, MPI_Datatype type,
                                  int bytes) {
    int code;
    int32_t status = cp_mpi_reserve(s, s->count + 1);
    if (status != CP_MPI_OK)
        return status;
    s->infos[s->count].peer = peer;
    s->infos[s->count].expected = is_send ? -1 : bytes;
    code = is_send ? MPI_Isend(address, count, type, peer, tag, s->comm, &s->requests[s->count])
                   : MPI_Irecv(address, count, type, peer, tag, s->comm, &s->requests[s->count]);
    if (code == MPI_SUCCESS) {
        s->count++;
        s->active++;
    } else {
        s->waited_for = peer;
    }
    return cp_mpi_error(code);
}

/* Starts one message: its byte stream in chunks, each straight from, or into, the pieces that it spans. */
static inline int32_t cp_mpi_post_message(cp_mpi_state *s, int is_send, const cp_message *m) {
    size_t piece = 0, at = 0, left = 0, i;
    int32_t status = CP_MPI_OK;
    for (i = 0; i < m->n_pieces; i++)
        left += m->pieces[i].bytes;
    do {
        size_t chunk = left < CP_MPI_CHUNK ? left : CP_MPI_CHUNK, filled = 0, blocks = 0;
        void *only = NULL;
        while (filled < chunk) {
            size_t n = m->pieces[piece].bytes - at;
            if (n > chunk - filled)
                n = chunk - filled;
            status = cp_mpi_reserve_blocks(s, blocks + 1);
            if (status != CP_MPI_OK)
                return status;
            only = (char *)m->pieces[piece].ptr + at;
            s->block_lengths[blocks] = (int)n;
            MPI_Get_address(only, &s->block_addresses[blocks]);
            blocks++;
            filled += n;
            at += n;
            if (at == m->pieces[piece].bytes) {
                piece++;
                at = 0;
            }
        }
        if (blocks <= 1) {
            status = cp_mpi_post(s, is_send, (int)m->peer, CP_MPI_TAG_DATA, only, (int)chunk, MPI_BYTE, (int)chunk);
        } else {
            MPI_Datatype type;
            int code = MPI_Type_create_hindexed((int)blocks, s->block_lengths, s->block_addresses, MPI_BYTE, &type);
            if (code != MPI_SUCCESS)
                return cp_mpi_error(code);
            code = MPI_Type_commit(&type);
            status = code != MPI_SUCCESS
                         ? cp_mpi_error(code)
                         : cp_mpi_post(s, is_send, (int)m->peer, CP_MPI_TAG_DATA, MPI_BOTTOM, 1, type, (int)chunk);
            MPI_Type_free(&type); /* lives on until the request is complete */
        }
        left -= chunk;
    } while (left > 0 && status == CP_MPI_OK);
    return status;
}

static inline int32_t cp_mpi_start(void *ctx, const cp_message *sends, size_t n_sends, const cp_message *recvs, size_t n_recvs) {
    cp_mpi_state *s = (cp_mpi_state *)ctx;
    int32_t status = CP_MPI_OK;
    size_t i;
    s->count = s->active = 0;
    s->waited_for = -1;
    /* Receives first: what arrives finds its place. */
    for (i = 0; i < n_recvs && status == CP_MPI_OK; i++)
        status = cp_mpi_post_message(s, 0, &recvs[i]);
    for (i = 0; i < n_sends && status == CP_MPI_OK; i++)
        status = cp_mpi_post_message(s, 1, &sends[i]);
    return status;
}

/* Tests the requests one by one: an error shows while others are pending, and reaches our error handler (that of a whole list of requests
 * goes to the handler of MPI_COMM_WORLD or MPI_COMM_SELF, which is not ours to change). Checks lengths. */
static inline int32_t cp_mpi_progress(cp_mpi_state *s, int *done) {
    size_t i;
    *done = 0;
    for (i = 0; i < s->count; i++) {
        MPI_Status status;
        int flag = 0, got = -1, code;
        int32_t result;
        if (s->requests[i] == MPI_REQUEST_NULL)
            continue;
        code = MPI_Test(&s->requests[i], &flag, &status);
        result = cp_mpi_error(code);
        if (code == MPI_SUCCESS && flag && s->infos[i].expected >= 0) {
            MPI_Get_count(&status, MPI_BYTE, &got);
            if (got != s->infos[i].expected)
                result = CP_MPI_MISMATCH;
        }
        if (result != CP_MPI_OK) {
            s->waited_for = s->infos[i].peer;
            return result;
        }
        s->active -= flag != 0;
    }
    *done = s->active == 0;
    return CP_MPI_OK;
}

static inline int32_t cp_mpi_test(void *ctx, int32_t *done) {
    int flag = 0;
    int32_t status = cp_mpi_progress((cp_mpi_state *)ctx, &flag);
    *done = flag;
    return status;
}

/* The peer of the first request that is not complete. */
static inline int32_t cp_mpi_waiting_for(void *ctx, uint32_t *peer) {
    cp_mpi_state *s = (cp_mpi_state *)ctx;
    size_t i;
    if (s->waited_for < 0) {
        for (i = 0; i < s->count; i++) {
            int flag = 1;
            if (s->requests[i] != MPI_REQUEST_NULL)
                MPI_Request_get_status(s->requests[i], &flag, MPI_STATUS_IGNORE);
            if (!flag)
                break;
        }
        if (i == s->count)
            return CP_MPI_INVALID_USAGE;
        *peer = (uint32_t)s->infos[i].peer;
        return CP_MPI_OK;
    }
    *peer = (uint32_t)s->waited_for;
    return CP_MPI_OK;
}

static inline void cp_mpi_cancel(void *ctx) {
    cp_mpi_state *s = (cp_mpi_state *)ctx;
    double end = MPI_Wtime() + CP_MPI_CANCEL_SECONDS;
    size_t i, left;
    s->lost = 1;
    /* Receives can be cancelled; sends can only end, if their receivers are there. */
    for (i = 0; i < s->count; i++)
        if (s->infos[i].expected >= 0 && s->requests[i] != MPI_REQUEST_NULL)
            MPI_Cancel(&s->requests[i]);
    do {
        left = 0;
        for (i = 0; i < s->count; i++) {
            int flag = 1;
            if (s->requests[i] != MPI_REQUEST_NULL)
                MPI_Test(&s->requests[i], &flag, MPI_STATUS_IGNORE);
            left += !flag;
        }
        if (left > 0)
            CP_MPI_YIELD();
    } while (left > 0 && MPI_Wtime() < end);
    for (i = 0; i < s->count; i++)
        if (s->requests[i] != MPI_REQUEST_NULL)
            MPI_Request_free(&s->requests[i]);
    s->count = s->active = 0;
}

static inline int32_t cp_mpi_allgather(void *ctx, const uint32_t *members, size_t n_members, const void *mine, void *all, size_t bytes,
                                       uint64_t timeout_ms) {
    cp_mpi_state *s = (cp_mpi_state *)ctx;
    double end = MPI_Wtime() + (double)timeout_ms / 1000.0;
    int rank = 0, done = 0, round = 0;
    int32_t status = CP_MPI_OK;
    size_t i;
    MPI_Comm_rank(s->comm, &rank);
    s->count = s->active = 0;
    s->waited_for = -1;
    for (i = 0; i < n_members && status == CP_MPI_OK; i++) {
        void *place = (char *)all + i * bytes;
        if ((int)members[i] == rank)
            memcpy(place, mine, bytes);
        else
            status = cp_mpi_post(s, 0, (int)members[i], CP_MPI_TAG_CONTROL, place, (int)bytes, MPI_BYTE, (int)bytes);
    }
    for (i = 0; i < n_members && status == CP_MPI_OK; i++)
        if ((int)members[i] != rank)
            status = cp_mpi_post(s, 1, (int)members[i], CP_MPI_TAG_CONTROL, (void *)(uintptr_t)mine, (int)bytes, MPI_BYTE, (int)bytes);
    while (status == CP_MPI_OK && !done) {
        status = cp_mpi_progress(s, &done);
        if (status == CP_MPI_OK && !done && MPI_Wtime() > end) {
            uint32_t peer = 0;
            if (cp_mpi_waiting_for(s, &peer) == CP_MPI_OK)
                s->waited_for = (int)peer;
            status = CP_MPI_TIMEOUT;
        }
        if (++round > 100)
            CP_MPI_YIELD();
    }
    /* `mine` and `all` are the caller's: after an error nothing may touch them. */
    if (status != CP_MPI_OK)
        cp_mpi_cancel(s);
    return status;
}

/* Frees the communicator if no rank lost the group: MPI may end a process that frees one while messages to it are unread. */
static inline void cp_mpi_destroy(void *ctx) {
    cp_mpi_state *s = (cp_mpi_state *)ctx;
    int finalized = 0, agreed = 0;
    MPI_Finalized(&finalized);
    if (!finalized) {
        double end = MPI_Wtime() + CP_MPI_CANCEL_SECONDS;
        MPI_Request request;
        s->any_lost = 1;
        if (MPI_Iallreduce(&s->lost, &s->any_lost, 1, MPI_INT, MPI_MAX, s->comm, &request) != MPI_SUCCESS)
            return;
        while (MPI_Test(&request, &agreed, MPI_STATUS_IGNORE) == MPI_SUCCESS && !agreed && MPI_Wtime() < end)
            CP_MPI_YIELD();
        if (!agreed)
            return; /* the state stays, as MPI may still write to it */
        if (!s->any_lost)
            MPI_Comm_free(&s->comm);
    }
    free(s->requests);
    free(s->infos);
    free(s->block_lengths);
    free(s->block_addresses);
    free(s);
}

/* Fills `out` with a transport over a duplicate of `comm`, whose ranks become the group's.
 *
 * comm  [in]  an intracommunicator of this process, between MPI_Init and MPI_Finalize
 * out   [out] the table, written only on success
 *
 * Collective over `comm`, blocking. CP_ERR_INVALID_ARGUMENT: `out` is NULL, or `comm` is null or an intercommunicator;
 * CP_ERR_INVALID_USAGE: MPI is not initialised, or finalised already; CP_ERR_OUT_OF_MEMORY; CP_ERR_TRANSPORT: MPI failed. */
static inline cp_status cp_mpi_transport(MPI_Comm comm, cp_transport_ops *out) {
    int initialized = 0, finalized = 0, inter = 0;
    cp_mpi_state *s;
    cp_transport_ops ops;
    if (out == NULL || comm == MPI_COMM_NULL)
        return (cp_status)CP_MPI_INVALID_ARGUMENT;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (!initialized || finalized)
        return (cp_status)CP_MPI_INVALID_USAGE;
    if (MPI_Comm_test_inter(comm, &inter) != MPI_SUCCESS || inter)
        return (cp_status)CP_MPI_INVALID_ARGUMENT;
    s = (cp_mpi_state *)calloc(1, sizeof *s);
    if (s == NULL)
        return (cp_status)CP_MPI_OUT_OF_MEMORY;
    s->waited_for = -1;
    if (MPI_Comm_dup(comm, &s->comm) != MPI_SUCCESS) {
        free(s);
        return (cp_status)CP_MPI_TRANSPORT;
    }
    MPI_Comm_set_errhandler(s->comm, MPI_ERRORS_RETURN);
    memset(&ops, 0, sizeof ops);
    ops.struct_size = (uint32_t)sizeof ops;
    ops.ctx = s;
    ops.start = cp_mpi_start;
    ops.test = cp_mpi_test;
    ops.cancel = cp_mpi_cancel;
    ops.allgather = cp_mpi_allgather;
    ops.destroy = cp_mpi_destroy;
    ops.waiting_for = cp_mpi_waiting_for;
    *out = ops;
    return (cp_status)CP_MPI_OK;
}

#endif /* CONTEXT_PARALLEL_MPI_H */

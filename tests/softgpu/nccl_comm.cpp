// Operations of the stand-in for libnccl.so.2. A group is done on a rank when each of its sends has been received in full and each of its
// receives has come in full. Messages of a pair are matched in order. Nothing moves at once: an operation starts late, moves chunks of random
// sizes, and ends late, and what it will receive is poisoned first, so that work which does not wait for it reads rubbish.
#include "nccl_comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <set>

#include "softgpu.h"

namespace softnccl {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

uint32_t Random::below(uint32_t n) { return (uint32_t)((mix(state++) >> 32) * n >> 32); }

long number(const char* variable, long otherwise) {
    const char* s = getenv(variable);
    return s && *s ? strtol(s, nullptr, 0) : otherwise;
}

size_t type_bytes(int type) {
    // int8, uint8, int32, uint32, int64, uint64, fp16, fp32, fp64, bf16, fp8 (e4m3, e5m2)
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < 12 ? bytes[type] : 0;
}

Comm::Comm(int rank_, int size_, int device_)
    : rank(rank_), size(size_), device(device_), random{mix(softgpu_seed() + ((uint64_t)rank_ << 32))}, sent(size_), received(size_), connected(size_) {}

void Comm::fail(Code c, const std::string& text) {
    if (code == SUCCESS) {
        code = c;
        why = text;
        if (getenv("NCCL_DEBUG")) fprintf(stderr, "softnccl: rank %d of %d: %s\n", rank, size, text.c_str());
    }
}

int Comm::error() {
    if (code == SUCCESS && segment.size) {
        const Seat& seat = segment.seat(rank);
        if (uint32_t c = seat.failed.load()) fail((Code)c, seat.why);
    }
    return code;
}

int Operation::enqueue() {
    const softgpu_operation operation = {"NCCL group", this, poll, [](void* data) { delete (Operation*)data; }};
    return softgpu_enqueue(stream, &operation);
}

int Operation::poll(void* data, uint64_t run) {
    Operation& o = *(Operation*)data;
    const int result = o.step(run);
    if (o.moved) softgpu_wake();  // whoever waits for it in this process
    o.moved = false;
    return result;
}

std::string Operation::place() const { return "group " + std::to_string(number) + " of rank " + std::to_string(comm->rank); }

int Operation::step(uint64_t r) {
    Comm& c = *comm;
    std::lock_guard<std::mutex> lock(c.mutex);
    const auto over = [&] {
        if (c.running == this) c.running = nullptr;
        if (!captured) c.pending--;
        return SOFTGPU_DONE;
    };
    if (c.aborted) return over();
    if (c.error()) return SOFTGPU_NOT_YET;
    if (r != run && !start(r)) return SOFTGPU_NOT_YET;
    if (now() < begin_at) return SOFTGPU_NOT_YET;

    // Of one peer, one message after the other; of several, all at once.
    const uint64_t limit = 1ull << (8 + c.random.below(11));
    bool done = true;
    std::set<int> busy;
    for (size_t i = 0; i < sends.size(); i++) {
        Progress& p = sending[i];
        if (p.framed && p.done == sends[i].bytes) {
            done &= c.segment.channel(c.rank, sends[i].peer).taken.load() > p.index;
            continue;
        }
        done = false;
        if (busy.insert(sends[i].peer).second && !send(sends[i], p, limit)) return SOFTGPU_NOT_YET;
    }
    busy.clear();
    for (size_t i = 0; i < recvs.size(); i++) {
        Progress& p = receiving[i];
        if (p.framed && p.done == recvs[i].bytes) continue;
        done = false;
        if (busy.insert(recvs[i].peer).second && !receive(recvs[i], p, limit)) return SOFTGPU_NOT_YET;
    }
    if (!done) return SOFTGPU_NOT_YET;
    if (end_at == 0) end_at = now() + 1e-6 * c.random.below(c.random.below(4) ? 50 : 1500);
    if (now() < end_at) return SOFTGPU_NOT_YET;
    run = ~0ull;
    return over();
}

// The stream has come to it.
bool Operation::start(uint64_t r) {
    Comm& c = *comm;
    if (c.running) {
        c.fail(INVALID_USAGE, place() + " starts while group " + std::to_string(c.running->number) +
                                  " is in flight: a second stream that is not ordered after the first");
        return false;
    }
    run = r;
    c.running = this;
    sending.clear();
    receiving.clear();
    for (const Transfer& t : sends) sending.push_back({c.sent[t.peer]++});
    for (const Transfer& t : recvs) receiving.push_back({c.received[t.peer]++});
    for (const Transfer& t : recvs) {
        void* to = memory(t, "receives into", 0, t.bytes);
        if (!to) return false;
        memset(to, 0xff, t.bytes);
        softgpu_note(t.address, t.bytes, 1);
    }
    for (const Transfer& t : sends) softgpu_note(t.address, t.bytes, 0);
    begin_at = now() + 1e-6 * (c.random.below(3) ? 0 : c.random.below(1000));
    end_at = 0;
    return true;
}

// Where bytes of a transfer are in this process; null: not in one allocation, and the communicator has failed.
void* Operation::memory(const Transfer& t, const char* what, uint64_t from, uint64_t bytes) {
    static char nothing;
    if (bytes == 0) return &nothing;
    void* at = softgpu_resolve(t.address + from, bytes);
    if (!at) {
        char address[32];
        snprintf(address, sizeof address, "0x%llx", (unsigned long long)t.address);
        comm->fail(INVALID_ARGUMENT, place() + " " + what + " " + std::to_string(t.bytes) + " bytes at " + address +
                                         " (rank " + std::to_string(t.peer) + "), which are not in one allocation");
    }
    return at;
}

bool Operation::send(const Transfer& t, Progress& p, uint64_t limit) {
    Channel& channel = comm->segment.channel(comm->rank, t.peer);
    if (!p.framed) {
        if (channel.room() < sizeof(Frame)) return true;
        const Frame frame = {t.bytes, (uint32_t)t.type, (uint32_t)number};
        channel.write(&frame, sizeof frame);
        p.framed = moved = true;
    }
    const uint64_t bytes = std::min({t.bytes - p.done, limit, (uint64_t)channel.room()});
    if (bytes == 0) return true;
    void* from = memory(t, "sends", p.done, bytes);
    if (!from) return false;
    p.done += channel.write(from, bytes);
    return moved = true;
}

bool Operation::receive(const Transfer& t, Progress& p, uint64_t limit) {
    Comm& c = *comm;
    Channel& channel = c.segment.channel(t.peer, c.rank);
    if (!p.framed) {
        if (channel.ready() < sizeof(Frame)) return true;
        Frame frame;
        channel.take(&frame, sizeof frame);
        if (frame.bytes != t.bytes || frame.type != (uint32_t)t.type) {
            char text[300];
            snprintf(text, sizeof text,
                     "rank %d sends rank %d %llu bytes of type %u (its group %u), which receives %llu bytes of type %d (its group %llu)", t.peer,
                     c.rank, (unsigned long long)frame.bytes, frame.type, frame.group, (unsigned long long)t.bytes, t.type,
                     (unsigned long long)number);
            c.segment.fail(t.peer, INVALID_USAGE, text);
            c.fail(INVALID_USAGE, text);
            return false;
        }
        p.framed = moved = true;
    }
    const uint64_t bytes = std::min({t.bytes - p.done, limit, (uint64_t)channel.ready()});
    if (bytes > 0) {
        void* to = memory(t, "receives into", p.done, bytes);
        if (!to) return false;
        p.done += channel.take(to, bytes);
        moved = true;
    }
    if (p.done == t.bytes) channel.taken++;
    return true;
}

}  // namespace softnccl

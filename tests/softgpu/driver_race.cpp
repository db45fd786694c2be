// Races between streams (SOFTGPU_RACES=1): two operations touch the same memory, one of them writes, and neither streams, events, graphs nor
// the host put one before the other. Found in whatever order they are executed.
//
// Every operation is numbered when it is enqueued, and knows all that are before it then: those before the newest of its stream and before
// what it waits for, and all whose end some host thread has seen. Every word of memory remembers who wrote it last and who has read it since.
#include <stdio.h>

#include <string>
#include <vector>

#include "access.h"
#include "driver.h"

namespace softgpu {
namespace driver {

struct Order {
    std::vector<uint64_t> bits;
    bool has(uint32_t n) const { return n / 64 < bits.size() && bits[n / 64] >> n % 64 & 1; }
    void set(uint32_t n) {
        if (bits.size() <= n / 64) bits.resize(n / 64 + 1);
        bits[n / 64] |= 1ull << n % 64;
    }
    void join(const Order& o) {
        if (bits.size() < o.bits.size()) bits.resize(o.bits.size());
        for (size_t i = 0; i < o.bits.size(); i++) bits[i] |= o.bits[i];
    }
};

namespace {

const int READERS = 4;  // remembered per word; with more that nothing orders the oldest is forgotten
struct Word {
    uint32_t writer, adder, readers[READERS];  // numbers of operations; 0: none
};
struct Page {
    Word words[1024];
};
Order seen_by_host;
std::vector<Order> of_device;
std::vector<std::string> names(1);
std::unordered_map<uintptr_t, Page> memory;

std::string race(uint32_t other, const char* did, const char* does, uintptr_t word) {
    char text[96];
    snprintf(text, sizeof text, "race: %s %#llx, which ", does, (unsigned long long)word * 4);
    const Allocation* a = find_allocation(word * 4);
    return text + names[other] + " " + did + ", and nothing orders the two (" + (a ? a->name : "no live memory") + ")";
}

}  // namespace

void order_push(const Queue& queue, Op& op) {
    if (!driver.races) return;
    std::shared_ptr<Order> order = std::make_shared<Order>(seen_by_host);
    if (queue.last && queue.last->order) order->join(*queue.last->order);
    for (const DonePtr& d : op.waits)
        if (d->order) order->join(*d->order);
    op.done->number = (uint32_t)names.size();
    order->set(op.done->number);
    op.done->order = order;
    names.push_back(op.done->what);
    if (of_device.empty()) of_device.resize(driver.contexts.size());
    of_device[(size_t)queue.device].set(op.done->number);
}
void order_host(const Done& done) {
    if (driver.races && done.order) seen_by_host.join(*done.order);
}
void order_host_device(int device) {
    if (driver.races && !of_device.empty()) seen_by_host.join(of_device[(size_t)device]);
}
void forget_memory(uint64_t address, size_t bytes) {
    if (!driver.races) return;
    for (uint64_t page = address / 4096; page <= (address + bytes - 1) / 4096; page++) memory.erase(page);
}

std::string find_race(const Done& done, const Accesses& accesses) {
    const Order& before = *done.order;
    const auto unordered = [&](uint32_t other) { return other && other != done.number && !before.has(other); };
    for (const auto& p : accesses.pages) {
        Page* page = nullptr;
        for (uint32_t i = 0; i < 16; i++) {
            const uint64_t reads = p.second.constant[i] | p.second.read[i], writes = p.second.written[i], adds = p.second.atomic[i];
            for (uint64_t any = reads | writes | adds; any; any &= any - 1) {
                const int bit = __builtin_ctzll(any);
                const uintptr_t number = p.first * 1024 + i * 64 + (uint32_t)bit;
                if (!page) page = &memory[p.first];
                Word& w = page->words[i * 64 + (uint32_t)bit];
                const bool write = writes >> bit & 1, add = adds >> bit & 1;
                const char* const does = write ? "writes" : add ? "adds to" : "reads";
                if (unordered(w.writer)) return race(w.writer, "wrote", does, number);
                if ((write || !add) && unordered(w.adder)) return race(w.adder, "added to", does, number);
                if (write || add) {
                    for (uint32_t& r : w.readers) {
                        if (unordered(r)) return race(r, "read", does, number);
                        r = 0;
                    }
                    (write ? w.writer : w.adder) = done.number;
                } else {
                    // In place of one that is before this, else of the oldest.
                    int at = 0;
                    for (int k = READERS - 1; k >= 0; k--)
                        if (!w.readers[k] || !unordered(w.readers[k])) at = k;
                    w.readers[at] = done.number;
                }
            }
        }
    }
    return {};
}

}  // namespace driver
}  // namespace softgpu

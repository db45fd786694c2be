// The registry of memory that kernels may touch, and the check of every access against it.
#include <map>
#include <mutex>

#include "fiber.h"

namespace softgpu {

namespace {

struct Piece {
    uintptr_t end;
    ptrdiff_t shift;
    std::string name;
    int device;
};
struct Registry {
    std::mutex mutex;
    std::map<uintptr_t, Piece> pieces;
    const std::pair<const uintptr_t, Piece>* find(uintptr_t address) {
        auto i = pieces.upper_bound(address);
        if (i == pieces.begin()) return nullptr;
        --i;
        return address < i->second.end ? &*i : nullptr;
    }
};
Registry& registry() {
    static Registry* r = new Registry;  // outlives every static destructor
    return *r;
}

}  // namespace

void register_memory(const void* address, size_t bytes, const char* name, ptrdiff_t shift, int device) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    const uintptr_t begin = (uintptr_t)address, end = begin + bytes;
    auto next = r.pieces.lower_bound(begin);
    if (bytes == 0 || (next != r.pieces.end() && next->first < end) || r.find(begin))
        throw error(std::string("register_memory: ") + name + " is empty or overlaps live memory");
    r.pieces[begin] = {end, shift, name, device};
}
void unregister_memory(const void* address) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    r.pieces.erase((uintptr_t)address);
}
void* resolve(const void* address, size_t bytes) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    const auto* p = r.find((uintptr_t)address);
    if (!p || bytes > p->second.end - (uintptr_t)address) return nullptr;
    return (char*)address + p->second.shift;
}

namespace {
const char* const ACCESS_NAMES[] = {"load_global", "load_constant", "store_global", "an atomic add"};

void track(uintptr_t address, uint32_t bytes, Access access) {
    Launch& l = *running;
    const uintptr_t page = address >> 12;
    if (page != l.last_page) {
        l.last_words = &l.accesses->pages[page];
        l.last_page = page;
    }
    const uint32_t first = (address & 4095) / 4, count = (bytes + 3) / 4;
    const uint64_t bits = ((1ull << count) - 1) << first % 64;  // aligned accesses of 16 bytes at most: one word of 64 bits
    PageAccess& w = *l.last_words;
    const uint32_t i = first / 64;
    uint64_t* const kinds[] = {w.read, w.constant, w.written, w.atomic};
    kinds[access][i] |= bits;
    if (access != READ && w.constant[i] & (w.written[i] | w.atomic[i]) & bits)
        fail("%s of %u bytes at %p: the launch both writes this and reads it with load_constant", ACCESS_NAMES[access], bytes, (void*)address);
}
}  // namespace

void* find_global(uintptr_t address, uint32_t bytes, Access access) {
    if (address % bytes) fail("%s of %u bytes at %p, which is not aligned", ACCESS_NAMES[access], bytes, (void*)address);
    if (access != READ) running->idle = 0;
    if (access != READ || track_reads) track(address, bytes, access);
    Range& r = ranges[(address >> 16) % RANGES];
    if (!(address >= r.begin && address + bytes <= r.end)) {
        Registry& all = registry();
        std::unique_lock<std::mutex> lock(all.mutex);
        const auto* p = all.find(address);
        if (!p || address + bytes > p->second.end) {
            std::string near = "no live memory is near";
            auto i = all.pieces.upper_bound(address);
            if (i != all.pieces.begin()) {
                --i;
                near = address < i->second.end ? "it reaches past the end of " + i->second.name
                                               : std::to_string(address - i->second.end) + " bytes after the end of " + i->second.name + " (" +
                       std::to_string(i->second.end - i->first) + " bytes)";
            } else if (i != all.pieces.end()) {
                near = std::to_string(i->first - address) + " bytes before " + i->second.name;
            }
            lock.unlock();
            fail("%s of %u bytes at %p, outside live memory: %s", ACCESS_NAMES[access], bytes, (void*)address, near.c_str());
        }
        if (p->second.device >= 0 && !(running->devices >> p->second.device & 1)) {
            const std::string name = p->second.name;
            lock.unlock();
            fail("%s at %p in %s: peer access is not enabled", ACCESS_NAMES[access], (void*)address, name.c_str());
        }
        r = {p->first, p->second.end, p->second.shift};
    }
    return (char*)address + r.shift;
}

}  // namespace softgpu

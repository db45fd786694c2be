// What an operation touched: per page of 4 KiB, a bit per word of 4 bytes. Filled by kernels (device.cpp) and copies (driver_stream.cpp), read by
// the race detector for streams (driver_race.cpp).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <unordered_map>

namespace softgpu {

struct PageAccess {
    uint64_t constant[16], read[16], written[16], atomic[16];
};
struct Accesses {
    std::unordered_map<uintptr_t, PageAccess> pages;  // by address / 4096
    // Words of which only a part belongs to it are left out: the rest may be someone else's.
    void add(uintptr_t address, size_t bytes, bool write) {
        for (uintptr_t word = (address + 3) / 4, end = (address + bytes) / 4; word < end;) {
            PageAccess& page = pages[word / 1024];
            for (uintptr_t stop = (word / 1024 + 1) * 1024 < end ? (word / 1024 + 1) * 1024 : end; word < stop; word++)
                (write ? page.written : page.read)[word % 1024 / 64] |= 1ull << word % 64;
        }
    }
};

}  // namespace softgpu

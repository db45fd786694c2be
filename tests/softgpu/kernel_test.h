// What the tests of single kernels share: tensors in registered memory, work lists built the plain way from slices, which query sees which
// key, the error contract of tests/data/README.md, and a tally. Plain C++ over device.h; nothing of the library.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../kernels/bounds.cuh"
#include "../../kernels/params.h"
#include "../../kernels/ptx.cuh"

namespace kernel_test {

// splitmix64; element values as in tests/data/README.md, nearly normal with deviation 1.15.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull) {}
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return (uint32_t)(next() % n); }
    float value() {
        uint64_t z = next();
        int32_t sum = (int32_t)(z & 0xffff) + (int32_t)(z >> 16 & 0xffff) + (int32_t)(z >> 32 & 0xffff) + (int32_t)(z >> 48);
        return (float)(sum - 131070) / 32768.0f;
    }
};

template <class E>
E rounded(float x);
template <>
inline bf16_t rounded<bf16_t>(float x) {
    return bf16_t{(uint16_t)pack2<bf16_t>(x, 0.0f)};
}
template <>
inline f16_t rounded<f16_t>(float x) {
    return f16_t{(uint16_t)pack2<f16_t>(x, 0.0f)};
}
template <>
inline float rounded<float>(float x) {
    return x;
}
inline float widened(bf16_t x) { return to_float(x); }
inline float widened(f16_t x) { return to_float(x); }
inline float widened(float x) { return x; }
template <class E>
constexpr double epsilon() {
    return std::is_same<E, bf16_t>::value ? 0x1p-8 : std::is_same<E, f16_t>::value ? 0x1p-11 : 0x1p-24;
}

// How a tensor lies in memory: dense rows, rows with a gap between them, or batch entries of `rows_per_batch` rows in the order
// [position, batch, head] or [batch, head, position]. Rows and heads start at multiples of 16 bytes, but those that are TIGHT, also dense.
enum Layout { DENSE, GAPS, SBHD, BHSD, TIGHT };

// A tensor [rows, heads, dim] in registered memory, every byte 0xff (NaN in all types) until set.
template <class E>
struct Tensor {
    uint32_t rows, heads, dim;
    cp_view view{};
    std::shared_ptr<unsigned char> bytes;
    std::shared_ptr<softgpu::Registered> registered;
    size_t elements = 0;

    Tensor() : rows(0), heads(0), dim(0) {}
    Tensor(const char* name, uint32_t rows_, uint32_t heads_, uint32_t dim_, Layout layout = DENSE, uint32_t rows_per_batch = 0)
        : rows(rows_), heads(heads_), dim(dim_) {
        const int64_t align = layout == TIGHT ? 1 : 16 / sizeof(E), d = (dim + align - 1) / align * align, hd = heads * d;
        view.rows = rows;
        view.stride_row = hd;
        view.stride_head = d;
        if (layout == GAPS) {
            view.stride_row = hd + 2 * align;
        } else if (layout == SBHD || layout == BHSD) {
            const int64_t batches = (rows + rows_per_batch - 1) / rows_per_batch;
            view.rows_per_batch = rows_per_batch;
            view.stride_row = layout == SBHD ? batches * hd : d;
            view.stride_batch = layout == SBHD ? hd : heads * rows_per_batch * d;
            view.stride_head = layout == SBHD ? d : rows_per_batch * d;
        }
        for (uint32_t r = 0; r < rows; r++) elements = std::max(elements, (size_t)(offset(r, heads - 1, 0) + d));
        const size_t size = std::max<size_t>(elements * sizeof(E), 16);
        bytes.reset((unsigned char*)aligned_alloc(256, (size + 255) / 256 * 256), free);
        memset(bytes.get(), 0xff, size);
        registered = std::make_shared<softgpu::Registered>(bytes.get(), size, name);
        view.ptr = (uint64_t)(uintptr_t)bytes.get();
    }
    int64_t offset(uint32_t r, uint32_t h, uint32_t d) const {
        const uint32_t n = view.rows_per_batch;
        return (n ? r / n * view.stride_batch + r % n * view.stride_row : r * view.stride_row) + h * view.stride_head + d;
    }
    E& at(uint32_t r, uint32_t h, uint32_t d = 0) { return ((E*)bytes.get())[offset(r, h, d)]; }
    float get(uint32_t r, uint32_t h, uint32_t d = 0) { return widened(at(r, h, d)); }
    // Random values in the rows that `used` says (null: all); the others stay NaN.
    void fill(Random& random, const std::vector<bool>* used = nullptr) {
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < heads; h++)
                for (uint32_t d = 0; d < dim; d++) {
                    const float x = random.value();
                    if (!used || (*used)[r]) at(r, h, d) = rounded<E>(x);
                }
    }
    void set(float x) {
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < heads; h++)
                for (uint32_t d = 0; d < dim; d++) at(r, h, d) = rounded<E>(x);
    }
    // No byte outside the elements was written.
    bool gaps_untouched() {
        std::vector<bool> mine(elements);
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < heads; h++)
                for (uint32_t d = 0; d < dim; d++) mine[offset(r, h, d)] = true;
        for (size_t i = 0; i < elements; i++)
            for (size_t b = 0; b < sizeof(E); b++)
                if (!mine[i] && bytes.get()[i * sizeof(E) + b] != 0xff) return false;
        return true;
    }
};

// A table in registered memory.
template <class E>
struct Table {
    std::shared_ptr<unsigned char> bytes;
    std::shared_ptr<softgpu::Registered> registered;
    Table(const char* name, const std::vector<E>& rows) {
        const size_t size = std::max<size_t>(rows.size() * sizeof(E), 16);
        bytes.reset((unsigned char*)aligned_alloc(256, (size + 255) / 256 * 256), free);
        if (!rows.empty()) memcpy(bytes.get(), rows.data(), rows.size() * sizeof(E));
        registered = std::make_shared<softgpu::Registered>(bytes.get(), size, name);
    }
    uint64_t address() const { return (uint64_t)(uintptr_t)bytes.get(); }
};

inline bool sees(const cp_slice& s, uint32_t q, uint32_t k) {
    if (q - s.q >= s.q_len || k - s.k >= s.k_len) return false;
    const int64_t difference = (int64_t)(k - s.k) - (int64_t)(q - s.q);
    return s.lo <= difference && difference <= s.hi;
}
inline bool sees(const std::vector<cp_slice>& slices, uint32_t q, uint32_t k) {
    for (const cp_slice& s : slices)
        if (sees(s, q, k)) return true;
    return false;
}
// Rows of the queries, of the keys, that some slice has.
inline std::vector<bool> used_queries(const std::vector<cp_slice>& slices, uint32_t rows) {
    std::vector<bool> used(rows);
    for (const cp_slice& s : slices) std::fill_n(used.begin() + s.q, s.q_len, true);
    return used;
}
inline std::vector<bool> used_keys(const std::vector<cp_slice>& slices, uint32_t rows) {
    std::vector<bool> used(rows);
    for (const cp_slice& s : slices) std::fill_n(used.begin() + s.k, s.k_len, true);
    return used;
}
inline std::vector<uint32_t> bitmap(const std::vector<bool>& used) {
    std::vector<uint32_t> words(used.size() / 32 + 1);
    for (size_t i = 0; i < used.size(); i++) words[i / 32] |= (uint32_t)used[i] << (i % 32);
    return words;
}

// A work list. `turn` is what params.h says it is.
struct Lists {
    std::vector<cp_tile> tiles;
    std::vector<cp_part> parts;
    std::vector<cp_slice> slices;
};

// Tiles of `tile_rows` rows of one side (cut: sometimes fewer) and their sweeps over the other side. keys_side: tiles are of keys (backward).
// A part takes slices as long as no query row of the tile occurs twice; sometimes a part is cut in two at any row.
inline Lists make_lists(Random& random, const std::vector<cp_slice>& slices, uint32_t rows, uint32_t tile_rows, bool keys_side, bool cut,
                        uint32_t turn_rows = 64) {
    Lists lists;
    for (uint32_t row = 0; row < rows;) {
        uint32_t n = std::min(rows - row, tile_rows);
        if (cut && random.below(3) == 0) n = 1 + random.below(n);
        std::vector<std::vector<cp_slice>> groups;
        for (const cp_slice& s : slices) {
            const uint32_t first = keys_side ? s.k : s.q, length = keys_side ? s.k_len : s.q_len;
            if (first >= row + n || first + length <= row) continue;
            auto meets = [&](const cp_slice& o) {  // a query row in both, of those that matter
                const uint32_t from = std::max({o.q, s.q, keys_side ? 0 : row});
                const uint32_t to = std::min({o.q + o.q_len, s.q + s.q_len, keys_side ? UINT32_MAX : row + n});
                return from < to;
            };
            auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return std::none_of(g.begin(), g.end(), meets); });
            if (group == groups.end()) group = groups.emplace(groups.end());
            group->push_back(s);
        }
        cp_tile tile{row, n, (uint32_t)lists.parts.size(), 0};
        for (auto& group : groups) {
            auto pair = [&](uint32_t mine, uint32_t other) { return keys_side ? sees(group, other, mine) : sees(group, mine, other); };
            uint32_t other_end = 0;
            for (const cp_slice& s : group) other_end = std::max(other_end, keys_side ? s.q + s.q_len : s.k + s.k_len);
            std::vector<bool> any(other_end), all(other_end);
            for (uint32_t o = 0; o < other_end; o++) {
                all[o] = true;
                for (uint32_t i = row; i < row + n; i++) {
                    const bool x = pair(i, o);
                    any[o] = any[o] || x;
                    all[o] = all[o] && x;
                }
            }
            const auto begin = std::find(any.begin(), any.end(), true) - any.begin();
            if (begin == (ptrdiff_t)other_end) continue;
            while (!any[other_end - 1]) other_end--;
            std::vector<std::pair<uint32_t, uint32_t>> sweeps{{(uint32_t)begin, other_end}};
            if (cut && random.below(3) == 0) {
                const uint32_t at = (uint32_t)begin + random.below(other_end - (uint32_t)begin);
                if (at > begin) sweeps = {{(uint32_t)begin, at}, {at, other_end}};
            }
            for (auto& sweep : sweeps) {
                cp_part part{sweep.first, sweep.second, 0, 0, (uint32_t)lists.slices.size(), (uint32_t)group.size(), sweep.first / turn_rows, 0};
                for (uint32_t o = sweep.first; o < sweep.second;) {  // the longest stretch that all see
                    uint32_t to = o;
                    while (to < sweep.second && all[to]) to++;
                    if (to - o > part.full_end - part.full_begin) part.full_begin = o, part.full_end = to;
                    o = to + 1;
                }
                lists.parts.push_back(part);
                tile.parts++;
            }
            lists.slices.insert(lists.slices.end(), group.begin(), group.end());
        }
        lists.tiles.push_back(tile);
        row += n;
    }
    return lists;
}

// The error contract for one tensor: per head, rows in buckets of 64, ‖got − oracle‖ ≤ k·‖plain − oracle‖ + 4·ε·‖oracle‖ + 1e-7·‖terms‖. Collects rows
// of one head in order; worst() is the greatest ratio of the two sides.
struct Contract {
    double factor, eps, worst = 0;
    double got2 = 0, plain2 = 0, oracle2 = 0, terms2 = 0;
    uint32_t rows = 0;
    struct Bucket {
        double got, plain, oracle, terms;
    };
    std::vector<Bucket> buckets;
    Contract(double factor_, double eps_) : factor(factor_), eps(eps_) {}
    void element(double got, double plain, double oracle, double terms) {
        got2 += (got - oracle) * (got - oracle);
        plain2 += (plain - oracle) * (plain - oracle);
        oracle2 += oracle * oracle;
        terms2 += terms * terms;
    }
    void end_row() {
        if (++rows == 64) close();
    }
    void close() {
        if (rows) buckets.push_back({got2, plain2, oracle2, terms2});
        got2 = plain2 = oracle2 = terms2 = 0, rows = 0;
    }
    void end_head() {
        if (rows && !buckets.empty()) {  // the last bucket takes the remainder
            Bucket& b = buckets.back();
            b.got += got2, b.plain += plain2, b.oracle += oracle2, b.terms += terms2;
            rows = 0;
        }
        close();
        for (const Bucket& b : buckets) {
            const double allowed = factor * sqrt(b.plain) + 4 * eps * sqrt(b.oracle) + 1e-7 * sqrt(b.terms);
            const double ratio = b.got == 0 ? 0 : sqrt(b.got) / allowed;
            if (!(ratio <= worst)) worst = ratio;  // NaN too
        }
        buckets.clear();
    }
};

// Runs cases by name; an argument chooses those whose name contains it.
struct Tally {
    int passed = 0, failed = 0;
    const char* only;
    Tally(int argc, char** argv) : only(argc > 1 ? argv[1] : "") {}
    // `test` returns what is wrong, or "".
    void run(const std::string& name, const std::function<std::string()>& test) {
        if (name.find(only) == std::string::npos) return;
        std::string wrong;
        try {
            wrong = test();
        } catch (const std::exception& e) {
            wrong = e.what();
        }
        if (wrong.empty()) {
            passed++;
        } else {
            failed++;
            printf("FAILED %s: %s\n", name.c_str(), wrong.c_str());
            fflush(stdout);
        }
    }
    int report(const char* what) const {
        printf("%s: %d passed, %d failed, SOFTGPU_SEED=%s\n", what, passed, failed, getenv("SOFTGPU_SEED") ? getenv("SOFTGPU_SEED") : "(default)");
        return failed != 0 || passed == 0;
    }
};

// Slices of usual masks: rows q … q+q_len against k … k+k_len, clamped as mask.rs does.
inline cp_slice band(uint32_t q, uint32_t q_len, uint32_t k, uint32_t k_len, int64_t lo, int64_t hi) {
    auto clamp = [&](int64_t x) { return (int32_t)std::max<int64_t>(-(int64_t)q_len, std::min<int64_t>(k_len, x)); };
    return {q, q_len, k, k_len, clamp(lo), clamp(hi)};
}
inline cp_slice full(uint32_t q, uint32_t q_len, uint32_t k, uint32_t k_len) { return band(q, q_len, k, k_len, -(1ll << 40), 1ll << 40); }
inline cp_slice causal(uint32_t q, uint32_t q_len, uint32_t k, uint32_t k_len) { return band(q, q_len, k, k_len, -(1ll << 40), 0); }

}  // namespace kernel_test

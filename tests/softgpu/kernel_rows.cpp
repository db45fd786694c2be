// The row kernels on the software GPU. Copies, fills and what is coded must be exact; delta is compared with float64. ./kernel_rows [part of a name]
#include "kernel_test.h"

#include "../../kernels/rows.cu"

using namespace kernel_test;

// A tensor of any type, in registered memory between guards; strides in elements, as a caller may have them.
struct Rows {
    uint32_t type, rows, heads, dim;
    cp_view view{};
    std::vector<unsigned char> memory;
    size_t begin;
    std::unique_ptr<softgpu::Registered> registered;

    uint32_t bytes() const { return type == CP_F32 ? 4 : type >= CP_E4M3 ? 1 : 2; }
    // `shift`: elements from a multiple of 16 bytes to the first. `gap`: between heads, and between rows.
    Rows(Random& random, const char* name, uint32_t type_, uint32_t rows_, uint32_t heads_, uint32_t dim_, uint32_t shift, uint32_t gap, uint32_t per_batch,
         bool heads_outside)
        : type(type_), rows(rows_), heads(heads_), dim(dim_) {
        const uint32_t batches = per_batch ? (rows + per_batch - 1) / per_batch : 1, n = per_batch ? per_batch : rows;
        view.rows = rows, view.rows_per_batch = per_batch;
        view.stride_head = heads_outside ? (int64_t)n * (dim + gap) : dim + gap;
        view.stride_row = heads_outside ? dim + gap : heads * (dim + gap) + gap;
        view.stride_batch = (int64_t)n * heads * (dim + gap) + (heads_outside ? 0 : n * gap);
        memory.resize(((size_t)batches * view.stride_batch + 64) * bytes() + 256);
        for (unsigned char& x : memory) x = (unsigned char)random.next();
        begin = (256 - (uintptr_t)memory.data() % 256) % 256 + shift * bytes();
        view.ptr = (uint64_t)(uintptr_t)memory.data() + begin;
        registered.reset(new softgpu::Registered(memory.data(), memory.size(), name));
    }
    size_t place(uint32_t r, uint32_t h, uint32_t d) const {
        const uint32_t n = view.rows_per_batch;
        return begin + ((n ? r / n * view.stride_batch + r % n * view.stride_row : r * view.stride_row) + h * view.stride_head + d) * bytes();
    }
    float get(size_t at) const {
        if (type == CP_F32) {
            float x;
            memcpy(&x, &memory[at], 4);
            return x;
        }
        uint16_t bits;
        memcpy(&bits, &memory[at], 2);
        return type == CP_BF16 ? widened(bf16_t{bits}) : widened(f16_t{bits});
    }
    static void put(std::vector<unsigned char>& to, size_t at, uint32_t type, float x) {
        uint16_t bits = type == CP_BF16 ? rounded<bf16_t>(x).bits : rounded<f16_t>(x).bits;
        memcpy(&to[at], type == CP_F32 ? (void*)&x : (void*)&bits, type == CP_F32 ? 4 : 2);
    }
    void randomise(Random& random) {
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < heads; h++)
                for (uint32_t d = 0; d < dim; d++) put(memory, place(r, h, d), type, random.value());
    }
};

// Runs that write no row twice: some rows of dst, in disjoint stretches with steps, from rows of src.
static std::vector<cp_run> make_runs(Random& random, uint32_t src_rows, uint32_t dst_rows, uint32_t& total) {
    std::vector<cp_run> runs;
    total = 0;
    for (uint32_t at = random.below(3); at < dst_rows;) {
        cp_run run{};
        run.dst = at, run.dst_step = 1 + random.below(3), run.src_step = random.below(3);
        run.rows = random.below(8) == 0 ? 0 : 1 + random.below(std::min(40u, (dst_rows - at + run.dst_step - 1) / run.dst_step));
        while (run.rows > 1 && (run.rows - 1) * run.src_step >= src_rows) run.rows--;
        run.src = random.below(src_rows - (run.rows ? (run.rows - 1) * run.src_step : 0));
        run.before = total;
        total += run.rows;
        at += run.rows * run.dst_step + random.below(4);
        runs.push_back(run);
    }
    return runs;
}

static const char* const NAMES[] = {"f32", "bf16", "f16"};

static std::string same(const std::vector<unsigned char>& got, const std::vector<unsigned char>& expected) {
    for (size_t i = 0; i < got.size(); i++)
        if (got[i] != expected[i]) return "byte " + std::to_string(i) + " of " + std::to_string(got.size()) + " is wrong";
    return "";
}

struct Form {
    const char* name;
    uint32_t heads, dim, shift, gap;
    bool batches, heads_outside;
};
static const Form FORMS[] = {
    {"dense_128", 3, 128, 0, 0, false, false}, {"dense_8", 2, 8, 0, 0, false, false},      {"gaps_96", 2, 96, 0, 8, false, false},
    {"shifted_64", 2, 64, 1, 0, false, false}, {"odd_7", 3, 7, 0, 0, false, false},         {"odd_gap_40", 2, 40, 0, 3, true, false},
    // Aligned to half of what a vector needs: of 16-bit elements, of fp32.
    {"half_gap_64", 2, 64, 0, 4, true, false},   {"quarter_gap_64", 2, 64, 0, 2, true, false},
    {"batches_64", 4, 64, 0, 0, true, false},  {"heads_outside_256", 3, 256, 0, 0, true, true}, {"lse", 5, 1, 1, 0, false, false},
    {"lse_outside", 5, 1, 0, 0, true, true},   {"half_vector_12", 1, 12, 0, 0, false, false}, {"long_520", 1, 520, 0, 0, false, false},
};

// Aligned as keys and values are.
static const Form TRAVELLED[] = {
    {"dense_128", 3, 128, 0, 0, false, false}, {"dense_64", 2, 64, 0, 0, false, false}, {"dense_8", 2, 8, 0, 0, false, false},
    {"gaps_96", 2, 96, 0, 8, false, false},    {"gaps_40", 2, 40, 0, 24, true, false},  {"dense_72", 3, 72, 0, 0, false, false},
    {"batches_24", 4, 24, 0, 0, true, false},  {"heads_outside_256", 3, 256, 0, 0, true, true},
};

static std::string copy(const Form& f, uint32_t from, uint32_t to, bool add) {
    Random random(std::hash<std::string>()(f.name) + from * 3 + to);
    for (uint32_t blocks : {1u, 3u, 40u}) {
        const uint32_t src_rows = 1 + random.below(90), dst_rows = 1 + random.below(200), heads = 1 + random.below(f.heads);
        Rows src(random, "src", from, src_rows, f.heads, f.dim, f.shift, f.gap, f.batches ? 11 : 0, f.heads_outside);
        Rows dst(random, "dst", to, dst_rows, f.heads + 1, f.dim, 0, f.gap, f.batches ? 7 : 0, !f.heads_outside);
        if (from != to || add) src.randomise(random);  // equal types: any bits
        if (add) dst.randomise(random);
        cp_rows_params p{};
        const std::vector<cp_run> runs = make_runs(random, src_rows, dst_rows, p.row_count);
        Table<cp_run> table("runs", runs);
        p.src = src.view, p.dst = dst.view, p.runs = table.address(), p.run_count = (uint32_t)runs.size();
        p.src_type = from, p.dst_type = to, p.heads = heads, p.dim = f.dim, p.add = add;
        p.src_head = random.below(f.heads - heads + 1), p.dst_head = random.below(f.heads + 1 - heads + 1);
        std::vector<unsigned char> expected = dst.memory;
        for (const cp_run& run : runs)
            for (uint32_t i = 0; i < run.rows; i++)
                for (uint32_t h = 0; h < heads; h++)
                    for (uint32_t d = 0; d < f.dim; d++) {
                        const size_t a = src.place(run.src + i * run.src_step, p.src_head + h, d), b = dst.place(run.dst + i * run.dst_step, p.dst_head + h, d);
                        if (from == to && !add) {
                            memcpy(&expected[b], &src.memory[a], src.bytes());
                        } else {
                            Rows::put(expected, b, to, add ? dst.get(b) + src.get(a) : src.get(a));
                        }
                    }
        softgpu::launch(cp_copy_rows, blocks, 256, 0, p);
        const std::string wrong = same(dst.memory, expected);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

// The nearest number of a format without an end, ties to even; from the definition.
static double nearest(double x, uint32_t type) {
    int exponent;
    frexp(x, &exponent);
    const double step = ldexp(1, std::max(exponent - 1, type == CP_E4M3 ? -6 : -14) - (type == CP_E4M3 ? 3 : 2));
    return nearbyint(x / step) * step;
}

// The code of a number of the format: its place among those that are not below 0, and the sign.
static unsigned char code_of(double x, uint32_t type) {
    const int mantissa = type == CP_E4M3 ? 3 : 2, bias = type == CP_E4M3 ? 7 : 15;
    for (int code = 0;; code++) {
        const int e = code >> mantissa, m = code & ((1 << mantissa) - 1);
        const double y = e == 0 ? ldexp(m, 1 - bias - mantissa) : ldexp((1 << mantissa) + m, e - bias - mantissa);
        if (y == fabs(x)) return (unsigned char)(code | (std::signbit(x) ? 0x80 : 0));
    }
}

// A block: its bytes to codes[0 … n), returns the scale byte; x becomes what is decoded.
static unsigned char travel_block(float* x, uint32_t n, uint32_t type, float most, unsigned char* codes) {
    double largest = 0;
    for (uint32_t i = 0; i < n; i++) largest = std::isfinite(x[i]) ? std::max(largest, fabs((double)x[i])) : INFINITY;
    if (largest == INFINITY) {
        std::fill(x, x + n, NAN), std::fill(codes, codes + n, 0x7f);
        return 255;
    }
    int e = -127;
    while (nearest(ldexp(largest, -e), type) > (type == CP_E4M3 ? 448 : 57344)) e++;
    for (uint32_t i = 0; i < n; i++) {
        const double y = nearest(ldexp((double)x[i], -e), type);
        codes[i] = code_of(y, type);
        x[i] = (float)std::max<double>(-most, std::min<double>(most, ldexp(y, e)));
    }
    return (unsigned char)(e + 127);
}

// Encodes rows, copies the codes, decodes the copy: every byte of the three.
static std::string travel(const Form& f, uint32_t stored, uint32_t type, uint32_t gap) {
    Random random(std::hash<std::string>()(f.name) + stored * 3 + type);
    const float most = stored == CP_BF16 ? widened(bf16_t{0x7f7f}) : 65504.0f;
    const uint32_t coded_dim = f.dim + (f.dim + 31) / 32;
    for (uint32_t blocks : {1u, 3u, 40u}) {
        const uint32_t rows = 1 + random.below(60), heads = 1 + random.below(f.heads);
        Rows src(random, "src", stored, rows, f.heads, f.dim, 0, f.gap, f.batches ? 11 : 0, f.heads_outside);
        Rows code(random, "code", type, rows + 50, f.heads + 1, coded_dim, gap, gap, 0, false), moved(random, "moved", type, rows + 50, f.heads + 1, coded_dim, 0, gap, 0, false);
        Rows back(random, "back", stored, rows + 50, f.heads + 1, f.dim, 0, f.gap, 0, false);
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t h = 0; h < f.heads; h++) {
                const float scale = ldexpf(1, (int)random.below(stored == CP_BF16 ? 250 : 36) - (stored == CP_BF16 ? 130 : 22));
                for (uint32_t d = 0; d < f.dim; d++) {
                    const uint32_t kind = random.below(40);
                    const float x = kind == 0 ? 0.0f : kind == 1 ? -0.0f : kind < 8 ? ldexpf(random.value(), -(int)random.below(20)) : random.value();
                    Rows::put(src.memory, src.place(r, h, d), stored, x * scale);
                }
                const uint32_t special = random.below(10);
                const float odd[] = {NAN, -INFINITY, INFINITY, most, -most};
                if (special < 5) Rows::put(src.memory, src.place(r, h, random.below(f.dim)), stored, odd[special]);
                if (special == 5)
                    for (uint32_t d = 0; d < f.dim; d++) Rows::put(src.memory, src.place(r, h, d), stored, 0.0f);
            }
        cp_rows_params p{};
        const std::vector<cp_run> runs = make_runs(random, rows, rows, p.row_count);
        const std::vector<cp_run> straight = {cp_run{0, 1, 0, 1, rows + 50, 0}};
        Table<cp_run> table("runs", runs), all("all", straight);
        std::vector<unsigned char> codes = code.memory, decoded = back.memory;
        for (const cp_run& run : runs)
            for (uint32_t i = 0; i < run.rows; i++)
                for (uint32_t h = 0; h < heads; h++) {
                    std::vector<float> x(f.dim);
                    for (uint32_t d = 0; d < f.dim; d++) x[d] = src.get(src.place(run.src + i * run.src_step, f.heads - heads + h, d));
                    const uint32_t to = run.dst + i * run.dst_step;
                    for (uint32_t d = 0; d < f.dim; d += 32)
                        codes[code.place(to, h, f.dim + d / 32)] = travel_block(&x[d], std::min(32u, f.dim - d), type, most, &codes[code.place(to, h, d)]);
                    for (uint32_t d = 0; d < f.dim; d++) Rows::put(decoded, back.place(to, h, d), stored, x[d]);
                }
        p.src = src.view, p.dst = code.view, p.runs = table.address(), p.run_count = (uint32_t)runs.size();
        p.src_type = stored, p.dst_type = type, p.heads = heads, p.dim = f.dim, p.src_head = f.heads - heads;
        softgpu::launch(cp_encode_rows, blocks, 256, 0, p);
        std::string wrong = same(code.memory, codes);
        if (!wrong.empty()) return "encoded: " + wrong;
        p.src = code.view, p.dst = moved.view, p.runs = all.address(), p.run_count = 1, p.row_count = rows + 50;
        p.src_type = type, p.heads = f.heads + 1, p.dim = coded_dim, p.src_head = 0;
        std::vector<unsigned char> copied = moved.memory;
        for (uint32_t r = 0; r < rows + 50; r++)
            for (uint32_t h = 0; h <= f.heads; h++) memcpy(&copied[moved.place(r, h, 0)], &code.memory[code.place(r, h, 0)], coded_dim);
        softgpu::launch(cp_copy_rows, blocks, 256, 0, p);
        wrong = same(moved.memory, copied);
        if (!wrong.empty()) return "copied: " + wrong;
        // Rows that are decoded lie where they were encoded to.
        std::vector<cp_run> again = runs;
        for (cp_run& run : again) run.src = run.dst, run.src_step = run.dst_step;
        Table<cp_run> places("places", again);
        p.src = moved.view, p.dst = back.view, p.runs = places.address(), p.run_count = (uint32_t)runs.size();
        p.row_count = runs.empty() ? 0 : runs.back().before + runs.back().rows;
        p.dst_type = stored, p.heads = heads, p.dim = f.dim;
        softgpu::launch(cp_decode_rows, blocks, 256, 0, p);
        for (uint32_t r = 0; r < rows + 50; r++)  // NaN of any bits
            for (uint32_t h = 0; h <= f.heads; h++)
                for (uint32_t d = 0; d < f.dim; d++) {
                    const size_t at = back.place(r, h, d);
                    uint16_t want;
                    memcpy(&want, &decoded[at], 2);
                    const bool nan = (want & 0x7fff) > (stored == CP_BF16 ? 0x7f80 : 0x7c00);
                    if (nan && back.get(at) != back.get(at)) memcpy(&decoded[at], &back.memory[at], 2);
                }
        wrong = same(back.memory, decoded);
        if (!wrong.empty()) return "decoded: " + wrong;
    }
    return "";
}

static std::string fill(const Form& f, uint32_t type) {
    Random random(std::hash<std::string>()(f.name) + type);
    for (float value : {-INFINITY, 0.0f, 1.5f}) {
        const uint32_t rows = 1 + random.below(200), heads = 1 + random.below(f.heads);
        Rows dst(random, "dst", type, rows, f.heads, f.dim, f.shift, f.gap, f.batches ? 13 : 0, f.heads_outside);
        cp_rows_params p{};
        const std::vector<cp_run> runs = make_runs(random, 1000, rows, p.row_count);
        Table<cp_run> table("runs", runs);
        p.dst = dst.view, p.runs = table.address(), p.run_count = (uint32_t)runs.size();
        p.dst_type = type, p.heads = heads, p.dim = f.dim, p.value = __float_as_uint(value);
        p.dst_head = random.below(f.heads - heads + 1);
        std::vector<unsigned char> expected = dst.memory;
        for (const cp_run& run : runs)
            for (uint32_t i = 0; i < run.rows; i++)
                for (uint32_t h = 0; h < heads; h++)
                    for (uint32_t d = 0; d < f.dim; d++) Rows::put(expected, dst.place(run.dst + i * run.dst_step, p.dst_head + h, d), type, value);
        softgpu::launch(cp_fill_rows, 1 + random.below(20), 256, 0, p);
        const std::string wrong = same(dst.memory, expected);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

template <class T>
static std::string sums(uint32_t dim, uint32_t heads, uint32_t rows, Layout layout, uint32_t per_batch) {
    Random random(dim * 1000 + heads);
    Tensor<T> out("out", rows, heads, dim, layout, per_batch), d_out("d_out", rows, heads, dim, layout, per_batch);
    out.fill(random), d_out.fill(random);
    for (uint32_t d = 0; d < dim; d++) out.at(rows / 2, 0, d) = rounded<T>(NAN);  // stays in its row
    Rows delta(random, "delta", CP_F32, rows, heads, 1, 1, 1, 0, true);
    std::vector<unsigned char> expected = delta.memory;
    cp_delta_params p{};
    p.out = out.view, p.d_out = d_out.view, p.delta = delta.view;
    p.row_count = rows, p.heads = heads, p.dim = dim, p.type = std::is_same<T, bf16_t>::value ? CP_BF16 : CP_F16;
    softgpu::launch(cp_delta, 1 + random.below(5), 256, 0, p);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < heads; h++) {
            double sum = 0, terms = 0;
            for (uint32_t d = 0; d < dim; d++) sum += (double)out.get(r, h, d) * d_out.get(r, h, d), terms += fabs(out.get(r, h, d) * d_out.get(r, h, d));
            const float got = delta.get(delta.place(r, h, 0));
            if (r == rows / 2 && h == 0 ? got == got : !(fabs(got - sum) <= 1e-6 * terms))
                return "row " + std::to_string(r) + ", head " + std::to_string(h) + ": " + std::to_string(got) + " instead of " + std::to_string(sum);
            Rows::put(expected, delta.place(r, h, 0), CP_F32, got);
        }
    return same(delta.memory, expected);
}

static std::string sink_terms(uint32_t rows, uint32_t heads, bool heads_outside) {
    Random random(rows * 10 + heads);
    Rows sinks(random, "sinks", CP_F32, 1, heads, 1, 1, 0, 0, false), lse(random, "lse", CP_F32, rows, heads, 1, 1, 0, 9, heads_outside);
    Rows delta(random, "delta", CP_F32, rows, heads, 1, 0, 0, 0, false), terms(random, "terms", CP_F32, rows, heads, 1, 0, 1, 0, false);
    sinks.randomise(random), lse.randomise(random), delta.randomise(random);
    for (uint32_t r = 0; r < rows; r += 5) {  // padding
        Rows::put(lse.memory, lse.place(r, r % heads, 0), CP_F32, -INFINITY);
        Rows::put(delta.memory, delta.place(r, r % heads, 0), CP_F32, NAN);
    }
    Rows::put(sinks.memory, sinks.place(0, 0, 0), CP_F32, -INFINITY);
    std::vector<unsigned char> expected = terms.memory;
    cp_sink_params p{sinks.view, lse.view, delta.view, terms.view, rows, heads};
    softgpu::launch(cp_sink_terms, 1 + random.below(5), 256, 0, p);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < heads; h++) {
            const float l = lse.get(lse.place(r, h, 0)), got = terms.get(terms.place(r, h, 0));
            const double want = l == -INFINITY ? 0 : -exp((double)sinks.get(sinks.place(0, h, 0)) - l) * delta.get(delta.place(r, h, 0));
            if (!(fabs(got - want) <= 2e-6 * fabs(want))) return "row " + std::to_string(r) + ", head " + std::to_string(h) + ": " + std::to_string(got) + " instead of " + std::to_string(want);
            Rows::put(expected, terms.place(r, h, 0), CP_F32, got);
        }
    return same(terms.memory, expected);
}

// The largest is exact; sums have the same bits in every order of warps.
static std::string reduce(uint32_t rows, uint32_t heads, bool largest) {
    Random random(rows * 10 + heads);
    Rows src(random, "src", CP_F32, rows, heads, 1, 1, 0, 0, false);
    src.randomise(random);
    for (uint32_t r = 0; largest && r < rows; r++) Rows::put(src.memory, src.place(r, 0, 0), CP_F32, -INFINITY);
    std::vector<unsigned char> first;
    for (int schedule = 0; schedule < softgpu::SCHEDULES; schedule++) {
        Random same_random(7);
        Rows dst(same_random, "dst", CP_F32, 3, heads + 2, 1, 0, 0, 0, false);
        std::vector<unsigned char> expected = dst.memory;
        cp_reduce_params p{src.view, dst.view, rows, heads, 2, 1, largest, 0};
        softgpu::Options options;
        options.schedule = schedule, options.seed = 100 + schedule;
        softgpu::launch(cp_reduce, heads, 256, 32, options, p);
        for (uint32_t h = 0; h < heads; h++) {
            double want = largest ? -INFINITY : 0, terms = 0;
            for (uint32_t r = 0; r < rows; r++) {
                const float x = src.get(src.place(r, h, 0));
                want = largest ? std::max<double>(want, x) : want + x, terms += fabs(x);
            }
            const float got = dst.get(dst.place(2, h + 1, 0));
            if (largest ? got != want : !(fabs(got - want) <= 1e-6 * terms)) return "head " + std::to_string(h) + ": " + std::to_string(got) + " instead of " + std::to_string(want);
            Rows::put(expected, dst.place(2, h + 1, 0), CP_F32, got);
        }
        const std::string wrong = same(dst.memory, expected);
        if (!wrong.empty()) return wrong;
        if (schedule == 0) first = dst.memory;
        if (first != dst.memory) return "other bits in another order";
    }
    return "";
}

int main(int argc, char** argv) {
    Tally tally(argc, argv);
    for (uint32_t rows : {0u, 1u, 31u, 256u, 1000u})
        for (uint32_t heads : {1u, 5u}) {
            const std::string name = std::to_string(rows) + "_" + std::to_string(heads);
            if (rows) tally.run("sink_terms_" + name, [&] { return sink_terms(rows, heads, heads == 5); });
            tally.run("sum_" + name, [&] { return reduce(rows, heads, false); });
            tally.run("largest_" + name, [&] { return reduce(rows, heads, true); });
        }
    for (const Form& f : TRAVELLED)
        for (uint32_t type : {CP_E4M3, CP_E5M2})
            for (uint32_t stored : {CP_BF16, CP_F16})
                for (uint32_t gap : {0u, 1u, 4u, 7u})
                    tally.run(std::string("travel_") + f.name + "_" + NAMES[stored] + (type == CP_E4M3 ? "_e4m3_" : "_e5m2_") + std::to_string(gap),
                              [&] { return travel(f, stored, type, gap); });
    for (const Form& f : FORMS)
        for (uint32_t to = 0; to < 3; to++) {
            for (uint32_t from = 0; from < 3; from++) {
                const std::string name = std::string(f.name) + "_" + NAMES[from] + "_" + NAMES[to];
                tally.run("copy_" + name, [&] { return copy(f, from, to, false); });
                if (to == CP_F32) tally.run("add_" + name, [&] { return copy(f, from, to, true); });
            }
            tally.run(std::string("fill_") + f.name + "_" + NAMES[to], [&] { return fill(f, to); });
        }
    for (uint32_t dim : {8u, 40u, 64u, 96u, 128u, 136u, 192u, 256u, 512u}) {
        const std::string d = std::to_string(dim);
        tally.run("delta_bf16_" + d, [&] { return sums<bf16_t>(dim, 3, 77, DENSE, 0); });
        tally.run("delta_f16_" + d, [&] { return sums<f16_t>(dim, 2, 45, GAPS, 0); });
        tally.run("delta_sbhd_" + d, [&] { return sums<bf16_t>(dim, 2, 60, SBHD, 15); });
        tally.run("delta_one_" + d, [&] { return sums<f16_t>(dim, 1, 1, DENSE, 0); });
    }
    return tally.report("row kernels");
}

// The kernels of latents on the software GPU, against float64 sums over operands rounded as the kernels round them. ./kernel_latent [part of a name]
#include "kernel_test.h"

#include "../../kernels/latent.cu"

using namespace kernel_test;

struct Ranges {
    const char* name;
    std::vector<std::pair<uint32_t, uint32_t>> list;  // first row, rows
};

struct Shape {
    const char* name;
    uint32_t heads, first_head, all_heads, dim, rope, dim_k, dim_v;
};

// What a step has: rows that are not listed are NaN in what it reads, and 0xff… in what it makes.
template <class T>
struct Step {
    Shape s;
    uint32_t rows;
    std::vector<bool> used;
    std::vector<cp_run> runs;
    Tensor<T> latent, up_k, up_v, k, v;
    Tensor<float> dk, dv, d_latent, d_up_k, d_up_v;
    Table<cp_run> table;
    cp_latent_params p{};

    static std::vector<cp_run> runs_of(const Ranges& ranges) {
        std::vector<cp_run> runs;
        uint32_t before = 0;
        for (auto& r : ranges.list) {
            runs.push_back(cp_run{0, 0, r.first, 1, r.second, before});
            before += r.second;
        }
        return runs;
    }

    Step(const Shape& shape, const Ranges& ranges, Layout layout, uint64_t seed)
        : s(shape), rows(ranges.list.back().first + ranges.list.back().second + 3), used(rows), runs(runs_of(ranges)), table("runs", runs) {
        const uint32_t per_batch = layout == SBHD || layout == BHSD ? 37 : 0;
        latent = Tensor<T>("latent", rows, 1, s.dim + s.rope, layout, per_batch);
        up_k = Tensor<T>("up_k", s.dim_k, s.all_heads, s.dim, layout == DENSE ? DENSE : GAPS);
        up_v = Tensor<T>("up_v", s.dim_v, s.all_heads, s.dim, layout == DENSE ? DENSE : GAPS);
        k = Tensor<T>("k", rows, s.heads, s.dim_k + s.rope, layout, per_batch);
        v = Tensor<T>("v", rows, s.heads, s.dim_v, layout, per_batch);
        dk = Tensor<float>("dk", rows, s.heads, s.dim_k + s.rope, layout, per_batch);
        dv = Tensor<float>("dv", rows, s.heads, s.dim_v, layout, per_batch);
        d_latent = Tensor<float>("d_latent", rows, 1, s.dim + s.rope, layout, per_batch);
        d_up_k = Tensor<float>("d_up_k", s.dim_k, s.all_heads, s.dim, layout == DENSE ? DENSE : GAPS);
        d_up_v = Tensor<float>("d_up_v", s.dim_v, s.all_heads, s.dim, layout == DENSE ? DENSE : GAPS);
        for (auto& r : ranges.list) std::fill_n(used.begin() + r.first, r.second, true);
        Random random(seed);
        latent.fill(random, &used), up_k.fill(random), up_v.fill(random), dk.fill(random, &used), dv.fill(random, &used);
        d_latent.fill(random, &used), d_up_k.fill(random), d_up_v.fill(random);
        p.latent = latent.view, p.up_k = up_k.view, p.up_v = up_v.view;
        p.runs = table.address(), p.run_count = (uint32_t)runs.size();
        for (const cp_run& run : runs) p.row_count += run.rows;
        p.heads = s.heads, p.first_head = s.first_head, p.dim = s.dim, p.rope = s.rope, p.dim_k = s.dim_k, p.dim_v = s.dim_v;
    }
    static bool bf16() { return std::is_same<T, bf16_t>::value; }
    static uint32_t tiles(uint32_t n) { return (n + CP_LATENT_TILE - 1) / CP_LATENT_TILE; }
    uint32_t made() const { return tiles(s.dim_k) + tiles(s.dim_v); }
    static double narrowed(float x) { return widened(rounded<T>(x)); }
    void launch(void (*kernel)(cp_latent_params), uint32_t blocks, int schedule = -1) {
        softgpu::Options options;
        options.schedule = schedule;
        if (blocks) softgpu::launch(kernel, blocks, CP_LATENT_THREADS, CP_LATENT_SHARED, options, p);
    }
};

static std::string differs(const char* what, uint32_t row, uint32_t head, uint32_t i, double got, double want) {
    return std::string(what) + " row " + std::to_string(row) + ", head " + std::to_string(head) + ", " + std::to_string(i) + ": " + std::to_string(got) +
           " instead of " + std::to_string(want);
}

// Elements outside the used rows still are what they were, 0xff….
template <class E>
static bool as_before(E x) {
    unsigned char bytes[sizeof(E)];
    memcpy(bytes, &x, sizeof(E));
    return std::all_of(bytes, bytes + sizeof(E), [](unsigned char b) { return b == 0xff; });
}

template <class T>
static std::string expands(const Shape& s, const Ranges& ranges, Layout layout) {
    Step<T> step(s, ranges, layout, 3);
    step.p.k = step.k.view, step.p.v = step.v.view;
    step.launch(Step<T>::bf16() ? cp_expand_bf16 : cp_expand_f16, Step<T>::tiles(step.p.row_count) * s.heads * step.made());
    for (bool keys : {true, false}) {
        Tensor<T>&to = keys ? step.k : step.v, &weights = keys ? step.up_k : step.up_v;
        const char* const name = keys ? "k" : "v";
        const uint32_t made = keys ? s.dim_k : s.dim_v;
        for (uint32_t r = 0; r < step.rows; r++)
            for (uint32_t h = 0; h < s.heads; h++)
                for (uint32_t n = 0; n < to.dim; n++) {
                    if (!step.used[r]) {
                        if (!as_before(to.at(r, h, n))) return differs(name, r, h, n, to.get(r, h, n), NAN);
                        continue;
                    }
                    double want = 0, terms = 0;
                    for (uint32_t i = 0; n < made && i < s.dim; i++) {
                        const double x = (double)step.latent.get(r, 0, i) * weights.get(n, s.first_head + h, i);
                        want += x, terms += fabs(x);
                    }
                    if (n >= made) want = step.latent.get(r, 0, s.dim + n - made);
                    const double allowed = n < made ? epsilon<T>() * fabs(want) + 1e-6 * terms + 1e-7 : 0;
                    if (!(fabs(to.get(r, h, n) - want) <= allowed)) return differs(name, r, h, n, to.get(r, h, n), want);
                }
        if (!to.gaps_untouched()) return "something between the rows was written";
    }
    return "";
}

template <class T>
static std::string contracts_latent(const Shape& s, const Ranges& ranges, Layout layout) {
    std::vector<unsigned char> first;
    for (int schedule : {softgpu::RANDOM, softgpu::REVERSED}) {
        Step<T> step(s, ranges, layout, 5);
        Tensor<float>& to = step.d_latent;
        const std::vector<unsigned char> before(to.bytes.get(), to.bytes.get() + to.elements * 4);
        step.p.k = step.dk.view, step.p.v = step.dv.view, step.p.d_latent = to.view;
        step.launch(Step<T>::bf16() ? cp_contract_latent_bf16 : cp_contract_latent_f16,
                    Step<T>::tiles(step.p.row_count) * (Step<T>::tiles(s.dim) + (s.rope != 0)), schedule);
        const std::vector<unsigned char> after(to.bytes.get(), to.bytes.get() + to.elements * 4);
        if (schedule == softgpu::REVERSED) return after == first ? "" : "other bits in another order";
        first = after;
        for (uint32_t r = 0; r < step.rows; r++)
            for (uint32_t i = 0; i < to.dim; i++) {
                if (!step.used[r]) {
                    if (!as_before(to.at(r, 0, i))) return differs("d_latent", r, 0, i, to.get(r, 0, i), NAN);
                    continue;
                }
                float start;
                memcpy(&start, &before[to.offset(r, 0, i) * 4], 4);
                double want = start, terms = fabs(start);
                auto add = [&](double x) { want += x, terms += fabs(x); };
                for (uint32_t h = 0; h < s.heads; h++) {
                    if (i >= s.dim) {
                        add(step.dk.get(r, h, s.dim_k + i - s.dim));
                        continue;
                    }
                    for (uint32_t n = 0; n < s.dim_k; n++) add(Step<T>::narrowed(step.dk.get(r, h, n)) * step.up_k.get(n, s.first_head + h, i));
                    for (uint32_t n = 0; n < s.dim_v; n++) add(Step<T>::narrowed(step.dv.get(r, h, n)) * step.up_v.get(n, s.first_head + h, i));
                }
                if (!(fabs(to.get(r, 0, i) - want) <= 1e-6 * terms)) return differs("d_latent", r, 0, i, to.get(r, 0, i), want);
            }
        if (!to.gaps_untouched()) return "something between the rows was written";
    }
    return "";
}

template <class T>
static std::string contracts_weights(const Shape& s, const Ranges& ranges, Layout layout) {
    Step<T> step(s, ranges, layout, 7), before(s, ranges, layout, 7), again(s, ranges, layout, 7);
    for (Step<T>* x : {&step, &again}) {
        x->p.k = x->dk.view, x->p.v = x->dv.view, x->p.d_up_k = x->d_up_k.view, x->p.d_up_v = x->d_up_v.view;
        x->launch(Step<T>::bf16() ? cp_contract_weights_bf16 : cp_contract_weights_f16, s.heads * x->made() * Step<T>::tiles(s.dim),
                  x == &step ? softgpu::RANDOM : softgpu::REVERSED);
    }
    for (bool keys : {true, false}) {
        Tensor<float>&to = keys ? step.d_up_k : step.d_up_v, &was = keys ? before.d_up_k : before.d_up_v, &from = keys ? step.dk : step.dv;
        const char* const name = keys ? "d_up_k" : "d_up_v";
        for (uint32_t n = 0; n < to.rows; n++)
            for (uint32_t h = 0; h < s.all_heads; h++)
                for (uint32_t i = 0; i < s.dim; i++) {
                    double want = was.get(n, h, i), terms = fabs(want);
                    const bool mine = h - s.first_head < s.heads;
                    for (uint32_t r = 0; mine && r < step.rows; r++) {
                        if (!step.used[r]) continue;
                        const double x = Step<T>::narrowed(from.get(r, h - s.first_head, n)) * step.latent.get(r, 0, i);
                        want += x, terms += fabs(x);
                    }
                    if (!(fabs(to.get(n, h, i) - want) <= (mine ? 1e-6 * terms : 0))) return differs(name, n, h, i, to.get(n, h, i), want);
                    if (to.get(n, h, i) != (keys ? again.d_up_k : again.d_up_v).get(n, h, i)) return "other bits in another order";
                }
        if (!to.gaps_untouched()) return "something between the rows was written";
    }
    return "";
}

static const Shape SHAPES[] = {
    {"small", 2, 1, 4, 8, 0, 8, 8},         {"rope", 2, 0, 2, 40, 8, 24, 16},      {"one_tile", 1, 0, 1, 128, 64, 128, 128},
    {"odd", 3, 2, 5, 136, 24, 72, 136},     {"long", 1, 1, 2, 264, 8, 8, 40},       {"wide", 1, 0, 1, 72, 16, 240, 256},
};
static const Ranges RANGES[] = {
    {"one", {{0, 1}}}, {"tile", {{5, 128}}}, {"gaps", {{0, 7}, {9, 70}, {100, 1}, {103, 61}}}, {"none", {{4, 0}}},
};

int main(int argc, char** argv) {
    Tally tally(argc, argv);
    const std::pair<const char*, Layout> layouts[] = {{"dense", DENSE}, {"gaps", GAPS}, {"sbhd", SBHD}, {"bhsd", BHSD}};
    uint32_t number = 0;
    for (const Shape& s : SHAPES)
        for (const Ranges& r : RANGES) {
            const auto& layout = layouts[(number + number / 4) % 4];
            const std::string name = std::string(s.name) + "_" + r.name + "_" + layout.first;
            auto both = [&](auto type, const char* suffix) {
                using T = decltype(type);
                tally.run("expand_" + name + suffix, [&] { return expands<T>(s, r, layout.second); });
                tally.run("latent_" + name + suffix, [&] { return contracts_latent<T>(s, r, layout.second); });
                tally.run("weights_" + name + suffix, [&] { return contracts_weights<T>(s, r, layout.second); });
            };
            number++;
            if (number % 3 != 1) both(bf16_t{}, "_bf16");
            if (number % 3 != 2) both(f16_t{}, "_f16");
        }
    return tally.report("kernels of latents");
}

// The backward kernels on the software GPU against float64. ./kernel_backward [part of a name]
#include "kernel_score.h"

#include "../../kernels/backward_bf16_big.cu"
#include "../../kernels/backward_bf16_score.cu"
#include "../../kernels/backward_bf16_small.cu"
#include "../../kernels/backward_f16_big.cu"
#include "../../kernels/backward_f16_score.cu"
#include "../../kernels/backward_f16_small.cu"

using namespace kernel_test;

// One launch: its own keys, and what the queries see of them.
struct Step {
    uint32_t k_rows;
    std::vector<cp_slice> slices;
};

struct Case {
    std::string name;
    uint32_t q_rows;
    std::vector<Step> steps;
    uint32_t dim_qk = 64, dim_v = 64;
    uint32_t heads = 1, kv_heads = 1, q_first = 0, group = 1, kv_first = 0;
    Layout layout = DENSE;
    uint32_t rows_per_batch = 0;
    float scale = 0;      // 0: 1/sqrt(dim_qk)
    bool cut = false;     // tiles and parts of odd sizes
    bool bitmaps = true;  // else every row is used
    uint32_t blocks = 0;  // of the grid; 0: one per piece of work
    Features score = {};
};

// A bias with the columns that the case's queries see.
template <class T>
void make_bias(Scores& scores, const Case& c) {
    if (c.score.bias == NO_BIAS) return;
    uint32_t columns = 0;
    std::vector<std::vector<bool>> seen(c.q_rows);
    for (uint32_t r = 0; r < c.q_rows; r++)
        for (const Step& s : c.steps)
            for (uint32_t j = 0; j < s.k_rows; j++)
                if (sees(s.slices, r, j)) {
                    const uint32_t column = scores.column(r, j);
                    columns = std::max(columns, column + 1);
                    if (seen[r].size() <= column) seen[r].resize(column + 1);
                    seen[r][column] = true;
                }
    scores.make_bias<T>(c.q_rows, c.heads, columns, [&](uint32_t r, uint32_t column) { return column < seen[r].size() && seen[r][column]; });
}

using Kernel = void (*)(cp_attention_params);
struct Shape {
    uint32_t dqk, dv, q_rows, k_rows, threads, shared;
    Kernel bf16, f16;
};
#define BIG(dqk, dv, q_rows, k_rows, warps, s_m, keys, dq_m, q_stages, do_stages)                                       \
    {dqk, dv, q_rows, k_rows, warps * 32, CP_BACKWARD_SHARED(dqk, dv, q_rows, k_rows, q_stages, do_stages), cp_backward_bf16_##dqk, \
     cp_backward_f16_##dqk},
#define SMALL(dqk, dv, q_rows, k_rows, warps, s_m, keys, dq_m, q_stages, do_stages)                                     \
    {dqk, dv, q_rows, k_rows, warps * 32, CP_BACKWARD_SHARED(dqk, dv, q_rows, k_rows, q_stages, do_stages), cp_backward_bf16_##dqk##_small, \
     cp_backward_f16_##dqk##_small},
#define SCORE(dqk, dv, q_rows, k_rows, warps, s_m, keys, dq_m, q_stages, do_stages)                                            \
    {dqk, dv, q_rows, k_rows, warps * 32, CP_BACKWARD_SHARED_SCORE(dqk, dv, q_rows, k_rows, q_stages, do_stages), cp_backward_bf16_##dqk##_score, \
     cp_backward_f16_##dqk##_score},
static const Shape SHAPES[3][5] = {{CP_BACKWARD_SHAPES(BIG)}, {CP_BACKWARD_SHAPES_SMALL(SMALL)}, {CP_BACKWARD_SHAPES_SCORE(SCORE)}};

// What the kernels read, and what they shall find.
template <class T>
struct Problem {
    const Case& c;
    float scale;
    Tensor<T> q, d_out;
    std::vector<Tensor<T>> k, v;
    Tensor<float> lse, delta;
    // Per (row, head, element), dense: float64, plain arithmetic in the storage type, and the terms made positive.
    struct Expected {
        std::vector<double> oracle, terms;
        std::vector<float> plain;
        explicit Expected(size_t n) : oracle(n), terms(n), plain(n) {}
    };
    Expected dq{0}, d_bias{0};
    std::vector<Expected> dk, dv;
    std::unique_ptr<Scores> scores;

    explicit Problem(const Case& c_) : c(c_) {
        Random random(std::hash<std::string>()(c.name));
        scale = c.scale != 0 ? c.scale : 1.0f / sqrtf((float)c.dim_qk);
        std::vector<bool> q_used(c.q_rows);
        for (const Step& s : c.steps) {
            const std::vector<bool> used = used_queries(s.slices, c.q_rows);
            for (uint32_t r = 0; r < c.q_rows; r++) q_used[r] = q_used[r] || used[r] || !c.bitmaps;
        }
        scores.reset(new Scores(c.score, c.q_rows, c.heads, c.q_first, q_used));
        make_bias<T>(*scores, c);
        d_bias = Expected(c.score.bias == NO_BIAS ? 0 : (size_t)c.q_rows * scores->bias_heads(c.heads) * scores->biases.dim);
        q = Tensor<T>("q", c.q_rows, c.heads, c.dim_qk, c.layout, c.rows_per_batch);
        q.fill(random, &q_used);
        d_out = Tensor<T>("d_out", c.q_rows, c.heads, c.dim_v, c.layout, c.rows_per_batch);
        d_out.fill(random, &q_used);
        lse = Tensor<float>("lse", c.q_rows, c.heads, 1, c.layout, c.rows_per_batch);
        delta = Tensor<float>("delta", c.q_rows, c.heads, 1);
        dq = Expected((size_t)c.q_rows * c.heads * c.dim_qk);
        for (const Step& s : c.steps) {
            const std::vector<bool> used = used_keys(s.slices, s.k_rows);
            k.emplace_back("k", s.k_rows, c.kv_heads, c.dim_qk, c.layout, c.rows_per_batch);
            v.emplace_back("v", s.k_rows, c.kv_heads, c.dim_v, c.layout, c.rows_per_batch);
            k.back().fill(random, c.bitmaps ? &used : nullptr);
            v.back().fill(random, c.bitmaps ? &used : nullptr);
            dk.emplace_back((size_t)s.k_rows * c.kv_heads * c.dim_qk);
            dv.emplace_back((size_t)s.k_rows * c.kv_heads * c.dim_v);
        }
        for (uint32_t h = 0; h < c.heads; h++)
            for (uint32_t r = 0; r < c.q_rows; r++) row(r, h, q_used[r]);
        for (size_t i = 0; i < c.steps.size(); i++)
            for (float& x : dk[i].plain) x *= scale;
        for (float& x : dq.plain) x *= scale;
    }

    // LSE and delta of a row, and what it adds to all gradients.
    void row(uint32_t r, uint32_t h, bool used) {
        const uint32_t kv = (c.q_first + h) / c.group - c.kv_first;
        struct Pair {
            size_t step;
            uint32_t key;
            double s, dp;
            float s32, dp32;
            double derivative;
            float derivative32, grow;
        };
        std::vector<Pair> pairs;
        double most = -INFINITY, sum = 0;
        for (size_t i = 0; i < c.steps.size(); i++)
            for (uint32_t j = 0; j < c.steps[i].k_rows; j++)
                if (sees(c.steps[i].slices, r, j)) {
                    Pair x{i, j, 0, 0, 0, 0, 1, 1, 1};
                    for (uint32_t d = 0; d < c.dim_qk; d++) {
                        const float product = q.get(r, h, d) * k[i].get(j, kv, d);
                        x.s += (double)q.get(r, h, d) * k[i].get(j, kv, d), x.s32 += product;
                    }
                    for (uint32_t d = 0; d < c.dim_v; d++) {
                        const float product = d_out.get(r, h, d) * v[i].get(j, kv, d);
                        x.dp += (double)d_out.get(r, h, d) * v[i].get(j, kv, d), x.dp32 += product;
                    }
                    if (scores->value(0.0, r, h, j) == -INFINITY) continue;  // as a hidden one
                    x.s = scores->value(x.s * scale, r, h, j, &x.derivative), x.s32 = scores->value(x.s32 * scale, r, h, j, &x.derivative32);
                    x.grow = scores->kept(r, h, j) ? scores->grow() : 0;
                    x.dp *= x.grow, x.dp32 *= x.grow;
                    most = std::max(most, x.s);
                    pairs.push_back(x);
                }
        if (pairs.empty()) {
            if (used) lse.at(r, h) = -INFINITY, delta.at(r, h) = 0;
            return;
        }
        const float sink = scores->sink(r, h);
        most = std::max(most, (double)sink), sum = exp(sink - most);
        for (const Pair& x : pairs) sum += exp(x.s - most);
        const double exact_lse = most + log(sum);
        lse.at(r, h) = (float)exact_lse;
        double exact_delta = 0, delta_terms = 0;
        float rounded_delta = 0;
        for (uint32_t d = 0; d < c.dim_v; d++) {
            double o = 0;
            for (const Pair& x : pairs) o += exp(x.s - exact_lse) * x.grow * v[x.step].get(x.key, kv, d);
            exact_delta += o * d_out.get(r, h, d);
            delta_terms += fabs(o * d_out.get(r, h, d));
            rounded_delta += widened(rounded<T>((float)o)) * d_out.get(r, h, d);
        }
        delta.at(r, h) = rounded_delta;
        for (const Pair& x : pairs) {
            const double weight = exp(x.s - exact_lse), p = weight * x.grow, slant = weight * (x.dp - exact_delta), ds = slant * x.derivative;
            const double slant_terms = weight * (fabs(x.dp) + delta_terms), ds_terms = slant_terms * fabs(scale * x.derivative);
            const float p32 = expf(x.s32 - lse.at(r, h)), p_rounded = widened(rounded<T>(p32 * x.grow));
            const float slant32 = p32 * (x.dp32 - rounded_delta), ds32 = widened(rounded<T>(slant32 * x.derivative32));
            auto add = [](Expected& e, size_t at, double oracle, double terms, float plain) {
                e.oracle[at] += oracle, e.terms[at] += terms, e.plain[at] += plain;
            };
            if (c.score.bias != NO_BIAS) {
                const uint32_t head = c.score.bias == BIAS ? h : 0;
                add(d_bias, ((size_t)head * c.q_rows + r) * scores->biases.dim + scores->column(r, x.key), slant, slant_terms, slant32);
            }
            for (uint32_t d = 0; d < c.dim_qk; d++) {
                const float key = k[x.step].get(x.key, kv, d), query = q.get(r, h, d);
                add(dq, ((size_t)h * c.q_rows + r) * c.dim_qk + d, ds * key * scale, ds_terms * fabs(key), ds32 * key);
                add(dk[x.step], ((size_t)kv * c.steps[x.step].k_rows + x.key) * c.dim_qk + d, ds * query * scale, ds_terms * fabs(query), ds32 * query);
            }
            for (uint32_t d = 0; d < c.dim_v; d++) {
                const float g = d_out.get(r, h, d);
                add(dv[x.step], ((size_t)kv * c.steps[x.step].k_rows + x.key) * c.dim_v + d, p * g, p * fabs(g), p_rounded * g);
            }
        }
    }
};

// Gradients before and after: what is in the buffers at first is kept where nothing is added, bit by bit.
struct Gradient {
    Tensor<float> now;
    std::vector<float> before;
    Gradient(const char* name, uint32_t rows, uint32_t heads, uint32_t dim, const Case& c, Random& random, bool tight = false)
        : now(name, rows, heads, dim, tight ? TIGHT : c.layout == GAPS ? GAPS : DENSE) {
        if (!tight && (c.layout == SBHD || c.layout == BHSD)) now = Tensor<float>(name, rows, heads, dim, c.layout, c.rows_per_batch);
        for (uint32_t h = 0; h < heads; h++)
            for (uint32_t r = 0; r < rows; r++)
                for (uint32_t d = 0; d < dim; d++) before.push_back(now.at(r, h, d) = random.value() / 64);
    }
    template <class T, class E>
    std::string wrong(const E& expected, double& worst) {
        if (!now.gaps_untouched()) return "something between the elements was written";
        Contract contract(3, epsilon<T>());
        double worst_element = 0;
        size_t i = 0;
        for (uint32_t h = 0; h < now.heads; h++) {
            for (uint32_t r = 0; r < now.rows; r++) {
                for (uint32_t d = 0; d < now.dim; d++, i++) {
                    const float got = now.get(r, h, d);
                    if (expected.terms[i] == 0 && got != before[i])
                        return "row " + std::to_string(r) + " gets nothing, but was changed by " + std::to_string(got - before[i]);
                    // P, dS and the O of delta are each rounded once, by at most half an ε of what they are (fp16 below 2^-14: by 2^-25). Any pair
                    // too many or too few exceeds that in some element.
                    const double allowed = 1.02 * epsilon<T>() * expected.terms[i] + (std::is_same<T, f16_t>::value ? 1e-5 : 1e-7);
                    const double ratio = fabs((double)got - before[i] - expected.oracle[i]) / allowed;
                    if (!(ratio <= worst_element)) worst_element = ratio;
                    contract.element(widened(rounded<T>(got - before[i])), widened(rounded<T>(expected.plain[i])), expected.oracle[i], expected.terms[i]);
                }
                contract.end_row();
            }
            contract.end_head();
        }
        if (!(contract.worst <= worst)) worst = contract.worst;
        if (!(worst_element <= 1)) return "the error of an element is " + std::to_string(worst_element) + " times what is allowed";
        worst = std::max(worst, worst_element);
        return contract.worst <= 1 ? "" : "error is " + std::to_string(contract.worst) + " times what is allowed";
    }
    uint64_t hash() {
        uint64_t x = 0;
        for (uint32_t r = 0; r < now.rows; r++)
            for (uint32_t h = 0; h < now.heads; h++)
                for (uint32_t d = 0; d < now.dim; d++) x = (x ^ __float_as_uint(now.at(r, h, d))) * 0x100000001b3ull, x ^= x >> 29;
        return x;
    }
};

// Runs all steps of a problem; `hash` becomes one of all result bits.
template <class T>
std::string run(const Problem<T>& problem, int small, bool deterministic, softgpu::Options options, uint64_t& hash) {
    const Case& c = problem.c;
    const Shape* shape = SHAPES[c.score.on ? 2 : small];
    while (c.dim_qk > shape->dqk || c.dim_v > shape->dv) shape++;
    Random random(std::hash<std::string>()(c.name) + small);
    Gradient dq("dq", c.q_rows, c.heads, c.dim_qk, c, random);
    const bool biased = c.score.bias != NO_BIAS && c.score.bias != BIAS_OF_ALL;
    const Scores& scores = *problem.scores;
    Gradient d_bias("d_bias", biased ? c.q_rows : 0, biased ? scores.bias_heads(c.heads) : 1, scores.biases.dim, c, random, true);
    std::vector<Gradient> dk, dv;
    for (size_t i = 0; i < c.steps.size(); i++) {
        const Step& step = c.steps[i];
        dk.emplace_back("dk", step.k_rows, c.kv_heads, c.dim_qk, c, random);
        dv.emplace_back("dv", step.k_rows, c.kv_heads, c.dim_v, c, random);
        Lists lists = make_lists(random, step.slices, step.k_rows, shape->k_rows, true, c.cut, shape->q_rows);
        std::reverse(lists.tiles.begin(), lists.tiles.end());  // any order
        // A tile's adds to a query tile come after those of the tiles before it.
        std::vector<uint32_t> turns, adds((c.q_rows + shape->q_rows - 1) / shape->q_rows);
        for (const cp_tile& tile : lists.tiles)
            for (uint32_t n = tile.part; n < tile.part + tile.parts; n++) {
                cp_part& part = lists.parts[n];
                part.turn = (uint32_t)turns.size();
                for (uint32_t t = part.begin / shape->q_rows; t * shape->q_rows < part.end; t++) turns.push_back(adds[t]++);
            }
        Table<cp_tile> tiles("tiles", lists.tiles);
        Table<cp_part> parts("parts", lists.parts);
        Table<cp_slice> table("slices", lists.slices);
        Table<uint32_t> q_bits("q_used", bitmap(used_queries(step.slices, c.q_rows))), k_bits("k_used", bitmap(used_keys(step.slices, step.k_rows)));
        Table<uint32_t> turn_table("turns", turns), counters("counters", std::vector<uint32_t>(adds.size() * c.heads));
        Table<uint32_t> bias_counters("bias_counters", std::vector<uint32_t>(turns.size()));
        cp_attention_params p{};
        p.q = problem.q.view, p.k = problem.k[i].view, p.v = problem.v[i].view, p.d_out = problem.d_out.view;
        p.lse = problem.lse.view, p.delta = problem.delta.view;
        p.dq = dq.now.view, p.dk = dk[i].now.view, p.dv = dv[i].now.view;
        p.tiles = tiles.address(), p.parts = parts.address(), p.slices = table.address();
        if (c.bitmaps) p.q_used = q_bits.address(), p.k_used = k_bits.address();
        if (deterministic) p.turns = turn_table.address(), p.counters = counters.address(), p.flags = CP_DETERMINISTIC;
        p.tile_count = (uint32_t)lists.tiles.size(), p.heads = c.heads, p.kv_heads = c.kv_heads;
        p.q_first = c.q_first, p.head_group = c.group, p.kv_first = c.kv_first;
        p.dim_qk = c.dim_qk, p.dim_v = c.dim_v;
        p.scale = problem.scale, p.scale_log2 = problem.scale * 1.44269504f;
        Table<uint32_t> positions("positions", problem.scores->keys(step.k_rows));
        if (c.score.on) problem.scores->fill(p, positions.address());
        if (biased) p.d_bias = d_bias.now.view;
        const bool queued = deterministic && biased && c.score.bias != BIAS;
        if (biased && c.score.bias != BIAS) p.d_bias.stride_head = 0;
        if (queued) p.bias_counters = bias_counters.address();
        const uint32_t blocks = c.blocks && !deterministic ? c.blocks : p.tile_count * c.kv_heads;
        softgpu::launch(std::is_same<T, bf16_t>::value ? shape->bf16 : shape->f16, blocks, shape->threads, shape->shared, options, p);
        if (deterministic)
            for (uint32_t t = 0; t < adds.size(); t++)
                for (uint32_t h = 0; h < c.heads; h++)
                    if (((uint32_t*)counters.bytes.get())[t * c.heads + h] != adds[t]) return "not every turn was taken";
        for (uint32_t t = 0; queued && t < turns.size(); t++)
            if (((uint32_t*)bias_counters.bytes.get())[t] != c.heads) return "not every head added to the gradient of the bias";
    }
    double worst = 0;
    std::string wrong = dq.template wrong<T>(problem.dq, worst);
    if (!wrong.empty()) return "dq: " + wrong;
    hash = dq.hash();
    if (biased) {
        wrong = d_bias.template wrong<T>(problem.d_bias, worst);
        if (!wrong.empty()) return "d_bias: " + wrong;
        hash = hash * 31 + d_bias.hash();
    }
    for (size_t i = 0; i < c.steps.size(); i++) {
        wrong = dk[i].template wrong<T>(problem.dk[i], worst);
        if (!wrong.empty()) return "dk: " + wrong;
        wrong = dv[i].template wrong<T>(problem.dv[i], worst);
        if (!wrong.empty()) return "dv: " + wrong;
        hash = hash * 31 + dk[i].hash() * 17 + dv[i].hash();
    }
    if (getenv("VERBOSE")) printf("%-40s %.3f of the allowed error\n", c.name.c_str(), worst);
    return "";
}

template <class T>
std::string run(const Case& c, bool small) {
    const Problem<T> problem(c);
    uint64_t hash;
    return run<T>(problem, small, false, softgpu::Options(), hash);
}

// The same bits whatever the order of blocks and warps.
template <class T>
std::string deterministic(const Case& c, bool small) {
    const Problem<T> problem(c);
    uint64_t first = 0;
    for (int i = 0; i < 3; i++) {
        softgpu::Options options;
        options.seed = 1000 + i;
        options.schedule = i == 0 ? softgpu::GREEDY : i == 1 ? softgpu::RANDOM : softgpu::REVERSED;
        options.resident = 1 + 2 * i;
        uint64_t hash;
        const std::string wrong = run<T>(problem, small, true, options, hash);
        if (!wrong.empty()) return wrong;
        if (i == 0) first = hash;
        if (hash != first) return "other bits in another order";
    }
    return "";
}

static std::vector<Case> cases() {
    std::vector<Case> list;
    auto add = [&](Case c) -> Case& {
        list.push_back(c);
        return list.back();
    };
    const int64_t FAR = 1ll << 40;
    for (auto dims : {std::pair<uint32_t, uint32_t>{8, 8}, {40, 40}, {64, 64}, {72, 72}, {96, 96}, {128, 128}, {192, 128}, {256, 256}, {128, 64}, {200, 136}}) {
        const std::string d = "dims_" + std::to_string(dims.first) + "_" + std::to_string(dims.second);
        Case& c = add({d + "_full", 150, {{170, {full(0, 150, 0, 170)}}}});
        c.dim_qk = dims.first, c.dim_v = dims.second;
        Case& e = add({d + "_causal", 200, {{200, {causal(0, 200, 0, 200)}}}});
        e.dim_qk = dims.first, e.dim_v = dims.second, e.heads = 2, e.kv_heads = 1, e.group = 2;
    }
    for (uint32_t n : {1u, 17u, 64u, 129u, 257u}) {
        const std::string s = "length_" + std::to_string(n);
        add({s + "_full", n, {{n, {full(0, n, 0, n)}}}}).bitmaps = false;
        add({s + "_causal", n, {{n, {causal(0, n, 0, n)}}}});
        add({s + "_window", n, {{n, {band(0, n, 0, n, -20, 3)}}}}).cut = true;
        add({s + "_cross", n, {{300, {full(0, n, 0, 300)}}}});
        add({s + "_cut", n, {{n, {causal(0, n, 0, n)}}}}).cut = true;
    }
    add({"bottom_right", 100, {{260, {band(0, 100, 0, 260, -FAR, 160)}}}});
    add({"first_rows_blind", 200, {{90, {band(0, 200, 0, 90, -FAR, -110)}}}});
    add({"window_far", 300, {{300, {band(0, 300, 0, 300, -130, -70)}}}});
    {  // documents of 1 … 21 rows with padding between, in one tile and over its edge
        std::vector<cp_slice> documents, crossed;
        uint32_t at = 3;
        for (uint32_t n : {14u, 1u, 21u, 9u, 14u, 14u, 7u, 2u, 19u, 14u, 5u, 12u}) {
            documents.push_back(causal(at, n, at, n));
            crossed.push_back(full(at, n, 200 - at - n, n));
            at += n + (n % 3 == 0 ? 4 : 0);
        }
        add({"documents", at + 6, {{at + 6, documents}}});
        add({"documents_gaps", at + 6, {{at + 6, documents}}}).layout = GAPS;
        add({"documents_cut", at + 6, {{at + 6, documents}}}).cut = true;
        add({"documents_crossed", at + 6, {{200, crossed}}}).dim_v = 40;
        Case& c = add({"documents_steps", at + 6, {{at + 6, documents}, {200, crossed}}});
        c.dim_qk = c.dim_v = 128;
    }
    {  // zigzag: two segments of queries, both see the first keys; a query row twice in a tile: two parts
        Case& c = add({"two_segments", 140, {{140, {causal(0, 70, 0, 70), full(70, 70, 0, 70), causal(70, 70, 70, 70)}}}});
        c.dim_qk = c.dim_v = 128;
        add({"two_segments_cut", 140, {{140, {causal(0, 70, 0, 70), full(70, 70, 0, 70), causal(70, 70, 70, 70)}}}}).cut = true;
        add({"same_keys_twice", 140, {{300, {band(0, 140, 0, 300, -FAR, -90), band(0, 140, 0, 300, 100, FAR)}}}});
        Case& e = add({"two_parts", 140, {{100, {full(0, 140, 0, 20), full(0, 140, 30, 60), full(100, 40, 95, 3)}}}});
        e.dim_qk = e.dim_v = 96;
    }
    {
        Case& c = add({"heads_6_of_12", 100, {{100, {causal(0, 100, 0, 100)}}}});
        c.heads = 6, c.kv_heads = 3, c.group = 3, c.q_first = 4, c.kv_first = 1, c.blocks = 2;
        Case& e = add({"heads_grid", 300, {{300, {causal(0, 300, 0, 300)}}}});
        e.heads = 3, e.kv_heads = 3, e.blocks = 4;
    }
    for (Layout layout : {SBHD, BHSD}) {
        const std::string s = layout == SBHD ? "sbhd" : "bhsd";
        Case& c = add({s + "_long", 300, {{300, {causal(0, 150, 0, 150), causal(150, 150, 150, 150)}}}});
        c.layout = layout, c.rows_per_batch = 150, c.heads = 2, c.kv_heads = 2, c.dim_qk = c.dim_v = 96;
        Case& e = add({s + "_short", 63, {{63, {}}}});
        for (uint32_t b = 0; b < 9; b++) e.steps[0].slices.push_back(causal(7 * b, 7, 7 * b, 7));
        e.layout = layout, e.rows_per_batch = 7;
        Case& g = add({s + "_single", 20, {{20, {}}}});
        for (uint32_t b = 0; b < 20; b++) g.steps[0].slices.push_back(full(b, 1, b, 1));
        g.layout = layout, g.rows_per_batch = 1;
    }
    for (auto dims : {std::pair<uint32_t, uint32_t>{64, 64}, {40, 40}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {  // one rank of a ring
        Case& c = add({"steps_" + std::to_string(dims.first), 160,
                       {{160, {causal(0, 80, 0, 80), full(80, 80, 0, 80), causal(80, 80, 80, 80)}}, {80, {full(80, 80, 0, 80)}}, {90, {band(60, 100, 0, 90, -30, -3)}}}});
        c.dim_qk = dims.first, c.dim_v = dims.second, c.heads = 2, c.kv_heads = 1, c.group = 2;
        c.layout = dims.first == 96 ? GAPS : DENSE, c.cut = dims.first == 64;
    }
    for (uint32_t i = 0; i < 12; i++) {  // documents, masks, dimensions, heads and layouts at random
        Random random(1000 + i);
        const uint32_t dims[] = {16, 64, 72, 96, 128, 136, 192, 256};
        Case& c = add({"random_" + std::to_string(i), 1 + random.below(260), {}});
        c.dim_qk = dims[random.below(8)], c.dim_v = std::min(dims[random.below(8)], c.dim_qk == 192 ? 128u : 256u);
        c.kv_heads = 1 + random.below(2), c.group = 1 + random.below(2), c.heads = c.kv_heads * c.group;
        c.layout = (Layout)random.below(4), c.rows_per_batch = 1 + random.below(90), c.cut = random.below(2);
        for (uint32_t steps = 1 + random.below(2); steps > 0; steps--) {
            Step step{1 + random.below(300), {}};
            for (uint32_t q = random.below(9), k = random.below(9); q < c.q_rows && k < step.k_rows;) {
                const uint32_t q_len = 1 + random.below(std::min(90u, c.q_rows - q)), k_len = 1 + random.below(std::min(120u, step.k_rows - k));
                const int64_t lo = random.below(2) ? -FAR : (int64_t)random.below(40) - 30, hi = random.below(2) ? FAR : lo < -30 ? 5 : lo + random.below(60);
                step.slices.push_back(band(q, q_len, k, k_len, lo, hi));
                q += q_len + random.below(5) / 3, k += k_len + random.below(5) / 3;
            }
            c.steps.push_back(step);
        }
    }
    for (auto dims : {std::pair<uint32_t, uint32_t>{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {
        Case c{"score_" + std::to_string(dims.first), 150,
               {{150, {causal(0, 75, 0, 75), full(75, 75, 0, 75), causal(75, 75, 75, 75)}}, {75, {full(75, 75, 0, 75)}}, {90, {band(60, 90, 0, 90, -30, -3)}}}};
        c.dim_qk = dims.first, c.dim_v = dims.second, c.heads = 2, c.kv_heads = 1, c.group = 2, c.q_first = 2, c.kv_first = 1;
        c.score.on = true;
        c.cut = dims.first == 64, c.layout = dims.first == 96 ? GAPS : DENSE;
        auto with = [&](const char* name, auto set) {
            Case& e = add(c);
            e.name += name;
            set(e.score);
        };
        with("", [](Features&) {});
        with("_softcap", [](Features& f) { f.softcap = 2, f.sinks = true; });
        with("_alibi", [](Features& f) { f.alibi = true, f.q_start = 40, f.k_start = 3, f.boundary = 60, f.diagonal = -17; });
        with("_dropout", [](Features& f) { f.dropout = 0.3f, f.k_start = 2, f.seed_at = true; });
        with("_bias", [](Features& f) { f.bias = BIAS, f.softcap = 2, f.k_start = 2, f.boundary = 60; });
        with("_bias_of_heads", [](Features& f) { f.bias = BIAS_OF_HEADS, f.padding = 3, f.k_step = 3; });
        with("_bias_of_all", [](Features& f) { f.bias = BIAS_OF_ALL, f.sinks = true; });
        with("_everything", [](Features& f) { f.softcap = 3, f.alibi = f.sinks = true, f.dropout = 0.2f, f.k_start = 7, f.q_step = 2, f.k_step = 3, f.boundary = 80, f.head_offset = 8, f.bias = BIAS, f.padding = 5; });
        // Key heads of several blocks add to one gradient.
        Case& many = add(c);
        many.name += "_bias_queue", many.heads = 6, many.kv_heads = 3, many.score.bias = BIAS_OF_HEADS, many.score.dropout = 0.3f;
    }
    {
        Features all;
        all.on = all.alibi = all.sinks = true, all.softcap = 4, all.dropout = 0.25f, all.k_start = 1;
        Case blind{"score_blind", 200, {{90, {band(0, 200, 0, 90, -FAR, -110)}}}};
        blind.score = all;
        add(blind);
        Case padded{"score_documents", 100, {{100, {causal(3, 20, 3, 20), causal(30, 1, 30, 1), causal(35, 60, 35, 60)}}}};
        padded.score = all, padded.layout = BHSD, padded.rows_per_batch = 50, padded.dim_v = 40;
        add(padded);
        padded.name = "score_documents_bias", padded.score.bias = BIAS_OF_HEADS, padded.score.boundary = 32, padded.score.padding = 1;
        add(padded);
        Case entries{"score_entries_bias", 120, {{120, {causal(0, 40, 0, 40), causal(40, 40, 40, 40), causal(80, 40, 80, 40)}}}};
        entries.score.on = true, entries.score.bias = BIAS_OF_ENTRIES, entries.score.rows_per_batch = 40;
        entries.layout = SBHD, entries.rows_per_batch = 40, entries.heads = entries.kv_heads = 2;
        add(entries);
        Case negative{"score_scale_negative", 100, {{100, {causal(0, 100, 0, 100)}}}};
        negative.score = all, negative.scale = -0.3f, negative.bitmaps = false;
        add(negative);
        Case large{"score_softcap_large", 100, {{100, {causal(0, 100, 0, 100)}}}};
        large.score.on = true, large.score.softcap = 30, large.scale = 2;
        add(large);
    }
    add({"blind", 100, {{50, {full(60, 30, 0, 50)}}, {50, {full(10, 70, 0, 50)}}}});
    add({"nothing", 40, {{10, {}}}});
    add({"scale_negative", 100, {{100, {causal(0, 100, 0, 100)}}}}).scale = -0.3f;
    add({"scale_large", 100, {{100, {causal(0, 100, 0, 100)}}}}).scale = 4.0f;
    // Scores so low that 2^−lse overflows: what a key that is not there adds must not be 0·∞.
    add({"scores_low", 300, {{3, {full(0, 300, 0, 3)}}}}).scale = 8.0f;
    add({"scores_low_masked", 100, {{100, {band(0, 100, 0, 100, -1, 1)}}}}).scale = 8.0f;
    return list;
}

int main(int argc, char** argv) {
    Tally tally(argc, argv);
    tally.run("philox", philox_is_right);
    const std::vector<std::string> ordered = {"length_257_cut", "documents_cut", "two_parts", "heads_6_of_12", "heads_grid", "steps_64", "steps_128", "random_3", "random_8", "score_64_everything", "score_64_bias_queue", "score_128_bias_queue"};
    for (const Case& c : cases())
        for (bool small : {false, true}) {
            if (c.score.on && small) continue;  // there is one set
            const std::string suffix = c.name + (small ? "_small" : "");
            tally.run("bf16_" + suffix, [&] { return run<bf16_t>(c, small); });
            tally.run("f16_" + suffix, [&] { return run<f16_t>(c, small); });
            if (std::find(ordered.begin(), ordered.end(), c.name) != ordered.end())
                tally.run("deterministic_" + suffix, [&] { return deterministic<bf16_t>(c, small); });
        }
    return tally.report("backward kernels");
}

// The forward kernels on the software GPU against float64. ./kernel_forward [part of a name]
#include "kernel_score.h"

#include "../../kernels/forward_bf16.cu"
#include "../../kernels/forward_bf16_score.cu"
#include "../../kernels/forward_f16.cu"
#include "../../kernels/forward_f16_score.cu"

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
    float scale = 0;         // 0: 1/sqrt(dim_qk)
    bool cut = false;        // tiles and parts of odd sizes
    bool bitmaps = true;     // else every row is used
    bool finish_apart = false;  // the last launch has nothing to see: it only normalises
    uint32_t blocks = 0;     // of the grid; 0: one per piece of work
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
    uint32_t dqk, dv, q_rows, k_rows, warps;
    Kernel bf16, f16;
};
#define SHAPE(dqk, dv, q_rows, k_rows, warps) {dqk, dv, q_rows, k_rows, warps, cp_forward_bf16_##dqk, cp_forward_f16_##dqk},
#define SHAPE_SCORE(dqk, dv, q_rows, k_rows, warps) {dqk, dv, q_rows, k_rows, warps, cp_forward_bf16_##dqk##_score, cp_forward_f16_##dqk##_score},
static const Shape SHAPES[2][5] = {{CP_FORWARD_SHAPES(SHAPE)}, {CP_FORWARD_SHAPES_SCORE(SHAPE_SCORE)}};

template <class T>
std::string run(const Case& c) {
    const Shape* shape = SHAPES[c.score.on];
    while (c.dim_qk > shape->dqk || c.dim_v > shape->dv) shape++;
    Random random(std::hash<std::string>()(c.name));
    const float scale = c.scale != 0 ? c.scale : 1.0f / sqrtf((float)c.dim_qk);

    // A query row is used if some step has it; a key row if its step has it.
    std::vector<bool> q_used(c.q_rows);
    for (const Step& s : c.steps) {
        const std::vector<bool> used = used_queries(s.slices, c.q_rows);
        for (uint32_t r = 0; r < c.q_rows; r++) q_used[r] = q_used[r] || used[r] || !c.bitmaps;
    }
    Tensor<T> q("q", c.q_rows, c.heads, c.dim_qk, c.layout, c.rows_per_batch);
    q.fill(random, &q_used);
    std::vector<Tensor<T>> k, v;
    for (const Step& s : c.steps) {
        const std::vector<bool> used = used_keys(s.slices, s.k_rows);
        k.emplace_back("k", s.k_rows, c.kv_heads, c.dim_qk, c.layout, c.rows_per_batch);
        v.emplace_back("v", s.k_rows, c.kv_heads, c.dim_v, c.layout, c.rows_per_batch);
        k.back().fill(random, c.bitmaps ? &used : nullptr);
        v.back().fill(random, c.bitmaps ? &used : nullptr);
    }
    Tensor<T> out("out", c.q_rows, c.heads, c.dim_v, c.layout, c.rows_per_batch);
    Tensor<float> lse("lse", c.q_rows, c.heads, 1, c.layout, c.rows_per_batch);
    Tensor<float> top("top", c.q_rows, c.heads, 1, c.layout, c.rows_per_batch);
    Scores scores(c.score, c.q_rows, c.heads, c.q_first, q_used);
    make_bias<T>(scores, c);
    Tensor<float> acc_out("acc_out", c.q_rows, c.heads, c.dim_v, c.layout == GAPS ? GAPS : DENSE);
    Tensor<float> acc_max("acc_max", c.q_rows, c.heads, 1), acc_sum("acc_sum", c.q_rows, c.heads, 1);

    const size_t launches = c.steps.size() + c.finish_apart;
    for (size_t i = 0; i < launches; i++) {
        const std::vector<cp_slice> none;
        const std::vector<cp_slice>& slices = i < c.steps.size() ? c.steps[i].slices : none;
        const uint32_t k_rows = i < c.steps.size() ? c.steps[i].k_rows : 1;
        Lists lists = make_lists(random, slices, c.q_rows, shape->q_rows, false, c.cut);
        std::reverse(lists.tiles.begin(), lists.tiles.end());  // any order
        Table<cp_tile> tiles("tiles", lists.tiles);
        Table<cp_part> parts("parts", lists.parts);
        Table<cp_slice> table("slices", lists.slices);
        Table<uint32_t> q_bits("q_used", bitmap(used_queries(slices, c.q_rows))), k_bits("k_used", bitmap(used_keys(slices, k_rows)));
        cp_attention_params p{};
        p.q = q.view;
        if (i < c.steps.size()) p.k = k[i].view, p.v = v[i].view;
        p.tiles = tiles.address(), p.parts = parts.address(), p.slices = table.address();
        if (c.bitmaps) p.q_used = q_bits.address(), p.k_used = k_bits.address();
        p.tile_count = (uint32_t)lists.tiles.size(), p.heads = c.heads, p.kv_heads = c.kv_heads;
        p.q_first = c.q_first, p.head_group = c.group, p.kv_first = c.kv_first;
        p.dim_qk = c.dim_qk, p.dim_v = c.dim_v;
        p.flags = (i == 0 ? CP_FIRST : 0) | (i + 1 == launches ? CP_LAST : 0);
        if (launches > 1) p.acc_out = acc_out.view, p.acc_max = acc_max.view, p.acc_sum = acc_sum.view;
        if (p.flags & CP_LAST) p.out = out.view, p.lse = lse.view;
        p.scale = scale, p.scale_log2 = scale * 1.44269504f;
        Table<uint32_t> positions("positions", scores.keys(k_rows));
        if (c.score.on) scores.fill(p, positions.address());
        if (c.score.top) p.flags |= CP_LARGEST;
        if (c.score.top && p.flags & CP_LAST) p.top = top.view;
        softgpu::launch(std::is_same<T, bf16_t>::value ? shape->bf16 : shape->f16, c.blocks ? c.blocks : p.tile_count * c.heads, shape->warps * 32,
                        CP_FORWARD_SHARED(shape->dqk, shape->dv, shape->q_rows, shape->k_rows), p);
    }

    if (!out.gaps_untouched() || !lse.gaps_untouched() || !acc_out.gaps_untouched() || !top.gaps_untouched()) return "something between the elements was written";
    Contract contract(2, epsilon<T>());
    double lse_worst = 0;
    for (uint32_t h = 0; h < c.heads; h++) {
        const uint32_t kv = (c.q_first + h) / c.group - c.kv_first;
        for (uint32_t r = 0; r < c.q_rows; r++) {
            struct Pair {
                size_t step;
                uint32_t key;
                double s;
                float s32;
                bool kept;
            };
            std::vector<Pair> pairs;
            double most = -INFINITY;
            float most32 = -INFINITY;
            for (size_t i = 0; i < c.steps.size(); i++)
                for (uint32_t j = 0; j < c.steps[i].k_rows; j++)
                    if (sees(c.steps[i].slices, r, j)) {
                        double s = 0;
                        float s32 = 0;
                        for (uint32_t d = 0; d < c.dim_qk; d++) {
                            s += (double)q.get(r, h, d) * k[i].get(j, kv, d);
                            s32 += q.get(r, h, d) * k[i].get(j, kv, d);
                        }
                        if (scores.value(0.0, r, h, j) == -INFINITY) continue;  // as a hidden one
                        pairs.push_back({i, j, scores.value(s * scale, r, h, j), scores.value(s32 * scale, r, h, j), scores.kept(r, h, j)});
                        most = std::max(most, pairs.back().s), most32 = std::max(most32, pairs.back().s32);
                    }
            if (c.score.top && !(pairs.empty() ? top.get(r, h) == -INFINITY : fabs(top.get(r, h) - most) <= 2e-6 * std::max(1.0, fabs(most))))
                return "the largest score of row " + std::to_string(r) + " is " + std::to_string(top.get(r, h)) + " instead of " + std::to_string(most);
            const float sink = scores.sink(r, h);
            if (pairs.empty()) {
                for (uint32_t d = 0; d < c.dim_v; d++)
                    if (out.get(r, h, d) != 0.0f) return "row " + std::to_string(r) + " sees nothing, but its output is " + std::to_string(out.get(r, h, d));
                if (sink == -INFINITY ? lse.get(r, h) != sink : !(fabs(lse.get(r, h) - sink) <= 1e-6)) return "row " + std::to_string(r) + " sees nothing, but its LSE is " + std::to_string(lse.get(r, h));
                continue;
            }
            most = std::max(most, (double)sink), most32 = std::max(most32, sink);
            double sum = exp(sink - most);
            float sum32 = expf(sink - most32);
            std::vector<double> o(c.dim_v), terms(c.dim_v);
            std::vector<float> plain(c.dim_v);
            for (const Pair& x : pairs) {
                const double w = exp(x.s - most);
                const float w32 = expf(x.s32 - most32), rounded_w = widened(rounded<T>(w32));
                sum += w, sum32 += w32;
                const float grow = x.kept ? scores.grow() : 0;
                for (uint32_t d = 0; d < c.dim_v; d++) {
                    const float value = v[x.step].get(x.key, kv, d) * grow;
                    o[d] += w * value, terms[d] += w * fabs(value), plain[d] += rounded_w * value;
                }
            }
            for (uint32_t d = 0; d < c.dim_v; d++)
                contract.element(out.get(r, h, d), widened(rounded<T>(plain[d] / sum32)), o[d] / sum, terms[d] / sum);
            contract.end_row();
            const double error = fabs(lse.get(r, h) - (most + log(sum)));
            if (!(error <= lse_worst)) lse_worst = error;
        }
        contract.end_head();
    }
    if (getenv("VERBOSE")) printf("%-40s %.3f of the allowed error, LSE %.1e\n", c.name.c_str(), contract.worst, lse_worst);
    if (!(contract.worst <= 1)) return "error is " + std::to_string(contract.worst) + " times what is allowed";
    if (!(lse_worst <= 1e-5)) return "error of the LSE is " + std::to_string(lse_worst);
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
    for (uint32_t n : {1u, 17u, 63u, 64u, 129u, 257u}) {
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
        c.finish_apart = true, c.dim_qk = c.dim_v = 128;
    }
    for (uint32_t gap : {31u, 32u, 63u, 64u}) {  // one row of the keys that no one may read
        add({"gap_at_" + std::to_string(gap), 100, {{140, {full(0, 50, 0, gap), full(50, 50, gap + 1, 139 - gap)}}}}).dim_v = 40;
        Case& c = add({"gap_wide_at_" + std::to_string(gap), 100, {{140, {full(0, 50, 0, gap), full(50, 50, gap + 1, 139 - gap)}}}});
        c.dim_qk = c.dim_v = 128;
    }
    {  // zigzag: two segments of queries, both see the first keys: two parts in a tile
        Case& c = add({"two_parts", 140, {{140, {causal(0, 70, 0, 70), full(70, 70, 0, 70), causal(70, 70, 70, 70)}}}});
        c.dim_qk = c.dim_v = 128;
        add({"two_parts_cut", 140, {{140, {causal(0, 70, 0, 70), full(70, 70, 0, 70), causal(70, 70, 70, 70)}}}}).cut = true;
        add({"same_keys_twice", 140, {{300, {band(0, 140, 0, 300, -FAR, -90), band(0, 140, 0, 300, 100, FAR)}}}});
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
    add({"blind_first", 100, {{50, {full(60, 30, 0, 50)}}, {50, {full(10, 70, 0, 50)}}}});
    add({"nothing", 40, {{10, {}}}});
    add({"nothing_steps", 40, {{10, {}}, {10, {}}}}).finish_apart = true;
    for (auto dims : {std::pair<uint32_t, uint32_t>{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {
        Case c{"score_" + std::to_string(dims.first), 150,
               {{150, {causal(0, 75, 0, 75), full(75, 75, 0, 75), causal(75, 75, 75, 75)}}, {75, {full(75, 75, 0, 75)}}, {90, {band(60, 90, 0, 90, -30, -3)}}}};
        c.dim_qk = dims.first, c.dim_v = dims.second, c.heads = 2, c.kv_heads = 1, c.group = 2, c.q_first = 2, c.kv_first = 1;
        c.score.on = true;
        c.cut = dims.first == 64, c.layout = dims.first == 96 ? GAPS : DENSE, c.finish_apart = dims.first == 128;
        auto with = [&](const char* name, auto set) {
            Case& e = add(c);
            e.name += name;
            set(e.score);
        };
        with("", [](Features&) {});
        with("_softcap", [](Features& f) { f.softcap = 2; });
        with("_alibi", [](Features& f) { f.alibi = true, f.q_start = 40, f.k_start = 3, f.boundary = 60; });
        with("_alibi_striped", [](Features& f) { f.alibi = true, f.q_step = 3, f.k_step = 5, f.diagonal = -17; });
        with("_sinks", [](Features& f) { f.sinks = true; });
        with("_top", [](Features& f) { f.top = true; });
        with("_bias", [](Features& f) { f.bias = BIAS, f.k_start = 2, f.boundary = 60; });
        with("_bias_of_heads", [](Features& f) { f.bias = BIAS_OF_HEADS, f.padding = 3, f.k_step = 3; });
        with("_bias_of_all", [](Features& f) { f.bias = BIAS_OF_ALL, f.top = f.sinks = true; });
        with("_dropout", [](Features& f) { f.dropout = 0.3f, f.k_start = 2, f.seed_at = true; });
        with("_dropout_striped", [](Features& f) { f.dropout = 0.6f, f.q_start = 9, f.q_step = 2, f.k_start = 1, f.k_step = 3, f.boundary = 100, f.head_offset = 8; });
        with("_everything", [](Features& f) { f.softcap = 3, f.alibi = f.sinks = f.top = true, f.dropout = 0.2f, f.k_start = 7, f.boundary = 80, f.bias = BIAS, f.padding = 5; });
    }
    {
        Features all;
        all.on = all.alibi = all.sinks = all.top = true, all.softcap = 4, all.dropout = 0.25f, all.k_start = 1;
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
        entries.layout = SBHD, entries.rows_per_batch = 40;
        add(entries);
        Case negative{"score_scale_negative", 100, {{100, {causal(0, 100, 0, 100)}}}};
        negative.score = all, negative.scale = -0.3f, negative.bitmaps = false;
        add(negative);
        Case large{"score_softcap_large", 100, {{100, {causal(0, 100, 0, 100)}}}};  // scores of about ±50 on a cap of 30: both ends of tanh
        large.score.on = large.score.top = true, large.score.softcap = 30, large.scale = 2;
        add(large);
        Case nothing{"score_nothing", 40, {{10, {}}}};
        nothing.score = all, nothing.bitmaps = false;
        add(nothing);
    }
    add({"scale_negative", 100, {{100, {causal(0, 100, 0, 100)}}}}).scale = -0.3f;
    add({"scale_large", 100, {{100, {causal(0, 100, 0, 100)}}}}).scale = 0.5f;
    return list;
}

int main(int argc, char** argv) {
    Tally tally(argc, argv);
    tally.run("philox", philox_is_right);
    for (const Case& c : cases()) {
        tally.run("bf16_" + c.name, [&] { return run<bf16_t>(c); });
        tally.run("f16_" + c.name, [&] { return run<f16_t>(c); });
    }
    return tally.report("forward kernels");
}

// The C++ interface: ranks as threads compute what one rank does, forward and backward; errors carry status and text; handles are owned.
// Prints "N passed, N failed".
#include "context_parallel.hpp"

#include <cmath>
#include <cstdio>
#include <iterator>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>

namespace {

std::mutex mutex;
int passed = 0, failed = 0;

void expect(bool good, int line, const std::string &what) {
    std::lock_guard<std::mutex> lock(mutex);
    ++(good ? passed : failed);
    if (!good)
        std::printf("FAIL test_cpp.cpp:%d: %s\n", line, what.c_str());
}
#define EXPECT(condition) expect((condition), __LINE__, #condition)

template <class F> void throws(int line, cp::Status status, const char *words, F f) {
    try {
        f();
        expect(false, line, std::string("nothing was thrown; wanted: ") + words);
    } catch (const cp::Error &e) {
        expect(e.status() == status && std::string(e.what()).find(words) != std::string::npos, line,
               std::string(words) + ": got " + std::to_string(static_cast<int>(e.status())) + ": " + e.what());
    }
}
#define THROWS(status, words, ...) throws(__LINE__, cp::Status::status, words, [&] { __VA_ARGS__; })

const std::int64_t heads = 4, kv_heads = 2, dim = 16;

// Rows [tokens, width] of one sequence.
struct Rows {
    std::int64_t width;
    std::vector<float> x;

    Rows(std::size_t tokens, std::int64_t w) : width(w), x(tokens * static_cast<std::size_t>(w), NAN) {}

    static Rows wave(std::size_t tokens, std::int64_t w, int seed) {
        Rows r(tokens, w);
        for (std::size_t i = 0; i < r.x.size(); i++)
            r.x[i] = static_cast<float>(std::sin(0.7 * static_cast<double>(i) * (seed + 1) + seed));
        return r;
    }

    Rows pick(const std::vector<std::uint32_t> &tokens) const {
        Rows r(0, width);
        for (std::uint32_t t : tokens)
            r.x.insert(r.x.end(), x.begin() + t * width, x.begin() + (t + 1) * width);
        return r;
    }

    void put(const std::vector<std::uint32_t> &tokens, const Rows &from) {
        for (std::size_t i = 0; i < tokens.size(); i++)
            std::copy(from.x.begin() + static_cast<std::ptrdiff_t>(i) * width, from.x.begin() + static_cast<std::ptrdiff_t>(i + 1) * width,
                      x.begin() + tokens[i] * width);
    }

    // [1, tokens, heads, dim]
    cp::Tensor tensor(std::int64_t h) const {
        return cp::Tensor(x, {1, static_cast<std::int64_t>(x.size()) / width, h, width / h});
    }
};

struct All {
    Rows q, k, v, d_out, out, lse, dq, dk, dv;

    explicit All(std::size_t n)
        : q(n, heads * dim), k(n, kv_heads * dim), v(n, kv_heads * dim), d_out(n, heads * dim), out(n, heads * dim), lse(n, heads),
          dq(n, heads * dim), dk(n, kv_heads * dim), dv(n, kv_heads * dim) {}

    cp::ForwardTensors forward() const {
        // LSE is [batch, heads, seq]; kept here as rows of heads.
        cp::Tensor l(lse.x.data(), cp::DType::f32, {1, heads, static_cast<std::int64_t>(lse.x.size()) / heads}, {0, 1, heads});
        return {q.tensor(heads), k.tensor(kv_heads), v.tensor(kv_heads), out.tensor(heads), l};
    }

    cp::BackwardTensors backward() const {
        cp::ForwardTensors f = forward();
        return {f.q, f.k, f.v, f.out, f.lse, d_out.tensor(heads), dq.tensor(heads), dk.tensor(kv_heads), dv.tensor(kv_heads)};
    }
};

cp::AttentionConfig small(bool save = false) {
    cp::AttentionConfig c;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim_qk = dim;
    c.causal = true;
    c.threads = 1;
    c.save = save;
    return c;
}

All inputs(std::size_t n) {
    All a(n);
    a.q = Rows::wave(n, heads * dim, 1);
    a.k = Rows::wave(n, kv_heads * dim, 2);
    a.v = Rows::wave(n, kv_heads * dim, 3);
    a.d_out = Rows::wave(n, heads * dim, 4);
    return a;
}

// One rank with the whole sequence.
All alone(std::size_t n) {
    All a = inputs(n);
    cp::Attention attention(small());
    cp::Context context;
    cp::Sequences s = cp::Sequences::dense(1, static_cast<std::uint32_t>(n));
    attention.forward(s, a.forward(), context);
    attention.backward(s, a.backward(), context);
    return a;
}

// A slice that is the causal half, under a mask that shows everything, is the causal mask.
void slices(std::size_t n) {
    All a = inputs(n), causal = alone(n);
    const auto length = static_cast<std::uint32_t>(n);
    cp::AttentionConfig full = small();
    full.causal = false;
    cp::Attention attention(full);
    cp::Context context;
    cp::Sequences s = cp::Sequences::dense(1, length).slices({{0, 0, length, 0, length, CP_SLICE_HI, 0, 0}});
    attention.forward(s, a.forward(), context);
    attention.backward(s, a.backward(), context);
    EXPECT(a.out.x == causal.out.x && a.dq.x == causal.dq.x && a.dk.x == causal.dk.x && a.dv.x == causal.dv.x);
    THROWS(invalid_argument, "slices[0]: got keys 0", attention.forward(s.slices({{0, 0, 1, 0, length + 1, 0, 0, 0}}), a.forward(), context));
}

template <class F> void on_ranks(std::uint32_t size, F body) {
    cp_unique_id id = cp::unique_id();
    std::vector<std::thread> threads;
    for (std::uint32_t r = 0; r < size; r++)
        threads.emplace_back([=] {
            try {
                body(cp::Group::from_id(r, size, id));
            } catch (const std::exception &e) {
                expect(false, __LINE__, std::string("rank ") + std::to_string(r) + ": " + e.what());
            }
        });
    for (auto &t : threads)
        t.join();
}

double worst(const std::vector<float> &a, const std::vector<float> &b) {
    double most = 0;
    for (std::size_t i = 0; i < a.size(); i++) {
        double d = std::fabs(static_cast<double>(a[i]) - b[i]);
        if (std::isnan(d))
            return INFINITY;
        most = d > most ? d : most;
    }
    return most;
}

double worst(const Rows &a, const Rows &b) {
    return worst(a.x, b.x);
}

// To whole sequences and back, with a tensor of fewer heads.
void trade_and_back(std::uint32_t size) {
    const std::size_t n = 19;
    const Rows x = Rows::wave(n, heads * dim, 1), b = Rows::wave(n, kv_heads * dim, 2);
    on_ranks(size, [&](cp::Group group) {
        cp::Sequences s = cp::Sequences::dense(1, static_cast<std::uint32_t>(n));
        auto mine = cp::partition_tokens(cp::Partition::striped, cp::Format::dense, s, size, group.rank());
        const Rows in[2] = {x.pick(mine), b.pick(mine)}, *all[2] = {&x, &b};
        Rows back[2] = {Rows(mine.size(), x.width), Rows(mine.size(), b.width)};
        std::vector<Rows> whole;
        std::vector<cp::Tensor> local_t, whole_t, back_t;
        const std::int64_t of[2] = {heads, kv_heads}, rows = static_cast<std::int64_t>(mine.size());
        std::pair<std::uint32_t, std::uint32_t> share[2];
        whole.reserve(2);
        for (int i = 0; i < 2; i++) {
            share[i] = cp::heads_of_rank(heads, static_cast<std::uint32_t>(of[i]), size, group.rank());
            whole.push_back(Rows(n, share[i].second * dim));
            local_t.push_back(cp::Tensor(in[i].x, {1, rows, of[i], dim}));
            back_t.push_back(cp::Tensor(back[i].x, {1, rows, of[i], dim}));
            whole_t.push_back(cp::Tensor(whole[static_cast<std::size_t>(i)].x, {1, static_cast<std::int64_t>(n), share[i].second, dim}));
        }
        cp::Trade trade(cp::Partition::striped);
        trade.to_heads(group, s, local_t, whole_t);
        trade.to_sequence(group, s, whole_t, back_t);
        bool same = true;
        for (std::size_t i = 0; i < 2; i++) {
            const std::size_t width = static_cast<std::size_t>(whole[i].width), first = share[i].first * static_cast<std::size_t>(dim);
            for (std::size_t t = 0; t < n; t++)
                for (std::size_t c = 0; c < width; c++)
                    same = same && whole[i].x[t * width + c] == all[i]->x[t * static_cast<std::size_t>(all[i]->width) + first + c];
        }
        EXPECT(same);
        EXPECT(back[0].x == in[0].x);
        EXPECT(size > kv_heads || back[1].x == in[1].x);
        EXPECT(size <= kv_heads || back[1].x != in[1].x); // heads that several ranks have are summed
        if (size == 1)
            THROWS(invalid_argument, "whole[1]", trade.to_heads(group, s, local_t, {whole_t[0]}));
    });
}

void equal_one_rank(std::uint32_t size, cp::CommType comm, bool save) {
    const std::size_t n = 37;
    All right = alone(n), got(n), in = inputs(n);
    on_ranks(size, [&](cp::Group group) {
        cp::Sequences s = cp::Sequences::dense(1, static_cast<std::uint32_t>(n));
        auto mine = cp::partition_tokens(cp::Partition::zigzag, cp::Format::dense, s, size, group.rank());
        All a(mine.size());
        a.q = in.q.pick(mine);
        a.k = in.k.pick(mine);
        a.v = in.v.pick(mine);
        a.d_out = in.d_out.pick(mine);
        cp::Attention attention(small(save));
        attention.set_group(group, comm);
        std::vector<unsigned char> workspace(attention.workspace_size(static_cast<std::uint32_t>(n)) + 64);
        void *at = workspace.data();
        std::size_t room = workspace.size();
        if (save)
            attention.use_workspace(std::align(64, room - 64, at, room), room);
        cp::Context context;
        attention.forward(s, a.forward(), context);
        cp::Context kept = std::move(context);
        attention.clear_group(); // backward remembers the group
        attention.backward(s, a.backward(), kept);
        EXPECT(group.size() == 1 || comm != cp::CommType::p2p || group.statistics().sent_bytes > 0);
        std::lock_guard<std::mutex> lock(mutex);
        got.out.put(mine, a.out);
        got.lse.put(mine, a.lse);
        got.dq.put(mine, a.dq);
        got.dk.put(mine, a.dk);
        got.dv.put(mine, a.dv);
    });
    EXPECT(worst(right.out, got.out) < 1e-5);
    EXPECT(worst(right.lse, got.lse) < 1e-5);
    EXPECT(worst(right.dq, got.dq) < 1e-5);
    EXPECT(worst(right.dk, got.dk) < 1e-5);
    EXPECT(worst(right.dv, got.dv) < 1e-5);
}

void groups() {
    static_assert(!std::is_copy_constructible<cp::Group>::value && std::is_nothrow_move_constructible<cp::Group>::value, "Group");
    static_assert(!std::is_copy_constructible<cp::Attention>::value && std::is_nothrow_move_assignable<cp::Attention>::value, "Attention");
    static_assert(!std::is_copy_constructible<cp::Context>::value, "Context: its buffer is aligned where it lies");
    on_ranks(3, [&](cp::Group group) {
        EXPECT(group.size() == 3);
        if (group.rank() > 0) {
            cp::Group pair = group.subset({2, 1});
            EXPECT(pair.size() == 2 && pair.rank() == 2 - group.rank());
            EXPECT((pair.global_ranks() == std::vector<std::uint32_t>{2, 1}));
            pair.barrier();
        } else {
            THROWS(invalid_argument, "does not name this rank", group.subset({1, 2}));
            THROWS(invalid_argument, "got none", group.subset({}));
        }
        group.barrier();
        cp::Group moved = std::move(group);
        moved.barrier();
        THROWS(invalid_handle, "group: got NULL", group.rank());
        moved = cp::Group(moved.subset({moved.rank()}));
        EXPECT(moved.size() == 1);
    });
}

struct Refused : std::runtime_error {
    Refused() : std::runtime_error("no allgather today") {}
};

void errors() {
    EXPECT(cp::version() == cp_version());
    EXPECT(cp::build_info().find("\"version\"") != std::string::npos);
    EXPECT(cp::padded_length(cp::Partition::zigzag, 2, 10) == 12);
    cp_mesh mesh{};
    mesh.struct_size = sizeof mesh;
    mesh.tp = mesh.cp = mesh.dp = mesh.pp = 2;
    EXPECT((cp::mesh_members(mesh, "dp-cp", 5) == std::vector<std::uint32_t>{1, 3, 5, 7}));
    THROWS(invalid_argument, "\"xp\" is no axis", cp::mesh_members(mesh, "xp", 5));
    EXPECT((cp::comm_types_per_layer("a2a allgather", 4)[3] == cp::CommType::all_gather));
    THROWS(invalid_argument, "got 2 names for 3 layers", cp::comm_types_per_layer("a2a p2p", 3));
    cp_schedule_config ranks{};
    ranks.ranks = 3, ranks.tokens_per_rank = 8;
    const auto schedule = cp::schedule_samples(ranks, {20, 3, 2});
    EXPECT(schedule.second == 1 && schedule.first[0].first_rank == 0 && schedule.first[0].rank_count == 3);
    THROWS(invalid_argument, "lengths[1]: got 0", cp::schedule_samples(ranks, {20, 0}));
    cp::AttentionConfig odd = small();
    odd.head_dim_qk = 12;
    THROWS(invalid_argument, "head_dim_qk: got 12", cp::Attention attention(odd));
    THROWS(invalid_argument, "head_dim_qk: got 12", cp::Attention::require_support(odd, cp::CommConfig(), 2));
    cp::CommConfig comm(cp::CommType::p2p);
    comm.stages = 9;
    THROWS(invalid_argument, "stages: got 9", cp::Attention::require_support(small(), comm, 2));
    comm = cp::CommType::a2a_p2p;
    comm.levels = {{2, 2}};
    cp::Attention::require_support(small(), comm, 4);
    THROWS(invalid_argument, "has 6 ranks", cp::Attention::require_support(small(), comm, 6));
    THROWS(invalid_argument, "RANK and WORLD_SIZE", cp::Group::from_environment());
    bool seen = false;
    try {
        cp::Group::from_allgather(0, 2, [](const void *, void *, std::size_t) { throw Refused(); });
    } catch (const Refused &) {
        seen = true;
    }
    EXPECT(seen);
    All a = inputs(8);
    cp::Attention attention(small());
    cp::Context context;
    THROWS(invalid_argument, "context: made by another layer", attention.backward(cp::Sequences::dense(1, 8), a.backward(), context));
    THROWS(invalid_argument, "q: got shape", attention.forward(cp::Sequences::dense(1, 9), a.forward(), context));
    THROWS(invalid_argument, "sequences.seq_q: got 0", attention.forward(cp::Sequences::dense(1, 0), a.forward(), context));
    cp::ForwardTensors none = a.forward();
    none.k = cp::Tensor();
    THROWS(invalid_argument, "k.dtype", attention.forward(cp::Sequences::dense(1, 8), none, context));
    THROWS(invalid_argument, "lengths: got 1 numbers, need 2", cp::Sequences::dense(2, 8).lengths(cp::Side::query, {3}));
    THROWS(invalid_argument, "strides: got 1 for 2", cp::Tensor(a.q.x.data(), cp::DType::f32, {2, 2}, {1}));
    THROWS(invalid_argument, "at most 4", cp::Tensor(a.q.x.data(), cp::DType::f32, {1, 1, 1, 1, 1}));
    THROWS(invalid_argument, "data: got 512 elements, the shape has 4", cp::Tensor(a.q.x, {2, 2}));
    EXPECT(attention.plan(cp::Sequences::dense(1, 8), cp::Pass::forward).size() > 10);
    EXPECT(attention.plan(cp::Sequences::dense(1, 8), cp::Pass::backward, cp::PlanFormat::json)[0] == '{');
    EXPECT(attention.report(cp::Sequences::dense(1, 8)).forward_flops > 0);
    EXPECT(attention.saved_size(cp::Sequences::dense(1, 8)) == 0);
    cp::Attention other(small());
    other = std::move(attention);
    other.forward(cp::Sequences::dense(1, 8), a.forward(), context);
}

// One rank is wrong: its own error there, a mismatch that names it elsewhere, and all goes on.
void disagreement() {
    on_ranks(2, [&](cp::Group group) {
        All a = inputs(4);
        cp::Attention attention(small());
        attention.set_group(group);
        cp::Context context;
        cp::Sequences s = cp::Sequences::dense(1, 8);
        cp::ForwardTensors t = a.forward();
        if (group.rank() == 1) {
            t.v = a.v.tensor(heads);
            THROWS(invalid_argument, "v: got shape", attention.forward(s, t, context));
        } else {
            THROWS(mismatch, "rank 1 refused cp_attention_forward: v: got shape", attention.forward(s, t, context));
        }
        attention.forward(s, a.forward(), context);
    });
}

// Packed documents and a caller's own partition.
void packed_and_list() {
    cp::AttentionConfig c = small();
    c.format = cp::Format::packed;
    c.partition = cp::Partition::list;
    cp::Attention attention(c);
    All a = inputs(9);
    auto flat = [](const Rows &r, std::int64_t h) {
        return cp::Tensor(r.x, {static_cast<std::int64_t>(r.x.size()) / r.width, h, r.width / h});
    };
    cp::Tensor lse(a.lse.x, {heads, 9});
    cp::Sequences s = cp::Sequences::packed({0, 4, 9});
    THROWS(invalid_argument, "sequences.list_q: got NULL", attention.report(s));
    s.list(cp::Side::query, {{cp_stretch{1, 0, 1, 5}, cp_stretch{0, 0, 1, 4}}});
    cp::Context context;
    attention.forward(s, {flat(a.q, heads), flat(a.k, kv_heads), flat(a.v, kv_heads), flat(a.out, heads), lse}, context);
    // Causal: the first row of a document sees itself alone. Rows 0 and 5 are such, by the list above.
    for (std::size_t i = 0; i < dim; i++)
        EXPECT(a.out.x[i] == a.v.x[i] && a.out.x[5 * heads * dim + i] == a.v.x[5 * kv_heads * dim + i]);
}

// Soft-cap, ALiBi, a bias, dropout, sinks, largest scores and 8-bit keys at once: on any number of ranks what one rank computes.
cp::AttentionConfig scores(cp::Reach reach) {
    cp::AttentionConfig c = small();
    c.softcap = 2;
    c.dropout = 0.25f;
    c.alibi_slopes = {0.5f, 0.25f, 0.125f, 0.0625f};
    c.sinks = c.max_logit = reach;
    c.bias = CP_BIAS | CP_BIAS_HEADS | CP_BIAS_QUERIES | CP_BIAS_GRADIENT;
    c.kv_wire = cp::KvWire::e4m3;
    EXPECT(c.raw().kv_wire == CP_KV_WIRE_E4M3);
    return c;
}

struct Numbers {
    std::vector<float> sinks = {0.5f, -1, 0.25f, 2}, d_sinks, max_logit;
    Rows bias, d_bias; // a row for every query: [heads, keys]

    explicit Numbers(const Rows &b) : bias(b), d_bias(b.x.size() / static_cast<std::size_t>(b.width), b.width) {}

    static cp::Tensor pairs(const Rows &b) {
        return cp::Tensor(b.x.data(), cp::DType::f32, {1, heads, static_cast<std::int64_t>(b.x.size()) / b.width, b.width / heads},
                          {0, b.width / heads, b.width, 1});
    }

    // Forward and backward on this rank, of a sequence of n.
    void step(cp::Attention &attention, const All &a, std::size_t n) {
        d_sinks.assign(heads, NAN);
        max_logit.assign(heads, NAN);
        cp::Sequences s = cp::Sequences::dense(1, static_cast<std::uint32_t>(n)).numbered({7});
        cp::Context context;
        cp::ForwardTensors f = a.forward();
        cp::BackwardTensors b = a.backward();
        f.sinks = b.sinks = cp::Tensor(sinks, {heads});
        f.max_logit = cp::Tensor(max_logit, {heads});
        b.d_sinks = cp::Tensor(d_sinks, {heads});
        f.bias = b.bias = pairs(bias);
        b.d_bias = pairs(d_bias);
        f.dropout_seed = UINT64_C(0x123456789abcdef);
        attention.forward(s, f, context);
        attention.backward(s, b, context);
    }
};

void equal_one_rank_with_scores(cp::CommType comm, cp::Reach reach) {
    const std::size_t n = 37;
    const std::uint32_t size = 3;
    All right = inputs(n), got(n), in = inputs(n), plain = alone(n);
    const Rows bias = Rows::wave(n, heads * static_cast<std::int64_t>(n), 5);
    Numbers of_one(bias);
    Rows d_bias(n, bias.width);
    cp::Attention one(scores(cp::Reach::group));
    of_one.step(one, right, n);
    EXPECT(worst(right.out, plain.out) > 0.1);
    std::vector<float> d_sinks(heads, 0), max_logit(heads, -INFINITY);
    on_ranks(size, [&](cp::Group group) {
        auto mine = cp::partition_tokens(cp::Partition::zigzag, cp::Format::dense, cp::Sequences::dense(1, n), size, group.rank());
        All a(mine.size());
        a.q = in.q.pick(mine);
        a.k = in.k.pick(mine);
        a.v = in.v.pick(mine);
        a.d_out = in.d_out.pick(mine);
        cp::Attention attention(scores(reach));
        attention.set_group(group, comm);
        Numbers numbers(bias.pick(mine));
        numbers.step(attention, a, n);
        std::lock_guard<std::mutex> lock(mutex);
        got.out.put(mine, a.out);
        got.lse.put(mine, a.lse);
        got.dq.put(mine, a.dq);
        got.dk.put(mine, a.dk);
        got.dv.put(mine, a.dv);
        d_bias.put(mine, numbers.d_bias);
        for (std::size_t h = 0; h < heads; h++) {
            d_sinks[h] = reach == cp::Reach::group ? numbers.d_sinks[h] : d_sinks[h] + numbers.d_sinks[h];
            max_logit[h] = max_logit[h] >= numbers.max_logit[h] ? max_logit[h] : numbers.max_logit[h];
        }
    });
    EXPECT(worst(right.out, got.out) < 1e-5);
    EXPECT(worst(right.lse, got.lse) < 1e-5);
    EXPECT(worst(right.dq, got.dq) < 1e-5);
    EXPECT(worst(right.dk, got.dk) < 1e-5);
    EXPECT(worst(right.dv, got.dv) < 1e-5);
    EXPECT(worst(of_one.d_sinks, d_sinks) < 1e-5);
    EXPECT(worst(of_one.max_logit, max_logit) < 1e-5);
    EXPECT(worst(of_one.d_bias, d_bias) < 1e-5);
}

// Keys and values made of latents: on any number of ranks what one rank computes, parts of the weights' gradients summed.
struct Latents {
    enum { c = 32, r = 8 };
    Rows latent, up_k, up_v, d_latent, d_up_k, d_up_v; // weights: a row for every element of every head

    explicit Latents(const Rows &rows)
        : latent(rows), up_k(Rows::wave(heads * (dim - r), c, 8)), up_v(Rows::wave(heads * dim, c, 9)),
          d_latent(rows.x.size() / static_cast<std::size_t>(rows.width), rows.width), d_up_k(heads * (dim - r), c), d_up_v(heads * dim, c) {}

    static cp::Tensor weights(const Rows &w) {
        return cp::Tensor(w.x, {heads, static_cast<std::int64_t>(w.x.size()) / c / heads, c});
    }

    void step(cp::CommType comm, const cp::Group *group, const All &a, std::size_t n) {
        cp::AttentionConfig config = small();
        config.kv_heads = 0;
        config.latent_dim = c;
        config.latent_rope = r;
        cp::Attention attention(config);
        if (group != nullptr)
            attention.set_group(*group, comm);
        cp::ForwardTensors f = a.forward();
        cp::BackwardTensors b = a.backward();
        f.k = f.v = b.k = b.v = b.dk = b.dv = cp::Tensor();
        f.latent = b.latent = latent.tensor(1);
        f.up_k = b.up_k = weights(up_k);
        f.up_v = b.up_v = weights(up_v);
        b.d_latent = d_latent.tensor(1);
        b.d_up_k = weights(d_up_k);
        b.d_up_v = weights(d_up_v);
        cp::Context context;
        cp::Sequences s = cp::Sequences::dense(1, static_cast<std::uint32_t>(n));
        attention.forward(s, f, context);
        attention.backward(s, b, context);
    }
};

void equal_one_rank_with_latents(cp::CommType comm) {
    const std::size_t n = 37;
    All right = inputs(n), got(n), in = inputs(n);
    Latents of_one(Rows::wave(n, Latents::c + Latents::r, 7)), sum = of_one;
    of_one.step(comm, nullptr, right, n);
    for (Rows *part : {&sum.d_up_k, &sum.d_up_v})
        std::fill(part->x.begin(), part->x.end(), 0.0f);
    on_ranks(3, [&](cp::Group group) {
        auto mine = cp::partition_tokens(cp::Partition::zigzag, cp::Format::dense, cp::Sequences::dense(1, n), 3, group.rank());
        All a(mine.size());
        a.q = in.q.pick(mine);
        a.d_out = in.d_out.pick(mine);
        Latents of_rank(of_one.latent.pick(mine));
        of_rank.step(comm, &group, a, n);
        std::lock_guard<std::mutex> lock(mutex);
        got.out.put(mine, a.out);
        got.dq.put(mine, a.dq);
        sum.d_latent.put(mine, of_rank.d_latent);
        for (std::size_t i = 0; i < sum.d_up_k.x.size(); i++)
            sum.d_up_k.x[i] += of_rank.d_up_k.x[i];
        for (std::size_t i = 0; i < sum.d_up_v.x.size(); i++)
            sum.d_up_v.x[i] += of_rank.d_up_v.x[i];
    });
    EXPECT(worst(right.out, got.out) < 1e-4);
    EXPECT(worst(right.dq, got.dq) < 1e-3);
    EXPECT(worst(of_one.d_latent, sum.d_latent) < 1e-3);
    EXPECT(worst(of_one.d_up_k, sum.d_up_k) < 1e-3);
    EXPECT(worst(of_one.d_up_v, sum.d_up_v) < 1e-3);
}

void score_errors() {
    cp::AttentionConfig c = scores(cp::Reach::rank);
    c.alibi_slopes.pop_back();
    THROWS(invalid_argument, "alibi_slopes: got 3, need one for each of 4", cp::Attention attention(c));
    c = small();
    c.dropout = 1;
    THROWS(invalid_argument, "dropout: got 1", cp::Attention::require_support(c, cp::CommConfig(), 2));
    THROWS(invalid_argument, "numbers of sequences: got 2 numbers, need 1", cp::Sequences::dense(1, 8).numbered({1, 2}));
    All a = inputs(8);
    cp::Attention attention(scores(cp::Reach::rank));
    cp::Context context;
    THROWS(invalid_argument, "args.sinks: got NULL", attention.forward(cp::Sequences::dense(1, 8), a.forward(), context));
}

// What a DLPack producer hands over, without DLPack's header.
struct FakeDLTensor {
    void *data;
    struct {
        int device_type, device_id;
    } device;
    std::int32_t ndim;
    struct {
        std::uint8_t code, bits;
        std::uint16_t lanes;
    } dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

void tensors() {
    std::vector<float> x(24);
    std::int64_t shape[3] = {2, 3, 4}, strides[3] = {1, 8, 2};
    FakeDLTensor d = {x.data(), {1, 0}, 3, {2, 32, 1}, shape, strides, 8};
    cp::Tensor t = cp::Tensor::from_dlpack(&d);
    EXPECT(t.raw().data == x.data() + 2 && t.raw().ndim == 3 && t.raw().stride[1] == 8 && t.raw().shape[2] == 4);
    EXPECT(t.raw().dtype_bits == 32 && t.raw().dtype_code == CP_CODE_FLOAT && t.raw().device_type == CP_DEVICE_CPU);
    d.strides = nullptr;
    t = cp::Tensor::from_dlpack(&d);
    EXPECT(t.raw().stride[0] == 12 && t.raw().stride[1] == 4 && t.raw().stride[2] == 1);
    std::vector<std::uint16_t> half(24);
    EXPECT(cp::Tensor(half, cp::DType::bf16, {2, 12}).raw().dtype_code == CP_CODE_BFLOAT);
    THROWS(invalid_argument, "f32 for 16-bit", cp::Tensor(half, cp::DType::f32, {2, 12}));
}

} // namespace

int main() {
    const cp::CommType comms[] = {cp::CommType::p2p, cp::CommType::all_gather, cp::CommType::a2a, cp::CommType::a2a_p2p};
    for (std::uint32_t size = 1; size <= 4; size++)
        for (cp::CommType comm : comms)
            equal_one_rank(size, comm, size % 2 == 0);
    equal_one_rank_with_scores(cp::CommType::p2p, cp::Reach::group);
    equal_one_rank_with_scores(cp::CommType::a2a, cp::Reach::rank);
    for (cp::CommType comm : {cp::CommType::p2p, cp::CommType::all_gather, cp::CommType::a2a})
        equal_one_rank_with_latents(comm);
    for (std::uint32_t size = 1; size <= 5; size++)
        trade_and_back(size);
    groups();
    errors();
    score_errors();
    disagreement();
    packed_and_list();
    slices(65);
    tensors();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

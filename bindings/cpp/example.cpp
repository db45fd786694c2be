// Causal attention over 4096 tokens on four ranks, threads of this process; compares with one rank.
//
//     g++ -std=c++17 -Iinclude -Ibindings/cpp bindings/cpp/example.cpp -Ltarget/release -lcontext_parallel -pthread
//     LD_LIBRARY_PATH=target/release ./a.out
#include <context_parallel.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <thread>

const std::uint32_t ranks = 4, tokens = 4096, heads = 4, dim = 64;

// The rows `mine` of a tensor of the whole sequence.
std::vector<float> rows(const std::vector<std::uint32_t> &mine, int seed) {
    std::vector<float> x;
    for (std::uint32_t t : mine)
        for (std::uint32_t i = 0; i < heads * dim; i++)
            x.push_back(std::sin(0.37f * static_cast<float>(t % 97 * (i + 1)) + static_cast<float>(seed)));
    return x;
}

// O of one rank, and dQ after it.
std::vector<float> attend(cp::Attention &attention, const std::vector<std::uint32_t> &mine) {
    const std::int64_t n = static_cast<std::int64_t>(mine.size());
    const std::vector<std::int64_t> shape = {1, n, heads, dim};
    std::vector<float> q = rows(mine, 1), k = rows(mine, 2), v = rows(mine, 3), d_out = rows(mine, 4);
    std::vector<float> out(q.size()), dq(q.size()), dk(q.size()), dv(q.size()), lse(mine.size() * heads);
    const cp::Tensor Q(q, shape), K(k, shape), V(v, shape), O(out, shape), L(lse, {1, heads, n});
    cp::Sequences sequences = cp::Sequences::dense(1, tokens);
    cp::Context context;
    attention.forward(sequences, {Q, K, V, O, L}, context);
    attention.backward(sequences, {Q, K, V, O, L, {d_out, shape}, {dq, shape}, {dk, shape}, {dv, shape}}, context);
    out.insert(out.end(), dq.begin(), dq.end());
    return out;
}

int main() try {
    cp::AttentionConfig config;
    config.heads = heads;
    config.head_dim_qk = dim;
    config.causal = true;
    auto mine = [](std::uint32_t size, std::uint32_t rank) {
        return cp::partition_tokens(cp::Partition::zigzag, cp::Format::dense, cp::Sequences::dense(1, tokens), size, rank);
    };
    cp_unique_id id = cp::unique_id();
    std::vector<std::vector<float>> got(ranks);
    std::vector<std::thread> threads;
    for (std::uint32_t r = 0; r < ranks; r++)
        threads.emplace_back([&, r] {
            cp::Group group = cp::Group::from_id(r, ranks, id);
            cp::Attention attention(config);
            attention.set_group(group, cp::CommType::p2p);
            got[r] = attend(attention, mine(ranks, r));
        });
    for (auto &t : threads)
        t.join();

    cp::Attention one(config);
    std::vector<float> right = attend(one, mine(1, 0));
    const std::size_t width = heads * dim;
    float worst = 0;
    for (std::uint32_t r = 0; r < ranks; r++) {
        std::vector<std::uint32_t> at = mine(ranks, r);
        for (std::size_t half = 0; half < 2; half++)
            for (std::size_t i = 0; i < at.size() * width; i++)
                worst = std::max(worst, std::fabs(got[r][half * at.size() * width + i] -
                                                  right[(half * tokens + at[i / width]) * width + i % width]));
    }
    std::printf("%u ranks, %u tokens: worst difference to one rank %.1e\n", ranks, tokens, static_cast<double>(worst));
    return worst < 1e-4f ? 0 : 1;
} catch (const cp::Error &e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}

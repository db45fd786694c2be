// The C++ interface on CUDA devices: ranks as threads on a device compute what the CPU does, forward and backward, on their own streams, with
// saved buffers and workspace of the caller's; errors carry status and text. For the software GPU: LD_LIBRARY_PATH=target/softgpu.
// Prints "N passed, N failed".
#include "context_parallel.hpp"

#include "gpu.h"

#include <atomic>
#include <cmath>
#include <mutex>
#include <thread>

namespace {

std::mutex mutex;
int passed = 0, failed = 0;

void expect(bool good, int line, const std::string &what) {
    std::lock_guard<std::mutex> lock(mutex);
    ++(good ? passed : failed);
    if (!good)
        std::printf("FAIL test_cuda.cpp:%d: %s\n", line, what.c_str());
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
const std::size_t tokens = 45;

// The calling thread's device and stream for as long as this is there.
struct OnDevice {
    gpu mine;
    explicit OnDevice(int rank = 0) { gpu_open(&mine, rank); }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;
    ~OnDevice() { gpu_close(); }
};

// Memory of the calling thread's device, or of the host on a thread without one.
struct Memory {
    std::vector<unsigned char> host;
    device_pointer device = 0;

    explicit Memory(std::size_t bytes) : host(bytes, 0xFF) {
        if (here != nullptr) {
            device = gpu_alloc(bytes);
            gpu_write(device, host.data(), bytes);
        }
    }
    Memory(Memory &&other) noexcept : host(std::move(other.host)), device(other.device) { other.device = 0; }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() { gpu_free(device); }

    void *at() { return device != 0 ? reinterpret_cast<void *>(static_cast<std::uintptr_t>(device)) : host.data(); }
    void push() {
        if (device != 0)
            gpu_write(device, host.data(), host.size());
    }
    void pull() {
        if (device != 0)
            gpu_read(host.data(), device, host.size());
    }
};

float of_bf16(std::uint16_t bits) {
    std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

std::uint16_t to_bf16(float x) {
    std::uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    return static_cast<std::uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}

cp::Device place() {
    return here == nullptr ? cp::Device::cpu() : cp::Device::cuda(here->device);
}

// bf16 rows [tokens, heads, dim] of one sequence.
struct Rows {
    std::int64_t h;
    std::size_t n;
    Memory memory;

    Rows(std::size_t rows, std::int64_t of_heads) : h(of_heads), n(rows), memory(rows * width() * 2) {}

    static Rows wave(const std::vector<std::uint32_t> &mine, std::int64_t of_heads, int seed) {
        Rows r(mine.size(), of_heads);
        for (std::size_t i = 0; i < mine.size(); i++)
            for (std::size_t j = 0; j < r.width(); j++) {
                std::size_t k = mine[i] * r.width() + j;
                r.put(i * r.width() + j, static_cast<float>(std::sin(0.7 * static_cast<double>(k) * (seed + 1) + seed)));
            }
        r.memory.push();
        return r;
    }

    std::size_t width() const { return static_cast<std::size_t>(h * dim); }
    void put(std::size_t i, float x) {
        std::uint16_t bits = to_bf16(x);
        std::memcpy(memory.host.data() + 2 * i, &bits, 2);
    }
    float get(std::size_t i) const {
        std::uint16_t bits;
        std::memcpy(&bits, memory.host.data() + 2 * i, 2);
        return of_bf16(bits);
    }
    cp::Tensor tensor() { return cp::Tensor(place(), memory.at(), cp::DType::bf16, {1, static_cast<std::int64_t>(n), h, dim}); }
};

struct All {
    Rows q, k, v, d_out, out, dq, dk, dv;
    Memory lse;

    explicit All(const std::vector<std::uint32_t> &mine)
        : q(Rows::wave(mine, heads, 1)), k(Rows::wave(mine, kv_heads, 2)), v(Rows::wave(mine, kv_heads, 3)), d_out(Rows::wave(mine, heads, 4)),
          out(mine.size(), heads), dq(mine.size(), heads), dk(mine.size(), kv_heads), dv(mine.size(), kv_heads),
          lse(mine.size() * static_cast<std::size_t>(heads) * 4) {}

    cp::ForwardTensors forward() {
        cp::Tensor l(place(), lse.at(), cp::DType::f32, {1, heads, static_cast<std::int64_t>(q.n)});
        return {q.tensor(), k.tensor(), v.tensor(), out.tensor(), l};
    }
    cp::BackwardTensors backward() {
        cp::ForwardTensors f = forward();
        return {f.q, f.k, f.v, f.out, f.lse, d_out.tensor(), dq.tensor(), dk.tensor(), dv.tensor()};
    }
    void pull() {
        for (Rows *r : {&out, &dq, &dk, &dv})
            r->memory.pull();
    }
};

cp::AttentionConfig small() {
    cp::AttentionConfig c;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim_qk = dim;
    c.dtype = cp::DType::bf16;
    c.causal = true;
    c.device = place();
    return c;
}

cp::Sequences sequence() {
    return cp::Sequences::dense(1, static_cast<std::uint32_t>(tokens));
}

std::vector<std::uint32_t> share(std::uint32_t ranks, std::uint32_t rank) {
    return cp::partition_tokens(cp::Partition::zigzag, cp::Format::dense, sequence(), ranks, rank);
}

// One rank with everything, on the CPU.
All alone() {
    All a(share(1, 0));
    cp::Attention attention(small());
    cp::Context context;
    attention.forward(sequence(), a.forward(), context);
    attention.backward(sequence(), a.backward(), context);
    return a;
}

double worst(const Rows &whole, const Rows &part, const std::vector<std::uint32_t> &mine) {
    double most = 0;
    for (std::size_t i = 0; i < mine.size(); i++)
        for (std::size_t j = 0; j < whole.width(); j++) {
            double d = std::fabs(static_cast<double>(whole.get(mine[i] * whole.width() + j)) - part.get(i * whole.width() + j));
            most = d >= 0 && d <= most ? most : d;
        }
    return most;
}

struct Counts {
    std::atomic<int> taken{0}, back{0};
    static void *alloc(void *ctx, std::size_t bytes, void *) noexcept {
        static_cast<Counts *>(ctx)->taken++;
        return reinterpret_cast<void *>(static_cast<std::uintptr_t>(gpu_alloc(bytes)));
    }
    static void free(void *ctx, void *ptr, std::size_t, void *stream) noexcept {
        static_cast<Counts *>(ctx)->back++;
        // Simple rather than fast: nothing uses it any more when it is given back.
        gpu_must(gpu_get()->stream_synchronize(stream), "cuStreamSynchronize");
        gpu_free(reinterpret_cast<std::uintptr_t>(ptr));
    }
};

// vary 0: the layer's own workspace, 1: the caller's, and saved tensors, 2: an allocator, and deterministic.
void equal_the_cpu(const All &right, std::uint32_t size, cp::CommType comm, int vary) {
    cp_unique_id id = cp::unique_id();
    std::vector<std::thread> threads;
    for (std::uint32_t r = 0; r < size; r++)
        threads.emplace_back([&, r] {
            try {
                OnDevice on;
                cp::Group group = cp::Group::from_id(r, size, id, cp::Group::Options(place(), cp::TransportKind::local));
                auto mine = share(size, r);
                All a(mine);
                Counts counts;
                cp::AttentionConfig config = small();
                config.save = vary == 1;
                config.deterministic = vary == 2;
                if (vary == 2) {
                    config.device_alloc = &Counts::alloc;
                    config.device_free = &Counts::free;
                    config.device_alloc_ctx = &counts;
                }
                cp::Attention attention(config);
                attention.set_group(group, comm);
                Memory workspace(vary == 1 ? attention.workspace_size(static_cast<std::uint32_t>(tokens)) : 0);
                if (vary == 1)
                    attention.use_workspace(workspace.at(), workspace.host.size());
                cp::Attention moved = std::move(attention);
                Memory saved(moved.saved_size(sequence()));
                cp::Context context;
                context.use_saved(saved.at(), saved.host.size());
                moved.forward(sequence(), a.forward(), context, here->stream);
                cp::Context kept = std::move(context);
                moved.backward(sequence(), a.backward(), kept, here->stream);
                gpu_wait();
                a.pull();
                EXPECT(counts.taken == (vary == 2 ? 2 : 0) && counts.back == counts.taken);
                EXPECT(worst(right.out, a.out, mine) < 0.02);
                EXPECT(worst(right.dq, a.dq, mine) < 0.06);
                EXPECT(worst(right.dk, a.dk, mine) < 0.1);
                EXPECT(worst(right.dv, a.dv, mine) < 0.1);
            } catch (const std::exception &e) {
                expect(false, __LINE__, std::string("rank ") + std::to_string(r) + " of " + std::to_string(size) + ": " + e.what());
            }
        });
    for (auto &t : threads)
        t.join();
}

// A seed in device memory, read when the kernels run, draws what the same number draws.
void seeds() {
    OnDevice on;
    auto mine = share(1, 0);
    cp::AttentionConfig config = small();
    config.dropout = 0.5f;
    config.deterministic = true;
    cp::Attention attention(config);
    Memory place_of_seed(8);
    std::vector<unsigned char> last;
    for (std::uint64_t seed : {UINT64_C(5), UINT64_C(0xfedcba9876543210)}) {
        All given(mine), found(mine);
        std::memcpy(place_of_seed.host.data(), &seed, 8);
        place_of_seed.push();
        for (All *a : {&given, &found}) {
            cp::Context context;
            cp::ForwardTensors t = a->forward();
            t.dropout_seed = a == &given ? seed : 0;
            t.dropout_seed_at = a == &given ? nullptr : static_cast<const std::uint64_t *>(place_of_seed.at());
            attention.forward(sequence(), t, context, here->stream);
            attention.backward(sequence(), a->backward(), context, here->stream);
            gpu_wait();
            a->pull();
        }
        EXPECT(given.out.memory.host == found.out.memory.host && given.dq.memory.host == found.dq.memory.host);
        EXPECT(given.dk.memory.host == found.dk.memory.host && given.dv.memory.host == found.dv.memory.host);
        EXPECT(last != found.out.memory.host);
        last = found.out.memory.host;
    }
    All a(mine);
    cp::Context context;
    cp::ForwardTensors t = a.forward();
    t.dropout_seed_at = reinterpret_cast<const std::uint64_t *>(static_cast<const char *>(place_of_seed.at()) + 4);
    THROWS(invalid_argument, "must not be NULL and a multiple of 8", attention.forward(sequence(), t, context, here->stream));
}

void errors() {
    OnDevice on;
    auto mine = share(1, 0);
    All a(mine);
    cp::Attention attention(small());
    cp::Context context;
    cp::ForwardTensors t = a.forward();
    t.q = cp::Tensor(a.q.memory.host.data(), cp::DType::bf16, {1, static_cast<std::int64_t>(tokens), heads, dim});
    THROWS(unsupported, "q.device_type, device_id: got 1, 0; this layer computes on CUDA device 0", attention.forward(sequence(), t, context));
    t = a.forward();
    t.v = cp::Tensor(place(), static_cast<char *>(a.v.memory.at()) + 8, cp::DType::bf16, {1, static_cast<std::int64_t>(tokens), kv_heads, dim});
    THROWS(invalid_argument, "v.data: got", attention.forward(sequence(), t, context));
    cp::AttentionConfig c = small();
    c.dtype = cp::DType::f32;
    THROWS(unsupported, "fp32", cp::Attention other(c));
    c = small();
    c.device = cp::Device::cuda(99);
    THROWS(invalid_argument, "99", cp::Attention other(c));
    THROWS(invalid_argument, "99", cp::Group::from_nccl(&a, cp::Device::cuda(99)));
    cp::Group::Options options;
    options.nccl_library = "libnccl.so.2";
    THROWS(invalid_argument, "nccl_library", cp::Group::from_id(0, 1, cp::unique_id(), options));
    attention.forward(sequence(), a.forward(), context, here->stream);
    gpu_wait();
}

} // namespace

int main() {
    const cp::CommType comms[] = {cp::CommType::p2p, cp::CommType::all_gather, cp::CommType::a2a, cp::CommType::a2a_p2p};
    All right = alone();
    for (std::uint32_t size = 1; size <= 3; size++)
        for (cp::CommType comm : comms)
            equal_the_cpu(right, size, comm, static_cast<int>((size + static_cast<std::uint32_t>(comm)) % 3));
    seeds();
    errors();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// context_parallel for C++: the C interface with ownership and exceptions. Header only, C++11 and later; link libcontext_parallel.
//
// context_parallel.h is the manual: what tensors look like, what is collective, what an error leaves behind. Here
//   - Group and Attention own their handle; they can be moved, not copied.
//   - Every function throws cp::Error, which carries the status and the text, where the C one returns a status.
//   - Tensor is a view: it owns nothing, and the memory must outlive the calls.
//   - Context is what forward leaves for backward, with the saved buffer; one for every forward in flight.
//
//     cp::Group group = cp::Group::from_environment();
//     cp::AttentionConfig config;
//     config.heads = 8, config.head_dim_qk = 64, config.causal = true;
//     cp::Attention attention(config);
//     attention.set_group(group, cp::CommType::p2p);
//     cp::Context context;
//     attention.forward(cp::Sequences::dense(1, 4096), {q, k, v, out, lse}, context);
//     attention.backward(cp::Sequences::dense(1, 4096), {q, k, v, out, lse, d_out, dq, dk, dv}, context);
#ifndef CONTEXT_PARALLEL_HPP
#define CONTEXT_PARALLEL_HPP

#include "context_parallel.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cp {

enum class Status : std::int32_t {
    ok = CP_OK,
    invalid_argument = CP_ERR_INVALID_ARGUMENT,
    invalid_handle = CP_ERR_INVALID_HANDLE,
    invalid_usage = CP_ERR_INVALID_USAGE,
    unsupported = CP_ERR_UNSUPPORTED,
    not_capturable = CP_ERR_NOT_CAPTURABLE,
    out_of_memory = CP_ERR_OUT_OF_MEMORY,
    version = CP_ERR_VERSION,
    mismatch = CP_ERR_MISMATCH,
    cuda = CP_ERR_CUDA,
    nccl = CP_ERR_NCCL,
    transport = CP_ERR_TRANSPORT,
    timeout = CP_ERR_TIMEOUT,
    peer_lost = CP_ERR_PEER_LOST,
    aborted = CP_ERR_ABORTED,
    internal = CP_ERR_INTERNAL
};
enum class DType : std::uint32_t { f32 = CP_DTYPE_F32, bf16 = CP_DTYPE_BF16, f16 = CP_DTYPE_F16 };
enum class Format : std::uint32_t { dense = CP_FORMAT_DENSE, packed = CP_FORMAT_PACKED };
enum class CommType : std::uint32_t { p2p = CP_COMM_P2P, all_gather = CP_COMM_ALL_GATHER, a2a = CP_COMM_A2A, a2a_p2p = CP_COMM_A2A_P2P };
enum class Partition : std::uint32_t {
    zigzag = CP_PARTITION_ZIGZAG,
    contiguous = CP_PARTITION_CONTIGUOUS,
    striped = CP_PARTITION_STRIPED,
    list = CP_PARTITION_LIST,
    balanced = CP_PARTITION_BALANCED
};
enum class TransportKind : std::uint32_t {
    automatic = CP_TRANSPORT_AUTO,
    local = CP_TRANSPORT_LOCAL,
    shm = CP_TRANSPORT_SHM,
    nccl = CP_TRANSPORT_NCCL,
    staged = CP_TRANSPORT_STAGED
};
/// How far a number per head goes: not asked for, this rank's part, or the whole group's.
enum class Reach : std::uint32_t { none = CP_REACH_NONE, rank = CP_REACH_RANK, group = CP_REACH_GROUP };
/// How keys and values travel between ranks, and so what is attended.
enum class KvWire : std::uint32_t { storage = CP_KV_WIRE_STORAGE, e4m3 = CP_KV_WIRE_E4M3, e5m2 = CP_KV_WIRE_E5M2 };
enum class Side : std::uint32_t { query = CP_SIDE_Q, key = CP_SIDE_K };
enum class Pass : std::uint32_t { forward = CP_PASS_FORWARD, backward = CP_PASS_BACKWARD };
enum class PlanFormat : std::uint32_t { text = CP_PLAN_TEXT, json = CP_PLAN_JSON };

/// What went wrong: a status to branch on, and what() names the argument, what was got, what is allowed, and the rank.
class Error : public std::runtime_error {
  public:
    Error(Status status, const std::string &text) : std::runtime_error(text), status_(status) {}
    Status status() const noexcept { return status_; }

  private:
    Status status_;
};

/// Throws the calling thread's last error if `status` is one.
inline void check(cp_status status) {
    if (status != CP_OK)
        throw Error(static_cast<Status>(status), cp_last_error());
}

/// Where tensors are and work is done.
struct Device {
    std::int32_t type = CP_DEVICE_CPU;
    std::int32_t id = 0;

    static Device cpu() { return Device(); }
    static Device cuda(std::int32_t id) {
        Device d;
        d.type = CP_DEVICE_CUDA;
        d.id = id;
        return d;
    }
    bool is_cuda() const noexcept { return type == CP_DEVICE_CUDA; }
};

/// A CUstream, or cudaStream_t, which is the same; null is the default stream, and must be null on the CPU.
using Stream = void *;

/// major*1000000 + minor*1000 + patch.
inline std::uint32_t version() {
    return cp_version();
}

/// One line of JSON.
inline std::string build_info() {
    return cp_build_info();
}

/// Names a new group: made where rank 0 will be, given to all ranks.
inline cp_unique_id unique_id() {
    cp_unique_id id;
    check(cp_get_unique_id(&id));
    return id;
}

namespace detail {

/// All zero but for its size.
template <class T> T sized() {
    T value;
    std::memset(&value, 0, sizeof value);
    value.struct_size = static_cast<std::uint32_t>(sizeof value);
    return value;
}

template <class T> const T *data_or_null(const std::vector<T> &v) {
    return v.empty() ? nullptr : v.data();
}

} // namespace detail

/// The caller's own allgather: gives `bytes` bytes at `mine`, gets those of all ranks at `all`. It may throw.
using AllGather = std::function<void(const void *mine, void *all, std::size_t bytes)>;

/// Ranks that compute together.
class Group {
  public:
    struct Options {
        TransportKind transport = TransportKind::automatic;
        /// Deadline of every wait; 0 is the library's default.
        std::chrono::milliseconds timeout{0};
        /// This rank's.
        Device device;
        /// CUDA: the caller's ncclComm_t, which stays the caller's; null: none.
        void *nccl_comm = nullptr;
        /// CUDA: file of the NCCL library; empty: looked for.
        std::string nccl_library;
        /// CUDA: ranks compare every call before it also over NCCL; see CP_GROUP_AGREE.
        bool agree = false;
        Options() {}
        /// With everything else as it is by default.
        explicit Options(Device d, TransportKind t = TransportKind::automatic) : transport(t), device(d) {}
    };

    /// From a configuration of the C interface. Collective.
    explicit Group(const cp_group_config &config) { check(cp_group_init(&config, &handle_)); }

    /// All ranks give the same id. Collective.
    static Group from_id(std::uint32_t rank, std::uint32_t size, const cp_unique_id &id, const Options &options = Options()) {
        cp_group_config c = config(rank, size, options);
        c.id = &id;
        return Group(c);
    }

    /// From the environment that torchrun or mpirun sets. Collective.
    static Group from_environment(const Options &options = Options()) {
        cp_group_config c = config(0, 0, options);
        c.bootstrap = CP_BOOTSTRAP_ENV;
        return Group(c);
    }

    /// Over the caller's NCCL communicator, which knows rank and size. Collective.
    static Group from_nccl(void *nccl_comm, Device device, Options options = Options()) {
        options.nccl_comm = nccl_comm;
        options.device = device;
        return Group(config(0, 0, options));
    }

    /// With a collective that the caller has. What it throws comes out here. Collective.
    static Group from_allgather(std::uint32_t rank, std::uint32_t size, const AllGather &gather, const Options &options = Options()) {
        Gatherer gatherer = {&gather, std::exception_ptr()};
        cp_group_config c = config(rank, size, options);
        c.allgather = &Gatherer::call;
        c.allgather_ctx = &gatherer;
        try {
            return Group(c);
        } catch (const Error &) {
            if (gatherer.thrown)
                std::rethrow_exception(gatherer.thrown);
            throw;
        }
    }

    /// Over the caller's transport, such as cp_mpi_transport makes. The group owns it from here on; after an exception it is still the
    /// caller's. Collective.
    static Group from_transport(std::uint32_t rank, std::uint32_t size, const cp_transport_ops &ops, const Options &options = Options()) {
        cp_group_config c = config(rank, size, options);
        c.transport = &ops;
        return Group(c);
    }

    Group(Group &&other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
    Group &operator=(Group &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    Group(const Group &) = delete;
    Group &operator=(const Group &) = delete;
    ~Group() { cp_group_destroy(handle_); }

    /// The group of some of this group's ranks, in the given order. Only members call it. Local.
    Group subset(const std::vector<std::uint32_t> &ranks) const {
        cp_group *made = nullptr;
        check(cp_group_subset(handle_, ranks.empty() ? &no_rank() : ranks.data(), ranks.size(), &made));
        return Group(made);
    }

    std::uint32_t rank() const { return number(cp_group_rank); }
    std::uint32_t size() const { return number(cp_group_size); }

    /// Ranks of the parent group, in this group's order.
    std::vector<std::uint32_t> global_ranks() const {
        std::vector<std::uint32_t> ranks(size());
        check(cp_group_global_ranks(handle_, ranks.data(), ranks.size()));
        return ranks;
    }

    /// Waits for all ranks. Collective.
    void barrier() { check(cp_group_barrier(handle_)); }
    void warm_up() { check(cp_group_warm_up(handle_)); }

    /// Ends pending and future calls of the group. From any thread.
    void abort() { check(cp_group_abort(handle_)); }

    cp_statistics statistics() const {
        cp_statistics s = detail::sized<cp_statistics>();
        check(cp_group_statistics(handle_, &s));
        return s;
    }

    /// The C handle, still owned by this object.
    cp_group *get() const noexcept { return handle_; }

  private:
    explicit Group(cp_group *handle) noexcept : handle_(handle) {}

    struct Gatherer {
        const AllGather *gather;
        std::exception_ptr thrown;
        static std::int32_t call(void *ctx, const void *mine, void *all, std::size_t bytes) noexcept {
            Gatherer *self = static_cast<Gatherer *>(ctx);
            try {
                (*self->gather)(mine, all, bytes);
                return 0;
            } catch (...) {
                self->thrown = std::current_exception();
                return CP_ERR_TRANSPORT;
            }
        }
    };

    static cp_group_config config(std::uint32_t rank, std::uint32_t size, const Options &options) {
        cp_group_config c = detail::sized<cp_group_config>();
        c.rank = rank;
        c.size = size;
        c.transport_kind = static_cast<cp_transport_kind>(options.transport);
        c.timeout_ms = static_cast<std::uint64_t>(options.timeout.count());
        c.flags = options.agree ? CP_GROUP_AGREE : 0;
        c.device_type = options.device.type;
        c.device_id = options.device.id;
        c.nccl_comm = options.nccl_comm;
        c.nccl_library = options.nccl_library.empty() ? nullptr : options.nccl_library.c_str();
        return c;
    }

    static const std::uint32_t &no_rank() {
        static const std::uint32_t none = 0;
        return none;
    }

    std::uint32_t number(cp_status (*ask)(const cp_group *, std::uint32_t *)) const {
        std::uint32_t n = 0;
        check(ask(handle_, &n));
        return n;
    }

    cp_group *handle_ = nullptr;
};

/// A view of the caller's memory with shape and element strides. See cp_tensor for the order of dimensions.
class Tensor {
  public:
    /// Nothing; refused where a tensor is needed.
    Tensor() noexcept { std::memset(&raw_, 0, sizeof raw_); }
    explicit Tensor(const cp_tensor &raw) noexcept : raw_(raw) {}

    /// Without strides the elements are dense. Inputs are not written, so a pointer to const is fine for them.
    Tensor(const void *data, DType dtype, const std::vector<std::int64_t> &shape, const std::vector<std::int64_t> &strides = {},
           Device device = Device())
        : Tensor() {
        raw_.data = const_cast<void *>(data);
        raw_.device_type = device.type;
        raw_.device_id = device.id;
        raw_.dtype_code = dtype == DType::bf16 ? CP_CODE_BFLOAT : CP_CODE_FLOAT;
        raw_.dtype_bits = dtype == DType::f32 ? 32 : 16;
        raw_.dtype_lanes = 1;
        if (!strides.empty() && strides.size() != shape.size())
            throw Error(Status::invalid_argument, "strides: got " + std::to_string(strides.size()) + " for " +
                                                      std::to_string(shape.size()) + " dimensions");
        lay_out(shape.size(), shape.data(), strides.empty() ? nullptr : strides.data());
    }

    /// On a device, dense.
    Tensor(Device device, const void *data, DType dtype, const std::vector<std::int64_t> &shape) : Tensor(data, dtype, shape, {}, device) {}

    /// Of a vector, dense; its size must be that of the shape.
    Tensor(const std::vector<float> &data, const std::vector<std::int64_t> &shape) : Tensor(data.data(), DType::f32, shape) {
        check_size(data.size());
    }

    /// Of a vector of 16-bit patterns, dense.
    Tensor(const std::vector<std::uint16_t> &data, DType dtype, const std::vector<std::int64_t> &shape) : Tensor(data.data(), dtype, shape) {
        if (dtype == DType::f32)
            throw Error(Status::invalid_argument, "dtype: got f32 for 16-bit elements");
        check_size(data.size());
    }

    /// Of a DLTensor (any struct with its fields; no header of DLPack's is needed). The memory stays the producer's.
    template <class DLTensor> static Tensor from_dlpack(const DLTensor *t) {
        Tensor made;
        made.raw_.data = static_cast<char *>(t->data) + t->byte_offset;
        made.raw_.device_type = static_cast<std::int32_t>(t->device.device_type);
        made.raw_.device_id = static_cast<std::int32_t>(t->device.device_id);
        made.raw_.dtype_code = static_cast<std::uint8_t>(t->dtype.code);
        made.raw_.dtype_bits = static_cast<std::uint8_t>(t->dtype.bits);
        made.raw_.dtype_lanes = static_cast<std::uint16_t>(t->dtype.lanes);
        made.lay_out(static_cast<std::size_t>(t->ndim), t->shape, t->strides);
        return made;
    }

    const cp_tensor &raw() const noexcept { return raw_; }

  private:
    /// No strides: dense, the last dimension fastest.
    void lay_out(std::size_t ndim, const std::int64_t *shape, const std::int64_t *strides) {
        if (ndim > 4)
            throw Error(Status::invalid_argument, "shape: got " + std::to_string(ndim) + " dimensions, at most 4 are allowed");
        raw_.ndim = static_cast<std::uint32_t>(ndim);
        std::int64_t dense = 1;
        for (std::size_t i = ndim; i-- > 0;) {
            raw_.shape[i] = shape[i];
            raw_.stride[i] = strides == nullptr ? dense : strides[i];
            dense *= shape[i];
        }
    }

    void check_size(std::size_t got) const {
        std::size_t wanted = 1;
        for (std::uint32_t i = 0; i < raw_.ndim; i++)
            wanted *= static_cast<std::size_t>(raw_.shape[i]);
        if (got != wanted)
            throw Error(Status::invalid_argument, "data: got " + std::to_string(got) + " elements, the shape has " + std::to_string(wanted));
    }

    cp_tensor raw_;
};

/// The sequences of a call, all of them, equal on every rank. Owns its arrays.
class Sequences {
  public:
    /// `count` entries of this padded length; `seq_k` 0 is as `seq_q`. Lengths may follow.
    static Sequences dense(std::uint32_t count, std::uint32_t seq_q, std::uint32_t seq_k = 0) {
        Sequences s;
        s.count_ = count;
        s.seq_q_ = seq_q;
        s.seq_k_ = seq_k;
        return s;
    }

    /// Cumulative lengths, starting with 0. Without `cu_k` the keys are as the queries, without `padded` there is no padding.
    static Sequences packed(std::vector<std::int32_t> cu_q, std::vector<std::int32_t> cu_k = {}, std::vector<std::int32_t> padded_q = {},
                            std::vector<std::int32_t> padded_k = {}) {
        Sequences s;
        s.count_ = cu_q.empty() ? 0 : static_cast<std::uint32_t>(cu_q.size() - 1);
        for (const auto *v : {&cu_k, &padded_q, &padded_k})
            need(*v, cu_q.size(), "cumulative lengths");
        s.cu_[0] = std::move(cu_q);
        s.cu_[1] = std::move(cu_k);
        s.padded_[0] = std::move(padded_q);
        s.padded_[1] = std::move(padded_k);
        return s;
    }

    /// Dense: true lengths of a side, and padding tokens before the first true one.
    Sequences &lengths(Side side, std::vector<std::int32_t> lens, std::vector<std::int32_t> before = {}) {
        need(lens, count_, "lengths");
        need(before, count_, "padding before");
        lens_[index(side)] = std::move(lens);
        before_[index(side)] = std::move(before);
        return *this;
    }

    /// Partition::list: the stretches of every rank of the group.
    Sequences &list(Side side, const std::vector<std::vector<cp_stretch>> &ranks) {
        std::size_t i = index(side);
        list_[i].clear();
        counts_[i].clear();
        for (const auto &rank : ranks) {
            counts_[i].push_back(static_cast<std::uint32_t>(rank.size()));
            list_[i].insert(list_[i].end(), rank.begin(), rank.end());
        }
        // A list of nothing is a list all the same.
        if (list_[i].empty())
            list_[i].reserve(1);
        return *this;
    }

    /// What queries see at most, under the layer's mask, in any order; an empty list: that mask alone.
    Sequences &slices(std::vector<cp_mask_slice> list) {
        slices_ = std::move(list);
        return *this;
    }

    /// With dropout: the caller's number of every sequence. Equal numbers drop alike, whatever else is in the call; without, it is their index.
    Sequences &numbered(std::vector<std::uint32_t> ids) {
        need(ids, count_, "numbers of sequences");
        ids_ = std::move(ids);
        return *this;
    }

    /// Null without numbers.
    const std::uint32_t *ids() const noexcept { return detail::data_or_null(ids_); }

    /// For the C interface; valid while this object is there and unchanged.
    cp_sequences raw() const {
        cp_sequences s = detail::sized<cp_sequences>();
        s.count = count_;
        s.seq_q = seq_q_;
        s.seq_k = seq_k_;
        s.lens_q = detail::data_or_null(lens_[0]);
        s.lens_k = detail::data_or_null(lens_[1]);
        s.before_q = detail::data_or_null(before_[0]);
        s.before_k = detail::data_or_null(before_[1]);
        s.cu_seqlens_q = detail::data_or_null(cu_[0]);
        s.cu_seqlens_k = detail::data_or_null(cu_[1]);
        s.cu_seqlens_q_padded = detail::data_or_null(padded_[0]);
        s.cu_seqlens_k_padded = detail::data_or_null(padded_[1]);
        s.list_q = counts_[0].empty() ? nullptr : list_[0].data();
        s.list_k = counts_[1].empty() ? nullptr : list_[1].data();
        s.list_q_counts = detail::data_or_null(counts_[0]);
        s.list_k_counts = detail::data_or_null(counts_[1]);
        s.slices = detail::data_or_null(slices_);
        s.slice_count = slices_.size();
        return s;
    }

  private:
    Sequences() = default;

    static std::size_t index(Side side) { return side == Side::query ? 0 : 1; }

    template <class T> static void need(const std::vector<T> &v, std::size_t count, const char *what) {
        if (!v.empty() && v.size() != count)
            throw Error(Status::invalid_argument,
                        std::string(what) + ": got " + std::to_string(v.size()) + " numbers, need " + std::to_string(count));
    }

    std::uint32_t count_ = 0, seq_q_ = 0, seq_k_ = 0;
    std::array<std::vector<std::int32_t>, 2> lens_, before_, cu_, padded_;
    std::array<std::vector<cp_stretch>, 2> list_;
    std::array<std::vector<std::uint32_t>, 2> counts_;
    std::vector<std::uint32_t> ids_;
    std::vector<cp_mask_slice> slices_;
};

/// A layer: what stays the same over its calls.
struct AttentionConfig {
    std::uint32_t heads = 0;
    std::uint32_t kv_heads = 0; ///< 0: as heads
    std::uint32_t head_dim_qk = 0;
    std::uint32_t head_dim_v = 0; ///< 0: as head_dim_qk
    DType dtype = DType::f32;
    Format format = Format::dense;
    Partition partition = Partition::zigzag;
    bool causal = false;
    bool bottom_right = false;
    std::int64_t window_left = -1;  ///< keys before the diagonal; negative: no limit
    std::int64_t window_right = -1; ///< keys after the diagonal; negative: no limit
    float softmax_scale = 0;        ///< 0: 1/sqrt(head_dim_qk)
    bool wire_f32 = false;          ///< partial gradients travel as fp32
    bool save = false;              ///< keep head-split tensors for backward
    std::uint32_t max_tokens_per_rank = 0;
    std::uint32_t threads = 0; ///< 0: CP_THREADS from the environment, or 1
    Device device;
    bool deterministic = false;     ///< CUDA: equal bits run after run, at some cost in speed
    std::uint32_t sm_margin = 0;    ///< CUDA: multiprocessors left to others
    std::uint32_t max_segments = 0; ///< CUDA: pieces of the mask in one stage, at most; 0: the library's default
    cp_device_alloc_fn device_alloc = nullptr; ///< CUDA: workspace of calls that bring none; null: the layer keeps its own
    cp_device_free_fn device_free = nullptr;
    void *device_alloc_ctx = nullptr;
    float softcap = 0;               ///< scores x become softcap·tanh(x/softcap); 0: none
    float dropout = 0;               ///< probability of dropping a weight; the seed comes with every forward
    std::vector<float> alibi_slopes; ///< one for every query head; empty: none
    std::uint32_t head_offset = 0;   ///< number of query head 0 in the whole model, for dropout under tensor parallelism
    Reach sinks = Reach::none;       ///< a sink for every query head; how far its gradient goes
    Reach max_logit = Reach::none;   ///< forward writes the largest visible score of every query head
    std::uint32_t bias = 0;          ///< CP_BIAS_*: an additive bias comes with every call; 0: none
    KvWire kv_wire = KvWire::storage; ///< keys and values travel, and are attended, as 8-bit numbers
    std::uint32_t latent_dim = 0;    ///< keys and values are made of latents of so many elements; 0: they are given
    std::uint32_t latent_rope = 0;   ///< and of so many that all heads share

    /// For the C interface; valid while this object is there and unchanged.
    cp_attention_config raw() const {
        if (!alibi_slopes.empty() && alibi_slopes.size() != heads)
            throw Error(Status::invalid_argument, "alibi_slopes: got " + std::to_string(alibi_slopes.size()) + ", need one for each of " +
                                                      std::to_string(heads) + " query heads");
        cp_attention_config c = detail::sized<cp_attention_config>();
        c.flags = flag(causal, CP_ATTENTION_CAUSAL) | flag(bottom_right, CP_ATTENTION_BOTTOM_RIGHT) |
                  flag(window_left >= 0, CP_ATTENTION_WINDOW_LEFT) | flag(window_right >= 0, CP_ATTENTION_WINDOW_RIGHT) |
                  flag(wire_f32, CP_ATTENTION_WIRE_F32) | flag(save, CP_ATTENTION_SAVE) | flag(deterministic, CP_ATTENTION_DETERMINISTIC);
        c.heads = heads;
        c.kv_heads = kv_heads;
        c.head_dim_qk = head_dim_qk;
        c.head_dim_v = head_dim_v;
        c.dtype = static_cast<cp_dtype>(dtype);
        c.format = static_cast<cp_format>(format);
        c.partition = static_cast<cp_partition>(partition);
        c.window_left = keys(window_left);
        c.window_right = keys(window_right);
        c.softmax_scale = softmax_scale;
        c.max_tokens_per_rank = max_tokens_per_rank;
        c.threads = threads;
        c.device_type = device.type;
        c.device_id = device.id;
        c.sm_margin = sm_margin;
        c.max_segments = max_segments;
        c.device_alloc = device_alloc;
        c.device_free = device_free;
        c.device_alloc_ctx = device_alloc_ctx;
        c.softcap = softcap;
        c.dropout = dropout;
        c.alibi_slopes = detail::data_or_null(alibi_slopes);
        c.head_offset = head_offset;
        c.sinks = static_cast<cp_reach>(sinks);
        c.max_logit = static_cast<cp_reach>(max_logit);
        c.bias = bias;
        c.kv_wire = static_cast<cp_kv_wire>(kv_wire);
        c.latent_dim = latent_dim;
        c.latent_rope = latent_rope;
        return c;
    }

  private:
    static std::uint32_t flag(bool on, std::uint32_t value) { return on ? value : 0; }

    /// A window beyond 32 bits is as wide as one that is not there.
    static std::uint32_t keys(std::int64_t window) {
        return window < 0 ? 0 : window > INT32_MAX ? static_cast<std::uint32_t>(INT32_MAX) : static_cast<std::uint32_t>(window);
    }
};

/// How a group communicates for a layer. A communication type alone will do.
struct CommConfig {
    static const std::uint32_t stages_auto = CP_STAGES_AUTO;

    CommType type;
    std::uint32_t stages = 0; ///< 0: what the name stands for
    bool relay = false;
    std::array<std::uint32_t, 2> levels{{0, 0}}; ///< a2a_p2p: ranks inside, and outside; zeros: chosen
    std::uint64_t memory_cap_bytes = 0;          ///< counts with stages_auto

    CommConfig(CommType t = CommType::p2p) : type(t) {}

    cp_comm_config raw() const {
        cp_comm_config c = detail::sized<cp_comm_config>();
        c.flags = relay ? CP_COMM_RELAY : 0;
        c.comm_type = static_cast<cp_comm_type>(type);
        c.stages = stages;
        c.level_count = levels[0] == 0 && levels[1] == 0 ? 0 : 2;
        c.level_sizes[0] = levels[0];
        c.level_sizes[1] = levels[1];
        c.memory_cap_bytes = memory_cap_bytes;
        return c;
    }
};

struct ForwardTensors {
    Tensor q, k, v, out, lse;
    Tensor sinks, max_logit;                        ///< [heads] fp32, where the layer has them
    Tensor bias;                                    ///< [batch or 1, heads or 1, queries or 1, keys], where the layer has one
    std::uint64_t dropout_seed = 0;                 ///< with dropout, equal on all ranks
    const std::uint64_t *dropout_seed_at = nullptr; ///< or, on CUDA, where kernels find it when they run; see CP_FORWARD_SEED_AT
    Tensor latent, up_k, up_v;                      ///< instead of k and v, where the layer has latents; see cp_forward_args

    ForwardTensors() = default;
    ForwardTensors(const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &o, const Tensor &l)
        : q(query), k(key), v(value), out(o), lse(l) {}
};

struct BackwardTensors {
    Tensor q, k, v, out, lse, d_out, dq, dk, dv;
    Tensor sinks, d_sinks; ///< [heads] fp32, where the layer has them
    Tensor bias, d_bias;   ///< where the layer has a bias, and its gradient
    Tensor latent, up_k, up_v, d_latent, d_up_k, d_up_v; ///< instead of k, v, dk and dv, where the layer has latents

    BackwardTensors() = default;
    BackwardTensors(const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &o, const Tensor &l, const Tensor &d_o,
                    const Tensor &d_query, const Tensor &d_key, const Tensor &d_value)
        : q(query), k(key), v(value), out(o), lse(l), d_out(d_o), dq(d_query), dk(d_key), dv(d_value) {}
};

/// What a forward leaves for its backward, also the seed of dropout. Used again, it keeps its memory.
class Context {
  public:
    Context() = default;
    Context(Context &&) = default;
    Context &operator=(Context &&) = default;
    const cp_context &raw() const noexcept { return raw_; }

    /// Memory for what forward saves, aligned to 64, until backward has run: on CUDA, device memory of saved_size bytes, where that is not 0.
    /// On the CPU the context has its own.
    void use_saved(void *memory, std::size_t bytes) noexcept {
        given_ = memory;
        given_bytes_ = bytes;
    }

  private:
    friend class Attention;

    /// Room for the saved buffer, aligned to 64; null for none.
    void *reserve(std::size_t bytes, bool cuda) {
        saved_bytes_ = bytes;
        if (bytes == 0)
            return nullptr;
        if (given_ != nullptr) {
            saved_bytes_ = given_bytes_;
            return given_;
        }
        if (cuda) {
            saved_bytes_ = 0;
            return nullptr; // Refused, on all ranks: saved got NULL.
        }
        if (memory_.size() < bytes + 64)
            memory_.resize(bytes + 64);
        return saved();
    }

    void *saved() {
        if (saved_bytes_ == 0)
            return nullptr;
        if (given_ != nullptr)
            return given_;
        std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory_.data());
        return memory_.data() + (64 - at % 64) % 64;
    }

    cp_context raw_ = cp_context();
    std::vector<unsigned char> memory_;
    std::size_t saved_bytes_ = 0;
    void *given_ = nullptr;
    std::size_t given_bytes_ = 0;
};

/// An attention layer. One call at a time. On the CPU forward and backward block; on CUDA they enqueue on the stream and return, and tensors, workspace
/// and saved buffer stay as they are until the stream is through.
class Attention {
  public:
    explicit Attention(const AttentionConfig &config) : cuda_(config.device.is_cuda()) {
        cp_attention_config raw = config.raw();
        check(cp_attention_create(&raw, &handle_));
    }
    Attention(Attention &&other) noexcept
        : handle_(other.handle_), workspace_(other.workspace_), workspace_bytes_(other.workspace_bytes_), cuda_(other.cuda_) {
        other.handle_ = nullptr;
    }
    Attention &operator=(Attention &&other) noexcept {
        std::swap(handle_, other.handle_);
        std::swap(workspace_, other.workspace_);
        std::swap(workspace_bytes_, other.workspace_bytes_);
        std::swap(cuda_, other.cuda_);
        return *this;
    }
    Attention(const Attention &) = delete;
    Attention &operator=(const Attention &) = delete;
    ~Attention() { cp_attention_destroy(handle_); }

    /// Throws what the constructor and set_group would on a group of `ranks`.
    static void require_support(const AttentionConfig &config, const CommConfig &comm, std::uint32_t ranks) {
        cp_attention_config c = config.raw();
        cp_comm_config m = comm.raw();
        check(cp_query_support(&c, &m, ranks));
    }

    /// Attaches a group. Collective the first time with a group that is no subset. The layer keeps the group alive.
    void set_group(const Group &group, const CommConfig &comm = CommConfig()) {
        cp_comm_config raw = comm.raw();
        check(cp_set_group(handle_, group.get(), &raw));
    }

    /// The layer computes alone.
    void clear_group() { check(cp_set_group(handle_, nullptr, nullptr)); }

    std::size_t workspace_size(std::uint32_t tokens_per_rank) const {
        std::size_t bytes = 0;
        check(cp_attention_workspace_size(handle_, tokens_per_rank, &bytes));
        return bytes;
    }

    /// Memory for the calls that follow, aligned to 64, on CUDA device memory; null for the layer's own, or device_alloc's.
    void use_workspace(void *memory, std::size_t bytes) noexcept {
        workspace_ = memory;
        workspace_bytes_ = bytes;
    }

    std::size_t saved_size(const Sequences &sequences) const {
        cp_sequences s = sequences.raw();
        std::size_t bytes = 0;
        check(cp_attention_saved_size(handle_, &s, &bytes));
        return bytes;
    }

    cp_report report(const Sequences &sequences) const {
        cp_sequences s = sequences.raw();
        cp_report r = detail::sized<cp_report>();
        check(cp_attention_report(handle_, &s, &r));
        return r;
    }

    /// This rank's plan, as text or JSON.
    std::string plan(const Sequences &sequences, Pass pass, PlanFormat format = PlanFormat::text) const {
        cp_sequences s = sequences.raw();
        std::size_t length = 0;
        auto ask = [&](char *text, std::size_t room) {
            check(cp_attention_plan(handle_, &s, static_cast<cp_pass>(pass), static_cast<cp_plan_format>(format), text, room, &length));
        };
        ask(nullptr, 0);
        std::vector<char> text(length + 1);
        ask(text.data(), text.size());
        return std::string(text.data(), length);
    }

    /// Collective over the group. Fills out and lse, and `context` for backward.
    void forward(const Sequences &sequences, const ForwardTensors &t, Context &context, Stream stream = nullptr) {
        cp_sequences s = sequences.raw();
        cp_forward_args a = detail::sized<cp_forward_args>();
        fill(a, s, sequences, t);
        a.max_logit = t.max_logit.raw();
        a.dropout_seed = t.dropout_seed_at != nullptr ? reinterpret_cast<std::uintptr_t>(t.dropout_seed_at) : t.dropout_seed;
        a.flags = t.dropout_seed_at != nullptr ? CP_FORWARD_SEED_AT : 0;
        // Sequences that make no sense are told to all ranks by forward itself, so they are no error yet.
        std::size_t saved = 0;
        if (cp_attention_saved_size(handle_, &s, &saved) != CP_OK)
            saved = 0;
        a.saved = context.reserve(saved, cuda_);
        a.saved_bytes = context.saved_bytes_;
        a.context = &context.raw_;
        check(cp_attention_forward(handle_, &a, stream));
    }

    /// Collective over the group that the forward of `context` used. Fills dq, dk and dv.
    void backward(const Sequences &sequences, const BackwardTensors &t, Context &context, Stream stream = nullptr) {
        cp_sequences s = sequences.raw();
        cp_backward_args a = detail::sized<cp_backward_args>();
        fill(a, s, sequences, t);
        a.context = &context.raw_;
        a.d_out = t.d_out.raw();
        a.dq = t.dq.raw();
        a.dk = t.dk.raw();
        a.dv = t.dv.raw();
        a.d_sinks = t.d_sinks.raw();
        a.d_bias = t.d_bias.raw();
        a.d_latent = t.d_latent.raw();
        a.d_up_k = t.d_up_k.raw();
        a.d_up_v = t.d_up_v.raw();
        a.saved = context.saved();
        a.saved_bytes = context.saved_bytes_;
        check(cp_attention_backward(handle_, &a, stream));
    }

    /// The C handle, still owned by this object.
    cp_attention *get() const noexcept { return handle_; }

  private:
    /// What both passes have.
    template <class Args, class Tensors>
    void fill(Args &a, const cp_sequences &s, const Sequences &sequences, const Tensors &t) const {
        a.sequences = &s;
        a.q = t.q.raw();
        a.k = t.k.raw();
        a.v = t.v.raw();
        a.out = t.out.raw();
        a.lse = t.lse.raw();
        a.sinks = t.sinks.raw();
        a.bias = t.bias.raw();
        a.latent = t.latent.raw();
        a.up_k = t.up_k.raw();
        a.up_v = t.up_v.raw();
        a.sequence_ids = sequences.ids();
        a.workspace = workspace_;
        a.workspace_bytes = workspace_bytes_;
    }

    cp_attention *handle_ = nullptr;
    void *workspace_ = nullptr;
    std::size_t workspace_bytes_ = 0;
    bool cuda_ = false;
};

/// Tokens that a rank holds, in the order of its rows; see cp_partition_tokens.
inline std::vector<std::uint32_t> partition_tokens(Partition partition, Format format, const Sequences &sequences, std::uint32_t ranks,
                                                   std::uint32_t rank, Side side = Side::query) {
    cp_sequences s = sequences.raw();
    std::size_t count = 0;
    std::vector<std::uint32_t> tokens;
    auto ask = [&] {
        check(cp_partition_tokens(static_cast<cp_partition>(partition), static_cast<cp_format>(format), &s, ranks, rank,
                                  static_cast<cp_side>(side), tokens.empty() ? nullptr : tokens.data(), tokens.size(), &count));
    };
    ask();
    tokens.resize(count);
    ask();
    return tokens;
}

/// Smallest length that gives every rank as many tokens; see cp_partition_padded_length.
inline std::uint64_t padded_length(Partition partition, std::uint32_t ranks, std::uint64_t length) {
    std::uint64_t padded = 0;
    check(cp_partition_padded_length(static_cast<cp_partition>(partition), ranks, length, &padded));
    return padded;
}

/// Ranks that work with `rank` along axes of a mesh ("cp", "tp-dp-cp"): what Group::subset takes; see cp_mesh_members.
inline std::vector<std::uint32_t> mesh_members(const cp_mesh &mesh, const std::string &axes, std::uint32_t rank) {
    std::size_t count = 0;
    check(cp_mesh_members(&mesh, axes.c_str(), rank, nullptr, 0, &count, nullptr));
    std::vector<std::uint32_t> members(count);
    check(cp_mesh_members(&mesh, axes.c_str(), rank, members.data(), count, &count, nullptr));
    return members;
}

/// The communication type of each of `layers` layers; see cp_comm_types_per_layer.
inline std::vector<CommType> comm_types_per_layer(const std::string &names, std::size_t layers) {
    std::vector<cp_comm_type> codes(layers > 0 ? layers : 1);
    check(cp_comm_types_per_layer(names.c_str(), layers, codes.data()));
    std::vector<CommType> types(codes.size());
    std::transform(codes.begin(), codes.end(), types.begin(), [](cp_comm_type code) { return static_cast<CommType>(code); });
    return types;
}

/// Where samples of these lengths run, and the number of micro-batches; see cp_schedule_samples.
inline std::pair<std::vector<cp_placement>, std::uint32_t> schedule_samples(cp_schedule_config config, const std::vector<std::uint32_t> &lengths) {
    config.struct_size = sizeof config;
    std::vector<cp_placement> placements(lengths.size());
    std::uint32_t micro_batches = 0;
    check(cp_schedule_samples(&config, lengths.data(), lengths.size(), placements.data(), &micro_batches));
    return {placements, micro_batches};
}

} // namespace cp

#include "context_parallel_trade.hpp"

#endif // CONTEXT_PARALLEL_HPP

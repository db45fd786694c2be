// Sequence <-> heads for layers that are not attention: the part of context_parallel.hpp that is about trades. Include that one.
#ifndef CONTEXT_PARALLEL_TRADE_HPP
#define CONTEXT_PARALLEL_TRADE_HPP

#include "context_parallel.hpp"

namespace cp {

/// Heads of a tensor that a rank has of whole sequences: first, and how many; see cp_trade_share.
inline std::pair<std::uint32_t, std::uint32_t> heads_of_rank(std::uint32_t heads, std::uint32_t tensor_heads, std::uint32_t ranks,
                                                             std::uint32_t rank) {
    std::uint32_t first = 0, count = 0;
    check(cp_trade_share(heads, tensor_heads, ranks, rank, &first, &count));
    return {first, count};
}

/// Sequence <-> heads, for layers that are not attention: see cp_trade_args.
class Trade {
  public:
    explicit Trade(Partition partition, Format format = Format::dense, std::uint32_t heads = 0)
        : partition_(partition), format_(format), heads_(heads) {}

    /// Fills `whole` from `local`. Collective.
    void to_heads(const Group &group, const Sequences &sequences, const std::vector<Tensor> &local, const std::vector<Tensor> &whole,
                  Stream stream = nullptr) const {
        run(cp_sequence_to_heads, group, sequences, local, whole, stream);
    }

    /// Fills `local` from `whole`; of heads that several ranks have, their sum. Collective.
    void to_sequence(const Group &group, const Sequences &sequences, const std::vector<Tensor> &whole, const std::vector<Tensor> &local,
                     Stream stream = nullptr) const {
        run(cp_heads_to_sequence, group, sequences, local, whole, stream);
    }

  private:
    template <class Function>
    void run(Function function, const Group &group, const Sequences &sequences, const std::vector<Tensor> &local,
             const std::vector<Tensor> &whole, Stream stream) const {
        cp_sequences s = sequences.raw();
        cp_trade_args a = detail::sized<cp_trade_args>();
        std::vector<cp_tensor> rows, heads;
        for (const Tensor &t : local) rows.push_back(t.raw());
        for (const Tensor &t : whole) heads.push_back(t.raw());
        rows.resize(std::max(rows.size(), heads.size())); // tensors that are missing are refused, on all ranks
        heads.resize(rows.size());
        a.sequences = &s;
        a.partition = static_cast<cp_partition>(partition_);
        a.format = static_cast<cp_format>(format_);
        a.heads = heads_;
        a.count = static_cast<std::uint32_t>(rows.size());
        a.local = rows.data();
        a.whole = heads.data();
        check(function(group.get(), &a, stream));
    }

    Partition partition_;
    Format format_;
    std::uint32_t heads_;
};

} // namespace cp

#endif // CONTEXT_PARALLEL_TRADE_HPP

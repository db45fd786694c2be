"""Exact attention over sequences split across ranks, forward and backward.

    group = Group.from_env()                                     # under torchrun or mpirun
    layer = Attention(heads=8, kv_heads=2, head_dim=64, dtype="float32", causal=True)
    layer.set_group(group, "p2p")
    sequences = Sequences.dense(batch=1, seq=4096)               # global lengths, equal on all ranks
    mine = partition_tokens("zigzag", "bshd", sequences, group.size, group.rank)
    out, lse, context = layer.forward(q[:, mine], k[:, mine], v[:, mine], sequences)
    dq, dk, dv = layer.backward(context, d_out)

Arrays are NumPy's (also strided, also ml_dtypes.bfloat16), torch's, or any that offer DLPack or the CUDA array interface (CuPy, JAX), used in place.
On GPUs the group and the layer get device="cuda:0", and calls are enqueued on a stream. `context_parallel.torch` has an autograd function.
"""

from ._lib import Error, Status, build_info
from .attention import Attention, Context, alibi_slopes, query_support
from .group import Group, unique_id
from .mesh import Mesh, ParallelState, comm_types_per_layer
from .padding import (
    context_parallel_image_bounds,
    context_parallel_split,
    generate_positional_ids_for_cp,
    get_packed_seq_params,
    get_padding,
    join_context_parallel_ranks,
    pad_cu_seqlens,
    pad_sequence_tail,
    pad_thd_sequences_for_cp,
    padding_factor,
    split_to_context_parallel_ranks,
)
from .partition import Sequences, gather_rows, padded_length, partition_tokens, scatter
from .rows import (
    gather,
    gather_order,
    get_batch_on_this_cp_rank,
    group_gather,
    group_shift,
    local_cu_seqlens,
    loss_scale,
    loss_tokens,
    loss_weights,
    positions,
    rope_rows,
    shift,
    shift_exchange,
    shift_tokens,
)
from .schedule import Schedule, ScheduleCost, schedule_samples
from .slices import mask_slices
from .trade import heads_of_rank, heads_to_sequence, sequence_to_heads, trade_workspace_size

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "Context",
    "Error",
    "Group",
    "Mesh",
    "ParallelState",
    "Schedule",
    "ScheduleCost",
    "Sequences",
    "Status",
    "alibi_slopes",
    "build_info",
    "comm_types_per_layer",
    "context_parallel_image_bounds",
    "context_parallel_split",
    "gather",
    "gather_order",
    "gather_rows",
    "generate_positional_ids_for_cp",
    "get_batch_on_this_cp_rank",
    "get_packed_seq_params",
    "get_padding",
    "group_gather",
    "group_shift",
    "heads_of_rank",
    "heads_to_sequence",
    "join_context_parallel_ranks",
    "local_cu_seqlens",
    "loss_scale",
    "loss_tokens",
    "loss_weights",
    "mask_slices",
    "pad_cu_seqlens",
    "pad_sequence_tail",
    "pad_thd_sequences_for_cp",
    "padded_length",
    "padding_factor",
    "partition_tokens",
    "positions",
    "query_support",
    "rope_rows",
    "scatter",
    "schedule_samples",
    "sequence_to_heads",
    "shift",
    "shift_exchange",
    "shift_tokens",
    "split_to_context_parallel_ranks",
    "trade_workspace_size",
    "unique_id",
]

"""Causal attention over 1000 tokens, split across the ranks that torchrun or mpirun started; every rank compares its rows to one rank's.

    mpirun -n 4 python example.py          torchrun --nproc_per_node 4 example.py
"""

import numpy as np

import context_parallel as cp

group = cp.Group.from_env()
layer = cp.Attention(heads=8, kv_heads=2, head_dim=64, dtype="float32", causal=True)
sequences = cp.Sequences.dense(batch=1, seq=1000)  # of all ranks together; nothing needs to divide

random = np.random.default_rng(0)  # the same on every rank
q, k, v, d_out = (random.standard_normal((1, 1000, heads, 64), np.float32) for heads in (8, 2, 2, 8))
out, _, context = layer.forward(q, k, v, sequences)  # without a group: one rank, the whole sequence
expected = (out, *layer.backward(context, d_out))

mine = cp.partition_tokens("zigzag", "bshd", sequences, group.size, group.rank)
for comm in ("p2p", "all_gather", "a2a", "a2a+p2p"):
    layer.set_group(group, comm)
    out, _, context = layer.forward(q[:, mine], k[:, mine], v[:, mine], sequences)
    results = (out, *layer.backward(context, d_out[:, mine]))
    error = max(abs(result - whole[:, mine]).max() for result, whole in zip(results, expected))
    print(f"rank {group.rank} of {group.size}: {len(mine)} tokens, {comm}: max error {error:.1e}")

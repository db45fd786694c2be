"""Causal attention over 4000 tokens in torch's autograd, split across the GPUs of torchrun's ranks; without GPUs the same on CPUs.

    torchrun --nproc_per_node 8 example_cuda.py
"""

import os

import torch

import context_parallel as cp
from context_parallel.torch import attention

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
group = cp.Group.from_env(device=device)  # on GPUs data goes by NCCL
layer = cp.Attention(heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, causal=True, device=device)
layer.set_group(group, "p2p")

sequences = cp.Sequences.dense(batch=1, seq=4000)  # of all ranks together
mine = cp.partition_tokens("zigzag", "bshd", sequences, group.size, group.rank)
generator = torch.Generator().manual_seed(0)  # the same on every rank
x = torch.randn(1, 4000, 12, 64, generator=generator)[:, mine].to(device, torch.bfloat16).requires_grad_()
q, k, v = x.split((8, 2, 2), dim=2)  # views, used in place

out = attention(layer, q, k, v, sequences)  # on torch's current stream; the host does not wait
out.float().square().sum().backward()
print(f"rank {group.rank} of {group.size} on {device}: {len(mine)} tokens, gradient norm {x.grad.float().norm().item():.3f}")

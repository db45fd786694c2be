"""Attention layers, and sequence ↔ heads, in torch's autograd. Needs torch."""

import torch

from . import trade
from ._lib import argument_error

__all__ = ["attention", "heads_to_sequence", "sequence_to_heads"]


def attention(layer, q, k, v, sequences, *, return_lse=False, sinks=None, dropout_seed=0, sequence_ids=None, bias=None, latent=None,
              up_k=None, up_v=None):  # fmt: skip
    """layer.forward on torch tensors, differentiable in q, k, v, sinks and bias: out, or (out, lse); the lse carries no gradient.

    Of a layer with latents k and v are None, and it is differentiable in latent, up_k and up_v: the gradient of a weight is this rank's part, as that of
    any weight is, and in its storage type.

    The gradient of sinks is the whole group's or this rank's part, as the layer was made: a framework that sums gradients over the group wants "rank".

    Any number of calls may be pending, also of several layers and with groups switched between; backward runs on the group that its forward used. It is
    collective: all ranks must run their backwards in the same order, which they do when they build the same graph. On CUDA it works on torch's
    current stream and never waits for the device.
    """
    if bias is not None and bias.requires_grad and not layer.has_bias_gradient:
        raise argument_error('bias: requires a gradient, which the layer has not: made with bias="111s" or bias_gradient=False')
    out, lse = _Attention.apply(q, k, v, latent, up_k, up_v, sinks, bias, layer, sequences, dropout_seed, sequence_ids)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, latent, up_k, up_v, sinks, bias, layer, sequences, dropout_seed, sequence_ids):
        options = dict(sinks=sinks, dropout_seed=dropout_seed, sequence_ids=sequence_ids, bias=bias, latent=latent, up_k=up_k, up_v=up_v)
        out, lse, context = layer.forward(q, k, v, sequences, **options)
        # autograd keeps the tensors, so that it sees if one is changed in place; the context keeps the rest.
        ctx.save_for_backward(*context.tensors, sinks, bias, latent, up_k, up_v)
        context.tensors = context.sinks = context.bias = context.made_of = None
        ctx.layer, ctx.context = layer, context
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        if not _usable(d_out):
            d_out = d_out.contiguous()  # autograd hands out expanded tensors, as after sum().
        *tensors, sinks, bias, latent, up_k, up_v = ctx.saved_tensors
        context = ctx.context.with_tensors(tensors)
        context.sinks, context.bias, context.made_of = sinks, bias, (latent, up_k, up_v)
        dq, *others = ctx.layer.backward(context, d_out)
        count = 3 if ctx.layer.has_latents else 2
        of_keys, others = others[:count], others[count:]
        of_keys = (None, None, *of_keys) if ctx.layer.has_latents else (*of_keys, None, None, None)
        d_sinks = others.pop(0) if ctx.layer.has_sinks else None
        return dq, *of_keys, d_sinks, *(others or [None]), None, None, None, None


def _usable(gradient):
    """Does the library take it as it lies? The last axis is contiguous; on CUDA everything else lies at multiples of 16 bytes."""
    if gradient.dim() == 0 or gradient.stride(-1) != 1:
        return gradient.dim() == 0
    steps = [gradient.data_ptr(), *(stride * gradient.element_size() for stride in gradient.stride()[:-1])]
    return not gradient.is_cuda or all(step % 16 == 0 for step in steps)


def sequence_to_heads(group, local, sequences, *, format="bshd", partition="zigzag", heads=None):
    """context_parallel.sequence_to_heads on torch tensors, differentiable: its backward is heads_to_sequence, which sums over the ranks that have a head.

    Both directions are collective, and so are their backwards: all ranks run them in the same order. One exchange each for all tensors of a call.
    """
    several = isinstance(local, (list, tuple))
    tensors = list(local) if several else [local]
    heads = heads or max((t.shape[format.index("h")] for t in tensors), default=None)
    how = dict(format=format, partition=partition, heads=heads)
    made = _ToHeads.apply(group, sequences, how, *tensors)
    return list(made) if several else made[0]


def heads_to_sequence(group, whole, sequences, *, format="bshd", partition="zigzag", heads=None, tensor_heads=None):
    """context_parallel.heads_to_sequence on torch tensors, differentiable: its backward is sequence_to_heads, which gives a head to all ranks that have it."""
    several = isinstance(whole, (list, tuple))
    tensors = list(whole) if several else [whole]
    heads = heads or (tensors[0].shape[format.index("h")] * group.size if tensors else None)
    how = dict(format=format, partition=partition, heads=heads)
    made = _ToSequence.apply(group, sequences, how, tensor_heads, *tensors)
    return list(made) if several else made[0]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, sequences, how, *tensors):
        ctx.call = (group, sequences, how, [t.shape[how["format"].index("h")] for t in tensors])
        return tuple(trade.sequence_to_heads(group, [_readable(t) for t in tensors], sequences, **how))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        group, sequences, how, tensor_heads = ctx.call
        return None, None, None, *trade.heads_to_sequence(group, [_readable(g) for g in gradients], sequences, tensor_heads=tensor_heads, **how)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, sequences, how, tensor_heads, *tensors):
        ctx.call = (group, sequences, how)
        return tuple(trade.heads_to_sequence(group, [_readable(t) for t in tensors], sequences, tensor_heads=tensor_heads, **how))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        group, sequences, how = ctx.call
        return None, None, None, None, *trade.sequence_to_heads(group, [_readable(g) for g in gradients], sequences, **how)


def _readable(tensor):
    """Anything goes but a last axis with gaps, or of one number, as after sum()."""
    return tensor if tensor.dim() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

"""Attention layers in torch's autograd. Needs torch."""

import torch

__all__ = ["attention"]


def attention(layer, q, k, v, sequences, *, return_lse=False, sinks=None, dropout_seed=0, sequence_ids=None):
    """layer.forward on torch tensors, differentiable in q, k, v and sinks: out, or (out, lse); the lse carries no gradient.

    The gradient of sinks is the whole group's or this rank's part, as the layer was made: a framework that sums gradients over the group wants "rank".

    Any number of calls may be pending, also of several layers and with groups switched between; backward runs on the group that its forward used. It is
    collective: all ranks must run their backwards in the same order, which they do when they build the same graph. On CUDA it works on torch's
    current stream and never waits for the device.
    """
    out, lse = _Attention.apply(q, k, v, sinks, layer, sequences, dropout_seed, sequence_ids)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, layer, sequences, dropout_seed, sequence_ids):
        out, lse, context = layer.forward(q, k, v, sequences, sinks=sinks, dropout_seed=dropout_seed, sequence_ids=sequence_ids)
        # autograd keeps the tensors, so that it sees if one is changed in place; the context keeps the rest.
        ctx.save_for_backward(*context.tensors)
        context.tensors = None
        ctx.layer, ctx.context = layer, context
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        if not _usable(d_out):
            d_out = d_out.contiguous()  # autograd hands out expanded tensors, as after sum().
        context = ctx.context.with_tensors(ctx.saved_tensors)
        dq, dk, dv, *d_sinks = ctx.layer.backward(context, d_out)
        return dq, dk, dv, *(d_sinks or [None]), None, None, None, None


def _usable(gradient):
    """Does the library take it as it lies? The last axis is contiguous; on CUDA everything else lies at multiples of 16 bytes."""
    if gradient.dim() == 0 or gradient.stride(-1) != 1:
        return gradient.dim() == 0
    steps = [gradient.data_ptr(), *(stride * gradient.element_size() for stride in gradient.stride()[:-1])]
    return not gradient.is_cuda or all(step % 16 == 0 for step in steps)

"""Context parallelism of Mamba-2 layers. Needs torch.

The convolution and the scan run over whole sequences and treat heads apart. So after in_proj every rank trades its rows of all heads for whole sequences of
some heads, works on these with its slices of the parameters, and trades y back (Ulysses' exchange, as in Megatron):

    cp = MambaContextParallel(group, d_inner, nheads, ngroups, d_state, conv1d, dt_bias, A_log, D, D_has_hdim)
    zxBCdt = cp.pre_conv_ssm(in_proj(hidden), sequences)        # [all tokens, batch, this rank's z, x, B, C, dt]
    …                                                           # cp.conv1d, the scan with cp.get_A_log(), cp.get_D(), cp.get_dt_bias()
    out_proj(cp.post_conv_ssm(y, sequences))                    # [local tokens, batch, d_inner]

Names are those of Megatron's class of this name. Differences: sequences, partition and format are arguments, so packed sequences, padding and every partition
work; z, x, B, C and dt travel in one exchange instead of five, and groups that several ranks need are not repeated before it; with uneven=True nothing
has to divide. All parameters stay whole on every rank; a rank's gradient of a slice is its part of the sum over ranks.
"""

import torch
import torch.nn.functional as F

from ._lib import argument_error
from .torch import heads_to_sequence, sequence_to_heads
from .trade import heads_of_rank

__all__ = ["MambaContextParallel", "shares"]


def shares(nheads, ngroups, cp_size, rank, *, tp_size=1, uneven=False):
    """(heads, groups) of a rank, as ranges, of a layer with `nheads` heads and `ngroups` groups on every tensor-parallel rank.

    Even shares follow Megatron's rules, and what breaks them is an error: nheads is a multiple of cp_size; so is ngroups, or it divides cp_size, and then
    cp_size/ngroups consecutive ranks have the same group. uneven=True: any numbers with at least one head per rank; the heads of a rank may then begin or
    end within a group, and the scan needs MambaContextParallel.head_groups. `tp_size` is only for the texts of errors.
    """
    per_tp = "" if tp_size == 1 else f" on each of {tp_size} tensor-parallel ranks"
    got = f"got nheads {nheads} and ngroups {ngroups}{per_tp}, cp_size {cp_size}"
    if nheads < 1 or ngroups < 1 or nheads % ngroups:
        raise argument_error(f"nheads must be evenly divisible by ngroups: {got}")
    if nheads < cp_size:
        raise argument_error(f"nheads must be at least tp_size * cp_size, so that every rank has a head: {got}")
    if not uneven:
        rest = f": {got} (uneven=True does without, if the scan takes a group for every head)"
        if nheads % cp_size:
            raise argument_error("nheads must be evenly divisible by tp_size * cp_size" + rest)
        if ngroups < cp_size and cp_size % ngroups:
            raise argument_error("cp_size must be evenly divisible by ngroups/tp_size" + rest)
        if ngroups >= cp_size and ngroups % cp_size:
            raise argument_error("ngroups must be evenly divisible by tp_size * cp_size" + rest)
    return heads_of_rank(nheads, cp_size, rank), heads_of_rank(nheads, cp_size, rank, ngroups)


class MambaContextParallel:
    """What one rank does of a Mamba-2 layer.

    cp_group: a context_parallel.Group. d_inner_local_tp, nheads_local_tp, ngroups_local_tp: of this tensor-parallel rank; d_state: of the layer. conv1d_cp1,
    dt_bias_cp1, A_log_cp1, D_cp1: the parameters that one rank alone would use; D_has_hdim: D has d_inner numbers instead of nheads. uneven: see shares.

    Attributes: nheads_local_tpcp, ngroups_local_tpcp, d_inner_local_tpcp: what this rank has; heads, groups: which, as ranges; head_groups: for every one
    of its heads the group, counted from its first (with even shares: every nheads_local_tpcp/ngroups_local_tpcp heads the next one).
    """

    def __init__(self, cp_group, d_inner_local_tp, nheads_local_tp, ngroups_local_tp, d_state, conv1d_cp1, dt_bias_cp1, A_log_cp1, D_cp1, D_has_hdim,
                 *, tp_size=1, uneven=False):  # fmt: skip
        if d_inner_local_tp % nheads_local_tp:
            raise argument_error(f"d_inner must be evenly divisible by nheads: got {d_inner_local_tp} and {nheads_local_tp}")
        self.cp_group, self.cp_size, self.cp_rank = cp_group, cp_group.size, cp_group.rank
        self.d_inner_local_tp, self.nheads_local_tp, self.ngroups_local_tp = d_inner_local_tp, nheads_local_tp, ngroups_local_tp
        self.d_state, self.headdim, self.D_has_hdim = d_state, d_inner_local_tp // nheads_local_tp, D_has_hdim
        self.conv1d_cp1, self.dt_bias_cp1, self.A_log_cp1, self.D_cp1 = conv1d_cp1, dt_bias_cp1, A_log_cp1, D_cp1
        self.heads, self.groups = shares(nheads_local_tp, ngroups_local_tp, self.cp_size, self.cp_rank, tp_size=tp_size, uneven=uneven)
        self.nheads_local_tpcp, self.ngroups_local_tpcp = len(self.heads), len(self.groups)
        self.d_inner_local_tpcp = len(self.heads) * self.headdim
        per_group = nheads_local_tp // ngroups_local_tp
        self.head_groups = [head // per_group - self.groups.start for head in self.heads]

    def pre_conv_ssm(self, input_, sequences, *, partition="zigzag", format="sbhd", has_z=True):
        """[this rank's tokens, batch, (z, x, B, C, dt) of all heads] → [all tokens in sequence order, batch, the same of this rank's heads and groups].

        format: "sbhd" as above, "bshd" with the batch first, "thd" packed, [tokens, channels]. has_z=False: the input has no z: a layer that gates after
        the way back (in a norm over all channels) keeps its own rows of z. Padding rows of the result are 0. Collective; differentiable.
        """
        heads, groups = (self.nheads_local_tp, self.headdim), (self.ngroups_local_tp, self.d_state)
        parts = [heads, heads, groups, groups, (self.nheads_local_tp, 1)][0 if has_z else 1 :]
        widths = [h * dim for h, dim in parts]
        if input_.shape[-1] != sum(widths):
            raise argument_error(f"input_: got {input_.shape[-1]} channels, need {sum(widths)} = {' + '.join(map(str, widths))}")
        local = [t.unflatten(-1, part) for t, part in zip(input_.split(widths, -1), parts)]
        whole = sequence_to_heads(self.cp_group, local, sequences, format=format, partition=partition, heads=self.nheads_local_tp)
        return torch.cat([t.flatten(-2) for t in whole], -1)

    def split(self, whole, *, has_z=True):
        """z, x, B, C, dt of what pre_conv_ssm returned; x, B and C together are the convolution's channels."""
        state = self.ngroups_local_tpcp * self.d_state
        return whole.split([self.d_inner_local_tpcp] * (2 if has_z else 1) + [state, state, self.nheads_local_tpcp], -1)

    def post_conv_ssm(self, input_, sequences, *, partition="zigzag", format="sbhd"):
        """[all tokens, batch, this rank's part of d_inner] → [this rank's tokens, batch, d_inner]. A list makes one exchange of several. Collective."""
        several = isinstance(input_, (list, tuple))
        whole = [t.unflatten(-1, (self.nheads_local_tpcp, self.headdim)) for t in (input_ if several else [input_])]
        local = heads_to_sequence(self.cp_group, whole, sequences, format=format, partition=partition, heads=self.nheads_local_tp)
        local = [t.flatten(-2) for t in local]
        return local if several else local[0]

    def conv1d(self, input_):
        """The convolution of this rank's channels, [batch, channels, all tokens], with the strides, padding and dilation of conv1d_cp1."""
        conv = self.conv1d_cp1
        weight, bias = self.get_conv1d_weight(), self.get_conv1d_bias()
        return F.conv1d(input_, weight, bias, conv.stride, conv.padding, conv.dilation, self.conv1d_channels())

    def conv1d_channels(self):
        """Channels of this rank's convolution: its part of x, of B, and of C."""
        return self.d_inner_local_tpcp + 2 * self.ngroups_local_tpcp * self.d_state

    def get_conv1d_weight(self):
        """This rank's rows of the convolution's weight, [channels, 1, width]: those of x, then B, then C."""
        return self._conv(self.conv1d_cp1.weight)

    def get_conv1d_bias(self):
        """The same of its bias; None if it has none."""
        return None if self.conv1d_cp1.bias is None else self._conv(self.conv1d_cp1.bias)

    def get_dt_bias(self):
        """dt_bias of this rank's heads."""
        return self.dt_bias_cp1[self.heads.start : self.heads.stop]

    def get_A_log(self):
        """A_log of this rank's heads."""
        return self.A_log_cp1[self.heads.start : self.heads.stop]

    def get_D(self):
        """D of this rank's heads, or with D_has_hdim of its part of d_inner."""
        width = self.headdim if self.D_has_hdim else 1
        return self.D_cp1[self.heads.start * width : self.heads.stop * width]

    def _conv(self, parameter):
        state = self.ngroups_local_tp * self.d_state
        x, B, C = parameter.split([self.d_inner_local_tp, state, state])
        heads, groups = ((mine.start * width, mine.stop * width) for mine, width in ((self.heads, self.headdim), (self.groups, self.d_state)))
        return torch.cat([x[slice(*heads)], B[slice(*groups)], C[slice(*groups)]])

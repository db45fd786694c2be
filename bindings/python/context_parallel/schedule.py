"""Which samples of a batch run on which ranks, and on how many: hybrid and dynamic context parallelism.

    made = schedule_samples([61440, 9000, 3000, 700], ranks=8, tokens_per_rank=8192)
    for micro_batch, first_rank, rank_count, samples in made.packs(rank):
        ...                                         # one forward and backward of these samples, packed, on these ranks
    made.sample_id_groups()[micro_batch][rank]      # the same as Megatron has it: ids of the samples that the rank runs, in order
"""

from collections import namedtuple
from ctypes import byref, c_double, c_uint32

import numpy as np

from . import _abi
from ._arrays import on_host
from ._lib import argument_error, check, lib, number
from .partition import choice

# Seconds per (query, key) pair, per token, per token that other ranks hold, per pack and further rank, per pack: include/context_parallel.h.
ScheduleCost = namedtuple("ScheduleCost", "pair token wire rank call")

Pack = namedtuple("Pack", "micro_batch first_rank rank_count samples")

_SCHEDULERS = {
    "nested": _abi.CP_SCHEDULER_NESTED,
    "megatron": _abi.CP_SCHEDULER_MEGATRON,
    "dynamic": _abi.CP_SCHEDULER_DYNAMIC,
    "dp_balanced": _abi.CP_SCHEDULER_DP_BALANCED,
}


class Schedule:
    """Where every sample runs.

    placements: an array of [micro-batch, first rank, number of ranks, pack], a row per sample. Samples of a micro-batch with equal ranks and equal pack run
    in one call. A rank runs its packs widest range first, those of one range in order. micro_batches: how many; a barrier is between them.
    """

    def __init__(self, config, lengths, placements, micro_batches):
        self._config, self._lengths = config, lengths
        self.placements, self.micro_batches = placements, micro_batches

    def packs(self, rank=None):
        """All packs, or those of a rank, in the order in which ranks run them: Pack(micro_batch, first_rank, rank_count, samples), the longest sample first."""
        micro_batch, first, count, pack = self.placements.T.astype(np.int64)
        # The last key counts most: micro-batch, widest range, first rank, pack, longest sample.
        order = np.lexsort((-self._lengths.astype(np.int64), pack, first, -count, micro_batch))
        made, last = [], None
        for sample, placement in zip(order.tolist(), self.placements[order].tolist()):
            if placement != last:
                made.append(Pack(*placement[:3], []))
            made[-1].samples.append(sample)
            last = placement
        return [p for p in made if rank is None or p.first_rank <= rank < p.first_rank + p.rank_count]

    def sample_id_groups(self):
        """[micro-batch][rank] → list of sample ids, in the order in which the rank runs them; a sample's cp size is the number of ranks that list it."""
        groups = [[[] for _ in range(self._config.ranks)] for _ in range(self.micro_batches)]
        for pack in self.packs():
            for rank in range(pack.first_rank, pack.first_rank + pack.rank_count):
                groups[pack.micro_batch][rank] += pack.samples
        return groups

    def time(self):
        """Seconds of one layer, forward and backward, by the model of cost, and seconds that no schedule of these samples can beat."""
        seconds, bound = c_double(), c_double()
        lengths, placements = self._lengths, np.ascontiguousarray(self.placements, np.uint32)
        check(lib.cp_schedule_time(byref(self._config), lengths.ctypes.data, len(lengths), placements.ctypes.data, byref(seconds), byref(bound)))
        return seconds.value, bound.value


def schedule_samples(lengths, ranks, tokens_per_rank, scheduler="nested", cp_size=0, cost=None):
    """Decides where samples of these lengths run; every rank finds the same.

    ranks: dp·cp. tokens_per_rank: most tokens of one pack that a rank holds (Megatron's max_seqlen_per_dp_cp_rank). scheduler: "nested" (ours: any cp size,
    packs, one micro-batch), "megatron" (BalancedCPScheduler), "dynamic" (Megatron's dev branch; cp_size: its smallest), "dp_balanced" (cp_size for all).
    cost: a ScheduleCost, or None for a layer of Llama 3 8B on H100s.
    """
    given = on_host(lengths)
    if given.ndim != 1 or (given.size > 0 and given.dtype.kind not in "iu"):
        raise argument_error(f"lengths: got an array of {given.dtype} with shape {given.shape}, need a list of integers")
    if given.size > 0 and not 0 <= given.min() <= given.max() < 2**32:
        raise argument_error(f"lengths: got values from {given.min()} to {given.max()}, must fit in 32 bits")
    lengths = np.array(given, np.uint32)
    config = _abi.cp_schedule_config(
        ranks=number("ranks", ranks),
        tokens_per_rank=number("tokens_per_rank", tokens_per_rank),
        scheduler=choice("scheduler", scheduler, _SCHEDULERS),
        cp_size=number("cp_size", cp_size),
    )
    for name, value in ScheduleCost(*cost)._asdict().items() if cost is not None else ():
        setattr(config, f"cost_{name}", value)
    placements, micro_batches = np.zeros((len(lengths), 4), np.uint32), c_uint32()
    check(lib.cp_schedule_samples(byref(config), lengths.ctypes.data, len(lengths), placements.ctypes.data, byref(micro_batches)))
    return Schedule(config, lengths, placements, micro_batches.value)

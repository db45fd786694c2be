#!/usr/bin/env python3
"""Runs Megatron's own schedulers on small batches and prints what they assigned: tests/data/megatron_schedules.txt, with which the tests
compare src/schedule/megatron.rs and src/schedule/dynamic.rs.

usage: megatron_schedules.py SITE_PACKAGES DATASETS > tests/data/megatron_schedules.txt

SITE_PACKAGES is where `pip install --no-deps megatron-core==0.16.1` put it (BalancedCPScheduler). DATASETS is the folder megatron/core/datasets of
Megatron-LM's dev branch at commit d48bd6be0a85cc0d6d3cc71e8750cf357cc6bdb1 (2026-08-21), of which data_schedule.py and data_schedule_utils.py
are read (DefaultDynamicCPScheduler's next_hdp_group_packing_aware, DpBalancedScheduler). All three are plain Python; what the files import
beside that is replaced by mocks, so neither PyTorch nor a GPU is needed.
"""

import importlib.util
import itertools
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

HEADER = """\
# Megatron's assignments, made by tests/tools/megatron_schedules.py. One case a line, three fields separated by |:
#   scheduler ranks M ...   balanced: megatron-core 0.16.1; dynamic: dev branch at d48bd6b, 4th number min_cp; dp_balanced: same, 4th number cp
#   lengths of the samples, by id
#   groups (micro-batches) separated by ;  each a list of COUNTxIDS: so many consecutive ranks run these samples in this order.
#                           `refused`: Megatron raises an assertion or an index error
"""


def load(path, *mocked):
    for name in mocked:
        sys.modules[name] = MagicMock(name=name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(groups):
    def one(group):
        return " ".join(f"{len(list(run))}x{','.join(map(str, ids))}" for ids, run in itertools.groupby(group))

    return " ; ".join(map(one, groups))


def lengths(random, ranks, m, least):
    """A batch: log-uniform lengths, a spoonful of long ones, or something regular."""
    most = ranks * m
    kind = random.randrange(6) if least == 1 else 1
    count = random.randint(least, least + (4 * ranks if ranks < 16 else 2 * ranks))
    if kind == 0:
        return [random.choice([m // 2, m, 2 * m, most]) for _ in range(count)]
    if kind == 1:
        return [random.randint(1, m) for _ in range(count)]
    if kind == 2:
        return [int(most ** random.random()) for _ in range(random.randint(1, 3))]
    if kind == 3:
        return [random.randint(1, m // 4) for _ in range(count)] + [random.randint(most // 2, most) for _ in range(random.randint(1, 2))]
    return [max(1, int(most ** random.uniform(0.3, 1))) for _ in range(count)]


def main():
    site, datasets = map(Path, sys.argv[1:])
    mocks = ("torch", "megatron", "megatron.core", "megatron.core.parallel_state", "megatron.core.rerun_state_machine")
    balanced = load(site / "megatron/core/pipeline_parallel/hybrid_cp_schedule.py", *mocks)
    utils = load(datasets / "data_schedule_utils.py", "megatron.core.extensions", "megatron.core.extensions.transformer_engine")
    sys.modules["megatron.core.datasets"] = MagicMock()
    sys.modules["megatron.core.datasets.data_schedule_utils"] = utils
    others = ("packed_seq_params", "process_groups_config", "transformer", "transformer.multi_token_prediction", "pipeline_parallel")
    sys.modules["megatron.core.pipeline_parallel.hybrid_cp_schedule"] = balanced
    packing = load(datasets / "data_schedule.py", *(f"megatron.core.{name}" for name in others))

    def run_balanced(samples, ranks, m, _):
        scheduler = balanced.BalancedCPScheduler(m, SimpleNamespace(size=lambda: ranks))
        return scheduler.get_groups_and_subsamples(samples, None)[1]

    def run_dynamic(samples, ranks, m, least):
        groups = []
        while samples:
            _, samples, _, ids = utils.next_hdp_group_packing_aware(samples, ranks, m, least)
            groups.append(ids)
        return groups

    def run_dp_balanced(samples, ranks, m, cp):
        this = SimpleNamespace(
            max_seq_len_all_ranks=m * cp, max_num_seqs=None, dp_size=ranks // cp, cp_size=cp, microbatch_group_size_per_vp_stage=None
        )
        return packing.DpBalancedScheduler.get_groups_and_subsamples(this, samples)

    print(HEADER, end="")
    for name, run, more, extra in (
        ("balanced", run_balanced, (6, 12), (0,)),
        ("dynamic", run_dynamic, (6, 12), (1, 2)),
        ("dp_balanced", run_dp_balanced, (6,), (1, 2)),
    ):
        r = random.Random(name)
        for ranks in (2, 4, 8, 16, 32, *more):
            for _ in range(4 if name == "dp_balanced" else 8):
                m = r.choice([64, 100, 256, 1000, 4096, 8192])
                fourth = r.choice(extra)
                if name == "dp_balanced":
                    batch = lengths(r, fourth, m, ranks // fourth)
                else:
                    # What needs more than the largest power of two is refused where it is not all ranks; once in four is enough.
                    batch = lengths(r, ranks if r.randrange(4) == 0 else 1 << (ranks.bit_length() - 1), m, 1)
                try:
                    made = text(run(list(enumerate(batch)), ranks, m, fourth))
                except (AssertionError, IndexError):
                    made = "refused"
                numbers = [ranks, m] + ([] if name == "balanced" else [fourth])
                print(f"{name} {' '.join(map(str, numbers))} | {' '.join(map(str, batch))} | {made}")


main()

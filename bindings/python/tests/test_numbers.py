"""The corpus on ranks that are threads, within the error contract: communication types, storage types, formats, strides, 1 to 5 ranks."""

import pytest

from corpus import DTYPES, cases, check
from ranks import collect, everywhere, give_back, run_case, strided, thread_groups

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
RANKS = (2, 3, 4, 5, 1)
# Settings of the layer (and one of run_case), and of the communication type p2p.
OPTIONS = ({}, {"save": True}, {"wire_fp32": True}, {"threads": 2}, {"workspace": True}, {"max_tokens_per_rank": 1000}, {})
P2P_OPTIONS = ({}, {"relay": True}, {"stages": 1}, {"stages": "auto", "memory_cap": 1 << 30})

# The C ABI gives packed sequences padding after the tokens only.
LEFT_OUT = {"thd_padded_left_and_between"}
NAMES = [name for name in cases() if name not in LEFT_OUT]


def run(name, dtype, index):
    """One of the many ways to run a case; consecutive indices go through all pairs of communication type and ranks."""
    case, comm, ranks = cases()[name], COMMS[index % 4], RANKS[index % 5]
    turn = index // 20 + index
    format = "bhsd" if case.format == "bshd" and turn % 3 == 0 else case.format
    comm_options = P2P_OPTIONS[turn % len(P2P_OPTIONS)] if comm == "p2p" and ranks > 1 else {}
    options = OPTIONS[turn % len(OPTIONS)]
    view = strided if turn % 2 else lambda x: x
    how = f"{name} {dtype} {comm} ranks={ranks} {format} {options} {comm_options} {'strided' if turn % 2 else ''}"
    groups = thread_groups(ranks)
    work = lambda group: run_case(group, case, dtype, comm, format=format, view=view, preallocate=turn % 5 < 3, comm_options=comm_options, **options)
    try:
        check(case, dtype, collect(case, everywhere(groups, work), format))
    except Exception as error:
        raise AssertionError(f"{how}: {error}") from error
    give_back(groups)


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in NAMES if "fast" in cases()[name].tags])
def test_fast(name):
    index = NAMES.index(name)
    run(name, list(DTYPES)[index % 3], index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_case(name, dtype):
    index = NAMES.index(name) * 3 + list(DTYPES).index(dtype)
    for i in range(5):
        run(name, dtype, index * 4 + i + index)

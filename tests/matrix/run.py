#!/usr/bin/env python3
"""TransformerEngine's context-parallel test matrix on this library's CPU backend: README.md beside this file says what is run and judged."""

import argparse
import csv
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # heads are shared out among threads, matrix products are not
sys.path[:0] = [str(ROOT / "bindings/python"), str(ROOT / "bindings/python/tests")]

import numpy as np

import context_parallel as cp
from corpus import DTYPES, SHAPES
from oracle import Oracle, has_d_bias, inputs
from ranks import bias_rows, everywhere, from_local, to_local
from table import FULL, not_offered, runs

TENSORS = ("out", "lse", "dq", "dk", "dv", "d_bias", "d_sinks", "max_logit")
JUDGED = [name for name in TENSORS if name != "lse"]  # TransformerEngine does not look at the LSE
COLUMNS = ["config", "format", "comm", "dtype", "ranks", "seq", "result", *(f"share_{name}" for name in TENSORS), *(f"l2_{name}" for name in JUDGED),
           "te_share", "te_tensor", "seconds", "why"]  # fmt: skip


class Groups:
    """Threads as ranks, with a deadline for calls of many minutes."""

    def __init__(self):
        self.made = {}

    def each(self, ranks, work):
        groups = self.made.pop(ranks, None) or cp.Group.threads(ranks, timeout=3600)
        found = everywhere(groups, work, deadline=3600)
        self.made[ranks] = groups  # not after a failure: such a group is aborted
        return found


def compute(run, given, groups):
    """The case on all its ranks: global results as [token, head, dim] in storage type, and the seconds that forward and backward took."""
    case, dtype = run.setup.case, run.setup.dtype
    format = "thd" if case.format == "thd" else run.format
    sequences = case.sequences(run.ranks)
    tokens = [{side: cp.partition_tokens(case.partition, format, sequences, run.ranks, rank, side) for side in "qk"} for rank in range(run.ranks)]
    whole = {name: np.full((case.tokens(side), getattr(case, h), getattr(case, d)), np.nan, DTYPES[dtype]) for name, (side, h, d) in SHAPES.items()}
    whole["lse"] = np.full((case.tokens("q"), case.heads), np.nan, np.float32)
    if has_d_bias(case):
        whole["d_bias"] = np.full(case.bias_shape(), np.nan, DTYPES[dtype])
    numbers = {"d_sinks": [], "max_logit": []}
    lock = threading.Lock()

    def work(group):
        mine = tokens[group.rank]
        local = {name: to_local(case, given[name], mine["k" if name in "kv" else "q"], format) for name in ("q", "k", "v", "d_out")}
        score = {"sinks": given["sinks"].copy()} if case.sinks else {}
        if case.bias:
            score["bias"] = np.ascontiguousarray(given["bias"][:, :, bias_rows(case, mine["q"])])
        with case.layer(dtype, format=format) as layer:
            layer.set_group(group, run.comm, **({"inner_size": 2} if run.comm == "a2a+p2p" else {}))
            started = time.monotonic()
            out, lse, context = layer.forward(local["q"], local["k"], local["v"], sequences, **score)
            dq, dk, dv, *rest = layer.backward(context, local["d_out"])
            seconds = time.monotonic() - started
        with lock:
            for name, array in (("out", out), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)):
                from_local(case, whole[name], mine["k" if name in ("dk", "dv") else "q"], array, format)
            if case.sinks:
                numbers["d_sinks"].append(rest[0])
            if case.max_logit:
                numbers["max_logit"].append(context.max_logit)
            if has_d_bias(case):
                whole["d_bias"][:, :, bias_rows(case, mine["q"])] = rest[-1]
        return seconds

    seconds = max(groups.each(run.ranks, work))
    for name, of_ranks in numbers.items():
        if of_ranks:
            if not all(np.array_equal(of_rank, of_ranks[0]) for of_rank in of_ranks):
                raise AssertionError(f"{name}: differs between ranks: {of_ranks}")
            whole[name] = of_ranks[0]
    return whole, seconds


def blank(key, seq, ranks, **fields):
    return dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, key)) | {"seq": seq, "ranks": ranks} | fields


def refusal(run, seq):
    """The row of a case that the library refuses, or None. The tables say which may be: others have failed."""
    case = run.setup.case
    offered, why = cp.query_support(
        run.ranks, run.comm, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.dim_qk, head_dim_v=case.dim_v, dtype=run.setup.dtype, causal=case.causal,
        window=(case.left, case.right), format=case.format, partition=case.partition, bias=case.bias, sinks=case.sinks, max_logit=case.max_logit,
        **({"inner_size": 2} if run.comm == "a2a+p2p" else {}))  # fmt: skip
    if offered:
        return None
    return blank(run.key, seq, run.ranks, result="not offered" if run.may_be_refused else "FAILED", why=why)


def row_of(run, seq, oracle, given, groups):
    row = blank(run.key, seq, run.ranks)
    try:
        whole, seconds = compute(run, given, groups)
    except (cp.Error, AssertionError) as error:
        return row | {"result": "FAILED", "why": str(error)}
    found = oracle.compare(whole)
    row |= {f"share_{name}": f"{found[name][0]:.4f}" for name in found}
    row |= {f"l2_{name}": f"{found[name][1]:.3e}" for name in found if name in JUDGED}
    tensor = max((name for name in found if name in JUDGED), key=lambda name: np.nan_to_num(found[name][2], nan=np.inf))
    passed = all(ours <= 1 and theirs <= 1 for ours, _, theirs in found.values())
    return row | {"te_share": f"{found[tensor][2]:.4f}", "te_tensor": tensor, "seconds": f"{seconds:.3f}", "result": "passed" if passed else "FAILED"}


def read(path):
    """The rows of a result file, by key. Those that failed or were cut off while being written leave the file: they are run again."""
    if not path or not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["why"] is not None and row["result"] != "FAILED"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return {tuple(row[name] for name in COLUMNS[:4]): row for row in rows}


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def summary(rows, command):
    """The result file in short, as Markdown."""
    done = [row for row in rows if row["result"] != "not offered"]
    failed = [row for row in done if row["result"] != "passed"]
    lines = ["# TransformerEngine's matrix: results", "", f"`{command}`", "", f"Machine: {machine()}. Library: {json.loads(cp.build_info())['version']}.", ""]
    seconds = sum(float(row["seconds"] or 0) for row in done)
    lines += [f"{len(done)} cases: {len(done) - len(failed)} passed, {len(failed)} failed; {seconds:.0f} s inside forward and backward."]
    refused = Counter(row["why"] for row in rows if row["result"] == "not offered")
    lines += [f"{count} rows are not offered: {why}." for why, count in refused.items()]
    lines += ["", "The worst of all cases. Contract and TransformerEngine: error as a share of what is allowed.", ""]
    lines += ["| type | tensor | of the contract | relative L2 of a head | the case |", "|---|---|---|---|---|"]
    for dtype in ("bfloat16", "float16"):
        for name in TENSORS:
            of = [row for row in done if row["dtype"] == dtype and row[f"share_{name}"]]
            if of:
                worst = max(of, key=lambda row: float(row[f"share_{name}"]))
                l2 = max((row[f"l2_{name}"] for row in of), key=float) if name in JUDGED else "–"
                lines += [f"| {dtype} | {name} | {worst[f'share_{name}']} | {l2} | {worst['config']} {worst['format']} {worst['comm']} |"]
    lines += ["", "| type | TransformerEngine's tolerance | tensor | the case |", "|---|---|---|---|"]
    for dtype in ("bfloat16", "float16"):
        of = [row for row in done if row["dtype"] == dtype and row["te_share"]]
        if of:
            worst = max(of, key=lambda row: float(row["te_share"]))
            lines += [f"| {dtype} | {worst['te_share']} | {worst['te_tensor']} | {worst['config']} {worst['format']} {worst['comm']} |"]
    if failed:
        lines += ["", "## Failed", ""] + [f"- {' '.join(row[name] for name in COLUMNS[:4])}: {row['why'] or 'see the file'}" for row in failed]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq", type=int, default=FULL, help=f"sequence instead of the tables' {FULL}; windows and other lengths shrink alike")
    parser.add_argument("--sample", action="store_true", help="four cases of every configuration instead of all")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name (as --list prints it) contains this")
    parser.add_argument("--results", type=Path, metavar="CSV", help="append rows to this file, skip those it has, and write the summary beside it (.md)")
    parser.add_argument("--cache", type=Path, default=ROOT / "target/matrix", help="folder of oracles; one is deleted when its cases are done")
    parser.add_argument("--list", action="store_true", help="print the cases")
    options = parser.parse_args()
    wanted = [run for run in runs(options.seq, options.sample) if options.only in " ".join(run.key)]
    if options.list:
        print(*(" ".join(run.key) for run in wanted), sep="\n")
        return
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = read(options.results)
    file = open(options.results, "a", newline="") if options.results else None
    writer = csv.DictWriter(file, COLUMNS) if file else None
    if file and file.tell() == 0:
        writer.writeheader()

    def keep(row):
        rows[tuple(row[name] for name in COLUMNS[:4])] = row
        if file:
            writer.writerow(row)
            file.flush()

    if not options.sample:
        for key in not_offered():
            if key not in rows and options.only in " ".join(key):
                keep(blank(key, options.seq, 4 if key[2] == "a2a+p2p" else 2, result="not offered", why="fp8 is no storage type"))
    wanted = [run for run in wanted if run.key not in rows]
    for run in wanted:
        row = refusal(run, options.seq)
        if row:
            keep(row)
            print(f"{' '.join(run.key)}: {row['result']}: {row['why']}", flush=True)
    wanted = [run for run in wanted if run.key not in rows]

    # Time left: the costs that remain at the speeds so far, of oracles and of cases.
    costs = {"oracles": sum(setup.cost() for setup in dict.fromkeys(run.setup for run in wanted)), "cases": sum(run.setup.cost() for run in wanted)}
    spent, done = dict.fromkeys(costs, 0.0), dict.fromkeys(costs, 0.0)

    def account(what, setup, since):
        spent[what] += time.monotonic() - since
        done[what] += setup.cost()

    groups, held = Groups(), None
    for number, run in enumerate(wanted, start=1):
        if held is None or held[0] != run.setup:
            if held:
                held[1].forget()
            held = None  # frees memory before the next is made
            since = time.monotonic()
            given = inputs(run.setup)
            held = (run.setup, Oracle(run.setup, given, options.cache), given)
            account("oracles", run.setup, since)
        since = time.monotonic()
        row = row_of(run, options.seq, *held[1:], groups)
        account("cases", run.setup, since)
        keep(row)
        gone = timedelta(seconds=round(sum(spent.values())))
        left = timedelta(seconds=round(sum((costs[what] - done[what]) * spent[what] / done[what] for what in costs)))
        if options.results or row["result"] != "passed" or number % 16 == 0 or number == len(wanted):
            shares = [float(row[f"share_{name}"]) for name in TENSORS if row[f"share_{name}"]]
            said = row["why"] or f"{max(shares):.3f} of the contract, {row['te_share']} of TE's tolerance ({row['te_tensor']}), {row['seconds']} s"
            print(f"[{number}/{len(wanted)}, {gone} gone, {left} left] {' '.join(run.key)}: {row['result']}: {said}", flush=True)
    if wanted:
        print(f"oracles {spent['oracles']:.0f} s, cases {spent['cases']:.0f} s")
    if held:
        held[1].forget()
    command = shlex.join(["tests/matrix/run.py", *sys.argv[1:]])
    text = summary(list(rows.values()), command)
    if options.results:
        options.results.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(1 if any(row["result"] == "FAILED" for row in rows.values()) or not rows else 0)


if __name__ == "__main__":
    main()

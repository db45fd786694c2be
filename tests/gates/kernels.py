#!/usr/bin/env python3
"""Static gates on compiled kernels: what they use and which instructions they are made of. Needs no GPU.

usage: kernels.py [--sass FOLDER] [--all] FILE

FILE is libcontext_parallel.so or a fat binary. With --all every kernel of the library must be there for every GPU. Fails if a kernel
  * uses local memory: a stack, spilled registers, LDL or STL
  * states no launch bounds, or more registers than these allow
  * of attention lacks an instruction that it is built on (tensor cores, ldmatrix, cp.async, 2^x), or holds one of the wrong storage type
Environment: CUDA_TOOLS, the folder of cuobjdump and nvdisasm (tests/env.sh); else they are looked for on PATH.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

REGISTERS = 65536  # of a multiprocessor, every architecture here
ARCHS = {"sm_80", "sm_90", "sm_100", "sm_120"}
BIG_ARCHS = {"sm_80", "sm_90", "sm_100"}
SMALL_ARCHS = {"sm_80", "sm_120"}  # sm_80 for sm_86 and sm_89
DIMS = (64, 96, 128, 192, 256)
ROW_KERNELS = ("cp_copy_rows", "cp_encode_rows", "cp_decode_rows", "cp_fill_rows", "cp_delta", "cp_sink_terms", "cp_reduce")

# Beginnings of SASS instructions, and what they are in kernels/ptx.cuh.
COMMON = {
    "LDSM.16.M88.4": "ldmatrix_x4",
    "LDSM.16.MT88.4": "ldmatrix_x4_trans",
    "LDGSTS.E.BYPASS.128": "cp_async_16",
    "LDGDEPBAR": "cp_async_commit",
    "MUFU.EX2": "exp2_approx",
    "BAR.SYNC": "sync_block",
}
# fp32: the deterministic order counts its turns with an integer RED.
EXPECTED = {"forward": COMMON, "backward": COMMON | {("RED.E.ADD.F32", "REDG.E.ADD.F32"): "add_global"}}
MMA = {"bf16": "HMMA.16816.F32.BF16", "f16": "HMMA.16816.F32"}


class Kernel:
    def __init__(self):
        self.registers = self.stack = self.local = self.limit = self.threads = None
        self.code = Counter()

    def count(self, start):
        return sum(n for name, n in self.code.items() if name.startswith(start))

    def blocks(self):
        """Blocks per multiprocessor, as far as registers decide: a warp's come in units of 256."""
        warps = -(-self.threads // 32)
        return REGISTERS // (-(-self.registers * 32 // 256) * 256 * warps)


def dump(option, file):
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join(filter(None, [os.environ.get("CUDA_TOOLS"), os.environ.get("PATH")]))
    tool = shutil.which("cuobjdump", path=path) or sys.exit("no cuobjdump: run kernels/setup, then . tests/env.sh")
    run = subprocess.run([tool, option, file], capture_output=True, text=True, env=os.environ | {"PATH": path})
    if run.returncode:
        sys.exit(f"cuobjdump {option} {file}: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def read(file):
    """(kernel, architecture) → Kernel, from the three dumps of cuobjdump."""
    kernels = defaultdict(Kernel)
    arch = name = None
    for line in dump("-res-usage", file).splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            kernel = kernels[name, arch]
            kernel.registers, kernel.stack, kernel.local = map(int, found.groups())
    attribute = None
    for line in dump("-elf", file).splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\.nv\.info\.(\w+)$", line):
            name = found[1]
        elif found := re.match(r"\s+Attribute:\s+EIATTR_(\w+)", line):
            attribute = found[1]
        elif found := re.match(r"\s+Value:\s+(0x[0-9a-f]+(?: 0x[0-9a-f]+)*)", line):
            first, *more = (int(v, 16) for v in found[1].split())
            if attribute == "MAXREG_COUNT":
                kernels[name, arch].limit = first
            elif attribute == "MAX_THREADS":
                kernels[name, arch].threads = first * more[0] * more[1]
    sass = dump("-sass", file)
    for line in sass.splitlines():
        if found := re.search(r"code for (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            name = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            kernels[name, arch].code[found[1]] += 1
    return kernels, sass


def faults(name, arch, kernel):
    """What is wrong with one kernel."""
    if kernel.registers is None or not kernel.code:
        return ["no resource usage or no code was found in the dumps"]
    wrong = []
    local = {start: kernel.count(start) for start in ("LDL", "STL")}
    if kernel.stack or kernel.local or any(local.values()):
        wrong.append(f"local memory: stack {kernel.stack} bytes, local {kernel.local} bytes, {local['LDL']} LDL, {local['STL']} STL (allowed: none)")
    if kernel.threads is None:
        wrong.append("no launch bounds")
    elif kernel.limit and kernel.registers > kernel.limit:
        wrong.append(f"{kernel.registers} registers, launch bounds allow {kernel.limit}")
    if found := re.match(r"cp_(forward|backward)_(bf16|f16)_", name):
        operation, storage = found.groups()
        for start, primitive in EXPECTED[operation].items():
            if not kernel.count(start):
                wrong.append(f"no {start if isinstance(start, str) else start[0]} ({primitive})")
        bf16, any_type = kernel.count(MMA["bf16"]), kernel.count(MMA["f16"])
        mine, other = (bf16, any_type - bf16) if storage == "bf16" else (any_type - bf16, bf16)
        if not mine or other or kernel.count("HMMA") != mine:
            wrong.append(f"{mine} tensor core instructions for {storage}, {other} for the other type, {kernel.count('HMMA')} in all")
    return wrong


def missing(kernels):
    """Kernels that the library must hold, and does not."""
    have = defaultdict(set)
    for name, arch in kernels:
        have[name].add(arch)
    wanted = {name: ARCHS for name in ROW_KERNELS}
    for operation in ("forward", "backward"):
        for storage in ("bf16", "f16"):
            for dim in DIMS:
                name = f"cp_{operation}_{storage}_{dim}"
                if f"{name}_small" in have:
                    wanted[name], wanted[f"{name}_small"] = BIG_ARCHS, SMALL_ARCHS
                else:
                    wanted[name] = ARCHS
                wanted[f"{name}_score"] = ARCHS
    wrong = [f"{name}: not there for {', '.join(sorted(archs - have[name]))}" for name, archs in wanted.items() if archs - have[name]]
    return wrong + [f"{name}: not a kernel of this library" for name in have if name not in wanted]


def natural(key):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", " ".join(key))]


def table(kernels):
    columns = {"HMMA": "HMMA", "LDSM": "LDSM", "LDGSTS": "LDGSTS", "EX2": "MUFU.EX2", "RED": "RED", "LDL": "LDL", "STL": "STL"}
    yield f"{'kernel':30} {'arch':>6} {'regs':>4} {'limit':>5} {'threads':>7} {'blocks':>6} {'stack':>5} " + " ".join(f"{c:>6}" for c in columns) + f" {'all':>6}"
    for name, arch in sorted(kernels, key=natural):
        k = kernels[name, arch]
        counts = " ".join(f"{k.count(start):6}" for start in columns.values())
        blocks = k.blocks() if k.threads and k.registers else "-"
        yield f"{name:30} {arch:>6} {k.registers or '-':>4} {k.limit or '-':>5} {k.threads or '-':>7} {blocks:>6} {k.stack if k.stack is not None else '-':>5} {counts} {sum(k.code.values()):6}"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--sass")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("file")
    options = parser.parse_args()
    kernels, sass = read(options.file)
    if options.sass:
        os.makedirs(options.sass, exist_ok=True)
        with open(os.path.join(options.sass, os.path.basename(options.file) + ".sass"), "w") as file:
            file.write(sass)
    print(*table(kernels), sep="\n")
    wrong = [f"{name} {arch}: {fault}" for (name, arch), kernel in sorted(kernels.items()) for fault in faults(name, arch, kernel)]
    if options.all:
        wrong += missing(kernels)
    elif not kernels:
        wrong.append(f"{options.file}: no kernels")
    print(*(f"FAILED {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{len(kernels)} kernels × architectures, {len(wrong)} faults")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

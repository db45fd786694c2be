"""What TransformerEngine tests of its context parallelism (tests/pytorch/attention/test_attention_with_cp.py, model_configs_flash_attn and
model_configs_fused_attn; tests/jax/test_distributed_fused_attn.py) and Megatron of its packed sequences, as data, and the cases that come of it."""

import itertools
import zlib
from dataclasses import dataclass

import numpy as np

from corpus import Case, Extent

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
DTYPES = ("bfloat16", "float16")
FULL = 4096  # the sequence of the tables
SEED = 20240601

# id: b, s, heads, kv heads, dim of q and k, dim of v, causal, window (left, right); then what else there is.
FLASH = {
    "1_0": (2, 4096, 12, 12, 128, 128, True, None),
    "1_1": (2, 4096, 12, 12, 128, 128, False, None),
    "1_2": (2, 4096, 12, 12, 128, 128, True, (512, 0)),
    "1_3": (2, 4096, 12, 12, 128, 128, False, (512, 512)),
    "2_0": (2, 4096, 32, 4, 128, 128, True, None),
    "2_1": (2, 4096, 12, 2, 128, 128, False, None),
    "2_2": (2, 4096, 32, 32, 128, 128, True, (128, 0)),
    "2_3": (2, 4096, 12, 2, 128, 128, False, (512, 512)),
    "3_0": (2, 4096, 128, 128, 192, 128, True, None),
    "3_1": (2, 4096, 12, 12, 192, 128, False, None),
    "3_2": (2, 4096, 12, 12, 192, 128, True, (512, 0)),
    "3_3": (2, 4096, 12, 12, 192, 128, False, (512, 512)),
}
FUSED = {
    "1_0": (2, 4096, 12, 12, 128, 128, True, None, {"max_logit": "group"}),
    "1_1": (2, 4096, 12, 12, 128, 128, False, None, {"max_logit": "group"}),
    "1_2": (2, 4096, 12, 12, 128, 128, True, None, {"bias": "1hss"}),
    "1_3": (2, 4096, 12, 12, 128, 128, False, None, {"bias": "1hss"}),
    "1_4": (2, 4096, 12, 12, 128, 128, False, None, {"bias": "bhss"}),
    "1_5": (2, 4096, 12, 12, 128, 128, True, (512, 512)),
    "2_0": (2, 4096, 32, 4, 128, 128, True, None),
    "2_1": (2, 4096, 32, 32, 128, 128, True, (128, 0)),
    "2_2": (2, 4096, 12, 2, 128, 128, True, None, {"bias": "1hss"}),
    "2_3": (2, 4096, 12, 2, 128, 128, True, None, {"bias": "11ss"}),
    "2_4": (2, 4096, 12, 2, 128, 128, True, None, {"bias": "111s", "max_logit": "group"}),
    "2_5": (2, 4096, 12, 2, 128, 128, False, None, {"bias": "1hss"}),
    "2_6": (2, 4096, 12, 2, 128, 128, True, (512, 512)),
    "3_0": (2, 4096, 12, 12, 128, 64, True, None),
    "3_1": (2, 4096, 128, 128, 192, 128, True, None),
    "3_2": (2, 4096, 12, 12, 128, 64, True, None, {"bias": "1hss"}),
    "3_3": (2, 4096, 12, 12, 128, 64, False, None, {"bias": "1hss"}),
    "3_4": (2, 4096, 12, 12, 128, 64, False, None, {"bias": "b1ss"}),
    "4_0": (2, 4096, 64, 8, 64, 64, True, None),
    "4_1": (2, 4096, 64, 8, 64, 64, True, None, {"sinks": "off-by-one"}),
    "4_2": (2, 4096, 64, 8, 64, 64, True, None, {"sinks": "learnable"}),
    "4_3": (2, 4096, 64, 64, 64, 64, True, (128, 0), {"sinks": "learnable"}),
    "5_0": (2, 1024, 16, 16, 256, 256, True, None),
    "5_1": (2, 1024, 16, 16, 256, 256, True, (128, 0)),
}
# JAX: its shapes for 4 ranks (128·2P and 256·2P tokens), key heads as many and an eighth; with a window of 20 its ring deals tokens in stripes.
JAX_SHAPES = {"1": (2, 1024, 8, 128), "2": (4, 2048, 16, 64)}
JAX_MASKS = {"causal": (True, None), "full": (False, None), "w20": (True, (20, 0), {"partition": "striped"}), "w5": (True, (5, 0))}
JAX = {
    f"{shape}_{group}_{mask}": (b, s, heads, heads // group, dim, dim, *of_mask[:2], {"documents": 5, **(*of_mask, {})[2]})
    for shape, (b, s, heads, dim) in JAX_SHAPES.items() for group in (1, 8) for mask, of_mask in JAX_MASKS.items()
} | {"d256": (2, 1024, 16, 16, 256, 256, True, None, {"documents": 5})}  # fmt: skip
# Megatron compares packed with dense sequences of these lengths. Two more of its sets, with one of 65,536 and of 65,535, are too long for the oracle.
MEGATRON = {
    "1": (3, 2039, 64, 4, 64, 64, True, None, {"lengths": (2039, 1013, 509)}),
    "2": (3, 31, 16, 4, 64, 64, True, None, {"lengths": (17, 31, 11)}),
    "3": (3, 4093, 32, 8, 128, 128, True, None, {"lengths": (4093, 127, 257)}),
}
TABLES = {"flash": FLASH, "fused": FUSED, "jax": JAX, "megatron": MEGATRON}
FORMATS = {"flash": ("bshd", "sbhd", "thd", "thd-dense"), "fused": ("bshd", "sbhd", "thd"), "jax": ("bshd", "thd"), "megatron": ("thd",)}


@dataclass(frozen=True)
class Setup:
    """What one oracle serves: a configuration with its lengths, in one storage type."""

    case: Case
    dtype: str
    learnable: bool  # its sinks are drawn; else they are 0

    @property
    def name(self):
        return f"{self.case.name}-{self.dtype}"

    def random(self, what):
        return np.random.default_rng([SEED, zlib.crc32(f"{self.case.name} {self.dtype} {what}".encode())])

    def cost(self):
        """Visible scores times heads and dims: what time is about proportional to."""
        seen = 0
        for q in self.case.q:
            left = q.len if self.case.left is None else min(self.case.left, q.len)
            right = 0 if self.case.causal else q.len if self.case.right is None else min(self.case.right, q.len)
            seen += q.len * (left + right + 1) - (left * left + right * right) / 2
        return seen * self.case.heads * (self.case.dim_qk + self.case.dim_v)


@dataclass(frozen=True)
class Run:
    """One case of the matrix."""

    setup: Setup
    config: str  # family and id
    format: str  # thd: padding between sequences; thd-dense: none
    comm: str

    @property
    def ranks(self):
        return 4 if self.comm == "a2a+p2p" else 2

    @property
    def may_be_refused(self):
        """A bias with a batch axis: packed sequences have none. (TransformerEngine has no bias at all in thd.)"""
        return self.format == "thd" and (self.setup.case.bias or "1")[0] == "b"

    @property
    def key(self):
        return (self.config, self.format, self.comm, self.setup.dtype)


def case(family, id, kind, seq):
    """A row of the tables with sequences of seq/4096 of its own length and windows likewise. kind: dense, thd or thd-dense."""
    batch, length, heads, kv_heads, dim_qk, dim_v, causal, window, extra = (*TABLES[family][id], {})[:9]
    shrunk = lambda n: max(n * seq // FULL, 1) if n else n
    left, right = (shrunk(n) for n in window) if window else (None, None)
    length = shrunk(length)
    if kind == "dense":
        extents = (Extent(0, length, length),) * batch
    else:
        # JAX: documents of a pack. A multiple of 8 is one of 2P for P = 2 and P = 4, so that both have one oracle. Lengths without padding of their own are drawn again.
        random = np.random.default_rng([SEED, zlib.crc32(f"{family} {id} lengths".encode())])
        lens = [max(shrunk(n), min(n, 40)) for n in extra.get("lengths", ())]
        while len(lens) < extra.get("documents", batch):
            drawn = int(random.integers(0, length + 1))
            if drawn % 8:
                lens.append(drawn)
        padded = [-(-n // 8) * 8 for n in lens]
        extents = tuple(Extent(0, n if kind == "thd" else p, p) for n, p in zip(lens, padded))
    return Case(f"{family}_{id}-{kind}-{seq}", (), "bshd" if kind == "dense" else "thd", extents, extents, heads, kv_heads, dim_qk, dim_v, causal, False,
                left, right, extra.get("partition", "zigzag"), None, None, False, extra.get("bias"), 0.0, "group" if "sinks" in extra else None, extra.get("max_logit"))  # fmt: skip


def runs(seq, sample=False):
    """All cases, those of one oracle in a row. sample: for every configuration four cases that together hold every communication type, format and storage
    type, turned from one configuration to the next so that all pairs of the three appear."""
    for number, (family, id) in enumerate((family, id) for family, rows in TABLES.items() for id in rows):
        formats, dtypes = FORMATS[family], DTYPES if family in ("flash", "fused") else DTYPES[:1]
        learnable = (*TABLES[family][id], {})[8].get("sinks") == "learnable"
        wanted = set(itertools.product(formats, COMMS, dtypes))
        if sample:
            wanted = {(formats[(i + number) % len(formats)], COMMS[(i + number // 4) % 4], dtypes[(i // 2 + number) % len(dtypes)]) for i in range(4)}
        for kind, dtype in itertools.product(("dense", "thd", "thd-dense"), DTYPES):
            mine = [format for format in formats if (format if format.startswith("thd") else "dense") == kind]
            setup = None
            for format, comm in itertools.product(mine, COMMS):
                if (format, comm, dtype) in wanted:
                    setup = setup or Setup(case(family, id, kind, seq), dtype, learnable)
                    yield Run(setup, f"{family} {id}", format, comm)


def not_offered():
    """The keys of TransformerEngine's fp8 cases: attention in fp8 is not offered here."""
    yield from ((f"fused {id}", format, comm, "fp8") for id in FUSED for format in ("bshd", "sbhd", "thd") for comm in COMMS)

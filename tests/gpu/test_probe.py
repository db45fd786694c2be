"""The probe on the software GPU finds the PTX manual's tables, and so does every recorded run on real hardware. Changed tables are noticed."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import layouts  # noqa: E402


@pytest.fixture(scope="module")
def software(tmp_path_factory):
    """A function: what the probe finds on the software GPU with a seed."""
    out = tmp_path_factory.mktemp("probe")
    subprocess.run([ROOT / "tests/softgpu/build"], check=True)
    subprocess.run([HERE / "build_probe", out], check=True)

    def run(seed):
        environment = os.environ | {"LD_LIBRARY_PATH": str(ROOT / "target/softgpu"), "SOFTGPU_SEED": str(seed)}
        file = out / f"{seed}.json"
        subprocess.run([out / "probe", file, out / "probe.fatbin", out / "probe_hopper.fatbin"], check=True, env=environment)
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_software_gpu_is_as_the_manual_says(software, seed):
    assert layouts.faults(software(seed)) == []


@pytest.mark.parametrize("key", ["ldmatrix_x4", "ldmatrix_x4_trans", "mma_bf16", "mma_f16", "mma_f16_accumulator", "cp_async"])
def test_a_changed_table_is_noticed(software, key):
    found = copy.deepcopy(software(1))
    table = found[key]
    table[9], table[21] = table[21], table[9]
    assert any(fault.startswith(f"{key}: 2 of") for fault in layouts.faults(found))


def test_a_wrong_number_is_noticed(software):
    found = software(1)
    for key in ("convert_out_f16_bf16", "powers_out_exp2_log2"):
        changed = copy.deepcopy(found)
        # One bit of one number: the last of bf16; the 12th of 2^x.
        at = 8 * 2000
        word = int(changed[key][at : at + 8], 16) ^ (1 if key.startswith("convert") else 1 << 12)
        changed[key] = f"{changed[key][:at]}{word:08x}{changed[key][at + 8 :]}"
        assert len(layouts.faults(changed)) == 1


def test_a_missing_table_is_noticed(software):
    found = copy.deepcopy(software(1))
    del found["mma_bf16"]
    assert layouts.faults(found) == ["mma_bf16: missing"]


RECORDED = sorted(HERE.glob("results/*/layouts.json"))


@pytest.mark.parametrize("path", RECORDED, ids=[path.parent.name for path in RECORDED])
def test_recorded_hardware_is_as_the_manual_says(path):
    found = json.loads(path.read_text())
    assert "Software" not in found["device"], f"{path}: not a recording of hardware"
    assert layouts.faults(found) == []

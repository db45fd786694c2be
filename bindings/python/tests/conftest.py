import os
import sys

import pytest

# For the software GPU, which reads them when it starts.
os.environ.setdefault("SOFTGPU_DEVICES", "2")
os.environ.setdefault("SOFTGPU_SEED", "1")


@pytest.fixture(scope="session")
def torch():
    """PyTorch, which is left out only if tests/setup could not install it (HAVE_TORCH=0, set by tests/env.sh)."""
    if os.environ.get("HAVE_TORCH") == "0":
        pytest.skip(f"PyTorch is not installed: {os.environ.get('NO_TORCH_WHY', '')}")
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def cuda():
    """A CUDA driver, a real one or the software GPU's. Without it tests are left out, unless CP_TEST_CUDA=require."""
    import devices

    try:
        found, why = devices.count(), "it has no device"
    except OSError as error:
        found, why = 0, error
    if found == 0:
        message = f"no CUDA driver ({why}); for the software GPU: tests/softgpu/build, then LD_LIBRARY_PATH=target/softgpu"
        assert os.environ.get("CP_TEST_CUDA") != "require", message
        pytest.skip(message)
    return devices


@pytest.fixture(scope="session")
def two_devices(cuda):
    if cuda.count() < 2:
        pytest.skip("one CUDA device; this needs two")


def pytest_terminal_summary(terminalreporter):
    devices = sys.modules.get("devices")
    if devices is not None and devices.driver.cache_info().currsize:
        terminalreporter.write_line(f"CUDA devices: {devices.count()}; if of the software GPU, SOFTGPU_SEED={os.environ['SOFTGPU_SEED']}")

import os

import pytest


@pytest.fixture(scope="session")
def torch():
    """PyTorch, which is left out only if tests/setup could not install it (HAVE_TORCH=0, set by tests/env.sh)."""
    if os.environ.get("HAVE_TORCH") == "0":
        pytest.skip(f"PyTorch is not installed: {os.environ.get('NO_TORCH_WHY', '')}")
    import torch

    torch.set_num_threads(1)
    return torch

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The device under test: MKRS_TEST_DEVICE=cpu (default), cuda or mps."""
    name = os.environ.get("MKRS_TEST_DEVICE", "cpu")
    if name == "mps" and not torch.backends.mps.is_built():
        # Without a Mac, the same kernels and host code run in the simulator.
        from metal_sim import simulator

        simulator.load()
        torch.set_num_threads(1)  # kernels run on one, and OpenMP's idle threads would spin
    return torch.device(name)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(torch.randint(2**31, ()).item() if os.environ.get("MKRS_FRESH") else 0)

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The device under test: MKRS_TEST_DEVICE=cpu (default), cuda or mps."""
    return torch.device(os.environ.get("MKRS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(torch.randint(2**31, ()).item() if os.environ.get("MKRS_FRESH") else 0)

"""A rank that ends or hangs is an error in the others, in time, and not a hang."""

import os
import time
from typing import Any

import pytest
import torch
from processes import run_ranks
from test_tensor_parallel import PLAN, mesh, mlp

from mergekit_torch.parallel import tensor_parallel_


def dies(rank: int) -> Any:
    model = mlp()
    tensor_parallel_(model, mesh(), dict(PLAN))
    ids = torch.arange(6)
    model(ids)
    if rank == 1:
        os._exit(1)
    started = time.monotonic()

    def steps() -> None:
        for _ in range(3):
            model(ids)

    with pytest.raises(RuntimeError, match=r"all-reduce of \[6, 96\] failed: another rank has"):
        steps()
    return time.monotonic() - started


@pytest.mark.parametrize("world", [2, 4])
def test_rank_that_ends(world: int) -> None:
    for seconds in run_ranks(world, dies, dies=(1,), collective_timeout=20):
        assert seconds is None or seconds < 15  # closed connections show at once


def hangs(rank: int) -> Any:
    model = mlp()
    tensor_parallel_(model, mesh(), dict(PLAN))
    ids = torch.arange(6)
    model(ids)
    if rank == 1:
        time.sleep(8)
        return None
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="did not take part"):
        model(ids)
    return time.monotonic() - started


def test_rank_that_hangs() -> None:
    seconds = run_ranks(2, hangs, collective_timeout=3)[0]
    assert 2 < seconds < 7

"""One thread while a test runs; prints how long each stage of the Metal tests took."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import simulator

HERE = Path(__file__).parent
_seconds: dict[str, float] = defaultdict(float)
_cpu: dict[str, float] = defaultdict(float)
_tests: dict[str, int] = defaultdict(int)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Simulated kernels run on one thread, and OpenMP's idle ones would spin beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_process() -> None:
    if not simulator.is_asked():
        pytest.skip("torch was asked for an MPS device before: run tests/metal_sim by itself")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Any:
    before = sum(os.times()[:4])  # of this process and of the compilers it waited for
    try:
        return (yield)
    finally:
        if item.path.parent == HERE:
            _cpu[item.path.stem] += sum(os.times()[:4]) - before


def pytest_runtest_logreport(report: Any) -> None:
    path = Path(report.nodeid.split("::")[0])
    if path.parent.name == HERE.name:
        _seconds[path.stem] += report.duration
        _tests[path.stem] += report.when == "call"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _seconds:
        return
    terminalreporter.section("Metal stages")
    for name, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.line(
            f"{name:24} {_tests[name]:5} tests {seconds:8.1f} s {_cpu[name]:8.1f} s of CPU"
        )
    terminalreporter.line(
        f"{'together':24} {sum(_tests.values()):5} tests {sum(_seconds.values()):8.1f} s "
        f"{sum(_cpu.values()):8.1f} s of CPU"
    )

"""Probes of the arena, see :mod:`benchmarks.memory_probes`."""

import mmap
import time
from typing import Any

import numpy as np
import torch

from benchmarks.memory_common import warm_free_memory


def probe_arena() -> dict[str, Any]:
    from mergekit_torch.memory import Arena

    pool = Arena("cpu")
    result = {}
    for size in (1 << 20, 2 << 20, 16 << 20, 64 << 20, 256 << 20):
        row = {}
        makers = {
            "arena": lambda size=size: pool.empty(size, dtype=torch.uint8),
            "torch": lambda size=size: torch.empty(size, dtype=torch.uint8),
        }
        for name, make in makers.items():
            for suffix, work in (
                ("", make),
                ("_written", lambda make=make: make().fill_(1)),
            ):
                count = 2000 if not suffix else max(3, (64 << 20) // size)
                times = []
                for _ in range(5):
                    started = time.perf_counter_ns()
                    for _ in range(count):
                        work()
                    times.append((time.perf_counter_ns() - started) / count)
                row[name + suffix] = round(min(times))
        result[str(size)] = row
    return result


#: Sizes as a model's tensors have them, in MiB: few that come again and again.
_MIXED = (1, 1.5, 2, 3.5, 4, 5.25, 8, 11, 14, 16, 22, 32, 43, 64)


def probe_arena_mixed(which: str) -> dict[str, Any]:
    """Microseconds to allocate a tensor of one of several sizes, touch each of its pages and free
    it later, eight of them alive at a time: what a program meets, page faults included.
    """
    from mergekit_torch.memory import Arena

    pool = Arena("cpu")
    sizes = [int(mib * 2**20) for mib in _MIXED]
    generator = np.random.default_rng(7)
    order = generator.integers(len(sizes), size=3000)
    alive: list[Any] = [None] * 8
    spent = dict.fromkeys(sizes, 0)
    counts = dict.fromkeys(sizes, 0)
    warm_free_memory(1 << 30)
    for step, which_size in enumerate(order):
        size = sizes[which_size]
        started = time.perf_counter_ns()
        alive[step % 8] = None
        if which == "arena":
            tensor = pool.empty(size, dtype=torch.uint8)
        else:
            tensor = torch.empty(size, dtype=torch.uint8)
        tensor[:: mmap.PAGESIZE].fill_(1)
        alive[step % 8] = tensor
        if step >= 500:
            spent[size] += time.perf_counter_ns() - started
            counts[size] += 1
        del tensor
    us = {str(size): round(spent[size] / counts[size] / 1e3, 1) for size in sizes}
    return {"us": round(sum(spent.values()) / sum(counts.values()) / 1e3, 1), "us_by_size": us}

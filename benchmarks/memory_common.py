"""What the probes of :mod:`benchmarks.memory` share."""

import mmap
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def cost(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and processor seconds of a call, all threads of this process together."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    work()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)}


def warm_free_memory(nbytes: int) -> None:
    """Touch memory and free it again until that is as fast as it gets.

    Hypervisors with free page reporting take a guest's free memory away. Whoever is first to use it
    again pays for it, up to ten times what clearing the pages costs, and which contender that is
    would be chance. One pass does not reach all that the system may hand out next.
    """
    best = float("inf")
    for _ in range(6):
        memory = private_memory(nbytes * 3 // 2)
        started = time.perf_counter()
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
        took = time.perf_counter() - started
        if took > 0.9 * best:
            return
        best = min(best, took)


def private_memory(nbytes: int) -> mmap.mmap:
    """Fresh memory of huge pages."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def ready(path: str, state: str) -> None:
    """Put a file into the page cache, or out of it."""
    if state == "cold":
        drop(Path(path))
        return
    buffer = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass

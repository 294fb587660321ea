"""Probes of streaming, see :mod:`benchmarks.memory_probes`."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.memory_common import drop


class Stack(NamedTuple):
    """A stack of quantized layers, large enough that the machine's caches do not hold it."""

    layers: int
    width: int


STACKS = {"cpu": Stack(64, 4096), "cuda": Stack(64, 8192)}


def build(stack: Stack) -> torch.nn.Module:
    """The model, without weights."""
    from mergekit_torch.nn import QuantizedLinear

    with torch.device("meta"):
        return torch.nn.Sequential(
            *(QuantizedLinear(stack.width, stack.width, bias=False) for _ in range(stack.layers))
        )


def probe_write_model(path: str, device: str) -> dict[str, Any]:
    from mergekit_torch.checkpoint import CheckpointWriter
    from mergekit_torch.tensor import QuantizedTensor

    layers, width = STACKS[device]
    weights = [QuantizedTensor.from_float(torch.randn(width, width) / width**0.5) for _ in range(4)]
    specs = {f"{i}.weight": weights[i % 4] for i in range(layers)}
    with CheckpointWriter(path, specs) as writer:
        for name, weight in specs.items():
            writer.write(name, weight)
    return {}


def probe_stream(path: str, state: str) -> dict[str, Any]:
    from mergekit_torch import nn as mnn
    from mergekit_torch.checkpoint import open_checkpoint
    from mergekit_torch.memory import stream as stream_model

    checkpoint = open_checkpoint(path, read="pread")
    total = checkpoint.nbytes
    stack = STACKS["cpu"]
    x = torch.randn(1, stack.width)

    def measured(work: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            if state == "cold":
                drop(Path(path))
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times) if state == "warm" else statistics.median(times)

    def read_all() -> None:
        for name in checkpoint:
            checkpoint[name]

    budget = total // 4
    readings = []
    with torch.no_grad():
        with stream_model(build(stack), path, budget=budget) as streamed:
            streamed(x)
            streamed(x)
            found = streamed(x)
            before = streamed.stats().bytes_read
            passes = []
            for _ in range(5):  # in turns, so that both meet the same machine
                readings.append(measured(read_all, 2))
                passes.append(measured(lambda: streamed(x), 2))
            stats = streamed.stats()
        resident = torch.nn.Sequential(
            *(mnn.QuantizedLinear.from_quantized(checkpoint[name]) for name in checkpoint)
        )
        expected = resident(x)
        in_memory = measured(lambda: resident(x), 7)
    middle = min if state == "warm" else statistics.median
    reading, seconds = middle(readings), middle(passes)
    return {
        "bytes": total,
        "budget": budget,
        "peak": stats.peak,
        "bit_equal": bool(torch.equal(found, expected)),
        "reading_s": round(reading, 4),
        "pass_s": round(seconds, 4),
        "in_memory_s": round(in_memory, 4),
        "bytes_read_per_pass": round((stats.bytes_read - before) / 10),
        "of_reading_rate": round(reading / seconds, 3),
    }


def probe_stream_cuda(path: str, state: str) -> dict[str, Any]:
    """Weights in host memory (``host``), or read from the page cache each time (``file``)."""
    from mergekit_torch import nn as mnn
    from mergekit_torch.checkpoint import open_checkpoint
    from mergekit_torch.memory import stream as stream_model

    def best_of(work: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    stack = STACKS["cuda"]
    x = torch.randn(1, stack.width, device="cuda", dtype=torch.float16)
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True).fill_(1)
    there = torch.empty_like(pinned, device="cuda")
    rate = (1 << 28) / best_of(lambda: there.copy_(pinned, non_blocking=True), 10)
    with open_checkpoint(path) as checkpoint:
        total = checkpoint.nbytes
        names = list(checkpoint)
        resident = torch.nn.Sequential(
            *(mnn.QuantizedLinear.from_quantized(checkpoint[n].to("cuda")) for n in names)
        )
    with torch.no_grad():
        expected = resident(x)
        in_memory = best_of(lambda: resident(x), 7)
        resident = resident.to("meta")
        with stream_model(
            build(stack),
            path,
            "cuda",
            total // 4,
            host_budget=2 * total if state == "host" else None,
        ) as streamed:
            streamed(x)
            streamed(x)
            found = streamed(x)
            before = streamed.stats().bytes_read
            seconds = best_of(lambda: streamed(x), 10)
            stats = streamed.stats()
    copied = (stats.bytes_read - before) / 10
    return {
        "bytes": total,
        "budget": total // 4,
        "peak": stats.peak,
        "bit_equal": bool(torch.equal(found, expected)),
        "copy_gb_s": round(rate / 1e9, 2),
        "pass_s": round(seconds, 5),
        "in_memory_s": round(in_memory, 5),
        "bytes_copied_per_pass": round(copied),
        "streamed_gb_s": round(copied / seconds / 1e9, 2),
        "of_copy_rate": round(copied / seconds / rate, 3),
    }

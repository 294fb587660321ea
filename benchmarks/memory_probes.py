"""What :mod:`benchmarks.memory` measures, each function in a process of its own:

    python -m benchmarks.memory_probes NAME [ARGUMENT ...] --threads N

prints one JSON object.
"""

import argparse
import json
import mmap
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


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
    """Touch memory and free it again, so that the system hands out pages that are really there.

    Hypervisors with free page reporting take a guest's free memory away. Whoever is first to use it
    again pays for it, and which contender that is would be chance.
    """
    torch.frombuffer(private_memory(nbytes), dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)


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


# --- arena ----------------------------------------------------------------------------------------


def probe_arena() -> dict[str, Any]:
    from mergekit_torch.memory import Arena

    pool = Arena("cpu")
    result = {}
    for size in (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20):
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


# --- reading --------------------------------------------------------------------------------------


def probe_write(path: str, gib: str, count: str) -> dict[str, Any]:
    from mergekit_torch.checkpoint import CheckpointWriter, TensorSpec

    columns = 2048
    rows = int(float(gib) * 2**30 / int(count) / columns / 2)
    specs = {f"t{i}": TensorSpec(torch.bfloat16, (rows, columns)) for i in range(int(count))}
    value = torch.randn(rows, columns).bfloat16()
    with CheckpointWriter(path, specs) as writer:
        for name in specs:
            writer.write(name, value)
    return {}


def probe_write_torch(path: str, target: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    torch.save(load_file(path), target)
    return {}


def probe_open(path: str) -> dict[str, Any]:
    from mergekit_torch.checkpoint import open_checkpoint

    times = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    drop(Path(path))
    for _ in range(20):
        started = time.perf_counter()
        checkpoint = open_checkpoint(path)
        times.append(1e3 * (time.perf_counter() - started))
        checkpoint.close()
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before
    for _ in open(path, "rb", buffering=1 << 24):  # noqa: SIM115  (back into the page cache)
        pass
    return {
        "ms": round(statistics.median(times), 3),
        "first_ms_cold": round(times[0], 3),
        "bytes_read": blocks * 512,
    }


def probe_slices(path: str) -> dict[str, Any]:
    """Bytes that a row slice and a column slice cause to be read."""
    from mergekit_torch.checkpoint import open_checkpoint, pread

    counted: list[int] = []
    original = pread.read_into

    def counting(file: Any, path: Any, out: torch.Tensor, offset: int, **more: Any) -> None:
        counted.append(out.numel() * out.element_size())
        original(file, path, out, offset, **more)

    pread.read_into = counting
    result: dict[str, Any] = {}
    with open_checkpoint(path, read="pread") as checkpoint:
        part = checkpoint.get_slice("t7")
        rows, columns = part.shape
        for name, index, exact in (
            ("rows", (slice(10, 20),), 10 * columns * 2),
            ("columns", (slice(None), slice(64, 128)), rows * 64 * 2),
        ):
            counted.clear()
            _ = part[index]
            result[name] = {"bytes_read": sum(counted), "bytes_needed": exact}
    return result


def probe_cache(path: str) -> dict[str, Any]:
    ready(path, "warm")
    return {}


def probe_read_raw(path: str) -> dict[str, float]:
    """Two threads, preadv into one mapping with huge pages: the floor."""
    size = os.path.getsize(path)

    def work() -> None:
        memory = private_memory(size)
        view = memoryview(memory)
        fd = os.open(path, os.O_RDONLY)
        half = size // 2 // 4096 * 4096

        def part(begin: int, end: int) -> None:
            while begin < end:
                begin += os.preadv(fd, [view[begin : min(end, begin + (8 << 20))]], begin)

        threads = [threading.Thread(target=part, args=a) for a in ((0, half), (half, size))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(fd)

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_mkrs(path: str) -> dict[str, float]:
    from mergekit_torch.checkpoint import open_checkpoint

    def work() -> None:
        checkpoint = open_checkpoint(path, read="pread")
        kept.append({name: checkpoint[name] for name in checkpoint})

    kept: list[Any] = []
    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_mkrs_mmap(path: str) -> dict[str, float]:
    from mergekit_torch.checkpoint import open_checkpoint

    def work() -> None:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint[name].view(torch.int64).sum()

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_safetensors_mmap(path: str) -> dict[str, float]:
    from safetensors import safe_open

    def work() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name).view(torch.int64).sum()

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_safetensors_mmap_copy(path: str) -> dict[str, float]:
    """As the readers into memory of their own: tensors that do not need the file any more."""
    from safetensors import safe_open

    kept = []

    def work() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name).clone())

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_safetensors_pread(path: str) -> dict[str, float]:
    from safetensors import safe_open

    kept = []

    def work() -> None:
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name))

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_fast(path: str) -> dict[str, float]:
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found]

    kept = []

    def work() -> None:
        with fastsafe_open(filenames=[path], nogds=True, device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name).clone().detach())

    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(work)


def probe_read_torch(path: str) -> dict[str, float]:
    kept = []
    warm_free_memory(os.path.getsize(path) * 9 // 8)
    return cost(lambda: kept.append(torch.load(path, weights_only=True)))


# --- conversion -----------------------------------------------------------------------------------


def probe_convert(source: str, target: str, budget: str, state: str = "cold") -> dict[str, Any]:
    """To 4 bits, with proof by the system: 1 GiB of private memory in all, torch's own included."""
    from mergekit_torch.checkpoint import QuantInfo, TensorSpec, open_checkpoint
    from mergekit_torch.memory import rewrite_checkpoint

    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    ready(source, state)
    with open_checkpoint(source) as checkpoint:
        specs = {}
        for name in checkpoint:
            info = checkpoint.info(name)
            q = QuantInfo(4, 64, "affine", info.shape[-1], torch.bfloat16, torch.bfloat16)
            specs[name] = TensorSpec(torch.bfloat16, info.shape, q)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nbytes = checkpoint.nbytes
        found: dict[str, Any] = cost(
            lambda: rewrite_checkpoint(checkpoint, target, specs, budget=budget)
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["gb_s"] = round(nbytes / found["wall_s"] / 1e9, 3)
    found["cpu_s_per_gb"] = round(found["cpu_s"] / nbytes * 1e9, 3)
    found["peak_mib"] = round(peak / 1024)
    found["before_mib"] = round(before / 1024)
    found["rlimit_data_mib"] = 1024
    return found


def ready(path: str, state: str) -> None:
    """Put a file into the page cache, or out of it."""
    if state == "cold":
        drop(Path(path))
        return
    buffer = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def probe_copy(source: str, target: str, nbytes: str, state: str = "cold") -> dict[str, Any]:
    """Read all of the input and write as many bytes as the output has, at once, to the disk."""
    ready(source, state)
    size = os.path.getsize(source)

    def read_all() -> None:
        ready(source, "warm")

    def write_all() -> None:
        buffer = os.urandom(8 << 20)
        left = int(nbytes)
        with open(target, "wb", buffering=0) as file:
            unsafe = 0
            while left:
                count = file.write(buffer[:left])
                left -= count
                unsafe += count
                if unsafe >= 256 << 20:
                    os.fdatasync(file.fileno())
                    unsafe = 0
            os.fsync(file.fileno())

    def work() -> None:
        threads = [threading.Thread(target=t) for t in (read_all, write_all)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found: dict[str, Any] = cost(work)
    found["gb_s"] = round(size / found["wall_s"] / 1e9, 3)
    return found


def probe_numpy(source: str, target: str, limit: str, state: str = "cold") -> dict[str, Any]:
    """The same quantization in NumPy, in row blocks that fit the caches, on the first bytes."""
    from mergekit_torch.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        info = checkpoint.info(next(iter(checkpoint)))
    rows, columns = info.shape
    rows = min(rows, int(limit) // columns // 2)
    ready(source, state)

    def work() -> None:
        with open(source, "rb") as file, open(target, "wb") as out:
            file.seek(info.offset)
            for begin in range(0, rows, 256):
                count = min(256, rows - begin)
                raw = np.frombuffer(file.read(count * columns * 2), np.uint16)
                w = (raw.astype(np.uint32) << 16).view(np.float32).reshape(count, -1, 64)
                low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
                scale = (high - low) / np.float32(15)
                inverse = np.where(scale == 0, np.float32(0), 1 / scale)
                q = np.rint((w - low) * inverse).clip(0, 15).astype(np.uint8)
                codes = q[..., 0::2] | (q[..., 1::2] << 4)
                for part in (codes, scale.astype(np.float16), low.astype(np.float16)):
                    out.write(part.tobytes())
            out.flush()
            os.fsync(out.fileno())

    found: dict[str, Any] = cost(work)
    found["gb_s"] = round(rows * columns * 2 / found["wall_s"] / 1e9, 3)
    found["cpu_s_per_gb"] = round(found["cpu_s"] / (rows * columns * 2) * 1e9, 3)
    return found


# --- streaming ------------------------------------------------------------------------------------


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


PROBES: dict[str, Callable[..., Any]] = {
    name.removeprefix("probe_"): function
    for name, function in list(globals().items())
    if name.startswith("probe_")
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(PROBES[args.probe](*args.arguments)))


if __name__ == "__main__":
    main()

"""Probes of reading, see :mod:`benchmarks.memory_probes`."""

import os
import resource
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_common import cost, drop, private_memory, ready, warm_free_memory


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
    """Two threads, preadv into one fresh mapping of huge pages, which stays: the floor."""
    size = os.path.getsize(path)
    kept = []

    def work() -> None:
        memory = private_memory(size)
        kept.append(memory)
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

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_mkrs(path: str) -> dict[str, float]:
    from mergekit_torch.checkpoint import open_checkpoint

    def work() -> None:
        checkpoint = open_checkpoint(path, read="pread")
        kept.append({name: checkpoint[name] for name in checkpoint})

    kept: list[Any] = []
    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_mkrs_mmap(path: str) -> dict[str, float]:
    from mergekit_torch.checkpoint import open_checkpoint

    def work() -> None:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint[name].view(torch.int64).sum()

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_safetensors_mmap(path: str) -> dict[str, float]:
    from safetensors import safe_open

    def work() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name).view(torch.int64).sum()

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_safetensors_mmap_copy(path: str) -> dict[str, float]:
    """As the readers into memory of their own: tensors that do not need the file any more."""
    from safetensors import safe_open

    kept = []

    def work() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name).clone())

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_safetensors_pread(path: str) -> dict[str, float]:
    from safetensors import safe_open

    kept = []

    def work() -> None:
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name))

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_fast(path: str) -> dict[str, float]:
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found]

    kept = []

    def work() -> None:
        with fastsafe_open(filenames=[path], nogds=True, device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                kept.append(file.get_tensor(name).clone().detach())

    warm_free_memory(os.path.getsize(path))
    return cost(work)


def probe_read_torch(path: str) -> dict[str, float]:
    kept = []
    warm_free_memory(os.path.getsize(path))
    return cost(lambda: kept.append(torch.load(path, weights_only=True)))

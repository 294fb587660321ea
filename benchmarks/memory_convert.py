"""Probes of conversion, see :mod:`benchmarks.memory_probes`."""

import itertools
import os
import resource
import threading
from typing import Any

import numpy as np
import torch

from benchmarks.memory_common import cost, ready

#: As in the conversion.
_SAFE_EVERY = 256 << 20


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


def probe_copy(source: str, target: str, nbytes: str, state: str = "cold") -> dict[str, Any]:
    """Read all of the input and write as many bytes as the output has, in the way of the conversion
    (three threads, pieces of 8 MiB, a safe point every 256 MiB) with nothing in between.
    """
    ready(source, state)
    size, out, piece = os.path.getsize(source), int(nbytes), 8 << 20
    numbers = itertools.count()

    def part(reading: int, writing: int) -> None:
        view = memoryview(bytearray(piece))
        while (begin := next(numbers) * piece) < size:
            count = os.preadv(reading, [view[: size - begin]], begin)
            first, last = begin * out // size, (begin + count) * out // size
            os.pwrite(writing, view[: last - first], first)
            if first // _SAFE_EVERY != last // _SAFE_EVERY:
                os.fdatasync(writing)

    def work() -> None:
        with open(source, "rb", buffering=0) as file, open(target, "wb", buffering=0) as result:
            arguments = (file.fileno(), result.fileno())
            threads = [threading.Thread(target=part, args=arguments) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os.fsync(result.fileno())

    found: dict[str, Any] = cost(work)
    found["gb_s"] = round(size / found["wall_s"] / 1e9, 3)
    return found


class NumpyQuantizer:
    """Rows of bfloat16 to 4 bits in groups of 64, bit for bit as ``ops.quantize``.

    As somebody would write it who cares: float32 in blocks that fit a second-level cache, results
    into the same buffers each time.
    """

    def __init__(self, rows: int, columns: int) -> None:
        groups = (rows, columns // 64, 64)
        self.raw = np.empty(groups, np.uint16)
        self._wide = np.empty(groups, np.uint32)
        self._values = np.empty(groups, np.float32)
        self._codes = np.empty(groups, np.uint8)

    def __call__(self) -> tuple[Any, Any, Any]:
        """Codes, scale and offset of what is in ``raw``."""
        np.left_shift(self.raw, 16, out=self._wide, dtype=np.uint32)
        w, t = self._wide.view(np.float32), self._values
        low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
        step = np.float32(1) / np.float32(15)
        offset = _bfloat16(low)
        shift = _float32(offset)
        scale = _bfloat16(high * step - shift * step)
        scale[low == high] = 0
        wide = _float32(scale)
        inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
        np.subtract(w, shift, out=t)
        np.multiply(t, inverse, out=t)
        np.rint(t, out=t)
        np.clip(t, 0, 15, out=t)
        np.copyto(self._codes, t, casting="unsafe")
        pairs = self._codes.view(np.uint16)
        return (pairs | pairs >> 4).astype(np.uint8), scale, offset


def _bfloat16(values: Any) -> Any:
    """The bits of float32 values rounded to bfloat16."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def _float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def probe_numpy(source: str, target: str, limit: str, state: str = "cold") -> dict[str, Any]:
    """The first bytes converted in NumPy: the same results in the same places, and fsync."""
    from mergekit_torch import ops
    from mergekit_torch.checkpoint import open_checkpoint

    block = 128
    with open_checkpoint(source) as checkpoint:
        name = next(iter(checkpoint))
        info = checkpoint.info(name)
        expected = ops.quantize(checkpoint[name][:block], 4, 64, "affine")
    rows, columns = info.shape
    rows = min(rows, int(limit) // columns // 2) // block * block
    quantize = NumpyQuantizer(block, columns)
    ready(source, state)

    def work() -> None:
        with open(source, "rb", buffering=0) as file, open(target, "wb", buffering=0) as out:
            file.seek(info.offset)
            for begin in range(0, rows, block):
                file.readinto(quantize.raw.data)
                place = 0
                for part in quantize():
                    out.seek(place + begin // block * part.nbytes)
                    out.write(part)
                    place += rows // block * part.nbytes
            os.fsync(out.fileno())

    found: dict[str, Any] = cost(work)
    with open(source, "rb") as file:
        file.seek(info.offset)
        file.readinto(quantize.raw.data)
    for part, correct in zip(quantize(), expected, strict=True):
        assert part.tobytes() == correct.view(torch.uint8).numpy().tobytes()
    found["gb_s"] = round(rows * columns * 2 / found["wall_s"] / 1e9, 3)
    found["cpu_s_per_gb"] = round(found["cpu_s"] / (rows * columns * 2) * 1e9, 3)
    return found

"""Reading tensors with ``pread`` into memory of their own."""

from __future__ import annotations

import io
import itertools
import math
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError

__all__ = ["ReadMemory", "available_memory", "read_into", "read_slice", "read_tensor"]

#: Threads of one read. More of them only help where the disk wants a deeper queue.
READ_THREADS = min(4, os.cpu_count() or 1)
#: Bytes of freed tensors that are kept to be read into again; fresh memory costs page faults.
_KEPT = 64 << 20


class ReadMemory:
    """Where tensors of ``read="pread"`` live: huge pages, a few of them reused."""

    def __init__(self) -> None:
        self._handle: int = torch.ops.mkrs._arena_create(-1, "pooled", _KEPT)
        self.close = weakref.finalize(self, torch.ops.mkrs._arena_close, self._handle)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor.

        Raises:
            MemoryError: the system has no memory left.
        """
        try:
            tensor: Tensor = torch.ops.mkrs._arena_empty(self._handle, list(size), dtype)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise MemoryError(f"cannot read {list(size)} of {dtype}: {error}") from None
            if self.close.alive:
                raise
            return torch.empty(tuple(size), dtype=dtype)  # closed while another thread reads
        return tensor


def read_into(
    file: io.FileIO,
    path: Path,
    out: Tensor,
    offset: int,
    *,
    row_bytes: int | None = None,
    row_stride: int | None = None,
    rows: int = 1,
    threads: int = READ_THREADS,
) -> None:
    """Fill ``out``, contiguous on the CPU, with the file's bytes at ``offset``.

    With ``row_bytes``, ``row_stride`` and ``rows``: that many pieces that lie ``row_stride`` apart.

    Raises:
        OSError: the system cannot read; names file and offset.
        CheckpointError: the file ends before.
    """
    if out.numel() == 0:
        return
    raw = out.view(-1).view(torch.uint8) if out.dim() else out.view(1).view(torch.uint8)
    count = raw.numel() if row_bytes is None else row_bytes
    error, position = torch.ops.mkrs._read_file(
        raw, file.fileno(), offset, count, row_stride or count, rows, threads
    )
    if error == -1:
        return
    if error == 0:
        raise CheckpointError(
            f"{path}: was truncated after it was opened: it ends before byte {position}; "
            "open it again"
        )
    reason = f"cannot read at offset {position}: {os.strerror(error)}"
    raise OSError(error, reason, str(path))


def read_tensor(
    file: io.FileIO,
    path: Path,
    memory: ReadMemory,
    begin: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Read a whole tensor stored at ``begin``."""
    out = memory.empty(shape, dtype)
    read_into(file, path, out, begin)
    return out


def read_slice(
    file: io.FileIO,
    path: Path,
    memory: ReadMemory,
    begin: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    index: Sequence[int | slice],
) -> Tensor:
    """Read ``tensor[index]`` of a tensor stored at ``begin``, and nothing else of it.

    ``index`` has an integer or a slice of step 1 for every dimension.
    """
    ranges = []
    result = []
    for part, size in zip(index, shape, strict=True):
        if isinstance(part, slice):
            first, last, _ = part.indices(size)
            ranges.append((first, max(first, last)))
            result.append(max(first, last) - first)
        else:
            ranges.append((part, part + 1))
    out = memory.empty(result, dtype)
    if out.numel() == 0:
        return out
    # Bytes from one index to the next, for every dimension.
    steps = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    # The innermost dimension that is cut; everything inside it is one run of bytes.
    cut = max((i for i, r in enumerate(ranges) if r != (0, shape[i])), default=0)
    if not shape:
        read_into(file, path, out, begin)
        return out
    run = (ranges[cut][1] - ranges[cut][0]) * steps[cut]
    begin += ranges[cut][0] * steps[cut]
    # Runs of the next dimension outward go in one call.
    outer = max(cut - 1, 0)
    rows = ranges[outer][1] - ranges[outer][0] if cut else 1
    stride = steps[outer] if cut else run
    if cut:
        begin += ranges[outer][0] * stride
    raw = out.view(-1).view(torch.uint8) if out.dim() else out.view(1).view(torch.uint8)
    done = 0
    for indices in itertools.product(*(range(*ranges[i]) for i in range(outer))):
        offset = begin + sum(i * step for i, step in zip(indices, steps, strict=False))
        target = raw[done : done + rows * run]
        read_into(file, path, target, offset, row_bytes=run, row_stride=stride, rows=rows)
        done += rows * run
    return out


def available_memory() -> int:
    """Bytes that this process may take without swapping, as far as the system says."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    if not limits and sys.platform != "win32":
        # macOS has no such file; half of its memory is a cautious guess.
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(limits)) if limits else 0

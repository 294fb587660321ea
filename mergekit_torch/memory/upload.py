"""``Uploader``: rows of a checkpoint to an NVIDIA GPU, beside what it computes."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .arena import Arena, BudgetError

__all__ = ["Uploader"]

#: Bytes of a page-locked buffer, and how many there are: one is filled while others are copied.
_BUFFER = 8 << 20
_BUFFERS = 4


class Target(NamedTuple):
    """A part of a tensor on the device: where it is in its block, and its rows."""

    offset: int
    rows: Tensor


#: Reads rows ``[begin, begin + n)`` of a tensor into host tensors ``[n, elements]``.
ReadRows = Callable[[int, Mapping[str, Tensor]], None]


class Uploader:
    """Copies on a stream of its own, from page-locked memory.

    *Order.* Device memory is allocated on the copy stream, so torch reuses it in that stream's
    order; before a tensor's memory is freed, the copy stream waits for its users
    (:meth:`before_free`). A user's stream waits for the copy (:meth:`use`). The host waits for
    neither, only for a free buffer.

    *Host memory.* With ``host_budget`` a tensor's bytes stay in page-locked memory after the first
    read, as many tensors as fit, and come from there the next time. Nothing is evicted: weights
    are asked for in cycles, where dropping the oldest would drop what is needed next.

    Args:
        device: a CUDA device.
        host_budget: most bytes of host memory for copies that stay; 0 for none.
    """

    def __init__(self, device: torch.device, host_budget: int) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._users: dict[int, torch.cuda.Stream] = {}
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._made = 0
        self._free = threading.Condition(self._lock)
        self._host = Arena("cpu", host_budget, strategy="none") if host_budget else None
        self._full = False
        self._kept: dict[str, Tensor] = {}

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this thread's device memory is allocated on the copy stream."""
        context: contextlib.AbstractContextManager[None] = torch.cuda.stream(self.stream)
        return context

    def use(self, copied: torch.cuda.Event | None) -> None:
        """The current stream will use a tensor: it waits for the copy."""
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            self._users[stream.cuda_stream] = stream
        if copied is not None and not copied.query():
            stream.wait_event(copied)

    def mark(self) -> torch.cuda.Event:
        """What the current stream has been given so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def before_free(self, idle: torch.cuda.Event | None) -> None:
        """Later copies wait for a tensor's users: until ``idle``, or all that is under way."""
        if idle is not None:
            self.stream.wait_event(idle)
            return
        with self._lock:
            users = list(self._users.values())
        for user in users:
            self.stream.wait_event(user.record_event())

    def leave(self, tensor: Tensor) -> None:
        """Nobody will wait for this tensor's users any more: torch is to do it."""
        with self._lock:
            for user in self._users.values():
                tensor.record_stream(user)

    def upload(
        self, name: str, target: Tensor, parts: Mapping[str, Target], read: ReadRows
    ) -> torch.cuda.Event:
        """Fill a tensor's block on the device; returns when all copies have been given.

        Args:
            name: the tensor.
            target: the whole block, uint8.
            parts: the tensor's parts in it.
            read: reads rows of all parts.
        """
        kept = self._keep(name, target, parts, read)
        with torch.cuda.stream(self.stream):
            if kept is not None:
                target.copy_(kept, non_blocking=True)
            else:
                self._through_buffers(parts, read)
            return self.stream.record_event()

    def _keep(
        self, name: str, target: Tensor, parts: Mapping[str, Target], read: ReadRows
    ) -> Tensor | None:
        """The tensor's bytes in page-locked memory, if they are there or fit there."""
        kept, size = self._kept.get(name), target.numel()
        if kept is not None:
            return kept[:size]
        if self._host is None or self._full:
            return None
        try:
            # Whole pages: two registrations must not share one.
            memory = self._host.empty(max(size, mmap.PAGESIZE), dtype=torch.uint8)
        except BudgetError:
            self._full = True
            return None
        host = memory[:size]
        views = {
            part: host[p.offset : p.offset + p.rows.numel() * p.rows.element_size()]
            .view(p.rows.dtype)
            .view(p.rows.shape)
            for part, p in parts.items()
        }
        read(0, views)
        _page_lock(memory)
        self._kept[name] = memory
        return host

    def _through_buffers(self, parts: Mapping[str, Target], read: ReadRows) -> None:
        rows = max(p.rows.shape[0] for p in parts.values())
        row_bytes = [p.rows.shape[1] * p.rows.element_size() for p in parts.values()]
        # 64 bytes to align each part.
        step = max(1, (_BUFFER - 64 * len(row_bytes)) // max(1, sum(row_bytes)))
        needed = sum(-(-min(step, rows) * n // 64) * 64 for n in row_bytes)
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            buffer, copied = self._take(needed)
            try:
                staging, offset = {}, 0
                for (part, p), n in zip(parts.items(), row_bytes, strict=True):
                    raw = buffer[offset : offset + count * n]
                    staging[part] = raw.view(p.rows.dtype).view(count, p.rows.shape[1])
                    offset += -(-count * n // 64) * 64
                read(begin, staging)
                for part, p in parts.items():
                    p.rows[begin : begin + count].copy_(staging[part], non_blocking=True)
                copied.record(self.stream)
            finally:
                with self._free:
                    self._buffers.append((buffer, copied))
                    self._free.notify()

    def _take(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """A buffer that no copy reads any more."""
        with self._free:
            while not self._buffers and self._made >= _BUFFERS:
                self._free.wait()
            if self._buffers:
                buffer, copied = self._buffers.popleft()
            else:
                self._made += 1
                buffer, copied = torch.empty(0, dtype=torch.uint8), torch.cuda.Event()
        copied.synchronize()
        if buffer.numel() < size:  # also a single row that is larger than a buffer
            buffer = torch.empty(max(size, _BUFFER), dtype=torch.uint8, pin_memory=True)
        return buffer, copied

    def close(self) -> None:
        """Wait for all copies and give the host memory back."""
        self.stream.synchronize()
        with self._lock:
            self._buffers.clear()
        for memory in self._kept.values():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
        self._kept.clear()
        if self._host is not None:
            self._host.close()


def _page_lock(memory: Tensor) -> None:
    # Not torch's page-locked allocator: it rounds every size up to a power of two.
    cudart = torch.cuda.cudart()
    result = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if result != cudart.cudaError.success:
        raise MemoryError(
            f"cannot page-lock {memory.numel()} bytes for host_budget: "
            f"{cudart.cudaGetErrorString(result)}"
        )

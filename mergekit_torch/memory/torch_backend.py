"""An arena's memory from torch's own allocator, for devices whose memory torch has to own."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["TorchBackend"]

_ALIGNMENT = 256  # what vector loads of any device want
_MIN_PIECE = 1 << 16


class TorchBackend:
    """Budget and counters over torch's allocator.

    A storage is counted until it dies, which a weak reference tells, so views are seen too. torch's
    caching allocators pool; what they keep for reuse is not counted here.
    """

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self._device = device
        self._budget = budget
        self._lock = threading.Lock()
        self._live: list[tuple[StorageWeakRef, int, int]] = []
        self._active = self._requested = self._peak = self._allocations = 0
        self.frame_hint = 0

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of its own storage."""
        if any(n < 0 for n in size):
            raise ValueError(f"sizes must not be negative, got {list(size)}")
        return self._allocate(math.prod(size) * dtype.itemsize).view(dtype).view(size)

    def block(self, nbytes: int) -> TorchBlock:
        """Memory for several tensors."""
        return TorchBlock(self._allocate(nbytes))

    def frame(self, size_hint: int) -> TorchFrame:
        """Pieces to cut scratch from."""
        return TorchFrame(self, max(size_hint, self.frame_hint, _MIN_PIECE))

    def stats(self) -> Sequence[int]:
        """The fields of ArenaStats."""
        with self._lock:
            self._sweep()
            return (
                *(self._active, self._requested, 0, self._peak, self._peak),
                *(self._allocations, 0, len(self._live)),
            )

    def trim(self, keep: int) -> int:
        """Nothing: free memory is torch's."""
        return 0

    def close(self) -> None:
        """Nothing is kept here."""

    def _allocate(self, nbytes: int) -> Tensor:
        # What torch's allocators hand out at least.
        charged = -(-max(nbytes, 1) // 64) * 64
        with self._lock:
            self._sweep()
            if self._budget is not None and self._active + charged > self._budget:
                from .arena import BudgetError

                raise BudgetError(
                    f"needs {charged} bytes more than the {self._active} in use, and the budget "
                    f"is {self._budget} bytes"
                )
            # Under the lock: two threads must not both pass the check.
            tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._live.append((StorageWeakRef(tensor.untyped_storage()), charged, nbytes))
            self._active += charged
            self._requested += nbytes
            self._allocations += 1
            self._peak = max(self._peak, self._active)
        return tensor

    def _sweep(self) -> None:
        live = []
        for entry in self._live:
            if entry[0].expired():
                self._active -= entry[1]
                self._requested -= entry[2]
            else:
                live.append(entry)
        self._live = live


class TorchFrame:
    """Pieces of a torch backend, cut by an offset."""

    def __init__(self, backend: TorchBackend, next_size: int) -> None:
        self._backend = backend
        self._next_size = next_size
        self._piece: Tensor | None = None
        self._offset = self._used = 0

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(size) * dtype.itemsize
        step = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        if self._piece is None or self._offset + step > self._piece.numel():
            try:
                self._piece = self._backend._allocate(max(step, self._next_size))
            except MemoryError:
                self._piece = self._backend._allocate(step)
            self._offset = 0
            self._next_size = 2 * self._piece.numel()
        begin = self._offset
        self._offset += step
        self._used += step
        return self._piece[begin : begin + nbytes].view(dtype).view(size)

    def close(self) -> None:
        self._piece = None
        self._backend.frame_hint = self._used


class TorchBlock:
    """A block that is a torch storage."""

    def __init__(self, base: Tensor) -> None:
        self._base: Tensor | None = base
        self.nbytes = -(-max(base.numel(), 1) // 64) * 64

    @property
    def tensors(self) -> int:
        if self._base is None:
            return 0
        storage = self._base.untyped_storage()
        # The base tensor and `storage` itself are two of the owners.
        count: int = torch._C._storage_Use_Count(storage._cdata) - 2
        return count

    def tensor(self, offset: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert self._base is not None
        nbytes = math.prod(size) * dtype.itemsize
        # detach: the base must not be kept as the view's autograd base.
        return self._base.detach()[offset : offset + nbytes].view(dtype).view(size).detach()

    def release(self) -> None:
        self._base = None

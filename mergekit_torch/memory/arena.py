"""``Arena``: tensors under a byte budget."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .. import ops as _ops  # noqa: F401  (registers the arena's ops)
from .._C import arena_empty as _arena_empty
from ..checkpoint.writer import parse_size
from .torch_backend import TorchBackend

__all__ = ["Arena", "ArenaStats", "BudgetError"]

Strategy = Literal["pooled", "bump", "none"]

#: dtypes as the native function takes them: DLPack's code * 256 + bits. Others go through an op.
_CODES = {
    **{torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64},
    torch.uint8: 1 << 8 | 8,
    **{torch.float16: 2 << 8 | 16, torch.float32: 2 << 8 | 32, torch.float64: 2 << 8 | 64},
    torch.bfloat16: 4 << 8 | 16,
    torch.bool: 6 << 8 | 8,
}
#: What torch.utils.dlpack.from_dlpack calls for a capsule.
_from_dlpack: Callable[[object], Tensor] = torch._C._from_dlpack


class BudgetError(MemoryError):
    """A request does not fit a byte budget; the message has the numbers."""


@dataclass(frozen=True)
class ArenaStats:
    """Where an arena's bytes are.

    Attributes:
        active: bytes of blocks that tensors use.
        requested: bytes that were asked for in those; ``active - requested`` is lost to rounding.
        cached: bytes of free blocks kept for reuse.
        peak: largest ``active`` so far.
        reserved_peak: largest ``active + cached`` so far; never above the budget.
        allocations: blocks handed out so far.
        hits: how many of those came from the pool; the others were fresh (``misses``).
        live: blocks that tensors use.
    """

    active: int
    requested: int
    cached: int
    peak: int
    reserved_peak: int
    allocations: int
    hits: int
    live: int

    @property
    def misses(self) -> int:
        """Allocations that the pool could not serve."""
        return self.allocations - self.hits

    @property
    def waste(self) -> float:
        """Bytes in use over bytes asked for; 1.0 if nothing is in use."""
        return self.active / self.requested if self.requested else 1.0


class Block(Protocol):
    """Memory of an arena that its holder turns into tensors, several over the same bytes too."""

    @property
    def nbytes(self) -> int:
        """Bytes that the budget is charged with."""

    @property
    def tensors(self) -> int:
        """How many tensors are alive over it, views of handed-out tensors included."""

    def tensor(self, offset: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor over the block's bytes from ``offset``; keeps the memory alive by itself."""

    def release(self) -> None:
        """Give up the holder's reference; the memory goes back when the last tensor dies."""


class Frame(Protocol):
    """Where allocations inside ``with arena.frame()`` come from."""

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor from the frame's pieces."""

    def close(self) -> None:
        """Give the pieces back, those in use when their last tensor dies."""


class Arena:
    """Hands out uninitialized tensors whose memory together stays within a budget.

    A tensor is an ordinary tensor: its memory returns to the arena when the last tensor over it,
    views included, is gone. Closing the arena leaves tensors valid. All methods are thread safe.

    On the CPU memory comes from the arena's own pool: 64-byte aligned, whole pages from one page on
    (16 KiB where pages are), huge pages where the system offers them from 2 MiB on. A free block
    serves a request if it is smaller than ``min(2 * request, request + 2 pages)``; what is kept
    for reuse is bounded by ``max_cached``. On other devices, and with ``backend="torch"``, memory
    is that of torch's allocator, which pools by itself, and the arena keeps the budget.

    Args:
        device: where tensors live.
        budget: most bytes, free blocks kept for reuse included; an int or like ``"512MiB"``. None:
            no limit.
        strategy: ``"pooled"`` keeps returned blocks for reuse; ``"bump"`` allocates inside frames
            only; ``"none"`` takes every block fresh from the system and gives it back at once.
        max_cached: most bytes kept for reuse; None: as many as were ever in use at once, so that
            the arena never holds more than twice its peak.
        backend: ``"native"`` (CPU only) or ``"torch"``; None chooses by device.

    Raises:
        ValueError: an unknown strategy or backend, a budget that is not a size.

    Example::

        arena = Arena("cpu", "1GiB")
        x = arena.empty(1024, 1024)
        with arena.frame():
            scratch = arena.empty(4096)  # back when the frame ends and nothing uses it
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        budget: int | str | None = None,
        *,
        strategy: Strategy = "pooled",
        max_cached: int | str | None = None,
        backend: Literal["native", "torch"] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.budget = None if budget is None else parse_size(budget)
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be 'pooled', 'bump' or 'none', got {strategy!r}")
        if backend not in (None, "native", "torch"):
            raise ValueError(f"backend must be 'native' or 'torch', got {backend!r}")
        if backend == "native" and self.device.type != "cpu":
            raise ValueError(f"backend 'native' allocates on the cpu, got device {self.device}")
        self.strategy = strategy
        self._frames = _Frames()
        self._open_frames = 0  # of all threads
        self._lock = threading.Lock()
        self._closed = False
        cached = None if max_cached is None else (0 if max_cached == 0 else parse_size(max_cached))
        if backend == "torch" or self.device.type != "cpu":
            self._backend: _NativeBackend | TorchBackend = TorchBackend(self.device, self.budget)
        else:
            self._backend = _NativeBackend(self.budget, strategy, cached)
        # The native op makes these checks itself.
        native = isinstance(self._backend, _NativeBackend)
        self._empty: Callable[..., Tensor] = self._backend.empty if native else self._checked_empty
        #: The native arena's handle; None while frames are open and for other backends.
        self._direct = self._backend.handle if isinstance(self._backend, _NativeBackend) else None

    def __repr__(self) -> str:
        budget = "no limit" if self.budget is None else f"{self.budget} bytes"
        return f"Arena({str(self.device)!r}, budget={budget}, strategy={self.strategy!r})"

    def empty(self, *size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized contiguous tensor, from the innermost open frame of this thread if any.

        Args:
            size: sizes, or one sequence of them.
            dtype: any dtype that checkpoints hold.

        Raises:
            BudgetError: it does not fit the budget beside what is in use.
            MemoryError: the system has no memory left.
            ValueError: a negative size, a closed arena, or a ``"bump"`` arena without a frame.
        """
        if self._direct is not None and (code := _CODES.get(dtype)) is not None:
            try:
                return _from_dlpack(_arena_empty(self._direct, size, code))
            except RuntimeError as error:
                self._check_open()
                raise _translated(error, size) from None
        if len(size) == 1 and isinstance(size[0], Sequence):
            size = tuple(size[0])
        frames = self._frames.stack
        try:
            if not frames:
                return self._empty(size, dtype)
            self._check_open()
            return frames[-1].empty(size, dtype)  # type: ignore[arg-type]
        except RuntimeError as error:
            self._check_open()
            raise _translated(error, size) from None

    def _checked_empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._check_open()
        if self.strategy == "bump":
            raise ValueError("a 'bump' arena allocates inside `with arena.frame()` only")
        return self._backend.empty(size, dtype)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialized contiguous tensor of the size and dtype of ``tensor``."""
        return self.empty(tensor.shape, dtype=tensor.dtype)

    def block(self, nbytes: int) -> Block:
        """Memory that the caller turns into tensors itself; give it back with ``release()``.

        Raises:
            BudgetError, MemoryError, ValueError: as :meth:`empty`.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative, got {nbytes}")
        self._check_open()
        try:
            return self._backend.block(nbytes)
        except RuntimeError as error:
            raise _translated(error, nbytes) from None

    def block_over(self, view: Tensor, charge: int) -> Block:
        """A block over bytes of a file's map, which takes ``charge`` bytes of the budget.

        When the last tensor over it is gone, its pages are dropped from this process's memory; the
        map must be one that nobody writes into. On the CPU's native backend only.

        Args:
            view: uint8.
            charge: bytes.

        Raises:
            BudgetError, ValueError: as :meth:`empty`.
        """
        assert isinstance(self._backend, _NativeBackend)
        self._check_open()
        try:
            return self._backend.block_over(view, charge)
        except RuntimeError as error:
            raise _translated(error, charge) from None

    @contextlib.contextmanager
    def frame(self, size: int | str | None = None) -> Iterator[None]:
        """Scratch: inside, this thread's allocations are cut from few large pieces.

        At the end the pieces go back as a whole. A tensor that outlives the frame stays valid and
        keeps its piece until it dies. Frames nest.

        Args:
            size: bytes of the first piece; by default what the last frame used.
        """
        self._check_open()
        hint = 0 if size is None else parse_size(size)
        stack = self._frames.stack
        frame = self._backend.frame(hint)
        stack.append(frame)
        self._count_frame(1)
        try:
            yield
        finally:
            self._count_frame(-1)
            stack.remove(frame)
            frame.close()

    def _count_frame(self, change: int) -> None:
        with self._lock:
            self._open_frames += change
            if isinstance(self._backend, _NativeBackend):
                self._direct = None if self._open_frames else self._backend.handle

    def stats(self) -> ArenaStats:
        """Counters of this moment."""
        return ArenaStats(*self._backend.stats())

    def trim(self, keep: int = 0) -> int:
        """Give free blocks back to the system, oldest first, until ``keep`` bytes of them are left.

        Returns:
            The bytes given back. Memory of torch's allocator is not the arena's to return: 0.
        """
        return self._backend.trim(keep)

    def close(self) -> None:
        """Allocate nothing any more and keep nothing for reuse. Tensors stay valid."""
        if not self._closed:
            self._closed = True
            self._backend.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the arena must be open, got a closed one")


class _Frames(threading.local):
    """The open frames of a thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []


def _translated(error: RuntimeError, size: object) -> Exception:
    """The native arena's errors as the exceptions that Arena promises."""
    message = str(error)
    if "mkrs::arena_empty: over budget: " in message:
        return BudgetError(message.split("over budget: ", 1)[1])
    if "mkrs::arena_empty: out of memory" in message:
        return MemoryError(message)
    if "mkrs::arena" in message:
        return ValueError(message[message.index("mkrs::arena") :])
    if "Expected a value of type" in message:
        return TypeError(f"sizes must be integers and dtype a torch.dtype, got {size}")
    return error


class _NativeBackend:
    """The pool of csrc/memory/arena.cpp."""

    def __init__(self, budget: int | None, strategy: str, max_cached: int | None) -> None:
        self.handle: int = torch.ops.mkrs._arena_create(
            -1 if budget is None else budget, strategy, -1 if max_cached is None else max_cached
        )
        self._last: Sequence[int] = (0,) * 8
        # An arena that is simply dropped lets go of its pool as well.
        self._finalizer = weakref.finalize(self, torch.ops.mkrs._arena_close, self.handle)

        #: ``empty(size, dtype)``: the op itself, for it is called often.
        self.empty: Callable[[Sequence[int], torch.dtype], Tensor] = functools.partial(
            torch.ops.mkrs._arena_empty.default, self.handle
        )

    def block(self, nbytes: int) -> Block:
        return _NativeBlock(torch.ops.mkrs._arena_block(self.handle, nbytes))

    def block_over(self, view: Tensor, charge: int) -> Block:
        return _NativeBlock(torch.ops.mkrs._arena_block_over(self.handle, view, charge))

    def frame(self, size_hint: int) -> Frame:
        return _NativeFrame(torch.ops.mkrs._arena_frame_open(self.handle, size_hint))

    def stats(self) -> Sequence[int]:
        if not self._finalizer.alive:
            return self._last
        stats: list[int] = torch.ops.mkrs._arena_stats(self.handle)
        return stats

    def trim(self, keep: int) -> int:
        if not self._finalizer.alive:
            return 0
        freed: int = torch.ops.mkrs._arena_trim(self.handle, keep)
        return freed

    def close(self) -> None:
        self._last = tuple(self.stats())
        self._finalizer()


class _NativeFrame:
    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._finalizer = weakref.finalize(self, torch.ops.mkrs._arena_frame_close, handle)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor: Tensor = torch.ops.mkrs._arena_frame_empty(self._handle, size, dtype)
        return tensor

    def close(self) -> None:
        self._finalizer()


class _NativeBlock:
    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.nbytes: int = torch.ops.mkrs._arena_block_size(handle)
        self._finalizer = weakref.finalize(self, torch.ops.mkrs._arena_block_release, handle)

    @property
    def tensors(self) -> int:
        if not self._finalizer.alive:
            return 0
        count: int = torch.ops.mkrs._arena_block_tensors(self._handle)
        return count

    def tensor(self, offset: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor: Tensor = torch.ops.mkrs._arena_block_tensor(self._handle, offset, size, dtype)
        return tensor

    def release(self) -> None:
        self._finalizer()

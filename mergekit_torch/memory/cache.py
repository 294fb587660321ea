"""``TensorCache``: the tensors of a checkpoint, loaded when they are asked for, under a budget."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.pread import READ_THREADS
from ..checkpoint.writer import parse_size
from ..tensor import QuantizedTensor
from .arena import Arena, Block, BudgetError
from .places import Part, Places, total
from .upload import Uploader
from .views import FileViews

__all__ = ["CacheStats", "TensorCache"]


@dataclass(frozen=True)
class CacheStats:
    """Counters of a cache; bytes are those charged to the budget.

    Attributes:
        hits: requests for a tensor that was there, or already being loaded.
        misses: requests that had to load.
        evictions: tensors dropped to make room.
        bytes_read: bytes loaded, by requests and prefetches together.
        bytes_evicted: bytes dropped.
        prefetched: tensors loaded ahead of a request.
        prefetch_used: of those, how many were then asked for.
        entries: tensors in the cache now.
        resident: bytes in use now, tensors held outside included.
        peak: largest ``resident`` so far, memory kept for reuse included; at most the budget.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: int
    bytes_evicted: int
    prefetched: int
    prefetch_used: int
    entries: int
    resident: int
    peak: int


@dataclass
class _Entry:
    name: str
    ready: threading.Event = field(default_factory=threading.Event)
    block: Block | None = None
    error: BaseException | None = None
    users: int = 0  # requests between finding the entry and having its tensor
    pins: int = 0
    fresh: bool = False  # prefetched and not asked for yet
    copied: torch.cuda.Event | None = None  # its copy to a GPU
    idle: torch.cuda.Event | None = None  # the last work that used it there, if that is known


class TensorCache:
    """Loads tensors of a checkpoint to a device on demand and keeps the most recently used.

    * The budget is never exceeded. It counts every tensor that the cache has handed out and that is
      still alive, views included: what somebody holds is neither freed nor counted twice.
    * A tensor that is asked for again while it is there is the same memory. Do not write into it.
    * Several threads may ask at once; a tensor is loaded once.
    * :meth:`prefetch` loads ahead in a background thread and never evicts what was prefetched
      before and not used yet.

    Tensors of a checkpoint are as :class:`~mergekit_torch.checkpoint.Checkpoint` has them:
    quantized ones are QuantizedTensors. On the CPU, what is in the page cache when it is loaded is
    not copied but mapped, if the checkpoint was opened with ``read="mmap"``; it counts like memory,
    and its pages are dropped with it. All else is read with ``pread``.

    On devices other than the CPU tensors are loaded through small buffers in row blocks; on CUDA
    these are page-locked and copied on a stream of their own. :meth:`get` then has the current
    stream wait for the copy, not the host. A tensor that another stream uses needs
    ``record_stream``'s care: let go of it when that stream is done.

    Args:
        checkpoint: an open checkpoint; it stays the caller's to close.
        device: where tensors go.
        budget: most bytes, or like ``"512MiB"``.
        threads: that read one tensor at once.
        backend: as for :class:`Arena`.
        host_budget: for CUDA: most bytes of page-locked host memory that keep what was read, so
            that it need not be read again. None: nothing is kept.

    Raises:
        ValueError: a budget that is not a size, or a host_budget on another device.

    Example::

        with TensorCache(open_checkpoint("model"), "cpu", "1GiB") as cache:
            cache.prefetch(["b.weight"])
            a = cache["a.weight"]
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        budget: int | str = "1GiB",
        *,
        threads: int = READ_THREADS,
        backend: Literal["native", "torch"] | None = None,
        host_budget: int | str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        if host_budget is not None and self.device.type != "cuda":
            raise ValueError(f"host_budget is for CUDA devices, got device {self.device}")
        self._arena = Arena(self.device, budget, backend=backend)
        assert self._arena.budget is not None
        #: Bytes that are never exceeded.
        self.budget: int = self._arena.budget
        self._threads = threads
        self._places = Places(checkpoint, self.device)
        self._views: FileViews | None = None
        if checkpoint.read == "mmap" and self.device.type == "cpu" and backend != "torch":
            self._views = FileViews(checkpoint)
        self._uploader: Uploader | None = None
        if self.device.type == "cuda":
            kept = 0 if host_budget is None else parse_size(host_budget)
            self._uploader = Uploader(self.device, kept)
        self._condition = threading.Condition(threading.RLock())
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._loading = 0
        self._wanted: deque[str] = deque()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._hits = self._misses = self._evictions = 0
        self._bytes_read = self._bytes_evicted = self._prefetched = self._prefetch_used = 0

    def __repr__(self) -> str:
        return f"TensorCache({self.checkpoint!r}, {str(self.device)!r}, budget={self.budget})"

    # --- asking ---------------------------------------------------------------------------------

    def get(self, name: str) -> Any:
        """The tensor, loaded if it is not there; a Tensor or QuantizedTensor on the device.

        Its memory stays while anything holds it, also past eviction and :meth:`close`.

        Raises:
            KeyError: no such tensor.
            BudgetError: it does not fit beside what is pinned or held; the message has the numbers.
            CheckpointError, OSError, NotImplementedError: loading fails as the checkpoint's would.
            ValueError: the cache is closed.
        """
        entry = self._use(name)
        try:
            if self._uploader is not None:
                entry.idle = None
                self._uploader.use(entry.copied)
            assert entry.block is not None
            return self._places.tensor(entry.name, entry.block)
        finally:
            with self._condition:
                entry.users -= 1

    __getitem__ = get

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[Any]:
        """``with cache.lease(name) as tensor``: pinned inside."""
        self.pin(name)
        try:
            yield self.get(name)
        finally:
            self.unpin(name)

    def pin(self, name: str) -> None:
        """Load a tensor and never evict it until as many :meth:`unpin` have followed.

        Raises:
            KeyError, BudgetError, CheckpointError, OSError, ValueError: as :meth:`get`.
        """
        entry = self._use(name)
        with self._condition:
            entry.pins += 1
            entry.users -= 1

    def unpin(self, name: str) -> None:
        """Undo one :meth:`pin`.

        Raises:
            ValueError: the tensor is not pinned.
        """
        with self._condition:
            entry = self._entries.get(name)
            if entry is None or entry.pins == 0:
                raise ValueError(f"tensor {name!r} must be pinned to be unpinned, and is not")
            entry.pins -= 1
            self._condition.notify_all()

    def prefetch(self, names: Iterable[str]) -> None:
        """Load these next in the background, in this order; replaces what was asked for before.

        Loads that do not fit wait for room and give way to :meth:`get`. Failures are not reported
        here; a later :meth:`get` meets them.

        Raises:
            KeyError: no such tensor.
            ValueError: the cache is closed.
        """
        wanted = list(names)
        for name in wanted:
            self.checkpoint._entry(name)
        with self._condition:
            self._check_open()
            idle = not self._wanted  # else the worker looks again by itself
            self._wanted = deque(name for name in wanted if name not in self._entries)
            if self._wanted and self._worker is None:
                self._worker = threading.Thread(
                    target=self._prefetch_loop, name="mkrs-prefetch", daemon=True
                )
                self._worker.start()
            if idle and self._wanted:
                self._condition.notify_all()

    def notify(self, names: Iterable[str] = ()) -> None:
        """Tell a waiting prefetch that tensors have been let go of; it looks by itself as well.

        Args:
            names: of them. On a GPU their memory can then be used again when what the current
                stream was given so far is done, instead of all that it will have been given by
                then.
        """
        with self._condition:
            if self._uploader is not None:
                mark = None
                for name in names:
                    entry = self._entries.get(name)
                    if entry is not None and self._evictable(entry):
                        entry.idle = mark = mark or self._uploader.mark()
            self._condition.notify_all()

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor will be charged with, rounding included.

        Raises:
            KeyError, NotImplementedError: as :meth:`get`.
        """
        return self._places.nbytes(name)

    def __contains__(self, name: object) -> bool:
        """Whether the tensor is loaded, or being loaded, now."""
        with self._condition:
            return name in self._entries

    def stats(self) -> CacheStats:
        """Counters of this moment."""
        with self._condition:
            memory = self._arena.stats()
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                bytes_read=self._bytes_read,
                bytes_evicted=self._bytes_evicted,
                prefetched=self._prefetched,
                prefetch_used=self._prefetch_used,
                entries=len(self._entries),
                resident=memory.active,
                peak=memory.reserved_peak,
            )

    def clear(self) -> None:
        """Evict all that is neither pinned nor held, and give the memory back to the system."""
        with self._condition:
            while self._evict(fresh=True):
                pass
            self._arena.trim()

    def close(self) -> None:
        """Stop prefetching and let go of everything. Tensors that are held stay valid."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._wanted.clear()
            self._condition.notify_all()
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        with self._condition:
            for entry in self._entries.values():
                if entry.block is not None:
                    if self._uploader is not None:
                        self._uploader.leave(entry.block.tensor(0, (0,), torch.uint8))
                    entry.block.release()
            self._entries.clear()
            self._arena.close()
        if self._views is not None:
            self._views.close()
        if self._uploader is not None:
            self._uploader.close()

    def __enter__(self) -> TensorCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self.close()

    # --- loading --------------------------------------------------------------------------------

    def _use(self, name: str) -> _Entry:
        """The loaded entry, counted as one user."""
        self._places.layout(name)  # raises for an unknown name or type
        with self._condition:
            self._check_open()
            entry = self._entries.get(name)
            owner = entry is None
            was_fresh = entry is not None and entry.fresh
            if entry is None:
                entry = self._entries[name] = _Entry(name)
                self._misses += 1
                with contextlib.suppress(ValueError):
                    self._wanted.remove(name)
            else:
                self._hits += 1
                self._prefetch_used += entry.fresh
                entry.fresh = False
                self._entries.move_to_end(name)
            entry.users += 1
        if owner:
            self._load(entry, wait=True, threads=self._threads)
        elif not entry.ready.is_set():
            entry.ready.wait()
        if entry.error is not None:
            # A prefetch that gave way is not a failure of this request.
            if isinstance(entry.error, _GaveWay):
                with self._condition:  # it will be counted as the miss that it is
                    self._hits -= 1
                    self._prefetch_used -= was_fresh
                return self._use(name)
            raise entry.error
        return entry

    def _load(self, entry: _Entry, *, wait: bool, threads: int) -> None:
        """Fill an entry that this thread has put into the books; errors go into the entry."""
        layout = self._places.layout(entry.name)
        block: Block | None = None
        views = None
        try:
            if not wait:
                self._make_room(entry.name)
            if self._views is not None:
                sizes = {part: p.dtype.itemsize for part, p in layout.items()}
                views = self._views.find(entry.name, sizes)
            block = self._reserve(layout, entry.name, wait, views)
            try:
                if views is None:
                    entry.copied = self._places.fill(entry.name, block, self._uploader, threads)
            finally:
                with self._condition:
                    self._loading -= 1
            with self._condition:
                self._check_open()
                self._bytes_read += block.nbytes
                entry.block = block
        except BaseException as error:
            # An exception keeps its frames, and theirs keep tensors over the block.
            traceback.clear_frames(error.__traceback__)
            with self._condition:
                entry.error = error
                if self._entries.get(entry.name) is entry:
                    del self._entries[entry.name]
            if block is not None:
                block.release()
            if not isinstance(error, Exception):
                raise
        finally:
            with self._condition:
                entry.ready.set()
                self._condition.notify_all()

    def _make_room(self, name: str) -> None:
        """Evict for a prefetch, or give way before any of its work is done."""
        nbytes = self.nbytes(name)
        with self._condition:
            while self._arena.stats().active + nbytes > self.budget:
                if not self._evict(fresh=False):
                    raise _GaveWay

    def _reserve(
        self,
        layout: dict[str, Part],
        name: str,
        wait: bool,
        views: dict[str, Tensor] | None,
    ) -> Block:
        """Memory for a tensor, or the books for views, evicting for it.

        Without ``wait`` prefetched tensors stay.
        """
        nbytes = total(layout)
        offsets = {part: p.offset for part, p in layout.items()}
        with self._condition:
            while True:
                self._check_open()
                try:
                    block: Block
                    if views is not None:
                        assert self._views is not None
                        block = self._views.block(self._arena, views, offsets, self.nbytes(name))
                    else:
                        with self._uploader.allocating() if self._uploader else _NOTHING:
                            block = self._arena.block(nbytes)
                    self._loading += 1  # from here on others may wait for this load
                    return block
                except BudgetError as error:
                    if self._evict(fresh=wait):
                        continue
                    if not wait:
                        raise _GaveWay from None
                    if self._loading or any(e.users and e.block for e in self._entries.values()):
                        # Those will be done soon, and can be evicted then.
                        self._condition.wait(0.05)
                        continue
                    pinned = [e for e in self._entries.values() if e.pins]
                    raise BudgetError(
                        f"{self.checkpoint.path}: tensor {name!r} of {nbytes} bytes does not fit "
                        f"the cache: {error}; {len(pinned)} tensors are pinned, the others in use "
                        "are held by the caller"
                    ) from None

    def _evict(self, *, fresh: bool) -> bool:
        """Drop one tensor that nobody uses: the least recently used, then, if allowed, the
        prefetched one that is needed last.
        """
        for entry in self._entries.values():
            if not entry.fresh and self._evictable(entry):
                break
        else:
            candidates = reversed(self._entries.values()) if fresh else ()
            found = next((e for e in candidates if self._evictable(e)), None)
            if found is None:
                return False
            entry = found
        assert entry.block is not None
        del self._entries[entry.name]
        self._evictions += 1
        self._bytes_evicted += entry.block.nbytes
        if self._uploader is not None:
            self._uploader.before_free(entry.idle)
        entry.block.release()
        return True

    @staticmethod
    def _evictable(entry: _Entry) -> bool:
        return (
            entry.block is not None
            and entry.pins == 0
            and entry.users == 0
            and entry.block.tensors == 0
        )

    def _prefetch_loop(self) -> None:
        while True:
            with self._condition:
                while not self._wanted and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                name = self._wanted.popleft()
                if name in self._entries:
                    continue
                entry = self._entries[name] = _Entry(name, fresh=True)
            try:
                self._load(entry, wait=False, threads=self._threads)
            except BaseException as error:  # only what is no Exception gets here
                entry.error = error
                return
            with self._condition:
                if entry.error is None:
                    self._prefetched += 1
                elif isinstance(entry.error, _GaveWay) and not self._closed:
                    # Try again when something may have been freed. Tensors that die tell nobody,
                    # so look again soon in any case.
                    if name not in self._wanted and name not in self._entries:
                        self._wanted.appendleft(name)
                    self._condition.wait(0.002)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the cache must be open, got a closed one")


_NOTHING = contextlib.nullcontext()


class _GaveWay(Exception):
    """A prefetch found no room."""


def tensor_parts(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors of a cached tensor: itself under ``""``, or its components."""
    return tensor.components if isinstance(tensor, QuantizedTensor) else {"": tensor}

"""A read-only file: its memory map, and reads of it."""

from __future__ import annotations

import io
import mmap
import os
import stat
import sys
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .pread import ReadMemory, read_into

__all__ = ["MappedFile"]

# Python names it from 3.13 on. Without it Linux refuses private writable maps that are larger than
# RAM plus swap, which is what out-of-core checkpoints are.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """A file whose bytes become tensors without being copied.

    The map is private and copy-on-write: writing into a tensor changes that tensor's pages in this
    process, never the file. It lives as long as the last tensor over it, also beyond :meth:`close`.

    Every access first compares the path with the file that was opened (device, inode, size,
    modification time), so a file replaced, truncated, changed or removed meanwhile is an error
    instead of wrong numbers. What happens to the file after an access cannot be seen: as with every
    memory map, a tensor whose file is truncated under it faults when read (SIGBUS), which no
    library can turn into an exception safely. With :attr:`memory` set, tensors are read instead:
    then the same is an exception, and a tensor that was read is independent of the file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        #: Where tensors are read to; None maps them.
        self.memory: ReadMemory | None = None
        self._map: mmap.mmap | None = None
        self._file: io.FileIO | None = None
        self._closed = False
        fd = self._open()
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                f"{self.path}: a checkpoint must be a regular file, and this is not"
            )
        self.size = status.st_size
        #: Device, inode, size and modification time (ns) of the file that was opened.
        self.identity = _identity(status)

    def _open(self) -> int:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(self.path, flags | getattr(os, "O_NONBLOCK", 0))

    def _changed(self, now: os.stat_result) -> CheckpointError:
        size = self.identity[2]
        if now.st_size < size:
            what = f"was truncated from {size} to {now.st_size} bytes"
        elif _identity(now)[:2] != self.identity[:2]:
            what = "was replaced by another file"
        else:
            what = "was modified"
        return CheckpointError(f"{self.path}: {what} after it was opened; open it again")

    def check(self) -> None:
        """Raise CheckpointError if the path no longer is the file that was opened."""
        if self._closed:
            raise CheckpointError(f"{self.path}: the checkpoint is closed; open it again")
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path}: was removed after it was opened; open another file"
            ) from None
        if _identity(now) != self.identity:
            raise self._changed(now)

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes at ``offset``."""
        self.check()
        with open(self.path, "rb", buffering=0) as file:
            if _identity(os.fstat(file.fileno())) != self.identity:
                raise self._changed(os.fstat(file.fileno()))
            file.seek(offset)
            parts = []
            while count > 0:
                part = file.read(count)
                if not part:
                    raise CheckpointError(f"{self.path}: ends before byte {offset + count}")
                parts.append(part)
                count -= len(part)
        return b"".join(parts)

    def opened(self) -> io.FileIO:
        """The file, open for reading; checked to be the one that was opened at first."""
        self.check()
        file = self._file
        if file is None:
            file = io.FileIO(self._open(), "rb")
            status = os.fstat(file.fileno())
            if _identity(status) != self.identity:
                raise self._changed(status)
            self._file = file
        return file

    def map(self) -> mmap.mmap:
        """The whole file, mapped at the first call."""
        self.check()
        if self._map is None:
            self._map = self.new_map()
        return self._map

    def new_map(self) -> mmap.mmap:
        """A map of the whole file that is the caller's alone."""
        fd = self._open()
        try:
            status = os.fstat(fd)
            if _identity(status) != self.identity:
                raise self._changed(status)
            if sys.platform == "win32":
                return mmap.mmap(fd, self.size, access=mmap.ACCESS_COPY)
            return mmap.mmap(
                fd,
                self.size,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(fd)

    def view(self, offset: int, count: int) -> Tensor:
        """``count`` bytes at ``offset`` as a uint8 tensor with a storage of its own.

        No copy, unless :attr:`memory` says where to read to.
        """
        if count == 0:
            self.check()
            return torch.empty(0, dtype=torch.uint8)
        if self.memory is not None:
            out = self.memory.empty((count,), torch.uint8)
            read_into(self.opened(), self.path, out, offset)
            return out
        return self.view_map(offset, count)

    def view_map(self, offset: int, count: int) -> Tensor:
        """``count > 0`` bytes at ``offset`` of the map, whatever :attr:`memory` says."""
        return torch.frombuffer(self.map(), dtype=torch.uint8, count=count, offset=offset)

    def drop_pages(self, offset: int, count: int) -> None:
        """Take the pages that lie wholly in these bytes of the map out of resident memory."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Let go of the map; it is unmapped when the last tensor over it is gone."""
        self._closed = True
        self._map = None
        # Not closed by hand: another thread may be reading, and the last reference closes it.
        self._file = None


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

"""Tensors of a cache that are pages of the file: no copy, but the budget's bookkeeping."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.mapped_file import MappedFile
from .arena import Arena, Block

__all__ = ["FileViews", "ViewBlock"]


class ViewBlock:
    """A block whose parts lie in different places of a file.

    Args:
        parts: offset in the layout -> the block there.
        nbytes: bytes that the budget is charged with.
    """

    def __init__(self, parts: Mapping[int, Block], nbytes: int) -> None:
        self._parts = parts
        self.nbytes = nbytes

    @property
    def tensors(self) -> int:
        """As :attr:`Block.tensors`, of all parts together."""
        return sum(part.tensors for part in self._parts.values())

    def tensor(self, offset: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As :meth:`Block.tensor`, of the part at ``offset``."""
        return self._parts[offset].tensor(0, size, dtype)

    def release(self) -> None:
        """As :meth:`Block.release`."""
        for part in self._parts.values():
            part.release()


class FileViews:
    """Views of a checkpoint's files, from maps that nobody else has."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self._maps: dict[MappedFile, mmap.mmap] = {}

    def find(self, name: str, alignment: Mapping[str, int]) -> dict[str, Tensor] | None:
        """The stored bytes of each part of a tensor, if all are in the page cache as they are.

        Args:
            name: the tensor.
            alignment: part -> bytes of an element.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file has changed since it was opened, or is closed.
        """
        entry = self._checkpoint._entry(name)
        if isinstance(entry.stored, dict):
            stored = dict(entry.stored)
        elif entry.quantization is None:
            stored = {"": entry.stored}  # type: ignore[dict-item]
        else:
            return None  # converted on the way
        entry.file.check()
        with self._lock:
            found = self._maps.get(entry.file)
            if found is None:
                found = self._maps[entry.file] = entry.file.new_map()
        views = {}
        for part, where in stored.items():
            count = where.end - where.begin
            if count == 0 or where.begin % alignment[part]:
                return None
            views[part] = torch.frombuffer(
                found, dtype=torch.uint8, count=count, offset=where.begin
            )
        if all(torch.ops.mkrs._map_resident_pages(view) for view in views.values()):
            return views
        return None

    def block(
        self, arena: Arena, views: Mapping[str, Tensor], offsets: Mapping[str, int], nbytes: int
    ) -> ViewBlock:
        """A block over the views that charges ``nbytes`` to the arena.

        Raises:
            BudgetError: they do not fit.
        """
        parts: dict[int, Block] = {}
        left = nbytes - sum(view.numel() for view in views.values())
        try:
            for part, view in views.items():
                parts[offsets[part]] = arena.block_over(view, view.numel() + left)
                left = 0
        except BaseException:
            for block in parts.values():
                block.release()
            raise
        return ViewBlock(parts, nbytes)

    def close(self) -> None:
        """Let go of the maps; each is unmapped when the last tensor over it is gone."""
        with self._lock:
            self._maps.clear()

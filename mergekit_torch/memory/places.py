"""Where the parts of a checkpoint's tensor lie in one block of memory: layout, filling, tensors."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.rows import read_rows, row_count, row_layout
from .arena import Block
from .upload import Target, Uploader

__all__ = ["Part", "Places", "total"]

_ALIGNMENT = 64
# Rows that go through a buffer (conversion of GGUF blocks, copies to a device) take this much.
_STAGING = 8 << 20


@dataclass
class Part:
    """A plain tensor in a block: ``offset`` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Places:
    """A checkpoint's tensors as blocks hold them: components one after the other, aligned.

    Args:
        checkpoint: an open checkpoint.
        device: where blocks are.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._layouts: dict[str, dict[str, Part]] = {}
        self._sizes: dict[str, int] = {}

    def layout(self, name: str) -> dict[str, Part]:
        """Component (``""`` for a plain tensor) -> where it is.

        Raises:
            KeyError, NotImplementedError: no such tensor, or one without a native form.
        """
        layout = self._layouts.get(name)
        if layout is None:
            shape = self._checkpoint.info(name).shape
            offset, layout = 0, {}
            for part, (dtype, columns) in row_layout(self._checkpoint, name).items():
                size = (*shape[:-1], columns) if part else shape
                layout[part] = Part(offset, tuple(size), dtype)
                nbytes = math.prod(size) * dtype.itemsize
                offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            self._layouts[name] = layout
        return layout

    def nbytes(self, name: str) -> int:
        """Bytes of its block, rounded as an arena rounds.

        Raises:
            KeyError, NotImplementedError: as :meth:`layout`.
        """
        size = self._sizes.get(name)
        if size is None:
            nbytes = total(self.layout(name))
            # As csrc/memory/arena.cpp.
            step = 64 if nbytes < mmap.PAGESIZE else mmap.PAGESIZE
            size = self._sizes[name] = max(64, -(-nbytes // step) * step)
        return size

    def fill(
        self, name: str, block: Block, uploader: Uploader | None, threads: int
    ) -> torch.cuda.Event | None:
        """Read a tensor into its block; the event says when its copy to a GPU is done.

        Raises:
            CheckpointError, OSError: the file cannot be read.
        """
        layout = self.layout(name)
        info = self._checkpoint.info(name)
        rows = row_count(info.shape)
        flat = {
            part: block.tensor(p.offset, (rows, _columns(p.shape, rows)), p.dtype)
            for part, p in layout.items()
        }
        if uploader is not None:
            return uploader.upload(
                name,
                block.tensor(0, (total(layout),), torch.uint8),
                {part: Target(p.offset, flat[part]) for part, p in layout.items()},
                lambda begin, out: read_rows(self._checkpoint, name, begin, out, threads=threads),
            )
        direct = self._device.type == "cpu" and (info.quantization is None or bool(info.parts))
        if direct:
            read_rows(self._checkpoint, name, 0, flat, threads=threads)
            return None
        row_bytes = sum(t.shape[1] * t.element_size() for t in flat.values())
        step = max(1, _STAGING // max(1, row_bytes))
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            staging = {
                part: torch.empty(count, t.shape[1], dtype=t.dtype) for part, t in flat.items()
            }
            read_rows(self._checkpoint, name, begin, staging, threads=threads)
            for part, tensor in flat.items():
                tensor[begin : begin + count].copy_(staging[part])
        return None

    def tensor(self, name: str, block: Block) -> Any:
        """The tensor in its block, a Tensor or QuantizedTensor."""
        layout = self.layout(name)
        parts = {key: block.tensor(p.offset, p.shape, p.dtype) for key, p in layout.items()}
        if "" in parts:
            return parts[""]
        return self._checkpoint._quantized(self._checkpoint._entry(name), parts)


def total(layout: dict[str, Part]) -> int:
    """Bytes from the first part's begin to the last one's end."""
    *_, last = layout.values()
    return last.offset + math.prod(last.shape) * last.dtype.itemsize


def _columns(shape: tuple[int, ...], rows: int) -> int:
    return math.prod(shape) // rows if rows else (shape[-1] if len(shape) > 1 else 1)

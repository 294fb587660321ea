"""Ranges of rows of a checkpoint's tensors, read into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS

from .gguf_header import GgufTensor
from .info import SAFETENSORS_DTYPES
from .pread import READ_THREADS, read_into
from .reader import Checkpoint, _Entry, _plain_dtype, _unpack_blocks

__all__ = ["load_rows", "read_rows", "row_count", "row_layout"]

_Layout = dict[str, tuple[torch.dtype, int]]


def row_layout(checkpoint: Checkpoint, name: str) -> _Layout:
    """Dtype and elements of one row, for each part of a tensor.

    A plain tensor has one part, named ``""``; a quantized one its components. A row is the last
    dimension; the rows of a vector are its elements, a scalar is one row.

    Raises:
        KeyError: no such tensor.
        NotImplementedError: a tensor type without a native form.
    """
    entry = checkpoint._entry(name)
    if entry.quantization is None:
        return {"": (_plain_dtype(entry), entry.shape[-1] if len(entry.shape) > 1 else 1)}
    parts = entry.quantization.component_shapes(entry.shape)
    return {part: (dtype, shape[-1]) for part, (dtype, shape) in parts.items()}


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape, see :func:`row_layout`."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def read_rows(
    checkpoint: Checkpoint,
    name: str,
    begin: int,
    out: Mapping[str, Tensor],
    *,
    threads: int = READ_THREADS,
) -> None:
    """Read rows ``[begin, begin + n)``, all leading dimensions counted as one, into ``out``.

    Always with ``pread``, whatever the checkpoint's own mode. Tensors of quantized GGUF types are
    converted on the way, which takes memory of the size of the rows' stored blocks.

    Args:
        checkpoint: an open checkpoint.
        name: the tensor.
        begin: the first row.
        out: contiguous CPU tensors ``[n, elements]`` of :func:`row_layout`'s parts.
        threads: that read at once.

    Raises:
        KeyError: no such tensor.
        CheckpointError: the file has changed since it was opened, or is closed.
        OSError: the file cannot be read; names file and offset.
    """
    entry = checkpoint._entry(name)
    file, path = entry.file.opened(), entry.file.path
    if isinstance(entry.stored, dict):
        for part, stored in entry.stored.items():
            tensor = out[part]
            step = SAFETENSORS_DTYPES[stored.code].itemsize * stored.shape[-1]
            read_into(file, path, tensor, stored.begin + begin * step, threads=threads)
        return
    if entry.quantization is None:
        tensor = out[""]
        step = tensor.element_size() * (tensor.shape[-1] if tensor.dim() > 1 else 1)
        read_into(file, path, tensor, entry.stored.begin + begin * step, threads=threads)
        return
    for part, tensor in _unpacked(entry, begin, out["codes"].shape[0], threads).items():
        out[part].copy_(tensor)


def load_rows(
    checkpoint: Checkpoint,
    name: str,
    begin: int,
    count: int,
    empty: Callable[..., Tensor],
    *,
    threads: int = READ_THREADS,
) -> dict[str, Tensor]:
    """Rows ``[begin, begin + count)`` as :func:`read_rows` reads them, in memory of their own.

    Args:
        checkpoint, name, begin, threads: as for :func:`read_rows`.
        count: how many rows.
        empty: called with sizes and ``dtype=``; memory for what is stored as it is read.

    Raises:
        KeyError, CheckpointError, OSError: as :func:`read_rows`.
    """
    entry = checkpoint._entry(name)
    if isinstance(entry.stored, GgufTensor) and entry.quantization is not None:
        return _unpacked(entry, begin, count, threads)
    out = {
        part: empty(count, columns, dtype=dtype)
        for part, (dtype, columns) in row_layout(checkpoint, name).items()
    }
    read_rows(checkpoint, name, begin, out, threads=threads)
    return out


def _unpacked(entry: _Entry, begin: int, rows: int, threads: int) -> dict[str, Tensor]:
    """Native components of rows of a quantized GGUF tensor."""
    assert isinstance(entry.stored, GgufTensor)
    layout = GGUF_LAYOUTS[entry.stored.type]
    k = entry.shape[-1]
    step = k // layout.block * layout.block_bytes
    blocks = torch.empty(rows, step, dtype=torch.uint8)
    offset = entry.stored.begin + begin * step
    read_into(entry.file.opened(), entry.file.path, blocks, offset, threads=threads)
    return _unpack_blocks(blocks, entry.stored.type, rows, k)

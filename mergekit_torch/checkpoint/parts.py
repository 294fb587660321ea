"""Parts of a checkpoint's tensors, for processes that each hold some of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .info import SAFETENSORS_DTYPES
from .pread import ReadMemory, read_slice
from .reader import Checkpoint, _plain_dtype
from .safetensors_header import StoredTensor

__all__ = ["read_part"]


def read_part(
    checkpoint: Checkpoint, name: str, dim: int, start: int, stop: int, memory: ReadMemory
) -> Any:
    """``checkpoint[name]``, only ``[start, stop)`` of dimension ``dim``.

    Rows are one run of bytes and come as ``checkpoint.get_slice`` gives them: a view of the map, or
    read. Columns of a mapped file would touch every page of the tensor; they are read, exactly
    their bytes, into ``memory``.

    Args:
        checkpoint: an open checkpoint.
        name: the tensor.
        dim: not negative.
        start, stop: columns of a quantized weight must be cut between groups.
        memory: where columns are read to; keep it until the tensors are used elsewhere.

    Raises:
        KeyError: no such tensor.
        ValueError: a cut that is not aligned.
        CheckpointError, OSError: the file has changed or cannot be read.
    """
    entry = checkpoint._entry(name)
    ndim = len(entry.shape)
    index: list[int | slice] = [slice(None)] * ndim
    index[dim] = slice(start, stop)
    whole = (start, stop) == (0, entry.shape[dim])
    if whole or dim < ndim - 1 or ndim < 2 or checkpoint.format != "safetensors":
        return checkpoint.get_slice(name)[tuple(index)]
    file = entry.file

    def columns(stored: StoredTensor, dtype: Any, first: int, last: int) -> Tensor:
        cut = [*index[:-1], slice(first, last)]
        return read_slice(file.opened(), file.path, memory, stored.begin, stored.shape, dtype, cut)

    info = entry.quantization
    if info is None:
        assert isinstance(entry.stored, StoredTensor)
        return columns(entry.stored, _plain_dtype(entry), start, stop)
    # Checked and described by the class itself, on a weight without memory.
    from mergekit_torch.tensor import QuantizedTensor

    meta = {
        part: torch.empty(shape, dtype=dtype, device="meta")
        for part, (dtype, shape) in info.component_shapes(entry.shape).items()
    }
    layout = QuantizedTensor(
        **meta,
        bits=info.bits,
        group_size=info.group_size,
        in_features=info.in_features,
        dtype=info.dtype,
    ).narrow(dim, start, stop - start)
    assert isinstance(entry.stored, dict)
    parts = {}
    for part, stored in entry.stored.items():
        wanted = getattr(layout, part)
        first = start * info.bits // 8 if part == "codes" else start // info.group_size
        parts[part] = columns(
            stored, SAFETENSORS_DTYPES[stored.code], first, first + wanted.shape[-1]
        )
    return QuantizedTensor(
        **parts,
        bits=info.bits,
        group_size=info.group_size,
        in_features=stop - start,
        dtype=info.dtype,
    )

"""Hugging Face transformers models, split over ranks as they are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..integrations.transformers import _config_of, _empty_model, _fill
from ..tensor import QuantizedTensor
from .loading import LoadReport, load_sharded_
from .source import PartSource, open_parts
from .tensor_parallel import tensor_parallel_

import transformers  # isort: skip

__all__ = ["load_parallel"]


def load_parallel(
    path: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str | ParallelStyle] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Any, LoadReport]:
    """Open a native checkpoint directory as a transformers model of which this rank has its part.

    The model is built without memory, split by :func:`tensor_parallel_`, and filled by
    :func:`load_sharded_`: no rank reads or holds the whole model.

    Args:
        path: a directory with ``config.json`` and safetensors files, or one that
            :func:`shard_checkpoint` wrote, for any number of ranks.
        mesh, plan: as for :func:`tensor_parallel_`.
        device: where this rank's part goes.
        dtype: as for :func:`mergekit_torch.integrations.transformers.load_native`.

    Returns:
        The model in eval mode, and the bytes that this rank has read.

    Raises:
        FileNotFoundError: no such directory or no ``config.json`` in it.
        ValueError: a checkpoint that does not fit the model, or a model that cannot be split so.
        mergekit_torch.checkpoint.CheckpointError: a damaged checkpoint.
    """
    directory = Path(path)
    model = _empty_model(_config_of(directory), dtype)
    with open_parts(directory) as source:
        buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        _fill(model, _Shapes(source), torch.device("meta"), model.dtype if dtype is None else dtype)
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer
        tensor_parallel_(model, mesh, plan)
        report = load_sharded_(model, source, device)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval(), report


class _Shapes(Mapping[str, Any]):
    """A checkpoint's tensors without their data."""

    def __init__(self, source: PartSource) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Any:
        spec = self._source.spec(name)
        parts: dict[str, Tensor] = {
            part.removeprefix("_"): torch.empty(shape, dtype=dtype, device="meta")
            for part, (dtype, shape) in spec.stored("").items()
        }
        q = spec.quantization
        if q is None:
            return parts[""]
        return QuantizedTensor(
            **parts,
            bits=q.bits,
            group_size=q.group_size,
            in_features=q.in_features,
            dtype=q.dtype,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    def __len__(self) -> int:
        return len(self._source.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._source.specs

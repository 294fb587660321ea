"""Loading models of which every rank holds a part: each reads its own bytes and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..checkpoint import Checkpoint
from ..nn import QuantizedModule
from ..nn.module import BUFFERS
from ..tensor import QuantizedTensor
from .modules import ColwiseLinear, ParallelModule
from .source import PartSource, open_parts

__all__ = ["LoadReport", "load_sharded_"]


@dataclass(frozen=True)
class LoadReport:
    """Bytes of tensors: what this rank has read, and what the checkpoint holds."""

    bytes_read: int
    bytes_total: int


def load_sharded_(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Checkpoint | PartSource,
    device: torch.device | str = "cpu",
) -> LoadReport:
    """Fill ``model``, as :func:`tensor_parallel_` left it, from a checkpoint.

    Every rank reads its parts of the weights that are split and all others whole. The model may be
    on the meta device, so that nobody ever holds all of it. On the CPU, rows are views onto the
    mapped file. The checkpoint's names are those of the model's state dict; weights that are tied
    in the model need one entry. A float weight of a quantized module is quantized on the way.

    Args:
        model: split or not.
        checkpoint: a path, an open checkpoint, or files of :func:`shard_checkpoint` for any number
            of ranks.
        device: where the weights go; buffers that the checkpoint does not have go there as well.

    Returns:
        Bytes read by this rank.

    Raises:
        KeyError: tensors that the checkpoint does not have, named.
        ValueError: another shape, dtype or quantization than the model's.
        FileNotFoundError, CheckpointError, OSError: the checkpoint cannot be read.
    """
    owns = not isinstance(checkpoint, PartSource)
    source = checkpoint if isinstance(checkpoint, PartSource) else open_parts(checkpoint)
    before = source.bytes_read
    try:
        _fill(model, source, torch.device(device))
    finally:
        if owns:
            source.close()
    return LoadReport(source.bytes_read - before, source.nbytes)


def _fill(model: nn.Module, source: PartSource, device: torch.device) -> None:
    missing = [names[0] for names, _ in _needed(model) if not any(n in source.specs for n in names)]
    if missing:
        raise KeyError(
            f"{source.path}: the model has {len(missing)} tensors that the checkpoint does not "
            f"have, such as {missing[0]!r}"
        )
    loaded: dict[int, Any] = {}
    old: list[Any] = []  # keeps ids unique while they are keys
    for names, members in _needed(model):
        name = next(n for n in names if n in source.specs)
        for module, attribute in members:
            if attribute is None:
                assert isinstance(module, QuantizedModule)
                key = module.weight_codes
                if id(key) not in loaded:
                    old.append(key)
                    loaded[id(key)] = _quantized(module, name, source, device)
                weight = loaded[id(key)]
                module.weight = weight
            else:
                table: Any = (
                    module._parameters if attribute in module._parameters else module._buffers
                )
                value = table[attribute]
                if id(value) not in loaded:
                    old.append(value)
                    loaded[id(value)] = _plain(module, attribute, value, name, source, device)
                table[attribute] = loaded[id(value)]
    for module in model.modules():
        for attribute, buffer in module._buffers.items():
            if buffer is None or attribute in BUFFERS or buffer.device == device:
                continue
            if attribute in module._non_persistent_buffers_set:
                if buffer.is_meta:
                    raise KeyError(
                        f"{attribute} of a {type(module).__name__} is on the meta device"
                    )
                module._buffers[attribute] = buffer.to(device)


def _needed(model: nn.Module) -> Iterator[tuple[list[str], list[tuple[nn.Module, str | None]]]]:
    """What has to be loaded: names (several if tied), and where it goes; None for the weight."""
    found: dict[int, tuple[list[str], list[tuple[nn.Module, str | None]]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        where = f"{prefix}." if prefix else ""
        slots: list[tuple[str, str | None, Any]] = []
        if isinstance(module, QuantizedModule):
            slots.append(("weight", None, module.weight_codes))
        slots += [(n, n, p) for n, p in module._parameters.items() if p is not None]
        slots += [
            (n, n, b)
            for n, b in module._buffers.items()
            if b is not None
            and n not in module._non_persistent_buffers_set
            and not (isinstance(module, QuantizedModule) and n in BUFFERS)
        ]
        for name, attribute, tensor in slots:
            names, members = found.setdefault(id(tensor), ([], []))
            names.append(where + name)
            if (module, attribute) not in members:
                members.append((module, attribute))
    yield from list(found.values())


def _quantized(module: QuantizedModule, name: str, source: PartSource, device: torch.device) -> Any:
    spec = source.spec(name)
    rows, columns = module._weight_size()
    shape = [rows, columns]
    part = module.part if isinstance(module, ParallelModule) else None
    if part is not None:
        shape[part.dim] = part.size
    if list(spec.shape) != shape:
        raise ValueError(f"{source.path}: {name} must have shape {shape}, got {list(spec.shape)}")
    scale_dtype = module.weight_scale.dtype
    wanted = (module.bits, module.group_size, module.scheme, scale_dtype)
    q = spec.quantization
    if q is not None and wanted != (q.bits, q.group_size, q.scheme, q.scale_dtype):
        raise ValueError(
            f"{source.path}: {name} must have bits, group_size, scheme and scale dtype {wanted} "
            f"as the model has, got {(q.bits, q.group_size, q.scheme, q.scale_dtype)}"
        )
    if part is None:
        weight = source.whole(name)
    else:
        weight = source.part(name, part.dim, part.start, part.stop)
    if not isinstance(weight, QuantizedTensor):
        weight = QuantizedTensor.from_float(
            weight.to(device), module.bits, module.group_size, module.scheme, scale_dtype
        )
    result: Any = weight.to(device=device, dtype=module.dtype)
    return result


def _plain(
    module: nn.Module,
    name: str,
    value: Tensor,
    stored: str,
    source: PartSource,
    device: torch.device,
) -> Any:
    spec = source.spec(stored)
    if spec.quantization is not None:
        raise ValueError(f"{source.path}: {stored} is quantized, and the model's is not")
    if isinstance(value, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            value.shape, value.device_mesh, value.placements
        )
        whole, local = tuple(value.shape), _part_of(source, stored, shape, offset)
    elif isinstance(module, ColwiseLinear) and name == "bias":
        part = module.part
        whole = (part.size,)
        if tuple(spec.shape) == whole:
            local = source.part(stored, 0, part.start, part.stop)
    else:
        whole = tuple(value.shape)
        if tuple(spec.shape) == whole:
            local = source.whole(stored)
    if tuple(spec.shape) != whole:
        raise ValueError(
            f"{source.path}: {stored} must have shape {list(whole)}, got {list(spec.shape)}"
        )
    local = local.to(device=device, dtype=value.dtype)
    result: Any = local
    if isinstance(value, DTensor):
        result = DTensor.from_local(
            local,
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    if isinstance(value, nn.Parameter):
        return nn.Parameter(result, requires_grad=value.requires_grad)
    return result


def _part_of(source: PartSource, name: str, shape: Any, offset: Any) -> Tensor:
    whole = source.spec(name).shape
    cut = [d for d in range(len(whole)) if shape[d] != whole[d]]
    if len(cut) > 1:
        raise NotImplementedError(f"{name} is split along several dimensions, which is not offered")
    dim = cut[0] if cut else 0
    part: Tensor = source.part(name, dim, offset[dim], offset[dim] + shape[dim])
    return part

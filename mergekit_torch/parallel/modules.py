"""Quantized modules of which every rank holds a part.

Made in place from :class:`QuantizedLinear` and :class:`QuantizedEmbedding` by the styles (see
``styles.py``): the module keeps its identity, hooks and name, and changes its class. Buffers are
plain local tensors, so that a product costs what it costs on one device; state dicts show them as
DTensors of the whole weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from ..nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from ..nn.module import BUFFERS, PARTS
from ..tensor import QuantizedTensor
from .collectives import gather_columns, sum_gradients, sum_ranks
from .partition import Ranges, part_ranges

__all__ = [
    "ColwiseEmbedding",
    "ColwiseLinear",
    "Layouts",
    "ParallelModule",
    "Part",
    "RowwiseEmbedding",
    "RowwiseLinear",
]


@dataclass(frozen=True)
class Part:
    """What this rank has of a weight ``[N, K]``.

    Attributes:
        mesh: the ranks, one dimension.
        dim: 0 if rows are split over ranks, 1 if columns are.
        size: of the whole weight along ``dim``.
        ranges: ``(start, stop)`` of every rank; may overlap, as key heads do that several ranks
            share.
    """

    mesh: DeviceMesh
    dim: int
    size: int
    ranges: Ranges

    @property
    def rank(self) -> int:
        """This process's place in the mesh."""
        return int(self.mesh.get_local_rank())

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.ranges)

    @property
    def start(self) -> int:
        """First row or column of this rank."""
        return self.ranges[self.rank][0]

    @property
    def stop(self) -> int:
        """One after its last."""
        return self.ranges[self.rank][1]

    @property
    def even(self) -> bool:
        """Whether the parts are those of DTensor's ``Shard``."""
        return self.ranges == _chunks(self.size, self.world)

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        return self  # a mesh is what connects processes, and has no copies


@dataclass(frozen=True)
class Layouts:
    """Of a module's input and output, as torch's styles have them."""

    input: Placement
    output: Placement
    use_local_output: bool = True


def _chunks(size: int, world: int) -> Ranges:
    """The ranges that DTensor's ``Shard`` means."""
    step = -(-size // world) if world else 0
    return tuple((min(i * step, size), min((i + 1) * step, size)) for i in range(world))


class UnevenPart(LocalShardsWrapper):
    """The local part of a DTensor whose parts are not those of ``Shard``.

    Knows its own offset, which is all that checkpoints need. torch's redistribution would take the
    other ranks' parts for as large as this one, so it is refused.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(
                f"{func}: the tensor is split unevenly over ranks, which DTensor cannot gather or "
                "redistribute; save it with torch.distributed.checkpoint, which can"
            )
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, LocalShardsWrapper):  # torch's handlers make the base class
            return cls(result.local_shards(), [tuple(o) for o in result.local_offsets()])
        return result


def as_dtensor(local: Tensor, part: Part, dim: int, size: int, ranges: Ranges) -> DTensor:
    """A DTensor of the whole component on this rank's part, sharing its memory.

    Parts that are not those of ``Shard`` carry their own offsets, which
    ``torch.distributed.checkpoint`` understands.
    """
    shape = list(local.shape)
    shape[dim] = size
    stride = torch.empty(shape, device="meta").stride()
    inner = local
    placement: Placement = Shard(dim)
    if all(r == (0, size) for r in ranges):
        placement = Replicate()
    elif ranges != _chunks(size, part.world):
        offset = [0] * local.dim()
        offset[dim] = ranges[part.rank][0]
        inner = UnevenPart([local], [tuple(offset)])
    return DTensor.from_local(
        inner, part.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
    )


def local_of(tensor: DTensor) -> Tensor:
    """This rank's memory of a DTensor that :func:`as_dtensor` or torch made."""
    local = tensor.to_local()
    if isinstance(local, LocalShardsWrapper):
        return local.local_shards()[0]
    return local


class ParallelModule(QuantizedModule):
    """What the parallel modules share: their part, and state dicts of DTensors."""

    part: Part
    layouts: Layouts
    _group: str

    def _become_part(self, part: Part, layouts: Layouts, weight: QuantizedTensor) -> None:
        """Take ``weight``, this rank's part, in place of the whole one."""
        self.part, self.layouts = part, layouts
        self._group = part.mesh.get_group().group_name
        self._set_size(*weight.shape)
        self.weight = weight

    def _set_size(self, rows: int, columns: int) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not define its sizes")

    def _whole(self, part_name: str) -> tuple[int, Ranges]:
        """A component's size along the split dimension, and all ranks' ranges of it."""
        part = self.part
        if part.dim == 0:
            return part.size, part.ranges
        return part_ranges(part_name, part.ranges, part.size, self.bits, self.group_size)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in zip(PARTS, BUFFERS, strict=True):
            local = destination.get(prefix + buffer)
            if local is not None:
                size, ranges = self._whole(name)
                destination[prefix + buffer] = as_dtensor(
                    local, self.part, self.part.dim, size, ranges
                )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take DTensors of this split as they are, and this rank's part of whole tensors."""
        state_dict = dict(state_dict)
        for name, buffer in zip(PARTS, BUFFERS, strict=True):
            if prefix + buffer in state_dict and self._buffers[buffer] is not None:
                size, ranges = self._whole(name)
                state_dict[prefix + buffer] = self._part_of(
                    state_dict[prefix + buffer], self.part.dim, size, ranges
                )
        if f"{prefix}weight" in state_dict:
            part = self.part
            state_dict[f"{prefix}weight"] = self._part_of(
                state_dict[f"{prefix}weight"], part.dim, part.size, part.ranges
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _part_of(self, value: Tensor, dim: int, size: int, ranges: Ranges) -> Tensor:
        if isinstance(value, DTensor):
            return local_of(value)
        start, stop = ranges[self.part.rank]
        if value.dim() > dim and value.shape[dim] == size:
            return value.narrow(dim, start, stop - start)
        return value  # a part already; torch checks the shape

    def _part_repr(self) -> str:
        part = self.part
        kind = "columns" if part.dim else "rows"
        return f"{kind} {part.start}:{part.stop} of {part.size}, rank {part.rank} of {part.world}"

    # --- layouts ----------------------------------------------------------------------------

    def _replicated_input(self, x: Tensor) -> Tensor:
        """The whole input, whose gradient is summed over ranks."""
        layout, mesh = self.layouts.input, self.part.mesh
        if not isinstance(x, DTensor):
            if layout == Replicate():
                return sum_gradients(x, self._group) if x.is_floating_point() else x
            x = DTensor.from_local(x, mesh, [_positive(layout, x)], run_check=False)
        return x.redistribute(placements=[Replicate()]).to_local(
            grad_placements=[Partial()] if x.is_floating_point() else None
        )

    def _finish_columns(self, y: Tensor) -> Tensor:
        """From this rank's part of the last dimension to the output layout."""
        layouts, part = self.layouts, self.part
        target = _positive(layouts.output, y)
        own = Shard(y.dim() - 1)
        if layouts.use_local_output and target == own:
            return y
        if target == Replicate() or not part.even:
            y = gather_columns(y, self._group, part.rank, part.ranges)
            if layouts.use_local_output and target == Replicate():
                return y
            whole: Any = DTensor.from_local(y, part.mesh, [Replicate()], run_check=False)
        else:
            shape = torch.Size((*y.shape[:-1], part.size))
            stride = torch.empty(shape, device="meta").stride()
            whole = DTensor.from_local(
                y, part.mesh, [own], run_check=False, shape=shape, stride=stride
            )
        return self._leave(whole, target)

    def _finish_sum(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """From this rank's summand to the output layout; ``bias`` is added once."""
        layouts = self.layouts
        target = _positive(layouts.output, y)
        if layouts.use_local_output and target == Replicate():
            y = sum_ranks(y, self._group)
            return y if bias is None else y + bias.to(y.dtype)
        mesh = self.part.mesh
        whole: Any = DTensor.from_local(y, mesh, [Partial()], run_check=False)
        whole = whole.redistribute(placements=[target])
        if bias is not None:
            same = DTensor.from_local(bias.to(y.dtype), mesh, [Replicate()], run_check=False)
            whole = whole + same
        return self._leave(whole, target)

    def _leave(self, whole: DTensor, target: Placement) -> Tensor:
        whole = whole.redistribute(placements=[target])
        return whole.to_local() if self.layouts.use_local_output else whole


def _positive(layout: Placement, x: Tensor) -> Placement:
    return Shard(layout.dim % x.dim()) if isinstance(layout, Shard) else layout


class ColwiseLinear(ParallelModule, QuantizedLinear):
    """Some rows of a weight: from the whole input to this rank's part of the output."""

    def _set_size(self, rows: int, columns: int) -> None:
        self.out_features, self.in_features = rows, columns

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N of this rank]``, or another output layout."""
        x = self._replicated_input(input)
        return self._finish_columns(self._product(x, self._parameters["bias"]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bias = destination.get(f"{prefix}bias")
        if bias is not None:
            part = self.part
            destination[f"{prefix}bias"] = as_dtensor(
                bias.detach(), part, 0, part.size, part.ranges
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}bias" in state_dict:
            part, state_dict = self.part, dict(state_dict)
            state_dict[f"{prefix}bias"] = self._part_of(
                state_dict[f"{prefix}bias"], 0, part.size, part.ranges
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Local sizes, format and part."""
        return f"{super().extra_repr()}, {self._part_repr()}"


class RowwiseLinear(ParallelModule, QuantizedLinear):
    """Some columns of a weight: from this rank's part of the input to a sum over ranks."""

    def _set_size(self, rows: int, columns: int) -> None:
        self.out_features, self.in_features = rows, columns

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K of this rank]`` to ``[..., N]``, summed over ranks, bias added once."""
        return self._finish_sum(
            self._product(self._part_of_input(input), None), self._parameters["bias"]
        )

    def _part_of_input(self, x: Tensor) -> Tensor:
        part, layout = self.part, _positive(self.layouts.input, x)
        own = Shard(x.dim() - 1)
        if not isinstance(x, DTensor):
            if layout == own:
                if x.shape[-1] != self.in_features:
                    raise ValueError(
                        f"input must be this rank's part [..., {self.in_features}] of "
                        f"[..., {part.size}], got {list(x.shape)}; "
                        "for whole inputs use input_layouts=Replicate()"
                    )
                return x
            if layout == Replicate():
                return sum_gradients(x, self._group)[..., part.start : part.stop]
            x = DTensor.from_local(x, part.mesh, [layout], run_check=False)
        if part.even:
            return x.redistribute(placements=[own]).to_local()
        whole = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return whole[..., part.start : part.stop]

    def extra_repr(self) -> str:
        """Local sizes, format and part."""
        return f"{super().extra_repr()}, {self._part_repr()}"


class ColwiseEmbedding(ParallelModule, QuantizedEmbedding):
    """Some columns of a table: this rank's part of every row."""

    def _set_size(self, rows: int, columns: int) -> None:
        self.num_embeddings, self.embedding_dim = rows, columns

    def forward(self, input: Tensor) -> Tensor:
        """Indices to ``[*input.shape, K of this rank]``, or another output layout."""
        return self._finish_columns(super().forward(self._replicated_input(input)))

    def extra_repr(self) -> str:
        """Local sizes, format and part."""
        return f"{super().extra_repr()}, {self._part_repr()}"


class RowwiseEmbedding(ParallelModule, QuantizedEmbedding):
    """Some rows of a table (vocabulary parallel): others' rows count as zero in a sum."""

    def _set_size(self, rows: int, columns: int) -> None:
        self.num_embeddings, self.embedding_dim = rows, columns

    def forward(self, input: Tensor) -> Tensor:
        """Indices into the whole table to ``[*input.shape, K]``."""
        part = self.part
        indices = self._replicated_input(input)
        elsewhere = (indices < part.start) | (indices >= part.stop)
        local = (indices - part.start).masked_fill(elsewhere, 0)
        # What no rank has stays out of range, for the op to refuse.
        local = local.masked_fill((indices < 0) | (indices >= part.size), self.num_embeddings)
        rows = super().forward(local)
        return self._finish_sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0), None)

    def extra_repr(self) -> str:
        """Local sizes, format and part."""
        return f"{super().extra_repr()}, {self._part_repr()}"


def make_parallel(
    module: nn.Module,
    kind: type[ParallelModule],
    part: Part,
    layouts: Layouts,
    weight: QuantizedTensor,
) -> None:
    """Turn ``module`` into ``kind`` in place; ``weight`` is this rank's part."""
    assert isinstance(module, QuantizedModule)
    module.__class__ = kind
    parallel = cast(ParallelModule, module)
    parallel._become_part(part, layouts, weight)
    bias = module._parameters.get("bias")
    if bias is not None and kind is ColwiseLinear:
        local = bias.detach()[part.start : part.stop].clone()
        module._parameters["bias"] = nn.Parameter(local, requires_grad=bias.requires_grad)

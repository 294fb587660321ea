"""``ColwiseParallel`` and ``RowwiseParallel`` that know quantized modules as well.

torch's own styles ask ``isinstance(module, nn.Linear)``. A QuantizedLinear is none (whatever meets
an ``nn.Linear`` may initialize, cast or train its ``weight``), so torch's styles refuse it, and
these, which are subclasses of them, take it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import style as torch_style

from ..nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from ..tensor import QuantizedTensor
from .modules import (
    ColwiseEmbedding,
    ColwiseLinear,
    Layouts,
    ParallelModule,
    Part,
    RowwiseEmbedding,
    RowwiseLinear,
    make_parallel,
)
from .partition import Ranges, column_unit, split_ranges

__all__ = ["ColwiseParallel", "RowwiseParallel", "quantized_style"]


class _Shared:
    """What both styles do with a quantized module."""

    _dim: int  # of a linear layer's weight that is split: 0 rows, 1 columns
    src_data_rank: int | None
    input_layouts: tuple[Any, ...]
    output_layouts: tuple[Any, ...]
    use_local_output: bool
    align: int | None = None

    def _split_dim(self, module: QuantizedModule) -> int:
        # An embedding's table is a weight the other way round: what rows are to a linear layer's
        # output, columns are to its.
        return 1 - self._dim if isinstance(module, QuantizedEmbedding) else self._dim

    def _input_layout(self, module: QuantizedModule) -> Any:
        return self.input_layouts[0]

    def _check_quantized(self, module: QuantizedModule, world: int) -> None:
        """Raise ValueError if ``module`` cannot be split over ``world`` ranks."""
        self._ranges(module, world)

    def _ranges(self, module: QuantizedModule, world: int) -> Ranges:
        weight, dim = module.weight, self._split_dim(module)
        size = weight.shape[dim]
        unit = column_unit(weight.bits, weight.group_size, weight.in_features)
        if dim == 1:
            what = f"in_features (bits={weight.bits}, group_size={weight.group_size})"
            return split_ranges(size, world, unit, what)
        if self.align is not None:
            return split_ranges(size, world, self.align, f"rows (align={self.align})")
        # The output usually goes into a weight of the same format, split along its columns.
        linear = isinstance(module, QuantizedLinear)
        fits = linear and size % unit == 0 and size // unit >= world
        return split_ranges(size, world, unit if fits else 1, "rows")

    def _apply_quantized(
        self, module: QuantizedModule, mesh: DeviceMesh, ranges: Ranges | None
    ) -> nn.Module:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; take a part of it")
        if isinstance(module, ParallelModule):
            raise ValueError(f"the module is parallel already: {module}")
        embedding = isinstance(module, QuantizedEmbedding)
        dim = self._split_dim(module)
        kinds: dict[int, type[ParallelModule]] = (
            {0: RowwiseEmbedding, 1: ColwiseEmbedding}
            if embedding
            else {0: ColwiseLinear, 1: RowwiseLinear}
        )
        weight = module.weight
        if ranges is None:
            ranges = self._ranges(module, mesh.size())
        part = Part(mesh, dim, weight.shape[dim], ranges)
        source = self._input_layout(module)
        layouts = Layouts(source, self.output_layouts[0], self.use_local_output)
        local = _local_part(weight, part, self.src_data_rank)
        if self.src_data_rank is not None and module._parameters.get("bias") is not None:
            _broadcast(module._parameters["bias"], mesh, self.src_data_rank)
        make_parallel(module, kinds[dim], part, layouts, local)
        return module


class ColwiseParallel(_Shared, torch_style.ColwiseParallel):
    """torch's ``ColwiseParallel``, for QuantizedLinear and QuantizedEmbedding too.

    Of a linear layer every rank computes a part of the output (rows of the weight), of an embedding
    a part of every row (columns of the table, cut between groups). Default layouts are torch's.

    Args:
        input_layouts, output_layouts, use_local_output: as torch's.
        align: cut rows of a linear layer at multiples of this. By default at multiples of its own
            group_size where there are enough of them, so that the parts are those of a following
            RowwiseParallel layer of the same format.

    Raises (when applied):
        ValueError: columns that cannot be cut between groups for this many ranks; names the sizes
            that are possible.
    """

    _dim = 0

    def __init__(self, *, align: int | None = None, **layouts: Any) -> None:
        if align is not None and align < 1:
            raise ValueError(f"align must be at least 1, got {align}")
        super().__init__(**layouts)
        self.align = align

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            return self._apply_quantized(module, device_mesh, None)
        return super()._apply(module, device_mesh)


class RowwiseParallel(_Shared, torch_style.RowwiseParallel):
    """torch's ``RowwiseParallel``, for QuantizedLinear and QuantizedEmbedding too.

    Of a linear layer every rank takes a part of the input (columns of the weight, cut between
    groups), of an embedding a part of the vocabulary (rows of the table); results are summed over
    ranks, and a bias is added once. Arguments and default layouts are torch's.

    Raises (when applied):
        ValueError: as for :class:`ColwiseParallel`.
    """

    _dim = 1

    def __init__(self, **layouts: Any) -> None:
        super().__init__(**layouts)
        self._input_given = layouts.get("input_layouts") is not None

    def _input_layout(self, module: QuantizedModule) -> Any:
        if isinstance(module, QuantizedEmbedding) and not self._input_given:
            # torch wants this spelled out; a vocabulary has no other sensible input.
            return torch_style.Replicate()
        return super()._input_layout(module)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            return self._apply_quantized(module, device_mesh, None)
        return super()._apply(module, device_mesh)


def quantized_style(style: Any) -> Any:
    """Our style with the layouts of one of torch's; anything else as it is."""
    known: dict[type, Any] = {
        torch_style.ColwiseParallel: ColwiseParallel,
        torch_style.RowwiseParallel: RowwiseParallel,
    }
    own = known.get(type(style))
    if own is None:
        return style
    return own(
        input_layouts=style.input_layouts[0],
        output_layouts=style.output_layouts[0],
        use_local_output=style.use_local_output,
    )


def _local_part(weight: QuantizedTensor, part: Part, source: int | None) -> QuantizedTensor:
    """This rank's part in memory of its own, from its own weight or from rank ``source``'s."""

    def of(rank: int) -> QuantizedTensor:
        start, stop = part.ranges[rank]
        return weight.narrow(part.dim, start, stop - start)  # type: ignore[return-value]

    own = of(part.rank)
    if source is None or weight.codes.is_meta or part.world == 1:
        return own._map(_copied, size=own.shape)
    parts = [[_bytes(p) for p in of(rank).components.values()] for rank in range(part.world)]
    length = max(sum(p.numel() for p in pieces) for pieces in parts)
    received = torch.empty(length, dtype=torch.uint8, device=weight.device)
    sending = None
    if part.rank == source:
        sending = [
            nn.functional.pad(flat, (0, length - flat.numel()))
            for flat in (torch.cat(pieces) for pieces in parts)
        ]
    group = part.mesh.get_group()
    dist.scatter(received, sending, src=dist.get_global_rank(group, source), group=group)
    at = 0

    def take(component: Tensor) -> Tensor:
        nonlocal at
        begin, at = at, at + component.numel() * component.element_size()
        return received[begin:at].clone().view(component.dtype).view(component.shape)

    return own._map(take, size=own.shape)


def _copied(component: Tensor) -> Tensor:
    return component.clone(memory_format=torch.contiguous_format)


def _bytes(component: Tensor) -> Tensor:
    return component.contiguous().view(torch.uint8).reshape(-1)


def _broadcast(bias: Tensor | None, mesh: DeviceMesh, source: int) -> None:
    assert bias is not None
    if not bias.is_meta:
        group = mesh.get_group()
        dist.broadcast(bias.data, src=dist.get_global_rank(group, source), group=group)

"""Which part of a tensor each rank gets, and :func:`shard`, which takes it as a view.

Rows of a quantized weight are independent, so they can be cut anywhere. A cut between columns has
to fall between two groups (which is between two bytes as well); a weight with one group per row can
be cut between any two bytes, each part keeps the row's scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..format import code_bytes, num_groups
from ..tensor import QuantizedTensor

__all__ = ["column_unit", "part_ranges", "shard", "split_ranges"]

Ranges = tuple[tuple[int, int], ...]
"""``(start, stop)`` of every rank along one dimension."""


def column_unit(bits: int, group_size: int, in_features: int) -> int:
    """Columns of a quantized weight can be cut at multiples of this."""
    per_byte = 8 // bits
    return per_byte if group_size >= in_features else math.lcm(group_size, per_byte)


def split_ranges(size: int, world: int, unit: int = 1, what: str = "the dimension") -> Ranges:
    """``size`` elements over ``world`` ranks in whole units, as evenly as units allow.

    The first ranks get one unit more; the last unit may be short.

    Raises:
        ValueError: fewer units than ranks; names the sizes that are possible.
    """
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    units = -(-size // unit)
    if units < world:
        pieces = "elements" if unit == 1 else f"aligned pieces of {unit}"
        raise ValueError(
            f"{what} of {size} has {units} {pieces} and cannot be split over {world} ranks; "
            f"sizes must be multiples of {unit}, so at most {units} ranks are possible"
        )
    least, more = divmod(units, world)
    edges = [unit * (rank * least + min(rank, more)) for rank in range(world)]
    return tuple(zip(edges, [*edges[1:], size], strict=True))


def part_ranges(
    name: str, ranges: Ranges, size: int, bits: int, group_size: int
) -> tuple[int, Ranges]:
    """A component's size along the columns of a weight, and every rank's range of it.

    Args:
        name: ``"codes"``, ``"scale"``, ``"zero_point"`` or ``"offset"``.
        ranges: of the weight's columns.
        size: the weight's in_features.
        bits, group_size: its format.
    """
    if name == "codes":
        parts = tuple((start * bits // 8, code_bytes(stop, bits)) for start, stop in ranges)
        return code_bytes(size, bits), parts
    groups = tuple((start // group_size, num_groups(stop, group_size)) for start, stop in ranges)
    return num_groups(size, group_size), groups


def shard(
    tensor: Tensor,
    dim: int,
    rank: int,
    world: int,
    *,
    sizes: Sequence[int] | None = None,
    pad: bool = False,
) -> Any:
    """The part of ``tensor`` that ``rank`` of ``world`` ranks gets along ``dim``.

    A view, without a copy. Parts follow one another in order of ranks. Along the columns of a
    quantized weight they consist of whole groups (of whole bytes, with one group per row); where
    these do not divide evenly, the first ranks get one more. Other dimensions are cut anywhere,
    as evenly as possible.

    Args:
        tensor: a Tensor or QuantizedTensor ``[..., N, K]``.
        dim: the dimension to cut.
        rank: from 0 to ``world - 1``.
        world: number of ranks.
        sizes: every rank's size instead; they add up to the dimension.
        pad: give every rank the same size, the smallest aligned one that is enough for all. Ranks
            at the end are filled up, in a copy, with zeros (columns of a quantized weight with
            code 0 in groups of scale 0). The input of a product must have zeros there as well.

    Raises:
        ValueError: a cut that is not aligned, or fewer aligned pieces than ranks (``pad`` takes
            these); names the sizes that are possible.
        IndexError: ``dim`` or ``rank`` is out of range.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"dim must be in [{-tensor.dim()}, {tensor.dim() - 1}], got {dim}")
    if world < 1 or not 0 <= rank < world:
        raise IndexError(f"rank must be in [0, world) with world at least 1, got {rank} of {world}")
    dim %= tensor.dim()
    size, unit, what = tensor.shape[dim], 1, f"dimension {dim}"
    if isinstance(tensor, QuantizedTensor) and dim == tensor.dim() - 1 - tensor.transposed:
        unit = column_unit(tensor.bits, tensor.group_size, size)
        what = f"in_features (bits={tensor.bits}, group_size={tensor.group_size})"
    if pad:
        if sizes is not None:
            raise ValueError("sizes and pad must not both be given, got both")
        return _padded(tensor, dim, rank, world, unit)
    if sizes is not None:
        ranges = _given_ranges(sizes, size, world, unit, what)
    else:
        ranges = split_ranges(size, world, unit, what)
    start, stop = ranges[rank]
    return tensor.narrow(dim, start, stop - start)


def _given_ranges(sizes: Sequence[int], size: int, world: int, unit: int, what: str) -> Ranges:
    if len(sizes) != world or sum(sizes) != size or min(sizes) < 0:
        raise ValueError(f"sizes must be {world} numbers that add up to {size}, got {list(sizes)}")
    edges = [sum(sizes[:i]) for i in range(world + 1)]
    for edge in edges:
        if edge % unit and edge != size:
            below = edge // unit * unit
            raise ValueError(
                f"{what} can be cut at multiples of {unit} only, got sizes {list(sizes)}, which "
                f"cut at {edge}; the aligned cuts next to it are {below} and "
                f"{min(below + unit, size)}"
            )
    return tuple(itertools.pairwise(edges))


def _padded(tensor: Tensor, dim: int, rank: int, world: int, unit: int) -> Any:
    size = tensor.shape[dim]
    local = max(1, math.ceil(math.ceil(size / unit) / world)) * unit
    start, stop = rank * local, min((rank + 1) * local, size)
    if start >= size:
        start = stop = 0
    if stop - start == local:
        return tensor.narrow(dim, start, local)
    if not isinstance(tensor, QuantizedTensor):
        return _fill(tensor.narrow(dim, start, stop - start), dim, local)
    if tensor.transposed:
        other = {tensor.dim() - 1: tensor.dim() - 2, tensor.dim() - 2: tensor.dim() - 1}
        rows = _padded(tensor.transpose(-1, -2), other.get(dim, dim), rank, world, unit)
        return rows.transpose(-1, -2)
    columns = dim == tensor.dim() - 1
    part: Any = tensor.narrow(dim, start, stop - start)
    # With one group per row that group may become longer than it was.
    group_size = max(tensor.group_size, local) if columns and unit < 16 else tensor.group_size
    lengths = {}
    if columns:
        groups = num_groups(local, group_size)
        lengths = {"scale": groups, "zero_point": groups, "offset": groups}
        lengths["codes"] = code_bytes(local, tensor.bits)
    filled = {
        name: _fill(component, dim, lengths.get(name, local))
        for name, component in part.components.items()
    }
    return QuantizedTensor(
        **filled,
        bits=tensor.bits,
        group_size=group_size,
        in_features=local if columns else tensor.in_features,
        dtype=tensor.dtype,
    )


def _fill(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros at the end of ``dim`` up to ``size``."""
    missing = size - tensor.shape[dim]
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing])

"""Slices and shapes: results share the components' memory.

Sizes and strides of a QuantizedTensor are those that the dense tensor would have, so that torch
decides about ``reshape`` and friends as it would for the dense one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import implements, unsupported
from .quantized_tensor import QuantizedTensor, _transpose

aten = torch.ops.aten


def _dim(tensor: Tensor, dim: int, extra: int = 0) -> int:
    ndim = tensor.dim() + extra
    if not -ndim <= dim < ndim:
        raise IndexError(f"dim must be in [{-ndim}, {ndim - 1}], got {dim}")
    return dim % ndim


def _is_packed_dim(tensor: QuantizedTensor, dim: int) -> bool:
    """Whether ``dim`` (not negative) is K, along which codes are packed."""
    return dim == tensor.dim() - (2 if tensor.transposed else 1)


def _part_dim(tensor: QuantizedTensor, dim: int) -> int:
    """The components' dimension for a dimension that is not K."""
    return tensor.dim() - 2 if tensor.transposed and dim == tensor.dim() - 1 else dim


def _replaced(values: Sequence[int], dim: int, value: int) -> list[int]:
    changed = list(values)
    changed[dim] = value
    return changed


def _without(values: Sequence[int], dim: int) -> list[int]:
    return [value for i, value in enumerate(values) if i != dim]


@implements(aten.t.default, aliasing=True)
def t(self: QuantizedTensor) -> QuantizedTensor:
    """``[N, K]`` to ``[K, N]``; products use it, memory stays."""
    if self.dim() != 2:
        unsupported(f"t() of {self.dim()} dimensions", "use transpose(-1, -2)")
    return _transpose(self)


@implements(aten.transpose.int, aliasing=True)
def transpose(self: QuantizedTensor, dim0: int, dim1: int) -> QuantizedTensor:
    """Swap two dimensions."""
    return permute_dims(self, _swapped(self.dim(), _dim(self, dim0), _dim(self, dim1)))


@implements(aten.permute.default, aliasing=True)
def permute(self: QuantizedTensor, dims: Sequence[int]) -> QuantizedTensor:
    """Any order that leaves in_features last or second to last."""
    order = [_dim(self, dim) for dim in dims]
    if sorted(order) != list(range(self.dim())):
        raise ValueError(f"permute needs each of {self.dim()} dims once, got {list(dims)}")
    return permute_dims(self, order)


def _swapped(ndim: int, dim0: int, dim1: int) -> list[int]:
    order = list(range(ndim))
    order[dim0], order[dim1] = dim1, dim0
    return order


def permute_dims(self: QuantizedTensor, order: list[int]) -> QuantizedTensor:
    """Permute dimensions so that in_features stays last, or comes second to last."""
    ndim = self.dim()
    if self.transposed:
        stored = {ndim - 1: ndim - 2, ndim - 2: ndim - 1}
        rows = [stored.get(dim, dim) for dim in order]
    else:
        rows = list(order)
    packed = rows.index(ndim - 1)
    if packed < ndim - 2:
        return unsupported(f"permute{tuple(order)}, which moves in_features off the last two dims")
    transposed = packed == ndim - 2
    if transposed:
        rows[-2:] = [rows[-1], rows[-2]]
    return self._map(
        lambda part: part.permute(rows),
        size=[self.shape[dim] for dim in order],
        stride=[self.stride()[dim] for dim in order],
        transposed=transposed,
    )


@implements(aten.slice.Tensor, aliasing=True)
def slice_dim(
    self: QuantizedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> QuantizedTensor:
    """``self[start:end:step]`` along ``dim``."""
    dim = _dim(self, dim)
    length = self.shape[dim]
    start, end = (0 if start is None else start), (length if end is None else end)
    start = min(max(start + length if start < 0 else start, 0), length)
    end = min(max(end + length if end < 0 else end, start), length)
    if step < 1:
        raise ValueError(f"slice step must be positive, got {step}")
    size = _replaced(self.shape, dim, (end - start + step - 1) // step)
    stride = _replaced(self.stride(), dim, self.stride()[dim] * step)
    if not _is_packed_dim(self, dim):
        part_dim = _part_dim(self, dim)
        return self._map(
            lambda part: aten.slice.Tensor(part, part_dim, start, end, step),
            size=size,
            stride=stride,
        )
    if step != 1:
        return unsupported(f"a column slice with step {step}")
    return _slice_columns(self, start, end, size, stride)


def _slice_columns(
    self: QuantizedTensor, start: int, end: int, size: list[int], stride: list[int]
) -> QuantizedTensor:
    """Columns ``[start, end)``: bytes of codes, and the groups that they touch."""
    per_byte, group = 8 // self.bits, self.group_size
    whole_rows = end == self.in_features
    one_group = end <= (start // group + 1) * group
    if start % per_byte or (end % per_byte and not whole_rows) or (start % group and not one_group):
        step = math.lcm(group, per_byte)
        raise ValueError(
            f"a column slice of a {self.bits}-bit tensor with group_size {group} must start at a "
            f"multiple of {step} and end at a multiple of {per_byte} or at {self.in_features} "
            f"(or lie inside one group, at multiples of {per_byte}), got [{start}:{end}]; "
            "for other columns slice .dequantize()"
        )
    first_byte, last_byte = start // per_byte, (end + per_byte - 1) // per_byte
    first_group = start // group
    last_group = (end + group - 1) // group if end > start else first_group

    def groups(part: Tensor) -> Tensor:
        return part[..., first_group:last_group]

    parts = (
        self.codes[..., first_byte:last_byte],
        groups(self.scale),
        None if self.zero_point is None else groups(self.zero_point),
        None if self.offset is None else groups(self.offset),
    )
    return self._with(parts, size=size, stride=stride)


@implements(aten.select.int, aliasing=True)
def select(self: QuantizedTensor, dim: int, index: int) -> QuantizedTensor:
    """One row, or one matrix of a stack."""
    dim = _dim(self, dim)
    if _is_packed_dim(self, dim):
        return unsupported("select along in_features (one column)")
    length = self.shape[dim]
    if not -length <= index < length:
        raise IndexError(f"index must be in [{-length}, {length - 1}], got {index}")
    part_dim = _part_dim(self, dim)
    # A row of the transposed view is a stored row: nothing is left to be transposed.
    in_matrix = part_dim == self.dim() - 2
    return self._map(
        lambda part: part.select(part_dim, index),
        size=_without(self.shape, dim),
        stride=_without(self.stride(), dim),
        transposed=self.transposed and not in_matrix,
    )


@implements(aten.unbind.int, aliasing=True)
def unbind(self: QuantizedTensor, dim: int = 0) -> list[QuantizedTensor]:
    """All slices along ``dim``."""
    return [select(self, dim, i) for i in range(self.shape[_dim(self, dim)])]


@implements(aten.split.Tensor, aliasing=True)
def split(self: QuantizedTensor, split_size: int, dim: int = 0) -> list[QuantizedTensor]:
    """Pieces of ``split_size``; the last may be shorter."""
    length = self.shape[_dim(self, dim)]
    if split_size < 0 or (split_size == 0 and length):
        raise ValueError(f"split size must be positive, got {split_size}")
    count = max(1, -(-length // split_size)) if split_size else 1
    return [slice_dim(self, dim, i * split_size, (i + 1) * split_size) for i in range(count)]


@implements(aten.split_with_sizes.default, aliasing=True)
def split_with_sizes(
    self: QuantizedTensor, split_sizes: Sequence[int], dim: int = 0
) -> list[QuantizedTensor]:
    """Pieces of the given sizes."""
    length = self.shape[_dim(self, dim)]
    if sum(split_sizes) != length or any(size < 0 for size in split_sizes):
        raise ValueError(f"split sizes must sum up to {length}, got {list(split_sizes)}")
    pieces, start = [], 0
    for size in split_sizes:
        pieces.append(slice_dim(self, dim, start, start + size))
        start += size
    return pieces


@implements(aten.unsqueeze.default, aliasing=True)
def unsqueeze(self: QuantizedTensor, dim: int) -> QuantizedTensor:
    """A new dimension of size 1 before the matrix dimensions (before K for a row)."""
    dim = _dim(self, dim, extra=1)
    limit = self.dim() - (2 if self.transposed else 1)
    if dim > limit:
        return unsupported(f"unsqueeze({dim}), a new dimension after the rows")
    size, stride = list(self.shape), list(self.stride())
    size.insert(dim, 1)
    stride.insert(dim, self.shape[dim] * self.stride()[dim])
    return self._map(lambda part: part.unsqueeze(dim), size=size, stride=stride)


@implements(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aliasing=True)
def squeeze(self: QuantizedTensor, dim: int | Sequence[int] | None = None) -> QuantizedTensor:
    """Drop leading dimensions of size 1; K stays."""
    if dim is None:
        dims = list(range(self.dim()))
    else:
        dims = [_dim(self, d) for d in ([dim] if isinstance(dim, int) else dim)]
    limit = self.dim() - (2 if self.transposed else 1)
    drop = sorted((d for d in set(dims) if self.shape[d] == 1), reverse=True)
    if drop and drop[0] >= limit:
        return unsupported(f"squeeze of dimension {drop[0]}, which is in_features")
    result = self._with(self._parts())
    for d in drop:
        result = result._map(
            lambda part, d=d: part.squeeze(d),  # type: ignore[misc]
            size=_without(result.shape, d),
            stride=_without(result.stride(), d),
        )
    return result


@implements(
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aliasing=True
)
def view(self: QuantizedTensor, size: Sequence[int], *_: Any) -> QuantizedTensor:
    """Other leading dimensions over the same rows of K."""
    shape = list(size)
    if shape.count(-1) > 1 or any(n < -1 for n in shape):
        raise ValueError(f"view takes sizes and at most one -1, got {shape}")
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        if known == 0 or self.numel() % known:
            raise ValueError(f"view{tuple(shape)} does not fit {self.numel()} elements")
        shape[shape.index(-1)] = self.numel() // known
    if math.prod(shape) != self.numel():
        raise ValueError(f"view{tuple(shape)} does not fit {self.numel()} elements")
    if shape == list(self.shape):
        return self._with(self._parts())
    if self.transposed and len(shape) > 1 and shape[-2:] == list(self.shape[-2:]):
        return _transpose(view(_transpose(self), [*shape[:-2], shape[-1], shape[-2]]))
    if self.transposed or not shape or shape[-1] != self.in_features:
        return unsupported(
            f"view{tuple(shape)} of shape {tuple(self.shape)}: rows of in_features must stay whole"
        )
    leading = shape[:-1]
    parts = [
        None if part is None else part.view(*leading, part.shape[-1]) for part in self._parts()
    ]
    stride = _view_stride(parts[0], self)
    return self._with(tuple(parts), size=shape, stride=stride)  # type: ignore[arg-type]


def _view_stride(codes: Tensor | None, self: QuantizedTensor) -> list[int] | None:
    """Strides of the dense view, in proportion to those of the viewed codes."""
    assert codes is not None
    last = self.stride()[-1]
    if self.dim() < 2 or not codes.stride() or self.codes.stride()[-2] == 0:
        return None
    row, row_bytes = self.stride()[-2], self.codes.stride()[-2]
    if row_bytes == 0 or self.codes.shape[-1] == 0:
        return None
    return [s // row_bytes * row for s in codes.stride()[:-1]] + [last]


@implements(aten.expand.default, aliasing=True)
def expand(
    self: QuantizedTensor, size: Sequence[int], *, implicit: bool = False
) -> QuantizedTensor:
    """Repeat leading dimensions without copying."""
    shape = list(size)
    offset = len(shape) - self.dim()
    if offset < 0:
        raise ValueError(f"expand{tuple(shape)} has fewer dimensions than {tuple(self.shape)}")
    for i in range(self.dim()):
        if shape[offset + i] == -1:
            shape[offset + i] = self.shape[i]
    packed = len(shape) - (2 if self.transposed else 1)
    if shape[packed] != self.in_features:
        return unsupported(f"expand{tuple(size)} along in_features")
    stride = [0] * offset + [
        0 if shape[offset + i] != self.shape[i] else self.stride()[i] for i in range(self.dim())
    ]
    rows = shape if not self.transposed else [*shape[:-2], shape[-1], shape[-2]]
    return self._map(
        lambda part: part.expand(*rows[:-1], part.shape[-1]), size=shape, stride=stride
    )

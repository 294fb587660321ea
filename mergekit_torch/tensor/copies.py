"""Devices, dtypes and copies of a QuantizedTensor's components."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._common import require_float
from ._registry import implements, unsupported
from .quantized_tensor import QuantizedTensor, _transpose
from .views import _dim, _is_packed_dim, _part_dim

aten = torch.ops.aten


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aliasing=True)
def detach(self: QuantizedTensor) -> QuantizedTensor:
    """A new tensor on the same component objects."""
    return self._with(self._parts())


@implements(aten.clone.default)
def clone(
    self: QuantizedTensor, *, memory_format: torch.memory_format | None = None
) -> QuantizedTensor:
    """Copy the components; a contiguous copy of the transposed view would need requantizing."""
    if memory_format == torch.contiguous_format:
        if self.transposed:
            unsupported(
                "a contiguous copy of a transposed weight",
                "products take the transposed view as it is; else call .dequantize()",
            )
        return self._map(
            lambda part: part.clone(memory_format=torch.contiguous_format), size=self.shape
        )
    if memory_format not in (None, torch.preserve_format):
        unsupported(f"memory_format={memory_format}")
    base = self._rows()
    copied = base._map(
        lambda part: part.clone(memory_format=torch.contiguous_format), size=base.shape
    )
    return _transpose(copied) if self.transposed else copied


@implements(aten._to_copy.default)
def to_copy(
    self: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> QuantizedTensor:
    """Components on another device, or the same components dequantizing to another float dtype.

    ``dtype`` is what the tensor dequantizes to: scale and offset keep theirs, so no precision of
    the weight is lost.
    """
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"a QuantizedTensor's dtype must be float32, float16 or bfloat16, got {dtype}; "
            f"for another one call .dequantize().to({dtype})"
        )
    if layout not in (None, torch.strided):
        unsupported(f"layout={layout}")

    def move(part: Tensor) -> Tensor:
        return aten._to_copy.default(
            part,
            device=device,
            pin_memory=pin_memory,
            non_blocking=non_blocking,
            memory_format=memory_format,
        )

    return self._map(move, dtype=self.dtype if dtype is None else dtype)


@implements(aten._pin_memory.default)
def pin_memory(self: QuantizedTensor, device: torch.device | None = None) -> QuantizedTensor:
    """Components in page-locked memory."""
    return self._map(lambda part: part.pin_memory())


@implements(aten.is_pinned.default)
def is_pinned(self: QuantizedTensor, device: torch.device | None = None) -> bool:
    """Whether all components are page-locked."""
    return all(part.is_pinned() for part in self.components.values())


@implements(aten.empty_like.default)
def empty_like(
    self: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> QuantizedTensor:
    """Uninitialized components of the same format."""
    dtype = self.dtype if dtype is None else dtype
    require_float("dtype", dtype)
    return self._map(
        lambda part: torch.empty_like(part, device=device, pin_memory=bool(pin_memory)),
        dtype=dtype,
    )


def same_format(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether components of ``a`` and ``b`` mean the same when they are equal."""
    return (
        (a.bits, a.group_size, a.scheme, a.scale.dtype, a.transposed)
        == (b.bits, b.group_size, b.scheme, b.scale.dtype, b.transposed)
    ) and tuple(a.shape) == tuple(b.shape)


@implements(aten.copy_.default, aliasing=True)
def copy_(self: Any, src: Any, non_blocking: bool = False) -> Any:
    """Copy components between tensors of one format and shape."""
    if not isinstance(self, QuantizedTensor):
        return unsupported("copy_ into a dense tensor", "copy from .dequantize()")
    if not isinstance(src, QuantizedTensor):
        return unsupported(
            "copy_ from a dense tensor", "quantize it first: QuantizedTensor.from_float(...)"
        )
    if not same_format(self, src):
        raise ValueError(f"copy_ needs two tensors of one format and shape, got {self} and {src}")
    for name, part in self.components.items():
        part.copy_(getattr(src, name), non_blocking=non_blocking)
    return self


@implements(aten.cat.default)
def cat(tensors: Sequence[Any], dim: int = 0) -> QuantizedTensor:
    """Join along rows or stacks, e.g. q, k and v projections into one."""
    first = tensors[0]
    if not all(isinstance(tensor, QuantizedTensor) for tensor in tensors):
        return unsupported("cat of quantized and dense tensors", "call .dequantize() on the former")
    dim = _dim(first, dim)
    if _is_packed_dim(first, dim):
        return unsupported("cat along in_features")
    size = list(first.shape)
    size[dim] = sum(tensor.shape[dim] for tensor in tensors)
    for tensor in tensors:
        probe = list(tensor.shape)
        probe[dim] = size[dim]
        formats = [(x.bits, x.group_size, x.scheme, x.scale.dtype) for x in (first, tensor)]
        if formats[0] != formats[1] or probe != size or tensor.transposed != first.transposed:
            raise ValueError(f"cat needs tensors of one format, got {first} and {tensor}")
    part_dim = _part_dim(first, dim)

    def join(name: str) -> Tensor | None:
        parts = [getattr(tensor, name) for tensor in tensors]
        return None if parts[0] is None else torch.cat(parts, part_dim)

    codes, scale = join("codes"), join("scale")
    assert codes is not None
    assert scale is not None
    stride = None
    if first.transposed:
        rows = [*size[:-2], size[-1], size[-2]]
        stride = list(torch.empty(rows, device="meta").transpose(-1, -2).stride())
    return first._with((codes, scale, join("zero_point"), join("offset")), size=size, stride=stride)


@implements(aten.index_select.default)
def index_select(self: QuantizedTensor, dim: int, index: Tensor) -> QuantizedTensor:
    """Chosen rows, copied, still quantized."""
    dim = _dim(self, dim)
    if self.transposed or _is_packed_dim(self, dim):
        return unsupported("index_select along in_features or of a transposed weight")
    size = list(self.shape)
    size[dim] = index.numel()
    return self._map(lambda part: part.index_select(dim, index), size=size)


@implements(aten.index.Tensor)
def index(self: Any, indices: Sequence[Tensor | None]) -> QuantizedTensor:
    """``self[index]`` over leading dimensions: chosen rows, copied, still quantized."""
    if not isinstance(self, QuantizedTensor):
        return unsupported("being used as an index")
    if any(isinstance(i, QuantizedTensor) for i in indices):
        return unsupported("being used as an index")
    consumed = sum(
        1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices
    )
    if self.transposed or consumed > self.dim() - 1:
        return unsupported("advanced indexing along in_features or of a transposed weight")
    codes = aten.index.Tensor(self.codes, indices)
    if codes.dim() == 0:
        return unsupported("advanced indexing along in_features")
    fill: list[Any] = [codes]
    for part in (self.scale, self.zero_point, self.offset):
        fill.append(None if part is None else aten.index.Tensor(part, indices))
    return self._with(tuple(fill), size=(*codes.shape[:-1], self.in_features))

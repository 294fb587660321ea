"""Scaling and negation on scale and offset; arithmetic with tensors, which gives float tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from ._registry import implements, unsupported
from .quantized_tensor import QuantizedTensor

aten = torch.ops.aten


def _is_factor(value: Any) -> bool:
    """A number, or a dense 0-d tensor of real numbers."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, (int, float))


def _rescaled(self: QuantizedTensor, factor: Any, divide: bool) -> QuantizedTensor:
    """``scale`` and ``offset`` times (or over) ``factor``.

    float32 unless the factor is known to be 1 or -1: the rule looks at no data, so it is the same
    on every device and under torch.compile, and costs no precision.
    """
    if isinstance(factor, (int, float)):
        if not math.isfinite(factor) or (divide and factor == 0):
            what = "divisor must be finite and not 0" if divide else "factor must be finite"
            raise ValueError(f"a QuantizedTensor's {what}, got {factor}")
        if factor in (1, -1):
            return neg(self) if factor == -1 else self._with(self._parts())
    elif factor.device != self.device and factor.device.type != "cpu":
        raise ValueError(f"factor must be on {self.device} or the CPU, got {factor.device}")
    else:
        factor = factor.to(device=self.device, dtype=torch.float32)

    def apply(part: Tensor) -> Tensor:
        return part.float() / factor if divide else part.float() * factor

    codes, scale, zero_point, offset = self._parts()
    return self._with((codes, apply(scale), zero_point, None if offset is None else apply(offset)))


@implements(aten.neg.default)
def neg(self: QuantizedTensor) -> QuantizedTensor:
    """Exact: signs of scale and offset; codes are shared."""
    codes, scale, zero_point, offset = self._parts()
    return self._with((codes, -scale, zero_point, None if offset is None else -offset))


@implements(aten.mul.Tensor, aten.mul.Scalar)
def mul(a: Any, b: Any) -> Tensor:
    """Quantized times a number stays quantized; times a tensor is a float tensor."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, QuantizedTensor) and _is_factor(y):
            return _rescaled(x, y, divide=False)
    return as_float(aten.mul.Tensor)(a, b)


@implements(aten.div.Tensor, aten.div.Scalar)
def div(a: Any, b: Any) -> Tensor:
    """Quantized over a number stays quantized; over a tensor is a float tensor."""
    if isinstance(a, QuantizedTensor) and _is_factor(b):
        return _rescaled(a, b, divide=True)
    return as_float(aten.div.Tensor)(a, b)


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def as_float(op: Any) -> Any:
    """``op`` on dequantized operands."""

    def handler(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = op(*(_dense(arg) for arg in args), **kwargs)
        return result

    return handler


for _op in (
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Tensor,
    aten.rsub.Scalar,
    *(
        getattr(getattr(aten, name), overload)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for overload in ("Tensor", "Scalar")
    ),
):
    implements(_op)(as_float(_op))


def _in_place(op: Any) -> Any:
    def handler(self: Any, other: Any, **kwargs: Any) -> Tensor:
        if isinstance(self, QuantizedTensor):
            return unsupported(f"{op}, a change in place")
        result: Tensor = op(self, _dense(other), **kwargs)
        return result

    return handler


for _op in (aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor):
    implements(_op, aliasing=True)(_in_place(_op))


def _equal_components(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return all(torch.equal(part, getattr(b, name)) for name, part in a.components.items())


def _row_blocks(*tensors: Tensor, elements: int = 1 << 22) -> Any:
    """Aligned blocks of rows, dequantized, so that a comparison needs little memory."""
    first = tensors[0]
    if first.dim() < 2 or first.numel() <= elements:
        yield tuple(_dense(tensor) for tensor in tensors)
        return
    if first.dim() > 2:
        for i in range(first.shape[0]):
            yield from _row_blocks(*(tensor[i] for tensor in tensors), elements=elements)
        return
    step = max(1, elements // max(1, first.shape[1]))
    for start in range(0, first.shape[0], step):
        yield tuple(_dense(tensor[start : start + step]) for tensor in tensors)


@implements(aten.equal.default)
def equal(self: Tensor, other: Tensor) -> bool:
    """Whether shapes, dtypes and all values are equal; blocks of rows at a time."""
    from .copies import same_format

    if self.shape != other.shape or self.dtype != other.dtype:
        return False
    if (
        isinstance(self, QuantizedTensor)
        and isinstance(other, QuantizedTensor)
        and same_format(self, other)
        and _equal_components(self, other)
        and bool(torch.isfinite(self.scale).all())
        and (self.offset is None or bool(torch.isfinite(self.offset).all()))
    ):
        return True
    return all(torch.equal(a, b) for a, b in _row_blocks(self, other))


@implements(aten.allclose.default)
def allclose(
    self: Tensor, other: Tensor, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> bool:
    """``torch.allclose`` on dequantized values, blocks of rows at a time."""
    if self.shape != other.shape:
        raise ValueError(
            f"allclose needs one shape, got {tuple(self.shape)} and {tuple(other.shape)}"
        )
    return all(torch.allclose(a, b, rtol, atol, equal_nan) for a, b in _row_blocks(self, other))

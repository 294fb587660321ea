"""sum, mean, extremes and norms straight from the codes, accumulated in float32.

They reduce the float32 values that the format defines, before any rounding to the tensor's
dtype, and round the result once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import implements, unsupported
from .quantized_tensor import QuantizedTensor
from .views import _dim

aten = torch.ops.aten


def _reduce_rows(base: QuantizedTensor, reduction: str) -> Tensor:
    """float32 ``[..., N, 1]``."""
    parts = base._parts()
    if base.dim() == 1:
        parts = tuple(None if p is None else p.unsqueeze(0) for p in parts)  # type: ignore[assignment]
    rows: Tensor = torch.ops.mkrs.dequant_reduce(
        *parts, base.bits, base.group_size, base.in_features, reduction
    )
    return rows if base.dim() == 1 else rows.unsqueeze(-1)


def _sum_over_rows(base: QuantizedTensor) -> Tensor:
    """float32 ``[..., 1, K]``: a product with ones."""
    if base.dim() == 2:
        ones = torch.ones(1, base.shape[0], device=base.device)
        result: Tensor = torch.ops.mkrs.dequant_matmul_t(
            ones, *base._parts(), base.bits, base.group_size, base.in_features
        )
        return result
    if base.shape[0] == 0:
        return torch.zeros(*base.shape[:-2], 1, base.in_features, device=base.device)
    return torch.stack([_sum_over_rows(m) for m in base.unbind(0)])  # type: ignore[arg-type]


def _base_dims(self: QuantizedTensor, dim: Any) -> list[int]:
    """Dimensions to reduce, in the stored orientation; None and [] mean all."""
    ndim = self.dim()
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(ndim))
    dims = [_dim(self, d) for d in ([dim] if isinstance(dim, int) else dim)]
    if len(set(dims)) != len(dims):
        raise ValueError(f"a dimension appears twice in {list(dim)}")
    if self.transposed:
        swap = {ndim - 1: ndim - 2, ndim - 2: ndim - 1}
        dims = [swap.get(d, d) for d in dims]
    return dims


def _finish(self: QuantizedTensor, kept: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """From ``kept``, reduced with sizes 1 in the stored orientation, to what was asked for."""
    if keepdim:
        return kept.transpose(-1, -2) if self.transposed else kept
    remaining = [n for i, n in enumerate(kept.shape) if i not in dims]
    return kept.reshape(remaining)


def _reduce(
    self: QuantizedTensor,
    name: str,
    reduction: str,
    rest: Callable[[Tensor, list[int]], Tensor],
    dim: Any,
    keepdim: bool,
) -> Tensor:
    dims = _base_dims(self, dim)
    base = self._rows()
    last = base.dim() - 1
    if last in dims:
        kept = _reduce_rows(base, reduction)
        others = [d for d in dims if d != last]
        if others:
            kept = rest(kept, others)
    elif reduction == "sum" and dims == [last - 1]:
        kept = _sum_over_rows(base)
    else:
        return unsupported(f"{name} over dimensions that leave in_features")
    return _finish(self, kept, dims, keepdim)


def _sum(self: QuantizedTensor, name: str, dim: Any, keepdim: bool) -> Tensor:
    return _reduce(self, name, "sum", lambda t, d: t.sum(d, keepdim=True), dim, keepdim)


@implements(aten.sum.default, aten.sum.dim_IntList)
def sum_dims(
    self: QuantizedTensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum over in_features, over the rows of a matrix, or over more."""
    return _sum(self, "sum", dim, keepdim).to(dtype or self.dtype)


@implements(aten.mean.default, aten.mean.dim)
def mean(
    self: QuantizedTensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The sum over the number of elements."""
    total = _sum(self, "mean", dim, keepdim)
    count = 1
    for d in _base_dims(self, dim):
        count *= self._rows().shape[d]
    return (total / count).to(dtype or self.dtype)


@implements(aten.amax.default)
def amax(self: QuantizedTensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The largest element over in_features, and over more if asked."""
    result = _reduce(self, "amax", "amax", lambda t, d: t.amax(d, keepdim=True), dim, keepdim)
    return result.to(self.dtype)


@implements(aten.amin.default)
def amin(self: QuantizedTensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """The smallest element over in_features, and over more if asked."""
    result = _reduce(self, "amin", "amin", lambda t, d: t.amin(d, keepdim=True), dim, keepdim)
    return result.to(self.dtype)


@implements(aten.max.default)
def max_all(self: QuantizedTensor) -> Tensor:
    """The largest element."""
    return amax(self)


@implements(aten.min.default)
def min_all(self: QuantizedTensor) -> Tensor:
    """The smallest element."""
    return amin(self)


@implements(aten.linalg_vector_norm.default)
def vector_norm(
    self: QuantizedTensor,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Norms 2 and infinity over in_features, and over more if asked."""
    if ord == 2:
        squares = _reduce(
            self, "norm", "sum_squares", lambda t, d: t.sum(d, keepdim=True), dim, keepdim
        )
        result = squares.sqrt()
    elif ord == float("inf"):
        result = _reduce(
            self, "norm", "abs_max", lambda t, d: t.amax(d, keepdim=True), dim, keepdim
        )
    else:
        return unsupported(f"norm of order {ord}", "use order 2 or infinity, or call .dequantize()")
    return result.to(dtype or self.dtype)


@implements(aten.norm.Scalar, aten.norm.ScalarOpt_dim)
def norm(
    self: QuantizedTensor, p: float | None = 2, dim: Any = None, keepdim: bool = False
) -> Tensor:
    """``Tensor.norm``."""
    return vector_norm(self, 2 if p is None else p, dim, keepdim)

"""Matrix products and embedding lookups through the fused ops; the weight never becomes dense.

These run below autograd: torch differentiates ``mm`` and its kin itself, and the product that
its formula for the other operand needs arrives here as well.
"""

from typing import Any

import torch
from torch import Tensor

from ._registry import implements, unsupported
from .quantized_tensor import QuantizedTensor, _transpose

aten = torch.ops.aten


def _right(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight (+ bias)`` for a dense ``x [..., k]`` and a quantized matrix ``[k, n]``."""
    if isinstance(x, QuantizedTensor) or isinstance(bias, QuantizedTensor):
        return unsupported(
            "a product of two quantized tensors", "call .dequantize() on one of them"
        )
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"shapes {tuple(x.shape)} and {tuple(weight.shape)} cannot be multiplied: "
            f"{x.shape[-1]} is not {weight.shape[0]}"
        )
    parts = weight._parts()
    result: Tensor
    if weight.transposed:
        result = torch.ops.mkrs.dequant_matmul(
            x, *parts, bias, weight.bits, weight.group_size, "exact"
        )
        return result
    result = torch.ops.mkrs.dequant_matmul_t(
        x, *parts, weight.bits, weight.group_size, weight.in_features
    )
    return result if bias is None else result + bias


def _left(weight: QuantizedTensor, y: Tensor) -> Tensor:
    """``weight @ y`` for a quantized matrix ``[n, k]`` and a dense ``y [k, m]``."""
    if isinstance(y, QuantizedTensor):
        return unsupported(
            "a product of two quantized tensors", "call .dequantize() on one of them"
        )
    return _right(y.t(), _transpose(weight)).t().contiguous()


@implements(aten.mm.default)
def mm(a: Tensor, b: Tensor) -> Tensor:
    """``[m, k] @ [k, n]`` with one quantized operand."""
    return _left(a, b) if isinstance(a, QuantizedTensor) else _right(a, _quantized(b))


def _quantized(tensor: Tensor) -> QuantizedTensor:
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def _row(tensor: QuantizedTensor) -> QuantizedTensor:
    """A quantized row ``[k]`` as the matrix ``[k, 1]``."""
    return _transpose(tensor.unsqueeze(0))  # type: ignore[arg-type]


@implements(aten.mv.default)
def mv(a: Tensor, b: Tensor) -> Tensor:
    """``[m, k] @ [k]`` with one quantized operand."""
    if isinstance(a, QuantizedTensor):
        if isinstance(b, QuantizedTensor):
            return _left(a, b)
        return _right(b, _transpose(a))
    return _right(a, _row(_quantized(b))).squeeze(-1)


@implements(aten.dot.default, aten.vdot.default)
def dot(a: Tensor, b: Tensor) -> Tensor:
    """Refused: its gradient in torch is a scaled row, which would be a quantized gradient."""
    return unsupported("dot", "multiply a matrix (x.unsqueeze(0) @ row), or call .dequantize()")


@implements(aten.addmm.default, aten.addmv.default)
def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """``beta*bias + alpha*(a @ b)``; a plain bias of a linear layer is fused."""
    if isinstance(bias, QuantizedTensor):
        return unsupported("being the summand of addmm")
    fused = (
        isinstance(b, QuantizedTensor)
        and b.transposed
        and b.dim() == 2
        and beta == 1
        and alpha == 1
        and tuple(bias.shape) == (b.shape[1],)
        and bias.dtype == a.dtype
    )
    if fused:
        return _right(a, _quantized(b), bias)
    product = mm(a, b) if b.dim() == 2 else mv(a, b)
    return torch.add(product if alpha == 1 else alpha * product, bias, alpha=beta)


@implements(aten.bmm.default)
def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Products of stacks: one fused product per matrix of the quantized stack."""
    if isinstance(a, QuantizedTensor):
        if isinstance(b, QuantizedTensor):
            return _left(a, b)
        return bmm(b.transpose(1, 2), _transpose(a)).transpose(1, 2).contiguous()
    weights = _quantized(b)
    if a.shape[0] != weights.shape[0]:
        raise ValueError(
            f"bmm needs stacks of one length, got {tuple(a.shape)} and {tuple(weights.shape)}"
        )
    count = a.shape[0]
    if count > 1 and weights.codes.stride(0) == 0 and weights.scale.stride(0) == 0:
        # One weight expanded over the batch: one product over all rows.
        return _right(a, weights.select(0, 0))  # type: ignore[arg-type]
    if count == 0:
        return a.new_empty((0, a.shape[1], weights.shape[2]))
    return torch.stack(
        [_right(a[i], weights.select(0, i)) for i in range(count)]  # type: ignore[arg-type]
    )


@implements(aten.baddbmm.default)
def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """``beta*bias + alpha*bmm(a, b)``."""
    if isinstance(bias, QuantizedTensor):
        return unsupported("being the summand of baddbmm")
    product = bmm(a, b)
    return torch.add(product if alpha == 1 else alpha * product, bias, alpha=beta)


@implements(aten.linear.default)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` where torch does not take it apart first (inference mode)."""
    if not isinstance(weight, QuantizedTensor) or weight.dim() != 2:
        return unsupported("F.linear with anything but a quantized matrix as its weight")
    flipped = _transpose(weight)
    if bias is not None and (not flipped.transposed or bias.dtype != input.dtype):
        return _right(input, flipped) + bias
    return _right(input, flipped, bias)


@implements(aten.embedding.default)
def embedding(
    weight: Any,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``: only the rows that are asked for are read and dequantized."""
    if not isinstance(weight, QuantizedTensor) or weight.transposed or weight.dim() != 2:
        return unsupported("F.embedding with anything but a quantized table [N, K]")
    result: Tensor = torch.ops.mkrs.dequant_embedding(
        indices,
        *weight._parts(),
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.dtype,
    )
    return result

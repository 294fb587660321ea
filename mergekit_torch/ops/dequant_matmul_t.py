"""``mkrs::dequant_matmul_t``: the product with a quantized weight that is not transposed."""

from typing import Any

import torch
from torch import Tensor

from ._common import check_components, leading, reference_dequantize, require_float, require_tensor


def dequant_matmul_t(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Compute ``input @ W`` for a quantized ``W`` of shape ``[N, K]``: a linear layer's backward.

    Differentiable in ``input``.

    Args:
        input: float32, float16 or bfloat16 ``[..., N]``.
        codes: uint8 ``[N, ceil(K*bits/8)]``.
        scale: float16, bfloat16 or float32 ``[N, ceil(K/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        in_features: K.

    Returns:
        ``[..., K]`` of input's dtype, accumulated in float32.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices that do not fit.
    """
    _check(input, codes, scale, zero_point, offset, bits, group_size, in_features)
    result: Tensor = torch.ops.mkrs.dequant_matmul_t(
        input, codes, scale, zero_point, offset, bits, group_size, in_features
    )
    return result


def _check(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    require_tensor("input", input)
    require_float("input", input.dtype)
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features, ndim=2)
    if input.dim() < 1 or input.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"input must have N = {codes.shape[0]} as its last size, got {list(input.shape)}"
        )
    if input.device != codes.device:
        raise ValueError(f"input must be on {codes.device} like codes, got {input.device}")


@torch.library.register_fake("mkrs::dequant_matmul_t")
def _fake(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    _check(input, codes, scale, zero_point, offset, bits, group_size, in_features)
    return input.new_empty((*leading(input.shape), in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero_point, offset, bits, group_size, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point, offset)
    ctx.format = (bits, group_size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point, offset = ctx.saved_tensors
    bits, group_size = ctx.format
    grad_input = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.mkrs.dequant_matmul(
            grad, codes, scale, zero_point, offset, None, bits, group_size
        )
    return grad_input, None, None, None, None, None, None, None


torch.library.register_autograd("mkrs::dequant_matmul_t", _backward, setup_context=_setup_context)


def reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """The op in plain torch, in float64, rounded once to input's dtype."""
    weight = reference_dequantize(codes, scale, zero_point, offset, bits, group_size, in_features)
    return (input.double() @ weight.double()).to(input.dtype)

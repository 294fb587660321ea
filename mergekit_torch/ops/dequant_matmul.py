"""``mkrs::dequant_matmul``: a linear layer on quantized weights, never making them dense."""

from typing import Any, Literal

import torch
from torch import Tensor

from ._common import check_components, leading, reference_dequantize, require_float, require_tensor

Compute = Literal["exact", "int8"]
COMPUTE_MODES: tuple[str, ...] = ("exact", "int8")


def dequant_matmul(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    compute: Compute = "exact",
) -> Tensor:
    """Compute ``input @ W.T + bias`` for a quantized ``W`` of shape ``[N, K]``.

    Differentiable in ``input`` and ``bias``; the weight is frozen.

    Args:
        input: float32, float16 or bfloat16 ``[..., K]``.
        codes: uint8 ``[N, ceil(K*bits/8)]``.
        scale: float16, bfloat16 or float32 ``[N, ceil(K/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bias: ``[N]`` of input's dtype, or None.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        compute: ``"exact"`` keeps the activations' precision and accumulates in float32;
            ``"int8"`` quantizes activations to int8 first.

    Returns:
        ``[..., N]`` of input's dtype.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes, devices or a mode that do not fit.
    """
    _check(input, codes, scale, zero_point, offset, bias, bits, group_size, compute)
    result: Tensor = torch.ops.mkrs.dequant_matmul(
        input, codes, scale, zero_point, offset, bias, bits, group_size, compute
    )
    return result


def _check(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    compute: str,
) -> None:
    require_tensor("input", input)
    require_float("input", input.dtype)
    if input.dim() < 1:
        raise ValueError("input must have at least 1 dimension, got a scalar")
    check_components(codes, scale, zero_point, offset, bits, group_size, input.shape[-1], ndim=2)
    if input.device != codes.device:
        raise ValueError(f"input must be on {codes.device} like codes, got {input.device}")
    if bias is not None:
        require_tensor("bias", bias)
        if bias.dtype != input.dtype:
            raise TypeError(f"bias must have input's dtype {input.dtype}, got {bias.dtype}")
        if tuple(bias.shape) != (codes.shape[0],):
            raise ValueError(f"bias must have shape [{codes.shape[0]}], got {list(bias.shape)}")
    if compute not in COMPUTE_MODES:
        raise ValueError(f"compute must be 'exact' or 'int8', got {compute!r}")


@torch.library.register_fake("mkrs::dequant_matmul")
def _fake(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    compute: str = "exact",
) -> Tensor:
    _check(input, codes, scale, zero_point, offset, bias, bits, group_size, compute)
    return input.new_empty((*leading(input.shape), codes.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, scale, zero_point, offset, _, bits, group_size, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point, offset)
    ctx.format = (bits, group_size)
    ctx.in_features = input.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point, offset = ctx.saved_tensors
    bits, group_size = ctx.format
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.mkrs.dequant_matmul_t(
            grad, codes, scale, zero_point, offset, bits, group_size, ctx.in_features
        )
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_input, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("mkrs::dequant_matmul", _backward, setup_context=_setup_context)


def reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """The exact mode in plain torch, in float64, rounded once to input's dtype."""
    weight = reference_dequantize(
        codes, scale, zero_point, offset, bits, group_size, input.shape[-1]
    ).double()
    result = input.double() @ weight.T
    if bias is not None:
        result = result + bias.double()
    return result.to(input.dtype)

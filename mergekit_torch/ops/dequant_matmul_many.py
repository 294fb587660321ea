"""``mkrs::dequant_matmul_many``: several quantized linear layers of one input in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import leading
from .dequant_matmul import Compute
from .dequant_matmul import _check as check_single
from .dequant_matmul import reference as reference_single


def dequant_matmul_many(
    input: Tensor,
    codes: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor] = (),
    offset: Sequence[Tensor] = (),
    bias: Sequence[Tensor] = (),
    *,
    bits: int,
    group_size: int,
    compute: Compute = "exact",
) -> list[Tensor]:
    """Compute ``[input @ W.T + b for W, b in weights]`` for weights of one format.

    The projections of an attention or gated block (q/k/v, gate/up) read one input: together they
    pay the cost of one call, and the input is prepared once. Differentiable in ``input`` and
    ``bias``.

    Args:
        input: float32, float16 or bfloat16 ``[..., K]``.
        codes: one uint8 ``[N_i, ceil(K*bits/8)]`` per weight.
        scale: one ``[N_i, ceil(K/group_size)]`` per weight.
        zero_point: one per weight (asymmetric), or empty.
        offset: one per weight (affine), or empty.
        bias: one ``[N_i]`` per weight, or empty.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        compute: ``"exact"`` or ``"int8"``, as for :func:`dequant_matmul`.

    Returns:
        One ``[..., N_i]`` of input's dtype per weight.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes, list lengths, devices or a mode that do not fit.
    """
    lists = [list(part) for part in (codes, scale, zero_point, offset, bias)]
    _check(input, lists[0], lists[1], lists[2], lists[3], lists[4], bits, group_size, compute)
    result: list[Tensor] = torch.ops.mkrs.dequant_matmul_many(
        input, *lists, bits, group_size, compute
    )
    return result


def _at(parts: Sequence[Tensor], i: int) -> Tensor | None:
    return parts[i] if parts else None


def _check(
    input: Tensor,
    codes: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    offset: Sequence[Tensor],
    bias: Sequence[Tensor],
    bits: int,
    group_size: int,
    compute: str,
) -> None:
    if not codes:
        raise ValueError("codes must hold at least one weight, got none")
    if len(scale) != len(codes):
        raise ValueError(f"scale must have {len(codes)} tensors like codes, got {len(scale)}")
    for name, part in (("zero_point", zero_point), ("offset", offset), ("bias", bias)):
        if len(part) not in (0, len(codes)):
            raise ValueError(
                f"{name} must have no or {len(codes)} tensors like codes, got {len(part)}"
            )
    for i in range(len(codes)):
        check_single(
            input,
            codes[i],
            scale[i],
            _at(zero_point, i),
            _at(offset, i),
            _at(bias, i),
            bits,
            group_size,
            compute,
        )


@torch.library.register_fake("mkrs::dequant_matmul_many")
def _fake(
    input: Tensor,
    codes: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    offset: Sequence[Tensor],
    bias: Sequence[Tensor],
    bits: int,
    group_size: int,
    compute: str,
) -> list[Tensor]:
    _check(input, codes, scale, zero_point, offset, bias, bits, group_size, compute)
    return [input.new_empty((*leading(input.shape), c.shape[0])) for c in codes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, codes, scale, zero_point, offset, _, bits, group_size, _ = inputs
    ctx.save_for_backward(*codes, *scale, *zero_point, *offset)
    ctx.lengths = (len(codes), len(scale), len(zero_point), len(offset))
    ctx.bias_count = len(inputs[5])
    ctx.format = (bits, group_size)
    ctx.in_features = input.shape[-1]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    parts: list[list[Tensor]] = []
    for length in ctx.lengths:
        parts.append(saved[:length])
        saved = saved[length:]
    codes, scale, zero_point, offset = parts
    grad_input: Tensor | None = None
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        term = torch.ops.mkrs.dequant_matmul_t(
            grad,
            codes[i],
            scale[i],
            _at(zero_point, i),
            _at(offset, i),
            *ctx.format,
            ctx.in_features,
        )
        grad_input = term if grad_input is None else grad_input + term
    grad_bias = [
        None if grad is None else grad.reshape(-1, grad.shape[-1]).sum(0)
        for grad in list(grads)[: ctx.bias_count]
    ]
    none = [[None] * length for length in ctx.lengths]
    return grad_input, *none, grad_bias, None, None, None


torch.library.register_autograd(
    "mkrs::dequant_matmul_many", _backward, setup_context=_setup_context
)


def reference(
    input: Tensor,
    codes: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    offset: Sequence[Tensor],
    bias: Sequence[Tensor],
    bits: int,
    group_size: int,
) -> list[Tensor]:
    """The exact mode in plain torch, weight by weight."""
    return [
        reference_single(
            input,
            codes[i],
            scale[i],
            _at(zero_point, i),
            _at(offset, i),
            _at(bias, i),
            bits,
            group_size,
        )
        for i in range(len(codes))
    ]

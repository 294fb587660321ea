"""``mkrs::dequant_reduce``: reductions over rows of a quantized weight."""

from typing import Literal

import torch
from torch import Tensor

from ._common import check_components, leading, reference_dequantize

Reduction = Literal["sum", "sum_squares", "amax", "amin", "abs_max"]
REDUCTIONS: tuple[str, ...] = ("sum", "sum_squares", "amax", "amin", "abs_max")


def dequant_reduce(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    reduction: Reduction,
) -> Tensor:
    """Reduce every row of a quantized weight without making it dense.

    Args:
        codes: uint8 ``[..., N, ceil(K*bits/8)]``.
        scale: float16, bfloat16 or float32 ``[..., N, ceil(K/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        in_features: K.
        reduction: ``"sum"``, ``"sum_squares"``, ``"amax"``, ``"amin"`` or ``"abs_max"``.

    Returns:
        float32 ``[..., N]``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: components that do not fit, an unknown reduction, or an extreme of empty rows.
    """
    _check(codes, scale, zero_point, offset, bits, group_size, in_features, reduction)
    result: Tensor = torch.ops.mkrs.dequant_reduce(
        codes, scale, zero_point, offset, bits, group_size, in_features, reduction
    )
    return result


def _check(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features)
    if in_features == 0 and not reduction.startswith("sum"):
        raise ValueError(f"{reduction} needs in_features of at least 1, got 0")


@torch.library.register_fake("mkrs::dequant_reduce")
def _fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    reduction: str,
) -> Tensor:
    _check(codes, scale, zero_point, offset, bits, group_size, in_features, reduction)
    return codes.new_empty(leading(codes.shape), dtype=torch.float32)


def reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    reduction: str,
) -> Tensor:
    """The op in plain torch, in float64, rounded once to float32."""
    dense = reference_dequantize(
        codes, scale, zero_point, offset, bits, group_size, in_features
    ).double()
    result = {
        "sum": lambda: dense.sum(-1),
        "sum_squares": lambda: dense.square().sum(-1),
        "amax": lambda: dense.amax(-1),
        "amin": lambda: dense.amin(-1),
        "abs_max": lambda: dense.abs().amax(-1),
    }[reduction]()
    return result.float()

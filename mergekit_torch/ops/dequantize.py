"""``mkrs::dequantize``: the dense weight of quantized components."""

import torch
from torch import Tensor

from ._common import check_components, leading, reference_dequantize, require_float


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantize to a dense tensor.

    The result is defined to the bit: ``scale * (q - zero)`` is one float32 product,
    ``scale * q + offset`` a float32 product and a float32 sum, each rounded; then one rounding to
    ``dtype``.

    Args:
        codes: uint8 ``[..., N, ceil(in_features*bits/8)]``.
        scale: float16, bfloat16 or float32 ``[..., N, ceil(in_features/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        in_features: K, the logical row length.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[..., N, in_features]`` of ``dtype``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: components that do not make one weight.
    """
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features)
    require_float("dtype", dtype)
    result: Tensor = torch.ops.mkrs.dequantize(
        codes, scale, zero_point, offset, bits, group_size, in_features, dtype
    )
    return result


@torch.library.register_fake("mkrs::dequantize")
def _fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features)
    require_float("dtype", dtype)
    return codes.new_empty((*leading(codes.shape), in_features), dtype=dtype)


def reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op's definition in plain torch; kernels agree with it bit for bit."""
    dense = reference_dequantize(codes, scale, zero_point, offset, bits, group_size, in_features)
    return dense.to(dtype)

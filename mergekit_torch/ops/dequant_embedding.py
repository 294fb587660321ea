"""``mkrs::dequant_embedding``: gather rows of a quantized table and dequantize them."""

import torch
from torch import Tensor

from ._common import (
    check_components,
    raise_value_errors,
    reference_dequantize,
    require_float,
    require_tensor,
)


def dequant_embedding(
    indices: Tensor,
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
    """Look up rows of a quantized embedding ``[N, K]``; only those rows are read.

    Args:
        indices: int64 or int32 of any shape, each in ``[0, N)``.
        codes: uint8 ``[N, ceil(K*bits/8)]``.
        scale: float16, bfloat16 or float32 ``[N, ceil(K/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bits: 8, 4 or 2.
        group_size: elements per scale.
        in_features: K.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[*indices.shape, K]`` of ``dtype``, bit-equal to rows of :func:`dequantize`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: components that do not fit, or on CPU an index that is out of range.
    """
    _check(indices, codes, scale, zero_point, offset, bits, group_size, in_features, dtype)
    try:
        result: Tensor = torch.ops.mkrs.dequant_embedding(
            indices, codes, scale, zero_point, offset, bits, group_size, in_features, dtype
        )
    except RuntimeError as error:
        raise_value_errors("dequant_embedding", error)
        raise
    return result


def _check(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> None:
    require_tensor("indices", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    require_float("dtype", dtype)
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features, ndim=2)
    if indices.device != codes.device:
        raise ValueError(f"indices must be on {codes.device} like codes, got {indices.device}")


@torch.library.register_fake("mkrs::dequant_embedding")
def _fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, codes, scale, zero_point, offset, bits, group_size, in_features, dtype)
    return codes.new_empty((*indices.shape, in_features), dtype=dtype)


def reference(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain torch; kernels agree with it bit for bit."""
    table = reference_dequantize(codes, scale, zero_point, offset, bits, group_size, in_features)
    return table[indices.long()].to(dtype)

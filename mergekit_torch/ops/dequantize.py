"""``mkrs::dequantize`` and ``dequantize_into``: the dense weight of quantized components."""

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
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
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
        dtype: float32, float16 or bfloat16; by default that of ``out``, or float32.
        out: a contiguous tensor of the result's shape on the device of ``codes``, to write to; it
            must share no memory with the components. Large results are made about twice as fast in
            memory that has been used before, because fresh pages are cleared first.

    Returns:
        ``[..., N, in_features]`` of ``dtype``; ``out`` if it was given.

    Raises:
        TypeError: a wrong dtype, or another than that of ``out``.
        ValueError: components that do not make one weight, or an ``out`` that does not fit it or
            requires gradients.
    """
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features)
    if out is None:
        dtype = torch.float32 if dtype is None else dtype
        require_float("dtype", dtype)
        result: Tensor = torch.ops.mkrs.dequantize(
            codes, scale, zero_point, offset, bits, group_size, in_features, dtype
        )
        return result
    if dtype not in (None, out.dtype):
        raise TypeError(f"out must have the dtype {dtype} that is asked for, got {out.dtype}")
    _check_out(codes, in_features, out)
    torch.ops.mkrs.dequantize_into(
        codes, scale, zero_point, offset, bits, group_size, in_features, out
    )
    return out


def _check_out(codes: Tensor, in_features: int, out: Tensor) -> None:
    require_float("out", out.dtype)
    shape = (*leading(codes.shape), in_features)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {list(shape)}, got {list(out.shape)}")
    if out.device != codes.device:
        raise ValueError(f"out must be on the device of codes, {codes.device}, got {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    if out.requires_grad:
        raise ValueError("out must not require gradients: quantized weights have none")


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


@torch.library.register_fake("mkrs::dequantize_into")
def _fake_into(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out: Tensor,
) -> None:
    check_components(codes, scale, zero_point, offset, bits, group_size, in_features)
    _check_out(codes, in_features, out)


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

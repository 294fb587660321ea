"""Checks and pure-torch pieces that the ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..format import (
    FLOAT_DTYPES,
    Scheme,
    check_bits,
    check_group_size,
    code_bytes,
    num_groups,
)


def require_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def require_float(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``dtype`` is one that kernels compute in."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def scheme_of(zero_point: Tensor | None, offset: Tensor | None) -> Scheme:
    """The scheme that the given components stand for."""
    if zero_point is not None and offset is not None:
        raise ValueError("zero_point and offset must not both be given, got both")
    if zero_point is not None:
        return "asymmetric"
    return "symmetric" if offset is None else "affine"


def check_components(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    ndim: int | None = None,
) -> None:
    """Check that components make one weight ``[..., N, in_features]``.

    Raises:
        TypeError: something that is not a tensor, or a wrong dtype.
        ValueError: a wrong shape, device, bit width or group size; the message says what was
            required and what was got.
    """
    require_tensor("codes", codes)
    require_tensor("scale", scale)
    check_bits(bits)
    if in_features < 0:
        raise ValueError(f"in_features must not be negative, got {in_features}")
    check_group_size(group_size, in_features)
    scheme_of(zero_point, offset)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    require_float("scale", scale.dtype)
    if codes.dim() < 2:
        raise ValueError(
            f"codes must have at least 2 dimensions [..., N, bytes], got shape {list(codes.shape)}"
        )
    if ndim is not None and codes.dim() != ndim:
        raise ValueError(f"codes must have {ndim} dimensions, got shape {list(codes.shape)}")
    row_bytes = code_bytes(in_features, bits)
    if codes.shape[-1] != row_bytes:
        raise ValueError(
            f"codes must have {row_bytes} bytes a row for in_features {in_features} at "
            f"{bits} bits, got shape {list(codes.shape)}"
        )
    expected = (*codes.shape[:-1], num_groups(in_features, group_size))
    parts = [("scale", scale)]
    if zero_point is not None:
        require_tensor("zero_point", zero_point)
        if zero_point.dtype != torch.uint8:
            raise TypeError(f"zero_point must be uint8, got {zero_point.dtype}")
        parts.append(("zero_point", zero_point))
    if offset is not None:
        require_tensor("offset", offset)
        if offset.dtype != scale.dtype:
            raise TypeError(f"offset must have scale's dtype {scale.dtype}, got {offset.dtype}")
        parts.append(("offset", offset))
    for name, part in parts:
        if tuple(part.shape) != expected:
            raise ValueError(
                f"{name} must have shape {list(expected)} for codes {list(codes.shape)} and "
                f"group_size {group_size}, got {list(part.shape)}"
            )
        if part.device != codes.device:
            raise ValueError(f"{name} must be on {codes.device} like codes, got {part.device}")


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Pack ``uint8 [..., K]`` codes below ``2**bits`` to ``[..., ceil(K*bits/8)]`` bytes."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(q, (0, -q.shape[-1] % per_byte))
    fields = padded.reshape(*q.shape[:-1], -1, per_byte)
    packed = fields[..., 0].clone()
    for i in range(1, per_byte):
        packed |= fields[..., i] << (i * bits)
    return packed


def unpack_codes(codes: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack ``uint8 [..., bytes]`` to codes ``uint8 [..., in_features]``."""
    mask = (1 << bits) - 1
    fields = [(codes >> (i * bits)) & mask for i in range(8 // bits)]
    return torch.stack(fields, dim=-1).flatten(-2)[..., :in_features]


def expand_groups(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeat ``[..., G]`` per-group values to ``[..., in_features]``."""
    index = torch.arange(in_features, device=values.device) // group_size
    return values[..., index]


def reference_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """The format's definition in plain torch: float32 ``[..., N, in_features]``."""
    q = unpack_codes(codes, bits, in_features).to(torch.int32)
    s = expand_groups(scale.float(), group_size, in_features)
    if offset is not None:
        # Two roundings, as the format says.
        return s * q.float() + expand_groups(offset.float(), group_size, in_features)
    if zero_point is not None:
        return s * (q - expand_groups(zero_point.to(torch.int32), group_size, in_features)).float()
    return s * (q - (1 << (bits - 1))).float()


def raise_value_errors(op: str, error: RuntimeError) -> None:
    """Turn a kernel's refusal of a value into ValueError; anything else goes on as it is."""
    message = str(error)
    if message.startswith(f"mkrs::{op}: "):
        raise ValueError(message) from error
    raise error


def leading(shape: Sequence[int]) -> tuple[int, ...]:
    """All sizes but the last."""
    return tuple(shape[:-1])

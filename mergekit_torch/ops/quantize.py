"""``mkrs::quantize``: round a weight to nearest in groups."""

import torch
from torch import Tensor

from ..format import PER_ROW, Scheme, check_bits, check_group_size, check_scheme, code_bytes
from ..format import num_groups as _num_groups
from ._common import leading, pack_codes, raise_value_errors, require_float, require_tensor

_FLT_MIN = torch.finfo(torch.float32).tiny


def default_scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for bfloat16 weights (their range would overflow float16), else float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def quantize(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 64,
    scheme: Scheme = "affine",
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``weight`` by rounding to nearest within groups of a row.

    Per group, with ``b = bits`` and all arithmetic in float32:

    * ``symmetric``: ``scale = v / -2**(b-1)`` for the value ``v`` of largest magnitude, so that
      ``v`` itself is exact (scales may be negative); codes beyond the other end are clamped.
    * ``asymmetric``: the range is widened to hold 0; ``scale = (max - min) / (2**b - 1)`` and
      ``zero_point = round(-min / scale)``.
    * ``affine``: ``offset = min``, ``scale = (max - offset) / (2**b - 1)``.

    Scale and offset are rounded to ``scale_dtype`` first and codes are chosen against the rounded
    values, so that a rounding step errs by at most ``|scale| / 2``. A constant group is stored
    exactly, up to its value's rounding to ``scale_dtype``.

    Args:
        weight: float32, float16 or bfloat16, ``[..., N, K]``.
        bits: 8, 4 or 2.
        group_size: 16, 32, 64, 128, 256, at least K, or -1 for one group per row.
        scheme: how codes become weights; see :mod:`mergekit_torch.format`.
        scale_dtype: dtype of scale and offset; by default bfloat16 for a bfloat16 weight and
            float16 otherwise.

    Returns:
        ``codes`` uint8 ``[..., N, ceil(K*bits/8)]``, ``scale`` ``[..., N, ceil(K/group_size)]``,
        and the zero_point (uint8) or offset (``scale_dtype``) of scale's shape; for
        ``symmetric`` an empty uint8 tensor.

    Raises:
        TypeError: not a floating tensor of a supported dtype.
        ValueError: a format that is not offered, a weight with inf or NaN, or a scale that
            overflows ``scale_dtype``.
    """
    require_tensor("weight", weight)
    require_float("weight", weight.dtype)
    if scale_dtype is not None:
        require_float("scale_dtype", scale_dtype)
    check_bits(bits)
    check_scheme(scheme)
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have at least 2 dimensions [..., N, K], got shape {list(weight.shape)}"
        )
    if group_size == PER_ROW:
        group_size = max(1, weight.shape[-1])
    check_group_size(group_size, weight.shape[-1])
    try:
        codes, scale, zero = torch.ops.mkrs.quantize(
            weight.detach(), bits, group_size, scheme, scale_dtype
        )
    except RuntimeError as error:
        raise_value_errors("quantize", error)
        raise
    if weight.device.type not in ("cpu", "meta") and not bool(torch.isfinite(scale).all()):
        # Device kernels cannot raise; they mark what they refuse with a NaN scale.
        raise ValueError(
            "mkrs::quantize: weight must be finite and its scales must fit scale_dtype "
            f"({scale.dtype}), got a group that is or does not; use scale_dtype=torch.float32 "
            "if the weight is finite"
        )
    return codes, scale, zero


@torch.library.register_fake("mkrs::quantize")
def _fake(
    weight: Tensor, bits: int, group_size: int, scheme: str, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_bits(bits)
    check_scheme(scheme)
    require_float("weight", weight.dtype)
    check_group_size(group_size, weight.shape[-1])
    dtype = scale_dtype or default_scale_dtype(weight.dtype)
    groups = (*leading(weight.shape), _num_groups(weight.shape[-1], group_size))
    codes = weight.new_empty(
        (*leading(weight.shape), code_bytes(weight.shape[-1], bits)), dtype=torch.uint8
    )
    scale = weight.new_empty(groups, dtype=dtype)
    if scheme == "symmetric":
        zero = weight.new_empty((0,), dtype=torch.uint8)
    else:
        zero = weight.new_empty(groups, dtype=torch.uint8 if scheme == "asymmetric" else dtype)
    return codes, scale, zero


def reference(
    weight: Tensor, bits: int, group_size: int, scheme: str, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's definition in plain torch, one float32 operation per step.

    Kernels agree with it bit for bit.
    """
    dtype = scale_dtype or default_scale_dtype(weight.dtype)
    k = weight.shape[-1]
    groups = _num_groups(k, group_size)
    group_size = max(1, min(group_size, k))
    w = weight.float()
    # A short last group is filled up with its own last value, which changes no minimum or maximum.
    fill = groups * group_size - k
    if fill:
        w = torch.cat([w, w[..., -1:].expand(*leading(w.shape), fill)], dim=-1)
    w = w.reshape(*leading(w.shape), groups, group_size)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("mkrs::quantize: weight must be finite, got inf or NaN")
    codes_shape = (*leading(weight.shape), code_bytes(k, bits))
    if w.numel() == 0:
        scale = weight.new_zeros((*leading(weight.shape), groups), dtype=dtype)
        zero = {"symmetric": scale.new_zeros(0, dtype=torch.uint8), "affine": scale.clone()}.get(
            scheme, scale.to(torch.uint8)
        )
        return weight.new_zeros(codes_shape, dtype=torch.uint8), scale, zero
    low, high = w.amin(-1), w.amax(-1)
    constant = low == high
    levels = float((1 << bits) - 1)
    half = float(1 << (bits - 1))
    step = torch.tensor(1.0, dtype=torch.float32) / levels
    step = step.to(w.device)
    shift = torch.zeros_like(low)
    center = torch.full_like(low, half if scheme == "symmetric" else 0.0)

    def rounded(values: Tensor) -> Tensor:
        return values.to(dtype).float()

    if scheme == "symmetric":
        extreme = torch.where(-low >= high, low, high)
        scale = rounded(-extreme / half)
    elif scheme == "asymmetric":
        wide = rounded(high.clamp(min=0) * step - low.clamp(max=0) * step)
        scale = torch.where(constant, rounded(low), wide)
    else:
        shift = rounded(low)
        scale = torch.where(constant, torch.zeros_like(low), rounded(high * step - shift * step))
    if not bool(torch.isfinite(scale).all() & torch.isfinite(shift).all()):
        raise ValueError(f"mkrs::quantize: scale and offset must fit scale_dtype ({dtype})")
    scale = torch.where(scale.abs() < _FLT_MIN, torch.zeros_like(scale), scale)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    if scheme == "asymmetric":
        zero_point = (-low.clamp(max=0) * inverse).round().clamp(0.0, levels)
        center = torch.where(constant, center, zero_point)
    q = ((w - shift[..., None]) * inverse[..., None]).round() + center[..., None]
    q = q.clamp(0.0, levels).to(torch.uint8).flatten(-2)[..., :k]
    if scheme == "symmetric":
        zero = scale.new_zeros(0, dtype=torch.uint8)
    elif scheme == "asymmetric":
        zero = center.to(torch.uint8)
    else:
        zero = shift.to(dtype)
    return pack_codes(q, bits), scale.to(dtype), zero

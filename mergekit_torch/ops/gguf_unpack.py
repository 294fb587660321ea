"""Lossless conversion of GGUF weight blocks into native components."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GGUF_LAYOUTS", "GgufLayout", "gguf_unpack", "reference"]


class GgufLayout(NamedTuple):
    """How one GGUF type is laid out, and the native format it maps onto without loss.

    ``block`` weights occupy ``block_bytes`` bytes; the native components have ``bits`` a code, one
    scale (and, when ``scheme`` is ``"affine"``, one offset) of ``scale_dtype`` per ``group_size``.
    """

    name: str
    block: int
    block_bytes: int
    bits: int
    group_size: int
    scheme: str
    scale_dtype: torch.dtype


#: GGUF type number -> layout, for every type that maps onto the native format.
GGUF_LAYOUTS: dict[int, GgufLayout] = {
    2: GgufLayout("Q4_0", 32, 18, 4, 32, "symmetric", torch.float16),
    3: GgufLayout("Q4_1", 32, 20, 4, 32, "affine", torch.float16),
    6: GgufLayout("Q5_0", 32, 22, 8, 32, "symmetric", torch.float16),
    7: GgufLayout("Q5_1", 32, 24, 8, 32, "affine", torch.float16),
    8: GgufLayout("Q8_0", 32, 34, 8, 32, "symmetric", torch.float16),
    10: GgufLayout("Q2_K", 256, 84, 2, 16, "affine", torch.float32),
    11: GgufLayout("Q3_K", 256, 110, 4, 16, "symmetric", torch.float32),
    12: GgufLayout("Q4_K", 256, 144, 4, 32, "affine", torch.float32),
    13: GgufLayout("Q5_K", 256, 176, 8, 32, "affine", torch.float32),
    14: GgufLayout("Q6_K", 256, 210, 8, 16, "symmetric", torch.float32),
}


def _layout(blocks: Any, ggml_type: Any, rows: Any, in_features: Any) -> GgufLayout:
    """Check the arguments, shared by the wrapper, the fake and the reference."""
    op = "mkrs::gguf_unpack"
    if not isinstance(blocks, Tensor):
        raise TypeError(f"{op}: blocks must be a Tensor, got {type(blocks).__name__}")
    if blocks.dtype != torch.uint8:
        raise TypeError(f"{op}: blocks must be uint8, got {blocks.dtype}")
    layout = GGUF_LAYOUTS.get(ggml_type)
    if layout is None:
        known = ", ".join(f"{entry.name} ({number})" for number, entry in GGUF_LAYOUTS.items())
        raise ValueError(f"{op}: ggml_type must be one of {known}, got {ggml_type}")
    if rows < 0:
        raise ValueError(f"{op}: rows must not be negative, got {rows}")
    if in_features < 0 or in_features % layout.block:
        raise ValueError(
            f"{op}: in_features must be a multiple of {layout.block} for {layout.name}, "
            f"got {in_features}"
        )
    row_bytes = in_features // layout.block * layout.block_bytes
    if blocks.dim() != 2 or blocks.shape[0] != rows or blocks.shape[1] != row_bytes:
        raise ValueError(
            f"{op}: blocks must have shape [{rows}, {row_bytes}] for {layout.name} with "
            f"in_features {in_features}, got {list(blocks.shape)}"
        )
    return layout


def gguf_unpack(
    blocks: Tensor, ggml_type: int, rows: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert GGUF weight blocks into native components, exactly.

    Args:
        blocks: uint8 ``[rows, row_bytes]`` on a CPU or CUDA device, the bytes of the tensor as the
            file holds them; rows may be strided, and nothing need be aligned.
        ggml_type: the GGUF type number, a key of :data:`GGUF_LAYOUTS`.
        rows: number of rows N (leading dimensions of the weight, multiplied out).
        in_features: K, a multiple of the type's block.

    Returns:
        ``codes`` uint8 ``[rows, K*bits/8]``, ``scale`` f16 or f32 ``[rows, K/group_size]``, and
        ``zero``: the offset (same dtype and shape as ``scale``) for affine types, an empty uint8
        tensor for symmetric ones. Dequantizing them gives the very float32 values that ggml defines
        for the blocks.

    Raises:
        TypeError: blocks is not a uint8 tensor.
        ValueError: an unknown type, or sizes that do not fit it.
        NotImplementedError: blocks is on another kind of device.

    Layouts: ggml's ``ggml-common.h`` block structs, checked against the ``gguf`` package.
    """
    _layout(blocks, ggml_type, rows, in_features)
    if blocks.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"mkrs::gguf_unpack: blocks must be on a CPU or CUDA device, got {blocks.device}; "
            "unpack on the CPU, then move the components"
        )
    return torch.ops.mkrs.gguf_unpack(blocks, ggml_type, rows, in_features)


@torch.library.register_fake("mkrs::gguf_unpack")
def _fake(
    blocks: Tensor, ggml_type: int, rows: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(blocks, ggml_type, rows, in_features)
    groups = (rows, in_features // layout.group_size)
    codes = blocks.new_empty((rows, in_features * layout.bits // 8), dtype=torch.uint8)
    scale = blocks.new_empty(groups, dtype=layout.scale_dtype)
    if layout.scheme == "affine":
        return codes, scale, blocks.new_empty(groups, dtype=layout.scale_dtype)
    return codes, scale, blocks.new_empty((0,), dtype=torch.uint8)


def _half(data: Tensor, start: int) -> Tensor:
    """The f16 at byte ``start`` of every block, ``[blocks, 1]``."""
    return data[:, start : start + 2].contiguous().view(torch.float16)


def _flags_5bit(data: Tensor, start: int) -> Tensor:
    """Bits 0..31 of the u32 at byte ``start`` of every block, ``[blocks, 32]``."""
    shift = torch.arange(8, dtype=torch.int32)
    return ((data[:, start : start + 4, None].int() >> shift) & 1).flatten(1)


def _nibbles(data: Tensor, start: int, chunk: int, count: int) -> Tensor:
    """``count`` nibbles: per ``chunk`` bytes first all the low ones, then all the high ones."""
    part = data[:, start : start + count // 2].int().unflatten(1, (-1, 1, chunk))
    return ((part >> torch.tensor([0, 4]).view(1, 1, 2, 1)) & 15).flatten(1)


def _crumbs(data: Tensor, start: int) -> Tensor:
    """256 two-bit values: element 128h + 32k + l at bits 2k of byte 32h + l."""
    part = data[:, start : start + 64].int().unflatten(1, (2, 1, 32))
    return ((part >> torch.tensor([0, 2, 4, 6]).view(1, 1, 4, 1)) & 3).flatten(1)


def _scales_k4(data: Tensor) -> tuple[Tensor, Tensor]:
    """f32 scales and offsets ``[blocks, 8]`` of Q4_K and Q5_K."""
    d, dmin = _half(data, 0).float(), _half(data, 2).float()
    first, second, third = (data[:, 4 + 4 * i : 8 + 4 * i].int() for i in range(3))
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minimum = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return d * scale.float(), -(dmin * minimum.float())


def _reference_blocks(name: str, data: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unpacked codes int32 ``[blocks, block]``, scale and offset ``[blocks, groups]``."""
    if name == "Q4_0":
        return _nibbles(data, 2, 16, 32), _half(data, 0), None
    if name == "Q4_1":
        return _nibbles(data, 4, 16, 32), _half(data, 0), _half(data, 2)
    if name == "Q5_0":
        return (_nibbles(data, 6, 16, 32) | (_flags_5bit(data, 2) << 4)) + 112, _half(data, 0), None
    if name == "Q5_1":
        q = _nibbles(data, 8, 16, 32) | (_flags_5bit(data, 4) << 4)
        return q, _half(data, 0), _half(data, 2)
    if name == "Q8_0":
        return data[:, 2:].contiguous().view(torch.int8).int() + 128, _half(data, 0), None
    if name == "Q2_K":
        d, dmin = _half(data, 80).float(), _half(data, 82).float()
        packed = data[:, :16].int()
        return _crumbs(data, 16), d * (packed & 15).float(), -(dmin * (packed >> 4).float())
    if name == "Q3_K":
        bits = (data[:, None, :32].int() >> torch.arange(8, dtype=torch.int32).view(1, 8, 1)) & 1
        s = data[:, 96:108].int()
        low = torch.cat([s[:, :8] & 15, s[:, :8] >> 4], dim=1)
        high = (s[:, None, 8:] >> torch.tensor([0, 2, 4, 6]).view(1, 4, 1)) & 3
        scale = _half(data, 108).float() * ((low | (high.flatten(1) << 4)) - 32).float()
        return _crumbs(data, 32) - 4 * (1 - bits.flatten(1)) + 8, scale, None
    if name == "Q4_K":
        return _nibbles(data, 16, 32, 256), *_scales_k4(data)
    if name == "Q5_K":
        high = (data[:, None, 16:48].int() >> torch.arange(8, dtype=torch.int32).view(1, 8, 1)) & 1
        return _nibbles(data, 48, 32, 256) | (high.flatten(1) << 4), *_scales_k4(data)
    if name == "Q6_K":
        # 64 bytes of low nibbles serve 128 elements; 32 bytes of high crumbs the same 128.
        q = _nibbles(data, 0, 64, 256) | (_crumbs(data, 128) << 4)
        scale = _half(data, 208).float() * data[:, 192:208].contiguous().view(torch.int8).float()
        return q + 96, scale, None
    raise AssertionError(f"no reference for {name}")


def reference(
    blocks: Tensor, ggml_type: int, rows: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch, element by element as the formats are defined; the tests' oracle."""
    layout = _layout(blocks, ggml_type, rows, in_features)
    data = blocks.contiguous().view(-1, layout.block_bytes)
    q, scale, offset = _reference_blocks(layout.name, data)
    per_byte = 8 // layout.bits
    shift = torch.arange(per_byte, dtype=torch.int32) * layout.bits
    codes = (q.reshape(rows, -1, per_byte) << shift).sum(-1).to(torch.uint8)
    codes = codes.view(rows, in_features * layout.bits // 8)
    groups = (rows, in_features // layout.group_size)
    if offset is None:
        return codes, scale.reshape(groups), torch.empty(0, dtype=torch.uint8)
    return codes, scale.reshape(groups), offset.reshape(groups)

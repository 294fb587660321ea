"""What kernels must answer: the ops in NumPy float64, and error bounds derived from arithmetic.

The tests, ``mkrs doctor`` and ``MKRS_VERIFY=1`` judge kernels by this. It is independent of them:
nothing here calls the rest of the package, and codes are unpacked bit by bit as docs/format.md
describes them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Half a unit in the last place, relative: the error of one rounding.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half of the smallest subnormal: the absolute error of a rounding near zero.
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


@dataclass
class Weight:
    """Components of one quantized weight, as ops take them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    bits: int
    group_size: int
    in_features: int

    @property
    def components(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """codes, scale, zero_point and offset, as ops take them."""
        return self.codes, self.scale, self.zero_point, self.offset

    @property
    def format(self) -> tuple[int, int]:
        """bits and group_size."""
        return self.bits, self.group_size

    def to(self, device: torch.device) -> "Weight":
        """The same weight on another device."""
        moved = [None if t is None else t.to(device) for t in self.components]
        return Weight(*moved, self.bits, self.group_size, self.in_features)  # type: ignore[call-arg,arg-type]


def random_weight(
    rows: int | tuple[int, ...],
    in_features: int,
    bits: int,
    group_size: int,
    scheme: str,
    scale_dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> Weight:
    """Random codes, scales of both signs, zero points over the whole range of a code."""
    if group_size == -1:
        group_size = max(1, in_features)
    lead = (rows,) if isinstance(rows, int) else rows
    row_bytes = (in_features * bits + 7) // 8
    codes = torch.randint(0, 256, (*lead, row_bytes), dtype=torch.uint8)
    spare = row_bytes * 8 - in_features * bits
    if row_bytes and spare:
        codes[..., -1] &= 0xFF >> spare  # padding bits are zero
    groups = (*lead, -(-in_features // group_size))
    scale = (torch.randn(groups) * 0.1).to(scale_dtype)
    zero_point = offset = None
    if scheme == "asymmetric":
        zero_point = torch.randint(0, 2**bits, groups, dtype=torch.uint8)
    elif scheme == "affine":
        offset = torch.randn(groups).to(scale_dtype)
    return Weight(codes, scale, zero_point, offset, bits, group_size, in_features).to(
        torch.device(device)
    )


def unpack(codes: Tensor, bits: int, in_features: int) -> np.ndarray:
    """Code i stands at bits [i*bits, (i+1)*bits) of its row's little-endian bit stream."""
    stream = np.unpackbits(codes.cpu().contiguous().numpy(), axis=-1, bitorder="little")
    fields = stream[..., : in_features * bits].reshape(*stream.shape[:-1], in_features, bits)
    return (fields.astype(np.int64) << np.arange(bits)).sum(-1)


def _per_element(values: Tensor, w: Weight) -> np.ndarray:
    expanded = np.repeat(values.cpu().double().numpy(), w.group_size, axis=-1)
    return expanded[..., : w.in_features]


def dequantize64(w: Weight) -> np.ndarray:
    """The logical weight without any rounding."""
    q = unpack(w.codes, w.bits, w.in_features).astype(np.float64)
    scale = _per_element(w.scale, w)
    if w.offset is not None:
        return scale * q + _per_element(w.offset, w)
    zero = 2.0 ** (w.bits - 1) if w.zero_point is None else _per_element(w.zero_point, w)
    return scale * (q - zero)


def dequantize32(w: Weight) -> np.ndarray:
    """The logical weight with the format's float32 roundings, exactly."""
    q = unpack(w.codes, w.bits, w.in_features)
    scale = _per_element(w.scale, w).astype(np.float32)
    if w.offset is not None:
        with np.errstate(invalid="ignore", over="ignore"):  # special scales are tested too
            product = scale * q.astype(np.float32)
        return product + _per_element(w.offset, w).astype(np.float32)
    zero = 2 ** (w.bits - 1) if w.zero_point is None else _per_element(w.zero_point, w)
    return scale * (q - zero).astype(np.float32)


def magnitude64(w: Weight) -> np.ndarray:
    """|scale| * q + |zero term|: the size of what a kernel may add up before terms cancel."""
    q = unpack(w.codes, w.bits, w.in_features).astype(np.float64)
    scale = np.abs(_per_element(w.scale, w))
    if w.offset is not None:
        return scale * q + np.abs(_per_element(w.offset, w))
    zero = 2.0 ** (w.bits - 1) if w.zero_point is None else _per_element(w.zero_point, w)
    return scale * (q + zero)


def group_max64(x: np.ndarray, group_size: int) -> np.ndarray:
    """Each element replaced by its group's largest magnitude."""
    k = x.shape[-1]
    group_size = min(group_size, max(1, k))
    result = np.empty_like(x)
    for start in range(0, k, group_size):
        block = np.abs(x[..., start : start + group_size])
        result[..., start : start + group_size] = block.max(-1, keepdims=True)
    return result


def rounds_weights(device_type: str, dtype: torch.dtype, rows: int) -> bool:
    """Whether a product rounds its weights to ``dtype``, as a dense layer of it does.

    CUDA runs more than a few rows of 16-bit input on tensor cores this way.
    """
    return device_type == "cuda" and dtype != torch.float32 and rows > 8


def rounded_weights(x: np.ndarray, weight: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What that adds: each weight rounded, and partial sums too."""
    return np.abs(x) @ (2 * UNIT[dtype] * np.abs(weight) + TINY[dtype])


def _rounds(rounds: bool | None, x: np.ndarray, w: Weight, dtype: torch.dtype) -> bool:
    if rounds is not None:
        return rounds
    return rounds_weights(w.codes.device.type, dtype, x.size // max(1, x.shape[-1]))


def matmul_bound(
    x: np.ndarray,
    w: Weight,
    result: np.ndarray,
    dtype: torch.dtype,
    *,
    bias: np.ndarray | None = None,
    int8: bool = False,
    rounds: bool | None = None,
) -> np.ndarray:
    """What a product may err by, element by element.

    Args:
        x: the input ``[..., K]``.
        w: the weight.
        result: the exact result ``[..., N]``, bias included.
        dtype: of input and result.
        bias: ``[N]`` if there was one.
        int8: the mode that rounds activations to int8.
        rounds: :func:`rounds_weights`; None asks it about ``x`` and the device of ``w``.

    * Products and sums in float32: a sum of K terms errs by at most about (K + 4) half units of
      the sum of magnitudes (Higham, Accuracy and Stability, section 3.1).
    * Activations may be held as fixed point relative to their group's largest value: float32
      with 24 bits, at most 2**-23 of it each; float16 and bfloat16 with 16 bits, 2**-15.9.
      In int8 mode they are multiples of a 127th of the largest of 16 or 32 neighbours.
    * One rounding of the result to its dtype; a bias is one more float32 sum.
    """
    magnitude = magnitude64(w).T
    k = x.shape[-1]
    sums = (k + 4) * UNIT[torch.float32] * (np.abs(x) @ magnitude)
    step, span = (2.0**-23 if dtype == torch.float32 else 0.5 / 32639), w.group_size
    if int8:
        step, span = 0.5 / 127 + 2.0**-20, (16 if w.group_size == 16 else 32)
    exact = sums + step * (group_max64(x, span) @ magnitude)
    if _rounds(rounds, x, w, dtype):
        exact = exact + rounded_weights(x, dequantize64(w).T, dtype)
    if bias is not None:
        exact = exact + 2 * UNIT[torch.float32] * np.abs(bias)
    return exact + UNIT[dtype] * (np.abs(result) + exact) + TINY[dtype]


def transposed_bound(
    x: np.ndarray,
    w: Weight,
    result: np.ndarray,
    dtype: torch.dtype,
    *,
    rounds: bool | None = None,
) -> np.ndarray:
    """The same for ``x @ W``: sums over N terms; each weight itself is rounded to float32."""
    sums = (x.shape[-1] + 6) * UNIT[torch.float32] * (np.abs(x) @ magnitude64(w))
    if _rounds(rounds, x, w, dtype):
        sums = sums + rounded_weights(x, dequantize64(w), dtype)
    return sums + UNIT[dtype] * (np.abs(result) + sums) + TINY[dtype]


def quantize_bound(weight: np.ndarray, w: Weight) -> np.ndarray:
    """What quantizing ``weight`` to ``w`` may err by, element by element.

    |scale|/2 of rounding, plus what is clamped because the stored range ends before the value: the
    range of codes is [low, high], outside it the error is the distance to its nearer end. The
    arithmetic that chooses a code errs by a few float32 units of the code.
    """
    scale = _per_element(w.scale, w)
    levels = 2.0**w.bits - 1
    if w.offset is not None:
        first = _per_element(w.offset, w)
    else:
        zero = 2.0 ** (w.bits - 1) if w.zero_point is None else _per_element(w.zero_point, w)
        first = -scale * zero
    last = first + scale * levels
    low, high = np.minimum(first, last), np.maximum(first, last)
    clamped: np.ndarray = np.maximum(low - weight, 0) + np.maximum(weight - high, 0)
    arithmetic = 8 * UNIT[torch.float32] * (np.abs(weight) + np.abs(first) + np.abs(last))
    return np.abs(scale) / 2 + clamped + arithmetic


def assert_within(actual: Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    """Every element within its bound, or the worst one is named."""
    got = actual.detach().cpu().double().numpy()
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    if got.size == 0:
        return
    excess = np.abs(got - expected) - bound
    worst = np.unravel_index(np.nanargmax(excess), excess.shape)
    assert not np.isnan(got).any(), "NaN in the result"
    assert excess[worst] <= 0, (
        f"at {worst}: got {got[worst]!r}, expected {expected[worst]!r}, "
        f"error {abs(got[worst] - expected[worst]):.3e} exceeds {bound[worst]:.3e}"
    )

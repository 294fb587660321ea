"""The storage format's facts: bit widths, group sizes, schemes and the sizes that follow.

``csrc/format.h`` is the definition for kernels, ``docs/format.md`` the description for readers;
this module is the same for Python.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

FORMAT_VERSION = 1
"""The version written into files; a reader refuses a higher one."""

Scheme = Literal["symmetric", "asymmetric", "affine"]

BITS: tuple[int, ...] = (8, 4, 2)
GROUP_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
SCHEMES: tuple[str, ...] = get_args(Scheme)
PER_ROW = -1
"""``group_size`` in configurations that means one group for a whole row."""

SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = SCALE_DTYPES
"""Dtypes of weights, activations and outputs."""


def code_bytes(in_features: int, bits: int) -> int:
    """Bytes of codes in one row."""
    return (in_features * bits + 7) // 8


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in one row; the last one may be short."""
    return (in_features + group_size - 1) // group_size


def check_bits(bits: int) -> None:
    """Raise ValueError unless ``bits`` is a width that the format offers."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int, got {type(bits).__name__}")
    if bits not in BITS:
        raise ValueError(f"bits must be 8, 4 or 2, got {bits}")


def check_scheme(scheme: str) -> None:
    """Raise ValueError unless ``scheme`` is one of :data:`SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be 'symmetric', 'asymmetric' or 'affine', got {scheme!r}")


def check_group_size(group_size: int, in_features: int) -> None:
    """Raise ValueError unless rows of ``in_features`` can have groups of ``group_size``."""
    if group_size not in GROUP_SIZES and not (group_size > 0 and group_size >= in_features):
        raise ValueError(
            "group_size must be 16, 32, 64, 128, 256 or at least in_features "
            f"({in_features}), got {group_size}"
        )


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is stored: ``bits`` per code, elements per group, and the scheme.

    Args:
        bits: 8, 4 or 2.
        group_size: 16, 32, 64, 128 or 256 elements of a row that share a scale;
            :data:`PER_ROW` (-1) for one group per row.
        scheme: ``"symmetric"``: ``w = scale * (q - 2**(bits-1))``; ``"asymmetric"``:
            ``w = scale * (q - zero_point)``; ``"affine"``: ``w = scale * q + offset``.

    Raises:
        ValueError: a value that the format does not offer.
    """

    bits: int = 4
    group_size: int = 64
    scheme: Scheme = "affine"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_scheme(self.scheme)
        if self.group_size != PER_ROW and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be 16, 32, 64, 128, 256 or -1 (per row), got {self.group_size}"
            )

    def resolve_group_size(self, in_features: int) -> int:
        """The ``group_size`` that ops take for rows of ``in_features`` elements."""
        return max(1, in_features) if self.group_size == PER_ROW else self.group_size

    def bits_per_weight(self, in_features: int, scale_dtype: torch.dtype) -> float:
        """Stored bits per weight of a row of ``in_features``, scales and zeros included."""
        groups = num_groups(in_features, self.resolve_group_size(in_features))
        scale_bytes = scale_dtype.itemsize
        zero_bytes = {"symmetric": 0, "asymmetric": 1, "affine": scale_bytes}[self.scheme]
        total = code_bytes(in_features, self.bits) + groups * (scale_bytes + zero_bytes)
        return 8 * total / max(1, in_features)

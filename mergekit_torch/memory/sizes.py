"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

__all__ = ["format_size", "parse_size"]

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 10**3), ("IB", 2**10))
}


def parse_size(size: int | str) -> int:
    """Bytes of ``512``, ``"500MB"`` (powers of ten), ``"512MiB"`` or ``"512M"`` (powers of two).

    Raises:
        ValueError: not a size of at least one byte.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        value: float = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
        if match is None or (match[2] or "B") not in _UNITS:
            raise ValueError(f"a size must be bytes or like '512MiB' or '5GB', got {size!r}")
        value = float(match[1]) * _UNITS[match[2] or "B"]
    if value < 1:
        raise ValueError(f"a size must be at least one byte, got {size!r}")
    return int(value)


def format_size(nbytes: float) -> str:
    """``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"

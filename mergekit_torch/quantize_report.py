"""What :func:`mergekit_torch.quantize_` says it did: a table for terminals and for notebooks."""

import html
import math
from dataclasses import dataclass

import torch

from .text import printable, size_text, table

HEADERS = ("layer", "shape", "format", "before", "after")


@dataclass(frozen=True)
class LayerReport:
    """One weight that was quantized. Bytes count shared memory once; bias is not counted."""

    names: tuple[str, ...]
    """Modules that hold it: one, or several that are tied."""
    shape: tuple[int, ...]
    bits: int
    group_size: int
    scheme: str
    scale_dtype: torch.dtype
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class KeptReport:
    """One floating parameter with at least two dimensions that stays as it is."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class QuantizeReport:
    """What :func:`quantize_` did; its ``repr`` is a table, in notebooks too."""

    layers: tuple[LayerReport, ...]
    kept: tuple[KeptReport, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantized weights as they were, and of those that were kept."""
        return sum(x.bytes_before for x in self.layers) + self.dense_bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of the same weights now."""
        return sum(x.bytes_after for x in self.layers) + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element of the quantized weights."""
        elements = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * sum(layer.bytes_after for layer in self.layers) / max(1, elements)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights that stay dense (of two dimensions and more)."""
        return sum(x.bytes for x in self.kept)

    @property
    def dense_fraction(self) -> float:
        """Share of the elements of all weights, 0 to 1, that stay dense."""
        dense = sum(math.prod(x.shape) for x in self.kept)
        quantized = sum(math.prod(x.shape) for x in self.layers)
        return dense / max(1, dense + quantized)

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        rows = [
            (
                " = ".join(x.names),
                "x".join(map(str, x.shape)),
                f"{x.bits}-bit {x.scheme} g{x.group_size}",
                size_text(x.bytes_before),
                size_text(x.bytes_after),
            )
            for x in self.layers
        ]
        rows += [
            (
                y.name,
                "x".join(map(str, y.shape)),
                f"kept: {y.reason}",
                size_text(y.bytes),
                size_text(y.bytes),
            )
            for y in self.kept
        ]
        return rows

    def _summary(self) -> str:
        text = (
            f"{len(self.layers)} weights quantized, {self.bits_per_weight:.2f} bits per weight; "
            f"{size_text(self.bytes_before)} -> {size_text(self.bytes_after)}"
        )
        if self.kept:
            text += (
                f"\n{len(self.kept)} weights stay dense: {100 * self.dense_fraction:.1f} % of the "
                f"elements, {size_text(self.dense_bytes)} of the {size_text(self.bytes_after)}"
            )
        return text

    def __repr__(self) -> str:
        return f"{table(HEADERS, self._rows(), right=(3, 4))}\n{self._summary()}"

    def _repr_html_(self) -> str:
        """The table for a notebook; names are escaped."""

        def line(tag: str, cells: tuple[str, ...]) -> str:
            # Shown in full: a notebook wraps.
            safe = (html.escape(printable(cell)) for cell in cells)
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in safe) + "</tr>"

        rows = "".join(line("td", row) for row in self._rows())
        summary = html.escape(self._summary()).replace("\n", "<br>")
        return (
            f"<table><thead>{line('th', HEADERS)}</thead><tbody>{rows}</tbody></table>"
            f"<p>{summary}</p>"
        )

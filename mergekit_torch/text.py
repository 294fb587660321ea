"""Text for people: sizes, names from files that somebody else wrote, tables. Needs no torch."""

from collections.abc import Sequence

WIDTH = 100
"""Tables and help fit this many columns."""

_NARROWEST = 12  # a column is not cut below this


def size_text(nbytes: float) -> str:
    """Bytes for people: ``"1.46 GiB"``, ``"92.1 MiB"``, ``"17 B"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:.{2 if value < 10 else 1}f} {unit}"
    return f"{int(nbytes)} B"


def printable(text: str) -> str:
    """``text`` in one line that a terminal shows and does not obey.

    Control characters, line breaks, invisible and unpaired characters become escapes (``\\x1b``),
    so that a name from a file can neither move the cursor nor forge a line.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """``text``, its middle replaced by ``...`` if it is longer than ``width``."""
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their contents; where that is beyond 100, the widest are cut.

    Args:
        headers: one for each column.
        rows: cells; :func:`printable` is applied to each.
        right: indices of columns of numbers, which are aligned right and never cut.
    """
    cells = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    fit(widths, [i for i in range(len(headers)) if i not in right])

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if i in right else shorten(cell, width).ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def fit(widths: list[int], cut: Sequence[int]) -> None:
    """Narrow the widest of the columns ``cut`` until all of ``widths`` fit a line, if they can."""
    while (excess := sum(widths) + 2 * (len(widths) - 1) - WIDTH) > 0 and cut:
        by_width = sorted(cut, key=lambda i: widths[i], reverse=True)
        widest = by_width[0]
        floor = max(_NARROWEST, widths[by_width[1]] - 1 if len(cut) > 1 else 0)
        if widths[widest] <= _NARROWEST:
            return
        widths[widest] = max(widths[widest] - excess, floor)

"""Counts what kernels move and compute: the tables of docs/metal.md.

``python -m metal_sim.traffic`` (from tests/) prints them; ``--write`` puts them into docs/metal.md
between the markers. Device memory is what misses a modelled cache of 512 KiB (engine.cpp), the
floor is every byte of codes, scales, zero terms, activations, bias and output once. ALU operations
are counted in LLVM's IR of the kernel after optimization, for one turn of its inner loop.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from . import simulator
from .compiler import COMMON, INCLUDE, ROOT, machine_flags, preprocess, run, zig
from .lint import IR_OUT, flatten, instantiate
from .prepass import to_cpp

BEGIN, END = "<!-- traffic: begin -->", "<!-- traffic: end -->"
ROWS, COLUMNS, GROUP = 256, 4096, 64


@dataclass
class Traffic:
    """Bytes of one call, all its kernels together."""

    rows: int
    bits: int
    kernel: str
    floor: int
    fetched: int
    written: int
    codes: float  # how often each byte of codes was asked for
    once: bool  # was every byte of codes read at least once

    @property
    def ratio(self) -> float:
        return (self.fetched + self.written) / self.floor


def measure(rows: int, bits: int, scheme: str = "affine", op: str = "matmul") -> Traffic:
    """One call on a ROWS x COLUMNS weight with float16 scales and activations."""
    from mergekit_torch import ops

    codes = torch.randint(0, 256, (ROWS, COLUMNS * bits // 8), dtype=torch.uint8).to("mps")
    scale = torch.randn(ROWS, COLUMNS // GROUP).half().to("mps")
    offset = torch.randn(ROWS, COLUMNS // GROUP).half().to("mps") if scheme == "affine" else None
    width = COLUMNS if op == "matmul" else ROWS
    x = torch.randn(rows, width).half().to("mps")
    with simulator.counting() as report:
        if op == "matmul":
            bias = torch.randn(ROWS).half().to("mps")
            out = ops.dequant_matmul(
                x, codes, scale, None, offset, bias, bits=bits, group_size=GROUP
            )
        else:
            bias = None
            out = ops.dequant_matmul_t(
                x, codes, scale, None, offset, bits=bits, group_size=GROUP, in_features=COLUMNS
            )
    tensors = [t for t in (codes, scale, offset, x, bias, out) if t is not None]
    floor = sum(t.numel() * t.element_size() for t in tensors)
    buffers = [b for d in report["dispatches"] for b in d["buffers"]]
    of_codes = next(b for b in report["dispatches"][0]["buffers"] if b["index"] == 0)
    return Traffic(
        rows,
        bits,
        report["dispatches"][0]["kernel"],
        floor,
        sum(b["fetched"] for b in buffers),
        sum(b["written"] for b in buffers),
        of_codes["read"] / codes.numel(),
        of_codes["read_once"] == codes.numel(),
    )


KINDS = {
    "and": "mask",
    "lshr": "shift",
    "shl": "shift",
    "ashr": "shift",
    "uitofp": "convert",
    "sitofp": "convert",
    "fmul": "multiply",
    "fadd": "add",
    "fsub": "add",
    "llvm.fma": "fma",
}


def alu(bits: int) -> dict[str, float]:
    """Operations a weight in the unguarded part of the decode kernel's loop, by kind.

    The 4 rows of a lane's block are straight-line code after unrolling: in the optimized IR it is
    the basic block with the most fused multiply-adds.
    """
    name = f"dequant_matmul_decode<float, half, {bits}, AFFINE, true>"
    source = instantiate(flatten(ROOT / "mps_kernels" / "dequant_matmul.metal"), [name])
    cpp = to_cpp(preprocess(source))
    flags = [f for f in COMMON if f != "-g1"]
    ir = run(
        [str(zig()), "clang", *flags, *machine_flags(), f"-I{INCLUDE}", *IR_OUT],
        cpp,
    )
    totals: dict[str, float] = {}
    weights = 0
    for block in re.split(r"\n(?=\w[\w.]*:)|\n\}", ir):
        found: dict[str, float] = {}
        for line in block.splitlines():
            match = re.search(r"= (?:tail )?(?:call [^@]*@)?(llvm\.fma|\w+)", line)
            if match and match.group(1) in KINDS:
                kind = KINDS[match.group(1)]
                found[kind] = found.get(kind, 0) + 1
        # A row's 16 codes, masked, converted and multiplied. (The optimizer may move one of the 16
        # masks and conversions to the neighbouring block, which also decides about tails.)
        if found.get("convert", 0) >= 12 and found.get("fma", 0) >= 12:
            for kind, count in found.items():
                totals[kind] = totals.get(kind, 0) + count
            weights += 16
    if not weights:
        raise RuntimeError("no unrolled block of 16 codes in the optimized kernel")
    return {kind: count / weights for kind, count in sorted(totals.items())}


def tables() -> str:
    """The Markdown between the markers."""
    torch.manual_seed(0)
    lines = [
        f"`dequant_matmul`, {ROWS} x {COLUMNS}, group {GROUP}, affine, float16 scales and"
        " activations, with bias; bytes of one call.",
        "",
        "| M | bits | kernel | floor | read and written | of the floor | each code read |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(1, 8), (1, 4), (1, 2), (2, 4), (4, 4), (8, 4), (16, 4), (32, 4), (64, 4), (128, 4)]
    for rows, bits in cases:
        t = measure(rows, bits)
        kernel = t.kernel.split("_half")[0].replace("dequant_matmul_", "")
        lines.append(
            f"| {rows} | {bits} | {kernel} | {t.floor} | {t.fetched + t.written} | {t.ratio:.3f} | "
            f"{t.codes:.2f} times |"
        )
    lines += [
        "",
        "ALU operations a weight in the decode kernel's loop over 16 codes of a row (affine);"
        " preparing the 16 activations costs 16 additions and 16 multiplications more for 4 rows:",
        "",
    ]
    counts = {bits: alu(bits) for bits in (8, 4, 2)}
    kinds = sorted({kind for c in counts.values() for kind in c})
    lines += ["| bits | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for bits, c in counts.items():
        lines.append(f"| {bits} | " + " | ".join(f"{c.get(kind, 0):.2f}" for kind in kinds) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    simulator.load()
    text = tables()
    print(text)
    if "--write" in sys.argv:
        document = Path(ROOT / "docs" / "metal.md")
        before, rest = document.read_text().split(BEGIN)
        document.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])

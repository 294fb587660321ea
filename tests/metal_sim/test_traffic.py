"""What the kernels read and write, counted: the promises that docs/metal.md makes."""

from __future__ import annotations

import math

import pytest

from . import simulator
from .compiler import CompileError, zig
from .traffic import alu, measure

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def simulated() -> None:
    simulator.load()


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_decode_moves_what_it_must(bits: int, scheme: str) -> None:
    t = measure(1, bits, scheme)
    assert "decode" in t.kernel
    assert t.ratio <= 1.05
    assert t.codes == 1.0
    assert t.once


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_small_batches_read_codes_once(rows: int) -> None:
    t = measure(rows, 4)
    assert "small" in t.kernel
    assert t.codes == 1.0
    assert t.once
    assert t.ratio <= 1.05


@pytest.mark.parametrize("rows", [9, 24, 33, 64, 65, 130])
def test_prefill_reads_codes_once_for_64_rows(rows: int) -> None:
    t = measure(rows, 4)
    assert "tile" in t.kernel
    assert t.codes == math.ceil(rows / 64)
    assert t.once


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_transposed_reads_codes_once(rows: int) -> None:
    assert measure(rows, 4, op="matmul_t").codes == 1.0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_decode_masks_and_never_shifts(bits: int) -> None:
    counts = alu(bits)
    assert counts.get("shift", 0) == 0
    assert counts["mask"] <= 1
    assert counts["convert"] <= 1
    assert counts["fma"] <= 1.25

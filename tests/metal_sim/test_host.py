"""The host code: storage offsets, what a call allocates and waits for, Metal's own errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import random_weight

from mergekit_torch import ops
from mergekit_torch.ops.dequant_reduce import REDUCTIONS

from . import simulator
from .compiler import ROOT, CompileError, zig

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

N, K, GROUP = 5, 96, 64
FORMATS = ((8, "asymmetric"), (4, "affine"), (2, "symmetric"))


@pytest.fixture(autouse=True)
def simulated() -> None:
    simulator.load()
    torch.manual_seed(0)


class Shelf:
    """Tensors in the middle of larger ones, whose other elements must neither matter nor change."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def put(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """``t`` on mps, ``offset`` elements after the start of its storage."""
        if t is None:
            return None
        sentinel = float("nan") if t.is_floating_point() else 0x5A
        before = torch.full((self.offset + t.numel() + 9,), sentinel, dtype=t.dtype)
        end = self.offset + t.numel()
        before[self.offset : end] = t.flatten()
        after = before.to("mps")
        self.buffers.append((before, after))
        return after[self.offset : end].view(t.shape)

    def check(self) -> None:
        for before, after in self.buffers:
            assert torch.equal(after.cpu().view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(("bits", "scheme"), FORMATS)
def test_every_storage_offset(bits: int, scheme: str) -> None:
    """All arguments at offsets 0 to 16: the same bits, and nothing around them changes.

    The engine knows only the views, so that it refuses any access beside them.
    """
    w = random_weight(N, K, bits, GROUP, scheme)
    weight, bias = torch.randn(N, K), torch.randn(N).half()
    indices = torch.tensor([4, 0, 2])
    inputs = {m: (torch.randn(m, K).half(), torch.randn(m, N).half()) for m in (1, 3, 20)}
    kind = {"bits": bits, "group_size": GROUP}
    expected: list[torch.Tensor] = []
    for offset in range(17):
        shelf = Shelf(offset)
        parts = [shelf.put(t) for t in w.components]
        b = shelf.put(bias)
        got = list(ops.quantize(shelf.put(weight), bits, GROUP, scheme))
        got.append(ops.dequantize(*parts, **kind, in_features=K))
        got.append(ops.dequant_embedding(shelf.put(indices), *parts, **kind, in_features=K))
        got += [ops.dequant_reduce(*parts, **kind, in_features=K, reduction=r) for r in REDUCTIONS]
        for x, y in inputs.values():
            got.append(ops.dequant_matmul(shelf.put(x), *parts, b, **kind))
            got.append(ops.dequant_matmul_t(shelf.put(y), *parts, **kind, in_features=K))
        shelf.check()
        expected = expected or [t.cpu() for t in got]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True)), offset


# ---- what a call costs beside its kernel -------------------------------------------------------


def activity(call) -> tuple[int, int]:
    """How many tensors a call allocates, and how often it waits, copies to the CPU or commits."""
    with simulator.counting() as report:
        call()
    return report["allocations"], report["waits"]


@pytest.mark.parametrize(
    ("rows", "parts", "allocations"), [(1, 1, 1), (5, 1, 1), (40, 1, 1), (40, 3, 2)]
)
def test_a_product_allocates_its_output(rows, parts, allocations, monkeypatch) -> None:
    """Strided input and a slice of a weight too; split sums take a workspace besides."""
    monkeypatch.setenv("MKRS_MPS_PARTS", str(parts))
    w = random_weight(70, 96, 4, 32, "affine", device="mps")
    part = [None if t is None else t[2:67] for t in w.components]
    x = torch.randn(rows, 100).half().to("mps")[:, 2:98]
    y = torch.randn(rows, 80).half().to("mps")[:, 4:69]
    bias = torch.randn(65).half().to("mps")
    product = torch.ops.mkrs.dequant_matmul
    assert activity(lambda: product(x, *part, bias, 4, 32)) == (allocations, 0)
    transposed = torch.ops.mkrs.dequant_matmul_t
    assert activity(lambda: transposed(y, *part, 4, 32, 96)) == (allocations, 0)


def test_other_ops_allocate_their_output() -> None:
    w = random_weight(9, 96, 4, 32, "affine", device="mps")
    kind = (*w.components, 4, 32, 96)
    rows = torch.tensor([1, 8], device="mps")
    weight = torch.randn(9, 96).to("mps")
    mkrs = torch.ops.mkrs
    assert activity(lambda: mkrs.dequantize(*kind, torch.float16)) == (1, 0)
    assert activity(lambda: mkrs.dequant_embedding(rows, *kind, torch.float16)) == (1, 0)
    assert activity(lambda: mkrs.dequant_reduce(*kind, "sum")) == (1, 0)
    # codes, scale, offset and a status a row, which the CPU reads to refuse inf and NaN
    assert activity(lambda: mkrs.quantize(weight, 4, 32, "affine")) == (4, 1)


# ---- errors ------------------------------------------------------------------------------------


def test_a_refused_call_carries_the_reason() -> None:
    codes = torch.empty(4, 32, dtype=torch.uint8, device="mps")  # never written
    scale = torch.ones(4, 2, device="mps")
    match = r"mkrs::dequantize: Metal must accept the kernel call, got from dispatch.*: .*written"
    with pytest.raises(RuntimeError, match=match):
        torch.ops.mkrs.dequantize(codes, scale, None, None, 4, 32, 64, torch.float32)


UNCOMPILED = """
import torch
from metal_sim import simulator
from metal_sim.compiler import CompileError
from mergekit_torch import ops

simulator.load()
kind = {"bits": 4, "group_size": 32, "in_features": 64}
codes, scale, offset = ops.quantize(torch.randn(4, 64), 4, 32)
on_mps = [t.to("mps") for t in (codes, scale, offset)]

def refuse(source):
    raise CompileError("use of undeclared identifier 'bfloat'")

compiler, simulator.compile_kernels = simulator.compile_kernels, refuse
for _ in range(2):
    try:
        ops.dequantize(on_mps[0], on_mps[1], None, on_mps[2], **kind)
    except RuntimeError as error:
        print(error)
want = ops.dequantize(*(t.cpu() for t in on_mps[:2]), None, on_mps[2].cpu(), **kind)
simulator.compile_kernels = compiler
got = ops.dequantize(on_mps[0], on_mps[1], None, on_mps[2], **kind)
assert torch.equal(got.cpu(), want)
print("compiled")
"""


def test_a_kernel_that_metal_refuses() -> None:
    """The error has Metal's message and the way out, comes again, and is not for ever."""
    done = subprocess.run(
        [sys.executable, "-c", UNCOMPILED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *refusals, last = done.stdout.splitlines()
    assert last == "compiled"
    text = (
        "mkrs::dequantize: Metal (macOS 14 or later) must compile the kernel "
        "dequantize_float_half_4_AFFINE_true, got: "
    )
    found = [line for line in refusals if line.startswith(text)]
    assert len(found) == 2
    for line in found:
        assert "use of undeclared identifier 'bfloat'" in line
        assert line.endswith("the CPU can still run it, on tensors moved with .cpu()")

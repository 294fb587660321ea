"""The host code: storage offsets, what a call allocates and waits for, Metal's own errors."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from oracle import random_weight

from mergekit_torch import QuantizedTensor, ops
from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
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


# ---- mapped files ------------------------------------------------------------------------------

LIMIT = 1 << 40


@pytest.fixture
def buffers(own_process: None) -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(str(simulator.build_host()))
    library.sim_set_longest_buffer.argtypes = [ctypes.c_int64]
    library.sim_live_buffers.restype = ctypes.c_int64
    yield library
    library.sim_set_longest_buffer(LIMIT)


def test_mapped_tensors_are_used_in_place(buffers, tmp_path) -> None:
    dense = torch.randn(300, 128)
    path = tmp_path / "model.safetensors"
    quantized = QuantizedTensor.from_float(dense, 4, 32, "affine")
    save_checkpoint({"odd": torch.arange(7.0), "dense": dense.half(), "weight": quantized}, path)
    checkpoint = open_checkpoint(path)
    mapped = checkpoint["dense"]
    for host in (mapped, mapped[17:40], mapped[5], checkpoint["weight"].codes):
        (piece,), copied = torch.ops.mkrs.mps_share(host)
        assert copied == ""
        assert piece.device.type == "mps"
        assert (piece.shape, piece.dtype, piece.stride()) == (
            host.shape,
            host.dtype,
            host.stride(),
        )
        assert piece.data_ptr() == host.data_ptr()  # the same memory
        assert torch.equal(piece.cpu(), host)
    x = torch.randn(3, 128)
    scale, offset = (t.to("mps") for t in (quantized.scale, quantized.offset))
    got = ops.dequant_matmul(x.to("mps"), piece, scale, None, offset, bits=4, group_size=32)
    torch.testing.assert_close(got.cpu(), x @ quantized.dequantize().T, rtol=1e-4, atol=1e-4)
    # The mapping lives as long as a tensor over it, and each buffer is given back once.
    (piece,), _ = torch.ops.mkrs.mps_share(mapped)
    assert buffers.sim_live_buffers() == 1
    checkpoint.close()
    del checkpoint, mapped, host
    gc.collect()
    assert torch.equal(piece.cpu(), dense.half())
    del piece
    assert buffers.sim_live_buffers() == 0


def test_long_mapped_tensors_are_split(buffers, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    dense = torch.randn(300, 128)
    save_checkpoint({"odd": torch.arange(7.0), "dense": dense}, path)
    with open_checkpoint(path) as checkpoint:
        mapped = checkpoint["dense"]
        for longest in (2 * mmap.PAGESIZE + 512, 2 * mmap.PAGESIZE + 7000, 100_000):
            buffers.sim_set_longest_buffer(longest)
            pieces, copied = torch.ops.mkrs.mps_share(mapped)
            assert copied == ""
            assert len(pieces) == -(-300 // ((longest - 2 * mmap.PAGESIZE) // 512))
            assert torch.equal(torch.cat([piece.cpu() for piece in pieces]), dense)
            first = 0
            for piece in pieces:
                assert piece.data_ptr() == mapped[first].data_ptr()
                first += piece.shape[0]


def test_what_cannot_be_shared_is_copied_and_says_why(buffers, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint({"dense": torch.randn(300, 128), "empty": torch.empty(0, 3)}, path)
    share = torch.ops.mkrs.mps_share

    def copied(host: torch.Tensor) -> str:
        (piece,), why = share(host)
        assert piece.device.type == "mps"
        assert torch.equal(piece.cpu(), host)
        return why

    with open_checkpoint(path) as checkpoint:
        mapped = checkpoint["dense"]
        assert "without pages" in copied(checkpoint["empty"])
        assert "without pages" in copied(mapped[0, 0])
        odd = torch.frombuffer(bytearray(401), dtype=torch.float32, offset=1)
        assert "no multiple of its element size" in copied(odd)
        buffers.sim_set_longest_buffer(2 * mmap.PAGESIZE + 511)
        assert "one row is longer" in copied(mapped)
        with pytest.raises(RuntimeError, match="mkrs::mps_share: mapped must be contiguous, got"):
            share(mapped.T)
        buffers.sim_set_longest_buffer(0)
        with pytest.raises(RuntimeError, match="a Metal device must be there, got none"):
            share(mapped)
    assert buffers.sim_live_buffers() == 0


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

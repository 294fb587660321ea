"""Every kernel with every format, forced through every regime, in several orders of threads.

tests/ops with MKRS_TEST_DEVICE=mps is the full suite (`make test-mps`).
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from oracle import (
    Weight,
    assert_within,
    dequantize32,
    dequantize64,
    matmul_bound,
    random_weight,
    transposed_bound,
)

from mergekit_torch import ops

from . import simulator
from .compiler import CompileError, zig

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCHEMES = ("symmetric", "asymmetric", "affine")
# In order, and three shuffles: every kernel call runs in each and must leave the same bits.
ORDERS = (0, 11, 12, 13)
FORMATS = list(itertools.product((8, 4, 2), SCHEMES, FLOATS))
IDS = ["-".join(str(v).replace("torch.", "") for v in parts) for parts in FORMATS]


@pytest.fixture(autouse=True)
def simulated():
    simulator.load()
    torch.manual_seed(torch.randint(2**31, ()).item() if os.environ.get("MKRS_FRESH") else 0)
    with simulator.seed(*ORDERS):
        yield


def weight(rows: int, k: int, bits: int, scheme: str, scale: torch.dtype, aligned: bool) -> Weight:
    """A weight whose rows start at whole blocks, or one in the middle of a wider one."""
    if aligned:
        return random_weight(rows, k, bits, 32, scheme, scale, "mps")
    w = random_weight(rows + 3, k + 64, bits, 32, scheme, scale, "cpu")
    flat = torch.zeros(w.codes.numel() + 1, dtype=torch.uint8)
    flat[1:] = w.codes.flatten()
    codes = flat.to("mps")[1:].view(w.codes.shape)  # a storage offset of one byte
    first = 32 * bits // 8
    parts = [None if t is None else t.to("mps")[2:-1, 1 : 1 + k // 32] for t in w.components[1:]]
    return Weight(codes[2:-1, first : first + k * bits // 8], *parts, bits, 32, k)


@pytest.mark.parametrize("aligned", [True, False], ids=["blocks", "bytes"])
@pytest.mark.parametrize(("bits", "scheme", "scale"), FORMATS, ids=IDS)
def test_matmul_variants(bits, scheme, scale, aligned, monkeypatch) -> None:
    turn = FORMATS.index((bits, scheme, scale)) + aligned
    k = 96
    w = weight(21, k, bits, scheme, scale, aligned)
    dense = dequantize64(w)
    variants = [(1, 0), (turn % 7 + 2, 0), *((9, tile) for tile in (8, 16, 24, 32, 64))]
    for n, (m, tile) in enumerate(variants):
        dtype = FLOATS[(n + turn + turn // 9) % 3]
        monkeypatch.setenv("MKRS_MPS_TILE_ROWS", str(tile))
        monkeypatch.setenv("MKRS_MPS_PARTS", str(n % 3 + 1))
        base = torch.full((m + 2, k + 5), float("nan"), dtype=dtype)
        base[1:-1, 2:-3] = torch.randn(m, k)
        x = base.to("mps")[1:-1, 2:-3]
        bias = torch.randn(21).to(dtype).to("mps") if n % 2 else None
        got = ops.dequant_matmul(x, *w.components, bias, bits=bits, group_size=32)
        x64 = x.cpu().double().numpy()
        expected = x64 @ dense.T + (0 if bias is None else bias.cpu().double().numpy())
        assert_within(got, expected, matmul_bound(x64, w, expected, dtype))
        y = torch.randn(m, 21).to(dtype).to("mps")
        got = ops.dequant_matmul_t(y, *w.components, bits=bits, group_size=32, in_features=k)
        y64 = y.cpu().double().numpy()
        assert_within(got, y64 @ dense, transposed_bound(y64, w, y64 @ dense, dtype))


@pytest.mark.parametrize("aligned", [True, False], ids=["blocks", "bytes"])
@pytest.mark.parametrize(("bits", "scheme", "scale"), FORMATS, ids=IDS)
def test_elementwise_variants(bits, scheme, scale, aligned) -> None:
    w = weight(9, 96, bits, scheme, scale, aligned)
    dense = torch.from_numpy(dequantize32(w))
    args = {"bits": bits, "group_size": 32, "in_features": 96}
    for n, dtype in enumerate(FLOATS):
        got = ops.dequantize(*w.components, **args, dtype=dtype)
        assert torch.equal(got.cpu(), dense.to(dtype))
        rows = torch.tensor([8, 0, 3, 3], dtype=torch.int32 if n % 2 else torch.int64)
        got = ops.dequant_embedding(rows.to("mps"), *w.components, **args, dtype=dtype)
        assert torch.equal(got.cpu(), dense.to(dtype)[rows.long()])
    for reduction, want in (
        ("amax", dense.amax(-1)),
        ("amin", dense.amin(-1)),
        ("abs_max", dense.abs().amax(-1)),
        ("sum", dense.double().sum(-1)),
        ("sum_squares", dense.double().square().sum(-1)),
    ):
        got = ops.dequant_reduce(*w.components, **args, reduction=reduction).cpu()
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "scheme", "scale"), FORMATS, ids=IDS)
def test_quantize_variants(bits, scheme, scale) -> None:
    for n, group_size in enumerate((16, 32, 64, 128, 256, 700)):
        wide = torch.randn(6, 640).to(FLOATS[n % 3])
        w = wide.to("mps")[1:5, 3 : 3 + 613]
        got = ops.quantize(w, bits, group_size, scheme, scale)
        want = ops.quantize(w.cpu(), bits, group_size, scheme, scale)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_an_index_outside_the_weight_is_nan() -> None:
    w = random_weight(4, 64, 4, 32, "affine", device="mps")
    rows = torch.tensor([0, 4, -1, 2**40], device="mps")
    got = ops.dequant_embedding(
        rows, *w.components, bits=4, group_size=32, in_features=64, dtype=torch.float32
    ).cpu()
    assert not got[0].isnan().any()
    assert got[1:].isnan().all()


def test_errors_come_from_the_shared_checks() -> None:
    w = random_weight(4, 64, 4, 32, "affine", device="mps")
    x = torch.randn(2, 64, device="mps")
    op = torch.ops.mkrs.dequant_matmul
    with pytest.raises(RuntimeError, match="mkrs::dequant_matmul: codes must be on the device"):
        op(x, w.codes.cpu(), w.scale, None, w.offset, None, 4, 32)
    with pytest.raises(RuntimeError, match="compute must be 'exact' on mps, got 'int8'"):
        op(x, *w.components, None, 4, 32, "int8")
    with pytest.raises((RuntimeError, NotImplementedError), match="gguf_unpack"):
        torch.ops.mkrs.gguf_unpack(w.codes, 2, 4, 32)

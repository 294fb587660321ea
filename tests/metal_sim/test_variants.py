"""Every variant of every kernel, in several orders of threads, on cases that fit in a second.

tests/ops with MKRS_TEST_DEVICE=mps is the full suite; this is what runs with the default tests.
"""

from __future__ import annotations

import itertools
import zlib

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
# By default every bits x scheme with one scale type (all three occur); the rest is slow.
FORMATS = [
    pytest.param(bits, scheme, scale, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.slow)
    for (i, bits), (j, scheme), (k, scale) in itertools.product(
        enumerate((8, 4, 2)), enumerate(SCHEMES), enumerate(FLOATS)
    )
]
ORDERS = (0, 11, 12, 13)
IDS = ["-".join(str(v).replace("torch.", "") for v in p.values) for p in FORMATS]


@pytest.fixture(autouse=True)
def simulated() -> None:
    simulator.load()


@pytest.fixture(params=["one order", pytest.param("every order", marks=pytest.mark.slow)])
def orders(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Every variant runs once; with the slow tests, in three shuffled orders besides."""
    if request.param == "every order":
        return ORDERS
    return (ORDERS[zlib.crc32(request.node.name.encode()) % len(ORDERS)],)


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
def test_matmul_variants(bits, scheme, scale, aligned, orders, monkeypatch) -> None:
    for order in orders:
        with simulator.seed(order):
            check_matmul(bits, scheme, scale, aligned, order, monkeypatch)


def check_matmul(bits, scheme, scale, aligned, order, monkeypatch) -> None:
    k = 96
    w = weight(21, k, bits, scheme, scale, aligned)
    dense = dequantize64(w)
    variants = [(1, 0), (order % 7 + 2, 0), *((9, tile) for tile in (8, 16, 24, 32, 64))]
    for n, (m, tile) in enumerate(variants):
        dtype = FLOATS[(n + order) % 3]
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
def test_elementwise_variants(bits, scheme, scale, aligned, orders) -> None:
    for order in orders:
        with simulator.seed(order):
            check_elementwise(bits, scheme, scale, aligned)


def check_elementwise(bits, scheme, scale, aligned) -> None:
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
def test_quantize_variants(bits, scheme, scale, orders) -> None:
    for order in orders:
        with simulator.seed(order):
            check_quantize(bits, scheme, scale, order)


def check_quantize(bits, scheme, scale, order) -> None:
    for n, group_size in enumerate((16, 32, 64, 128, 256, 700)):
        wide = torch.randn(6, 640).to(FLOATS[(n + order) % 3])
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

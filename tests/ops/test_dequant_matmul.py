import pytest
import torch
from cases import BITS, FLOATS, GROUPS, INPUT_ROWS, SCHEMES, SHAPES
from oracle import assert_within, dequantize64, matmul_bound, random_weight

from mergekit_torch import ops
from mergekit_torch.ops.dequant_matmul import reference


def check(x, w, bias=None):
    got = ops.dequant_matmul(x, *w.components, bias, bits=w.bits, group_size=w.group_size)
    assert got.dtype == x.dtype
    x64 = x.detach().cpu().double().numpy()
    expected = x64 @ dequantize64(w).T
    bias64 = None if bias is None else bias.detach().cpu().double().numpy()
    if bias64 is not None:
        expected = expected + bias64
    assert_within(got, expected, matmul_bound(x64, w, expected, x.dtype, bias=bias64))
    return got


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(bits, scheme, group_size, dtype, device):
    for i, (rows, k) in enumerate(SHAPES):
        scale_dtype = FLOATS[i % 3]
        w = random_weight(rows, k, bits, group_size, scheme, scale_dtype, device)
        for m in INPUT_ROWS:
            x = torch.randn(m, k).to(dtype).to(device)
            bias = torch.randn(rows).to(dtype).to(device) if (i + m) % 2 else None
            check(x, w, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_larger_layers(dtype, device):
    """Shapes beyond every tile and thread split."""
    # K of 127 ends one code short of a vector.
    shapes = ((600, 1216, 1), (600, 1216, 4), (259, 2112, 33), (70, 640, 300), (25, 127, 9))
    for rows, k, m in shapes:
        for bits in BITS:
            w = random_weight(rows, k, bits, 64, "affine", device=device)
            check(torch.randn(m, k).to(dtype).to(device), w)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_weight_rows(scheme, dtype, device):
    """Work is cut along K, or along the input where it has many rows."""
    shapes = ((1, 131072 + 65, 2), (3, 50000, 1), (8, 20100, 5), (5, 600, 300), (40, 200, 513))
    for i, (rows, k, m) in enumerate(shapes):
        for bits, group_size in ((4, 64), (2, 16), (8, k)):
            w = random_weight(rows, k, bits, group_size, scheme, FLOATS[i % 3], device)
            x = torch.randn(m, k).to(dtype).to(device)
            check(x, w, torch.randn(rows).to(dtype).to(device) if i % 2 else None)
    w = random_weight(2, 65536, 4, 64, scheme, device=device)
    x = torch.randn(3, 65536, device=device)
    x[1, 40000] = float("inf")  # in the second of the parts
    got = ops.dequant_matmul(x, *w.components, bits=4, group_size=64)
    assert not got[1].isfinite().any()
    check_rows = [0, 2]
    expected = ops.dequant_matmul(x[check_rows], *w.components, bits=4, group_size=64)
    torch.testing.assert_close(got[check_rows], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_input_views(bits, scheme, device):
    w = random_weight(48, 96, bits, 32, scheme, device=device)
    base = torch.randn(7, 9, 200, device=device)
    for x in (
        base[..., 5:101],
        base[2, ::2, :96],
        base.transpose(0, 1)[..., :96],
        base[0, 0, 3:99],
    ):
        assert torch.equal(check(x, w), check(x.contiguous(), w))
    expanded = torch.randn(1, 96, device=device).expand(5, 96)
    assert torch.equal(check(expanded, w), check(expanded.contiguous(), w))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_views(bits, scheme, device):
    """Row slices, strided rows and group-aligned column slices of a wider weight."""
    w = random_weight(40, 256, bits, 32, scheme, device=device)
    x = torch.randn(3, 256, device=device)
    full = ops.dequant_matmul(x, *w.components, bits=bits, group_size=32)
    for rows in (slice(5, 29), slice(0, 40, 7), slice(39, 40)):
        parts = [None if t is None else t[rows] for t in w.components]
        got = ops.dequant_matmul(x, *parts, bits=bits, group_size=32)
        torch.testing.assert_close(got, full[:, rows], rtol=1e-5, atol=1e-4)
    part = type(w)(
        w.codes[:, 64 * bits // 8 : 224 * bits // 8],
        *(None if t is None else t[:, 2:7] for t in w.components[1:]),
        bits,
        32,
        160,
    )
    check(x[:, 64:224], part)


@pytest.mark.parametrize("bits", BITS)
def test_wide_dynamic_range(bits, device):
    """Activations that differ by many binades within a group keep float32 accuracy."""
    w = random_weight(33, 192, bits, 64, "affine", device=device)
    for spread in (10, 30):
        exponents = torch.randint(-spread, spread, (5, 192)).float()
        check((torch.randn(5, 192) * exponents.exp2()).to(device), w)
    for magnitude in (0.0, 1e-38, 1e30):
        check(torch.randn(2, 192, device=device) * magnitude, w)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_non_finite_activations_propagate(value, m, device):
    """As in a dense product: NaN where NaN belongs, other rows untouched."""
    w = random_weight(20, 128, 4, 32, "symmetric", device=device)
    x = torch.randn(m, 128, device=device)
    clean = ops.dequant_matmul(x, *w.components, bits=4, group_size=32)
    x[m - 1, 77] = value
    got = ops.dequant_matmul(x, *w.components, bits=4, group_size=32)
    dense = ops.dequantize(*w.components, bits=4, group_size=32, in_features=128)
    expected = x[m - 1].cpu() @ dense.cpu().T
    assert torch.equal(got[: m - 1], clean[: m - 1])
    assert torch.equal(got[m - 1].cpu().isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(got[m - 1].cpu()[infinite], expected[infinite])


def test_empty(device):
    for rows, k, m in ((0, 64, 3), (4, 0, 3), (4, 64, 0), (0, 0, 0)):
        w = random_weight(rows, k, 4, 16, "affine", device=device)
        bias = torch.ones(rows, device=device)
        got = ops.dequant_matmul(
            torch.randn(m, k, device=device), *w.components, bias, bits=4, group_size=16
        )
        assert got.shape == (m, rows)
        if k == 0:
            assert torch.equal(got, bias.expand(m, rows))  # an empty sum, plus bias


def test_reference_agrees(device):
    w = random_weight(17, 100, 4, 32, "asymmetric")
    x, bias = torch.randn(4, 100), torch.randn(17)
    expected = reference(x, *w.components, bias, 4, 32)
    got = ops.dequant_matmul(
        x.to(device), *w.to(device).components, bias.to(device), bits=4, group_size=32
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_gradients(device):
    w = random_weight(30, 80, 4, 32, "affine", device=device)
    dense = torch.from_numpy(dequantize64(w)).to(device, torch.float32)
    x = torch.randn(2, 5, 80, device=device, requires_grad=True)
    bias = torch.randn(30, device=device, requires_grad=True)
    grad = torch.randn(2, 5, 30, device=device)
    ops.dequant_matmul(x, *w.components, bias, bits=4, group_size=32).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    # And the gradient of the gradient's input.
    direction = torch.randn(2, 5, 80, device=device)
    probe = grad.clone().requires_grad_()
    ops.dequant_matmul_t(probe, *w.components, bits=4, group_size=32, in_features=80).backward(
        direction
    )
    torch.testing.assert_close(probe.grad, direction @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("not torch.get_num_threads() > 1", reason="needs two threads")
def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    for rows, k, m in ((700, 576, 1), (700, 576, 9), (700, 576, 64), (5, 40000, 1), (9, 576, 400)):
        w = random_weight(rows, k, 4, 32, "affine")
        x = torch.randn(m, k)
        try:
            torch.set_num_threads(1)
            one = ops.dequant_matmul(x, *w.components, bits=4, group_size=32)
        finally:
            torch.set_num_threads(threads)
        many = ops.dequant_matmul(x, *w.components, bits=4, group_size=32)
        assert torch.equal(one, many)

import math

import pytest
import torch
from cases import BITS, FLOATS, GROUPS, SCHEMES, SHAPES
from oracle import assert_within, dequantize64, random_weight, transposed_bound

from mergekit_torch import ops
from mergekit_torch.ops.dequant_matmul_t import reference


def check(x, w):
    got = ops.dequant_matmul_t(
        x, *w.components, bits=w.bits, group_size=w.group_size, in_features=w.in_features
    )
    assert got.dtype == x.dtype
    x64 = x.cpu().double().numpy()
    expected = x64 @ dequantize64(w)
    assert_within(got, expected, transposed_bound(x64, w, expected, x.dtype))
    return got


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(bits, scheme, group_size, dtype, device):
    for i, (rows, k) in enumerate(SHAPES):
        w = random_weight(rows, k, bits, group_size, scheme, FLOATS[i % 3], device)
        for m in (0, 1, 3, 35):
            check(torch.randn(m, rows).to(dtype).to(device), w)


def test_larger_layers(device):
    for rows, k, m in ((600, 1216, 1), (1100, 520, 40)):
        for bits in BITS:
            check(
                torch.randn(m, rows, device=device),
                random_weight(rows, k, bits, 64, "affine", device=device),
            )


def test_views(device):
    w = random_weight(48, 96, 4, 32, "affine", device=device)
    base = torch.randn(3, 4, 100, device=device)
    for x in (base[..., 10:58], base.transpose(0, 1)[..., :48], base[0, 0, 5:53]):
        assert torch.equal(check(x, w), check(x.contiguous(), w))
    rows = type(w)(*(None if t is None else t[8:40] for t in w.components), 4, 32, 96)
    check(base[..., :32], rows)


def test_reference_agrees_and_empty(device):
    w = random_weight(17, 100, 2, 32, "symmetric")
    x = torch.randn(4, 17)
    expected = reference(x, *w.components, 2, 32, 100)
    got = ops.dequant_matmul_t(
        x.to(device), *w.to(device).components, bits=2, group_size=32, in_features=100
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    for rows, k, m in ((0, 64, 3), (4, 0, 3), (4, 64, 0)):
        w = random_weight(rows, k, 4, 16, "affine", device=device)
        got = ops.dequant_matmul_t(
            torch.randn(m, rows, device=device),
            *w.components,
            bits=4,
            group_size=16,
            in_features=k,
        )
        assert torch.equal(got.cpu(), torch.zeros(m, k))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_extreme_inputs(scheme, value, device):
    """An input row that overflows is no finite number's row, and leaves the others alone."""
    for bits, group_size in ((8, 16), (4, 64), (2, 64), (4, 16)):
        w = random_weight(40, 200, bits, group_size, scheme, torch.float32, device)
        w.codes[:, :16] = 0  # under an infinite activation a code of zero is still a weight
        x = torch.randn(5, 40)
        x[3, 7] = value
        got = ops.dequant_matmul_t(
            x.to(device), *w.components, bits=bits, group_size=group_size, in_features=200
        ).cpu()
        expected = x @ torch.from_numpy(dequantize64(w)).float()
        if device.type == "cpu":
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got[3]), kind(expected[3]))
        # Elsewhere codes meet activations before scales do, and may overflow where weights do not.
        finite = got[3].isfinite()
        assert not (finite & ~expected[3].isfinite()).any()
        rows = [0, 1, 2, 4] if math.isinf(value) or math.isnan(value) else [0, 1, 2, 3, 4]
        x64 = x[rows].double().numpy()
        exact = x64 @ dequantize64(w)
        bound = transposed_bound(x64, w, exact, torch.float32)
        known = got[rows].isfinite()
        assert known[[row != 3 for row in rows]].all()
        assert_within(got[rows][known], exact[known.numpy()], bound[known.numpy()])

import numpy as np
import pytest
import torch
from cases import BITS, FLOATS, GROUPS, SCHEMES, SHAPES
from oracle import Weight, dequantize64, quantize_bound, unpack

from mergekit_torch import ops
from mergekit_torch.ops.quantize import reference


def components(codes, scale, zero, scheme, bits, group_size, k) -> Weight:
    return Weight(
        codes,
        scale,
        zero if scheme == "asymmetric" else None,
        zero if scheme == "affine" else None,
        bits,
        k if group_size == -1 else group_size,
        k,
    )


def quantized(weight, bits, group_size, scheme, scale_dtype=None) -> Weight:
    parts = ops.quantize(weight, bits, group_size, scheme, scale_dtype)
    return components(*parts, scheme, bits, group_size, weight.shape[-1])


def rounding_bound(weight: torch.Tensor, w: Weight) -> np.ndarray:
    return quantize_bound(weight.cpu().double().numpy(), w)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_matches_reference_and_bound(bits, scheme, group_size, device):
    for rows, k in SHAPES:
        for dtype in FLOATS:
            weight = (torch.randn(rows, k) * 0.05).to(dtype).to(device)
            for scale_dtype in (None, *FLOATS):
                w = quantized(weight, bits, group_size, scheme, scale_dtype)
                size = max(1, k) if group_size == -1 else group_size
                expected = reference(weight.cpu(), bits, size, scheme, scale_dtype)
                zero = w.zero_point if scheme == "asymmetric" else w.offset
                for got, want in zip((w.codes, w.scale, zero), expected, strict=True):
                    if got is None:
                        assert want.numel() == 0
                        continue
                    assert got.dtype == want.dtype
                    assert torch.equal(got.cpu(), want), (rows, k, dtype, scale_dtype)
                error = np.abs(dequantize64(w) - weight.cpu().double().numpy())
                assert (error <= rounding_bound(weight, w)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.75, 3.140625, 1e-3])
def test_constant_groups_are_exact(bits, scheme, value, device):
    weight = torch.full((3, 80), value, device=device)
    w = quantized(weight, bits, 32, scheme, torch.float32)
    assert (dequantize64(w) == float(torch.tensor(value))).all()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_extreme_is_exact_and_scale_takes_its_sign(bits, device):
    weight = torch.randn(16, 64, device=device)
    w = quantized(weight, bits, 16, "symmetric", torch.float32)
    groups = weight.cpu().view(16, 4, 16)
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)[..., 0]
    got = torch.from_numpy(dequantize64(w)).view(16, 4, 16).gather(-1, index)[..., 0]
    assert torch.equal(got, extreme.double())
    assert (w.scale.cpu().sign() == -extreme.sign()).all()


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_keeps_zero_exact(bits, device):
    weight = torch.randn(8, 64, device=device).abs() + 0.1
    weight[:, ::5] = 0
    w = quantized(weight, bits, 32, "asymmetric")
    assert (dequantize64(w)[:, ::5] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_padding_bits_are_zero(bits, device):
    w = quantized(torch.randn(9, 37, device=device), bits, 16, "affine")
    spare = w.codes.shape[-1] * 8 - 37 * bits
    assert (w.codes.cpu()[:, -1] >> (8 - spare) == 0).all() if spare else True


def test_views_and_leading_dimensions(device):
    base = torch.randn(6, 4, 200, device=device)
    for view in (base[1:4], base[..., 3:103], base.transpose(0, 1), base[:, :1, ::2]):
        for scheme in SCHEMES:
            got = ops.quantize(view, 4, 32, scheme)
            want = ops.quantize(view.contiguous(), 4, 32, scheme)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert got[0].shape == (*view.shape[:-1], (view.shape[-1] + 1) // 2)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (2, 0, 16)])
def test_empty(shape, device):
    for scheme in SCHEMES:
        codes, scale, zero = ops.quantize(torch.empty(shape, device=device), 4, 16, scheme)
        assert codes.shape == (*shape[:-1], shape[-1] // 2)
        assert scale.shape == (*shape[:-1], shape[-1] // 16)
        assert zero.numel() == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_non_finite_weight_is_refused(value, scheme, device):
    weight = torch.randn(5, 100, device=device)
    weight[3, 97] = value
    with pytest.raises(ValueError, match=r"mkrs::quantize: .*finite"):
        ops.quantize(weight, 4, 32, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scale_overflow_is_refused(scheme, device):
    weight = torch.randn(2, 64, device=device)
    weight[1, 5], weight[1, 6] = 3e38, -3e38
    with pytest.raises(ValueError, match=r"mkrs::quantize: .*scale_dtype"):
        ops.quantize(weight, 4, 32, scheme)
    w = quantized(weight, 8, 32, scheme, torch.float32)  # the whole range fits float32 scales
    assert np.isfinite(dequantize64(w)).all()


def test_extreme_ranges_stay_finite(device):
    """Subnormal and huge groups give finite components in every dtype that can hold them."""
    for exponent in (-149, -140, -126, -30, 0, 60, 126):
        weight = torch.randn(2, 32, device=device).clamp(-1.9, 1.9) * 2.0**exponent
        for scheme in SCHEMES:
            w = quantized(weight, 8, 16, scheme, torch.float32)
            dense = dequantize64(w)
            assert np.isfinite(dense).all()
            bound = rounding_bound(weight, w) + 2.0**-118  # groups flushed to one value
            assert (np.abs(dense - weight.cpu().double().numpy()) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_again_changes_nothing(bits, device):
    """Values on the grid stay on it: symmetric scales are recovered exactly."""
    w = quantized(torch.randn(8, 128, device=device), bits, 32, "symmetric", torch.float32)
    dense = torch.from_numpy(dequantize64(w)).float().to(device)
    again = quantized(dense, bits, 32, "symmetric", torch.float32)
    np.testing.assert_array_equal(dequantize64(again), dequantize64(w))


def test_codes_span_the_range(device):
    weight = torch.linspace(-1, 1, 256, device=device)[None]
    for bits in BITS:
        for scheme in SCHEMES:
            q = unpack(quantized(weight, bits, 256, scheme).codes, bits, 256)
            assert q.min() == 0
            assert q.max() == 2**bits - 1

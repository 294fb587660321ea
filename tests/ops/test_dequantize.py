import numpy as np
import pytest
import torch
from cases import BITS, FLOATS, GROUPS, SCHEMES, SHAPES
from oracle import dequantize32, random_weight

from mergekit_torch import ops
from mergekit_torch.ops._common import reference_dequantize


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
def test_bit_exact(bits, scheme, group_size, scale_dtype, device):
    for rows, k in SHAPES:
        w = random_weight(rows, k, bits, group_size, scheme, scale_dtype, device)
        expected = torch.from_numpy(dequantize32(w))
        for dtype in FLOATS:
            got = ops.dequantize(
                *w.components, bits=bits, group_size=w.group_size, in_features=k, dtype=dtype
            )
            assert got.dtype == dtype
            assert torch.equal(got.cpu(), expected.to(dtype)), (rows, k, dtype)
        reference = reference_dequantize(*w.components, bits, w.group_size, k)
        assert torch.equal(reference.cpu(), expected)


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_and_empty(bits, device):
    w = random_weight((2, 3, 5), 70, bits, 32, "affine", device=device)
    got = ops.dequantize(*w.components, bits=bits, group_size=32, in_features=70)
    assert got.shape == (2, 3, 5, 70)
    np.testing.assert_array_equal(got.cpu().numpy(), dequantize32(w))
    for rows, k in ((0, 64), (4, 0), (0, 0)):
        w = random_weight(rows, k, bits, 16, "asymmetric", device=device)
        got = ops.dequantize(*w.components, bits=bits, group_size=16, in_features=k)
        assert got.shape == (rows, k)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_read_only_their_rows(bits, scheme, device):
    """Row and column slices are views with strides and storage offsets of their own."""
    w = random_weight(20, 256, bits, 32, scheme, device=device)
    dense = torch.from_numpy(dequantize32(w))
    for rows in (slice(3, 11), slice(1, 20, 3), slice(19, 20)):
        parts = [None if t is None else t[rows] for t in w.components]
        got = ops.dequantize(*parts, bits=bits, group_size=32, in_features=256)
        assert torch.equal(got.cpu(), dense[rows])
    columns = slice(64, 224)
    parts = [
        w.codes[:, 64 * bits // 8 : 224 * bits // 8],
        *(None if t is None else t[:, 2:7] for t in w.components[1:]),
    ]
    got = ops.dequantize(*parts, bits=bits, group_size=32, in_features=160)
    assert torch.equal(got.cpu(), dense[:, columns])
    # Components whose rows have no single stride are copied, not misread.
    stacked = random_weight((4, 6), 64, bits, 16, scheme, device=device)
    expected = torch.from_numpy(dequantize32(stacked)).transpose(0, 1)
    parts = [None if t is None else t.transpose(0, 1) for t in stacked.components]
    got = ops.dequantize(*parts, bits=bits, group_size=16, in_features=64)
    assert torch.equal(got.cpu(), expected)


def test_special_scales(device):
    """Infinite, NaN and subnormal scales dequantize as float arithmetic says."""
    for value in (float("inf"), float("nan"), 2.0**-24, -0.0, 65504.0):
        w = random_weight(2, 32, 4, 16, "affine", torch.float16)
        w.scale[0, 1] = value
        w = w.to(device)
        got = ops.dequantize(*w.components, bits=4, group_size=16, in_features=32)
        np.testing.assert_array_equal(got.cpu().numpy(), dequantize32(w))


def test_rounding_to_half_precision(device):
    """Overflow becomes inf and subnormals are kept in float16 and bfloat16 outputs."""
    w = random_weight(8, 64, 8, 16, "symmetric", torch.float32)
    w.scale.copy_(torch.logspace(-12, 3, w.scale.numel()).view_as(w.scale))
    expected = torch.from_numpy(dequantize32(w))
    w = w.to(device)
    for dtype in (torch.float16, torch.bfloat16):
        got = ops.dequantize(*w.components, bits=8, group_size=16, in_features=64, dtype=dtype)
        assert torch.equal(got.cpu(), expected.to(dtype))


def assert_written_alone(w, expected, start):
    """An output that begins at element ``start`` of its storage, between other elements."""
    end = start + expected.numel()
    buffer = torch.full((end + 16,), 7.0, dtype=expected.dtype, device=w.codes.device)
    out = buffer[start:end].view(expected.shape)
    form = {"bits": w.bits, "group_size": 32, "in_features": expected.shape[-1]}
    assert ops.dequantize(*w.components, **form, out=out) is out
    assert torch.equal(out.cpu(), expected)
    assert (buffer[:start] == 7).all()
    assert (buffer[end:] == 7).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_given_output(bits, dtype, device):
    """Written whole and alone, at any place of its storage."""
    for shape, k in (((5,), 70), ((2, 3), 64), ((1,), 1), ((0,), 64), ((3,), 0)):
        w = random_weight((*shape, k) if len(shape) > 1 else shape[0], k, bits, 32, "affine")
        w = w.to(device)
        expected = torch.from_numpy(dequantize32(w)).to(dtype)
        for start in (0, 16) if device.type == "mps" else (0, 1, 16):
            assert_written_alone(w, expected, start)


@pytest.mark.parametrize("bits", BITS)
def test_large_given_output(bits, device):
    """CPU kernels store results of 32 MiB and more past the caches, if they are aligned."""
    if device.type == "mps":
        pytest.skip("the CPU's stores; too large for the simulator")
    w = random_weight(2100, 4100, bits, 32, "affine", device=device)
    expected = torch.from_numpy(dequantize32(w))
    for start in (0, 3):
        assert_written_alone(w, expected, start)


def test_given_output_that_does_not_fit(device):
    w = random_weight(4, 64, 4, 32, "affine", device=device)
    form = {"bits": 4, "group_size": 32, "in_features": 64}

    def refused(error, message, out, **more):
        with pytest.raises(error, match=message):
            ops.dequantize(*w.components, **form, **more, out=out)

    empty = torch.full((4, 64), 7.0, device=device)
    refused(ValueError, r"out must have shape \[4, 64\], got \[4, 65\]", torch.empty(4, 65))
    refused(ValueError, "out must be on the device of codes", torch.empty(4, 64, device="meta"))
    refused(ValueError, "out must be contiguous", torch.empty(64, 4, device=device).T)
    refused(ValueError, "must not require gradients", empty.clone().requires_grad_())
    refused(TypeError, "out must be float32, float16 or bfloat16", empty.int())
    refused(TypeError, "out must have the dtype torch.float16", empty, dtype=torch.float16)
    assert (empty == 7).all()
    op = torch.ops.mkrs.dequantize_into
    for out, message in (
        (torch.empty(4, 65, device=device), r"shape of codes with in_features \(64\) columns"),
        (torch.empty(64, 4, device=device).T, "must be contiguous"),
        (empty.int(), "must be float32, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"mkrs::dequantize_into: out .*{message}"):
            op(*w.components, 4, 32, 64, out)
    if device.type == "mps":
        out = torch.empty(4 * 64 + 1, device=device)[1:].view(4, 64)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            op(*w.components, 4, 32, 64, out)

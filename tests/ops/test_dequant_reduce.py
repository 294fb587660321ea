import numpy as np
import pytest
import torch
from cases import BITS, FLOATS, GROUPS, SCHEMES, SHAPES
from oracle import UNIT, dequantize32, magnitude64, random_weight

from mergekit_torch import ops
from mergekit_torch.ops.dequant_reduce import REDUCTIONS, reference


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_against_float64(reduction, bits, scheme, group_size, device):
    for i, (rows, k) in enumerate(SHAPES):
        w = random_weight(rows, k, bits, group_size, scheme, FLOATS[i % 3], device)
        got = ops.dequant_reduce(
            *w.components, bits=bits, group_size=w.group_size, in_features=k, reduction=reduction
        )
        assert got.shape == (rows,)
        assert got.dtype == torch.float32
        on_cpu = w.to(torch.device("cpu"))  # the reference needs float64, which mps lacks
        expected = reference(*on_cpu.components, bits, w.group_size, k, reduction)
        if not reduction.startswith("sum"):
            assert torch.equal(got.cpu(), expected)
            continue
        # Weights round once or twice, sums of K terms in float32, whatever way they are split.
        size = magnitude64(w)
        size = size if reduction == "sum" else size**2
        bound = (k + 8) * UNIT[torch.float32] * size.sum(-1)
        error = np.abs(got.cpu().double().numpy() - expected.double().numpy())
        assert (error <= bound).all()


def test_leading_dimensions_views_and_empty(device):
    w = random_weight((2, 3), 96, 4, 32, "affine", device=device)
    args = {"bits": 4, "group_size": 32, "in_features": 96}
    got = ops.dequant_reduce(*w.components, **args, reduction="amax")
    np.testing.assert_array_equal(got.cpu().numpy(), dequantize32(w).max(-1))
    parts = [None if t is None else t[:, 1:] for t in w.components]
    got = ops.dequant_reduce(*parts, **args, reduction="amin")
    np.testing.assert_array_equal(got.cpu().numpy(), dequantize32(w)[:, 1:].min(-1))
    w = random_weight(3, 0, 4, 16, "affine", device=device)
    empty = {"bits": 4, "group_size": 16, "in_features": 0}
    assert torch.equal(
        ops.dequant_reduce(*w.components, **empty, reduction="sum").cpu(), torch.zeros(3)
    )
    with pytest.raises(ValueError, match="amax needs in_features of at least 1, got 0"):
        ops.dequant_reduce(*w.components, **empty, reduction="amax")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_propagates(reduction, device):
    w = random_weight(4, 64, 4, 16, "affine")
    w.offset[2, 1] = float("nan")
    w = w.to(device)
    got = ops.dequant_reduce(
        *w.components, bits=4, group_size=16, in_features=64, reduction=reduction
    )
    assert got.cpu().isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inf_scales_and_rows_of_several_blocks(reduction, scheme, device):
    k = 9000
    for group_size in (256, k):
        w = random_weight(4, k, 4, group_size, scheme, torch.float32)
        w.scale[1, 0] = float("inf")
        w.scale[2, -1] = -3e38  # finite, times a code not
        expected = reference(*w.components, 4, w.group_size, k, reduction).double()
        size = magnitude64(w)
        size = size**2 if reduction == "sum_squares" else size
        bound = (k + 8) * UNIT[torch.float32] * size.sum(-1)
        w = w.to(device)
        got = ops.dequant_reduce(
            *w.components, bits=4, group_size=w.group_size, in_features=k, reduction=reduction
        )
        got = got.cpu().double()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())
        for row in (0, 3):
            error = abs(got[row] - expected[row])
            assert error <= (bound[row] if reduction.startswith("sum") else 0)

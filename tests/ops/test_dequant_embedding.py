import pytest
import torch
from cases import BITS, FLOATS, GROUPS, SCHEMES
from oracle import dequantize32, random_weight

from mergekit_torch import ops
from mergekit_torch.ops.dequant_embedding import reference


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_rows_are_bit_exact(bits, scheme, group_size, device):
    w = random_weight(50, 100, bits, group_size, scheme, device=device)
    table = torch.from_numpy(dequantize32(w))
    for index_dtype in (torch.int64, torch.int32):
        for shape in ((), (7,), (2, 3), (0,), (4, 0)):
            indices = torch.randint(0, 50, shape, dtype=index_dtype).to(device)
            for dtype in FLOATS:
                got = ops.dequant_embedding(
                    indices,
                    *w.components,
                    bits=bits,
                    group_size=w.group_size,
                    in_features=100,
                    dtype=dtype,
                )
                assert got.shape == (*shape, 100)
                assert torch.equal(got.cpu(), table[indices.cpu().long()].to(dtype))
    indices = torch.tensor([3, 49, 0], device=device)
    args = (indices, *w.components, bits, w.group_size, 100, torch.float16)
    assert torch.equal(torch.ops.mkrs.dequant_embedding(*args), reference(*args))


def test_many_rows_and_strided_indices(device):
    w = random_weight(300, 576, 4, 32, "affine", device=device)
    table = torch.from_numpy(dequantize32(w))
    indices = torch.randint(0, 300, (64, 10), device=device).t()[::2]
    got = ops.dequant_embedding(indices, *w.components, bits=4, group_size=32, in_features=576)
    assert torch.equal(got.cpu(), table[indices.cpu()])


@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_index_out_of_range(index):
    w = random_weight(50, 64, 4, 32, "affine")
    with pytest.raises(
        ValueError, match=rf"indices must be in \[0, 50\), got {index} at position 1"
    ):
        ops.dequant_embedding(
            torch.tensor([0, index]), *w.components, bits=4, group_size=32, in_features=64
        )

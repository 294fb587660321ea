"""``shard``: views that are cut where the format allows, and errors that say where."""

import itertools
from typing import Any

import pytest
import torch

from mergekit_torch import QuantizedTensor
from mergekit_torch.parallel import column_unit, shard, split_ranges

SCHEMES = ("symmetric", "asymmetric", "affine")


def quantized(shape: tuple[int, ...], bits: int, group_size: int, scheme: str) -> Any:
    return QuantizedTensor.from_float(torch.randn(shape), bits, group_size, scheme)


def in_storage(view: torch.Tensor, whole: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_views_that_add_up(bits: int, group_size: int, scheme: str) -> None:
    for shape in ((7, 200), (3, 5, 208)):
        whole = quantized(shape, bits, group_size, scheme)
        dense = whole.dequantize()
        for dim, world in itertools.product(range(len(shape)), (1, 2, 3)):
            parts = [shard(whole, dim, rank, world) for rank in range(world)]
            assert torch.equal(torch.cat([part.dequantize() for part in parts], dim), dense)
            for part in parts:
                for name, component in part.components.items():
                    assert in_storage(component, getattr(whole, name))
            # The transposed view is cut the same way.
            if len(shape) == 2:
                part = shard(whole.t(), 1 - dim, 0, world)
                assert torch.equal(part.dequantize(), parts[0].dequantize().t())


def test_uneven_by_whole_groups() -> None:
    whole = quantized((2, 5 * 64 + 20), 4, 64, "affine")
    assert [shard(whole, -1, r, 4).shape[1] for r in range(4)] == [128, 128, 64, 20]
    assert [shard(whole, -1, r, 2, sizes=[64, 276]).shape[1] for r in range(2)] == [64, 276]
    assert [shard(torch.arange(10), 0, r, 4).numel() for r in range(4)] == [3, 3, 2, 2]


def test_products_of_parts_add_up() -> None:
    whole = quantized((9, 448), 4, 64, "affine")
    x = torch.randn(3, 448)
    expected = torch.nn.functional.linear(x.double(), whole.dequantize().double())
    at, total = 0, torch.zeros(3, 9, dtype=torch.float64)
    for rank in range(3):
        part = shard(whole, 1, rank, 3)
        columns = part.shape[1]
        total += torch.nn.functional.linear(x[:, at : at + columns], part).double()
        at += columns
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, -1])
def test_padding(group_size: int, scheme: str) -> None:
    whole = quantized((5, 100), 4, group_size, scheme)
    dense, x = whole.dequantize(), torch.randn(2, 100)
    expected = torch.nn.functional.linear(x.double(), dense.double())
    for world in (1, 2, 3, 8):
        parts = [shard(whole, 1, rank, world, pad=True) for rank in range(world)]
        sizes = {part.shape for part in parts}
        assert len(sizes) == 1
        columns = parts[0].shape[1]
        padded = torch.nn.functional.pad(x, (0, world * columns - 100))
        total = sum(
            torch.nn.functional.linear(padded[:, r * columns : (r + 1) * columns], part).double()
            for r, part in enumerate(parts)
        )
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        rows = [shard(whole, 0, rank, world, pad=True) for rank in range(world)]
        stacked = torch.cat([row.dequantize() for row in rows])
        assert torch.equal(stacked[:5], dense)
        assert len({row.shape for row in rows}) == 1
        turned = [shard(whole.t(), 0, rank, world, pad=True) for rank in range(world)]
        assert all(torch.equal(a.t(), b) for a, b in zip(turned, parts, strict=True))
    plain = [shard(torch.arange(10).view(5, 2), 0, r, 3, pad=True) for r in range(3)]
    assert torch.cat(plain).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 0]]


def test_refusals() -> None:
    whole = quantized((4, 192), 4, 64, "affine")
    with pytest.raises(ValueError, match=r"192 has 3 aligned pieces of 64 .* at most 3 ranks"):
        shard(whole, 1, 0, 4)
    with pytest.raises(ValueError, match=r"cut at 96; the aligned cuts next to it are 64 and 128"):
        shard(whole, 1, 0, 2, sizes=[96, 96])
    with pytest.raises(ValueError, match="add up to 192"):
        shard(whole, 1, 0, 2, sizes=[64, 64])
    with pytest.raises(ValueError, match="both"):
        shard(whole, 1, 0, 2, sizes=[64, 128], pad=True)
    with pytest.raises(ValueError, match="at most 4 ranks"):
        shard(whole, 0, 0, 5)
    for dim, rank, world in ((2, 0, 1), (-3, 0, 1), (0, 2, 2), (0, -1, 2), (0, 0, 0)):
        with pytest.raises(IndexError):
            shard(whole, dim, rank, world)
    per_row = quantized((4, 10), 2, -1, "symmetric")
    with pytest.raises(ValueError, match="multiples of 4"):
        shard(per_row, 1, 0, 2, sizes=[5, 5])


def test_split_ranges() -> None:
    for size, world, unit in itertools.product((1, 7, 64, 100), (1, 2, 5), (1, 3, 32)):
        if -(-size // unit) < world:
            with pytest.raises(ValueError, match="at most"):
                split_ranges(size, world, unit)
            continue
        ranges = split_ranges(size, world, unit)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        assert all(a[1] == b[0] and a[1] % unit == 0 for a, b in itertools.pairwise(ranges))
        units = [-(-(b - a) // unit) for a, b in ranges]
        assert max(units) - min(units) <= 1
        assert min(units) >= 1
    assert column_unit(4, 64, 1000) == 64
    assert column_unit(2, 1000, 1000) == 4

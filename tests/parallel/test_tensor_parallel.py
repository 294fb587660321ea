"""Split modules and models compute what whole ones do."""

import copy
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel import style as torch_style

from mergekit_torch import (
    QuantizeConfig,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTensor,
    quantize_,
)
from mergekit_torch.parallel import ColwiseParallel, RowwiseParallel, tensor_parallel_
from mergekit_torch.parallel.plans import Heads, split_heads


def mesh() -> Any:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


class MLP(nn.Module):
    def __init__(self, hidden: int = 96, inner: int = 320, bias: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(50, hidden)
        self.up = nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)
        self.head = nn.Linear(hidden, 50, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(x + self.down(torch.nn.functional.silu(self.up(x))))


def mlp(scheme: str = "affine", bits: int = 4, group_size: int = 64, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    model = MLP()
    quantize_(model, QuantizeConfig(bits=bits, group_size=group_size, scheme=scheme))
    return model


PLAN = {
    "table": RowwiseParallel(input_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def check_parallelize_module(rank: int) -> None:
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    cases = [("affine", 4, 64), ("symmetric", 8, 16), ("asymmetric", 2, 32), ("affine", 4, -1)]
    for scheme, bits, group_size in cases:
        for source in (None, 0):
            whole = mlp(scheme, bits, group_size)
            expected = whole(ids)
            # With a source the other ranks' weights do not matter.
            model = mlp(scheme, bits, group_size, seed=0 if source is None else rank)
            parallelize_module(model, mesh(), dict(PLAN), src_data_rank=source)
            close(model(ids), expected)
            assert model.up.weight_codes.shape[0] < whole.up.weight_codes.shape[0]
            # The sum over ranks has the bias once.
            close(model.down(torch.zeros(1, model.down.in_features)), whole.down.bias[None])


@pytest.mark.parametrize("world", [2, 4])
def test_parallelize_module(world: int) -> None:
    run_ranks(world, check_parallelize_module)


def check_gradients(rank: int) -> None:
    ids = torch.randint(0, 50, (5,), generator=torch.Generator().manual_seed(2))
    whole, model = mlp(), mlp()
    tensor_parallel_(model, mesh(), dict(PLAN))
    grads = []
    for m in (whole, model):
        x = m.table(ids).detach().requires_grad_()
        y = m.head(x + m.down(torch.nn.functional.silu(m.up(x))))
        (y * torch.arange(250.0).view(5, 50) / 250).sum().backward()
        grads.append(x.grad)
    close(grads[1], grads[0])
    close(model.down.bias.grad, whole.down.bias.grad)
    part = model.up.part
    close(model.up.bias.grad, whole.up.bias.grad[part.start : part.stop])
    part = model.head.part
    close(model.head.bias.grad, whole.head.bias.grad[part.start : part.stop])


def test_gradients() -> None:
    run_ranks(2, check_gradients)


def check_layouts(rank: int) -> None:
    m = mesh()
    x = torch.randn(4, 8, 128, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    dense = nn.Linear(128, 64)
    whole = QuantizedLinear.from_linear(dense, group_size=32)
    expected = whole(x)
    rows = x.chunk(2, 1)[rank]

    def colwise(**kwargs: Any) -> Any:
        return parallelize_module(copy.deepcopy(whole), m, ColwiseParallel(**kwargs))

    def rowwise(**kwargs: Any) -> Any:
        return parallelize_module(copy.deepcopy(whole), m, RowwiseParallel(**kwargs))

    # Sequence parallel: rows of the input in, rows of the output out.
    close(colwise(input_layouts=Shard(1))(rows), expected.chunk(2, -1)[rank])
    close(rowwise(output_layouts=Shard(1))(x.chunk(2, -1)[rank]), expected.chunk(2, 1)[rank])
    close(rowwise(output_layouts=Shard(-1))(x.chunk(2, -1)[rank]), expected.chunk(2, -1)[rank])
    close(rowwise(input_layouts=Replicate())(x), expected)
    close(rowwise(input_layouts=Shard(1))(rows), expected)
    y = colwise(use_local_output=False)(x)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(2),)
    close(y.full_tensor(), expected)
    # What one hands out the other takes.
    second = QuantizedLinear.from_linear(nn.Linear(64, 32), group_size=16)
    parallelize_module(second, m, RowwiseParallel(use_local_output=False))
    z = second(y)
    assert isinstance(z, DTensor)
    assert z.placements == (Replicate(),)
    with pytest.raises(ValueError, match=r"input must be this rank's part \[\.\.\., 64\]"):
        rowwise()(x)
    table = QuantizedEmbedding.from_embedding(nn.Embedding(10, 96), group_size=32)
    ids = torch.tensor([[0, 9], [5, 4]])
    expected = table(ids)
    uneven = ((0, 64), (64, 96))[rank]
    got = parallelize_module(copy.deepcopy(table), m, ColwiseParallel(), src_data_rank=None)
    assert torch.equal(got(ids), expected[..., slice(*uneven)])
    gather = ColwiseParallel(output_layouts=Replicate())
    assert torch.equal(parallelize_module(copy.deepcopy(table), m, gather)(ids), expected)
    vocabulary = parallelize_module(copy.deepcopy(table), m, RowwiseParallel())
    assert torch.equal(vocabulary(ids), expected)
    for bad in (-1, 10):
        with pytest.raises(RuntimeError, match="ind"):
            vocabulary(torch.tensor([bad]))


def test_layouts() -> None:
    run_ranks(2, check_layouts)


def check_torch_styles(rank: int) -> None:
    """torch's own styles, on ordinary modules whose weights are QuantizedTensors."""
    m = mesh()
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 9], [5, 4]])
    for scheme in ("symmetric", "asymmetric", "affine"):
        for source in (None, 0):

            def layer(kind: Any, *size: int, group_size: int = 32) -> Any:
                # With a source the other ranks' weights do not matter.
                torch.manual_seed(0 if source is None else rank)  # noqa: B023
                module = kind(*size)
                weight = QuantizedTensor.from_float(
                    module.weight.detach(),
                    4,
                    group_size,
                    scheme,  # noqa: B023
                )
                module.weight = nn.Parameter(weight, requires_grad=False)
                return module

            torch.manual_seed(0)
            dense = nn.Linear(192, 64)
            weight = QuantizedTensor.from_float(dense.weight.detach(), 4, 32, scheme)
            expected = nn.functional.linear(x, weight, dense.bias)
            colwise = torch_style.ColwiseParallel()
            split = parallelize_module(layer(nn.Linear, 192, 64), m, colwise, src_data_rank=source)
            assert isinstance(split.weight.to_local(), QuantizedTensor)
            close(split(x), expected.chunk(2, -1)[rank])
            rowwise = torch_style.RowwiseParallel()
            split = parallelize_module(layer(nn.Linear, 192, 64), m, rowwise, src_data_rank=source)
            assert split.weight.to_local().in_features == 96
            close(split(x.chunk(2, -1)[rank]), expected)
            with pytest.raises(ValueError, match=r"must start at a multiple of 64"):
                parallelize_module(
                    layer(nn.Linear, 192, 64, group_size=64), m, rowwise, src_data_rank=source
                )
            torch.manual_seed(0)
            table = nn.Embedding(10, 64)
            whole = QuantizedTensor.from_float(table.weight.detach(), 4, 32, scheme)
            vocabulary = torch_style.RowwiseParallel(input_layouts=Replicate())
            split = parallelize_module(
                layer(nn.Embedding, 10, 64), m, vocabulary, src_data_rank=source
            )
            assert torch.equal(split(ids), nn.functional.embedding(ids, whole))


def test_torch_styles() -> None:
    run_ranks(2, check_torch_styles)


def check_refusals(rank: int) -> None:
    m = mesh()
    layer = QuantizedLinear(192, 8, group_size=64)
    # torch's own styles do not slice what they do not know.
    for style in (torch_style.ColwiseParallel(), torch_style.RowwiseParallel()):
        with pytest.raises(NotImplementedError):
            parallelize_module(layer, m, style)
    with pytest.raises(ValueError, match=r"group_size=64.*multiples of 64.*at most 3 ranks"):
        parallelize_module(layer, m, RowwiseParallel())
    assert type(layer) is QuantizedLinear
    with pytest.raises(ValueError, match="at most 2 ranks"):
        parallelize_module(QuantizedLinear(64, 2), m, ColwiseParallel())
    model = mlp()
    for plan, message in (
        ({"nothing.*": "colwise"}, "matches none"),
        ({"up": "sideways"}, "must be among"),
        ({"up": "colwise", "table": "colwise"}, "table: in_features"),
    ):
        with pytest.raises(ValueError, match=message):
            tensor_parallel_(model, m, plan)
        assert type(model.up) is QuantizedLinear
    tensor_parallel_(model, m, {"up": torch_style.ColwiseParallel(), "down": "rowwise"})
    with pytest.raises(ValueError, match="parallel already"):
        tensor_parallel_(model, m, {"up": "colwise"})


def test_refusals() -> None:
    run_ranks(4, check_refusals)


def check_compile(rank: int) -> None:
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    whole, model = mlp(), mlp()
    tensor_parallel_(model, mesh(), dict(PLAN))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(ids), whole(ids))
    # And with gradients.
    x = torch.randn(4, 96, requires_grad=True)
    layers = nn.Sequential(model.up, nn.SiLU(), model.down)
    expected = torch.autograd.grad(layers(x).square().sum(), x)[0]
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


def test_compile() -> None:
    run_ranks(2, check_compile)


@pytest.mark.parametrize(
    ("heads", "world", "unit", "queries", "keys"),
    [
        ((32, 8, 128), 2, 64, ((0, 16), (16, 32)), ((0, 4), (4, 8))),
        ((9, 3, 64), 2, 64, ((0, 6), (6, 9)), ((0, 2), (2, 3))),
        ((9, 3, 64), 4, 64, ((0, 2), (2, 3), (3, 6), (6, 9)), ((0, 1), (0, 1), (1, 2), (2, 3))),
        ((8, 8, 64), 2, 256, ((0, 4), (4, 8)), ((0, 4), (4, 8))),
        ((12, 12, 64), 4, 128, ((0, 4), (4, 8), (8, 10), (10, 12)), None),
    ],
)
def test_split_heads(heads: Any, world: int, unit: int, queries: Any, keys: Any) -> None:
    got = split_heads(Heads(*heads), world, unit)
    assert got == (queries, queries if keys is None else keys)


def test_split_heads_refusals() -> None:
    with pytest.raises(ValueError, match="at most 9 ranks"):
        split_heads(Heads(9, 3, 64), 10, 64)
    with pytest.raises(ValueError, match=r"multiples of 256 columns, so at most 2 ranks"):
        split_heads(Heads(8, 8, 64), 4, 256)

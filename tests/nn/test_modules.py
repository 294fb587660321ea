"""QuantizedLinear and QuantizedEmbedding against their dense counterparts."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import BITS, FLOATS, SCHEMES, SHAPES
from torch import nn

from mergekit_torch import QuantizedEmbedding, QuantizedLinear, QuantizedTensor

BUFFERS = ("weight_codes", "weight_scale", "weight_zero_point", "weight_offset")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Tied(nn.Module):
    def __init__(self, rows=24, columns=100, **kwargs):
        super().__init__()
        self.embed = QuantizedEmbedding.from_embedding(nn.Embedding(rows, columns), **kwargs)
        self.head = QuantizedLinear.from_quantized(self.embed.weight)

    def tied(self):
        return all(self.embed._buffers[b] is self.head._buffers[b] for b in BUFFERS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_equals_dense(dtype, bits, scheme):
    for rows, k in SHAPES[:7]:
        dense = nn.Linear(k, rows, dtype=dtype)
        module = QuantizedLinear.from_linear(dense, bits, 32, scheme)
        w, bias = module.weight.dequantize(torch.float32).double(), dense.bias.double()
        for shape in ((k,), (0, k), (1, k), (5, k), (2, 3, k)):
            x = torch.randn(shape).to(dtype)
            y = module(x)
            assert y.dtype == dtype
            magnitude = x.double().abs() @ w.abs().T + bias.abs()
            bound = magnitude * ((k + 4) * 2.0**-24 + 2 * UNIT[dtype]) + 1e-7
            assert bool(((y.double() - (x.double() @ w.T + bias)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_equals_dense(dtype, scheme):
    dense = nn.Embedding(30, 70, padding_idx=-3, dtype=dtype)
    module = QuantizedEmbedding.from_embedding(dense, 4, 16, scheme)
    assert module.padding_idx == dense.padding_idx == 27
    assert not bool(module.weight[27].dequantize().any())
    for index in (torch.tensor([[1, 29], [0, 27]]), torch.tensor(3, dtype=torch.int32)):
        out = module(index)
        assert out.dtype == dtype
        assert torch.equal(out, F.embedding(index, module.weight.dequantize()))
    with pytest.raises(RuntimeError, match="30"):
        module(torch.tensor([30]))


def test_constructor_and_repr():
    module = QuantizedLinear(100, 24, bias=False, bits=8, group_size=-1, scheme="symmetric")
    assert not bool(module.weight.dequantize().any())
    assert torch.equal(module(torch.ones(2, 100)), torch.zeros(2, 24))
    assert "in_features=100, out_features=24, bias=False, bits=8, group_size=100" in repr(module)
    assert "compute='int8'" in repr(QuantizedLinear(4, 4, compute="int8"))
    meta = QuantizedEmbedding(10, 20, 3, device="meta", dtype=torch.bfloat16)
    assert meta.weight_scale.dtype == torch.bfloat16
    assert all(b.is_meta for b in meta.buffers())
    assert repr(meta).startswith("QuantizedEmbedding(10, 20, padding_idx=3, bits=4")
    assert meta(torch.zeros(2, dtype=torch.long, device="meta")).shape == (2, 20)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: QuantizedLinear(4, 4, bits=3), ValueError, "bits"),
        (lambda: QuantizedLinear(100, 4, group_size=48), ValueError, "48"),
        (lambda: QuantizedLinear(100, 4, scheme="nf4"), ValueError, "nf4"),
        (lambda: QuantizedLinear(4, 4, dtype=torch.float64), TypeError, "float64"),
        (lambda: QuantizedLinear(4, 4, scale_dtype=torch.int8), TypeError, "int8"),
        (lambda: QuantizedLinear(4, 4, compute="fast"), ValueError, "fast"),
        (lambda: QuantizedLinear(-1, 4), ValueError, "-1"),
        (lambda: QuantizedEmbedding(4, 4, 9), ValueError, "padding_idx"),
        (lambda: QuantizedLinear.from_quantized(torch.ones(2, 2)), TypeError, "Tensor"),
        (
            lambda: QuantizedLinear.from_quantized(
                QuantizedTensor.from_float(torch.ones(2, 16)).t()
            ),
            ValueError,
            "transposed",
        ),
        (
            lambda: QuantizedLinear.from_quantized(
                QuantizedTensor.from_float(torch.ones(2, 16)), torch.ones(3)
            ),
            ValueError,
            "bias",
        ),
        (
            lambda: QuantizedEmbedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0)),
            ValueError,
            "max_norm",
        ),
    ],
)
def test_bad_arguments(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_weight_is_a_view_and_can_be_replaced():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24))
    assert module.weight.codes is module.weight_codes
    other = QuantizedTensor.from_float(torch.randn(24, 100), 8, 32, "symmetric")
    module.weight = other
    assert (module.bits, module.group_size, module.scheme) == (8, 32, "symmetric")
    assert module.weight_offset is None
    assert set(module.state_dict()) == {"bias", "weight_codes", "weight_scale"}
    module.weight = nn.Parameter(other, requires_grad=False)
    with pytest.raises(TypeError, match="from_float"):
        module.weight = nn.Parameter(torch.randn(24, 100))
    with pytest.raises(ValueError, match="shape"):
        module.weight = QuantizedTensor.from_float(torch.randn(23, 100))


def test_gradients():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24))
    x = torch.randn(5, 100, requires_grad=True)
    module(x).square().sum().backward()
    w, b = module.weight.dequantize(), module.bias.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    F.linear(x2, w, b).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    # The bias alone, and frozen.
    module.zero_grad()
    module(x.detach()).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((24,), 5.0))
    module.requires_grad_(False)
    assert not module(x.detach()).requires_grad
    with torch.no_grad():
        assert not module(x).requires_grad


def test_bias_takes_the_dtype_of_the_input():
    module = QuantizedLinear.from_linear(nn.Linear(64, 5))
    assert module(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_conversion_of_dtype_leaves_the_weight_alone(dtype, scale_dtype):
    model = Tied(scale_dtype=scale_dtype)
    before = [None if b is None else b.clone() for b in model.embed._buffers.values()]
    model.to(dtype)
    assert model.tied()
    for old, new in zip(before, model.embed._buffers.values(), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert model.embed.dtype == model.head.weight.dtype == dtype
    assert model.embed(torch.tensor([1])).dtype == dtype


def test_conversions_that_would_corrupt_are_refused():
    model = Tied()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="float64"):
        model.double()
    with pytest.raises(TypeError, match="cast"):
        model.type(torch.float16)
    assert model.tied()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
        assert value.dtype == state[name].dtype


def test_ties_survive():
    model = Tied()
    for moved in (model.half(), model.to("meta"), model.to_empty(device="cpu"), model.float()):
        assert moved.tied()
    model = Tied()
    twin = copy.deepcopy(model)
    assert twin.tied()
    assert twin.embed.weight_codes is not model.embed.weight_codes
    assert model.share_memory().tied()
    assert model.embed.weight_scale.is_shared()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.tied()
    loaded.load_state_dict(Tied().state_dict())
    assert loaded.tied()
    # One module alone: the other keeps what it had.
    model.embed.to("meta")
    assert not model.head.weight_codes.is_meta


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_is_bit_equal(scheme, assign):
    dense = nn.Linear(100, 24)
    module = QuantizedLinear.from_linear(dense, 4, 32, scheme, torch.float32)
    state = module.state_dict()
    other = QuantizedLinear(100, 24, group_size=32, scheme=scheme, scale_dtype=torch.float32)
    other.load_state_dict(state, assign=assign)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(other(torch.ones(2, 100)), module(torch.ones(2, 100)))


def test_plain_checkpoints_load():
    dense = nn.Linear(100, 24)
    module = QuantizedLinear(100, 24, bits=8)
    state = dense.state_dict()
    assert not any(module.load_state_dict(state))
    assert set(state) == {"weight", "bias"}
    assert torch.equal(module.weight, QuantizedLinear.from_linear(dense, 8).weight)
    model = nn.ModuleDict({"a": QuantizedLinear(100, 24), "e": QuantizedEmbedding(24, 100)})
    plain = nn.ModuleDict({"a": dense, "e": nn.Embedding(24, 100)})
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model["e"].weight, QuantizedEmbedding.from_embedding(plain["e"]).weight)
    quantized = {"weight": QuantizedTensor.from_float(dense.weight.detach()), "bias": dense.bias}
    QuantizedLinear(100, 24).load_state_dict(quantized)


def test_loading_refuses():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24))
    state = module.state_dict()
    dense = nn.Linear(100, 24).state_dict()
    nan = {**dense, "weight": torch.full((24, 100), float("nan"))}
    for bad, words in (
        ({**state, **dense}, "plain weight and quantized"),
        (nan, "finite"),
        ({**dense, "weight": torch.ones(24, 99)}, r"\(24, 100\)"),
        ({**state, "weight_scale": state["weight_scale"].float()}, "weight_scale: dtype"),
        ({**state, "weight_codes": state["weight_codes"].int()}, "weight_codes: dtype"),
        ({k: v for k, v in state.items() if k != "weight_offset"}, "Missing.*weight_offset"),
        ({**state, "weight_zero_point": state["weight_codes"]}, "Unexpected.*zero_point"),
        ({**dense, "weight": QuantizedTensor.from_float(dense["weight"], 8)}, "bits=8"),
    ):
        before = module.weight.clone()
        with pytest.raises(RuntimeError, match=words):
            module.load_state_dict(bad)
        assert torch.equal(module.weight, before) or "Missing" in words or "Unexp" in words


def test_to_dense():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24).eval())
    dense = module.to_linear(torch.bfloat16)
    assert dense.weight.dtype == dense.bias.dtype == torch.bfloat16
    assert not dense.training
    embedding = QuantizedEmbedding.from_embedding(nn.Embedding(9, 20, 2)).to_embedding()
    assert embedding.padding_idx == 2


def test_compile_fullgraph():
    torch._dynamo.reset()
    model = nn.Sequential(
        QuantizedEmbedding.from_embedding(nn.Embedding(24, 100)),
        QuantizedLinear.from_linear(nn.Linear(100, 24)),
    )
    call = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for n in (2, 5):
            with mode():
                index = torch.arange(n)
                torch.testing.assert_close(call(index), model(index))
    call(torch.arange(3)).sum().backward()
    assert torch.equal(model[1].bias.grad, torch.full((24,), 3.0))
    torch._dynamo.reset()


def test_export():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24)).requires_grad_(False)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (torch.randn(3, 100),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 100)
    torch.testing.assert_close(program.module()(x), module(x))


def test_functional_call():
    module = QuantizedLinear.from_linear(nn.Linear(100, 24))
    bias = torch.zeros(24)
    x = torch.randn(2, 100)
    got = torch.func.functional_call(module, {"bias": bias}, (x,))
    torch.testing.assert_close(got, module(x) - module.bias, rtol=1e-4, atol=1e-5)

"""QuantizedTensor under torch.compile, without graph breaks."""

import pytest
import torch
import torch.nn.functional as F
from test_quantized_tensor import quantized

from mergekit_torch import QuantizedTensor


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(call, **options):
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "affine"])
def test_products(scheme):
    q, x = quantized(24, 128, scheme=scheme), torch.randn(3, 128)

    def call(x, w):
        y = F.linear(x, w, torch.ones(24)) + (x @ w.T).view(1, 3, 24)
        y = y + F.linear(x[:, :64], w[:, :64]) + F.linear(x.view(1, 3, 128), w * 0.5)
        return y @ w[:, 64:], F.embedding(torch.tensor([1, 2]), w), w.sum(1), w.norm(), w.amax()

    for got, want in zip(compiled(call)(x, q), call(x, q), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w * 0.5,
        lambda w: -w,
        lambda w: w.clone(),
        lambda w: w.to(torch.float16),
        lambda w: w[torch.tensor([1, 2])],
        lambda w: w,
    ],
)
def test_returns_quantized(call):
    q = quantized(24, 128)
    got, want = compiled(call)(q), call(q)
    assert isinstance(got, QuantizedTensor)
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    assert torch.equal(got, want)


def test_arithmetic_and_dequantize():
    q, x = quantized(24, 128), torch.randn(24, 128)

    def call(w, x):
        return w + x, w > 0, w.dequantize(), w.sum(0)

    for got, want in zip(compiled(call)(q, x), call(q, x), strict=True):
        assert torch.equal(got, want)


def test_dynamic_shapes():
    q = quantized(24, 128)
    call = compiled(lambda x, w: F.linear(x, w), dynamic=True)
    for rows in (2, 5, 7):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(call(x, q), F.linear(x, q))
    for rows in (24, 20, 16):
        torch.testing.assert_close(call(x, q[:rows]), F.linear(x, q[:rows]))


def test_module_with_quantized_parameter_trains_its_bias():
    module = torch.nn.Linear(128, 24)
    module.weight = torch.nn.Parameter(quantized(24, 128), requires_grad=False)
    grads = []
    for call in (module, compiled(module)):
        module.zero_grad()
        x = torch.linspace(-1, 1, 384).view(3, 128).requires_grad_()
        call(x).square().sum().backward()
        grads.append((x.grad, module.bias.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1])


def test_inductor():
    q, x = quantized(24, 128), torch.randn(3, 128)
    call = torch.compile(lambda x, w: F.relu(F.linear(x, w)), fullgraph=True)
    torch.testing.assert_close(call(x, q), F.relu(F.linear(x, q)))

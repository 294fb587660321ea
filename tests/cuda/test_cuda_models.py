"""Modules, tensors, compilation and generation on a CUDA device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import tiny_llama

from mergekit_torch import QuantizeConfig, QuantizedTensor, dequantize_, quantize_

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device and a build with MKRS_CUDA=1"
)


def layers(dtype=torch.bfloat16):
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)
    )
    return model.to("cuda", dtype)


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_a_tensor_moves_and_multiplies():
    weight = torch.randn(96, 512)
    on_cpu = QuantizedTensor.from_float(weight, 4, 64)
    q = on_cpu.to("cuda")
    assert torch.equal(q.dequantize().cpu(), on_cpu.dequantize())
    x = torch.randn(5, 512, device="cuda")
    assert relative(F.linear(x, q), F.linear(x.double(), q.dequantize().double())) < 1e-5


def test_quantize_and_dequantize_a_model_on_the_device():
    model = layers()
    quantize_(model, QuantizeConfig(bits=8, group_size=64))
    dense = copy.deepcopy(model)
    dequantize_(dense)
    for m in (1, 9, 40, 300, 2000):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        assert relative(model(x), dense(x)) < 1e-2
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).float().sum().backward()
    dense(y).float().sum().backward()
    assert relative(x.grad, y.grad) < 2e-2


def test_inductor_compiles_without_graph_breaks():
    model = layers()
    quantize_(model)
    compiled = torch.compile(model, fullgraph=True)
    for m in (1, 8):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            assert relative(compiled(x), model(x)) < 1e-2


def test_a_language_model_generates():
    model = tiny_llama(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2
    ).to("cuda", torch.bfloat16)
    quantize_(model)
    dense = copy.deepcopy(model)
    dequantize_(dense)
    prompt = torch.arange(1, 20, device="cuda")[None]
    with torch.no_grad():
        assert relative(model(prompt).logits, dense(prompt).logits) < 4e-2
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        first = model.generate(prompt, **options)
        assert torch.equal(first, model.generate(prompt, **options))
    assert first.shape == (1, 19 + 12)

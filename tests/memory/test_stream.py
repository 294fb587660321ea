import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mergekit_torch import nn as mnn
from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
from mergekit_torch.memory import BudgetError, StreamedModel, stream
from mergekit_torch.quantize_ import QuantizeConfig, quantize_
from mergekit_torch.tensor import QuantizedTensor

WIDTH, HIDDEN, LAYERS, VOCAB = 96, 256, 6, 200


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.randn(WIDTH))  # of a module that has children too

    def forward(self, x):
        return x + self.gain * self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("ramp", torch.linspace(0, 1, WIDTH), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids):
        return self.head(self.features(self.embed(ids)) + self.shift * self.ramp)


def saved(tmp_path, model):
    path = tmp_path / "model.safetensors"
    state = dict(model.state_dict())
    if isinstance(model, Model) and model.head.weight is model.embed.weight:
        del state["head.weight"]
    save_checkpoint(state, path)
    return path


def meta_model(**arguments):
    with torch.device("meta"):
        model = Model(**arguments).eval()
    model.ramp = torch.linspace(0, 1, WIDTH)
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


IDS = torch.arange(12).view(2, 6) * 7 % VOCAB
BUDGET = 300 << 10  # the largest module takes 100 KB, the whole model 1.3 MB


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_streaming_equals_the_model_in_memory(tmp_path, model, backend):
    expected = model(IDS)
    path = saved(tmp_path, model)
    with stream(meta_model(), path, budget=BUDGET, backend=backend) as streamed:
        assert isinstance(streamed, StreamedModel)
        for _ in range(4):
            assert torch.equal(streamed(IDS), expected)
        stats = streamed.stats()
        assert stats.peak <= BUDGET
        assert stats.evictions > 0
        assert all(p.device.type == "meta" for p in streamed.model.parameters())
        assert sum(p.numel() * 4 for p in model.parameters()) > 4 * BUDGET
    assert all(p.device.type == "meta" for p in streamed.model.parameters())
    assert torch.equal(streamed.model.ramp, model.ramp)


def test_kept_weights_are_not_read_again(tmp_path, model):
    path = saved(tmp_path, model)
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with stream(meta_model(), path, budget=600 << 10) as streamed:
        streamed(IDS)
        streamed(IDS)
        before = streamed.stats().bytes_read
        for _ in range(4):
            streamed(IDS)
        read = (streamed.stats().bytes_read - before) / 4
        assert read < 0.8 * total
    with stream(meta_model(), path, budget="8MiB") as streamed:
        streamed(IDS)
        before = streamed.stats().bytes_read
        streamed(IDS)
        assert streamed.stats().bytes_read == before


def test_prefetching_is_ahead_of_the_modules(tmp_path, model):
    path = saved(tmp_path, model)
    with stream(meta_model(), path, budget=600 << 10) as streamed:
        for _ in range(3):
            streamed(IDS)
        stats = streamed.stats()
        assert stats.prefetch_used > 0


def test_tied_weights_are_one(tmp_path, model):
    path = saved(tmp_path, model)
    assert "head.weight" not in open_checkpoint(path)
    with stream(meta_model(), path, budget="8MiB") as streamed:
        streamed(IDS)
        assert streamed.model.head.weight is streamed.model.embed.weight
        assert streamed.stats().entries == len(open_checkpoint(path))


def test_gradients_of_inputs(tmp_path, model):
    path = saved(tmp_path, model)
    x = torch.randn(3, WIDTH)
    gradients = []
    with stream(meta_model(), path, budget=BUDGET) as streamed:
        for features in (model.features, None):
            y = x.clone().requires_grad_()
            # Called below the root: the order is looked up module by module.
            out = (features or streamed.features)(y)
            (out * torch.arange(WIDTH)).sum().backward()
            gradients.append(y.grad)
        assert streamed.stats().peak <= BUDGET
    assert torch.equal(*gradients)


@pytest.mark.parametrize("scheme", ["affine", "symmetric", "asymmetric"])
def test_quantized_modules(tmp_path, model, scheme):
    quantized = copy.deepcopy(model)
    quantize_(quantized, QuantizeConfig(bits=4, group_size=32, scheme=scheme))
    assert isinstance(quantized.blocks[0].up, mnn.QuantizedLinear)
    path = tmp_path / "q.safetensors"
    weights = {}
    for name, module in quantized.named_modules():
        if isinstance(module, mnn.QuantizedModule):
            weights[f"{name}.weight"] = module.weight
    plain = {k: v for k, v in quantized.state_dict().items() if ".weight_" not in k}
    weights.pop("head.weight")
    save_checkpoint({**plain, **weights}, path)
    expected = quantized(IDS)
    empty = copy.deepcopy(quantized).to("meta")
    for name in mnn.module.BUFFERS:  # torch unties what moves to meta
        empty.head._buffers[name] = empty.embed._buffers[name]
    empty.ramp = model.ramp.clone()
    with stream(empty, path, budget=100 << 10) as streamed:
        for _ in range(3):
            assert torch.equal(streamed(IDS), expected)
        assert streamed.stats().peak <= 100 << 10
        x = torch.randn(2, WIDTH)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        streamed.features(a).sum().backward()
        quantized.features(b).sum().backward()
        assert torch.equal(a.grad, b.grad)


def test_plain_modules_compute_with_quantized_weights(tmp_path, model):
    weights = dict(model.state_dict())
    del weights["head.weight"]
    for name in list(weights):
        if name.endswith(("up.weight", "down.weight")):
            weights[name] = QuantizedTensor.from_float(weights[name], 8, 32)
    path = tmp_path / "mixed.safetensors"
    save_checkpoint(weights, path)
    dense = copy.deepcopy(model)
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            dense.get_parameter(name).copy_(weight.dequantize())
    with stream(meta_model(), path, budget="8MiB") as streamed:
        torch.testing.assert_close(streamed(IDS), dense(IDS), rtol=1e-4, atol=1e-4)


def test_weights_are_let_go_of_when_forward_raises(tmp_path, model):
    path = saved(tmp_path, model)
    with stream(meta_model(), path, budget=BUDGET) as streamed:
        expected = model(IDS)
        with pytest.raises(IndexError):
            streamed(torch.tensor([VOCAB + 5]))
        assert all(p.device.type == "meta" for p in streamed.model.parameters())
        assert torch.equal(streamed(IDS), expected)


def test_models_in_memory_lose_their_weights_to_the_stream(tmp_path, model):
    expected = model(IDS)
    with stream(model, saved(tmp_path, model), budget=BUDGET) as streamed:
        assert model.head.weight.device.type == "meta"
        assert torch.equal(streamed(IDS), expected)


def test_a_shared_module_and_recursion(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x, again=True):
            x = self.inner(self.inner(x)) * self.scale
            return self(x, again=False) if again else x

    module = Twice().requires_grad_(False)
    x = torch.randn(3, 8)
    expected = module(x)
    path = saved(tmp_path, module)
    with stream(copy.deepcopy(module).to("meta"), path, budget="64KiB") as streamed:
        for _ in range(3):
            assert torch.equal(streamed(x), expected)


def test_what_does_not_fit_is_said(tmp_path, model):
    path = saved(tmp_path, model)

    def check(error, match, build=meta_model, **arguments):
        empty = build()
        before = dict(empty.named_parameters())
        with pytest.raises(error, match=match):
            stream(empty, path, **{"budget": "1MiB", **arguments})
        assert all(before[k] is v for k, v in empty.named_parameters())  # untouched

    check(KeyError, "head.weight", lambda: meta_model(tied=False))
    check(ValueError, "dtype torch.bfloat16", lambda: meta_model().to(torch.bfloat16))
    check(BudgetError, "needs .* bytes of weights at once", budget="50KiB")
    check(KeyError, "ramp .not persistent", lambda: Model().to("meta"))

    def other():
        empty = meta_model()
        empty.blocks[2].up = nn.Linear(WIDTH, HIDDEN + 1, device="meta")
        return empty

    check(ValueError, r"blocks.2.up.weight: the model has shape \[257, 96\]", other)
    with pytest.raises(FileNotFoundError):
        stream(meta_model(), tmp_path / "none")


def test_a_quantized_module_of_another_format_is_refused(tmp_path):
    path = tmp_path / "q.safetensors"
    save_checkpoint({"weight": QuantizedTensor.from_float(torch.randn(8, 64), 4, 32)}, path)
    module = mnn.QuantizedLinear(64, 8, bias=False, bits=4, group_size=16, device="meta")
    with pytest.raises(ValueError, match="bits, group_size and scheme"):
        stream(module, path)

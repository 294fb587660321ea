"""quantize_, its config and report, and dequantize_."""

import json

import pytest
import torch
from torch import nn

from mergekit_torch import (
    QuantizeConfig,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTensor,
    dequantize_,
    quantize_,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 40, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.odd = nn.Linear(40, 7, bias=False)
        self.one = nn.Linear(7, 1)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.Parameter(torch.randn(2, 8, 40))
        self.norm = nn.LayerNorm(40)

    def forward(self, index):
        x = self.embed(index)
        for layer in self.layers:
            x = self.norm(x + layer(x).relu())
        return self.head(x), self.one(self.odd(x))


def dense_copy(model, quantized):
    """``model`` with every quantized weight's dequantized values."""
    state = {}
    for name, module in quantized.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            state[f"{name}.weight"] = module.weight.dequantize()
    model.load_state_dict(state, strict=False)
    return model


def test_quantizes_everything_and_reports():
    torch.manual_seed(1)
    model = Model().eval()
    torch.manual_seed(1)
    reference = Model().eval()
    report = quantize_(model)
    names = {name for layer in report.layers for name in layer.names}
    assert names == {"embed", "head", "odd", "one", "layers.0", "layers.1", "layers.2"}
    assert all(
        isinstance(model.get_submodule(n), (QuantizedLinear, QuantizedEmbedding)) for n in names
    )
    assert not model.layers[0].training
    assert model.embed.padding_idx == 0
    tied = next(layer for layer in report.layers if "embed" in layer.names)
    assert tied.names == ("embed", "head")
    assert model.head.weight_codes is model.embed.weight_codes
    assert (tied.bytes_before, tied.shape) == (50 * 40 * 4, (50, 40))
    assert tied.bytes_after == model.embed.weight.nbytes
    (kept,) = report.kept
    assert (kept.name, kept.shape, kept.bytes) == ("experts", (2, 8, 40), 2 * 8 * 40 * 4)
    assert report.bytes_before > report.bytes_after
    total = sum(8 * layer.bytes_after for layer in report.layers)
    elements = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bits_per_weight == total / elements
    text = str(report)
    for part in ("embed = head", "50x40", "4-bit affine g64", "kept: ", "6 weights quantized"):
        assert part in text
    index = torch.tensor([[1, 2, 49]])
    for got, want in zip(model(index), dense_copy(reference, model)(index), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_overrides_skip_and_flags():
    model = Model()
    config = QuantizeConfig(
        bits=8,
        group_size=-1,
        overrides={
            "layers.*": {"bits": 2, "group_size": 16},
            "layers.1": {"scheme": "symmetric", "scale_dtype": "float32", "compute": "int8"},
        },
        skip=["odd"],
    )
    report = quantize_(model, config)
    assert (model.layers[0].bits, model.layers[0].group_size) == (2, 16)
    one = model.layers[1]
    assert (one.bits, one.scheme, one.compute) == (2, "symmetric", "int8")
    assert one.weight_scale.dtype == torch.float32
    assert (model.one.bits, model.one.group_size) == (8, 7)
    assert type(model.odd) is nn.Linear
    assert {k.name: k.reason for k in report.kept}["odd.weight"] == "skipped by the config"
    model = Model()
    model.head.weight = nn.Parameter(torch.randn(50, 40))
    quantize_(model, QuantizeConfig(embedding=False))
    assert type(model.embed) is nn.Embedding
    assert type(model.head) is QuantizedLinear


def test_progress(capsys):
    quantize_(Model(), progress=True)
    assert "100%" in capsys.readouterr().err


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "config", "error", "words"),
    [
        (lambda m: None, QuantizeConfig(skip=["nothing*"]), ValueError, "nothing"),
        (lambda m: None, QuantizeConfig(overrides={"x": {"bits": 8}}), ValueError, "'x'"),
        (lambda m: None, QuantizeConfig(skip=["head"]), ValueError, "skip both or neither"),
        (lambda m: None, QuantizeConfig(embedding=False), ValueError, "both or neither"),
        (
            lambda m: None,
            QuantizeConfig(overrides={"head": {"bits": 8}}),
            ValueError,
            "embed and head",
        ),
        (
            lambda m: m.layers[2].weight.data[3, 4].fill_(float("nan")),
            None,
            ValueError,
            "layers.2.weight must be finite",
        ),
        (
            lambda m: m.one.weight.data[0, 0].fill_(float("-inf")),
            None,
            ValueError,
            "one.weight must be finite",
        ),
        (
            lambda m: m.odd.weight.data[0, 0].fill_(1e9),
            None,
            ValueError,
            "odd.weight: .*scale_dtype",
        ),
        (lambda m: m.odd.double(), None, TypeError, "odd.weight must be"),
    ],
)
def test_refuses_before_touching_anything(change, config, error, words):
    model = Model()
    change(model)
    before, modules = state_of(model), list(model.modules())
    with pytest.raises(error, match=words):
        quantize_(model, config)
    assert list(model.modules()) == modules
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_large_values_with_float32_scales():
    model = Model()
    model.odd.weight.data[0, 0] = 1e9
    quantize_(model, QuantizeConfig(scale_dtype=torch.float32))
    assert float(model.odd.weight.amax()) == pytest.approx(1e9)


def test_a_layer_itself_is_refused():
    with pytest.raises(TypeError, match="from_linear"):
        quantize_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="to_linear"):
        dequantize_(QuantizedLinear(4, 4))
    with pytest.raises(TypeError, match="float64"):
        dequantize_(Model(), torch.float64)


def test_layers_that_are_not_plain_are_reported():
    class Scaled(nn.Embedding):
        def forward(self, index):
            return super().forward(index) * 2

    model = nn.Module()
    model.scaled = Scaled(5, 16)
    model.normed = nn.Embedding(5, 16, max_norm=1.0)
    model.attention = nn.MultiheadAttention(16, 2)
    model.weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model.patched = nn.Linear(16, 16)
    model.patched.forward = lambda x: x
    report = quantize_(model)
    assert not report.layers
    reasons = " ".join(k.reason for k in report.kept)
    for part in ("forward of its own", "max_norm", "parent reads", "parametrized", "instance"):
        assert part in reasons


def test_shared_module_and_hooks():
    model = nn.Module()
    model.a = model.b = nn.Linear(16, 16)
    seen = []
    model.a.register_forward_hook(lambda *args: seen.append(1))
    quantize_(model)
    assert model.a is model.b
    model.a(torch.ones(1, 16))
    assert seen == [1]


def test_old_weights_are_freed_one_at_a_time():
    import weakref

    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    original, alive = QuantizedTensor.from_float, []

    def watched(weight, *args, **kwargs):
        alive.append(sum(w() is not None for w in weights))
        return original(weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedTensor, "from_float", staticmethod(watched))
        quantize_(model)
    assert alive == [4, 3, 2, 1]
    assert not any(w() is not None for w in weights)


def test_meta_model():
    with torch.device("meta"):
        model = Model()
    quantize_(model)
    assert all(b.is_meta for b in model.buffers())
    source = Model()
    quantize_(source)
    model.load_state_dict(source.state_dict(), assign=True)
    index = torch.tensor([1, 2])
    assert torch.equal(model(index)[1], source(index)[1])


def test_dequantize():
    model = Model()
    quantize_(model, QuantizeConfig(bits=8))
    index = torch.tensor([[1, 2, 49]])
    want = model(index)
    names = dequantize_(model)
    assert set(names) >= {"embed", "head", "odd"}
    assert model.head.weight is model.embed.weight
    assert type(model.odd) is nn.Linear
    for got, expected in zip(model(index), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    quantize_(model)
    dequantize_(model, torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16


def test_config_round_trip():
    config = QuantizeConfig(
        bits=2,
        scale_dtype=torch.bfloat16,
        overrides={"a.*": {"scale_dtype": torch.float32, "bits": 8}},
        skip=("b",),
        embedding=False,
    )
    text = config.to_json()
    assert json.loads(text)["overrides"] == {"a.*": {"scale_dtype": "float32", "bits": 8}}
    assert QuantizeConfig.from_json(text) == config
    assert QuantizeConfig.from_dict({}) == QuantizeConfig()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"version": 2}, ValueError, "got 2"),
        ({"version": 2, "new_key": 1}, ValueError, "version"),
        ({"bitz": 4}, ValueError, "bitz"),
        ({"bits": 5}, ValueError, "config: bits"),
        ({"bits": "4"}, TypeError, "config: bits"),
        ({"group_size": 48}, ValueError, "48"),
        ({"scheme": "nf4"}, ValueError, "nf4"),
        ({"scale_dtype": "float64"}, ValueError, "float64"),
        ({"compute": "fast"}, ValueError, "fast"),
        ({"skip": "lm_head"}, TypeError, "lm_head"),
        ({"overrides": {"a": {"bitz": 1}}}, ValueError, "override 'a'.*bitz"),
        ({"overrides": {"a": {"bits": 5}}}, ValueError, "override 'a': bits"),
    ],
)
def test_config_refuses(values, error, words):
    with pytest.raises(error, match=words):
        QuantizeConfig.from_dict(values)
    with pytest.raises(ValueError, match="object"):
        QuantizeConfig.from_json("[]")

"""``place``: blocks on devices by size, activations moved between them.

The second device is ``meta``: operations refuse to mix it with the CPU, so a forward pass that ends
there with the right shape shows that every activation was moved.
"""

from typing import Any

import pytest
import torch
from models import tiny_llama
from test_parallel_models import IDS, logits
from torch import nn

from mergekit_torch import QuantizeConfig, QuantizedLinear, quantize_
from mergekit_torch.parallel import place


def llama(**changes: Any) -> Any:
    model = tiny_llama(num_hidden_layers=4, **changes)
    quantize_(model, QuantizeConfig(group_size=32))
    return model


def test_even_spread() -> None:
    model = llama()
    placed = place(model, ["cpu", "meta"])
    kinds = [device.type for device in placed.devices.values()]
    assert kinds == sorted(kinds)  # contiguous
    assert len(set(kinds)) == 2
    sizes = list(placed.bytes.values())
    assert max(sizes) < 0.7 * sum(sizes)
    with torch.no_grad():
        out = model(IDS, use_cache=False).logits
    assert out.device.type == "meta"
    assert out.shape == (2, 6, 203)


def test_one_device_changes_nothing() -> None:
    model = llama(tie_word_embeddings=True)
    expected = logits(model)
    placed = place(model, ["cpu"], "1GiB")
    assert torch.equal(logits(model), expected)
    assert model.lm_head.weight_codes is model.model.embed_tokens.weight_codes
    names = ["model.rotary_emb", "model.embed_tokens", "model.layers.0"]
    assert list(placed.devices)[:3] == names
    placed.remove()
    assert not model.lm_head._forward_pre_hooks


def test_budget() -> None:
    model = llama()
    layer = sum(b.nbytes for b in (*model.model.layers[0].buffers(),))
    layer += sum(p.nbytes for p in model.model.layers[0].parameters())
    table = sum(b.nbytes for b in model.model.embed_tokens.buffers())
    table += sum(b.nbytes for b in model.model.rotary_emb.buffers())
    placed = place(model, ["cpu", "meta"], [table + 2 * layer + 10, "1GiB"])
    kinds = [placed.devices[f"model.layers.{i}"].type for i in range(4)]
    assert kinds == ["cpu", "cpu", "meta", "meta"]
    assert placed.bytes[torch.device("cpu")] <= table + 2 * layer + 10


def test_tied_weights_over_two_devices() -> None:
    model = llama(tie_word_embeddings=True)
    placed = place(model, ["cpu", "meta"])
    assert placed.devices["lm_head"].type == "meta"
    assert model.model.embed_tokens.weight_codes.device.type == "cpu"
    assert model.lm_head.weight_codes.device.type == "meta"


def test_structures_move() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = QuantizedLinear(8, 8, group_size=16)

        def forward(self, x: Any, *, extra: Any) -> Any:
            assert extra["list"][0].device == x[0].device == self.linear.weight_codes.device
            assert extra["text"] == "kept"
            return (self.linear(x[0]),)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Any) -> Any:
            y = (x,)
            for block in self.blocks:
                y = block(y, extra={"list": [x], "text": "kept"})
            return y[0]

    model = Model()
    place(model, ["cpu", "meta"])
    assert model(torch.ones(2, 8)).device.type == "meta"


def test_refusals() -> None:
    model = llama()
    before = {name: (id(b), b.device) for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match="no room for"):
        place(model, ["cpu", "meta"], 50_000)
    with pytest.raises(ValueError, match="each once"):
        place(model, ["cpu", "cpu"])
    with pytest.raises(ValueError, match="each once"):
        place(model, [])
    with pytest.raises(ValueError, match="one for each of 2"):
        place(model, ["cpu", "meta"], [1, 2, 3])
    assert before == {name: (id(b), b.device) for name, b in model.named_buffers()}

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(TypeError, match="parameters of its own"):
        place(Own(), ["cpu", "meta"])

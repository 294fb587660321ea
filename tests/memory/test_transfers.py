"""Moves of what comes from a checkpoint or a cache. ``meta`` stands in for a device."""

import copy

import pytest
import torch
from torch import nn

from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
from mergekit_torch.memory import Arena, TensorCache
from mergekit_torch.nn import QuantizedEmbedding, QuantizedLinear
from mergekit_torch.tensor import QuantizedTensor


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    weights = {
        "plain": torch.randn(20, 64),
        "q": QuantizedTensor.from_float(torch.randn(20, 64), 4, 32, "asymmetric").to(torch.float16),
    }
    save_checkpoint(weights, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_cached_tensors_move_with_their_metadata(path):
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        q = tensors["q"]
        for moved in (q.to("meta"), q.to("meta", non_blocking=True)):
            assert isinstance(moved, QuantizedTensor)
            assert moved.device.type == "meta"
            assert (moved.bits, moved.group_size, moved.scheme) == (4, 32, "asymmetric")
            assert moved.dtype == torch.float16
            assert moved.zero_point.device.type == "meta"
        copied = q.to("cpu", copy=True)
        del q
        tensors.clear()
        assert "q" not in tensors  # the copy does not hold the cache's memory
        assert torch.equal(copied.dequantize(), checkpoint["q"].dequantize())


def test_moving_to_where_it_is_copies_nothing(path):
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        q, plain = tensors["q"], tensors["plain"]
        assert q.to("cpu").codes.data_ptr() == q.codes.data_ptr()
        assert plain.to("cpu") is plain


def test_tied_modules_stay_one(path):
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        embedding = QuantizedEmbedding.from_quantized(tensors["q"])
        head = QuantizedLinear.from_quantized(tensors["q"])
        head.weight = embedding.weight
        model = nn.ModuleDict({"embedding": embedding, "head": head})
        for moved in (model, copy.deepcopy(model), copy.deepcopy(model).to("meta")):
            assert moved["head"].weight_codes is moved["embedding"].weight_codes
            assert moved["head"].weight_scale is moved["embedding"].weight_scale


def test_arena_tensors_move_pickle_and_share():
    arena = Arena("cpu", "1MiB")
    tensor = arena.empty(4, 8).normal_()
    assert tensor.to("meta").shape == (4, 8)
    assert torch.equal(copy.deepcopy(tensor), tensor)
    parameter = nn.Parameter(tensor)
    module = nn.Linear(8, 4, bias=False)
    module.weight = parameter
    x = torch.randn(2, 8, requires_grad=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, tensor.sum(0).expand(2, 8))
    storage = tensor.clone()
    del tensor, parameter, module
    assert storage.shape == (4, 8)

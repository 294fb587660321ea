"""Arena, cache, streaming and moves on an NVIDIA GPU."""

import gc

import pytest
import torch
from torch import nn

from mergekit_torch import nn as mnn
from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
from mergekit_torch.memory import Arena, BudgetError, TensorCache, stream
from mergekit_torch.memory.cache import tensor_parts
from mergekit_torch.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LAYERS, WIDTH = 12, 1024
LAYER_BYTES = 4 * WIDTH * WIDTH


def source_tensors():
    torch.manual_seed(3)
    tensors = {f"t{i}": torch.randn(40 + 30 * i, 1000) for i in range(8)}
    for i, scheme in enumerate(("symmetric", "asymmetric", "affine")):
        tensors[f"q{i}"] = QuantizedTensor.from_float(torch.randn(2, 300, 200), 4, 32, scheme)
    tensors["large"] = torch.randn(2200, 2048)  # more than two buffers
    tensors["row"] = torch.randn(1, 5 << 20).half()  # one row of more than a buffer
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 7)
    return tensors


@pytest.fixture(scope="module")
def source():
    return source_tensors()


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "model.safetensors"
    save_checkpoint(source, path)
    with open_checkpoint(path) as opened:
        yield opened


def same(found, expected):
    assert found.device.type == "cuda"
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    parts = tensor_parts(found), tensor_parts(expected)
    assert parts[0].keys() == parts[1].keys()
    for name, part in parts[0].items():
        assert part.device.type == "cuda"
        assert torch.equal(part.cpu(), parts[1][name])


@pytest.mark.parametrize("host_budget", [None, "4MiB", "1GiB"])
@pytest.mark.parametrize("budget", ["20MiB", "1GiB"])
def test_cached_tensors_are_the_checkpoints(checkpoint, source, budget, host_budget):
    with TensorCache(checkpoint, "cuda", budget, host_budget=host_budget) as cache:
        for _ in range(3):
            cache.prefetch(source)
            for name, expected in source.items():
                same(cache[name], expected)
        assert cache.stats().peak <= cache.budget


def test_budget_counts_what_is_held(checkpoint):
    with TensorCache(checkpoint, "cuda", "19MiB") as cache:
        held = cache["large"][:1]
        with pytest.raises(BudgetError):
            cache["row"]
        del held
        assert cache["row"].shape == (1, 5 << 20)


class Layer(nn.Module):
    """A matrix, and a kernel before it that keeps the GPU behind the host."""

    def __init__(self, wait):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.wait = wait

    def forward(self, x):
        if self.wait:
            torch.cuda._sleep(self.wait)
        return torch.tanh(x @ self.weight)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    torch.manual_seed(5)
    weights = {f"{i}.weight": torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for i in range(LAYERS)}
    path = tmp_path_factory.mktemp("layers") / "model.safetensors"
    save_checkpoint(weights, path)
    return path, weights


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("host_budget", [None, "20MiB", "1GiB"])
@pytest.mark.parametrize("wait", [0, 3_000_000])
def test_streamed_weights_are_never_overwritten_in_use(layers, wait, host_budget, own_stream):
    path, weights = layers
    x = torch.randn(4, WIDTH, device="cuda")
    expected = x
    for weight in weights.values():
        expected = torch.tanh(expected @ weight.cuda())
    torch.cuda.synchronize()
    with torch.device("meta"):
        model = nn.Sequential(*(Layer(wait) for _ in range(LAYERS)))
    budget = 4 * LAYER_BYTES
    user = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with (
        stream(model, path, "cuda", budget, host_budget=host_budget) as streamed,
        torch.no_grad(),
        torch.cuda.stream(user),
    ):
        found = [streamed(x) for _ in range(4)]
        user.synchronize()
        for result in found:
            assert torch.equal(result, expected)
        assert streamed.stats().peak <= budget


def test_gradients_of_inputs(layers):
    path, weights = layers
    x = torch.randn(4, WIDTH, device="cuda", requires_grad=True)
    y = x
    for weight in weights.values():
        y = torch.tanh(y @ weight.cuda())
    (expected,) = torch.autograd.grad(y.sum(), x)
    with torch.device("meta"):
        model = nn.Sequential(*(Layer(0) for _ in range(LAYERS)))
    with stream(model, path, "cuda", 4 * LAYER_BYTES) as streamed:
        (found,) = torch.autograd.grad(streamed(x).sum(), x)
        assert torch.equal(found, expected)
        assert streamed.stats().peak <= 4 * LAYER_BYTES


def test_a_quantized_model(tmp_path):
    torch.manual_seed(7)
    weights = [QuantizedTensor.from_float(torch.randn(768, 768)) for _ in range(8)]
    path = tmp_path / "model.safetensors"
    save_checkpoint({f"{i}.weight": weight for i, weight in enumerate(weights)}, path)
    resident = nn.Sequential(*(mnn.QuantizedLinear.from_quantized(w) for w in weights)).cuda()
    with torch.device("meta"):
        model = nn.Sequential(*(mnn.QuantizedLinear(768, 768, bias=False) for _ in range(8)))
    x = torch.randn(1, 768, device="cuda")
    with stream(model, path, "cuda", "1MiB") as streamed, torch.no_grad():
        for _ in range(3):
            assert torch.equal(streamed(x), resident(x))


def test_arena():
    with Arena("cuda", "8MiB") as arena:
        x = arena.empty(1024, 1024)
        assert x.device.type == "cuda"
        view = x[3]
        del x
        with pytest.raises(BudgetError):
            arena.empty(5 << 20, dtype=torch.uint8)
        assert arena.stats().active == 4 << 20
        del view
        gc.collect()
        y = arena.empty(2 << 20, dtype=torch.uint8)
        del y
        with arena.frame():
            scratch = arena.empty(1000).fill_(2)
        assert scratch.sum() == 2000
        assert arena.stats().peak <= 8 << 20


def test_moves_keep_metadata_and_ties():
    q = QuantizedTensor.from_float(torch.randn(64, 96), 4, 32, "asymmetric").to(torch.float16)
    for non_blocking in (False, True):
        moved = q.to("cuda", non_blocking=non_blocking)
        torch.cuda.synchronize()
        assert isinstance(moved, QuantizedTensor)
        assert (moved.bits, moved.group_size, moved.scheme) == (4, 32, "asymmetric")
        assert moved.dtype == torch.float16
        same(moved, q)
        back = moved.cpu()
        for name, part in back.components.items():
            assert torch.equal(part, q.components[name])
    embedding, head = (
        mnn.QuantizedEmbedding.from_quantized(q),
        mnn.QuantizedLinear.from_quantized(q),
    )
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    model.to("cuda", non_blocking=True)
    assert head.weight_codes is embedding.weight_codes
    assert head.weight_scale.device.type == "cuda"


def test_cached_tensors_move_to_the_host(checkpoint, source):
    with TensorCache(checkpoint, "cuda", "64MiB") as cache:
        for name in ("q1", "t3"):
            found = cache[name].to("cpu")
            for part, value in tensor_parts(found).items():
                assert torch.equal(value, tensor_parts(source[name])[part])

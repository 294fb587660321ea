"""The public Python API on simulated mps: tensors, modules, quantize_, the cache, streaming."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import tiny_llama
from torch import nn
from torch.nn import functional as F

import mergekit_torch
from mergekit_torch import QuantizeConfig, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
from mergekit_torch.memory import Arena, TensorCache, stream
from mergekit_torch.parallel import place

from . import simulator
from .compiler import CompileError, zig

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

MPS = torch.device("mps")
SCHEMES = ("symmetric", "asymmetric", "affine")


@pytest.fixture(autouse=True)
def simulated():
    simulator.load()
    torch.manual_seed(0)
    with simulator.seed(21, 22, 23):
        yield


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.device.type == "mps"
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantized_tensor(bits: int, scheme: str) -> None:
    w = torch.randn(40, 96)
    here = QuantizedTensor.from_float(w, bits, 32, scheme)
    there = QuantizedTensor.from_float(w.to(MPS), bits, 32, scheme)
    moved = here.to("mps")
    for q in (there, moved):
        assert isinstance(q, QuantizedTensor)
        assert (q.bits, q.group_size, q.scheme) == (bits, 32, scheme)
        assert {t.device.type for t in (q.codes, q.scale)} == {"mps"}
        assert torch.equal(q.codes.cpu(), here.codes)
        assert torch.equal(q.dequantize().cpu(), here.dequantize())
        assert torch.equal(q.cpu().codes, here.codes)
    assert torch.equal(moved[3:17].dequantize().cpu(), here.dequantize()[3:17])
    assert torch.equal(moved[:, 32:96].dequantize().cpu(), here.dequantize()[:, 32:])
    dense = here.dequantize()
    for m in (1, 5, 20):
        x = torch.randn(m, 96)
        close(F.linear(x.to(MPS), moved), F.linear(x, dense))
        close(x.to(MPS) @ moved.T, x @ dense.T)
        y = torch.randn(m, 40)
        close(y.to(MPS) @ moved, y @ dense)
    close(moved.amax(), dense.amax())
    close(moved.sum(), dense.sum())
    assert torch.equal((moved * 2).dequantize().cpu(), (here * 2).dequantize())


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_modules(scheme: str) -> None:
    linear, embedding = nn.Linear(96, 40), nn.Embedding(50, 96)
    config = {"bits": 4, "group_size": 32, "scheme": scheme}
    here = QuantizedLinear.from_quantized(
        QuantizedTensor.from_float(linear.weight.detach(), **config), linear.bias
    )
    table = QuantizedEmbedding.from_quantized(
        QuantizedTensor.from_float(embedding.weight.detach(), **config)
    )
    there, there_table = copy.deepcopy(here).to(MPS), copy.deepcopy(table).to(MPS)
    ids = torch.tensor([[1, 49, 3], [0, 0, 7]])
    x = table(ids)
    got = there_table(ids.to(MPS))
    assert torch.equal(got.cpu(), x)
    close(there(got), here(x))
    # The gradient goes through dequant_matmul_t.
    a, b = x.detach().clone().requires_grad_(), x.detach().to(MPS).requires_grad_()
    here(a).square().sum().backward()
    there(b).square().sum().backward()
    close(b.grad, a.grad)
    state = there.state_dict()
    assert {t.device.type for t in state.values()} == {"mps"}
    again = copy.deepcopy(here)
    again.load_state_dict(state)
    assert torch.equal(again.weight_codes, here.weight_codes)
    assert there.cpu().weight_scale.device.type == "cpu"
    ran = simulator.kernels_run()
    for name in ("dequant_embedding", "dequant_matmul_small", "dequant_matmul_t"):
        assert any(kernel.startswith(name) for kernel in ran), name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(64, 100, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.tensor([[1, 5, 99, 0, 42, 7, 7, 13, 2, 64]])


def test_quantize_in_place_and_back() -> None:
    model = Model().eval().requires_grad_(False)
    here, there = copy.deepcopy(model), copy.deepcopy(model).to(MPS)
    config = QuantizeConfig(bits=4, group_size=32)
    mergekit_torch.quantize_(here, config)
    report = mergekit_torch.quantize_(there, config)
    assert report.bytes_after < report.bytes_before / 2
    assert isinstance(there.blocks[0].up, QuantizedLinear)
    for a, b in zip(here.buffers(), there.buffers(), strict=True):
        assert torch.equal(a, b.cpu())  # the same codes on both devices
    close(there(IDS.to(MPS)), here(IDS))
    close(there(IDS[:, :1].to(MPS)), here(IDS[:, :1]))
    dense_here = mergekit_torch.dequantize_(here)
    assert mergekit_torch.dequantize_(there) == dense_here
    close(there(IDS.to(MPS)), here(IDS))


def quantized_checkpoint(folder) -> tuple[Model, object]:
    model = Model().eval().requires_grad_(False)
    mergekit_torch.quantize_(model, QuantizeConfig(bits=4, group_size=32))
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding))
    }
    plain = {k: v for k, v in model.state_dict().items() if ".weight_" not in k}
    path = folder / "model.safetensors"
    save_checkpoint({**plain, **weights}, path)
    return model, path


def test_cache(tmp_path) -> None:
    _, path = quantized_checkpoint(tmp_path)
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "mps", "32KiB") as cache:
        for name in checkpoint:
            tensor, want = cache[name], checkpoint[name]
            assert tensor.device.type == "mps"
            if isinstance(want, QuantizedTensor):
                x = torch.randn(2, want.shape[-1])
                close(F.linear(x.to(MPS), tensor), F.linear(x, want.dequantize()))
            else:
                assert torch.equal(tensor.cpu(), want)
            del tensor
        stats = cache.stats()
        assert stats.evictions > 0
        assert stats.peak <= 32 << 10


def test_arena() -> None:
    arena = Arena("mps", "1MiB")
    t = arena.empty(4, 64).fill_(2.0)
    assert t.device.type == "mps"
    codes, scale, offset = mergekit_torch.ops.quantize(t, 4, 32, "affine")
    back = mergekit_torch.ops.dequantize(
        codes, scale, None, offset, bits=4, group_size=32, in_features=64
    )
    assert torch.equal(back.cpu(), torch.full((4, 64), 2.0))


def test_stream(tmp_path) -> None:
    model, path = quantized_checkpoint(tmp_path)
    want = model(IDS)
    with stream(copy.deepcopy(model).to("meta"), path, device="mps", budget="24KiB") as streamed:
        for _ in range(2):
            close(streamed(IDS.to(MPS)), want)
        stats = streamed.stats()
        assert stats.evictions > 0
        assert stats.peak <= 24 << 10


def test_place() -> None:
    """Blocks on two kinds of device, activations moved between them."""
    # torch's fused attention is not simulated.
    model = tiny_llama(num_hidden_layers=4, attn_implementation="eager")
    mergekit_torch.quantize_(model, QuantizeConfig(group_size=32))
    ids = torch.randint(0, 203, (1, 5))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        placed = place(model, ["cpu", "mps"])
        assert {device.type for device in placed.devices.values()} == {"cpu", "mps"}
        close(model(ids, use_cache=False).logits, expected)


@pytest.mark.usefixtures("own_process")
def test_doctor(capsys, monkeypatch) -> None:
    from mergekit_torch import selftest
    from mergekit_torch.cli.main import main

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    every = selftest.cases
    monkeypatch.setattr(selftest, "cases", lambda device, quick: every(device, quick)[::5])
    assert main(["doctor", "--device", "mps", "--quick", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "No timings: this is the simulator" in out
    assert "cases are right" in out
    assert "dequant_matmul_t" in out
    assert main(["doctor", "--device", "mps", "--quick", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["machine"]["chip"] == "simulated Metal GPU"
    assert data["failed"] == 0


@pytest.mark.usefixtures("own_process")
def test_doctor_reads_a_mapped_file(monkeypatch) -> None:
    """What the doctor makes of buffers over mapped files that fail."""
    from mergekit_torch.cli import doctor

    def put(share) -> None:
        monkeypatch.setattr(torch.ops.mkrs, "mps_share", share)

    def fail(t):
        raise RuntimeError("mkrs::mps_share: no")

    assert doctor.mapped_file(MPS) == (True, "used in place, right")
    put(lambda t: ([t[:600].to(MPS), t[600:].to(MPS)], ""))
    assert doctor.mapped_file(MPS) == (True, "used in place, right")
    assert doctor.mapped_file(torch.device("cpu")) == (True, "")
    put(lambda t: ([t.to(MPS)], "one row is too long"))
    assert doctor.mapped_file(MPS) == (True, "copied: one row is too long")
    put(lambda t: ([t.to(MPS) + 1], ""))
    assert doctor.mapped_file(MPS) == (False, "WRONG: the tensor over it has other values")
    put(fail)
    assert doctor.mapped_file(MPS) == (False, "WRONG: mkrs::mps_share: no")

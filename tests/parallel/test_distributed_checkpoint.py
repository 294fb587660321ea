"""State dicts of split models through torch.distributed.checkpoint, resharded on load."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import tiny_llama
from processes import run_ranks
from test_parallel_models import logits
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor

from mergekit_torch import QuantizeConfig, quantize_
from mergekit_torch.parallel import tensor_parallel_

# 8 key heads and 320 / 16 groups divide evenly; 3 key heads and 5 groups of 64 do not.
EVEN: dict[str, Any] = {"num_key_value_heads": 4, "vocab_size": 204}
UNEVEN: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "attention_bias": True,
}


def llama(even: bool, fill: bool) -> Any:
    model = tiny_llama(**(EVEN if even else UNEVEN))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    quantize_(model, QuantizeConfig(group_size=16 if even else 32))
    if not fill:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor is not model.model.rotary_emb.inv_freq:
                tensor.data.zero_()
    return model


def save(rank: int, path: Path, even: bool) -> None:
    model = llama(even, fill=True)
    tensor_parallel_(model)
    state = model.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight_codes"
    assert isinstance(state[name], DTensor)
    if even:
        # What torch's own tools see is the whole, bit for bit.
        expected = llama(even, fill=True).state_dict()
        for key, value in state.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(whole, expected[key]), key
    else:
        # 2 and 1 key heads: DTensor would take all parts for equally large.
        assert state[name].shape == (192, 96)
        with pytest.raises(NotImplementedError, match=r"split unevenly|not supported"):
            state[name].full_tensor()
    dcp.save(state, storage_writer=FileSystemWriter(path))


def load(rank: int, path: Path, even: bool, expected: torch.Tensor) -> None:
    model = llama(even, fill=False)
    tensor_parallel_(model)
    state = model.state_dict()
    dcp.load(state, storage_reader=FileSystemReader(path))  # into the model's own memory
    torch.testing.assert_close(logits(model), expected, rtol=2e-4, atol=2e-4)
    again = llama(even, fill=False)
    tensor_parallel_(again)
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(model))
    # Whole tensors are cut on the way.
    whole = llama(even, fill=True).state_dict()
    again = llama(even, fill=False)
    tensor_parallel_(again)
    again.load_state_dict(whole)
    assert torch.equal(logits(again), logits(model))


def load_and_save(rank: int, source: Path, target: Path, even: bool, expected: Any) -> None:
    load(rank, source, even, expected)
    save(rank, target, even)


def load_alone(path: Path, even: bool) -> Any:
    model = llama(even, fill=False)
    state = model.state_dict()
    dcp.load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return model


@pytest.mark.parametrize("even", [True, False])
def test_reshard(tmp_path: Path, even: bool) -> None:
    """1 to 4, 4 to 2, 2 to 1."""
    expected = logits(llama(even, fill=True))
    alone = llama(even, fill=True).state_dict()
    dcp.save(alone, storage_writer=FileSystemWriter(tmp_path / "1"), no_dist=True)
    run_ranks(4, load_and_save, tmp_path / "1", tmp_path / "4", even, expected)
    run_ranks(2, load_and_save, tmp_path / "4", tmp_path / "2", even, expected)
    model = load_alone(tmp_path / "2", even)
    assert torch.equal(logits(model), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, alone[name]), name


def test_files_hold_plain_tensors(tmp_path: Path) -> None:
    """Every stored tensor loads with ``weights_only``."""
    run_ranks(2, save, tmp_path / "2", False)
    files = sorted((tmp_path / "2").glob("*.distcp"))
    assert files
    metadata = FileSystemReader(tmp_path / "2").read_metadata()
    for info in metadata.storage_data.values():
        with open(tmp_path / "2" / info.relative_path, "rb") as file:
            file.seek(info.offset)
            tensor = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        assert type(tensor) is torch.Tensor

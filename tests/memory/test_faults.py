"""What writers leave behind when they are killed, and what cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "mode", ["save", "shards", "reshard", "unshard", "resume", "resume_shards"]
)
def test_writers_killed_at_fifty_random_moments(tmp_path, mode):
    script = ROOT / "tests/memory/kill_writers.py"
    command = [sys.executable, str(script), mode, str(tmp_path), "50", "20261"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr


def test_a_set_that_replaces_one_of_as_many_files(tmp_path, monkeypatch):
    def write(value):
        tensors = {name: torch.full((100,), float(value)) for name in "abc"}
        return save_checkpoint(tensors, tmp_path, max_shard_size=400)

    def value():
        with open_checkpoint(tmp_path) as checkpoint:
            (found,) = {float(checkpoint[name][0]) for name in checkpoint}
            return found

    usual = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    other = [f"model.1-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "model.safetensors.index.json"
    for number, names in enumerate((usual, other, usual)):
        assert [path.name for path in write(number)] == [*names, index]
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, index])
        assert value() == number
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("00002-of-00003.safetensors"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="an existing file is unchanged"):
        write(3)
    assert value() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*usual, index])


def test_read_only_targets(tmp_path, monkeypatch):
    target = tmp_path / "model.safetensors"
    save_checkpoint({"x": torch.ones(4)}, target)
    target.chmod(0o444)
    # Root may write everything; then only the answer is simulated.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="read-only"):
        save_checkpoint({"x": torch.zeros(4)}, target)
    with open_checkpoint(target) as checkpoint:
        assert checkpoint["x"].sum() == 4
    assert [p.name for p in tmp_path.iterdir()] == [target.name]

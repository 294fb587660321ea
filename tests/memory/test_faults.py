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
@pytest.mark.parametrize("mode", ["save", "shards", "resume"])
def test_writers_killed_at_fifty_random_moments(tmp_path, mode):
    script = ROOT / "tests/memory/kill_writers.py"
    command = [sys.executable, str(script), mode, str(tmp_path), "50", "20261"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr


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

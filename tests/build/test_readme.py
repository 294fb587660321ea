"""The README's Python runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from models import smollm2_gguf

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(BLOCKS) == 3
    for block in BLOCKS[:2]:
        exec(compile(block, "README.md", "exec"), {})
    assert "4" in capsys.readouterr().out
    assert "0.weight_codes" in torch.load("model.pt", weights_only=True)


@pytest.mark.slow
def test_checkpoint_example_runs(tmp_path, monkeypatch):
    model = smollm2_gguf()
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").symlink_to(model)
    exec(compile(BLOCKS[2], "README.md", "exec"), {})


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"

"""docs/quickstart.md runs as it stands."""

import re
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "quickstart.md"


def test_quickstart(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), namespace)

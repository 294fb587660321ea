"""The reader printed in docs/format.md works."""

import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from files import random_components

from mergekit_torch.checkpoint import CheckpointWriter, QuantInfo, TensorSpec
from mergekit_torch.ops import dequantize

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"


def test_the_documented_reader(tmp_path):
    section = DOCUMENT.read_text().split("## A reader in 25 lines")[1].split("\n(numpy")[0]
    code = textwrap.dedent(re.sub(r"^\n+", "", section))
    assert len(code.strip().splitlines()) <= 28
    scope = {}
    exec(code, scope)
    infos = {
        "a": QuantInfo(4, 32, "affine", 70, torch.float32),
        "b": QuantInfo(8, 16, "symmetric", 33, torch.float16),
        "c": QuantInfo(2, 128, "asymmetric", 75, torch.float16),
    }
    parts = {name: random_components((3, info.in_features), info) for name, info in infos.items()}
    specs = {
        name: TensorSpec(torch.float32, (3, info.in_features), info) for name, info in infos.items()
    }
    path = tmp_path / "x.safetensors"
    with CheckpointWriter(path, {**specs, "plain": torch.ones(2)}) as writer:
        writer.write("plain", torch.ones(2))
        for name, components in parts.items():
            writer.write(name, components)
    found = scope["read"](path)
    assert found.keys() == {"a", "b", "c", "plain"}
    for name, info in infos.items():
        want = dequantize(
            parts[name]["codes"],
            parts[name]["scale"],
            parts[name].get("zero_point"),
            parts[name].get("offset"),
            bits=info.bits,
            group_size=info.group_size,
            in_features=info.in_features,
        )
        np.testing.assert_array_equal(found[name], want.numpy())

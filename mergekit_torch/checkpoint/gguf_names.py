"""GGUF names, row order and hyperparameters in Hugging Face's terms.

Sources: ggml's ``docs/gguf.md`` for the keys; llama.cpp's ``gguf-py/gguf/tensor_mapping.py`` and
``convert_hf_to_gguf.py`` for what the converter writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "gguf_to_hf_name",
    "hf_config",
    "hf_to_gguf_name",
    "rope_row_order",
    "rope_scaling_from_factors",
]

#: GGUF architecture -> model_type and class of transformers.
SUPPORTED_ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}

#: Derived from the configuration by transformers, so not a tensor of its own there.
ROPE_FACTORS = "rope_freqs.weight"

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _check_architecture(architecture: str) -> None:
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise NotImplementedError(
            f"GGUF architecture must be one of {', '.join(SUPPORTED_ARCHITECTURES)} to be "
            f"converted to Hugging Face names, got {architecture!r}; keep the file's names"
        )


def _block_names(architecture: str) -> dict[str, str]:
    return {**_BLOCK, **_QK_NORM} if architecture == "qwen3" else _BLOCK


def gguf_to_hf_name(name: str, architecture: str = "llama") -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``.

    Raises:
        NotImplementedError: an architecture or a tensor without a known counterpart.
    """
    _check_architecture(architecture)
    match = _BLOCK_NAME.fullmatch(name)
    if match is not None:
        module = _block_names(architecture).get(match[2])
        if module is not None:
            return f"model.layers.{int(match[1])}.{module}.{match[3]}"
    else:
        stem, _, kind = name.rpartition(".")
        if stem in _TOP and kind in ("weight", "bias"):
            return f"{_TOP[stem]}.{kind}"
    raise NotImplementedError(
        f"tensor {name!r} of a GGUF {architecture} model has no known Hugging Face name; keep the "
        "file's own names instead"
    )


def hf_to_gguf_name(name: str, architecture: str = "llama") -> str:
    """The inverse of :func:`gguf_to_hf_name`.

    Raises:
        NotImplementedError: an architecture or a tensor without a known counterpart.
    """
    _check_architecture(architecture)
    match = _LAYER_NAME.fullmatch(name)
    if match is not None:
        modules = {hf: gguf for gguf, hf in _block_names(architecture).items()}
        if match[2] in modules:
            return f"blk.{int(match[1])}.{modules[match[2]]}.{match[3]}"
    else:
        stem, _, kind = name.rpartition(".")
        for gguf, hf in _TOP.items():
            if stem == hf and kind in ("weight", "bias"):
                return f"{gguf}.{kind}"
    raise NotImplementedError(f"tensor {name!r} has no known name in a GGUF {architecture} model")


def rope_row_order(rows: int, heads: int) -> Tensor:
    """For each Hugging Face row of a llama ``q_proj``/``k_proj`` the GGUF row that holds it.

    GGUF llama files pair neighbouring rows of a head for the rotary embedding, transformers pairs
    row i with row i + head_dim/2: within a head of d rows, row ``j*d/2 + i`` there is row ``2*i +
    j`` here. Whole rows move, so quantized weights move without loss.

    Args:
        rows: rows of the weight, heads * head_dim.
        heads: attention heads of q, key-value heads of k.

    Returns:
        int64 ``[rows]``.

    Raises:
        ValueError: rows are not heads of an even length.
    """
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows must divide into {heads} heads of an even length")
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def needs_rope_order(name: str, architecture: str) -> str | None:
    """``"q"`` or ``"k"`` if the rows of this GGUF tensor are in rotary order, else None."""
    match = _BLOCK_NAME.fullmatch(name)
    if architecture != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    return match[2][-1]


def _pairs(kv: Mapping[str, Any]) -> tuple[str, Any, Any]:
    architecture = kv.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"general.architecture must be a string, got {architecture!r:.80}")
    _check_architecture(architecture)

    def fail(key: str, what: str) -> NoReturn:
        raise ValueError(f"GGUF metadata {architecture}.{key} must be {what}")

    def number(key: str, default: int | None = None) -> int:
        value = kv.get(f"{architecture}.{key}", default)
        if type(value) is not int or value < 0:
            fail(key, f"a count, got {value!r:.80}")
        return value

    def real(key: str, default: float | None = None) -> float:
        value = kv.get(f"{architecture}.{key}", default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            fail(key, f"a finite number, got {value!r:.80}")
        return _shortest(float(value))

    return architecture, number, real


def head_counts(kv: Mapping[str, Any]) -> tuple[int, int]:
    """Attention heads of q and of k and v.

    Raises:
        ValueError: the metadata has no such counts, or one per layer.
    """
    _, number, _ = _pairs(kv)
    heads = number("attention.head_count")
    return heads, number("attention.head_count_kv", heads)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32, so that 1e-5 does not become 9.99e-6."""
    single = torch.tensor(value, dtype=torch.float32)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=torch.float32) == single:
            return short
    return value


def hf_config(
    kv: Mapping[str, Any],
    *,
    tied: bool,
    vocab_size: int | None = None,
    attention_bias: bool = False,
    rope_factors: Tensor | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The contents of transformers' ``config.json`` for a GGUF model.

    Args:
        kv: the file's metadata.
        tied: whether the output layer is the embedding, that is, the file has no ``output.weight``.
        vocab_size: rows of the embedding; None takes it from the metadata.
        attention_bias: whether the attention projections have biases (llama only).
        rope_factors: the tensor ``rope_freqs.weight``, if the file has it.
        dtype: the model's dtype in transformers' words.

    Raises:
        NotImplementedError: an unsupported architecture, mixture of experts, or rotary scaling.
        ValueError: keys that are missing or cannot be.
    """
    architecture, number, real = _pairs(kv)
    model_type, class_name = SUPPORTED_ARCHITECTURES[architecture]
    if kv.get(f"{architecture}.expert_count"):
        raise NotImplementedError(
            f"GGUF {architecture} models with experts cannot be converted to Hugging Face names, "
            f"got expert_count {kv[f'{architecture}.expert_count']}"
        )
    heads, kv_heads = head_counts(kv)
    hidden = number("embedding_length")
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"GGUF metadata {architecture}.attention.head_count must be at least 1")
    if vocab_size is None:
        vocab_size = number("vocab_size", _token_count(kv))
    theta = real("rope.freq_base", 10000.0)
    head_dim = number("attention.key_length", hidden // heads)
    if number("attention.value_length", head_dim) != head_dim:
        raise NotImplementedError("keys and values of different head length cannot be converted")
    if architecture == "llama" and number("rope.dimension_count", head_dim) != head_dim:
        raise NotImplementedError("partial rotary embeddings cannot be converted for llama")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
        "dtype": dtype,
    }
    scaling = _rope_scaling(kv, architecture, real, rope_factors, theta, head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if architecture == "llama":
        config["attention_bias"] = attention_bias
        config["mlp_bias"] = False
    for key, name in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("padding", "pad_token_id"),
    ):
        token = kv.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            config[name] = token
    return config


def _token_count(kv: Mapping[str, Any]) -> int | None:
    length = getattr(kv, "length", None)
    if "tokenizer.ggml.tokens" not in kv:
        return None
    return length("tokenizer.ggml.tokens") if length else len(kv["tokenizer.ggml.tokens"])


def _rope_scaling(
    kv: Mapping[str, Any],
    architecture: str,
    real: Any,
    factors: Tensor | None,
    theta: float,
    head_dim: int,
) -> dict[str, Any] | None:
    kind = kv.get(f"{architecture}.rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise NotImplementedError(f"rotary scaling {kind!r} together with {ROPE_FACTORS}")
        return rope_scaling_from_factors(factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": real("rope.scaling.factor")}
    if kind == "yarn":
        original = kv.get(f"{architecture}.rope.scaling.original_context_length")
        if type(original) is not int:
            raise ValueError(f"{architecture}.rope.scaling.original_context_length must be a count")
        return {
            "rope_type": "yarn",
            "factor": real("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
    raise NotImplementedError(f"rotary scaling {kind!r:.80} cannot be converted")


def rope_scaling_from_factors(
    factors: Tensor, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """transformers' ``rope_scaling`` for the frequency divisors that Llama 3.1 files carry.

    The divisors are 1 for wavelengths under ``original/high``, ``factor`` over ``original/low``,
    and blend between. ``low`` 1, ``high`` 4 and ``original`` 8192 are those of every published
    model; the result is checked against the tensor.

    Raises:
        NotImplementedError: other divisors.
    """
    factors = factors.double().flatten()
    if bool((factors == 1).all()):
        return None
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    if factors.numel() == head_dim // 2 and math.isfinite(factor) and factor > 0:
        wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": _shortest(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise NotImplementedError(
        f"the {factors.numel()} divisors in {ROPE_FACTORS} follow no known rotary scaling; "
        "keep the file's names"
    )

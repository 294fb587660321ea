"""GGUF to native: names, row order, configuration, and the real model."""

import json
import os
import re

import gguf
import numpy as np
import pytest
import torch
from files import gguf_bytes, write
from models import smollm2_gguf
from safetensors.torch import load_file
from test_gguf_unpack import assert_same_bits, random_blocks, unpack_codes

from mergekit_torch.checkpoint import (
    ConvertedCheckpoint,
    convert_gguf,
    gguf_to_hf_name,
    hf_config,
    hf_to_gguf_name,
    open_checkpoint,
)
from mergekit_torch.checkpoint.gguf_names import rope_row_order, rope_scaling_from_factors

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
    "blk.3.attn_q.bias": "model.layers.3.self_attn.q_proj.bias",
    "blk.12.attn_k.weight": "model.layers.12.self_attn.k_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
    "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
}

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 500000.0,
    "llama.vocab_size": 32,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_names(ours, theirs):
    assert gguf_to_hf_name(ours) == theirs
    assert hf_to_gguf_name(theirs) == ours
    assert gguf_to_hf_name(ours, "qwen2") == theirs


def test_names_agree_with_the_gguf_package():
    for architecture in ("LLAMA", "QWEN2", "QWEN3"):
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        inner = "input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj"
        inner += " self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
        if architecture == "QWEN3":
            inner += " self_attn.q_norm self_attn.k_norm"
        modules += [f"model.layers.1.{module}" for module in inner.split()]
        for module in modules:
            assert hf_to_gguf_name(f"{module}.weight", architecture.lower()) == (
                known.get_name(module) + ".weight"
            )


def test_names_without_counterpart():
    for name in ("blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "blk.0.attn_q_norm.weight"):
        with pytest.raises(NotImplementedError, match=f"'{name}' of a GGUF llama model"):
            gguf_to_hf_name(name)
    with pytest.raises(NotImplementedError, match="has no known name"):
        hf_to_gguf_name("model.layers.0.block_sparse_moe.gate.weight")
    with pytest.raises(NotImplementedError, match=r"must be one of llama, .* got 'mamba'"):
        gguf_to_hf_name("token_embd.weight", "mamba")


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 64), (9, 6)])
def test_rope_rows(heads, head_dim):
    """llama.cpp writes row 2i of a head from row i, and row 2i + 1 from row i + head_dim/2."""
    rows = heads * head_dim
    written = []
    for head in range(heads):
        for i in range(head_dim // 2):
            written += [head * head_dim + i, head * head_dim + i + head_dim // 2]
    order = rope_row_order(rows, heads)
    assert torch.equal(torch.tensor(written)[order], torch.arange(rows))
    with pytest.raises(ValueError, match="heads of an even length"):
        rope_row_order(rows + 1, heads)


def test_config():
    config = hf_config(LLAMA, tied=True)
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert config["head_dim"] == 16
    assert config["num_key_value_heads"] == 2
    assert config["vocab_size"] == 32
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert "rope_scaling" not in config
    assert json.loads(json.dumps(config)) == config
    qwen = {key.replace("llama", "qwen2"): value for key, value in LLAMA.items()}
    assert hf_config({**qwen, "general.architecture": "qwen2"}, tied=False)["model_type"] == "qwen2"
    linear = {**LLAMA, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert hf_config(linear, tied=True)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"general.architecture": "mamba"}, NotImplementedError, "got 'mamba'"),
        ({"general.architecture": 3}, ValueError, "must be a string"),
        ({"llama.expert_count": 8}, NotImplementedError, "expert_count 8"),
        ({"llama.block_count": None}, ValueError, "block_count must be a count, got None"),
        (
            {"llama.attention.head_count": [4, 4]},
            ValueError,
            r"head_count must be a count, got \[4",
        ),
        ({"llama.attention.head_count": 0}, ValueError, "must be at least 1"),
        ({"llama.rope.freq_base": "x"}, ValueError, "must be a finite number"),
        ({"llama.rope.freq_base": float("nan")}, ValueError, "must be a finite number"),
        ({"llama.rope.dimension_count": 8}, NotImplementedError, "partial rotary"),
        ({"llama.rope.scaling.type": "longrope"}, NotImplementedError, "'longrope'"),
        ({"llama.attention.value_length": 8}, NotImplementedError, "different head length"),
    ],
)
def test_configs_that_cannot_be(change, error, message):
    with pytest.raises(error, match=message):
        hf_config({**LLAMA, **change}, tied=True)


def test_llama3_rope_factors():
    theta, head_dim, factor = 500000.0, 128, 32.0
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    tensor = torch.tensor(factors)
    assert rope_scaling_from_factors(tensor, theta, head_dim) == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert rope_scaling_from_factors(torch.ones(64), theta, head_dim) is None
    with pytest.raises(NotImplementedError, match="no known rotary scaling"):
        rope_scaling_from_factors(tensor * 1.1, theta, head_dim)


def small_llama(tmp_path, architecture="llama", extra=()):
    pairs = []
    for key, value in LLAMA.items():
        kind = {str: 8, int: 4, float: 6}[type(value)]
        value = architecture if key == "general.architecture" else value
        pairs.append((key.replace("llama", architecture), kind, value))

    def f32(name, *dims):
        size = int(np.prod(dims))
        return name, list(dims), 0, np.arange(size, dtype=np.float32).tobytes()

    q = random_blocks(3, 64, 64, seed=1).numpy().tobytes()
    k = random_blocks(8, 32, 64, seed=2).numpy().tobytes()
    tensors = [
        f32("token_embd.weight", 64, 32),
        ("blk.0.attn_q.weight", [64, 64], 3, q),
        ("blk.0.attn_k.weight", [64, 32], 8, k),
        f32("blk.0.attn_q.bias", 64),
        f32("output_norm.weight", 64),
        *extra,
    ]
    return write(tmp_path / f"{architecture}.gguf", gguf_bytes(pairs, tensors))


def test_rows_of_llama_are_put_back(tmp_path):
    source = open_checkpoint(small_llama(tmp_path))
    converted = ConvertedCheckpoint(source)
    assert converted.config["attention_bias"] is True
    assert converted.config["vocab_size"] == 32
    for name, heads in (("q", 4), ("k", 2)):
        want, _ = source.components(f"blk.0.attn_{name}.weight")
        got = converted.tensor(f"model.layers.0.self_attn.{name}_proj.weight")
        order = rope_row_order(16 * heads, heads)
        for part in want:
            assert torch.equal(got[part], want[part][order])
    bias = converted.tensor("model.layers.0.self_attn.q_proj.bias")
    assert torch.equal(bias, torch.arange(64.0)[rope_row_order(64, 4)])
    qwen = ConvertedCheckpoint(open_checkpoint(small_llama(tmp_path, "qwen2")))
    assert torch.equal(qwen.tensor("model.layers.0.self_attn.q_proj.bias"), torch.arange(64.0))
    kept = ConvertedCheckpoint(source, names="gguf")
    assert kept.config is None
    assert torch.equal(kept.tensor("blk.0.attn_q.bias"), torch.arange(64.0))


def test_what_cannot_be_converted(tmp_path):
    path = small_llama(tmp_path, extra=[("blk.0.ffn_up.weight", [256, 1], 23, b"\0" * 136)])
    with pytest.raises(NotImplementedError, match=r"blk\.0\.ffn_up\.weight.*IQ4_XS"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotImplementedError, match="mamba"):
        convert_gguf(small_llama(tmp_path, "mamba"), tmp_path / "out")
    with pytest.raises(ValueError, match="names must be 'hf' or 'gguf'"):
        convert_gguf(small_llama(tmp_path), tmp_path / "out", names="mlx")
    convert_gguf(small_llama(tmp_path), tmp_path / "out")
    with pytest.raises(
        ValueError, match="must be a GGUF checkpoint to be converted, got safetensors"
    ):
        convert_gguf(tmp_path / "out", tmp_path / "again")


def test_shards_and_names(tmp_path):
    path = small_llama(tmp_path)
    seen = []
    files = convert_gguf(
        path, tmp_path / "out", max_shard_size=4096, progress=lambda *a: seen.append(a)
    )
    assert sorted(file.name for file in files) == sorted(os.listdir(tmp_path / "out"))
    assert len(seen) == 5
    native = open_checkpoint(tmp_path / "out")
    assert sum(size for _, size in seen) == native.nbytes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    single = tmp_path / "single.safetensors"
    assert convert_gguf(path, single, names="gguf") == [single]
    assert set(open_checkpoint(single)) == set(open_checkpoint(path))


def test_smollm2(tmp_path):
    """The native file, read by the safetensors library, gives ggml's values bit for bit."""
    path = smollm2_gguf()
    source = open_checkpoint(path)
    convert_gguf(source, tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    library = load_file(tmp_path / "native" / "model.safetensors")
    converted = ConvertedCheckpoint(source)
    assert sorted(converted.specs) == sorted(native)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    heads = {"q_proj": 9, "k_proj": 3}
    for name, origin in converted.source_names.items():
        tensor = reader[origin]
        if re.search(r"layers\.([1-9]|1\d|2[0-8])\.", name):
            # All values of the source are checked elsewhere; here only the first and last layers'.
            expected = converted.tensor(name)
            if isinstance(expected, dict):
                assert all(torch.equal(library[f"{name}_{p}"], t) for p, t in expected.items())
            else:
                assert torch.equal(library[name], expected)
            continue
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        module = name.split(".")[-2]
        if module in heads:
            # The definition of transformers' own loader.
            n = heads[module]
            shape = want.shape
            want = want.reshape(n, shape[0] // n // 2, 2, shape[1]).swapaxes(2, 1).reshape(shape)
        info = native.info(name).quantization
        if info is None:
            assert_same_bits(library[name].numpy(), want)
            continue
        q = unpack_codes(library[f"{name}_codes"].numpy(), info.bits, info.in_features)
        scale = np.repeat(library[f"{name}_scale"].numpy().astype(np.float32), 32, axis=-1)
        if info.scheme == "affine":
            offset = library[f"{name}_offset"].numpy().astype(np.float32)
            got = scale * q.astype(np.float32) + np.repeat(offset, 32, axis=-1)
        else:
            got = scale * (q.astype(np.float32) - 128)
        assert_same_bits(got, want)
    config = converted.config
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 100000.0

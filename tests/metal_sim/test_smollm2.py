"""A real model on simulated mps: SmolLM2-135M, all 30 layers, Q4_1 weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from . import simulator
from .compiler import CompileError, zig

pytestmark = pytest.mark.slow
# Any 8 tokens: engines are compared on the same ids.
PROMPT = (1, 504, 3575, 282, 4649, 314, 253, 1229)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of [tokens, heads, dim] on neighbouring pairs, as GGUF orders them."""
    dim = x.shape[-1]
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos()[:, None].to(x.device), angle.sin()[:, None].to(x.device)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def logits(checkpoint, device: str) -> torch.Tensor:
    """Logits of the prompt's last token."""
    meta = checkpoint.metadata
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    base, eps = meta["llama.rope.freq_base"], meta["llama.attention.layer_norm_rms_epsilon"]

    def get(name: str) -> torch.Tensor:
        return checkpoint[f"{name}.weight"].to(device)

    embedding = get("token_embd")
    x = F.embedding(torch.tensor(PROMPT, device=device), embedding)
    tokens = len(PROMPT)
    mask = torch.full((tokens, tokens), float("-inf")).triu(1).to(device)
    for i in range(meta["llama.block_count"]):
        layer = f"blk.{i}."
        h = rms_norm(x, get(layer + "attn_norm"), eps)
        q, k, v = (
            F.linear(h, get(f"{layer}attn_{part}")).view(tokens, -1, h.shape[-1] // heads)
            for part in "qkv"
        )
        q, k = rotate(q, base), rotate(k, base)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5 + mask
        attended = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(tokens, -1)
        x = x + F.linear(attended, get(layer + "attn_output"))
        h = rms_norm(x, get(layer + "ffn_norm"), eps)
        gate = F.silu(F.linear(h, get(layer + "ffn_gate"))) * F.linear(h, get(layer + "ffn_up"))
        x = x + F.linear(gate, get(layer + "ffn_down"))
    x = rms_norm(x, get("output_norm"), eps)
    return F.linear(x[-1:], embedding).cpu()


def test_logits_equal_the_cpu() -> None:
    models = pytest.importorskip("models")
    try:
        zig()
    except CompileError as error:
        pytest.skip(str(error))
    from mergekit_torch.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(models.smollm2_gguf())
    want = logits(checkpoint, "cpu")
    simulator.load()
    with simulator.seed(3):
        got = logits(checkpoint, "mps")
    assert want.std() > 1  # a model that says something
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-4, f"logits differ by {error:.2e} of the largest"
    assert torch.equal(got.topk(5).indices, want.topk(5).indices)
    assert any("dequant_matmul_small" in name for name in simulator.kernels_run())

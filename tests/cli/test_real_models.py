"""Real models through the command line: the language model of the demo and a sentence encoder."""

import json
import subprocess
import sys

import pytest
import torch
from models import all_minilm_l6_v2, smollm2_gguf

from mergekit_torch.cli import generation
from mergekit_torch.cli.main import main

transformers = pytest.importorskip("transformers")

PROMPTS = (
    "What is gravity?",
    "Write a short poem about the sea.",
    "Explain how to boil an egg.",
    "List three prime numbers and say why they are prime.",
    "Translate 'good morning' into French.",
    "def fibonacci(n):",
    "Why is the sky blue? Answer in one sentence.",
    "Tell me a story about a robot that learns to paint.",
)

SENTENCES = [
    f"{subject} {verb} {place}."
    for subject in (
        "The old sailor",
        "A young engineer",
        "My neighbour's cat",
        "The committee",
        "Rain",
    )
    for verb in ("sleeps", "writes a letter", "has never been", "argues loudly", "fell softly")
    for place in ("in the harbour", "during the meeting")
]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """SmolLM2 as ``mkrs convert`` writes it, and as ``mkrs dequantize`` makes it dense."""
    folder = tmp_path_factory.mktemp("smollm2")
    assert main(["convert", str(smollm2_gguf()), str(folder / "native")]) == 0
    assert main(["dequantize", str(folder / "native"), str(folder / "dense")]) == 0
    return folder


@pytest.mark.slow
def test_smollm2_says_what_the_dense_model_says(native):
    """Logits within 1e-3 of the largest, 64 greedy tokens identical on eight prompts."""
    from mergekit_torch.integrations.transformers import load_native

    quantized = load_native(native / "native", dtype=torch.float32)
    dense = load_native(native / "dense", dtype=torch.float32)
    tokenizer = generation.load_tokenizer(native / "native")
    for prompt in PROMPTS:
        ids = generation.encode(tokenizer, prompt, raw=False)
        with torch.inference_mode():
            got, want = quantized(ids).logits, dense(ids).logits
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()
        # No end token stops the comparison early.
        options = {"eos_token_id": -1, "pad_token_id": 0}
        tokens = [generation.generate(m, ids, 64, **options).tokens for m in (quantized, dense)]
        assert len(tokens[0]) == 64
        assert tokens[0] == tokens[1], prompt


OPEN = """
import os, sys
from mergekit_torch.checkpoint import open_checkpoint

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

open_checkpoint(sys.argv[2]).close()  # modules and caches of the interpreter itself
before = resident()
checkpoint = open_checkpoint(sys.argv[1])
tensor = checkpoint["model.layers.0.mlp.up_proj.weight"]
print(len(checkpoint), resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_opening_reads_headers_only(native, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "tiny.safetensors")
    command = [
        sys.executable,
        "-c",
        OPEN,
        str(native / "native"),
        str(tmp_path / "tiny.safetensors"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count, grown = map(int, result.stdout.split())
    assert count == 272
    assert grown < 5 * 2**20


@pytest.mark.slow
def test_generate_command(native, capsys):
    command = ["generate", str(native / "native"), "What is gravity?", "--max-new-tokens", "12"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "gravity" in captured.out.lower()
    assert "tokens/s" in captured.err
    seeded = [*command, "--temperature", "1.5", "--seed", "3", "--quiet"]
    texts = []
    for _ in range(2):
        assert main(seeded) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        texts.append(captured.out)
    assert texts[0] == texts[1]
    # Weights streamed under a budget of about half the model say the same.
    texts = []
    for budget in ([], ["--budget", "48MiB"]):
        assert main([*command, "--quiet", *budget]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main([*command, "--budget", "1MiB"]) == 1
    assert "at once" in capsys.readouterr().err
    assert main([*command[:1], str(native), "hello"]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_command(tmp_path, capfd):
    answer = tmp_path / "demo.json"
    command = ["demo", "--gguf", str(smollm2_gguf()), "--cache", str(tmp_path / "cache")]
    assert main([*command, "--max-new-tokens", "8", "--json", str(answer), "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "The two agree" in out
    assert "bits per weight" in out
    report = json.loads(answer.read_text())
    assert report["agree"] is True
    assert report["quantized"]["bits_per_weight"] < 5.8
    assert report["quantized"]["file_bytes"] * 5 < report["dense"]["file_bytes"]
    assert report["quantized"]["peak_bytes"] < report["dense"]["peak_bytes"]
    assert not list((tmp_path / "cache").glob(".demo-*"))


def embed(model, tokenizer) -> torch.Tensor:
    """Mean-pooled sentence embeddings, as the model's card says."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.slow
def test_sentence_embeddings_at_8_4_and_2_bits(tmp_path, capsys, record_property):
    """Cosine similarity against the float32 model, for fifty sentences."""
    from mergekit_torch.integrations.transformers import load_native

    source = all_minilm_l6_v2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    want = embed(transformers.AutoModel.from_pretrained(str(source)).eval(), tokenizer)
    assert len(want) == 50
    worst = {}
    for bits in (8, 4, 2):
        target = tmp_path / str(bits)
        assert main(["quantize", str(source), str(target), "--q-bits", str(bits)]) == 0
        got = embed(load_native(target, dtype=torch.float32), tokenizer)
        similarity = torch.cosine_similarity(got, want)
        worst[bits] = similarity.min().item()
        record_property(f"cosine_{bits}bit_min", worst[bits])
        with capsys.disabled():
            print(
                f"\nall-MiniLM-L6-v2 at {bits} bits: cosine similarity to float32, 50 sentences: "
                f"mean {similarity.mean():.5f}, least {worst[bits]:.5f}"
            )
    assert worst[8] > 0.999
    assert worst[8] > worst[4] > worst[2]

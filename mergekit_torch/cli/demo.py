"""``mkrs demo``: a real model from a GGUF file on 4-bit weights, against itself in float32."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..text import size_text, table
from . import convert, dequantize, generation
from .common import add_command
from .demo_model import smollm2

PROMPT = "What is gravity? Answer in two sentences."
REWRITE = {"out_shard_size": None, "budget": "1GiB", "resume": False, "force": True}
TOLERANCE = 1e-3
"""Logits agree when they differ by less than this fraction of the largest logit."""


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mergekit_torch``, by default ``~/.cache/mergekit_torch``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_torch"


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "demo",
        "run a real model on 4-bit weights and compare it with itself dense in float32",
        """
mkrs demo
mkrs demo --prompt "Write a haiku about memory." --max-new-tokens 40
mkrs demo --device cpu --threads 2 --cache .cache
""",
        details=(
            "Fetches SmolLM2-135M-Instruct (GGUF Q4_1, 98 MB), converts it without loss to native\n"
            "safetensors, opens that by memory map and generates; then the same with the weights\n"
            "dequantized to float32. Each model runs in a process of its own."
        ),
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens")
    parser.add_argument("--gguf", type=Path, default=None, help="use this llama-like GGUF instead")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for the model files"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the measurements here")
    generation.add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch, convert, generate twice, compare. Exit code 1 if the two models disagree."""
    if args.max_new_tokens < 2:
        raise ValueError(f"--max-new-tokens must be at least 2, got {args.max_new_tokens}")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the demo needs transformers ({error}): pip install "mergekit_torch[demo]"'
        ) from error
    device, _ = generation.prepare(args)
    gguf = args.gguf or smollm2(args.cache)
    native = args.cache / f"{gguf.stem}-native"
    if not (native / "tokenizer.json").exists():  # what convert writes last
        print(f"Converting {gguf.name} to native safetensors, without loss:")
        convert.run(
            argparse.Namespace(
                source=gguf, target=native, names="hf", no_tokenizer=False, **REWRITE
            )
        )
    tokenizer = generation.load_tokenizer(native)
    ids = generation.encode(tokenizer, args.prompt, raw=False)
    with tempfile.TemporaryDirectory(dir=args.cache, prefix=".demo-") as folder:
        dense = Path(folder) / "dense"
        print("Writing the same weights dense in float32, for comparison:")
        dequantize.run(argparse.Namespace(source=native, target=dense, dtype="f32", **REWRITE))
        reports, logits = {}, {}
        for name, path in (("quantized", native), ("dense", dense)):
            print(f"Running the {name} model on {device} ...", flush=True)
            reports[name], logits[name] = measure(
                args, path, str(device), ids[0].tolist(), Path(folder), name
            )
        shutil.rmtree(dense)
    print()
    print(f"> {args.prompt}")
    print(tokenizer.decode(reports["quantized"]["tokens"], skip_special_tokens=True).strip())
    print()
    print(report(reports))
    print()
    agree, words = agreement(reports, logits)
    print(words)
    if args.json is not None:
        document = {"device": str(device), "agree": agree, **reports}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if agree else 1


def measure(
    args: argparse.Namespace, path: Path, device: str, ids: list[int], folder: Path, name: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Run the worker for one model."""
    request, answer = folder / f"{name}-request.json", folder / f"{name}-answer.json"
    logits = folder / f"{name}-logits.npy"
    request.write_text(
        json.dumps(
            {
                "path": str(path),
                "device": device,
                "dtype": args.dtype,
                "threads": args.threads,
                "ids": ids,
                "max_new_tokens": args.max_new_tokens,
                "logits": str(logits),
            }
        )
    )
    command = [sys.executable, "-m", "mergekit_torch.cli.demo_worker", str(request), str(answer)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise OSError(f"the {name} model did not run: {last[0]}")
    return json.loads(answer.read_text()), np.load(logits)


def report(reports: dict[str, dict[str, Any]]) -> str:
    """The table of both models."""
    quantized, dense = reports["quantized"], reports["dense"]
    rows = [
        ("file size", *(size_text(r["file_bytes"]) for r in (quantized, dense))),
        ("bits per weight", *(f"{r['bits_per_weight']:.2f}" for r in (quantized, dense))),
        ("open", *(f"{1e3 * r['open_seconds']:.1f} ms" for r in (quantized, dense))),
        ("load into modules", *(f"{r['load_seconds']:.2f} s" for r in (quantized, dense))),
        (
            "time to first token",
            *(f"{1e3 * r['first_seconds']:.0f} ms" for r in (quantized, dense)),
        ),
        ("decode", *(f"{r['rate']:.1f} tokens/s" for r in (quantized, dense))),
        ("peak memory of the model", *(size_text(r["peak_bytes"]) for r in (quantized, dense))),
    ]
    ratios = [
        dense["file_bytes"] / quantized["file_bytes"],
        dense["bits_per_weight"] / quantized["bits_per_weight"],
        None,
        None,
        dense["first_seconds"] / quantized["first_seconds"],
        quantized["rate"] / dense["rate"] if dense["rate"] else None,
        dense["peak_bytes"] / quantized["peak_bytes"] if quantized["peak_bytes"] else None,
    ]
    cells = [
        (*row, "" if ratio is None else f"{ratio:.2f}x")
        for row, ratio in zip(rows, ratios, strict=True)
    ]
    return table(("", "quantized", "dense float32", "better by"), cells, right=(1, 2, 3))


def agreement(
    reports: dict[str, dict[str, Any]], logits: dict[str, np.ndarray]
) -> tuple[bool, str]:
    """Whether the two models say the same, and by how much they differ."""
    largest = float(np.abs(logits["dense"]).max())
    difference = float(np.abs(logits["quantized"] - logits["dense"]).max()) / largest
    same = reports["quantized"]["tokens"] == reports["dense"]["tokens"]
    count = len(reports["dense"]["tokens"])
    agree = same and difference <= TOLERANCE
    return agree, (
        f"The two {'agree' if agree else 'DISAGREE'}: logits differ by {difference:.1e} of the "
        f"largest (limit {TOLERANCE:.0e}); greedy tokens are "
        f"{f'identical ({count} of {count})' if same else 'different'}."
    )

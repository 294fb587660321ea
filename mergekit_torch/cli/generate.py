"""``mkrs generate``: text from a model on quantized weights."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import generation
from .common import add_command


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "generate",
        "generate text from a native or float checkpoint in a directory",
        """
mkrs generate smollm2 "What is gravity?"
mkrs generate smollm2 "Once upon a time" --raw --max-new-tokens 200 --temperature 0.8
mkrs generate smollm2 "Say hello." --device cpu --threads 2
mkrs generate llama-70b-4bit "Say hello." --budget 8GiB
""",
        details=(
            "The directory holds config.json, a tokenizer and weights, as mkrs convert and\n"
            "mkrs quantize write them. Weights are memory-mapped and stay quantized."
        ),
    )
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("prompt", help="what to answer; - reads it from standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="stop after this many"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy, higher is more varied"
    )
    parser.add_argument("--seed", type=int, default=None, help="seed of the sampling")
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument("--quiet", action="store_true", help="print no timings")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        default=None,
        help="most bytes of weights in memory, such as 512MiB: stream them from the checkpoint",
    )
    generation.add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, stream."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {args.temperature}")
    if not args.model.is_dir():
        hint = (
            f"; convert it first: mkrs convert {args.model} DIRECTORY"
            if args.model.exists()
            else ""
        )
        raise FileNotFoundError(f"{args.model} must be a directory that holds a model{hint}")
    device, dtype = generation.prepare(args)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    from ..integrations.transformers import load_native, stream_native

    if args.budget is None:
        started = time.perf_counter()
        model = load_native(args.model, device=device, dtype=dtype)
        return answer(args, model, device, started)
    started = time.perf_counter()
    with stream_native(args.model, device=device, dtype=dtype, budget=args.budget) as streamed:
        return answer(args, streamed, device, started)


def answer(args: argparse.Namespace, model: Any, device: torch.device, started: float) -> int:
    """Generate with a loaded model and print text and times."""
    tokenizer = generation.load_tokenizer(args.model)
    loaded = time.perf_counter() - started
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = generation.encode(tokenizer, prompt, args.raw)
    result = generation.generate(
        model,
        ids.to(device),
        args.max_new_tokens,
        temperature=args.temperature,
        on_token=generation.TextPrinter(tokenizer),
    )
    print()
    if not args.quiet:
        print(
            f"[{device}: loaded in {loaded:.2f} s, first of {len(result.tokens)} tokens after "
            f"{result.first:.2f} s, then {result.rate:.1f} tokens/s]",
            file=sys.stderr,
        )
    return 0

"""``mkrs convert``: GGUF to native safetensors, without loss."""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ..checkpoint import ConvertedCheckpoint, open_checkpoint
from ..text import size_text
from .common import add_command, add_rewrite_arguments, check_output, rewrite


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        "turn a GGUF file into native safetensors without loss",
        """
mkrs convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
mkrs convert model.gguf model.safetensors --names gguf
mkrs convert big-00001-of-00004.gguf big --out-shard-size 5GB
""",
        details=(
            "Every quantized weight keeps its exact value: codes are repacked, never requantized.\n"
            "A directory also gets config.json and, if transformers is installed, the tokenizer."
        ),
    )
    parser.add_argument("source", type=Path, help="GGUF file (of a split one any part)")
    parser.add_argument("target", type=Path, help="directory, or a .safetensors file")
    parser.add_argument(
        "--names",
        choices=("hf", "gguf"),
        default="hf",
        help="Hugging Face tensor names and row order, or the file's own",
    )
    add_rewrite_arguments(parser)
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="do not extract the tokenizer into a directory"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar, and say what was written."""
    check_output(args.target, args.force)
    started = time.perf_counter()
    with open_checkpoint(args.source) as checkpoint:
        converted = ConvertedCheckpoint(checkpoint, names=args.names)
        written = rewrite(args, converted, converted.specs, "converting")
        if converted.config is not None and args.target.is_dir():
            written.append(converted.write_config(args.target))
        source_bytes = checkpoint.nbytes
    seconds = time.perf_counter() - started
    print(
        f"{args.target}: {size_text(converted.nbytes)} of tensors from {size_text(source_bytes)} "
        f"of GGUF in {seconds:.2f} s ({source_bytes / seconds / 1e9:.2f} GB/s)"
    )
    if args.target.is_dir() and args.names == "hf" and not args.no_tokenizer:
        written += extract_tokenizer(args.source, args.target)
    for path in written:
        print(f"  {path}")
    return 0


def extract_tokenizer(source: Path, target: Path) -> list[Path]:
    """Let transformers rebuild the tokenizer that the GGUF file carries.

    Returns the files written; none, with a word on stderr, without transformers.
    """
    try:
        import gguf  # noqa: F401  transformers reads the file through it
        from transformers import AutoTokenizer
    except ImportError as error:
        print(
            f"mkrs convert: no tokenizer written ({error}); for it: "
            'pip install "mergekit_torch[demo]"',
            file=sys.stderr,
        )
        return []
    before = {path.name for path in target.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    scratch = target / ".tokenizer"
    try:
        tokenizer.save_pretrained(str(scratch))
        for path in sorted(scratch.iterdir()):
            shutil.move(str(path), target / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sorted(path for path in target.iterdir() if path.name not in before)

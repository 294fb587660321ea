"""``mkrs dequantize``: a checkpoint with every weight dense again."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..checkpoint import TensorSpec, open_checkpoint
from ..text import size_text
from .common import add_command, add_rewrite_arguments, check_output, copy_side_files, rewrite
from .generation import DTYPES


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "dequantize",
        "write a checkpoint's quantized weights as dense float tensors",
        """
mkrs dequantize model-4bit model-f16 --dtype f16
mkrs dequantize model.gguf model.safetensors
""",
        details="The result loads with any safetensors reader. Other tensors are kept as they are.",
    )
    parser.add_argument("source", type=Path, help="native checkpoint or GGUF file")
    parser.add_argument("target", type=Path, help="directory, or a .safetensors file")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="f32", help="dtype to write")
    add_rewrite_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Dequantize within the budget, with a progress bar."""
    check_output(args.target, args.force)
    dtype = DTYPES[args.dtype]
    started = time.perf_counter()
    with open_checkpoint(args.source, dtype=dtype) as checkpoint:
        specs = {}
        for name in checkpoint:
            info = checkpoint.info(name)
            dense = dtype if info.quantization is not None else info.dtype
            if dense is None:
                checkpoint[name]  # raises, naming the type
                raise AssertionError(f"{name} has no dtype and was read")
            specs[name] = TensorSpec(dense, info.shape)
        total = sum(spec.nbytes for spec in specs.values())
        rewrite(args, checkpoint, specs, "dequantizing")
    if args.target.is_dir():
        copy_side_files(args.source, args.target)
        drop_quantization(args.target / "config.json")
    seconds = time.perf_counter() - started
    print(
        f"{args.target}: {size_text(total)} in {seconds:.2f} s ({total / seconds / 1e9:.2f} GB/s)"
    )
    return 0


def drop_quantization(config: Path) -> None:
    """Remove ``quantization_config`` from a config.json: the weights beside it are dense."""
    if not config.exists():
        return
    document = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(document, dict) and document.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

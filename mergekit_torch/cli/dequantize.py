"""``mkrs dequantize``: a checkpoint with every weight dense again."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, TensorSpec, open_checkpoint, save_checkpoint
from .common import add_command, check_output, copy_side_files, progress_bar, size_text
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
    parser.add_argument("--out-shard-size", metavar="SIZE", help="split the output, such as 5GB")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Dequantize one tensor at a time, with a progress bar."""
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
        with progress_bar(total, "dequantizing") as bar:
            save_checkpoint(
                _dense(checkpoint),
                args.target,
                specs=specs,
                max_shard_size=args.out_shard_size,
                progress=lambda _name, nbytes: bar.update(nbytes),
            )
    if args.target.is_dir():
        copy_side_files(args.source, args.target)
        drop_quantization(args.target / "config.json")
    seconds = time.perf_counter() - started
    print(
        f"{args.target}: {size_text(total)} in {seconds:.2f} s ({total / seconds / 1e9:.2f} GB/s)"
    )
    return 0


def _dense(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    for name in checkpoint:
        tensor = checkpoint[name]
        quantized = checkpoint.info(name).quantization is not None
        yield name, tensor.dequantize() if quantized else tensor


def drop_quantization(config: Path) -> None:
    """Remove ``quantization_config`` from a config.json: the weights beside it are dense."""
    if not config.exists():
        return
    document = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(document, dict) and document.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

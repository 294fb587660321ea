"""What the commands share: help, progress bars, safe copies of side files."""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, ConvertedCheckpoint, TensorSpec
from ..memory import rewrite_checkpoint
from ..text import WIDTH


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps examples as they are written and shows defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)", "(default: [])" and "(default: False)" tell nobody anything.
        return super()._get_help_string(action) if action.default else action.help


def add_command(
    commands: Any, name: str, summary: str, examples: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand with a description and examples in its ``--help``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description="\n\n".join(filter(None, (summary[0].upper() + summary[1:] + ".", details))),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=Formatter,
    )
    return parser


def progress_bar(total: int, description: str) -> Any:
    """A tqdm bar in bytes on stderr, silent when stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    )


def add_rewrite_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that write a checkpoint from another."""
    parser.add_argument("--out-shard-size", metavar="SIZE", help="split the output, such as 5GB")
    parser.add_argument(
        "--budget", metavar="SIZE", default="1GiB", help="most bytes of tensors in memory"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run with the same arguments stopped",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")


def rewrite(
    args: argparse.Namespace,
    source: Checkpoint | ConvertedCheckpoint,
    specs: Mapping[str, TensorSpec],
    description: str,
) -> list[Path]:
    """Write ``source`` as ``specs`` to ``args.target`` within the budget, with a progress bar."""
    total = sum(source.info(name).nbytes for name in specs)
    with progress_bar(total, description) as bar:
        return rewrite_checkpoint(
            source,
            args.target,
            specs,
            budget=args.budget,
            resume=args.resume,
            max_shard_size=args.out_shard_size,
            progress=bar.update,
        )


def in_torchrun() -> bool:
    """Whether this is one of several processes that ``torchrun`` has started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rewrite_by_ranks(
    args: argparse.Namespace,
    source: Checkpoint | ConvertedCheckpoint,
    specs: Mapping[str, TensorSpec],
    description: str,
) -> bool:
    """:func:`rewrite` by all processes of a ``torchrun`` job; whether this is the first one."""
    # torch.distributed takes a second to import.
    from ..parallel.convert import connected, plan_work, rewrite_on_ranks

    with connected() as (rank, world):
        plan = plan_work(source, specs, world, args.out_shard_size)
        own = [plan.files[name] for name, owner in plan.owners.items() if owner == rank]
        total = sum(source.info(name).nbytes for part in own for name in part)
        with progress_bar(total if rank == 0 else 0, description) as bar:
            rewrite_on_ranks(
                source,
                args.target,
                specs,
                plan,
                budget=args.budget,
                resume=args.resume,
                progress=bar.update if rank == 0 else None,
            )
    return rank == 0


def check_output(path: Path, force: bool) -> None:
    """Refuse to overwrite a checkpoint unless told to.

    Raises:
        FileExistsError: ``path`` is a file, or a directory that holds weights.
    """
    if force:
        return
    occupied = path.is_file() or (path.is_dir() and any(path.glob("*.safetensors*")))
    if occupied:
        raise FileExistsError(f"{path} already holds a checkpoint; give --force to replace it")


MANIFEST = "shards.json"
"""What says which weights are in which file of ``mkrs shard``."""

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "merges.txt", "LICENSE*")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what stands beside weights (configuration, tokenizer, license) to another directory."""
    if not source.is_dir() or not target.is_dir() or source.resolve() == target.resolve():
        return []
    copied = []
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            weights = path.name.endswith(".index.json") or path.name == MANIFEST
            if path.is_file() and not weights and path.name not in copied:
                shutil.copyfile(path, target / path.name)
                copied.append(path.name)
    return copied

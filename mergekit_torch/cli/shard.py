"""``mkrs shard`` and ``mkrs merge-shards``: one file per rank, and back."""

import argparse
from pathlib import Path
from typing import Any

from ..text import size_text, table
from .common import MANIFEST, add_command, check_output, copy_side_files, progress_bar

# mergekit_torch.parallel is imported when it is needed: torch.distributed takes a second.

DIMENSIONS = ("rows", "columns", "replicate")


def add_parser(commands: Any) -> None:
    """Add both subcommands."""
    parser = add_command(
        commands,
        "shard",
        "write a checkpoint as one file per rank",
        """
mkrs shard llama-4bit llama-4bit-tp4 --world 4
mkrs shard llama-4bit-tp4 llama-4bit-tp2 --world 2
mkrs shard gpt out --world 2 --dim-plan '*.fc1.*=rows' --dim-plan '*.fc2.weight=columns'
""",
        details=(
            "A llama-style checkpoint is cut by attention heads and groups, as tensor parallelism\n"
            "needs it; config.json says how many heads there are. Columns are cut between groups.\n"
            f"{MANIFEST} says what is where; what no rank has alone is in every file."
        ),
    )
    parser.add_argument("source", type=Path, help="checkpoint, or a directory that is sharded")
    parser.add_argument("target", type=Path, help="directory for the files")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--dim-plan",
        action="append",
        default=[],
        metavar="GLOB=DIM",
        help=f"split matching tensors along {', '.join(DIMENSIONS)} (a copy in each); repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=run_shard)

    parser = add_command(
        commands,
        "merge-shards",
        "put the files of mkrs shard back together, bit for bit",
        """
mkrs merge-shards llama-4bit-tp4 llama-4bit
""",
    )
    parser.add_argument("source", type=Path, help=f"directory with {MANIFEST}")
    parser.add_argument("target", type=Path, help="directory, or a .safetensors file")
    parser.add_argument("--out-shard-size", metavar="SIZE", help="split the output, such as 5GB")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=run_merge)


def parse_dims(texts: list[str]) -> dict[str, str]:
    """``["*.fc1.weight=rows", ...]`` as a mapping.

    Raises:
        ValueError: not of that form.
    """
    dims = {}
    for text in texts:
        glob, _, dim = text.rpartition("=")
        if not glob or dim not in DIMENSIONS:
            raise ValueError(f"--dim-plan must be GLOB={'|'.join(DIMENSIONS)}, got {text!r}")
        dims[glob] = dim
    return dims


def run_shard(args: argparse.Namespace) -> int:
    """Shard with a progress bar and print what every file holds."""
    from ..parallel.files import heads_of, plan_shards, shard_checkpoint
    from ..parallel.source import open_parts

    check_output(args.target, args.force)
    dims = parse_dims(args.dim_plan)
    with open_parts(args.source) as source:
        plan = plan_shards(source, args.world, heads_of(args.source), dims)
        split = sum(source.specs[name].nbytes for name in plan)
        total = split + args.world * (source.nbytes - split)
        with progress_bar(total, "sharding") as bar:
            written = shard_checkpoint(
                source, args.target, args.world, dims=dims, progress=bar.update
            )
        whole = source.nbytes
    copy_side_files(args.source, args.target)
    rows = [(path.name, size_text(path.stat().st_size)) for path in written]
    print(table(("file", "size"), rows, right=(1,)))
    print(
        f"\n{args.target}: {size_text(whole)} over {args.world} ranks; {len(plan)} tensors are "
        f"split, {len(source.specs) - len(plan)} ({size_text(whole - split)}) are in every file"
    )
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Merge with a progress bar."""
    from ..parallel.files import merge_shards
    from ..parallel.source import open_parts

    check_output(args.target, args.force)
    with open_parts(args.source) as source:
        total = source.nbytes
    with progress_bar(total, "merging") as bar:
        written = merge_shards(
            args.source, args.target, max_shard_size=args.out_shard_size, progress=bar.update
        )
    if args.target.is_dir():
        copy_side_files(args.source, args.target)
    print(f"{args.target}: {size_text(total)}")
    for path in written:
        print(f"  {path}")
    return 0

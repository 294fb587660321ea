"""``mkrs inspect``: what a checkpoint holds, from its headers alone."""

import argparse
import fnmatch
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ..text import shorten, size_text, table
from .common import add_command


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "inspect",
        "list a checkpoint's tensors, types, sizes and metadata without reading its data",
        """
mkrs inspect model.gguf
mkrs inspect model-4bit --tensors '*.mlp.*'
mkrs inspect model.safetensors --json | jq '.tensors | length'
""",
    )
    parser.add_argument(
        "path", type=Path, help="safetensors or GGUF file, index.json, or a directory"
    )
    parser.add_argument(
        "--tensors", metavar="GLOB", help="list only the tensors whose name matches", default=None
    )
    parser.add_argument("--summary", action="store_true", help="leave the list of tensors out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def type_text(info: TensorInfo) -> str:
    """The file's word for the type, with the native parameters if it is quantized."""
    if info.kind == "quantized" and info.quantization is not None:
        q = info.quantization
        return f"{q.bits}-bit {q.scheme} g{q.group_size}"
    return info.kind


def describe(info: TensorInfo) -> dict[str, Any]:
    """One tensor for ``--json``."""
    entry: dict[str, Any] = {
        "name": info.name,
        "type": info.kind,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "file": info.file.name,
        "offset": info.offset,
        "bits_per_weight": round(info.bits_per_weight, 4),
    }
    if info.quantization is not None:
        q = info.quantization
        entry["quantization"] = {
            "bits": q.bits,
            "group_size": q.group_size,
            "scheme": q.scheme,
            "in_features": q.in_features,
            "scale_dtype": str(q.scale_dtype).removeprefix("torch."),
        }
    return entry


def plain(value: Any) -> Any:
    """Metadata as JSON knows it."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def metadata_text(checkpoint: Checkpoint, key: str, width: int) -> str:
    """One metadata value in one line; long arrays are named by their length."""
    length = getattr(checkpoint.metadata, "length", lambda _key: None)(key)
    if length is not None and length > 8:
        return f"[array of {length}]"
    return shorten(" ".join(str(checkpoint.metadata[key]).split()), width)


def run(args: argparse.Namespace) -> int:
    """Print the inventory."""
    with open_checkpoint(args.path) as checkpoint:
        infos = [checkpoint.info(name) for name in checkpoint]
        listed = [i for i in infos if args.tensors is None or fnmatch.fnmatch(i.name, args.tensors)]
        if args.tensors is not None and not listed:
            raise ValueError(f"{args.path}: no tensor name matches {args.tensors!r}")
        if args.json:
            document = {
                "path": str(args.path),
                "format": checkpoint.format,
                "files": [str(path) for path in checkpoint.files],
                "bytes": checkpoint.nbytes,
                "metadata": {key: plain(checkpoint.metadata[key]) for key in checkpoint.metadata},
                "tensors": [describe(info) for info in listed],
            }
            print(json.dumps(document, indent=2))
            return 0
        print(summary(checkpoint, infos, args.path))
        if not args.summary:
            rows = [
                (
                    info.name,
                    "x".join(map(str, info.shape)) or "scalar",
                    type_text(info),
                    f"{info.bits_per_weight:.2f}",
                    size_text(info.nbytes),
                )
                for info in listed
            ]
            print()
            print(table(("tensor", "shape", "type", "bits", "size"), rows, right=(3, 4)))
    return 0


def summary(checkpoint: Checkpoint, infos: list[TensorInfo], path: Path) -> str:
    """Totals, metadata and a table by type."""
    elements = sum(info.numel for info in infos)
    bits = 8 * checkpoint.nbytes / elements if elements else 0.0
    lines = [
        f"{path}: {checkpoint.format}, {len(checkpoint.files)} file"
        f"{'s' if len(checkpoint.files) != 1 else ''}, {len(infos)} tensors, "
        f"{elements / 1e6:.1f} M weights, {size_text(checkpoint.nbytes)}, "
        f"{bits:.2f} bits per weight",
    ]
    if checkpoint.metadata:
        width = max(len(key) for key in checkpoint.metadata)
        lines.append("")
        lines += [
            f"  {key.ljust(width)}  {metadata_text(checkpoint, key, max(20, 96 - width))}"
            for key in checkpoint.metadata
        ]
    by_type: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in infos:
        by_type[type_text(info)].append(info)
    rows = []
    for kind, members in sorted(by_type.items(), key=lambda item: -sum(i.nbytes for i in item[1])):
        nbytes = sum(info.nbytes for info in members)
        count = sum(info.numel for info in members)
        rows.append(
            (
                kind,
                str(len(members)),
                f"{count / 1e6:.2f} M",
                f"{8 * nbytes / count:.2f}" if count else "-",
                size_text(nbytes),
            )
        )
    lines += ["", table(("type", "tensors", "weights", "bits", "size"), rows, right=(1, 2, 3, 4))]
    return "\n".join(lines)

"""Checkpoints as one file per rank: writing them, putting them back together, resharding."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError, CheckpointWriter, ShardedWriter, TensorSpec
from ..checkpoint.info import QuantInfo
from ..checkpoint.writer import _sync_directory
from .partition import Ranges, column_unit, split_ranges
from .plans import Heads, WeightShape, llama_splits
from .source import MANIFEST, MANIFEST_VERSION, PartSource, _Shards, open_parts

__all__ = ["merge_shards", "plan_shards", "shard_checkpoint"]

Plan = dict[str, tuple[int, Ranges]]
"""Tensor -> dimension and ranges; what is not in it goes into every file."""


def plan_shards(
    source: PartSource,
    world: int,
    heads: Heads | None = None,
    dims: Mapping[str, str] | None = None,
) -> Plan:
    """How the tensors of a checkpoint are spread over ``world`` files.

    A llama-style checkpoint is cut where :func:`tensor_parallel_` cuts the model, so that each rank
    finds its part in its own file. Biases go with the rows of their weights; all that is not in the
    plan goes into every file.

    Args:
        source: an open checkpoint.
        world: number of files.
        heads: of the attention; without them a checkpoint is not cut as llama-style.
        dims: tensor name or glob -> ``"rows"``, ``"columns"`` or ``"replicate"``; later ones win,
            and win over the llama-style plan.

    Raises:
        ValueError: a cut that is not possible, a glob that matches nothing, or no plan at all.
    """
    plan: Plan = {}
    shapes = {
        name: WeightShape(*spec.shape, _unit(spec))
        for name, spec in source.specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }
    if heads is not None:
        for name, split in llama_splits(shapes, heads, world).items():
            plan[name] = (split.dim, split.ranges)
            bias = f"{name.removesuffix('.weight')}.bias"
            if split.dim == 0 and bias in source.specs:
                plan[bias] = (0, split.ranges)
    elif not dims:
        raise ValueError(
            f"{source.path}: no config.json with attention heads beside it, so there is no plan; "
            "give one (--dim-plan GLOB=rows, columns or replicate)"
        )
    for glob, where in (dims or {}).items():
        names = [name for name in source.specs if fnmatchcase(name, glob)]
        if not names:
            raise ValueError(f"{source.path}: no tensor matches the glob {glob!r}")
        if where not in ("rows", "columns", "replicate"):
            raise ValueError(f"{glob}: must be rows, columns or replicate, got {where!r}")
        for name in names:
            plan.pop(name, None)
            if where == "replicate":
                continue
            spec = source.specs[name]
            if not spec.shape or (where == "columns" and len(spec.shape) < 2):
                raise ValueError(f"{name}: has shape {list(spec.shape)} and no {where} to split")
            dim = len(spec.shape) - 1 if where == "columns" else 0
            unit = _unit(spec) if where == "columns" else 1
            plan[name] = (dim, split_ranges(spec.shape[dim], world, unit, f"{name}: {where}"))
    return plan


def _unit(spec: TensorSpec) -> int:
    q = spec.quantization
    return 1 if q is None else column_unit(q.bits, q.group_size, q.in_features)


def heads_of(path: Path) -> Heads | None:
    """The attention heads that a manifest, or ``config.json`` beside a checkpoint, tells of."""
    directory = path if path.is_dir() else path.parent
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return Heads(*(int(n) for n in manifest["heads"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no manifest, or one of a model without heads
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        queries = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or queries)
        size = config.get("head_dim") or int(config["hidden_size"]) // queries
        return Heads(queries, keys, int(size))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError):
        return None


def shard_checkpoint(
    source: str | os.PathLike[str] | PartSource,
    target: str | os.PathLike[str],
    world: int,
    *,
    heads: Heads | None = None,
    dims: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one native safetensors file per rank, and the manifest ``shards.json``.

    Only the part in flight is in memory. The source may be sharded already, for another number of
    ranks. :func:`load_sharded_` reads the files, whatever their number, and :func:`merge_shards`
    puts them back together.

    Args:
        source: a checkpoint, or files of this function.
        target: a directory, made if missing.
        world: number of files.
        heads, dims: as for :func:`plan_shards`; heads are read from ``config.json`` by default.
        progress: called with the bytes written since the last call.

    Returns:
        The files, the manifest last.

    Raises:
        ValueError: what :func:`plan_shards` refuses, or ``target`` is where the source is.
        FileNotFoundError, CheckpointError, OSError: reading or writing failed. Without its
            manifest, which is written last, a directory is not taken for a sharded checkpoint.
    """
    owns = not isinstance(source, PartSource)
    opened = source if isinstance(source, PartSource) else open_parts(source)
    try:
        return _shard(opened, Path(target), world, heads, dims, progress)
    finally:
        if owns:
            opened.close()


def _shard(
    source: PartSource,
    target: Path,
    world: int,
    heads: Heads | None,
    dims: Mapping[str, str] | None,
    progress: Callable[[int], None] | None,
) -> list[Path]:
    if target.exists() and _directory(source.path).resolve() == target.resolve():
        raise ValueError(f"{target}: must be another directory than the source's")
    if heads is None:
        heads = heads_of(source.path)
    plan = plan_shards(source, world, heads, dims)
    target.mkdir(parents=True, exist_ok=True)
    manifest = target / MANIFEST
    manifest.unlink(missing_ok=True)  # from here on the old files are no checkpoint any more
    stale = set(target.glob("rank-*-of-*.safetensors"))
    written = []
    for rank in range(world):
        path = target / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        specs = {
            name: _part_spec(spec, *plan[name], rank) if name in plan else spec
            for name, spec in source.specs.items()
        }
        strings = {key: value for key, value in source.metadata.items() if isinstance(value, str)}
        with CheckpointWriter(path, specs, metadata=strings) as writer:
            for name in specs:
                if name in plan:
                    dim, ranges = plan[name]
                    tensor = source.part(name, dim, *ranges[rank])
                else:
                    tensor = source.whole(name)
                writer.write(name, tensor)
                if progress is not None:
                    progress(specs[name].nbytes)
        written.append(path)
    document = {
        "mkrs.shards_version": MANIFEST_VERSION,
        "files": [path.name for path in written],
        "metadata": strings,
        "heads": heads,
        "tensors": {
            name: {
                "shape": list(spec.shape),
                "dim": plan[name][0] if name in plan else None,
                "ranges": [list(r) for r in plan[name][1]] if name in plan else [],
            }
            for name, spec in source.specs.items()
        },
    }
    for old in stale - set(written):
        old.unlink(missing_ok=True)
    _write_json(manifest, document)
    return [*written, manifest]


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _part_spec(spec: TensorSpec, dim: int, ranges: Ranges, rank: int) -> TensorSpec:
    start, stop = ranges[rank]
    shape = list(spec.shape)
    shape[dim] = stop - start
    q = spec.quantization
    if q is not None and dim == len(shape) - 1:
        q = QuantInfo(q.bits, q.group_size, q.scheme, stop - start, q.scale_dtype, q.dtype)
    return TensorSpec(spec.dtype, tuple(shape), q)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def merge_shards(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Put the files of :func:`shard_checkpoint` back together, bit for bit.

    Args:
        source: the directory with ``shards.json``.
        target, max_shard_size: as for :func:`mergekit_torch.save_checkpoint`.
        progress: called with the bytes written since the last call.

    Returns:
        The files written, an index last.

    Raises:
        FileNotFoundError: no ``shards.json``, or a file of it is missing.
        CheckpointError: files that do not fit the manifest or one another.
        OSError, ValueError: as ``save_checkpoint``.
    """
    directory = Path(source)
    if not (directory / MANIFEST).is_file():
        raise FileNotFoundError(f"{directory}: holds no {MANIFEST}, so no files of mkrs shard")
    with open_parts(directory) as opened:
        assert isinstance(opened, _Shards)
        _check_copies(opened)
        metadata = {str(key): str(value) for key, value in opened.metadata.items()}
        with ShardedWriter(
            target, opened.specs, metadata=metadata, max_shard_size=max_shard_size
        ) as writer:
            for name, spec in opened.specs.items():
                writer.write(name, opened.whole(name))
                if progress is not None:
                    progress(spec.nbytes)
    return writer.written


def _check_copies(shards: _Shards) -> None:
    """That files which each hold a copy hold the same tensors."""
    for number in range(shards.world):
        file = shards._file(shards.path, number)
        if set(file) != set(shards.pieces):
            raise CheckpointError(f"{file.path}: must hold the tensors that {MANIFEST} lists")
        for name, pieces in shards.pieces.items():
            spec = shards.specs[name]
            info, q = file.info(name), spec.quantization
            shape = list(pieces.shape)
            if pieces.dim is not None:
                start, stop = pieces.ranges[number]
                shape[pieces.dim] = stop - start
            own = info.quantization
            same = (own is None) == (q is None) and (
                own is None
                or q is None
                or (own.bits, own.group_size, own.scheme, own.scale_dtype)
                == (q.bits, q.group_size, q.scheme, q.scale_dtype)
            )
            if list(info.shape) != shape or info.dtype != spec.dtype or not same:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} must have shape {shape} and the format of the "
                    f"other files, got {info.kind} {list(info.shape)}"
                )

"""Writing checkpoints of one or more files: :func:`save_checkpoint`, :class:`ShardedWriter`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from .errors import CheckpointError
from .reader import Checkpoint
from .safetensors_header import load_json
from .writer import CheckpointWriter, TensorSpec, _sync_directory, parse_size, spec_of

__all__ = ["ShardedWriter", "save_checkpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def save_checkpoint(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    specs: Mapping[str, TensorSpec] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Path]:
    """Write tensors and QuantizedTensors as safetensors, one file or shards with an index.

    Args:
        tensors: name -> tensor. A :class:`Checkpoint` is read one tensor at a time. Pairs work as
            well; without ``specs`` they are collected first.
        path: a ``.safetensors`` file, or a directory (made if missing) that gets
            ``model.safetensors``, or ``model-0000i-of-0000N.safetensors`` and
            ``model.safetensors.index.json`` as Hugging Face names them.
        metadata: strings for every file's ``__metadata__``; ``{"format": "pt"}`` unless given,
            which transformers requires.
        max_shard_size: bytes of tensor data a file, or like ``"5GB"``; only for a directory. A
            tensor that is larger gets a file of its own.
        specs: what the pairs will be, known beforehand; then only the tensor in flight is held.
        progress: called with name and bytes after every tensor.

    Returns:
        The files written, the index last.

    Raises:
        ValueError: sharding into a file, a size that cannot be, specs that the tensors do not
            match.
        OSError: a write failed. All files are written under temporary names and renamed at the end,
            the index last, so the old checkpoint is intact then, and after a kill at any moment
            the directory holds the old one or the complete new one. A directory's old weight files
            are removed after that. A set of shards that replaces one of as many has other names
            (``model.1-0000i-of-0000N.safetensors``); the index has them.
    """
    if not isinstance(tensors, Mapping) and specs is None:
        tensors = dict(tensors)
    if specs is None:
        assert isinstance(tensors, Mapping)
        specs = specs_of(tensors)
    with ShardedWriter(path, specs, metadata=metadata, max_shard_size=max_shard_size) as writer:
        _write_all(tensors, writer, progress)
    return writer.written


class ShardedWriter:
    """Writes all files of a checkpoint, a tensor at a time; :func:`save_checkpoint` in steps.

    Leaving the ``with`` block without an exception finishes all files; with one, nothing of the new
    checkpoint stays.

    Args:
        path, specs, metadata, max_shard_size: as for :func:`save_checkpoint`.
        partial: as for :class:`CheckpointWriter`.

    Attributes:
        writers: tensor name -> the :class:`CheckpointWriter` of its file.
        written: the files, the index last; empty until they are there.

    Raises:
        ValueError, OSError: as :func:`save_checkpoint`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_size: int | str | None = None,
        partial: bool = False,
    ) -> None:
        target = Path(path)
        limit = None if max_shard_size is None else parse_size(max_shard_size)
        is_file = target.suffix == ".safetensors" and not target.is_dir()
        if is_file and limit is not None:
            raise ValueError(f"{target}: max_shard_size needs a directory to write to, got a file")
        strings = {"format": "pt"} if metadata is None else metadata
        self.writers: dict[str, CheckpointWriter] = {}
        self.written: list[Path] = []
        self.specs = specs
        self._partial = partial
        self.files: list[CheckpointWriter] = []
        self._made: Path | None = None
        self._directory: Path | None = None
        self._weight_map: dict[str, str] = {}
        shards = _plan(specs, limit)
        try:
            if is_file:
                self._add(target, specs, strings, partial)
                return
            if not target.exists():
                target.mkdir(parents=True)
                self._made = target
            self._directory = Path(os.path.realpath(target))
            names = file_names(self._directory, len(shards))
            for name, shard in zip(names, shards, strict=True):
                self._add(self._directory / name, shard, strings, partial)
                for tensor_name, spec in shard.items():
                    self._weight_map.update(dict.fromkeys(spec.stored(tensor_name), name))
        except BaseException:
            self.abort()
            raise

    def _add(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        partial: bool,
    ) -> None:
        writer = CheckpointWriter(path, specs, metadata=metadata, partial=partial)
        self.files.append(writer)
        self.writers.update(dict.fromkeys(specs, writer))

    def write(self, name: str, tensor: Any) -> None:
        """Write one tensor, see :meth:`CheckpointWriter.write`."""
        writer = self.writers.get(name)
        if writer is None:
            raise ValueError(f"tensor {name!r} must be in specs, and is not")
        writer.write(name, tensor)

    def close(self) -> None:
        """Finish all files and put them in place."""
        if self._directory is None:
            self.files[0].close()
            self.written = [self.files[0].path]
            return
        for writer in self.files:
            writer._finish()
        self.written = replace_files(
            self._directory,
            {writer.path.name: writer._rename for writer in self.files},
            self._weight_map,
            sum(spec.nbytes for spec in self.specs.values()),
            suffix="partial" if self._partial else None,
        )

    def abort(self) -> None:
        """Give up; the old checkpoint stays as it is."""
        for writer in self.files:
            writer.abort()
        if self._made is not None and not self.written:
            with contextlib.suppress(OSError):
                self._made.rmdir()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


def _write_all(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    writer: ShardedWriter,
    progress: Callable[[str, int], None] | None,
) -> None:
    pairs = ((name, tensors[name]) for name in tensors) if isinstance(tensors, Mapping) else tensors
    for name, tensor in pairs:
        writer.write(name, tensor)
        if progress is not None:
            progress(name, writer.specs[name].nbytes)


def specs_of(tensors: Mapping[str, Any]) -> dict[str, TensorSpec]:
    if not isinstance(tensors, Checkpoint):
        return {name: spec_of(tensors[name]) for name in tensors}
    specs = {}
    for name in tensors:
        info = tensors.info(name)
        if info.dtype is None:
            tensors[name]  # raises, naming the type
            raise AssertionError(f"{name} has no dtype and was read")
        specs[name] = TensorSpec(info.dtype, info.shape, info.quantization)
    return specs


def _plan(specs: Mapping[str, TensorSpec], limit: int | None) -> list[dict[str, TensorSpec]]:
    """Tensors to shards, in order; a tensor larger than the limit gets a shard of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        size = spec.nbytes
        if limit is not None and shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += size
    return shards


def replace_files(
    directory: Path,
    moves: Mapping[str, Callable[[Path], object]],
    weight_map: Mapping[str, str],
    total_size: int,
    suffix: str | None = None,
) -> list[Path]:
    """Put complete files in place of a directory's checkpoint, all or none of them.

    The index rules: until it changes, the old checkpoint is there, afterwards the new one. So new
    shards must have names that the old index does not have, see :func:`file_names`.

    Args:
        moves: name -> what moves that file to the path given.
        weight_map, total_size: for the index.
        suffix: of the index's temporary name; random by default.

    Returns:
        The files, the index last.
    """
    index_path = directory / _INDEX
    stale = {directory / name for name in _indexed(index_path)} | {directory / _SINGLE}
    paths = [directory / name for name in moves]
    sharded = list(moves) != [_SINGLE]
    with contextlib.ExitStack() as stack:
        index = directory / f".{_INDEX}.{suffix or f'{secrets.token_hex(6)}.tmp'}"
        if sharded:
            stack.callback(index.unlink, missing_ok=True)
            document = {
                "metadata": {"total_size": total_size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            with open(index, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
        for path, move in zip(paths, moves.values(), strict=True):
            move(path)
            if sharded:
                stack.callback(path.unlink, missing_ok=True)
        if sharded:
            os.replace(index, index_path)
        else:
            index_path.unlink(missing_ok=True)
        stack.pop_all()  # all is in place
    _sync_directory(directory)
    for old in stale - set(paths):
        old.unlink(missing_ok=True)
    return [*paths, index_path] if sharded else paths


def file_names(directory: Path, count: int) -> list[str]:
    """Names for a new set of files, none of which the index that is in force has.

    Hugging Face's names, except where a set replaces one of as many shards: then
    ``model.1-0000i-of-0000N``, and the usual ones the next time.
    """
    taken = _indexed(directory / _INDEX)
    generation = 0
    while True:
        stem = f"model.{generation}" if generation else "model"
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1 and not generation:
            names = [_SINGLE]
        if taken.isdisjoint(names):
            return names
        generation += 1


def _indexed(index_path: Path) -> set[str]:
    """The files that an index in force refers to."""
    try:
        text = index_path.read_text(encoding="utf-8")
    except OSError:
        return set()

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{index_path}: {what}")

    try:
        names = set(load_json(text, fail)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # not an index; leave alone what it may mean
    return {
        name
        for name in names
        if isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
    }

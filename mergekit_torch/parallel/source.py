"""Where parts of tensors come from: any checkpoint, or files of :func:`shard_checkpoint`."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, CheckpointError, TensorSpec, open_checkpoint
from ..checkpoint.info import QuantInfo
from ..checkpoint.parts import read_part
from ..checkpoint.pread import ReadMemory
from ..tensor import QuantizedTensor
from .partition import Ranges

__all__ = ["MANIFEST", "PartSource", "Pieces", "open_parts"]

MANIFEST = "shards.json"
MANIFEST_VERSION = 1


class PartSource(ABC):
    """Tensors by name, of which parts can be taken.

    Attributes:
        path: what was opened.
        specs: name -> dtype, whole shape and quantization.
        metadata: the strings of the files' ``__metadata__``.
        bytes_read: bytes of all parts taken so far.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.specs = specs
        self.metadata = metadata
        self.bytes_read = 0
        self._memory = ReadMemory()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(spec.nbytes for spec in self.specs.values())

    def part(self, name: str, dim: int, start: int, stop: int) -> Any:
        """``[start, stop)`` along ``dim`` of a tensor; views where the file allows.

        Raises:
            KeyError: no such tensor.
            ValueError: columns of a quantized weight that are not cut between groups.
            CheckpointError, OSError: a file has changed or cannot be read.
        """
        tensor = self._part(name, dim, start, stop)
        self.bytes_read += tensor.nbytes
        return tensor

    def whole(self, name: str) -> Any:
        """A whole tensor."""
        shape = self.spec(name).shape
        return self.part(name, 0, 0, shape[0]) if shape else self._scalar(name)

    def spec(self, name: str) -> TensorSpec:
        """What is known of a tensor.

        Raises:
            KeyError: no such tensor.
        """
        if name not in self.specs:
            raise KeyError(f"{self.path}: there is no tensor {name!r}")
        return self.specs[name]

    @abstractmethod
    def _part(self, name: str, dim: int, start: int, stop: int) -> Any: ...

    @abstractmethod
    def _scalar(self, name: str) -> Any: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; tensors already taken stay valid."""

    def __enter__(self) -> PartSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Whole(PartSource):
    """An ordinary checkpoint."""

    def __init__(self, checkpoint: Checkpoint, owns: bool) -> None:
        specs = {}
        for name in checkpoint:
            info = checkpoint.info(name)
            if info.dtype is None:
                checkpoint[name]  # raises, naming the type
            specs[name] = TensorSpec(info.dtype, info.shape, info.quantization)  # type: ignore[arg-type]
        super().__init__(Path(checkpoint.path), specs, checkpoint.metadata)
        self.checkpoint = checkpoint
        self._owns = owns

    def _part(self, name: str, dim: int, start: int, stop: int) -> Any:
        return read_part(self.checkpoint, name, dim, start, stop, self._memory)

    def _scalar(self, name: str) -> Any:
        return self.checkpoint[name]

    def close(self) -> None:
        if self._owns:
            self.checkpoint.close()


class Pieces(NamedTuple):
    """How a tensor is spread over the files of a sharded checkpoint: None for a copy in each."""

    shape: tuple[int, ...]
    dim: int | None
    ranges: Ranges


class _Shards(PartSource):
    """The files that :func:`shard_checkpoint` wrote."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[int, Checkpoint] = {}
        path = directory / MANIFEST
        self.pieces, self.names, metadata = _read_manifest(path)
        self.world = len(self.names)
        first = self._file(directory, 0)
        specs = {}
        for name, pieces in self.pieces.items():
            if name not in first:
                raise CheckpointError(f"{first.path}: must hold {name!r}, as {path} says")
            info = first.info(name)
            q = info.quantization
            if q is not None:
                q = QuantInfo(
                    q.bits, q.group_size, q.scheme, pieces.shape[-1], q.scale_dtype, q.dtype
                )
            assert info.dtype is not None
            specs[name] = TensorSpec(info.dtype, pieces.shape, q)
        super().__init__(directory, specs, metadata)

    def _file(self, directory: Path, number: int) -> Checkpoint:
        if number not in self._files:
            self._files[number] = open_checkpoint(directory / self.names[number])
        return self._files[number]

    def _part(self, name: str, dim: int, start: int, stop: int) -> Any:
        pieces = self.pieces[name]
        if pieces.dim is None or pieces.dim != dim:
            if pieces.dim is None:
                return read_part(self._file(self.path, 0), name, dim, start, stop, self._memory)
            # Cut another way than wanted: all pieces, each in part.
            found = []
            for number, _ in _cover(pieces.ranges, 0, pieces.shape[pieces.dim]):
                file = self._file(self.path, number)
                found.append(read_part(file, name, dim, start, stop, self._memory))
            return _join(found, pieces.dim)
        found = []
        for number, (first, last) in _cover(pieces.ranges, start, stop):
            begin = pieces.ranges[number][0]
            file = self._file(self.path, number)
            expected = list(pieces.shape)
            expected[dim] = pieces.ranges[number][1] - begin
            if name not in file or list(file.info(name).shape) != expected:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} must be there with shape {expected}, as "
                    f"{MANIFEST} says"
                )
            found.append(read_part(file, name, dim, first - begin, last - begin, self._memory))
        return _join(found, dim)

    def _scalar(self, name: str) -> Any:
        return self._file(self.path, 0)[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def open_parts(path: str | os.PathLike[str] | Checkpoint) -> PartSource:
    """Open a checkpoint of any kind to take parts of its tensors.

    Args:
        path: what :func:`mergekit_torch.open_checkpoint` takes, an open Checkpoint, or a directory
            that :func:`shard_checkpoint` wrote.

    Raises:
        FileNotFoundError, CheckpointError: as ``open_checkpoint``; a manifest that does not fit its
            files.
    """
    if isinstance(path, Checkpoint):
        return _Whole(path, owns=False)
    where = Path(path)
    if where.name == MANIFEST:
        where = where.parent
    if (where / MANIFEST).is_file():
        return _Shards(where)
    return _Whole(open_checkpoint(where), owns=True)


def _cover(ranges: Ranges, start: int, stop: int) -> list[tuple[int, tuple[int, int]]]:
    """Pieces that make up ``[start, stop)`` and what is needed of each; ranges may overlap."""
    found = []
    at = start
    while at < stop:
        reaching = [(last, -i) for i, (first, last) in enumerate(ranges) if first <= at < last]
        if not reaching:
            raise CheckpointError(f"no file holds element {at} of a split dimension")
        last, negated = max(reaching)
        found.append((-negated, (at, min(last, stop))))
        at = last
    if not found:
        found.append((0, (ranges[0][0], ranges[0][0])))
    return found


def _join(parts: list[Any], dim: int) -> Any:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if not isinstance(first, QuantizedTensor) or dim < first.dim() - 1:
        return torch.cat(parts, dim)
    per_row = first.scale.shape[-1] == 1 and all(
        p.group_size >= sum(part.in_features for part in parts) for p in parts
    )
    components: dict[str, Tensor] = {}
    for name in first.components:
        members = [getattr(part, name) for part in parts]
        if per_row and name != "codes":
            if not all(torch.equal(members[0], other) for other in members[1:]):
                raise CheckpointError(f"pieces of one row must have one {name}, and have several")
            components[name] = members[0]
        else:
            components[name] = torch.cat(members, -1)
    return QuantizedTensor(
        **components,
        bits=first.bits,
        group_size=first.group_size,
        in_features=sum(part.in_features for part in parts),
        dtype=first.dtype,
    )


def _read_manifest(path: Path) -> tuple[dict[str, Pieces], list[str], dict[str, str]]:
    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: {what}")

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"must be JSON ({error})")
    if not isinstance(document, dict):
        fail("must be a JSON object")
    version = document.get("mkrs.shards_version")
    if version != MANIFEST_VERSION:
        fail(
            f"mkrs.shards_version must be {MANIFEST_VERSION}, got {version!r:.80}; "
            "a newer mergekit_torch may know it"
        )
    files, tensors = document.get("files"), document.get("tensors")
    metadata = document.get("metadata", {})
    if not isinstance(files, list) or not files or not all(_is_name(name) for name in files):
        fail("files must be names of files beside it")
    if not isinstance(tensors, dict) or not isinstance(metadata, dict):
        fail("tensors and metadata must be JSON objects")
    pieces = {}
    for name, entry in tensors.items():
        try:
            shape = tuple(int(n) for n in entry["shape"])
            dim = entry["dim"]
            ranges = tuple((int(a), int(b)) for a, b in entry.get("ranges", []))
            valid = dim is None or (
                0 <= dim < len(shape)
                and len(ranges) == len(files)
                and all(0 <= a <= b <= shape[dim] for a, b in ranges)
            )
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            fail(f"tensor {name!r}: shape, dim and a range per file are needed, got {entry!r:.200}")
        pieces[name] = Pieces(shape, dim, ranges)
    return pieces, files, {str(k): str(v) for k, v in metadata.items()}


def _is_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )

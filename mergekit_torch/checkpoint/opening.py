"""Opening checkpoints: :func:`open_checkpoint` finds the files and reads their headers."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS

from .errors import CheckpointError
from .gguf_header import GgufTensor, parse_gguf
from .info import QuantInfo
from .mapped_file import MappedFile
from .native import PREFIX, parse_native
from .pread import available_memory
from .reader import Checkpoint, _Entry
from .safetensors_header import header_length, load_json, parse_header

__all__ = ["open_checkpoint"]

_INDEX_SUFFIX = ".index.json"
_MAX_INDEX = 200_000_000
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    read: Literal["mmap", "pread", "auto"] = "mmap",
) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a ``.safetensors`` file; a ``.gguf`` file (of a split one any part, all are opened);
            an ``*.index.json``; or a directory that holds one of these. What a file is, its first
            bytes decide, not its name.
        dtype: float32, float16 or bfloat16 that quantized weights dequantize to. None: what the
            file says, else float32.
        read: ``"mmap"``: tensors are views onto the mapped file; nothing is read until it is used,
            and the system may drop pages again, so this has the smaller footprint. ``"pread"``: a
            tensor is read when it is taken, by several threads into huge pages of its own, which
            costs about a third of the processor time of faulting a map in; failures to read are
            exceptions, and tensors are independent of the file afterwards. ``"auto"``: pread if
            the whole checkpoint fits into half of the memory that is available now, else mmap.

    Raises:
        FileNotFoundError: the path, or a shard that an index or a split file needs, is not there.
        CheckpointError: a malformed or inconsistent header; nothing has been mapped then.
        ValueError: dtype is not one of the three.
    """
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or None, got {dtype}")
    if read not in ("mmap", "pread", "auto"):
        raise ValueError(f"read must be 'mmap', 'pread' or 'auto', got {read!r}")
    where = Path(path)
    if where.is_dir():
        where = _find(where)
    elif not where.exists():
        raise FileNotFoundError(f"{where}: no such file or directory")
    with _without_gc():
        checkpoint = _open(where, dtype)
    checkpoint.path = Path(path)
    if read == "pread" or (read == "auto" and checkpoint.nbytes <= available_memory() // 2):
        checkpoint._read_with_pread()
    return checkpoint


def _open(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_index(path, dtype)
    file = MappedFile(path)
    magic = file.read(0, min(4, file.size))
    if magic == b"GGUF":
        return _open_gguf(file, dtype)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: GGUF header: must start with b'GGUF', got {magic!r}")
    return _open_safetensors([(file, None)], path, dtype)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Parsing makes thousands of short-lived containers; a collection started by them would walk
    all of torch's objects, which takes ten times as long as opening.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _find(directory: Path) -> Path:
    """The one checkpoint in a directory."""
    for name in ("model.safetensors" + _INDEX_SUFFIX, "model.safetensors"):
        if (directory / name).exists():
            return directory / name
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    candidates = [name for name in names if name.endswith(".safetensors" + _INDEX_SUFFIX)]
    if not candidates:
        candidates = [name for name in names if name.endswith(".safetensors")]
        sharded = [name for name in candidates if re.search(r"-\d{5}-of-\d{5}\.", name)]
        if sharded:
            raise FileNotFoundError(
                f"{directory}: holds the shard {sharded[0]} and no *.safetensors{_INDEX_SUFFIX} "
                "that says what belongs together"
            )
    if not candidates:
        candidates = [name for name in names if name.endswith(".gguf")]
        splits = [match for match in map(_SPLIT.fullmatch, candidates) if match]
        if len(splits) == len(candidates) and len({(m["stem"], m["count"]) for m in splits}) == 1:
            candidates = candidates[:1]
    if not candidates:
        raise FileNotFoundError(f"{directory}: holds no .safetensors or .gguf file")
    if len(candidates) > 1:
        raise CheckpointError(
            f"{directory}: must hold one checkpoint, got {', '.join(candidates[:5])}"
            f"{' ...' if len(candidates) > 5 else ''}; give the path of one of them"
        )
    return directory / candidates[0]


def _open_index(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """Hugging Face's index: ``{"metadata": …, "weight_map": {tensor name: file name}}``."""

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: {what}")

    file = MappedFile(path)
    if file.size > _MAX_INDEX:
        fail(f"an index must be at most {_MAX_INDEX} bytes, got {file.size}")
    index = load_json(file.read(0, file.size), fail)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        fail("must be a JSON object whose weight_map maps tensor names to file names")
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # Only files beside the index: an index from elsewhere must not reach into the file system.
        if not shard or shard in (".", "..") or re.search(r"[/\\\0]", shard):
            fail(f"tensor {name!r} must be in a file of the same directory, got {shard!r:.80}")
        listed.setdefault(shard, set()).add(name)
    shards: list[tuple[MappedFile, set[str] | None]] = []
    for shard, names in sorted(listed.items()):
        try:
            shards.append((MappedFile(path.with_name(shard)), names))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path.with_name(shard)}: this shard is missing; {path.name} needs it for "
                f"{len(names)} tensors, such as {min(names)!r}"
            ) from None
    return _open_safetensors(shards, path, dtype)


def _open_safetensors(
    shards: list[tuple[MappedFile, set[str] | None]], path: Path, dtype: torch.dtype | None
) -> Checkpoint:
    """Files with the stored names to list from each; None lists all."""
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for file, names in shards:
        length = header_length(file.read(0, min(8, file.size)), file.size, file.path)
        stored, strings = parse_header(file.read(8, length), file.size, file.path)
        if names is not None:
            for name in sorted(names - stored.keys()):
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} is not in this shard, and {path.name} lists it "
                    "there"
                )
            stored = {name: tensor for name, tensor in stored.items() if name in names}
        quantized = parse_native(stored, strings, file.path)
        for key, value in strings.items():
            if not key.startswith(PREFIX):
                metadata.setdefault(key, value)
        owner = {part: name for name, (_, _, parts) in quantized.items() for part in parts.values()}
        for name, tensor in stored.items():
            logical = owner.get(name)
            if logical is None:
                entry = _Entry(name, file, tensor, tensor.shape)
            elif logical in entries and entries[logical].file is file:
                continue
            else:
                info, shape, parts = quantized[logical]
                if dtype is not None:
                    info = replace(info, dtype=dtype)
                where = {part: stored[key] for part, key in parts.items()}
                entry = _Entry(logical, file, where, shape, info)
            if entry.name in entries:
                raise CheckpointError(
                    f"{path}: tensor {entry.name!r} must be in one shard, got "
                    f"{entries[entry.name].file.path.name} and {file.path.name}"
                )
            entries[entry.name] = entry
    return Checkpoint(path, "safetensors", entries, [file for file, _ in shards], metadata)


def _open_gguf(file: MappedFile, dtype: torch.dtype | None) -> Checkpoint:
    files = _split_files(file)
    entries: dict[str, _Entry] = {}
    metadata: Mapping[str, Any] = {}
    for number, part in enumerate(files):
        header = parse_gguf(part.map(), part.path, part.map)
        if number == 0:
            metadata = header.metadata
        count = header.metadata.get("split.count", 1)
        if count != len(files) and not (count == 0 and len(files) == 1):
            raise CheckpointError(
                f"{part.path}: split.count must be the {len(files)} in the file's name, "
                f"got {count!r:.80}; a split file must keep the name it was made with"
            )
        if len(files) > 1 and header.metadata.get("split.no") != number:
            raise CheckpointError(
                f"{part.path}: split.no must be {number}, "
                f"got {header.metadata.get('split.no')!r:.80}; the parts are mixed up"
            )
        for name, tensor in header.tensors.items():
            if name in entries:
                raise CheckpointError(
                    f"{part.path}: tensor {name!r} is also in {entries[name].file.path.name}"
                )
            entries[name] = _gguf_entry(name, tensor, part, dtype)
    total = metadata.get("split.tensors.count")
    if len(files) > 1 and total is not None and total != len(entries):
        raise CheckpointError(
            f"{file.path}: the parts must hold {total!r:.80} tensors, got {len(entries)}"
        )
    return Checkpoint(file.path, "gguf", entries, files, metadata)


def _split_files(file: MappedFile) -> list[MappedFile]:
    """All parts of a split file, in order."""
    match = _SPLIT.fullmatch(file.path.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(f"{file.path}: its name must number a part from 1 to {count}")
    files = []
    for number in range(1, count + 1):
        name = f"{match['stem']}-{number:05d}-of-{count:05d}.gguf"
        try:
            files.append(MappedFile(file.path.with_name(name)))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{file.path.with_name(name)}: this part of the split checkpoint is missing"
            ) from None
    return files


def _gguf_entry(
    name: str, tensor: GgufTensor, file: MappedFile, dtype: torch.dtype | None
) -> _Entry:
    layout = GGUF_LAYOUTS.get(tensor.type)
    quantization = None
    if layout is not None and len(tensor.shape) >= 2:
        quantization = QuantInfo(
            bits=layout.bits,
            group_size=layout.group_size,
            scheme=layout.scheme,
            in_features=tensor.shape[-1],
            scale_dtype=layout.scale_dtype,
            dtype=dtype or torch.float32,
        )
    return _Entry(name, file, tensor, tensor.shape, quantization)

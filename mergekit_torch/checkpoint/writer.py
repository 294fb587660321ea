"""Writing safetensors files: :class:`CheckpointWriter` and :func:`save_checkpoint`."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .errors import CheckpointError
from .info import QuantInfo, dtype_code
from .native import PREFIX, check_quant_info, native_metadata
from .reader import Checkpoint
from .safetensors_header import StoredTensor, build_header, load_json

__all__ = ["CheckpointWriter", "TensorSpec", "save_checkpoint", "spec_of"]

_CHUNK = 1 << 28  # one write() call; some systems refuse more than 2 GiB
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class TensorSpec(NamedTuple):
    """What a tensor to be written will be: its dtype and shape, or a quantization and shape.

    ``dtype`` is the stored dtype of a plain tensor and ignored if ``quantization`` is given;
    ``shape`` is logical, so ``[..., out_features, in_features]`` for a quantized weight.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    quantization: QuantInfo | None = None

    def stored(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The plain tensors that go into the file: name -> dtype and shape."""
        if self.quantization is None:
            return {name: (self.dtype, tuple(self.shape))}
        parts = self.quantization.component_shapes(tuple(self.shape))
        return {f"{name}_{part}": entry for part, entry in parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes in the file, all components together."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.stored("").values())


def _is_quantized(tensor: Any) -> bool:
    return all(hasattr(tensor, name) for name in ("codes", "scale", "bits", "in_features"))


def _components_of(tensor: Any) -> dict[str, Tensor]:
    named = {part: getattr(tensor, part) for part in ("codes", "scale", "zero_point", "offset")}
    return {part: component for part, component in named.items() if component is not None}


def spec_of(tensor: Any) -> TensorSpec:
    """The :class:`TensorSpec` of a Tensor or QuantizedTensor.

    Raises:
        TypeError: neither of the two.
    """
    if not isinstance(tensor, Tensor) and not _is_quantized(tensor):
        raise TypeError(f"must be a Tensor or QuantizedTensor, got {type(tensor).__name__}")
    if not _is_quantized(tensor):
        return TensorSpec(tensor.dtype, tuple(tensor.shape))
    info = QuantInfo(
        bits=tensor.bits,
        group_size=tensor.group_size,
        scheme=tensor.scheme,
        in_features=tensor.in_features,
        scale_dtype=tensor.scale.dtype,
        dtype=tensor.dtype,
    )
    return TensorSpec(tensor.dtype, (*tensor.codes.shape[:-1], tensor.in_features), info)


class CheckpointWriter:
    """Writes one safetensors file, a tensor at a time.

    All names, dtypes and shapes are declared first, so the header is written at once and every
    tensor can follow when it is ready, in any order, from any thread, each exactly once. Memory:
    the tensor in flight.

    The bytes go to a temporary file in the same directory, which replaces ``path`` at the end
    (fsync, rename, fsync of the directory). So ``path`` holds either the old file or the complete
    new one, whatever happens, and tensors that are mapped from the old file stay valid. On an
    exception the temporary file is removed; only a killed process leaves it behind (a hidden
    ``.*.tmp``).

    Args:
        path: the file to write; an existing one, or a symbolic link, is replaced at the end.
        specs: name -> :class:`TensorSpec`, or a Tensor or QuantizedTensor to take it from.
        metadata: strings for ``__metadata__``; keys that start with ``mkrs.`` are the format's own.

    Raises:
        ValueError: names that collide, metadata that is not strings, an impossible quantization.
        TypeError: a dtype that the format does not have.
        FileNotFoundError: the directory does not exist.
        OSError: the file cannot be created or written (read-only, disk full); names the file.

    Example::

        with CheckpointWriter("model.safetensors", specs) as writer:
            for name in specs:
                writer.write(name, compute(name))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = _resolve(path)
        self._specs = {
            name: spec if isinstance(spec, TensorSpec) else spec_of(spec)
            for name, spec in specs.items()
        }
        self._lock = threading.Lock()
        self._file: Any = None
        self._temporary: Path | None = None
        header, self._stored, self.nbytes = self._header(dict(metadata or {}))
        self._pending = set(self._specs)
        if self.path.is_dir():
            raise IsADirectoryError(
                errno.EISDIR, "is a directory, not a file to write", str(self.path)
            )
        if self.path.exists() and not os.access(self.path, os.W_OK):
            # Renaming would get around the protection.
            reason = "is read-only; make it writable or choose another path"
            raise PermissionError(errno.EACCES, reason, str(self.path))
        temporary = self.path.with_name(f".{self.path.name[:80]}.{secrets.token_hex(6)}.tmp")
        with self._named("create"):
            # Not mkstemp: the file is to get the permissions of any other file of the user.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            fd = os.open(temporary, flags, 0o666)
        self._temporary = temporary
        try:
            with contextlib.suppress(OSError):
                os.chmod(temporary, os.stat(self.path).st_mode & 0o7777)
            self._file = os.fdopen(fd, "wb", buffering=0)
            with self._named("write"):
                self._put(0, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def _header(self, metadata: dict[str, str]) -> tuple[bytes, dict[str, StoredTensor], int]:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(
                    f"{self.path}: metadata must map strings to strings, got {key!r}: {value!r:.80}"
                )
            if key.startswith(PREFIX):
                raise ValueError(
                    f"{self.path}: metadata keys must not start with {PREFIX!r}, got {key!r}"
                )
        owners: dict[str, str] = {}
        tensors = []
        quantized: dict[str, QuantInfo] = {}
        for name, spec in self._specs.items():

            def fail(what: str, name: str = name) -> NoReturn:
                raise ValueError(f"{self.path}: tensor {name!r}: {what}")

            if not isinstance(name, str) or name == "__metadata__":
                fail("a name must be a string other than '__metadata__'")
            if not all(type(size) is int and size >= 0 for size in spec.shape):
                fail(f"shape must be sizes from 0 up, got {spec.shape}")
            if spec.quantization is not None:
                check_quant_info(spec.quantization, fail)
                if len(spec.shape) < 2 or spec.shape[-1] != spec.quantization.in_features:
                    fail(
                        "the shape of a quantized weight must be [..., N, in_features = "
                        f"{spec.quantization.in_features}], got {list(spec.shape)}"
                    )
                quantized[name] = spec.quantization
            for part, (dtype, shape) in spec.stored(name).items():
                if part in owners or (part != name and part in self._specs):
                    fail(f"its stored name {part!r} is already used by {owners.get(part, part)!r}")
                owners[part] = name
                tensors.append((part, dtype_code(dtype), shape, dtype.itemsize * math.prod(shape)))
        return build_header(tensors, {**metadata, **native_metadata(quantized)})

    def write(self, name: str, tensor: Any) -> None:
        """Write one declared tensor.

        Args:
            name: a declared name.
            tensor: a Tensor of the declared dtype and shape on any device; for a quantized one a
                QuantizedTensor or its components as a dict.

        Raises:
            KeyError: the name was not declared.
            ValueError: written before, or another dtype or shape than declared.
            OSError: the data cannot be written; the old file is intact.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: the writer must be open, got one that is finished")
        spec = self._specs.get(name)
        if spec is None:
            raise KeyError(f"{self.path}: tensor {name!r} was not declared")
        if spec.quantization is None:
            parts = {name: tensor}
        else:
            found = (
                tensor if isinstance(tensor, dict) else self._check_quantized(name, spec, tensor)
            )
            parts = {f"{name}_{part}": component for part, component in found.items()}
        expected = spec.stored(name)
        if parts.keys() != expected.keys():
            raise ValueError(
                f"{self.path}: tensor {name!r}: must have the components "
                f"{', '.join(sorted(expected))}, got {', '.join(sorted(parts))}"
            )
        for part, (dtype, shape) in expected.items():
            value = parts[part]
            plain = isinstance(value, Tensor) and not _is_quantized(value)
            if not plain or value.dtype != dtype or tuple(value.shape) != shape:
                got = type(value).__name__
                if plain:
                    got = f"{value.dtype} of shape {list(value.shape)}"
                raise ValueError(
                    f"{self.path}: tensor {part!r}: must be {dtype} of shape {list(shape)} as "
                    f"declared, got {got}"
                )
        with self._lock:
            if name not in self._pending:
                raise ValueError(f"{self.path}: tensor {name!r} must be written once, got it again")
            self._pending.discard(name)
        for part, value in parts.items():
            data = _bytes_of(value)
            with self._lock, self._named("write"):
                self._put(self._stored[part].begin, data)

    def _check_quantized(self, name: str, spec: TensorSpec, tensor: Any) -> dict[str, Tensor]:
        if not _is_quantized(tensor):
            raise ValueError(
                f"{self.path}: tensor {name!r}: must be a QuantizedTensor or a dict of components "
                f"as declared, got {type(tensor).__name__}"
            )
        given, declared = spec_of(tensor).quantization, spec.quantization
        if given != declared:
            raise ValueError(
                f"{self.path}: tensor {name!r}: must be quantized as declared, "
                f"{declared}, got {given}"
            )
        return _components_of(tensor)

    def close(self) -> None:
        """Finish: every tensor is there, so the new file takes the place of the old one.

        Raises:
            ValueError: declared tensors have not been written; nothing is replaced.
            OSError: the data did not reach the disk; nothing is replaced.
        """
        self._finish()
        self._rename(self.path)

    def _finish(self) -> None:
        """All checks and the fsync, up to the rename."""
        if self._file is None:
            raise ValueError(f"{self.path}: the writer must be open, got one that is finished")
        if self._pending:
            missing = sorted(self._pending)
            self.abort()
            raise ValueError(
                f"{self.path}: all declared tensors must be written, {len(missing)} are missing, "
                f"such as {missing[0]!r}; the file was not written"
            )
        try:
            with self._named("write"):
                os.fsync(self._file.fileno())
                self._file.close()
        except BaseException:
            self.abort()
            raise
        self._file = None

    def _rename(self, target: Path) -> None:
        assert self._temporary is not None
        try:
            with self._named("replace"):
                os.replace(self._temporary, target)
        except BaseException:
            self.abort()
            raise
        self._temporary = None
        _sync_directory(target.parent)

    def abort(self) -> None:
        """Give up: the old file stays. Does nothing after :meth:`close`."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._file is not None:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_temporary", None) is not None:
            self.abort()

    def _put(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        while len(data):
            written = self._file.write(data[:_CHUNK])
            data = data[written:]

    @contextlib.contextmanager
    def _named(self, action: str) -> Iterator[None]:
        """Name the target in the system's errors, and say that it is intact."""
        try:
            yield
        except OSError as error:
            if isinstance(error, (FileNotFoundError, NotADirectoryError)) and action == "create":
                raise FileNotFoundError(
                    error.errno, "cannot create: its directory does not exist", str(self.path)
                ) from error
            reason = f"cannot {action}: {error.strerror or error}; an existing file is unchanged"
            raise OSError(error.errno, reason, str(self.path)) from error


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; no copy if it is contiguous on the CPU."""
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if data.numel() == 0:
        return memoryview(b"")
    # Not view(-1): a dimension of size 1 may have kept a stride that view(dtype) refuses.
    raw = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
    return raw.numpy().data.cast("B")


def _resolve(path: str | os.PathLike[str]) -> Path:
    """Absolute, with links followed in the directory but not in the last name.

    Caches of models link names to shared files, which a writer must not replace.
    """
    where = Path(path)
    return Path(os.path.realpath(where.parent)) / where.name


def _sync_directory(directory: Path) -> None:
    if sys.platform == "win32":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        # Some file systems cannot; the rename itself has happened.
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def parse_size(size: int | str) -> int:
    """Bytes of ``5_000_000_000``, ``"5GB"`` (powers of ten) or ``"5GiB"`` (powers of two).

    Raises:
        ValueError: not a positive size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        value: float = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", str(size).upper())
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                f"a size must be a number of bytes or like '5GB' or '2GiB', got {size!r}"
            )
        value = float(match[1]) * _UNITS[match[2]]
    if value < 1:
        raise ValueError(f"a size must be at least one byte, got {size!r}")
    return int(value)


def _specs_of(tensors: Mapping[str, Any]) -> dict[str, TensorSpec]:
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
            so the old checkpoint is intact then. A directory's old weight files that are not part
            of the new checkpoint are removed last.
    """
    target = Path(path)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    is_file = target.suffix == ".safetensors" and not target.is_dir()
    if is_file and limit is not None:
        raise ValueError(f"{target}: max_shard_size needs a directory to write to, got a file")
    if not isinstance(tensors, Mapping) and specs is None:
        tensors = dict(tensors)
    if specs is None:
        assert isinstance(tensors, Mapping)
        specs = _specs_of(tensors)
    strings = {"format": "pt"} if metadata is None else metadata
    if is_file:
        with CheckpointWriter(target, specs, metadata=strings) as writer:
            _write_all(tensors, dict.fromkeys(specs, writer), progress)
        return [writer.path]
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(target))
    try:
        return _save_directory(tensors, target, specs, strings, limit, progress)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise


def _write_all(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    writers: Mapping[str, CheckpointWriter],
    progress: Callable[[str, int], None] | None,
) -> None:
    pairs = ((name, tensors[name]) for name in tensors) if isinstance(tensors, Mapping) else tensors
    for name, tensor in pairs:
        writer = writers.get(name)
        if writer is None:
            raise ValueError(f"tensor {name!r} must be in specs, and is not")
        writer.write(name, tensor)
        if progress is not None:
            progress(name, writer._specs[name].nbytes)


def _save_directory(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    directory: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    limit: int | None,
    progress: Callable[[str, int], None] | None,
) -> list[Path]:
    shards = _plan(specs, limit)
    count = len(shards)
    index_path = directory / "model.safetensors.index.json"
    stale = _old_files(directory, index_path)
    with contextlib.ExitStack() as stack:
        writers: list[CheckpointWriter] = []
        owner: dict[str, CheckpointWriter] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = (
                "model.safetensors"
                if count == 1
                else f"model-{number:05d}-of-{count:05d}.safetensors"
            )
            writer = CheckpointWriter(directory / name, shard, metadata=metadata)
            stack.callback(writer.abort)
            writers.append(writer)
            owner.update(dict.fromkeys(shard, writer))
            for tensor_name, spec in shard.items():
                weight_map.update(dict.fromkeys(spec.stored(tensor_name), name))
        _write_all(tensors, owner, progress)
        for writer in writers:
            writer._finish()
        index: Path | None = None
        if count > 1:
            index = directory / f".{index_path.name}.{secrets.token_hex(6)}.tmp"
            stack.callback(index.unlink, missing_ok=True)
            total = sum(spec.nbytes for spec in specs.values())
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
                indent=2,
            )
            with open(index, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
        # From here on only renames. Without its index an old set of shards reads as incomplete,
        # never as a mixture of old and new.
        index_path.unlink(missing_ok=True)
        for writer in writers:
            writer._rename(writer.path)
        if index is not None:
            os.replace(index, index_path)
    written = [writer.path for writer in writers] + ([index_path] if count > 1 else [])
    for old in stale - set(written):
        old.unlink(missing_ok=True)
    _sync_directory(directory)
    return written


def _old_files(directory: Path, index_path: Path) -> set[Path]:
    """Weight files of the checkpoint that is being replaced."""
    old = {directory / "model.safetensors"}
    try:
        text = index_path.read_text(encoding="utf-8")
    except OSError:
        return old

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{index_path}: {what}")

    try:
        names = set(load_json(text, fail)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return old  # not an index; leave alone what it may mean
    return old | {
        directory / name
        for name in names
        if isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
    }

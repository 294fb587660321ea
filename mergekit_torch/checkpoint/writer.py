"""Writing one safetensors file: :class:`CheckpointWriter`."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .info import QuantInfo, dtype_code
from .native import PREFIX, check_quant_info, native_metadata
from .safetensors_header import StoredTensor, build_header

__all__ = ["CheckpointWriter", "TensorSpec", "parse_size", "spec_of"]

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
        partial: write to ``.<name>.partial``, taking over one that is there, for jobs that go on
            after a kill. Whoever asks for it keeps track of what is in the file (see
            :meth:`skip_rows`), and sets :attr:`keep` to have :meth:`abort` leave it.

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
        partial: bool = False,
    ) -> None:
        self.path = _resolve(path)
        #: Whether :meth:`abort` leaves a partial file behind.
        self.keep = False
        self._specs = {
            name: spec if isinstance(spec, TensorSpec) else spec_of(spec)
            for name, spec in specs.items()
        }
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._puts = 0  # writes under way
        self._file: Any = None
        self._temporary: Path | None = None
        header, self._stored, self.nbytes = self._header(dict(metadata or {}))
        self._pending = set(self._specs)
        self._rows: dict[str, int] = {}  # written so far, of tensors that come in rows
        if self.path.is_dir():
            raise IsADirectoryError(
                errno.EISDIR, "is a directory, not a file to write", str(self.path)
            )
        if self.path.exists() and not os.access(self.path, os.W_OK):
            # Renaming would get around the protection.
            reason = "is read-only; make it writable or choose another path"
            raise PermissionError(errno.EACCES, reason, str(self.path))
        suffix = "partial" if partial else f"{secrets.token_hex(6)}.tmp"
        temporary = self.path.with_name(f".{self.path.name[:80]}.{suffix}")
        with self._named("create"):
            # Not mkstemp: the file is to get the permissions of any other file of the user.
            flags = os.O_RDWR | os.O_CREAT | (0 if partial else os.O_EXCL)
            #: Whether a partial file was there already.
            self.took_over = temporary.exists()
            flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            fd = os.open(temporary, flags, 0o666)
        self._temporary = temporary
        try:
            with contextlib.suppress(OSError):
                os.chmod(temporary, os.stat(self.path).st_mode & 0o7777)
            self._file = os.fdopen(fd, "wb", buffering=0)
            with self._named("write"):
                self._put(0, memoryview(header))
                if partial:  # what was there may have been longer
                    self._file.truncate(self.nbytes)
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
            with self._named("write"):
                self._put(self._stored[part].begin, data)

    def write_rows(
        self, name: str, parts: Mapping[str, Tensor], *, first: int | None = None
    ) -> None:
        """Write rows of a declared tensor.

        Args:
            name: a declared name.
            parts: ``{"": rows}`` of a plain tensor, or the components of a quantized one; each
                ``[n, elements of a row]``, all leading dimensions counted as one. The rows of a
                vector are its elements.
            first: the place of the first of them; every row comes exactly once, which is the
                caller's to keep. By default the next rows, so that they come in order.

        Raises:
            KeyError: the name was not declared.
            ValueError: more rows than declared, or another dtype or row length.
            OSError: the data cannot be written; the old file is intact.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: the writer must be open, got one that is finished")
        spec = self._specs.get(name)
        if spec is None:
            raise KeyError(f"{self.path}: tensor {name!r} was not declared")
        with self._lock:
            if first is None:
                first = self._rows.setdefault(name, 0)
            if name not in self._pending:
                raise ValueError(f"{self.path}: tensor {name!r} must be written once, got it again")
        count = 0
        for part, (dtype, shape) in spec.stored(name).items():
            value = parts[part.removeprefix(f"{name}_") if spec.quantization else ""]
            columns = shape[-1] if len(shape) > 1 else 1
            count = value.shape[0]
            fits = first + count <= _row_count(shape)
            if value.dtype != dtype or tuple(value.shape) != (count, columns) or not fits:
                raise ValueError(
                    f"{self.path}: tensor {part!r}: must be {dtype} rows of {columns} elements up "
                    f"to {_row_count(shape)} of them, got {value.dtype} of shape "
                    f"{list(value.shape)} after {first}"
                )
            position = self._stored[part].begin + first * columns * dtype.itemsize
            data = _bytes_of(value)
            with self._named("write"):
                self._put(position, data)
        self.skip_rows(name, count)

    def skip_rows(self, name: str, count: int) -> None:
        """Count the next rows of a tensor as written: a taken-over partial file has them."""
        with self._lock:
            self._rows[name] = self._rows.get(name, 0) + count
            if self._rows[name] == _row_count(self._specs[name].shape):
                self._pending.discard(name)

    def flush(self) -> None:
        """Wait until what was written is on the disk.

        Raises:
            OSError: it did not get there.
        """
        if self._file is not None:
            with self._named("write"):
                os.fdatasync(self._file.fileno()) if hasattr(os, "fdatasync") else os.fsync(
                    self._file.fileno()
                )

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
        file = self._taken()
        try:
            with self._named("write"), file:
                os.fsync(file.fileno())
        except BaseException:
            self.abort()
            raise

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
        file = self._taken()
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        temporary, self._temporary = self._temporary, None
        if temporary is not None and not self.keep:
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
        """Write at a position of the file; several threads may at once."""
        with self._idle:
            if self._file is None:
                raise ValueError(f"{self.path}: the writer must be open, got one that is finished")
            if not hasattr(os, "pwrite"):
                self._file.seek(position)
                while len(data):
                    data = data[self._file.write(data[:_CHUNK]) :]
                return
            fd = self._file.fileno()
            self._puts += 1
        try:
            while len(data):
                written = os.pwrite(fd, data[:_CHUNK], position)
                position += written
                data = data[written:]
        finally:
            with self._idle:
                self._puts -= 1
                self._idle.notify_all()

    def _taken(self) -> Any:
        """The file, no more to be written to, when nobody writes to it any more."""
        with self._idle:
            file, self._file = self._file, None
            self._idle.wait_for(lambda: self._puts == 0)
        return file

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


def _row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor, all leading dimensions counted as one; a vector's are its elements."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


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

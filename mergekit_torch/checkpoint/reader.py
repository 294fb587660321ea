"""What an open checkpoint is: :class:`Checkpoint` and :class:`TensorSlice`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, GgufLayout, gguf_unpack

from .gguf_header import GgufTensor
from .info import SAFETENSORS_DTYPES, QuantInfo, TensorInfo
from .mapped_file import MappedFile
from .pread import ReadMemory, read_slice, read_tensor
from .safetensors_header import StoredTensor

__all__ = ["Checkpoint", "TensorSlice"]

# GGUF types that are a torch dtype as they are.
_GGUF_PLAIN: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}


class _Entry(NamedTuple):
    """One listed tensor; kept small, a large model has tens of thousands."""

    name: str
    file: MappedFile
    # Of natively quantized weights: component -> where it is.
    stored: StoredTensor | GgufTensor | dict[str, StoredTensor]
    shape: tuple[int, ...]
    quantization: QuantInfo | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """As :attr:`TensorInfo.dtype`."""
        if self.quantization is not None:
            return self.quantization.dtype
        if isinstance(self.stored, GgufTensor):
            return _GGUF_PLAIN.get(self.stored.type)
        assert isinstance(self.stored, StoredTensor)
        return SAFETENSORS_DTYPES.get(self.stored.code)

    @property
    def info(self) -> TensorInfo:
        """All that is known of it."""
        path, stored = self.file.path, self.stored
        if isinstance(stored, dict):
            parts = tuple(
                _Entry(f"{self.name}_{part}", self.file, where, where.shape).info
                for part, where in stored.items()
            )
            kind, begin, nbytes = "quantized", parts[0].offset, sum(part.nbytes for part in parts)
        else:
            parts = ()
            kind = stored.type_name if isinstance(stored, GgufTensor) else stored.code
            begin, nbytes = stored.begin, stored.end - stored.begin
        return TensorInfo(
            self.name, kind, self.dtype, self.shape, nbytes, path, begin, self.quantization, parts
        )


class Checkpoint(Mapping[str, Any]):
    """A read-only mapping of names to tensors that are views onto the mapped files.

    ``checkpoint[name]`` is a :class:`torch.Tensor`, or a :class:`mergekit_torch.QuantizedTensor`
    for weights quantized natively or by GGUF. Natively quantized weights are listed under their
    logical name; their components are folded into one tensor.

    * Tensors of safetensors files and unquantized GGUF tensors are zero-copy views; one whose data
      is not aligned to its elements is copied instead. Quantized GGUF tensors are converted at
      every access, without loss; keep what you need.
    * Each tensor has a storage of its own, so saving or sharing one does not drag the file along.
    * The map is copy-on-write: writing into a tensor changes neither the file nor other processes.
    * A tensor keeps the map alive; closing the checkpoint does not invalidate it.

    Raises (on access):
        KeyError: no such tensor.
        CheckpointError: the file was replaced, truncated, changed or removed since it was opened,
            or the checkpoint is closed.
        NotImplementedError: a tensor type without a native form, named in the message.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        entries: dict[str, _Entry],
        files: list[MappedFile],
        metadata: Mapping[str, Any],
    ) -> None:
        self.path = path
        #: ``"safetensors"`` or ``"gguf"``.
        self.format = format
        #: The file's own metadata: strings for safetensors, the key-value pairs for GGUF.
        self.metadata = metadata
        #: How tensors get into memory: ``"mmap"`` or ``"pread"``, see :func:`open_checkpoint`.
        self.read = "mmap"
        self._entries = entries
        self._files = files
        self._memory: ReadMemory | None = None

    def __getitem__(self, name: str) -> Any:
        entry = self._entry(name)
        if entry.quantization is None:
            return _plain(entry)
        return self._quantized(entry, self._components(entry))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self._entries

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self)} tensors)"

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Tensors already taken stay valid; further access raises."""
        for file in self._files:
            file.close()
        if self._memory is not None:
            self._memory.close()

    def drop_pages(self, name: str) -> None:
        """Take a tensor's pages of the memory map out of this process's resident memory.

        A reader that goes through a file once calls it behind itself. Tensors over the pages stay
        valid and read them from the file again; what was *written* into them is lost. Does nothing
        for ``read="pread"``.

        Raises:
            KeyError: no such tensor.
        """
        entry = self._entry(name)
        parts = entry.stored.values() if isinstance(entry.stored, dict) else [entry.stored]
        for part in parts:
            entry.file.drop_pages(part.begin, part.end - part.begin)

    def _read_with_pread(self) -> None:
        self.read = "pread"
        self._memory = ReadMemory()
        for file in self._files:
            file.memory = self._memory

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [file.path for file in self._files]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data stored, headers excluded."""
        return sum(entry.info.nbytes for entry in self._entries.values())

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor without reading it.

        Raises:
            KeyError: no such tensor.
        """
        return self._entry(name).info

    def components(self, name: str) -> tuple[dict[str, Tensor], QuantInfo]:
        """The components of a quantized weight, without wrapping them.

        Returns:
            ``{"codes", "scale"}`` and ``"zero_point"`` or ``"offset"`` as the scheme has it, and
            the parameters. Zero-copy for native files, converted for GGUF.

        Raises:
            KeyError: no such tensor.
            ValueError: the tensor is not quantized.
        """
        entry = self._entry(name)
        if entry.quantization is None:
            _refuse_codebook(entry)
            raise ValueError(
                f"{entry.file.path}: tensor {name!r} must be quantized to have components, "
                f"got plain {entry.info.kind}"
            )
        return self._components(entry), entry.quantization

    def get_slice(self, name: str) -> TensorSlice:
        """A handle whose indexing reads only the bytes it needs: ``get_slice(name)[a:b, c:d]``.

        Raises:
            KeyError: no such tensor.
        """
        return TensorSlice(self, self._entry(name))

    def stored_items(self) -> Iterator[tuple[str, Tensor]]:
        """Plain tensors one at a time, quantized weights as their components.

        Names are those of a state dict (``T_codes``, ``T_scale``, ``T_zero_point`` or
        ``T_offset``), for GGUF files as well. Only the tensor in flight is held here.
        """
        for name, entry in self._entries.items():
            if entry.quantization is None:
                yield name, _plain(entry)
            else:
                for part, tensor in self._components(entry).items():
                    yield f"{name}_{part}", tensor

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"{self.path}: there is no tensor {name!r}") from None

    def _components(
        self, entry: _Entry, rows: slice | None = None, columns: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Components, of some rows and a block-aligned range of columns for GGUF types."""
        if isinstance(entry.stored, GgufTensor):
            return _gguf_components(entry, entry.stored, rows, columns)
        assert isinstance(entry.stored, dict)
        return {
            part: _view(entry.file, stored, SAFETENSORS_DTYPES[stored.code])
            for part, stored in entry.stored.items()
        }

    def _quantized(
        self, entry: _Entry, parts: dict[str, Tensor], in_features: int | None = None
    ) -> Any:
        # Imported late: tensor depends on the ops, and plain files need neither.
        from mergekit_torch.tensor import QuantizedTensor

        info = entry.quantization
        assert info is not None
        return QuantizedTensor(
            parts["codes"],
            parts["scale"],
            parts.get("zero_point"),
            parts.get("offset"),
            bits=info.bits,
            group_size=info.group_size,
            in_features=info.in_features if in_features is None else in_features,
            dtype=info.dtype,
        )


class TensorSlice:
    """One tensor of a checkpoint, to be read in part; see :meth:`Checkpoint.get_slice`.

    Attributes:
        shape: logical shape.
        dtype: torch dtype, of the dequantized form if quantized.
    """

    def __init__(self, checkpoint: Checkpoint, entry: _Entry) -> None:
        self._checkpoint = checkpoint
        self._tensor = entry
        self.shape = entry.shape
        self.dtype = entry.dtype

    def __repr__(self) -> str:
        return f"TensorSlice({self._tensor.info.name!r}, shape={list(self.shape)})"

    def __getitem__(self, index: Any) -> Any:
        """Basic indexing: integers, slices with positive step, ``...``.

        Rows of a quantized weight can be cut anywhere, columns at group boundaries (see
        ``QuantizedTensor``). Of a quantized GGUF tensor only the rows, and only the blocks of the
        columns asked for, are converted.

        Raises:
            TypeError: another kind of index.
            IndexError: out of range, or more indices than dimensions.
        """
        entry = self._tensor
        parts = _expand(index, self.shape)
        if entry.quantization is None:
            return _plain(entry, parts)
        if isinstance(entry.stored, GgufTensor):
            return self._gguf(entry, parts)
        return self._native(entry, parts)

    def _native(self, entry: _Entry, parts: list[int | slice]) -> Any:
        checkpoint = self._checkpoint
        if entry.file.memory is None:
            return checkpoint[entry.name][tuple(parts)]
        assert isinstance(entry.stored, dict)
        views = {
            part: _view(entry.file, stored, SAFETENSORS_DTYPES[stored.code], mapped=True)
            for part, stored in entry.stored.items()
        }
        # The class knows where rows and columns may be cut; only what is left is copied.
        tensor = checkpoint._quantized(entry, views)[tuple(parts)]
        return tensor.clone(memory_format=torch.contiguous_format)

    def _gguf(self, entry: _Entry, parts: list[int | slice]) -> Any:
        layout = GGUF_LAYOUTS[entry.stored.type]  # type: ignore[union-attr]
        rows, columns = parts[0], parts[-1]
        k = self.shape[-1]
        inner: list[int | slice] = list(parts)
        begin, end = 0, k
        if isinstance(columns, slice):
            first, last, step = columns.indices(k)
            if last > first:
                begin = first // layout.block * layout.block
                end = min(-(-last // layout.block) * layout.block, k)
            inner[-1] = slice(first - begin, max(last, first) - begin, step)
        whole: slice | None = None
        if isinstance(rows, slice) and rows.step in (None, 1):
            first, last, _ = rows.indices(self.shape[0])
            whole = slice(first, max(first, last))
            inner[0] = slice(None)
        elif isinstance(rows, int):
            whole = slice(rows, rows + 1)
            inner[0] = 0
        components = self._checkpoint._components(entry, whole, (begin, end))
        tensor = self._checkpoint._quantized(entry, components, end - begin)
        if inner[-1] == slice(0, end - begin, 1):
            inner[-1] = slice(None)
        return tensor if all(part == slice(None) for part in inner) else tensor[tuple(inner)]


def _refuse_codebook(entry: _Entry) -> None:
    """Raise for a tensor that is neither a torch dtype nor convertible, naming its type."""
    info = entry.info
    if info.dtype is not None or info.quantization is not None:
        return
    if isinstance(entry.stored, GgufTensor):
        if entry.stored.type in GGUF_LAYOUTS:
            reason = f"{info.kind} of {len(info.shape)} dimension(s) has no rows to quantize along"
            advice = "only weights of two or more dimensions are stored in this type"
        else:
            names = ", ".join(layout.name for layout in GGUF_LAYOUTS.values())
            reason = f"GGUF type {info.kind} has no native form (it is not scale * q + offset)"
            advice = f"convertible are {names} and F32, F16, BF16, F64, I8 to I64"
    else:
        reason = f"torch has no dtype for safetensors {info.kind}"
        advice = "convert the file to another dtype"
    raise NotImplementedError(f"{info.file}: tensor {info.name!r}: {reason}; {advice}")


def _plain_dtype(entry: _Entry) -> torch.dtype:
    """The dtype of a plain tensor; raises for a type that torch does not have."""
    dtype = entry.dtype
    if dtype is None:
        _refuse_codebook(entry)
    assert dtype is not None
    return dtype


def _plain(entry: _Entry, index: list[int | slice] | None = None) -> Tensor:
    dtype = _plain_dtype(entry)
    assert not isinstance(entry.stored, dict)
    return _view(entry.file, entry.stored, dtype, index)


def _view(
    file: MappedFile,
    stored: StoredTensor | GgufTensor,
    dtype: torch.dtype,
    index: list[int | slice] | None = None,
    mapped: bool = False,
) -> Tensor:
    """The stored bytes as a tensor, indexed; copied only if they are not aligned to ``dtype``.

    Read into memory instead if the file says so, unless a view of the map is asked for.
    """
    if file.memory is not None and not mapped:
        if index is None:
            return read_tensor(
                file.opened(), file.path, file.memory, stored.begin, stored.shape, dtype
            )
        if all(isinstance(part, int) or part.step in (None, 1) for part in index):
            return read_slice(
                file.opened(), file.path, file.memory, stored.begin, stored.shape, dtype, index
            )
        return _view(file, stored, dtype, index, mapped=True).clone()
    file.check()
    count = stored.end - stored.begin
    raw = file.view_map(stored.begin, count) if mapped and count else file.view(stored.begin, count)
    if raw.data_ptr() % dtype.itemsize == 0:
        tensor = raw.view(dtype).view(stored.shape)
        return tensor[tuple(index)] if index is not None else tensor
    # Index the bytes, so that only those asked for are read and copied.
    tensor = raw.view(*stored.shape, dtype.itemsize)
    if index is not None:
        tensor = tensor[tuple(index)]
    return tensor.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)


def _gguf_components(
    entry: _Entry,
    stored: GgufTensor,
    rows: slice | None = None,
    columns: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Native components of the given leading indices and of a block-aligned range of columns."""
    layout: GgufLayout = GGUF_LAYOUTS[stored.type]
    entry.file.check()
    *leading, k = stored.shape
    row_bytes = k // layout.block * layout.block_bytes
    begin, nbytes = stored.begin, stored.end - stored.begin
    if rows is not None:
        first, last, _ = rows.indices(leading[0])
        step = nbytes // max(leading[0], 1)
        begin, nbytes = begin + first * step, max(0, last - first) * step
        leading[0] = max(0, last - first)
    blocks = entry.file.view(begin, nbytes)
    count = math.prod(leading)
    blocks = blocks.view(count, row_bytes)
    if columns is not None:
        begin, end = (edge // layout.block * layout.block_bytes for edge in columns)
        blocks, k = blocks[:, begin:end], columns[1] - columns[0]
    parts = _unpack_blocks(blocks, stored.type, count, k)
    return {part: tensor.view(*leading, tensor.shape[-1]) for part, tensor in parts.items()}


def _unpack_blocks(blocks: Tensor, ggml_type: int, rows: int, k: int) -> dict[str, Tensor]:
    """Native components of rows of GGUF blocks."""
    codes, scale, zero = gguf_unpack(blocks, ggml_type, rows, k)
    parts = {"codes": codes, "scale": scale}
    if GGUF_LAYOUTS[ggml_type].scheme == "affine":
        parts["offset"] = zero
    return parts


def _expand(index: Any, shape: tuple[int, ...]) -> list[int | slice]:
    """One integer (made positive) or slice per dimension."""
    given = list(index) if isinstance(index, tuple) else [index]
    if sum(part is Ellipsis for part in given) > 1:
        raise IndexError("an index must have at most one ellipsis, got more")
    if Ellipsis not in [part for part in given if part is Ellipsis]:
        given.append(Ellipsis)
    position = next(i for i, part in enumerate(given) if part is Ellipsis)
    missing = len(shape) - (len(given) - 1)
    if missing < 0:
        raise IndexError(f"the tensor has {len(shape)} dimensions, got {len(given) - 1} indices")
    given[position : position + 1] = [slice(None)] * missing
    result: list[int | slice] = []
    for dim, (part, size) in enumerate(zip(given, shape, strict=True)):
        if isinstance(part, slice):
            if part.step is not None and part.step < 1:
                raise ValueError(f"a slice must have a positive step, got {part.step}")
            result.append(part)
        elif isinstance(part, int) and not isinstance(part, bool):
            if not -size <= part < size:
                raise IndexError(f"index {part} is out of range for dimension {dim} of size {size}")
            result.append(part % size)
        else:
            raise TypeError(f"an index must be an integer, slice or ..., got {type(part).__name__}")
    return result

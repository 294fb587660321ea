"""Rewriting checkpoints of any size within a byte budget: quantize, dequantize, convert."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from .. import ops
from ..checkpoint import Checkpoint, ConvertedCheckpoint, TensorSpec
from ..checkpoint.info import QuantInfo
from ..checkpoint.rows import read_rows, row_count, row_layout
from ..checkpoint.save import ShardedWriter
from ..checkpoint.writer import parse_size
from ..format import FLOAT_DTYPES
from .arena import Arena, BudgetError
from .journal import Journal

__all__ = ["rewrite_checkpoint"]

#: Larger pieces than this gain nothing and leave the caches.
_MAX_PIECE = 32 << 20
#: A resumable job is made safe after so many bytes written.
_SAFE_EVERY = 256 << 20
#: Pieces that wait between two stages.
_WAITING = 2
# Pieces in memory at once: before the computation one being read, those that wait and one at work,
# and as many results, which for copies are the pieces themselves. A quarter of the budget is for
# freed memory that is kept for the next piece; the rest is room for rounding.
_SHARES = 12

Parts = dict[str, Tensor]
T = TypeVar("T")


class _Piece(NamedTuple):
    """Rows ``[begin, end)`` of a target tensor, all leading dimensions counted as one."""

    number: int  # of the tensor, in order
    name: str
    begin: int
    end: int


def rewrite_checkpoint(
    source: Checkpoint | ConvertedCheckpoint,
    target: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    *,
    budget: int | str = "1GiB",
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the tensors of ``source`` as ``specs`` says, in memory bounded by ``budget``.

    By spec, a float tensor is copied, cast or quantized (round to nearest, as
    :func:`mergekit_torch.ops.quantize`), a quantized one is copied or dequantized. Tensors go
    through in pieces of rows, so one may be larger than the budget; reading, computing and writing
    overlap. Results are those of doing it in one piece, bit for bit.

    While it runs, files are hidden ``.*.partial`` files; ``target`` is replaced at the end, as by
    :func:`mergekit_torch.checkpoint.save_checkpoint`. A journal beside them notes what is safely on
    the disk. After a kill, the same call with ``resume=True`` goes on from there; any other call
    starts over. With ``resume=True`` an exception (Ctrl-C, a full disk) leaves them as well,
    without it nothing is left behind.

    Args:
        source: an open checkpoint, or a :class:`ConvertedCheckpoint` over one.
        target: a ``.safetensors`` file or a directory.
        specs: name -> what it becomes; names are the source's.
        budget: most bytes of tensor data in memory, or like ``"512MiB"``.
        resume: go on where an interrupted call with the same arguments stopped; the budget may be
            another. Starts from the beginning if there is nothing to go on from.
        metadata, max_shard_size: as for ``save_checkpoint``.
        progress: called with the source bytes dealt with since the last call, from another thread.

    Returns:
        The files written, the index last.

    Raises:
        KeyError: a name that the source does not have.
        ValueError: a change that is not offered, such as requantizing; a weight with inf or NaN,
            named; a resume after other arguments or a changed source; a conversion to ``target``
            that is running.
        BudgetError: the budget does not hold a few rows at once.
        CheckpointError, OSError: reading or writing fails; names the file.
    """
    view = _Source(source)
    strings = {"format": "pt"} if metadata is None else dict(metadata)
    changes = {name: _Change(view, name, spec) for name, spec in specs.items()}
    steps = _steps(changes, parse_size(budget))
    arena = Arena("cpu", max_cached=min(parse_size(budget) // 4, 2 * _MAX_PIECE))
    # The journal is locked before any other file is touched: two jobs must not share them.
    with arena, Journal(target, keep=resume) as journal:
        at = journal.start(_fingerprint(view, specs, strings, max_shard_size), resume)
        with ShardedWriter(
            target, specs, metadata=strings, max_shard_size=max_shard_size, partial=True
        ) as writer:
            done = _done(changes, at, writer)
            for file in writer.files:
                file.keep = resume
            for name, rows in done.items():
                writer.writers[name].skip_rows(name, rows)
                if progress is not None:
                    progress(rows * changes[name].source_row_bytes)
            _Pipeline(view, changes, writer, journal, arena, progress).run(
                _pieces(changes, steps, done)
            )
    return writer.written


def _fingerprint(
    source: _Source,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    max_shard_size: int | str | None,
) -> str:
    """A name for the job: all that decides about the bytes written."""
    files = [(str(file.path), file.identity) for file in source.checkpoint._files]
    sources = [source.name(name) for name in specs]
    moved = [name for name in specs if source.order(name) is not None]
    job = (files, sources, moved, list(specs.items()), sorted(metadata.items()), max_shard_size)
    return hashlib.sha256(repr(job).encode()).hexdigest()


def _done(
    changes: Mapping[str, _Change], at: tuple[int, int], writer: ShardedWriter
) -> dict[str, int]:
    """Rows of each tensor that an interrupted job has left safely on the disk."""
    index, rows = at
    names = list(changes)
    done = {name: changes[name].rows for name in names[:index]}
    if rows:
        done[names[index]] = rows
    if all(writer.writers[name].took_over for name in done):
        return done
    return {}  # somebody has removed a partial file


class _Source:
    """Rows of a checkpoint under the names and in the row order of the target."""

    def __init__(self, source: Checkpoint | ConvertedCheckpoint) -> None:
        self._converted = source if isinstance(source, ConvertedCheckpoint) else None
        self.checkpoint = source.checkpoint if isinstance(source, ConvertedCheckpoint) else source
        self._orders: dict[str, Tensor | None] = {}

    def name(self, name: str) -> str:
        return self._converted.source_names[name] if self._converted is not None else name

    def order(self, name: str) -> Tensor | None:
        """Which source row each row of the target is, None for the same."""
        if self._converted is None:
            return None
        if name not in self._orders:
            self._orders[name] = self._converted._row_order(self.name(name))
        return self._orders[name]

    def read(self, piece: _Piece, arena: Arena) -> Parts:
        """The rows of a piece; parts as of :func:`row_layout`."""
        name, order = self.name(piece.name), self.order(piece.name)
        begin, end = piece.begin, piece.end
        chosen: Tensor | None = None
        if order is not None and end > begin:
            # Rows are permuted within heads: the rows of a piece lie close together.
            chosen = order[begin:end]
            begin, end = int(chosen.min()), int(chosen.max()) + 1
            chosen = chosen - begin
        layout = row_layout(self.checkpoint, name)
        out = {
            part: arena.empty(end - begin, columns, dtype=dtype)
            for part, (dtype, columns) in layout.items()
        }
        # One thread: the others compute meanwhile.
        read_rows(self.checkpoint, name, begin, out, threads=1)
        if chosen is not None:
            out = {part: tensor.index_select(0, chosen) for part, tensor in out.items()}
        return out


class _Change:
    """What becomes of one tensor's rows."""

    def __init__(self, source: _Source, name: str, spec: TensorSpec) -> None:
        info = source.checkpoint.info(source.name(name))
        layout = row_layout(source.checkpoint, source.name(name))  # raises for unknown types

        def fail(what: str) -> None:
            raise ValueError(f"{info.file}: tensor {info.name!r}: {what}")

        if tuple(spec.shape) != info.shape:
            fail(f"must keep its shape {list(info.shape)}, got {list(spec.shape)}")
        self.name, self.spec, self.info = name, spec, info
        self.rows = row_count(info.shape)
        self.source_row_bytes = sum(dtype.itemsize * n for dtype, n in layout.values())
        before, after = info.quantization, spec.quantization
        stored = spec.stored("").values()
        self.target_row_bytes = sum(
            dtype.itemsize * (shape[-1] if len(shape) > 1 else 1) for dtype, shape in stored
        )
        self.apply: Callable[[Parts], Parts]
        if before is None and after is None:
            self.apply = self._copy if spec.dtype == info.dtype else self._cast
        elif before is None:
            if info.dtype not in FLOAT_DTYPES or len(info.shape) < 2:
                fail(f"must be a float matrix to be quantized, got {info.kind} {list(info.shape)}")
            self.apply = self._quantize
        elif after is None:
            if spec.dtype not in FLOAT_DTYPES:
                fail(f"dequantizes to float32, float16 or bfloat16, got {spec.dtype}")
            self.apply = self._dequantize
        else:
            if _stored_format(before) != _stored_format(after):
                fail("is quantized already, to another format; dequantize the checkpoint first")
            self.apply = self._copy

    def _copy(self, parts: Parts) -> Parts:
        return parts

    def _cast(self, parts: Parts) -> Parts:
        return {"": parts[""].to(self.spec.dtype)}

    def _quantize(self, parts: Parts) -> Parts:
        q = self.spec.quantization
        assert q is not None
        try:
            codes, scale, zero = ops.quantize(
                parts[""],
                q.bits,
                q.group_size,
                q.scheme,  # type: ignore[arg-type]
                q.scale_dtype,
            )
        except ValueError as error:
            raise ValueError(f"{self.info.file}: tensor {self.info.name!r}: {error}") from error
        result = {"codes": codes, "scale": scale}
        if q.scheme != "symmetric":
            result["zero_point" if q.scheme == "asymmetric" else "offset"] = zero
        return result

    def _dequantize(self, parts: Parts) -> Parts:
        q = self.info.quantization
        assert q is not None
        dense = ops.dequantize(
            parts["codes"],
            parts["scale"],
            parts.get("zero_point"),
            parts.get("offset"),
            bits=q.bits,
            group_size=q.group_size,
            in_features=q.in_features,
            dtype=self.spec.dtype,
        )
        return {"": dense}


def _stored_format(q: QuantInfo) -> tuple[object, ...]:
    return q.bits, q.group_size, q.scheme, q.in_features, q.scale_dtype


def _steps(changes: Mapping[str, _Change], budget: int) -> dict[str, int]:
    """Rows of a piece of each tensor, such that all pieces in flight fit the budget."""
    steps = {}
    room = budget // _SHARES
    for name, change in changes.items():
        row = change.source_row_bytes + change.target_row_bytes
        if row > room and change.rows:
            raise BudgetError(
                f"{change.info.file}: tensor {change.info.name!r}: the budget of {budget} bytes "
                f"must hold {_SHARES} rows of {row} bytes"
            )
        steps[name] = max(1, min(room, _MAX_PIECE) // max(row, 1))
    return steps


def _pieces(
    changes: Mapping[str, _Change], steps: Mapping[str, int], done: Mapping[str, int]
) -> Iterator[_Piece]:
    """All work that is left, in order."""
    for number, (name, change) in enumerate(changes.items()):
        if change.rows == 0 and name not in done:
            yield _Piece(number, name, 0, 0)
        for begin in range(done.get(name, 0), change.rows, steps[name]):
            yield _Piece(number, name, begin, min(begin + steps[name], change.rows))


class _Pipeline:
    """Reads, changes and writes pieces, each in a thread of its own."""

    def __init__(
        self,
        source: _Source,
        changes: Mapping[str, _Change],
        writer: ShardedWriter,
        journal: Journal,
        arena: Arena,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._source = source
        self._changes = changes
        self._writer = writer
        self._journal = journal
        self._arena = arena
        self._progress = progress
        self._inputs: _Channel[tuple[_Piece, Parts]] = _Channel(_WAITING)
        self._outputs: _Channel[tuple[_Piece, Parts]] = _Channel(_WAITING)
        self._failures: list[BaseException] = []

    def run(self, pieces: Iterator[_Piece]) -> None:
        """Return when all is written, or raise what stopped a stage."""
        threads = [
            threading.Thread(target=self._stage, args=(work,), name=name)
            for name, work in (
                ("mkrs-read", lambda: self._read(pieces)),
                ("mkrs-write", self._write),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            # Here, where the caller has chosen torch's number of threads.
            self._stage(self._compute)
        finally:
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def _stage(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Stopped:
            pass
        except BaseException as error:
            self._failures.append(error)
            self._inputs.stop()
            self._outputs.stop()

    def _read(self, pieces: Iterator[_Piece]) -> None:
        for piece in pieces:
            self._inputs.put((piece, self._source.read(piece, self._arena)))
        self._inputs.put(None)

    def _compute(self) -> None:
        while (item := self._inputs.get()) is not None:
            piece, parts = item
            del item
            self._outputs.put((piece, self._changes[piece.name].apply(parts)))
            del parts
        self._outputs.put(None)

    def _write(self) -> None:
        unsafe = 0
        while (item := self._outputs.get()) is not None:
            piece, parts = item
            change, rows = self._changes[piece.name], piece.end - piece.begin
            self._writer.writers[piece.name].write_rows(piece.name, parts)
            del item, parts
            unsafe += rows * change.target_row_bytes
            if unsafe >= _SAFE_EVERY:
                for file in self._writer.files:
                    file.flush()
                self._journal.note(piece.number, piece.end)
                unsafe = 0
            if self._progress is not None:
                self._progress(rows * change.source_row_bytes)


class _Stopped(Exception):
    """Another stage has failed."""


class _Channel(Generic[T]):
    """A bounded queue between two stages; None ends it."""

    def __init__(self, size: int) -> None:
        self._queue: queue.Queue[T | None] = queue.Queue(size)
        self._stopped = threading.Event()

    def put(self, item: T | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
        raise _Stopped

    def get(self) -> T | None:
        while not self._stopped.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        raise _Stopped

    def stop(self) -> None:
        self._stopped.set()

"""Rewriting checkpoints of any size within a byte budget: quantize, dequantize, convert."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checkpoint import Checkpoint, ConvertedCheckpoint, TensorSpec
from ..checkpoint.info import QuantInfo
from ..checkpoint.rows import load_rows, row_count, row_layout
from ..checkpoint.save import ShardedWriter
from ..checkpoint.writer import parse_size
from ..format import FLOAT_DTYPES
from .arena import Arena, BudgetError
from .journal import Journal

__all__ = ["rewrite_checkpoint"]

#: Source and target bytes of a piece: it stays in the caches from the read to the write, and Python
#: costs little beside its work.
_PIECE = 8 << 20
#: Of a tensor whose rows move: what a piece needs lies anywhere in a head's rows.
_MOVED_PIECE = 32 << 20
#: A resumable job is made safe after so many bytes written.
_SAFE_EVERY = 256 << 20
#: Threads beside those that compute, for one that waits for the disk.
_WAITING = 1
# Of a piece a thread holds the rows, a copy in another order or form, and the result; the last
# share is freed memory that is kept for the next piece.
_SHARES = 3
#: Elements that torch converts without a team of threads, which each of ours would get.
_SERIAL_ELEMENTS = 1 << 14

Parts = dict[str, Tensor]


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
    through in pieces of rows, so one may be larger than the budget. Each of several threads
    (``torch.get_num_threads()`` and one more) reads, computes and writes pieces of its own; so
    these overlap. Results are those of doing it in one piece, bit for bit.

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
        progress: called with the source bytes dealt with since the last call.

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
    steps, workers = _steps(changes, parse_size(budget), torch.get_num_threads() + _WAITING)
    arena = Arena("cpu", max_cached=parse_size(budget) // _SHARES)
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
            pieces = _pieces(changes, steps, done)
            _Workers(view, changes, writer, journal, arena, pieces).run(workers, progress)
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
        # One thread: the others have pieces of their own.
        out = load_rows(self.checkpoint, name, begin, end - begin, arena.empty, threads=1)
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
        self.row_bytes = self.source_row_bytes + self.target_row_bytes
        self.in_order = source.order(name) is None
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
        source = parts[""]
        out = torch.empty_like(source, dtype=self.spec.dtype)
        flat = source.view(-1).split(_SERIAL_ELEMENTS), out.view(-1).split(_SERIAL_ELEMENTS)
        for before, after in zip(*flat, strict=True):
            after.copy_(before)
        return {"": out}

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


def _steps(changes: Mapping[str, _Change], budget: int, workers: int) -> tuple[dict[str, int], int]:
    """Rows of a piece of each tensor, and how many threads may have one within the budget."""
    for change in changes.values():
        if change.rows and _SHARES * change.row_bytes > budget:
            raise BudgetError(
                f"{change.info.file}: tensor {change.info.name!r}: the budget of {budget} bytes "
                f"must hold {_SHARES} rows of {change.row_bytes} bytes"
            )
    largest = max((change.row_bytes for change in changes.values() if change.rows), default=1)
    workers = min(workers, budget // (_SHARES * max(largest, 1)))
    room = budget // (_SHARES * workers)
    steps = {}
    for name, change in changes.items():
        piece = _PIECE if change.in_order else _MOVED_PIECE
        steps[name] = max(1, min(room, piece) // max(change.row_bytes, 1))
    return steps, workers


def _pieces(
    changes: Mapping[str, _Change], steps: Mapping[str, int], done: Mapping[str, int]
) -> Iterator[_Piece]:
    """All work that is left, in order."""
    for number, (name, change) in enumerate(changes.items()):
        if change.rows == 0 and name not in done:
            yield _Piece(number, name, 0, 0)
        for begin in range(done.get(name, 0), change.rows, steps[name]):
            yield _Piece(number, name, begin, min(begin + steps[name], change.rows))


class _Workers:
    """Threads that take pieces in order, each to read, change and write one after the other.

    A piece stays in the caches of the core that read it, and nothing is handed over. While some
    wait for the disk, the others compute. The caller's thread keeps the books.
    """

    def __init__(
        self,
        source: _Source,
        changes: Mapping[str, _Change],
        writer: ShardedWriter,
        journal: Journal,
        arena: Arena,
        pieces: Iterator[_Piece],
    ) -> None:
        self._source = source
        self._changes = changes
        self._writer = writer
        self._journal = journal
        self._arena = arena
        self._pieces = enumerate(pieces)
        self._news = threading.Condition()
        # All below under the condition's lock.
        self._running = 0
        self._stopped = False
        self._failures: list[BaseException] = []
        self._read = self._written = 0  # source and target bytes, since the books were last kept
        self._done: dict[int, _Piece] = {}  # written, but not all before them
        self._before = 0  # number of pieces that are written with all before them
        self._at = (0, 0)  # where those end: a tensor's number and a row

    def run(self, count: int, progress: Callable[[int], None] | None) -> None:
        """Return when all is written, or raise what stopped a thread."""
        threads = [
            threading.Thread(target=self._work, name=f"mkrs-convert-{i}") for i in range(count)
        ]
        self._running = count
        try:
            for thread in threads:
                thread.start()
            self._keep_books(progress)
        finally:
            with self._news:
                self._stopped = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failures:
            raise self._failures[0]

    def _keep_books(self, progress: Callable[[int], None] | None) -> None:
        unsafe = 0
        running = True
        while running:
            with self._news:
                self._news.wait_for(lambda: self._read or self._written or not self._running)
                if self._failures:
                    return
                read, written, at = self._read, self._written, self._at
                self._read = self._written = 0
                running = self._running > 0
            unsafe += written
            if unsafe >= _SAFE_EVERY:
                # What `at` covers was written before this.
                for file in self._writer.files:
                    file.flush()
                self._journal.note(*at)
                unsafe = 0
            if progress is not None and read:
                progress(read)

    def _work(self) -> None:
        failure: BaseException | None = None
        try:
            # One thread for each piece, whose work is too short for a team.
            torch.ops.mkrs._run_serially(True)
            while (item := self._next()) is not None:
                number, piece = item
                change = self._changes[piece.name]
                parts = change.apply(self._source.read(piece, self._arena))
                file = self._writer.writers[piece.name]
                file.write_rows(piece.name, parts, first=piece.begin)
                del parts
                self._finished(number, piece, change)
        except BaseException as error:
            failure = error
        with self._news:
            if failure is not None:
                self._failures.append(failure)
                self._stopped = True
            self._running -= 1
            self._news.notify()

    def _next(self) -> tuple[int, _Piece] | None:
        with self._news:
            return None if self._stopped else next(self._pieces, None)

    def _finished(self, number: int, piece: _Piece, change: _Change) -> None:
        rows = piece.end - piece.begin
        with self._news:
            self._read += rows * change.source_row_bytes
            self._written += rows * change.target_row_bytes
            self._done[number] = piece
            while (last := self._done.pop(self._before, None)) is not None:
                self._before += 1
                self._at = (last.number, last.end)
            self._news.notify()

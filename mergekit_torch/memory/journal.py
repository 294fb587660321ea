"""``Journal``: how far a resumable job has come."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Journal"]


class Journal:
    """A file beside the target that notes what is safely on the disk, and locks the target.

    A line of JSON names the job, one more each safe point. The lock is the system's on the open
    file, so it goes with the process.

    Args:
        target: the file or directory that the job writes.
        keep: leave the journal behind when the job ends with an exception.

    Raises (on entering):
        ValueError: another job is writing to the target.
        FileNotFoundError, OSError: the directory is not there or cannot be written to.
    """

    def __init__(self, target: str | os.PathLike[str], *, keep: bool) -> None:
        self._target = Path(target)
        is_file = self._target.suffix == ".safetensors" and not self._target.is_dir()
        self._directory = self._target.parent if is_file else self._target
        name = self._target.name if is_file else "model.safetensors"
        self.path = self._directory / f".{name}.journal"
        self._keep = keep
        self._makes_directory = not is_file and not self._directory.exists()
        self._file: Any = None

    def __enter__(self) -> Journal:
        if self._makes_directory:
            self._directory.mkdir(parents=True)
        try:
            file = open(self.path, "a+", encoding="utf-8")
        except FileNotFoundError as error:
            reason = "cannot create: its directory does not exist"
            raise FileNotFoundError(error.errno, reason, str(self._target)) from error
        except OSError as error:
            reason = f"cannot write a journal beside it: {error.strerror}"
            raise OSError(error.errno, reason, str(self._target)) from error
        if not _lock(file):
            file.close()
            raise ValueError(f"{self._target}: another conversion is writing to it")
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or not self._keep:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            if self._makes_directory:
                with contextlib.suppress(OSError):
                    self._directory.rmdir()  # only if nothing is in it
        self._file.close()

    def start(self, job: str, resume: bool) -> tuple[int, int]:
        """Where to start: the index of a tensor, and how many of its rows are done.

        Raises:
            ValueError: asked to resume another job than ``job``; its files stay.
        """
        self._file.seek(0)
        lines = [_parsed(line) for line in self._file.read().splitlines()]
        at = (0, 0)
        if resume and lines:
            if lines[0].get("job") != job:
                self._keep = True
                raise ValueError(
                    f"{self._target}: the interrupted conversion there had other arguments or "
                    "another source; start over without resuming"
                )
            for line in lines[1:]:
                if "at" in line:  # the last line may be half written
                    at = (line["at"][0], line["at"][1])
        self._file.truncate(0)
        self._put({"job": job})
        if at != (0, 0):
            self.note(*at)
        return at

    def note(self, index: int, rows: int) -> None:
        """All tensors before ``index``, and ``rows`` of that one, are safely on the disk."""
        self._put({"at": [index, rows]})

    def _put(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _lock(file: Any) -> bool:
    """Whether this process now is the only one with the file."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

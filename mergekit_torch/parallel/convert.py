"""Data-parallel conversion: the ranks of one job each write some files of a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..checkpoint import Checkpoint, ConvertedCheckpoint, TensorSpec
from ..checkpoint.save import _plan, file_names, replace_files
from ..checkpoint.writer import parse_size
from ..memory import rewrite_checkpoint
from .files import _write_json

__all__ = ["WorkPlan", "connected", "plan_work", "rewrite_on_ranks"]

#: Where files wait, below the target, until all of them are there.
STAGING = ".mkrs-parts"
_JOB = "job.json"


class WorkPlan(NamedTuple):
    """Which files there will be, and which rank writes which.

    Attributes:
        files: file name -> the specs of its tensors. Where it replaces a set of as many files it
            gets another name in the end.
        owners: file name -> rank.
    """

    files: dict[str, dict[str, TensorSpec]]
    owners: dict[str, int]


def plan_work(
    source: Checkpoint | ConvertedCheckpoint,
    specs: Mapping[str, TensorSpec],
    world: int,
    max_shard_size: int | str | None = None,
) -> WorkPlan:
    """Spread tensors over files and files over ranks, so that all have as many bytes to read.

    Without ``max_shard_size`` there is one file per rank. With it files are those of
    :func:`mergekit_torch.save_checkpoint`, whatever the number of ranks, so that a job can be
    resumed by another number of them.
    """

    def read(names: Mapping[str, TensorSpec]) -> int:
        return sum(source.info(name).nbytes for name in names)

    if max_shard_size is not None:
        groups = _plan(specs, parse_size(max_shard_size))
    else:
        owner = _spread({name: source.info(name).nbytes for name in specs}, world)
        groups = [
            {name: spec for name, spec in specs.items() if owner[name] == rank}
            for rank in range(world)
        ]
        groups = [group for group in groups if group] or [{}]
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    files = dict(zip(names, groups, strict=True))
    return WorkPlan(files, _spread({name: read(group) for name, group in files.items()}, world))


def _spread(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Largest first, each to the rank that has least so far."""
    loads = [0] * world
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner


@contextlib.contextmanager
def connected() -> Iterator[tuple[int, int]]:
    """Join the other processes of a ``torchrun`` job for a while; gives rank and world.

    Processes only wait for one another, so they talk by gloo, and a slow one is waited for: that
    one has ended shows at once, by its closed connection. A process group that is there already is
    used, and left as it is. One that is made here is destroyed here: gloo's threads must have ended
    before the process does, or it may abort on its way out.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    dist.init_process_group("gloo", timeout=timedelta(hours=24))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def rewrite_on_ranks(
    source: Checkpoint | ConvertedCheckpoint,
    target: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    plan: WorkPlan,
    *,
    budget: int | str = "1GiB",
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """:func:`mergekit_torch.memory.rewrite_checkpoint` by all ranks of the default process group.

    Every rank calls it with the same arguments and writes its files into a hidden folder of
    ``target``. When all are done, rank 0 puts them in place and writes the index; until then an old
    checkpoint there stays whole. After a failure, or when a rank was killed, the folder keeps what
    is done, and the same call with ``resume=True`` goes on from there; any other starts over.

    Args:
        source, specs, budget, metadata: as for ``rewrite_checkpoint``; the budget is per rank.
        target: a directory, which all ranks see.
        plan: of :func:`plan_work`.
        resume: go on after an interrupted call with the same arguments.
        progress: called with the source bytes that this rank has dealt with since the last call.

    Returns:
        The files of the checkpoint, the index last.

    Raises:
        ValueError: ``target`` is a file, or a resume of another job.
        ConnectionError: another rank has failed or ended; says which if it is known.
        Anything that ``rewrite_checkpoint`` raises, on the rank where it happened.
    """
    directory = Path(target)
    if directory.suffix == ".safetensors" and not directory.is_dir():
        raise ValueError(f"{directory}: several ranks write a directory, got a file name")
    staging = directory / STAGING
    strings = {"format": "pt"} if metadata is None else dict(metadata)
    job = _fingerprint(source, plan, strings)
    rank = dist.get_rank()
    _together(lambda: _prepare(staging, job, resume) if rank == 0 else None)
    names = dict(zip(plan.files, file_names(directory, len(plan.files)), strict=True))
    own = [name for name, owner in plan.owners.items() if owner == rank]

    def work() -> None:
        for name in own:
            part = plan.files[name]
            if (staging / name).exists():  # whole: files are renamed when they are complete
                if progress is not None:
                    progress(sum(source.info(tensor).nbytes for tensor in part))
                continue
            rewrite_checkpoint(
                source,
                staging / name,
                part,
                budget=budget,
                resume=True,
                metadata=strings,
                progress=progress,
            )

    _together(work)
    _together(lambda: _commit(directory, staging, plan, specs, names) if rank == 0 else None)
    index = directory / "model.safetensors.index.json"
    return [directory / name for name in names.values()] + [index] * index.exists()


def _together(work: Callable[[], Any]) -> None:
    """``work()`` on every rank; if it fails on one, all raise."""
    failure: BaseException | None = None
    try:
        work()
    except Exception as error:
        failure = error
    mine = None if failure is None else f"{type(failure).__name__}: {failure}"
    states: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(states, mine)
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise ConnectionError(
            "another rank has ended before its work was done; what is done is kept, run the same "
            f"command with --resume ({error})"
        ) from error
    if failure is not None:
        raise failure
    for rank, state in enumerate(states):
        if state is not None:
            raise ConnectionError(f"rank {rank} has failed with {state}")


def _fingerprint(
    source: Checkpoint | ConvertedCheckpoint, plan: WorkPlan, metadata: Mapping[str, str]
) -> str:
    checkpoint = source.checkpoint if isinstance(source, ConvertedCheckpoint) else source
    files = [(file.path.name, file.identity[2:]) for file in checkpoint._files]
    parts = [(name, list(part.items())) for name, part in plan.files.items()]
    return hashlib.sha256(repr((files, parts, sorted(metadata.items()))).encode()).hexdigest()


def _prepare(staging: Path, job: str, resume: bool) -> None:
    path = staging / _JOB
    known = None
    if resume and path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8")).get("job")
        except (ValueError, AttributeError):
            known = None
        if known != job:
            raise ValueError(
                f"{staging.parent}: the interrupted conversion there had other arguments, another "
                "source or (without a shard size) another number of ranks; start over without "
                "resuming"
            )
    if known is None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _write_json(path, {"job": job})


def _commit(
    directory: Path,
    staging: Path,
    plan: WorkPlan,
    specs: Mapping[str, TensorSpec],
    names: Mapping[str, str],
) -> None:
    """Put all files in place under the names they are to have."""
    missing = [name for name in plan.files if not (staging / name).exists()]
    if missing:
        raise FileNotFoundError(f"{staging}: {', '.join(missing)} should be there, and is not")
    weight_map = {
        stored: names[name]
        for name, part in plan.files.items()
        for tensor, spec in part.items()
        for stored in spec.stored(tensor)
    }
    replace_files(
        directory,
        {names[name]: partial(os.replace, staging / name) for name in plan.files},
        weight_map,
        sum(spec.nbytes for spec in specs.values()),
    )
    shutil.rmtree(staging, ignore_errors=True)

"""Runs a function in several processes that are connected by gloo."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 120.0

_context = multiprocessing.get_context("forkserver")
# Imported once, by a process that computes nothing: forks of it start in milliseconds, and no
# thread pool exists yet that a fork would break.
_context.set_forkserver_preload(
    [
        "mergekit_torch.parallel.transformers",
        "torch.distributed.checkpoint",
        "transformers.models.llama.modeling_llama",
        "pytest",
    ]
)


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    collective_timeout: float = 60.0,
    dies: tuple[int, ...] = (),
) -> list[Any]:
    """``function(rank, *args)`` in ``world`` processes; what each returned.

    Fails with the traceback of the first rank that raised, or if one does not end in time. Ranks in
    ``dies`` may end without a result, which then is None.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        queue = _context.SimpleQueue()
        processes = []
        for rank in range(world):
            work = (rank, world, folder, collective_timeout, queue, function, args)
            process = _context.Process(target=_run, args=work, daemon=True)
            process.start()
            processes.append(process)
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        expected = world - len(dies)
        try:
            while len(results) + len(failures) < expected and time.monotonic() < deadline:
                if not queue.empty():
                    rank, failed, value = queue.get()
                    if failed:
                        failures.append(f"rank {rank}:\n{value}")
                        break
                    results[rank] = value
                elif all(not process.is_alive() for process in processes) and queue.empty():
                    break
                else:
                    time.sleep(0.01)
            if failures:
                raise AssertionError(failures[0])
            missing = [rank for rank in range(world) if rank not in results and rank not in dies]
            if missing:
                codes = [process.exitcode for process in processes]
                raise AssertionError(f"ranks {missing} gave no result; exit codes {codes}")
        finally:
            for process in processes:
                process.join(0 if failures else 5)
                if process.is_alive():
                    process.kill()
                    process.join()
        return [results.get(rank) for rank in range(world)]


def _run(
    rank: int,
    world: int,
    folder: str,
    collective_timeout: float,
    queue: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=collective_timeout),
    )
    try:
        value = function(rank, *args)
        # Nobody leaves while another still talks to it.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        queue.put((rank, False, value))
    except BaseException:
        queue.put((rank, True, traceback.format_exc()))
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

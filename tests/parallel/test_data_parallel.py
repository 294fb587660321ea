"""Quantizing by several processes, also when one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from mergekit_torch import QuantizeConfig, open_checkpoint, save_checkpoint
from mergekit_torch.cli import quantize as quantize_command
from mergekit_torch.cli.main import main
from mergekit_torch.parallel.convert import STAGING, connected, plan_work, rewrite_on_ranks


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("floats")
    tensors = {f"layers.{i}.weight": torch.randn(64 + 32 * i, 256) for i in range(9)}
    tensors["norm.weight"] = torch.randn(256)
    save_checkpoint(tensors, folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def expected(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("alone") / "out"
    assert main(["quantize", str(floats), str(target)]) == 0
    return target


def same(a: Path, b: Path) -> None:
    with open_checkpoint(a) as x, open_checkpoint(b) as y:
        assert sorted(x) == sorted(y)
        parts = dict(y.stored_items())
        assert all(torch.equal(tensor, parts[name]) for name, tensor in x.stored_items())


def convert(
    rank: int,
    source: Path,
    target: Path,
    resume: bool = False,
    kill: int = -1,
    size: str | None = None,
    bits: int = 4,
) -> Any:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += 1
        if rank == kill and done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_checkpoint(source) as checkpoint:
        specs = quantize_command.plan(checkpoint, QuantizeConfig(bits=bits))
        plan = plan_work(checkpoint, specs, torch.distributed.get_world_size(), size)
        own = [plan.files[name] for name, owner in plan.owners.items() if owner == rank]
        if kill < 0:
            rewrite_on_ranks(
                checkpoint, target, specs, plan, budget="4MiB", resume=resume, progress=progress
            )
        else:
            with pytest.raises(ConnectionError, match=r"another rank has ended.*--resume"):
                rewrite_on_ranks(checkpoint, target, specs, plan, budget="4MiB", progress=progress)
        return sum(checkpoint.info(name).nbytes for part in own for name in part)


@pytest.mark.parametrize(("world", "size"), [(2, None), (4, "60KB")])
def test_same_as_alone(
    floats: Path, expected: Path, tmp_path: Path, world: int, size: str | None
) -> None:
    shares = run_ranks(world, convert, floats, tmp_path / "out", False, -1, size)
    same(tmp_path / "out", expected)
    assert not (tmp_path / "out" / STAGING).exists()
    with open_checkpoint(floats) as checkpoint:
        assert sum(shares) == checkpoint.nbytes
        assert max(shares) < 1.35 * checkpoint.nbytes / world
    if size is None:
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == world
        # Again: the new set takes other names, the old one goes.
        run_ranks(world, convert, floats, tmp_path / "out")
        same(tmp_path / "out", expected)
        assert len(list((tmp_path / "out").glob("model.1-*.safetensors"))) == world
        assert not list((tmp_path / "out").glob("model-*.safetensors"))


def test_killed_rank(floats: Path, expected: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    save_checkpoint({"old": torch.ones(3)}, target)
    started = time.monotonic()
    run_ranks(2, convert, floats, target, False, 1, "60KB", dies=(1,))
    assert time.monotonic() - started < 40  # not the process group's timeout
    with open_checkpoint(target) as old:
        assert list(old) == ["old"]  # untouched
    kept = {path.name: path.stat().st_mtime_ns for path in (target / STAGING).glob("*.safetensors")}
    assert kept
    # Another job may not go on from there; another number of ranks may.
    with pytest.raises(AssertionError, match="had other arguments"):
        run_ranks(2, convert, floats, target, True, -1, "60KB", 8)
    run_ranks(3, convert, floats, target, True, -1, "60KB")
    same(target, expected)
    now = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert all(now[name] == stamp for name, stamp in kept.items())
    assert not (target / STAGING).exists()
    assert not (target / "model.safetensors").exists()  # the old one


def fails(rank: int, source: Path, target: Path) -> str:
    with open_checkpoint(source) as checkpoint:
        specs = quantize_command.plan(checkpoint, QuantizeConfig())
        plan = plan_work(checkpoint, specs, 2)
        try:
            # Too little for a few rows, on one rank only.
            rewrite_on_ranks(checkpoint, target, specs, plan, budget="1KiB" if rank else "4MiB")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_failed_rank(floats: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, fails, floats, tmp_path / "out")
    assert first.startswith("ConnectionError: rank 1 has failed with BudgetError")
    assert second.startswith("BudgetError")
    with pytest.raises(AssertionError, match="several ranks write a directory"):
        run_ranks(2, convert, floats, tmp_path / "x.safetensors")


def test_process_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that ends with a group of gloo's may abort on its way out.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with connected() as ours:
        assert ours == (0, 1)
        with connected() as again:
            assert again == (0, 1)
        assert dist.is_initialized()  # whoever made it ends it
    assert not dist.is_initialized()
    with pytest.raises(OSError, match="disk full"), connected():
        raise OSError("disk full")
    assert not dist.is_initialized()


def test_torchrun(floats: Path, expected: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "mergekit_torch.cli", "quantize", str(floats), str(tmp_path / "out")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4-bit affine g64") == 1  # one rank reports
    same(tmp_path / "out", expected)
    assert (tmp_path / "out" / "config.json").exists()

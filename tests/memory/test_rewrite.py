import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mergekit_torch import ops
from mergekit_torch.checkpoint import (
    CheckpointWriter,
    ConvertedCheckpoint,
    QuantInfo,
    TensorSpec,
    open_checkpoint,
    save_checkpoint,
)
from mergekit_torch.memory import BudgetError, convert, rewrite_checkpoint
from mergekit_torch.tensor import QuantizedTensor

SCHEMES = ["symmetric", "asymmetric", "affine"]


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(300, 200),
        "b.weight": torch.randn(64, 130).bfloat16(),
        "stack.weight": torch.randn(3, 20, 100).half(),
        "bias": torch.randn(1000),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "hollow": torch.empty(5, 0),
        "ids": torch.arange(5000).view(50, 100),
        "q8": QuantizedTensor.from_float(torch.randn(50, 96), 8, 32, "asymmetric"),
    }


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("rewrite") / "source.safetensors"
    save_checkpoint(tensors, path)
    return path


def quantized_specs(checkpoint, scheme="affine", bits=4, group_size=64):
    specs = {}
    for name in checkpoint:
        info = checkpoint.info(name)
        q = info.quantization
        if name.endswith(".weight"):
            q = QuantInfo(bits, group_size, scheme, info.shape[-1], torch.float16, info.dtype)
        specs[name] = TensorSpec(info.dtype, info.shape, q)
    return specs


def hidden(directory):
    return sorted(p.name for p in Path(directory).glob(".*"))


def same(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


@pytest.mark.parametrize("budget", ["1GiB", "24KiB", "40000"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_in_pieces_is_quantizing_whole(tmp_path, path, tensors, scheme, budget):
    target = tmp_path / "q.safetensors"
    budget = int(budget) if budget.isdigit() else budget
    seen = []
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint, scheme)
        written = rewrite_checkpoint(checkpoint, target, specs, budget=budget, progress=seen.append)
        assert sum(seen) == checkpoint.nbytes
    assert written == [target]
    assert hidden(tmp_path) == []
    with open_checkpoint(target) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            if not name.endswith(".weight"):
                if isinstance(tensor, QuantizedTensor):
                    for part, component in tensor.components.items():
                        same(getattr(checkpoint[name], part), component)
                else:
                    same(checkpoint[name], tensor)
                continue
            codes, scale, zero = ops.quantize(tensor, 4, 64, scheme, torch.float16)
            found = checkpoint[name]
            assert found.dtype == tensor.dtype
            same(found.codes, codes)
            same(found.scale, scale)
            if scheme != "symmetric":
                same(found.offset if scheme == "affine" else found.zero_point, zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantizing_and_casting(tmp_path, tensors, dtype):
    quantized = {
        scheme: QuantizedTensor.from_float(tensors["a.weight"], 4, 32, scheme) for scheme in SCHEMES
    }
    save_checkpoint({**quantized, "plain": tensors["a.weight"]}, tmp_path / "q.safetensors")
    with open_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        specs = {name: TensorSpec(dtype, checkpoint.info(name).shape) for name in checkpoint}
        rewrite_checkpoint(checkpoint, tmp_path / "dense", specs, budget="20KiB")
    with open_checkpoint(tmp_path / "dense") as checkpoint:
        for scheme in SCHEMES:
            same(checkpoint[scheme], quantized[scheme].dequantize(dtype))
        same(checkpoint["plain"], tensors["a.weight"].to(dtype))


def test_shards(tmp_path, path):
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        save_checkpoint({"old": torch.ones(3)}, tmp_path / "out")
        written = rewrite_checkpoint(checkpoint, tmp_path / "out", specs, max_shard_size=30_000)
    assert len(written) > 2
    assert hidden(tmp_path / "out") == []
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert "old" not in checkpoint
        assert set(checkpoint) == set(specs)


def test_a_file_replaces_its_own_source(tmp_path, path, tensors):
    target = tmp_path / "model.safetensors"
    target.write_bytes(path.read_bytes())
    with open_checkpoint(target) as checkpoint:
        rewrite_checkpoint(checkpoint, target, quantized_specs(checkpoint))
    with open_checkpoint(target) as checkpoint:
        assert checkpoint["a.weight"].bits == 4


class Stop(Exception):
    pass


def interrupted(checkpoint, target, specs, after, **arguments):
    """Run until `after` source bytes have been written, then fail."""
    seen = 0

    def progress(nbytes):
        nonlocal seen
        seen += nbytes
        if seen >= after:
            raise Stop

    with pytest.raises(Stop):
        rewrite_checkpoint(checkpoint, target, specs, progress=progress, **arguments)


@pytest.mark.parametrize("after", [1, 100_000, 250_000])
def test_resuming(tmp_path, path, monkeypatch, after):
    monkeypatch.setattr(convert, "_SAFE_EVERY", 10_000)
    target, whole = tmp_path / "out", tmp_path / "whole"
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        rewrite_checkpoint(checkpoint, whole, specs, max_shard_size=50_000)
        interrupted(
            checkpoint, target, specs, after, resume=True, budget="64KiB", max_shard_size=50_000
        )
        assert hidden(target)
        with pytest.raises(FileNotFoundError):
            open_checkpoint(target)
        with pytest.raises(ValueError, match="other arguments"):
            rewrite_checkpoint(checkpoint, target, quantized_specs(checkpoint, bits=8), resume=True)
        assert hidden(target)  # still there
        first = []
        rewrite_checkpoint(
            checkpoint,
            target,
            specs,
            resume=True,
            budget="100KiB",
            max_shard_size=50_000,
            progress=first.append,
        )
        assert sum(first) == checkpoint.nbytes
    assert hidden(target) == []
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_a_safe_point_has_all_pieces_before_it(tmp_path, path, monkeypatch):
    """One piece takes long: those after it are written, and no safe point may cover them."""
    monkeypatch.setattr(convert, "_SAFE_EVERY", 1)
    original, noted, release = CheckpointWriter.write_rows, [], threading.Event()

    def slow(self, name, parts, **more):
        if (name, more["first"]) == (first, 0):
            release.wait(10)
        original(self, name, parts, **more)

    def note(self, index, rows):
        noted.append((release.is_set(), index, rows))

    seen = 0

    def progress(nbytes):
        nonlocal seen
        seen += nbytes
        if seen > 100_000:
            release.set()

    monkeypatch.setattr(CheckpointWriter, "write_rows", slow)
    monkeypatch.setattr(convert.Journal, "note", note)
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        first, *_, last = specs
        target = tmp_path / "out.safetensors"
        rewrite_checkpoint(checkpoint, target, specs, budget="64KiB", progress=progress)
    early = [(index, rows) for released, index, rows in noted if not released]
    assert early
    assert set(early) == {(0, 0)}
    assert noted[-1][1:] == (len(specs) - 1, convert.row_count(specs[last].shape))


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_exception_in_the_callers_thread_ends_the_others(tmp_path, path, error):
    before = threading.active_count()

    def progress(nbytes):
        raise error

    with open_checkpoint(path) as checkpoint, pytest.raises(error):
        rewrite_checkpoint(
            checkpoint, tmp_path / "out", quantized_specs(checkpoint), progress=progress
        )
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_starting_over(tmp_path, path, tensors, monkeypatch):
    """A longer partial file of another job must leave nothing in the new one."""
    monkeypatch.setattr(convert, "_SAFE_EVERY", 10_000)
    target = tmp_path / "out.safetensors"
    with open_checkpoint(path) as checkpoint:
        interrupted(
            checkpoint,
            target,
            quantized_specs(checkpoint, bits=8),
            200_000,
            resume=True,
            budget="64KiB",
        )
        rewrite_checkpoint(checkpoint, target, quantized_specs(checkpoint, bits=2))
        rewrite_checkpoint(
            checkpoint, tmp_path / "o2.safetensors", quantized_specs(checkpoint, bits=2)
        )
    assert target.read_bytes() == (tmp_path / "o2.safetensors").read_bytes()


def test_a_removed_partial_file_is_written_again(tmp_path, path, monkeypatch):
    monkeypatch.setattr(convert, "_SAFE_EVERY", 10_000)
    target = tmp_path / "out.safetensors"
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        interrupted(checkpoint, target, specs, 200_000, resume=True, budget="64KiB")
        (tmp_path / ".out.safetensors.partial").unlink()
        rewrite_checkpoint(checkpoint, target, specs, resume=True)
        rewrite_checkpoint(checkpoint, tmp_path / "o2.safetensors", specs)
    assert target.read_bytes() == (tmp_path / "o2.safetensors").read_bytes()


def test_a_changed_source_is_not_resumed(tmp_path, path, monkeypatch):
    source = tmp_path / "s.safetensors"
    source.write_bytes(path.read_bytes())
    with open_checkpoint(source) as checkpoint:
        specs = quantized_specs(checkpoint)
        interrupted(checkpoint, tmp_path / "out", specs, 100_000, resume=True, budget="64KiB")
    source.write_bytes(path.read_bytes())
    with open_checkpoint(source) as checkpoint, pytest.raises(ValueError, match="another source"):
        rewrite_checkpoint(checkpoint, tmp_path / "out", specs, resume=True)


def test_failures_leave_nothing(tmp_path, path):
    old = tmp_path / "out.safetensors"
    save_checkpoint({"x": torch.ones(5)}, old)
    before = old.read_bytes()
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        interrupted(checkpoint, old, specs, 100_000, budget="64KiB")
        assert old.read_bytes() == before
        interrupted(checkpoint, tmp_path / "dir", specs, 100_000, budget="64KiB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors"]


def test_weights_that_cannot_be_quantized_are_named(tmp_path):
    weight = torch.randn(500, 64)
    weight[400, 3] = float("inf")
    save_checkpoint(
        {"good.weight": torch.randn(9, 64), "bad.weight": weight}, tmp_path / "s.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path / "s.safetensors")
    specs = quantized_specs(checkpoint)
    with pytest.raises(ValueError, match=r"'bad.weight'.*finite"):
        rewrite_checkpoint(checkpoint, tmp_path / "out", specs, budget="32KiB")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_before_anything_is_written(tmp_path, path):
    def check(error, match, name, spec, **arguments):
        with open_checkpoint(path) as checkpoint, pytest.raises(error, match=match):
            rewrite_checkpoint(checkpoint, tmp_path / "out", {name: spec}, **arguments)
        assert not (tmp_path / "out").exists()

    q = QuantInfo(4, 32, "affine", 96, torch.float16)
    check(KeyError, "nothing", "nothing", TensorSpec(torch.float32, (1,)))
    check(ValueError, "keep its shape", "bias", TensorSpec(torch.float32, (999,)))
    check(ValueError, "another format", "q8", TensorSpec(torch.float32, (50, 96), q))
    check(ValueError, "float matrix", "ids", TensorSpec(torch.float32, (50, 100), q))
    check(ValueError, "dequantizes to", "q8", TensorSpec(torch.int8, (50, 96)))
    spec = TensorSpec(torch.float32, (300, 200))
    check(BudgetError, "must hold 3 rows of 1600 bytes", "a.weight", spec, budget=4_799)
    check(ValueError, "a size must be", "a.weight", spec, budget="some")


def test_targets_that_cannot_be_written(tmp_path, path):
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        with pytest.raises(FileNotFoundError):
            rewrite_checkpoint(checkpoint, tmp_path / "no" / "out.safetensors", specs)
        with pytest.raises(OSError, match="/proc"):
            rewrite_checkpoint(checkpoint, "/proc/out.safetensors", specs)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_target(tmp_path, path):
    target = tmp_path / "out.safetensors"
    errors = []
    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)

        def other(nbytes):
            if not errors:
                try:
                    rewrite_checkpoint(checkpoint, target, specs)
                except ValueError as error:
                    errors.append(error)

        rewrite_checkpoint(checkpoint, target, specs, progress=other)
    assert "another conversion" in str(errors[0])
    assert set(open_checkpoint(target)) == set(specs)


def test_a_full_disk(tmp_path, path, monkeypatch):
    target = tmp_path / "out.safetensors"
    save_checkpoint({"x": torch.ones(5)}, target)
    before = target.read_bytes()
    original = CheckpointWriter._put

    def full(self, position, data):
        if position > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, position, data)

    with open_checkpoint(path) as checkpoint:
        specs = quantized_specs(checkpoint)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "_put", full)
            with pytest.raises(OSError, match="No space left") as caught:
                rewrite_checkpoint(checkpoint, target, specs, budget="64KiB")
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.filename == str(target)
            assert target.read_bytes() == before
            assert hidden(tmp_path) == []
            with pytest.raises(OSError, match="No space left"):
                rewrite_checkpoint(checkpoint, target, specs, budget="64KiB", resume=True)
            assert len(hidden(tmp_path)) == 2
        rewrite_checkpoint(checkpoint, target, specs, resume=True)
    assert hidden(tmp_path) == []


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    """The system itself refuses the write: RLIMIT_FSIZE, in a process of its own."""
    code = f"""
import resource, signal, sys, torch
from mergekit_torch.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint({{"x": torch.ones(1_000_000)}}, {str(tmp_path / "out.safetensors")!r})
except OSError as error:
    sys.exit(0 if "out.safetensors" in str(error) else "another message")
sys.exit("no error")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_by_the_system_too(tmp_path):
    """One 256 MiB tensor with a 16 MiB budget, in a process that may grow by 96 MiB."""
    source = tmp_path / "s.safetensors"
    with CheckpointWriter(
        source, {"big.weight": TensorSpec(torch.float32, (1 << 14, 1 << 12))}
    ) as w:
        part = torch.randn(1 << 9, 1 << 12)
        for _ in range(1 << 5):
            w.write_rows("big.weight", {"": part})
    code = f"""
import resource, torch
from mergekit_torch.checkpoint import *
from mergekit_torch.memory import rewrite_checkpoint
torch.set_num_threads(2)
torch.ops.mkrs.quantize(torch.randn(64, 4096), 4, 64, "affine", None)  # threads are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))
data = int([l for l in open("/proc/self/status") if l.startswith("VmData")][0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (160 << 20),) * 2)
with open_checkpoint({str(source)!r}) as c:
    q = QuantInfo(4, 64, "affine", 4096, torch.float16)
    rewrite_checkpoint(c, {str(tmp_path / "o.safetensors")!r},
                       {{"big.weight": TensorSpec(torch.float32, (1 << 14, 1 << 12), q)}},
                       budget="16MiB")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(rss - used)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open_checkpoint(tmp_path / "o.safetensors") as checkpoint:
        assert checkpoint["big.weight"].shape == (1 << 14, 1 << 12)
        codes, _, _ = ops.quantize(part, 4, 64, "affine")
        same(checkpoint["big.weight"].codes[-512:], codes)


def test_many_threads_write_rows_of_one_file(tmp_path):
    specs = {f"t{i}": TensorSpec(torch.float32, (40, 30)) for i in range(8)}
    values = {name: torch.randn(40, 30) for name in specs}
    with CheckpointWriter(tmp_path / "x.safetensors", specs) as writer:

        def work(name):
            for begin in range(0, 40, 7):
                writer.write_rows(name, {"": values[name][begin : begin + 7]})

        threads = [threading.Thread(target=work, args=(name,)) for name in specs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ValueError, match="written once"):
            writer.write_rows("t0", {"": values["t0"][:1]})
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        for name, value in values.items():
            same(checkpoint[name], value)


def test_rows_in_any_order(tmp_path):
    value = torch.randn(40, 30)
    with CheckpointWriter(tmp_path / "x", {"t": TensorSpec(torch.float32, (40, 30))}) as writer:
        for first in (33, 0, 20, 7):
            last = {33: 40, 0: 7, 20: 33, 7: 20}[first]
            writer.write_rows("t", {"": value[first:last]}, first=first)
        with pytest.raises(ValueError, match="written once"):
            writer.write_rows("t", {"": value[:7]}, first=0)
    with open_checkpoint(tmp_path / "x") as checkpoint:
        same(checkpoint["t"], value)


def test_giving_up_waits_for_writes_under_way(tmp_path, monkeypatch):
    """Their file descriptor might be another file's by then."""
    writer = CheckpointWriter(tmp_path / "x", {"t": TensorSpec(torch.float32, (4, 3))})
    original, begun, events = os.pwrite, threading.Event(), []

    def slow(fd, data, position):
        begun.set()
        time.sleep(0.2)
        events.append("written")
        return original(fd, data, position)

    monkeypatch.setattr(os, "pwrite", slow)
    thread = threading.Thread(target=writer.write, args=("t", torch.ones(4, 3)))
    thread.start()
    begun.wait(10)
    writer.abort()
    events.append("aborted")
    thread.join()
    assert events == ["written", "aborted"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="must be open"):
        writer.write("t", torch.ones(4, 3))


def test_rows_that_do_not_fit_the_declaration(tmp_path):
    writer = CheckpointWriter(tmp_path / "x", {"t": TensorSpec(torch.float32, (4, 3))})
    with pytest.raises(KeyError):
        writer.write_rows("u", {"": torch.ones(1, 3)})
    for rows in (torch.ones(5, 3), torch.ones(2, 4), torch.ones(2, 3).half()):
        with pytest.raises(ValueError, match="rows of 3 elements"):
            writer.write_rows("t", {"": rows})
    writer.write_rows("t", {"": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="1 are missing"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_gguf_sources(tmp_path):
    import models

    with open_checkpoint(models.smollm2_gguf()) as checkpoint:
        converted = ConvertedCheckpoint(checkpoint)
        rewrite_checkpoint(converted, tmp_path / "a.safetensors", converted.specs, budget="2MiB")
        save_checkpoint(converted.items(), tmp_path / "b.safetensors", specs=converted.specs)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

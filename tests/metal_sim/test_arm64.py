"""The SIMT engine on arm64: its fibers, its checks and the kernels, under qemu-user."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from . import simulator
from .compiler import COMMON, HERE, INCLUDE, INSTRUMENT, CompileError, preprocess, run, zig
from .cuda_replay import units
from .prepass import to_cpp
from .sanitize import Call, tables
from .test_sanitizers import FINE, kernel

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = next((n for n in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(n)), None)


def build(sources: list[str], folder: Path) -> Path:
    """The engine with kernels, for arm64."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)")
    if EMULATOR is None:
        pytest.skip("qemu-user is not installed (Debian: qemu-user-static)")
    objects = []
    for n, source in enumerate(sources):
        objects.append(folder / f"kernels{n}.o")
        flags = [*COMMON, *INSTRUMENT, "--target=aarch64-linux-gnu", f"-I{INCLUDE}"]
        flags += [f"-Dmsl_kernels=kernels_{n}", f"-Dmsl_kernel_count=count_{n}"]
        text = to_cpp(preprocess(source))
        run([str(zig()), "clang", *flags, "-c", "-", "-o", str(objects[-1])], text)
    (folder / "tables.cpp").write_text(tables(len(sources)))
    files = [HERE / "engine.cpp", HERE / "engine_replay.cpp", folder / "tables.cpp"]
    target = folder / "engine_replay"
    flags = ["-std=c++20", "-O1", f"-I{INCLUDE}", f"-I{HERE}", "-rdynamic"]
    run([COMPILER, *flags, *map(str, files), *map(str, objects), "-ldl", "-o", str(target)])
    return target


def emulate(program: Path, calls: Path, seed: int) -> subprocess.CompletedProcess[str]:
    command = [str(EMULATOR), "-L", "/usr/aarch64-linux-gnu", str(program), str(calls), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_kernels_on_arm64(tmp_path) -> None:
    """Recorded calls of every kernel give the same bytes as on this machine."""
    from mergekit_torch import selftest

    simulator.load()
    before = len(simulator.sources())
    calls = tmp_path / "calls.bin"
    with simulator.recording(calls):
        chosen = [c for c in selftest.cases("mps", quick=True)[::9] if c.out_features < 100]
        result = selftest.run_cases(torch.device("mps"), chosen, seed=2)
    assert not result.failures
    program = build(units(simulator.sources()[before:]), tmp_path)
    done = emulate(program, calls, seed=5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 20


CHECKS = {
    "fine": (FINE, ""),
    "bounds": ("a[i + 1] = 1.0f;", "out of bounds: write of 4 bytes at byte 256 of buffer 0"),
    "race": (
        "threadgroup float t[64]; t[i] = a[i]; a[i] = t[63 - i];",
        "threadgroup memory 't'",
    ),
    "barrier": (
        "if (i < 40) threadgroup_barrier(mem_flags::mem_threadgroup);",
        "divergent threadgroup_barrier",
    ),
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> Path:
    sources = [kernel(body, name) for name, (body, _) in CHECKS.items()]
    return build(sources, tmp_path_factory.mktemp("arm64"))


@pytest.mark.parametrize("name", CHECKS)
def test_checks_on_arm64(checks: Path, name: str, tmp_path) -> None:
    message = CHECKS[name][1]
    calls = tmp_path / "calls.bin"
    calls.write_bytes(Call(name, (64, 1, 1), (64, 1, 1), [bytes(256)]).encode())
    done = emulate(checks, calls, seed=1)
    assert done.returncode == (3 if message else 0), done.stdout + done.stderr
    assert message in done.stderr

"""The arm64 kernels, cross-compiled and run under qemu-user, against the generic ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-static", "-Wall", "-Wextra", "-Werror"]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)")
    target = tmp_path_factory.mktemp("arm") / "levels"
    kernels = ROOT / "csrc/cpu"
    sources = [
        ROOT / "tests/arm/levels.cpp",
        kernels / "isa.cpp",
        *sorted(kernels.glob("arm_*.cpp")),
    ]
    command = [COMPILER, *FLAGS, "-I", str(ROOT / "csrc"), *map(str, sources), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "best"), [("cortex-a53", "neon"), ("neoverse-n1", "dotprod"), ("max", "i8mm")]
)
def test_levels_agree(program, cpu, best):
    """No dot product, dot product, int8 matrix product."""
    emulator = next((name for name in EMULATORS if shutil.which(name)), None)
    if emulator is None:
        pytest.skip("qemu-user is not installed (Debian: qemu-user-static)")
    ran = subprocess.run(
        [emulator, "-cpu", cpu, str(program), "60"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    levels = [line.split(":")[0] for line in ran.stdout.splitlines()]
    assert levels[-1] == best, ran.stdout
    assert all("60 random weights agree" in line for line in ran.stdout.splitlines())

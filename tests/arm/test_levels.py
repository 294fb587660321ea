"""Kernels of every level against the generic ones: arm64 under qemu-user, x86-64 here."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


def build(target: Path, compiler: str, pattern: str, *flags: str) -> Path:
    kernels = ROOT / "csrc/cpu"
    sources = [ROOT / "tests/arm/levels.cpp", kernels / "isa.cpp", *sorted(kernels.glob(pattern))]
    command = [compiler, *FLAGS, *flags, "-I", str(ROOT / "csrc"), *map(str, sources)]
    built = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return target


def levels_that_agree(*command: str) -> list[str]:
    ran = subprocess.run([*command, "60"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert all(line.endswith(": 60 random weights agree with generic") for line in lines), lines
    return [line.split(":")[0] for line in lines]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)")
    return build(tmp_path_factory.mktemp("arm") / "levels", COMPILER, "arm_*.cpp", "-static")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "best"), [("cortex-a53", "neon"), ("neoverse-n1", "dotprod"), ("max", "i8mm")]
)
def test_levels_agree(program, cpu, best):
    """No dot product, dot product, int8 matrix product."""
    emulator = next((name for name in EMULATORS if shutil.which(name)), None)
    if emulator is None:
        pytest.skip("qemu-user is not installed (Debian: qemu-user-static)")
    assert levels_that_agree(emulator, "-cpu", cpu, str(program))[-1] == best


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_x86_levels_agree(tmp_path):
    """AVX-VNNI too, in AVX-512's encoding where the processor has only that."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    flags = Path("/proc/cpuinfo").read_text().split()
    encoding = [] if "avx_vnni" in flags else ["-DMKRS_AVXVNNI_AS_EVEX"]
    levels = levels_that_agree(str(build(tmp_path / "levels", compiler, "x86_*.cpp", *encoding)))
    assert "generic" in levels
    assert ("avxvnni" in levels) == ("avx_vnni" in flags or "avx512_vnni" in flags)

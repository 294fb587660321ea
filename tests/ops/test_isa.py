"""Every instruction-set level of this machine passes the kernel tests."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekit_torch  # noqa: F401  registers the ops

HERE = Path(__file__).parent
LEVELS = {
    "x86_64": ("generic", "avx2", "avxvnni", "avx512", "avx512_vnni"),
    "aarch64": ("generic", "neon", "dotprod", "i8mm"),
    "arm64": ("generic", "neon", "dotprod", "i8mm"),
}.get(platform.machine(), ("generic",))
KERNEL_TESTS = (
    "test_quantize.py",
    "test_dequantize.py",
    "test_dequant_matmul.py",
    "test_dequant_matmul_t.py",
    "test_dequant_embedding.py",
    "test_dequant_reduce.py",
)

pytestmark = pytest.mark.skipif(
    os.environ.get("MKRS_TEST_DEVICE", "cpu") != "cpu", reason="levels are a matter of the CPU"
)


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "MKRS_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent.parent,
    )


PROBE = """
import torch, mergekit_torch
mergekit_torch.ops.quantize(torch.ones(1, 16))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    probe = run(level, "-c", PROBE)
    if "MKRS_CPU_ISA must be one of" in probe.stderr:
        pytest.skip(f"this processor does not run {level}")
    if json.loads(torch.ops.mkrs._cpu_info())["level"] == level:
        pytest.skip(f"{level} is in force here: the suite itself runs it")
    assert probe.returncode == 0, probe.stderr
    tests = [str(HERE / name) for name in KERNEL_TESTS]
    result = run(level, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    assert result.returncode == 0, result.stdout[-4000:]


def test_unknown_level_is_refused():
    result = run("avx9000", "-c", PROBE)
    assert result.returncode != 0
    assert "MKRS_CPU_ISA must be one of the levels this processor runs (generic" in result.stderr
    assert "got 'avx9000'" in result.stderr


def test_doctor_reports_the_level():
    for level in ("generic", None):
        env = {k: v for k, v in os.environ.items() if k != "MKRS_CPU_ISA"}
        if level is not None:
            env["MKRS_CPU_ISA"] = level
        ran = subprocess.run(
            [sys.executable, "-m", "mergekit_torch.doctor"],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            cwd=HERE.parent.parent,
        )
        assert ran.returncode == 0, ran.stderr
        lines = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
        assert "generic" in lines["available"]
        assert level is None or (lines["level"] == level and "forced" in lines["reason"])
        assert int(lines["threads"]) >= 1

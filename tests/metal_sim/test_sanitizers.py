"""The kernels under clang's AddressSanitizer and ThreadSanitizer: clean, and seeded bugs caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import simulator
from .compiler import CompileError, zig
from .cuda_replay import units
from .sanitize import FLAVOURS, Call, build, clang, replay

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


@pytest.fixture(params=FLAVOURS)
def flavour(request) -> str:
    return available(request.param)


def available(flavour: str) -> str:
    """The flavour, or a skip that says what is missing."""
    compiler, reason = clang(flavour)
    if not compiler:
        pytest.skip(f"the {flavour} flavour needs the system's clang: {reason}")
    return flavour


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, list[str]]:
    """A third of the doctor's quick cases: every kernel, every width and scheme."""
    from mergekit_torch import selftest

    simulator.load()
    before = len(simulator.sources())
    path = tmp_path_factory.mktemp("calls") / "calls.bin"
    chosen = selftest.cases("mps", quick=True)[::4]
    with simulator.recording(path):
        result = selftest.run_cases(torch.device("mps"), chosen, seed=1)
    assert not result.failures
    return path, simulator.sources()[before:]


def test_kernels_are_clean(flavour: str, recorded) -> None:
    calls, sources = recorded
    program = build(flavour, units(sources))
    for seed in (1, 2, 3):
        done = replay(program, calls, seed)
        assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 80


BUGS = {
    "address": {
        "device write past the end": (
            "a[i + 1] = 1.0f;",
            "heap-buffer-overflow",
        ),
        "device read before the start": ("a[i] = (a - 1)[0];", "heap-buffer-overflow"),
        "threadgroup memory past the end": (
            "threadgroup float t[64]; t[i] = a[i];\n"
            "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
            "threadgroup float* p = t; a[i] = p[i + 1];",
            "heap-buffer-overflow",
        ),
        "private array past the end": (
            "float t[4] = {1, 2, 3, 4}; thread float* p = t;\n"
            "for (uint j = 0; j <= i; j++) p[j % 8] += a[j]; a[i] = p[i % 4];",
            "stack-buffer-overflow",
        ),
    },
    "thread": {
        "missing barrier": (
            "threadgroup float t[64]; t[i] = a[i]; a[i] = t[63 - i];",
            "data race",
        ),
        "missing second barrier": (
            "threadgroup float t[64];\n"
            "for (int turn = 0; turn < 2; turn++) {\n"
            "  t[i] = a[i];\n"
            "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
            "  a[i] = t[63 - i];\n"
            "}",
            "data race",
        ),
        "device memory within a threadgroup": ("a[i] = a[63 - i];", "data race"),
        "between threadgroups": ("if (i == 0) a[0] += 1.0f;", "data race"),
        "a simdgroup operation is no barrier": (
            "threadgroup float t[64]; t[i] = a[i];\n"
            "const float s = simd_sum(a[i]); a[i] = t[i ^ 1] + s;",
            "data race",
        ),
    },
}
FINE = (
    "threadgroup float t[64]; t[i] = a[g * 64 + i];\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "const float s = simd_sum(t[63 - i]); a[g * 64 + i] = s;"
)


def kernel(body: str, name: str = "k") -> str:
    return (
        f"{HEAD}kernel void {name}(device float* a [[buffer(0)]],\n"
        "    uint i [[thread_index_in_threadgroup]],\n"
        f"    uint g [[threadgroup_position_in_grid]]) {{\n{body}\n}}\n"
    )


def run(flavour: str, body: str, folder: Path, groups: int):
    calls = folder / "calls.bin"
    # Exactly one float a thread of the first threadgroup: a byte more is out of bounds.
    memory = bytes(4 * 64 * (groups if "g * 64" in body else 1))
    call = Call("k", (64 * groups, 1, 1), (64, 1, 1), [memory])
    calls.write_bytes(call.encode())
    return replay(build(flavour, [kernel(body)]), calls)


@pytest.mark.parametrize(("flavour", "bug"), [(f, bug) for f in BUGS for bug in BUGS[f]])
def test_seeded_bugs_are_caught(flavour: str, bug: str, tmp_path) -> None:
    body, message = BUGS[available(flavour)][bug]
    done = run(flavour, body, tmp_path, 2 if bug == "between threadgroups" else 1)
    assert done.returncode == 66, done.stdout + done.stderr
    assert message in done.stderr
    assert "<stdin>" in done.stderr  # the place in the Metal source


def test_a_right_kernel_is_no_bug(flavour: str, tmp_path) -> None:
    done = run(flavour, FINE, tmp_path, 3)  # zeros stay zeros
    assert done.returncode == 0, done.stdout + done.stderr

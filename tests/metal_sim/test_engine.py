"""The simulator's own tests: right answers for right kernels, a report for every kind of bug."""

from __future__ import annotations

import re

import pytest
import torch

from . import simulator
from .compiler import CompileError, compile_kernels, zig

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
SEEDS = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def simulated() -> None:
    simulator.load()


def floats(n: int = 64) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32).to("mps")


def run(body: str, tensors, values=None, *, name="k", **where) -> None:
    simulator.launch(HEAD + body, name, dict(enumerate(tensors)), values, **where)


# ---- right kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", SEEDS)
def test_reverse_through_threadgroup_memory(order: int) -> None:
    source = """
kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]],
              uint g [[threadgroup_position_in_grid]]) {
  threadgroup float t[64];
  t[i] = a[g * 64 + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a[g * 64 + i] = t[63 - i];
}"""
    a = floats(256)
    with simulator.seed(order):
        run(source, [a], grid=(256,), group=(64,))
    assert torch.equal(a.cpu(), torch.arange(256.0).view(4, 64).flip(1).flatten())


def test_several_orders_run_on_the_same_memory() -> None:
    source = """
kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  a[i] = a[i] * 2.0f + 1.0f;
}"""
    a = floats(256)
    with simulator.seed(1, 2, 3):
        run(source, [a], grid=(256,), group=(64,))
    assert torch.equal(a.cpu(), torch.arange(256.0) * 2 + 1)
    with simulator.seed(1, 2, 3), pytest.raises(RuntimeError, match="race on buffer 0"):
        run(source.replace("a[i] =", "a[i / 2] ="), [a], grid=(256,), group=(64,))


@pytest.mark.parametrize("order", SEEDS)
def test_simdgroup_functions(order: int) -> None:
    source = """
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
              uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const float v = a[i];
  const float s = simd_sum(v), low = simd_min(v), high = simd_max(v);
  const float x = simd_shuffle_xor(v, ushort(5)), b = simd_broadcast(v, ushort(3));
  const bool any = simd_any(lane == 7), all = simd_all(lane < 32);
  out[i] = s + 1000.0f * (high - low) + x * 0.5f + b * 0.25f + (any && all ? 0.125f : 0.0f);
}"""
    a, out = floats(64), torch.zeros(64, device="mps")
    with simulator.seed(order):
        run(source, [a, out], grid=(64,), group=(64,))
    v = torch.arange(64.0).view(2, 32)
    lane = torch.arange(32)
    want = v.sum(1, True) + 31000 + v[:, lane ^ 5] * 0.5 + v[:, 3:4] * 0.25 + 0.125
    assert torch.equal(out.cpu().view(2, 32), want)


@pytest.mark.parametrize("transpose", ["false", "true"])
def test_simdgroup_matrices(transpose: str) -> None:
    source = f"""
kernel void k(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
              device float* c [[buffer(2)]]) {{
  simdgroup_float8x8 x, y;
  simdgroup_float8x8 z = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(x, a, 8);
  simdgroup_load(y, b + 2, 12, ulong2(1, 1), {transpose});
  simdgroup_multiply_accumulate(z, x, y, z);
  simdgroup_store(z, c, 8);
}}"""
    # Element (row, column) is p[(row + origin.y) * stride + column + origin.x].
    a, b, c = torch.randn(8, 8), torch.randn(10, 12), torch.zeros(8, 8, device="mps")
    run(source, [a.to("mps"), b.to("mps"), c])
    right = b.flatten()[3:].as_strided((8, 8), (12, 1), 3 + 12)
    right = right.T if transpose == "true" else right
    torch.testing.assert_close(c.cpu(), a @ right + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("metal", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_conversions_round_to_nearest_even(metal: str, dtype: torch.dtype) -> None:
    source = f"""
template <typename T> kernel void copy(device const float* a [[buffer(0)]],
    device T* out [[buffer(1)]], device float* back [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {{
  out[i] = T(a[i]);
  back[i] = float(T(a[i]));
}}
template [[host_name("k")]] [[kernel]] decltype(copy<{metal}>) copy<{metal}>;"""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
    a = torch.cat([bits.view(torch.float32), torch.tensor([float("inf"), float("nan"), 0.0, -0.0])])
    out, back = torch.zeros(4100, dtype=dtype, device="mps"), torch.zeros(4100, device="mps")
    run(source, [a.to("mps"), out, back], grid=(4100,), group=(50,))
    want = a.to(dtype)
    for got, expected in ((out.cpu(), want), (back.cpu(), want.float())):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))


def test_edge_threadgroups_and_three_dimensions() -> None:
    source = """
kernel void k(device int* out [[buffer(0)]], uint3 p [[thread_position_in_grid]],
              uint3 grid [[threads_per_grid]], uint3 size [[threads_per_threadgroup]]) {
  out[(p.z * grid.y + p.y) * grid.x + p.x] = int(size.x * 100 + size.y * 10 + size.z);
}"""
    out = torch.zeros(5 * 3 * 2, dtype=torch.int32, device="mps")
    run(source, [out], grid=(5, 3, 2), group=(4, 2, 1))
    got = out.cpu().view(2, 3, 5)
    assert got[0, 0].tolist() == [421, 421, 421, 421, 121]
    assert got[1, 2].tolist() == [411, 411, 411, 411, 111]


def test_values_views_and_vectors() -> None:
    source = """
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
              constant int2& pair [[buffer(2)]], constant long& big [[buffer(3)]],
              uint i [[thread_position_in_grid]]) {
  const float4 v = *reinterpret_cast<device const float4*>(a + 4 * i);
  const uint4 u = as_type<uint4>(v);
  out[i] = dot(v.zw, float2(1.0f, float(pair.y))) + float(pair.x) + float(big) + float(u.x >> 31);
}"""
    base = torch.full((100,), 7.0, device="mps")
    out = base[10:14]
    a = floats(24)[4:20]
    run(source, [a, out], {2: 3 | (5 << 32), 3: -1}, grid=(4,), group=(4,))
    v = torch.arange(4.0, 20.0).view(4, 4)
    assert torch.equal(out.cpu(), v[:, 2] + 5 * v[:, 3] + 2)
    rest = base.cpu()
    rest[10:14] = 7
    assert (rest == 7).all()


# ---- seeded bugs -------------------------------------------------------------------------------

PLACE = r"\(threadgroup \d+,\d+,\d+ thread \d+\) at <stdin>:\d+"

BUGS = {
    "device write out of bounds": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ a[i + 1] = 1.0f; }",
        "out of bounds: write of 4 bytes at byte 256 of buffer 0 .*, which has 256",
    ),
    "device read before the start": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ a[i] = (a - 1)[0]; }",
        "out of bounds: read of 4 bytes at byte -4 of buffer 0",
    ),
    "vector read past the end": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ if (i == 0) { device float4* p = reinterpret_cast<device float4*>(a); "
        "a[0] = p[16].x; } }",
        "out of bounds: read of",
    ),
    "misaligned vector": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ if (i == 0) { device float4* p = reinterpret_cast<device float4*>(a + 1); "
        "const float4 v = p[i]; a[40] = v.x + v.w; } }",
        "misaligned access",
    ),
    "threadgroup out of bounds": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[64];
  t[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* p = t;
  a[i] = p[i + 1];
}""",
        "out of bounds: read of 4 bytes at byte 256 of threadgroup memory 't', which has 256",
    ),
    "private array out of bounds": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  float t[4] = {1, 2, 3, 4};
  t[i % 4] = a[i];
  a[i] = t[i];
}""",
        "out of bounds: an index past the end of an array",
    ),
    "write to const": (
        "kernel void k(device const float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ const_cast<device float*>(a)[i] = 1.0f; }",
        "write to buffer 0 .*, which the kernel declares const",
    ),
    "divergent barrier": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i < 40) threadgroup_barrier(mem_flags::mem_threadgroup);
  a[i] = 1.0f;
}""",
        "divergent threadgroup_barrier: 40 threads wait, 24 have returned",
    ),
    "two barriers": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); a[i] = 1.0f; }
  else { threadgroup_barrier(mem_flags::mem_threadgroup); a[i] = 2.0f; }
}""",
        "divergent threadgroup_barrier: threads wait at different barriers",
    ),
    "divergent simdgroup operation": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) "
        "{ if (i % 2 == 0) a[i] = simd_sum(a[i]); }",
        "divergent simdgroup operation: lanes 55555555 wait",
    ),
    "early return before a barrier": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i == 5) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a[i] = 1.0f;
}""",
        "divergent threadgroup_barrier: 63 threads wait, 1 have returned",
    ),
    "missing barrier": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[64];
  t[i] = a[i];
  a[i] = t[(i + 63) % 64];
}""",
        "(race on threadgroup memory 't'|read of threadgroup memory 't' .* no thread .* written)",
    ),
    "missing second barrier": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[64];
  for (int turn = 0; turn < 2; turn++) {
    t[i] = a[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    a[i] = t[63 - i];
  }
}""",
        "race on threadgroup memory 't'",
    ),
    "wrong kind of barrier": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  a[i] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a[i] = a[63 - i];
}""",
        "race on buffer 0 .* without a mem_device barrier between",
    ),
    "simdgroup barrier for a threadgroup": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[64];
  t[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  t[i] = t[i] + 1.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  a[i] = t[63 - i];
}""",
        "race on threadgroup memory 't'",
    ),
    "race between threadgroups": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ if (i % 32 == 0) a[0] += 1.0f; }",
        "race on buffer 0 .* of another threadgroup .* nothing orders threadgroups",
    ),
    "unwritten threadgroup memory": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[64];
  if (i != 9) t[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a[i] = t[i];
}""",
        "read of threadgroup memory 't' at byte 36, which no thread of the threadgroup has written",
    ),
    "too much threadgroup memory": (
        """kernel void k(device float* a [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float t[8192];
  threadgroup float u[1];
  t[i] = a[i];
  u[0] = t[i];
}""",
        "more than 32768 bytes of threadgroup memory",
    ),
    "division by zero": (
        "kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        "{ a[i] = float(7 / (int(i) - int(i))); }",
        "integer division by zero",
    ),
}


@pytest.mark.parametrize("order", [0, 5])
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_reported(bug: str, order: int) -> None:
    source, message = BUGS[bug]
    group = (32,) if bug == "race between threadgroups" else (64,)
    with simulator.seed(order), pytest.raises(RuntimeError) as caught:
        run(source, [floats(64)], grid=(64,), group=group)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_reports_name_kernel_thread_and_line() -> None:
    source = (
        "kernel void shifted(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n"
        "  float v = 1.0f;\n"
        "  a[i + 1] = v;\n"
        "}"
    )
    with pytest.raises(RuntimeError, match=rf"kernel shifted: .*{PLACE}") as caught:
        run(source, [floats(32)], name="shifted")
    assert "<stdin>:5" in str(caught.value)


def test_the_simulator_goes_on_after_a_failure() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="divergent"):
            run(BUGS["divergent barrier"][0], [floats()], grid=(64,), group=(64,))
        test_reverse_through_threadgroup_memory(0)


def test_reads_of_unwritten_tensors() -> None:
    source = """
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
              uint i [[thread_position_in_grid]]) { out[i] = a[i]; }"""
    a = torch.empty(32, device="mps")
    a[:31] = 1.0
    out = torch.empty(32, device="mps")
    with pytest.raises(RuntimeError, match=r"buffer 0 .* at byte 124, which nothing has written"):
        run(source, [a, out])
    a[31] = 2.0
    run(source, [a, out])
    assert out.cpu()[31] == 2
    assert torch.empty(3, device="mps").isnan().all()


# ---- bugs of the host --------------------------------------------------------------------------

COPY = """
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
              constant long& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  if (long(i) < n) out[i] = a[i];
}"""


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({0: "f", 1: "f"}, {}, "buffer 2 is never set by the host"),
        ({0: "f"}, {2: 4}, "buffer 1 is never set by the host"),
        ({0: "f", 1: "f"}, {2: 4, 5: 1}, "sets buffer 5, which the kernel does not have"),
        ({0: "f", 1: "h"}, {2: 4}, "buffer 1 points to float32, the host sets a Half tensor"),
        ({0: "f", 1: "f", 2: "f"}, {}, "buffer 2 is a value, the host sets a tensor"),
        ({0: "f"}, {1: 3, 2: 4}, "buffer 1 is a pointer, the host sets a value"),
        ({0: "f", 1: "cpu"}, {2: 4}, "Expected all tensors to be on mps, buffer 1 is on cpu"),
        ({0: "f", 31: "f"}, {2: 4}, "Metal has 31"),
    ],
)
def test_argument_mismatches(tensors, values, message) -> None:
    made = {
        "f": torch.zeros(32, device="mps"),
        "h": torch.zeros(32, dtype=torch.float16, device="mps"),
        "cpu": torch.zeros(32),
    }
    with pytest.raises(RuntimeError, match=message):
        simulator.launch(HEAD + COPY, "k", {i: made[t] for i, t in tensors.items()}, values)


def test_values_must_be_eight_bytes() -> None:
    source = COPY.replace("constant long&", "constant int&")
    with pytest.raises(RuntimeError, match="buffer 2 is a value of 4 bytes, the host sets 8"):
        simulator.launch(HEAD + source, "k", {0: floats(32), 1: floats(32)}, {2: 4})


@pytest.mark.parametrize(
    ("group", "attribute", "message"),
    [
        (1056, "", "1 to 1024 threads is allowed, got 1056"),
        (128, "max_total_threads_per_threadgroup(64)", "1 to 64 threads is allowed, got 128"),
    ],
)
def test_too_many_threads(group: int, attribute: str, message: str) -> None:
    head = f"[[kernel, {attribute}]] void" if attribute else "kernel void"
    source = f"{head} k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {{}}"
    with pytest.raises(RuntimeError, match=message):
        run(source, [floats(32)], grid=(group,), group=(group,))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kernel void k(device float* a [[buffer(31)]]) {}", "buffer indices below 31"),
        ("kernel void k(device float* a) {}", "needs \\[\\[buffer"),
        (
            "kernel void k(device float* a [[buffer(0)]], device float* b [[buffer(0)]]) {}",
            "binds a buffer index twice",
        ),
        ("kernel void k(device float* a [[buffer(0)]]) { a[0] = sin(1.0f); }", "sin"),
        ("kernel void k(device float* a [[buffer(0)]]) { a[0] = }", "error"),
        ("void f() {}", "instantiates no kernel"),
    ],
)
def test_sources_that_do_not_compile(source: str, message: str) -> None:
    with pytest.raises((CompileError, ValueError), match=message):
        compile_kernels(HEAD + source)
    with pytest.raises(RuntimeError, match=f"Failed to create metal library.*(?s:.*){message}"):
        run(source, [floats(32)])


def test_counters() -> None:
    source = """
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]],
              uint i [[thread_position_in_grid]]) { out[i] = a[i] + a[i / 2]; }"""
    a, out = floats(1024), torch.empty(1024, device="mps")
    with simulator.counting() as report:
        run(source, [a, out], grid=(1024,), group=(64,))
    (dispatch,) = report["dispatches"]
    by_index = {b["index"]: b for b in dispatch["buffers"]}
    assert dispatch["threads"] == 1024
    assert by_index[0]["read"] == 8192
    assert by_index[0]["read_once"] == 4096
    assert by_index[0]["fetched"] == 4096
    assert by_index[1]["written"] == 4096
    assert by_index[1]["read"] == 0

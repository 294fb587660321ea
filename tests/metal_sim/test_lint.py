"""MSL rules: the kernels keep them, and every rule has a source that breaks it."""

from __future__ import annotations

import itertools
import re

import pytest

from .compiler import INCLUDE, ROOT, CompileError, zig
from .lint import check, flatten, instantiate, library

try:
    zig()
except CompileError as error:
    pytest.skip(str(error), allow_module_level=True)

KERNELS = sorted((ROOT / "mps_kernels").glob("*.metal"))
FLOATS = ("float", "half", "bfloat")
BITS = ("8", "4", "2")
SCHEMES = ("SYMMETRIC", "ASYMMETRIC", "AFFINE")
WEIGHTS = [
    ", ".join(parts) for parts in itertools.product(FLOATS, BITS, SCHEMES, ("true", "false"))
]


def instances(name: str) -> list[str]:
    """Every weight format, and every other parameter at least once."""
    result = []
    for n, weight in enumerate(WEIGHTS):
        t = FLOATS[n % 3]
        o = t if n % 2 else "float"
        tile = ("8", "16", "24", "32", "64")[n % 5]
        result += {
            "dequantize": [f"dequantize<{t}, {weight}>"],
            "dequant_embedding": [
                f"dequant_embedding<{t}, {weight}, {'int' if n % 2 else 'long'}>"
            ],
            "dequant_reduce": [
                f"dequant_reduce<{weight}, {kind}>"
                for kind in ("SUM", "SUM_SQUARES", "AMAX", "AMIN", "ABS_MAX")
            ],
            "dequant_matmul": [
                f"dequant_matmul_decode<{t}, {weight}>",
                f"dequant_matmul_small<{t}, {weight}, {n % 7 + 2}>",
                f"dequant_matmul_tile<{t}, {o}, {weight}, {tile}>",
            ],
            "dequant_matmul_t": [
                f"dequant_matmul_t_small<{t}, {o}, {weight}, {n % 8 + 1}>",
                f"dequant_matmul_t_tile<{t}, {o}, {weight}, {tile}>",
            ],
            "split_sum": [f"split_sum<{t}>"] if n < 3 else [],
            "quantize": [f"quantize<{t}, {weight.rsplit(', ', 1)[0]}>"] if n % 2 else [],
        }[name]
    return result


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_keep_the_rules(path) -> None:
    assert check(instantiate(flatten(path), instances(path.stem))) == []


HEAD = "#include <metal_stdlib>\nusing namespace metal;\n#pragma METAL fp contract(off)\n"
BROKEN = {
    "device to unnamed": (
        "float f(float* p) { return p[0]; }\n"
        "kernel void k(device float* a [[buffer(0)]]) { a[0] = f(a); }",
        "names no address space",
    ),
    "reference without space": (
        "void f(float& p) { p = 1.0f; }\n"
        "kernel void k(device float* a [[buffer(0)]]) { float x; f(x); a[0] = x; }",
        "names no address space",
    ),
    "threadgroup as device": (
        "kernel void k(device float* a [[buffer(0)]]) "
        "{ threadgroup float t[4]; device float* p = t; p[0] = a[0]; }",
        "changes address space|cannot initialize",
    ),
    "device as thread": (
        "float f(thread float* p) { return p[0]; }\n"
        "kernel void k(device float* a [[buffer(0)]]) { a[0] = f(a); }",
        "no matching function|changes address space|cannot",
    ),
    "write to constant": (
        "kernel void k(device float* a [[buffer(0)]], constant float& c [[buffer(1)]]) "
        "{ c = a[0]; }",
        "const",
    ),
    "double": (
        "kernel void k(device float* a [[buffer(0)]]) { double d = 1; a[0] = d; }",
        "double",
    ),
    "new": ("kernel void k(device float* a [[buffer(0)]]) { thread int* p = new int; }", "heap"),
    "virtual": (
        "struct S { virtual float f(); };\nkernel void k(device float* a [[buffer(0)]]) {}",
        "virtual",
    ),
    "static local": (
        "kernel void k(device float* a [[buffer(0)]]) { static int n = 0; a[0] = n; }",
        "static local",
    ),
    "recursion": (
        "int f(int n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\n"
        "kernel void k(device int* a [[buffer(0)]]) { a[0] = f(a[0]); }",
        "recursion in",
    ),
    "mutual recursion": (
        "int g(int n);\nint f(int n) { return n > 0 ? g(n - 1) : 0; }\n"
        "int g(int n) { return n > 0 ? f(n - 2) : 1; }\n"
        "kernel void k(device int* a [[buffer(0)]]) { a[0] = f(a[0]); }",
        "recursion in",
    ),
    "function pointer": (
        "int f(int n) { return n; }\n"
        "kernel void k(device int* a [[buffer(0)]]) { int (*p)(int) = f; a[0] = p(1); }",
        "pointer to a function",
    ),
    "overload by address space": (
        "float f(device const float* p) { return p[0]; }\n"
        "float f(threadgroup const float* p) { return p[0]; }\n"
        "kernel void k(device float* a [[buffer(0)]]) { a[0] = f(a); }",
        "redefinition of 'f'",
    ),
    "bfloat mathematics": (
        "kernel void k(device bfloat* a [[buffer(0)]]) { a[0] = bfloat(fabs(a[0])); }",
        "deleted",
    ),
    "unlisted function": (
        "kernel void k(device float* a [[buffer(0)]]) { a[0] = lgamma(a[0]); }",
        "lgamma",
    ),
    "C++17": (
        "template <int N> int f() { if constexpr (N > 1) return 1; else return 0; }\n"
        "kernel void k(device int* a [[buffer(0)]]) { a[0] = f<2>(); }",
        "C++17 extension",
    ),
}


def test_functions_are_those_of_the_specification() -> None:
    """The simulator's library has every listed function; calls of others are lint's business."""
    text = (INCLUDE / "metal_stdlib").read_text()
    for name, section in library().items():
        assert re.search(rf"(\b|MSL_REDUCE\(){name}[(,]", text), name
        assert section[0] in "26"


def test_a_function_that_is_not_listed_is_found() -> None:
    source = HEAD + "kernel void k(device float* a [[buffer(0)]]) { a[0] = sinpi(a[0]); }"
    assert any("sinpi is no function of this source" in p for p in check(source))


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rules_are_found(rule: str) -> None:
    source, message = BROKEN[rule]
    problems = check(HEAD + source)
    assert any(part in p for p in problems for part in message.split("|")), problems


def test_contraction_must_be_off() -> None:
    source = (
        "#include <metal_stdlib>\nkernel void k(device float* a [[buffer(0)]]) { a[0] = 1.0f; }"
    )
    assert any("contract(off)" in p for p in check(source))

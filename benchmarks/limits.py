"""The machine's own limits: compiles and runs ``limits.cpp``."""

import ctypes
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

SOURCE = Path(__file__).with_name("limits.cpp")


def cpu_name() -> str:
    """The processor's name, with what it can do that kernels use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "asimddp", "i8mm")
    family = f"family {fields.get('cpu family')} model {fields.get('model')}"
    name = fields.get("model name", platform.machine())
    return f"{name} ({family}; {' '.join(f for f in known if f in flags)})"


def last_cache_bytes() -> int:
    """Size of the largest cache, 32 MiB where it cannot be read."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1024, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


def _build(output: str, *flags: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("benchmarks: measuring the machine's limits needs a C++ compiler")
    command = [compiler, "-O3", "-march=native", "-std=c++17", *flags, str(SOURCE), "-o", output]
    subprocess.run(command, check=True)


@functools.cache
def reader() -> Callable[[int, int, int], None]:
    """``read(address, bytes, threads)``: reads memory and does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "limits.so")
        _build(library, "-shared", "-fPIC", "-fopenmp")
        read = ctypes.CDLL(library).read_alone
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    read.restype = None
    return cast(Callable[[int, int, int], None], read)


def measure(threads: int) -> dict[str, dict[str, float]]:
    """Bandwidth (GB/s) and arithmetic peaks (GFLOP/s, GOP/s) with 1 and ``threads`` threads."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        _build(program, "-pthread")
        out = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    result: dict[str, dict[str, float]] = json.loads(out.stdout)
    return result

"""Builds replay.cpp and kernels with the system's clang and one of its sanitizers."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .compiler import (
    CACHE,
    COMMON,
    HERE,
    INCLUDE,
    CompileError,
    atomic_write,
    machine_flags,
    preprocess,
)
from .prepass import to_cpp

FLAVOURS = {"address": "MSL_ASAN", "thread": "MSL_TSAN"}
NAMES = ["clang++", *(f"clang++-{n}" for n in range(25, 16, -1))]
# Arithmetic that is compiled, and a program that is linked.
PROBE = "int main() { return sizeof(decltype(__bf16(1.0f) * __bf16(2.0f))) == 3; }\n"


@functools.cache
def clang(flavour: str) -> tuple[str, str]:
    """The system's clang that can build a sanitized program, and "" or why there is none.

    bfloat16 arithmetic needs clang 17; Debian has the runtime in libclang-rt-<version>-dev.
    """
    reason = "no clang++ from 17 on is installed"
    for name in [os.environ.get("MKRS_CLANG", ""), *NAMES]:
        path = shutil.which(name) if name else None
        if path is None:
            continue
        done = subprocess.run(
            [path, "-x", "c++", "-", f"-fsanitize={flavour}", "-o", "/dev/null"],
            input=PROBE,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return path, ""
        lines = [x for x in done.stderr.splitlines() if "error" in x] or ["it fails"]
        reason = f"{name} cannot build with -fsanitize={flavour}: {lines[0]}"
    return "", reason


def _run(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr)


def tables(count: int) -> str:
    """C++ that lists the kernels of ``count`` units, compiled with their tables renamed."""
    rows = ", ".join(f"{{kernels_{n}, count_{n}}}" for n in range(count))
    text = '#include "msl_runtime.h"\nextern "C" {\n'
    for n in range(count):
        text += f"extern const msl::Kernel kernels_{n}[]; extern const int count_{n};\n"
    text += "}\nstruct Table { const msl::Kernel* kernels; int count; };\n"
    text += f"extern const Table kTables[]; const Table kTables[] = {{ {rows} }};\n"
    return text + f"extern const int kTableCount; const int kTableCount = {count};\n"


def build(flavour: str, sources: list[str]) -> Path:
    """A program that replays calls of the kernels that ``sources`` instantiate."""
    compiler, reason = clang(flavour)
    if not compiler:
        raise CompileError(reason)
    digest = hashlib.sha256(f"{compiler} {flavour}".encode())
    for path in sorted([*INCLUDE.iterdir(), HERE / "prepass.py", *HERE.glob("replay.*")]):
        digest.update(path.read_bytes())
    digest.update("\0".join(sources).encode())
    target = CACHE / f"replay-{flavour}-{digest.hexdigest()[:24]}"
    if target.exists():
        return target
    objects: list[Path] = []
    folder = CACHE / f"replay-{flavour}.{os.getpid()}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for n, source in enumerate(sources):
            objects.append(folder / f"kernels{n}.o")
            flags = [*COMMON, *(f for f in machine_flags() if f.startswith("-m"))]
            flags += [f"-fsanitize={flavour}", f"-I{INCLUDE}"]
            flags += [f"-Dmsl_kernels=kernels_{n}", f"-Dmsl_kernel_count=count_{n}"]
            _run([compiler, *flags, "-c", "-", "-o", str(objects[-1])], to_cpp(preprocess(source)))
        plain = ["-std=c++17", "-O1", "-g1", f"-D{FLAVOURS[flavour]}", f"-I{INCLUDE}", f"-I{HERE}"]
        objects += [folder / "tables.o", folder / "replay.o"]
        _run(
            [compiler, *plain, "-x", "c++", "-c", "-", "-o", str(objects[-2])], tables(len(sources))
        )
        _run([compiler, *plain, "-c", str(HERE / "replay.cpp"), "-o", str(objects[-1])])
        link = [compiler, f"-fsanitize={flavour}", *map(str, objects), "-o"]
        return atomic_write(target, lambda temporary: _run([*link, str(temporary)]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replay(program: Path, calls: Path, seed: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs it; the first thing that the sanitizer finds ends it with exit code 66."""
    # Fake stacks would be made anew for every fiber.
    options = "exitcode=66:halt_on_error=1:detect_leaks=0:detect_stack_use_after_return=0"
    symbolizer = shutil.which("llvm-symbolizer") or shutil.which("addr2line")
    if symbolizer:
        options = f"external_symbolizer_path={symbolizer}:{options}"
    return subprocess.run(
        [str(program), str(calls), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ASAN_OPTIONS": options, "TSAN_OPTIONS": options.rsplit(":", 1)[0]},
    )


@dataclass
class Call:
    """One call for a file of calls, as shim_mps.cpp writes them (see replay.h)."""

    kernel: str
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    arguments: list[bytes] = field(default_factory=list)  # all writable pointers

    def encode(self) -> bytes:
        """The bytes; what the kernel should have written is not said, so nothing is compared."""
        name = self.kernel.encode()
        out = [struct.pack("<Q", len(name)), name]
        out.append(struct.pack("<7Q", *self.grid, *self.group, len(self.arguments)))
        for i, data in enumerate(self.arguments):
            out += [struct.pack("<5Q", i, 1, 1, i, len(data)), data]
        for data in self.arguments:
            out += [data, bytes(len(data))]
        return b"".join(out)


def kernel_names(source: str) -> list[str]:
    """The host names of the kernels that a source instantiates."""
    return re.findall(r'\[\[host_name\("([^"]+)"\)\]\]', source)

"""Compiles Metal source for the host, with every result kept in a cache keyed by its content.

The compiler is the clang inside the ``ziglang`` package, called in-process by ``zig clang``; the
kernels include nothing of the system, so no sysroot is needed. Memory accesses are instrumented
by clang's ThreadSanitizer pass, whose callbacks (``__tsan_read4`` and so on) the engine provides:
it is told of each access and needs no sanitizer runtime.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from .prepass import to_cpp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "metal_sim"
INCLUDE = HERE / "include"
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
# The SIMT engine without torch.
ENGINE = [HERE / name for name in ("engine.cpp", "fibers.cpp", "memory.cpp")]
ENGINE_HEADERS = [HERE / "engine.h", HERE / "machine.h", INCLUDE / "msl_runtime.h"]

# Metal up to 3.2 is C++14. Access sizes must stay those of the source: no vectorizer.
COMMON = [
    "-x",
    "c++",
    "-std=c++14",
    "-nostdinc",
    "-nostdinc++",
    "-O2",
    "-g1",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-Wno-everything",
    "-Werror=return-type",
    "-Werror=c++17-extensions",
]
INSTRUMENT = [
    "-fsanitize=thread",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
    "-fsanitize=alignment,array-bounds,integer-divide-by-zero,shift",
    "-Xclang",
    "-fsanitize-minimal-runtime",
]


class CompileError(RuntimeError):
    """The compiler's message about Metal source."""


def zig() -> Path:
    """The zig executable of the ziglang package."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise CompileError(
            "the Metal simulator compiles kernels with the ziglang package: pip install ziglang"
        )
    return Path(spec.origin).parent / ("zig.exe" if os.name == "nt" else "zig")


def machine_flags() -> list[str]:
    """Target flags: glibc's ABI, and hardware conversion of halves where x86 has it."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        flags = ["--target=x86_64-linux-gnu"]
        features = Path("/proc/cpuinfo").read_text()
        return flags + [f"-m{name}" for name in ("f16c", "fma") if name in features]
    if machine in ("aarch64", "arm64"):
        return ["--target=aarch64-linux-gnu"]
    raise CompileError(f"the Metal simulator runs on x86-64 and arm64, got {machine}")


# zig keeps what it built of its own runtime; that stays inside the checkout as well.
ZIG_CACHE = {f"ZIG_{kind}_CACHE_DIR": str(ROOT / ".cache" / "zig") for kind in ("GLOBAL", "LOCAL")}


def run(command: list[str], text: str | None = None) -> str:
    """Standard output of a command; its error output becomes a CompileError."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ZIG_CACHE},
    )
    if done.returncode != 0:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed")
    return done.stdout


# The instantiations behind a kernel file, as the host writes them: nothing in them is a macro.
_INSTANCES = re.compile(r"(?:\ntemplate \[\[host_name\([^\n]*;)+\n?\Z")


def preprocess(source: str) -> str:
    """Macros expanded; <metal_...> headers are left out, the prepass puts its own in front."""
    match = _INSTANCES.search(source)
    end = match.start() if match else len(source)
    return _preprocess(source[:end]) + source[end:]


@functools.lru_cache(maxsize=16)  # every kernel file, for all its kernels
def _preprocess(source: str) -> str:
    stripped = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*$", "", source, flags=re.M)
    command = [str(zig()), "clang", "-E", "-x", "c++", "-std=c++14", "-nostdinc", "-nostdinc++"]
    return run([*command, "-D__METAL__=1", "-D__METAL_VERSION__=310", "-"], stripped)


def atomic_write(path: Path, build: Callable[[Path], object]) -> Path:
    """``build(temporary)`` renamed to ``path``, so that a reader never sees half a file."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        build(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# The pass and the flags are those that this process runs with, whatever becomes of the files.
_LOADED = b"".join((HERE / name).read_bytes() for name in ("prepass.py", "compiler.py"))


def tool_key() -> str:
    """Changes when anything that shapes a compiled kernel does.

    Asked for every kernel: headers that are edited while tests run must not be cached as others.
    """
    digest = hashlib.sha256(_LOADED)
    for path in sorted(INCLUDE.iterdir()):
        digest.update(path.read_bytes())
    stat = zig().stat()
    digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def compile_kernels(source: str) -> Path:
    """A shared library of every kernel that ``source`` instantiates."""
    key = hashlib.sha256((tool_key() + source).encode()).hexdigest()[:32]
    target = CACHE / "kernels" / f"{key}.so"
    if target.exists():
        return target

    def build(temporary: Path) -> None:
        cpp = temporary.with_suffix(".cpp")
        obj = temporary.with_suffix(".o")
        try:
            cpp.write_text(to_cpp(preprocess(source)))
            flags = [*COMMON, *INSTRUMENT, *machine_flags(), f"-I{INCLUDE}"]
            run([str(zig()), "clang", "-c", *flags, str(cpp), "-o", str(obj)])
            run([str(zig()), "ld.lld", "-shared", str(obj), "-o", str(temporary)])
        finally:
            if not os.environ.get("MKRS_SIM_KEEP"):
                cpp.unlink(missing_ok=True)
            obj.unlink(missing_ok=True)

    return atomic_write(target, build)


def host_compiler() -> str:
    """The C++ compiler for what links against torch: its libstdc++ must be torch's."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CompileError("the Metal simulator needs a C++ compiler (g++ or clang++)")


def embed_shaders() -> ModuleType:
    """csrc/mps/embed_shaders.py, which flattens and embeds the kernels; it is in no package."""
    script = ROOT / "csrc" / "mps" / "embed_shaders.py"
    spec = importlib.util.spec_from_file_location("embed_shaders", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Builds, loads and steers the simulator: ``load()`` gives this process a device named "mps".

Two libraries are built once and cached by content: the simulator (engine, torch's Metal shim, the
device) and the project's MPS host code, csrc/mps/*.cpp, compiled as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .compiler import (
    CACHE,
    ENGINE,
    ENGINE_HEADERS,
    HERE,
    INCLUDE,
    JOBS,
    ROOT,
    atomic_write,
    compile_kernels,
    embed_shaders,
    host_compiler,
    run,
)

TORCH = Path(torch.__file__).resolve().parent
_library: ctypes.CDLL | None = None
_keep: list[Any] = []
_source_of: dict[str, str] = {}  # by kernel name
_HOST_NAME = re.compile(r'\[\[host_name\("([^"]+)"\)\]\]')


def _flags() -> list[str]:
    include = TORCH / "include"
    return [
        "-fPIC",
        "-g1",
        "-Wall",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{include}",
        f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
    ]


def _link_flags() -> list[str]:
    lib = TORCH / "lib"
    return ["-shared", f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10", "-ldl"]


def _build(name: str, sources: list[Path], flags: list[str], depends: list[Path]) -> Path:
    """A shared library of ``sources``, from the cache when nothing that shapes it has changed."""
    compiler = host_compiler()
    digest = hashlib.sha256(repr((compiler, flags, torch.__version__, torch.__file__)).encode())
    for path in sorted({*sources, *depends}):
        digest.update(path.name.encode() + path.read_bytes())

    def build(temporary: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as folder, ThreadPoolExecutor(JOBS) as pool:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
            commands = [
                [compiler, *flags, "-c", str(source), "-o", obj]
                for source, obj in zip(sources, objects, strict=True)
            ]
            list(pool.map(run, commands))
            run([compiler, *objects, *_link_flags(), "-o", str(temporary)])

    target = CACHE / f"{name}-{digest.hexdigest()[:24]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds
        return atomic_write(target, build)


def build_simulator() -> Path:
    """The shared library with the engine, the shim and the device."""
    sources = [*ENGINE, HERE / "device.cpp", HERE / "shim_mps.cpp"]
    headers = [*ENGINE_HEADERS, HERE / "device.h"]
    flags = [*_flags(), "-std=c++20", "-O2", f"-I{INCLUDE}", "-Wno-unused-parameter"]
    return _build("libmetal_sim", sources, flags, headers)


def build_host() -> Path:
    """csrc/mps/*.cpp with the embedded kernels, compiled as on macOS but for the target.

    buffers.cpp stands for csrc/mps/zero_copy.mm.
    """
    csrc = ROOT / "csrc"
    text = embed_shaders().generate()
    name = f"shader_sources-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cpp"
    generated = atomic_write(CACHE / name, lambda temporary: temporary.write_text(text))
    sources = [*sorted((csrc / "mps").glob("*.cpp")), generated, HERE / "buffers.cpp"]
    headers = [*csrc.glob("*.h"), *(csrc / "mps").glob("*.h")]
    flags = [
        *_flags(),
        "-std=c++17",
        "-O1",
        "-Wextra",
        "-Wno-unused-parameter",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DTORCH_STABLE_ONLY",
        f"-I{csrc}",
    ]
    return _build("libmkrs_mps", sources, flags, headers)


def load() -> None:
    """Gives this process device="mps"; the ops of mergekit_torch then run there too."""
    global _library
    if _library is not None:
        return
    if torch.backends.mps.is_built():
        raise RuntimeError("this torch has a real MPS backend; the simulator would replace it")
    library = ctypes.CDLL(str(build_simulator()), mode=ctypes.RTLD_GLOBAL)
    library.sim_report.restype = ctypes.c_char_p
    library.sim_record.argtypes = [ctypes.c_char_p]
    library.sim_set_seeds.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    def compile_callback(source: bytes, answer: int, size: int) -> int:
        try:
            text, status = str(compile_kernels(source.decode())), 0
            _source_of.update(dict.fromkeys(_HOST_NAME.findall(source.decode()), source.decode()))
        except Exception as error:  # a callback cannot raise
            text, status = f"{type(error).__name__}: {error}", 1
        data = text.encode()[: size - 1] + b"\0"
        ctypes.memmove(answer, data, len(data))
        return status

    library.sim_set_compiler(compile_callback)
    _keep.append(compile_callback)
    _library = library
    set_seeds(*environment_seeds())

    from mergekit_torch import verify  # importing the package defines the ops' schemas

    torch.ops.load_library(str(build_host()))
    verify.install_if_asked()


def is_asked() -> bool:
    """Whether torch asks the simulator about devices, as gradients and mapped tensors need.

    It does not in a process that asked for an MPS device before :func:`load`.
    """
    return bool(_loaded().sim_is_asked())


def _loaded() -> ctypes.CDLL:
    load()
    assert _library is not None
    return _library


def environment_seeds() -> list[int]:
    """``MKRS_SIM_SEED``: one seed, or several with commas between."""
    return [int(part) for part in os.environ.get("MKRS_SIM_SEED", "0").split(",")]


def set_seeds(*values: int) -> None:
    """Orders of threads and threadgroups: 0 is in order, other values shuffle both, repeatably.

    Each kernel call runs in every one of them on the same memory; results that differ in a bit are
    an error.
    """
    if not values:
        raise ValueError("at least one seed is needed, got none")
    _loaded().sim_set_seeds((ctypes.c_uint64 * len(values))(*values), len(values))


@contextlib.contextmanager
def seed(*values: int) -> Iterator[None]:
    """Runs a block in some orders of threads."""
    set_seeds(*values)
    try:
        yield
    finally:
        set_seeds(*environment_seeds())


@contextlib.contextmanager
def counting() -> Iterator[dict[str, Any]]:
    """Counts memory traffic, allocations and waits; the dict is filled when the block ends.

    Its keys are those of engine.h's Dispatch and device.h's Activity. Kernels run in one order
    meanwhile, or each call would be counted several times.
    """
    report: dict[str, Any] = {}
    library = _loaded()
    library.sim_reset()
    library.sim_set_count(1)
    try:
        with seed(environment_seeds()[0]):
            yield report
        report.update(json.loads(library.sim_report()))
    finally:
        library.sim_set_count(0)
        library.sim_reset()


@contextlib.contextmanager
def recording(path: Path) -> Iterator[list[str]]:
    """Writes every kernel call, with its memory before and after, to ``path`` (see replay.h).

    The list is filled with the sources of the kernels that ran when the block ends.
    """
    library = _loaded()
    library.sim_reset()
    if not library.sim_record(str(path).encode()):
        raise OSError(f"cannot write {path}")
    sources: list[str] = []
    try:
        yield sources
        sources += [_source_of[name] for name in kernels_run()]
    finally:
        if not library.sim_record(None):
            raise OSError(f"cannot write {path}")


def kernels_run() -> list[str]:
    """Names of all kernels since the process, the last `counting` or the last `recording` began."""
    return list(json.loads(_loaded().sim_report())["kernels"])


def launch(
    source: str,
    name: str,
    tensors: dict[int, torch.Tensor],
    values: dict[int, int] | None = None,
    *,
    grid: tuple[int, ...] = (32,),
    group: tuple[int, ...] = (32,),
) -> None:
    """Compiles ``source`` and runs one kernel; ``grid`` is in threads."""
    _loaded()
    values = values or {}
    torch.ops.metal_sim.launch(
        source,
        name,
        list(tensors.values()),
        list(tensors),
        list(values.values()),
        list(values),
        list(grid),
        list(group),
    )

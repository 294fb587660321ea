"""Build of the one extension, ``mergekit_torch/_C.abi3.so``.

It uses only LibTorch's stable ABI and CPython's limited API, so one binary serves every
Python >= 3.10 and every torch >= 2.11. Sources are chosen by platform:

* ``csrc/*.cpp``, ``csrc/cpu/*.cpp``, ``csrc/memory/*.cpp`` always;
* ``csrc/mps/*.cpp``, ``csrc/mps/*.mm`` on macOS;
* ``csrc/cuda/*.cu`` with ``MKRS_CUDA=1``, compiled by the nvcc that ``CUDA_HOME`` or ``PATH``
  names, for ``MKRS_CUDA_ARCHS`` (default ``80;90a;90+PTX``: one binary for sm_80 and later). Only
  headers of torch are needed for that, so any torch >= 2.11 will do, CPU-only ones too.

Build with ``pip install --no-build-isolation .``: an isolated build would fetch another torch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
# The oldest torch whose stable ABI the sources use: 0x02 major, 0x0b minor.
TORCH_TARGET_VERSION = "0x020b000000000000"

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        "mergekit_torch: building needs torch >= 2.11 in this environment, and it cannot be "
        f"imported ({error}).\nInstall torch first, then: pip install --no-build-isolation ."
    )

torch_version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
if torch_version < MIN_TORCH:
    sys.exit(f"mergekit_torch: building needs torch >= 2.11, got {torch.__version__}.")


def sources(*patterns: str) -> list[str]:
    """Source files as paths relative to the root, sorted so that builds are reproducible."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def find_nvcc() -> str:
    """The CUDA compiler of ``CUDA_HOME``, or the first on ``PATH``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        sys.exit(f"mergekit_torch: MKRS_CUDA=1 needs nvcc in CUDA_HOME or on PATH, got {nvcc}.")
    return nvcc


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders in which this nvcc finds its runtime libraries."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    return [str(Path(path).resolve()) for path in re.findall(r'"-L([^"]+)"', plan)]


def cuda_flags() -> list[str]:
    """Flags of every .cu file: architectures, warnings and the macros of torch's stable ABI."""
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
    for arch in os.environ.get("MKRS_CUDA_ARCHS", "80;90a;90+PTX").split(";"):
        number, _, ptx = arch.partition("+")
        code = f"compute_{number}" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    # USE_CUDA opens the CUDA part of torch's C shim.
    macros = [f"TORCH_TARGET_VERSION={TORCH_TARGET_VERSION}ULL", "TORCH_STABLE_ONLY", "USE_CUDA"]
    flags += [f"-D{macro}" for macro in [*macros, "MKRS_CUDA"]]
    flags += [f"-I{ROOT / 'csrc'}"]
    flags += [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    return [*flags, "-Xcompiler", ",".join(host)]


def cuda_objects(folder: Path) -> list[str]:
    """Compile ``csrc/cuda/*.cu`` into ``folder``, several at a time, what changed only."""
    nvcc, flags = find_nvcc(), cuda_flags()
    folder.mkdir(parents=True, exist_ok=True)
    headers = [ROOT / path for path in sources("csrc/*.h", "csrc/cuda/*.cuh", "setup.py")]
    newest = max(path.stat().st_mtime for path in headers)

    def compile_one(source: str) -> str:
        target = folder / (Path(source).stem + ".o")
        command = [nvcc, *flags, "-c", str(ROOT / source), "-o", str(target)]
        stamp = target.with_suffix(".command")
        changed = max(newest, (ROOT / source).stat().st_mtime)
        if not (
            target.exists()
            and target.stat().st_mtime > changed
            and stamp.exists()
            and stamp.read_text() == " ".join(command)
        ):
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            stamp.write_text(" ".join(command))
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, sources("csrc/cuda/*.cu")))


class CompileCuda(Command):
    """``setup.py compile_cuda``: the CUDA objects alone, to see that they compile."""

    description = "compile csrc/cuda/*.cu without linking (needs nvcc, no GPU)"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Compile."""
        cuda_objects(ROOT / "build/cuda/temp/cuda")


def torch_cuda_stub(folder: Path) -> str:
    """A folder with a stand-in for libtorch_cuda to link against.

    The one function the binary takes from there is resolved by the real library at run time.
    Naming that library as needed makes the loader look there, and a CPU-only torch has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "torch_cuda_stub.c"
    source.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*command, str(source), "-o", str(folder / "libtorch_cuda.so")], check=True)
    return str(folder)


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder; CUDA sources go through nvcc here, since torch's way wants a CUDA torch."""

    def build_extension(self, ext: "cpp_extension.Extension") -> None:
        """Compile and link one extension."""
        if os.environ.get("MKRS_CUDA", "0") == "1":
            folder = Path(self.build_temp).resolve() / "cuda"
            ext.extra_objects += cuda_objects(folder)
            ext.extra_link_args += [f"-L{torch_cuda_stub(folder)}", "-Wl,--no-as-needed"]
            ext.extra_link_args += ["-ltorch_cuda"]
        super().build_extension(ext)


def extension() -> "cpp_extension.Extension":
    """The extension for this platform and these environment variables."""
    with_cuda = os.environ.get("MKRS_CUDA", "0") == "1"
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("TORCH_STABLE_ONLY", None),
    ]
    # Contraction would fuse scale*q + offset into one rounding where the format promises two; the
    # kernels ask for fma by name where they want it.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # torch's own headers trip this one.
    flags.append("-Wno-unused-parameter")
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/memory/*.cpp")
    link_args: list[str] = []
    compile_args: dict[str, list[str]] = {"cxx": flags}
    if sys.platform == "darwin":
        files += sources("csrc/mps/*.cpp", "csrc/mps/*.mm")
        # The Metal sources travel inside the binary as text: torch compiles them at first use.
        shaders = "build/shader_sources.cpp"
        subprocess.run([sys.executable, "csrc/mps/embed_shaders.py", shaders], cwd=ROOT, check=True)
        files.append(shaders)
        macros.append(("MKRS_MPS", None))
        link_args += ["-framework", "Metal", "-framework", "Foundation"]
    elif platform.system() == "Linux":
        link_args += ["-Wl,--no-undefined-version", "-Wl,-s"]
    if with_cuda:
        macros.append(("MKRS_CUDA", None))
        # The static runtime: the binary then needs the driver, but no particular libcudart.
        link_args += [f"-L{path}" for path in cuda_libraries(find_nvcc())]
        link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return cpp_extension.CppExtension(
        name="mergekit_torch._C",
        sources=files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        depends=sources("csrc/**/*.h", "csrc/**/*.inc", "csrc/**/*.cuh", "mps_kernels/*"),
        py_limited_api=True,
    )


version = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "mergekit_torch/version.py").read_text(), re.MULTILINE
)
assert version is not None

setup(
    version=version.group(1),
    packages=find_packages(include=["mergekit_torch", "mergekit_torch.*"]),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension, "compile_cuda": CompileCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

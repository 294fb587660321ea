"""Build of the one extension, ``mergekit_torch/_C.abi3.so``.

It uses only LibTorch's stable ABI and CPython's limited API, so one binary serves every
Python >= 3.10 and every torch >= 2.11. Sources are chosen by platform:

* ``csrc/*.cpp``, ``csrc/cpu/*.cpp``, ``csrc/memory/*.cpp`` always;
* ``csrc/mps/*.cpp``, ``csrc/mps/*.mm`` on macOS;
* ``csrc/cuda/*.cu`` when ``MKRS_CUDA=1`` and a CUDA toolkit is there.

Build with ``pip install --no-build-isolation .``: an isolated build would fetch another torch.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

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
    kind = cpp_extension.CppExtension
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
        if cpp_extension.CUDA_HOME is None:
            sys.exit("mergekit_torch: MKRS_CUDA=1 needs a CUDA toolkit (nvcc); set CUDA_HOME.")
        kind = cpp_extension.CUDAExtension
        files += sources("csrc/cuda/*.cu")
        # USE_CUDA opens the CUDA part of torch's C shim.
        macros += [("MKRS_CUDA", None), ("USE_CUDA", None)]
        compile_args["nvcc"] = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    return kind(
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
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

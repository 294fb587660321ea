"""The same .metal files through nvcc, on an NVIDIA GPU: ``make test-metal-cuda``.

``build`` runs the doctor's cases on simulated mps with fresh random data, judged by the oracle, and
records every kernel call; then it compiles the kernels that ran, from the same source, with nvcc.
The program ``replay`` runs the recorded calls on a GPU and compares every byte: the kernels are
deterministic and the arithmetic is the same, so results must be equal to the bit.

    python -m metal_sim.cuda_replay build DIR [--all] [--arch sm_90] [--seed N]    # needs nvcc
    python -m metal_sim.cuda_replay run DIR [--sanitize]                           # needs a GPU
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .compiler import HERE, CompileError, preprocess
from .prepass import Prepass, PrepassError

INSTANCE = re.compile(r'\ntemplate \[\[host_name\("([^"]+)"\)\]\][^\n]*\n')
PER_FILE = 24  # kernels of a translation unit
# What kernels may call, named so that CUDA's own global functions and types stay out of the way.
USING = (
    "as_type",
    "clamp",
    "fabs",
    "fma",
    "isfinite",
    "isnan",
    "make_filled_simdgroup_matrix",
    "max",
    "mem_flags",
    "min",
    "rint",
    "simd_all",
    "simd_any",
    "simd_max",
    "simd_min",
    "simd_shuffle_xor",
    "simd_sum",
    "simdgroup_barrier",
    "simdgroup_float8x8",
    "simdgroup_load",
    "simdgroup_matrix",
    "simdgroup_multiply_accumulate",
    "simdgroup_store",
    "threadgroup_barrier",
    "vec",
    "float2",
    "float4",
    "int2",
    "int4",
    "uchar2",
    "uchar4",
    "uint2",
    "uint3",
    "uint4",
    "ulong2",
    "ushort2",
    "ushort4",
)


def to_cuda(source: str) -> str:
    """Metal source with its instantiations -> a CUDA translation unit with a table of kernels."""
    result = Prepass(preprocess(source), "cuda").run()
    body = re.sub(r"#pragma clang loop unroll\(full\)", "#pragma unroll", result.source)
    body = re.sub(r"#pragma METAL[^\n]*", "", body)
    lines = ['#include "metal_stdlib"', "namespace kernels {"]
    lines += [f"using metal::{name};" for name in USING]
    # Named: what an unnamed namespace uses would meet CUDA's own names in the code nvcc adds.
    lines += [body, "}", "namespace entries_TABLE {", "using namespace kernels;"]
    rows = []
    for n, (host, name, identifier) in enumerate(result.instances):
        kernel = result.kernels[name]
        arguments = []
        for position, (kind, where) in enumerate(kernel.bindings):
            at = f"typename S{n}::At<{position}>"
            if kind == "buffer":
                arguments.append(f"msl::Buffer<{at}>::get(a, {where})")
            else:
                arguments.append(f"msl::Attribute<{at}>::get(t.{where})")
        lines += [
            f"typedef msl::Signature<decltype({identifier})> S{n};",
            f"__global__ void __launch_bounds__({kernel.max_threads}) "
            f"entry{n}(const __grid_constant__ msl::Arguments a) {{",
            "  const msl::Thread t = msl::thread(); (void)t;",
            f"  {identifier}({', '.join(arguments)});",
            "}",
            f"void launch{n}(msl::Arguments a, dim3 g, dim3 b) {{ entry{n}<<<g, b>>>(a); }}",
        ]
        rows.append(f'{{"{host}", entries_TABLE::launch{n}}}')
    lines += ["}", "extern const msl::Kernel TABLE[];"]
    lines += [f"const msl::Kernel TABLE[{len(rows)}] = {{ {', '.join(rows)} }};"]
    return "\n".join(lines) + "\n"


def nvcc() -> str:
    """The CUDA compiler of ``CUDA_HOME``, or the first on ``PATH``."""
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if found is None or not Path(found).exists():
        raise CompileError("make test-metal-cuda needs nvcc in CUDA_HOME or on PATH")
    return found


def record(folder: Path, seed: int, every: bool) -> list[str]:
    """Runs the cases on simulated mps into ``calls.bin``; the sources of the kernels that ran."""
    import torch

    from mergekit_torch import selftest

    from . import simulator

    simulator.load()
    chosen = selftest.cases("mps", quick=not every)
    with simulator.recording(folder / "calls.bin"):
        result = selftest.run_cases(torch.device("mps"), chosen, seed)
    if result.failures:
        raise RuntimeError("the simulator itself is wrong: " + "\n".join(result.failures))
    print(f"recorded {result.count} cases, seed {seed}", flush=True)
    return simulator.sources()


def units(sources: list[str]) -> list[str]:
    """One source for every few kernels of one .metal file."""
    files: dict[str, list[str]] = {}
    for source in sources:
        match = INSTANCE.search(source)
        if match is None:
            raise PrepassError("a source without an instantiation")
        files.setdefault(source[: match.start()], []).append(match.group())
    found = []
    for text, instances in files.items():
        for i in range(0, len(instances), PER_FILE):
            found.append(text + "".join(instances[i : i + PER_FILE]))
    return found


def build(folder: Path, arch: str, seed: int, every: bool, jobs: int) -> None:
    """``folder/replay`` and ``folder/calls.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = nvcc()
    flags = ["-std=c++17", "-O2", "-fmad=false", "--expt-relaxed-constexpr", f"-arch={arch}"]
    flags += ["-diag-suppress", "161,177,186,550", "-lineinfo", f"-I{HERE / 'cuda'}", f"-I{HERE}"]
    names = []
    for n, source in enumerate(units(record(folder, seed, every))):
        path = folder / f"unit{n}.cu"
        path.write_text(to_cuda(source).replace("TABLE", f"table{n}"))
        names.append(path)
    listed = ", ".join(f"table{n}" for n in range(len(names)))
    tables = [f"extern const msl::Kernel table{n}[];" for n in range(len(names))]
    sizes = [path.read_text().count("void launch") for path in names]
    tables += [
        "extern const msl::Kernel* const kTables[];",
        "extern const int kTableSizes[]; extern const int kTableCount;",
        f"const msl::Kernel* const kTables[] = {{ {listed} }};",
        f"const int kTableSizes[] = {{ {', '.join(map(str, sizes))} }};",
        f"const int kTableCount = {len(names)};",
    ]
    (folder / "tables.cu").write_text('#include "metal_stdlib"\n' + "\n".join(tables) + "\n")

    def compile_one(path: Path) -> str:
        target = folder / f"{path.stem}.o"
        start = time.monotonic()
        done = subprocess.run(
            [compiler, *flags, "-x", "cu", "-c", str(path), "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CompileError(done.stdout + done.stderr)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
        return str(target)

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(
            pool.map(compile_one, [HERE / "cuda" / "replay.cu", folder / "tables.cu", *names])
        )
    command = [compiler, f"-arch={arch}", *objects, "-o", str(folder / "replay")]
    subprocess.run(command, check=True)
    for path in folder.glob("*.o"):
        path.unlink()
    print(f"{folder / 'replay'}: {sum(sizes)} kernels for {arch}")


def run(folder: Path, sanitize: bool) -> int:
    """Replays on the GPU of this machine; 0 if every byte is right and no tool complains."""
    replay, calls = str(folder / "replay"), str(folder / "calls.bin")
    commands = [[replay, calls, "20"]]
    if sanitize and shutil.which("compute-sanitizer") is None:
        print("--sanitize needs compute-sanitizer on PATH", file=sys.stderr)
        return 2
    if sanitize:
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            commands.append(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", replay, calls, "1"]
            )
    worst = 0
    for command in commands:
        start = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        print(f"{' '.join(command[:3])}: exit {code}, {time.monotonic() - start:.1f} s", flush=True)
        worst = max(worst, abs(code))
    return worst


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every case of the doctor, not a subset")
    parser.add_argument("--arch", default="native")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", "2")))
    parser.add_argument("--sanitize", action="store_true", help="also under compute-sanitizer")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000_007)
    args = parser.parse_args()
    if args.what == "build":
        try:
            build(args.folder, args.arch, args.seed, args.all, args.jobs)
        except CompileError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    return run(args.folder, args.sanitize)


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints, arena, streaming and conversion against what they must cost, and against peers.

    python -m benchmarks.memory all     --dir DIR       every part below; DIR needs 12 GiB
    python -m benchmarks.memory arena
    python -m benchmarks.memory read    --dir DIR [--size 2] [--threads 2]
    python -m benchmarks.memory convert --dir DIR [--size 8] [--budget 512MiB]
    python -m benchmarks.memory stream  --dir DIR [--device cuda]
    python -m benchmarks.memory --table                 only write the table again

Sizes are in GiB; the files in DIR are removed at the end. What is measured is in
:mod:`benchmarks.memory_probes`, each measurement in a process of its own. Every part adds its
section to ``benchmarks/results/memory.json``, and docs/memory.md gets its table from there. File
pages are dropped from the page cache before cold runs (``posix_fadvise``). fastsafetensors and
safetensors are compared where they are installed.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from benchmarks import memory_table
from benchmarks.memory_stream import STACKS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "memory.json"
#: Times that a measurement is repeated; the best counts.
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", *PARTS))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", type=float, help="GiB of weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", default="512MiB")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of `stream`")
    parser.add_argument("--table", action="store_true", help="write the table into docs/memory.md")
    args = parser.parse_args()
    if args.part is None and not args.table:
        parser.error("give a part, or --table")
    torch.set_num_threads(args.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in PARTS if args.part == "all" else [args.part] if args.part else []:
        args.dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="mkrs-bench-") as folder:
            result = PARTS[part](Path(folder), args)
        result["torch"] = torch.__version__
        result["machine"] = machine()
        key = f"{part}_{args.device}" if part == "stream" and args.device != "cpu" else part
        result["command"] = f"python -m benchmarks.memory {part}" + (
            f" --device {args.device}" if key != part else ""
        )
        results[key] = result
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({key: result}, indent=1), flush=True)
    memory_table.write(results, ROOT / "docs/memory.md")


def machine() -> str:
    """The processor's name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family', '?')} "
        f"model {facts.get('model', '?')}), {text.count('processor')} cores"
    )


def probe(name: str, *arguments: object, threads: int = 2) -> Any:
    """Run one of the probes in a fresh process and return what it found."""
    command = [sys.executable, "-m", "benchmarks.memory_probes", name, *map(str, arguments)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:] or done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def best(probes: Mapping[str, Callable[[], Any]], key: str) -> dict[str, Any]:
    """Of each probe the repetition with the smallest ``key``; they take turns."""
    found: dict[str, list[Any]] = {name: [] for name in probes}
    for _ in range(REPEATS):
        for name, run in probes.items():
            found[name].append(run())
    result = {}
    for name, runs in found.items():
        good = [run for run in runs if key in run]
        result[name] = min(good, key=lambda run: run[key]) if good else runs[0]
    return result


def arena(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds of an allocate/free pair, in C++ and from Python."""
    stress = compiled(folder, ROOT / "tests/memory/arena_stress.cpp")
    lines = run(stress, "time")
    keys = ("arena", "malloc", "arena_written", "malloc_written")
    rows = [list(map(int, line.split())) for line in lines]
    cpp = {str(row[0]): dict(zip(keys, row[1:], strict=True)) for row in rows}
    tensors = [
        list(map(int, line.split()))
        for line in run(compiled(folder, ROOT / "benchmarks/arena_tensors.cpp", torch_too=True))
    ]
    checked = subprocess.run(
        [str(stress), "check", "4", "1000000", "5"], capture_output=True, text=True
    )
    mixed = {name: partial(probe, "arena_mixed", name) for name in ("arena", "torch")}
    return {
        "ns_cpp": cpp,
        "ns_cpp_tensor": {str(size): {"arena": a, "torch": t} for size, a, t in tensors},
        "ns_python": probe("arena"),
        "mixed": best(mixed, "us"),
        "million_cycles_4_threads": checked.stdout.strip() or checked.stderr.strip(),
    }


def compiled(folder: Path, source: Path, *, torch_too: bool = False) -> Path:
    """A program of this source and the arena."""
    program = folder / source.stem
    command = ["c++", "-O2", "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    command += [str(source), str(ROOT / "csrc/memory/arena.cpp")]
    if torch_too:
        for path in cpp_extension.include_paths():
            command += ["-isystem", path]
        for path in cpp_extension.library_paths():
            command += [f"-L{path}", f"-Wl,-rpath,{path}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return program


def run(program: Path, *arguments: str) -> list[str]:
    """The lines that a program writes."""
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def read(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Open a checkpoint of 300 tensors and read every tensor once, warm page cache."""
    path, pickled = folder / "model.safetensors", folder / "model.pt"
    size = args.size or 2
    probe("write", path, size, 300)
    probe("write_torch", path, pickled)
    readers = {
        "raw": partial(probe, "read_raw", path),
        "mkrs_pread": partial(probe, "read_mkrs", path),
        "mkrs_mmap_sum": partial(probe, "read_mkrs_mmap", path),
        "safetensors_mmap_sum": partial(probe, "read_safetensors_mmap", path),
        "safetensors_mmap_copy": partial(probe, "read_safetensors_mmap_copy", path),
        "safetensors_pread": partial(probe, "read_safetensors_pread", path),
        "torch_load": partial(probe, "read_torch", pickled),
        "fastsafetensors": partial(probe, "read_fast", path),
    }
    for file in (path, pickled):
        probe("cache", file)
    result: dict[str, Any] = {"gib": size, "threads": args.threads}
    result["open_ms"] = best({"": partial(probe, "open", path)}, "ms")[""]
    result["slices"] = probe("slices", path)
    result.update(best(readers, "cpu_s"))
    return result


def convert(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize a bf16 checkpoint to 4 bits; NumPy and plain copying do the same work beside it."""
    size = args.size or 8
    count = max(1, round(size * 4))
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    result: dict[str, Any] = {"gib": size, "budget": args.budget, "tensors": count}

    def compare(state: str, numpy_bytes: int) -> dict[str, Any]:
        found = {"mkrs": probe("convert", source, target, args.budget, state)}
        out = target.stat().st_size if target.exists() else 0
        target.unlink(missing_ok=True)
        found["copy"] = probe("copy", source, target, out, state)
        target.unlink(missing_ok=True)
        found["numpy"] = probe("numpy", source, target, numpy_bytes, state)
        target.unlink(missing_ok=True)
        rates = {name: one.get("gb_s") for name, one in found.items()}
        if all(rates.values()):
            found["over_copy"] = round(rates["copy"] / rates["mkrs"], 3)
            found["over_numpy"] = round(rates["mkrs"] / rates["numpy"], 2)
            work = found["numpy"]["cpu_s_per_gb"] / found["mkrs"]["cpu_s_per_gb"]
            found["numpy_over_cpu"] = round(work, 2)
        return found

    probe("write", source, size, count)  # tensors of 256 MiB
    result["cold"] = compare("cold", 1 << 28)
    source.unlink()
    # Without the disk: the source in the page cache, the target in memory.
    memory = Path("/dev/shm")
    probe("write", source, 1, 4)
    with tempfile.TemporaryDirectory(
        dir=memory if memory.is_dir() else folder, prefix="mkrs-bench-"
    ) as shm:
        target = Path(shm) / "target.safetensors"
        result["warm"] = min((compare("warm", 1 << 28) for _ in range(2)), key=_wall)
    return result


def _wall(found: dict[str, Any]) -> float:
    seconds: float = found["mkrs"].get("wall_s", float("inf"))
    return seconds


def stream(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Decode one token at a time through layers at 4 bits, four times the budget."""
    path = folder / "model.safetensors"
    probe("write_model", path, args.device)
    result: dict[str, Any] = {**STACKS[args.device]._asdict(), "threads": args.threads}
    if args.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        for state in ("host", "file"):
            result[state] = probe("stream_cuda", path, state, threads=args.threads)
        return result
    for state in ("warm", "cold"):
        result[state] = probe("stream", path, state, threads=1)
    result["threads"] = 1
    return result


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "arena": arena,
    "read": read,
    "convert": convert,
    "stream": stream,
}

if __name__ == "__main__":
    main()

"""Speed and error of quantized linear layers against every peer that is installed.

``python -m benchmarks.compare --device cpu`` measures the machine's limits and all contenders in
one run and writes ``benchmarks/results/cpu.json``; ``python -m benchmarks.report`` turns that into
docs/performance.md. ``--device cuda`` hands over to ``benchmarks.compare_cuda``. Weights rotate
over copies of more than eight times the last cache ("cold"); contenders take turns, so that noise
of a shared machine falls on all of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_torch import ops
from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, gguf_unpack
from mergekit_torch.ops.gguf_unpack import reference as gguf_reference

from . import limits
from .peers_cpu import GROUP, READING, Contender, Problem, contenders, reading_alone

RESULTS = Path(__file__).with_name("results")
LAYERS = {"mlp": (11008, 4096), "attention": (4096, 4096), "small": (576, 576)}
HOT = "cached"
LAYERS[HOT] = (384, 4096)  # 0.9 MB at 4 bits
INPUT_ROWS = (1, 4, 8, 32, 128, 512)


def spread(seconds: list[float]) -> dict[str, float]:
    """Minimum, median and 90th percentile."""
    ordered = sorted(seconds)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        "calls": len(ordered),
    }


def take_turns(
    runs: list[Callable[[int], Any]], seconds: float, per_turn: int = 4
) -> list[list[float]]:
    """Times of each run: turns of a few calls each until everyone had ``seconds``, at least two."""
    times: list[list[float]] = [[] for _ in runs]
    counters = [0] * len(runs)
    turn = 0
    spent = [0.0] * len(runs)
    while turn < 2 or min(spent) < seconds:
        for r, run in enumerate(runs):
            if turn >= 2 and spent[r] >= seconds:
                continue
            run(counters[r])  # wakes this library's threads; not counted
            counters[r] += 1
            calls = per_turn if spent[r] < 10 * seconds else 1
            for _ in range(calls):
                start = time.perf_counter()
                run(counters[r])
                elapsed = time.perf_counter() - start
                counters[r] += 1
                times[r].append(elapsed)
                spent[r] += elapsed
        turn += 1
    return times


def matmul_case(
    layer: str, m: int, bits: int, threads: int, cold: int, seconds: float
) -> dict[str, Any]:
    """One layer, one input height, all contenders."""
    n, k = LAYERS[layer]
    problem = Problem(n, k, m, bits)
    torch.set_num_threads(threads)
    built: list[Contender] = []
    skipped: dict[str, str] = {}
    for item in contenders(problem, cold, threads):
        if isinstance(item, tuple):
            skipped[item[0]] = item[1]
        else:
            built.append(item)
    expected = problem.expected()
    largest = expected.abs().max()
    errors = []
    for c in built:
        got = c.run(0)[:, : expected.shape[1]].double()
        errors.append(float((got - expected).abs().max() / largest))
    runs = [c.run for c in built]
    if m == 1:
        size = next(c.weight_bytes for c in built if c.ours)
        runs.append(reading_alone(size, cold, threads).run)
    times = take_turns(runs, seconds)
    rows = []
    for c, error, measured in zip(built, errors, times[: len(built)], strict=True):
        stats = spread(measured)
        best = stats["min"]
        rows.append(
            {
                "name": c.name,
                "arithmetic": c.arithmetic,
                "bits": c.bits,
                "ours": c.ours,
                "seconds": stats,
                "gbps": c.weight_bytes / best / 1e9,
                "gflops": 2 * m * n * k / best / 1e9,
                "error": error,
            }
        )
        print(
            f"  {c.name:22} {best * 1e3:9.3f} ms  {rows[-1]['gbps']:6.1f} GB/s "
            f"{rows[-1]['gflops']:7.1f} GFLOP/s  error {error:.1e}",
            flush=True,
        )
    case = {"layer": layer, "n": n, "k": k, "m": m, "bits": bits, "threads": threads}
    if m == 1:
        case["read_gbps"] = size / min(times[-1]) / 1e9
        print(f"  {READING:22} {min(times[-1]) * 1e3:9.3f} ms  {case['read_gbps']:6.1f} GB/s")
    return {**case, "contenders": rows, "skipped": skipped}


def numpy_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Affine int4, group 64, in plain NumPy: what one would write by hand."""
    g = w.reshape(w.shape[0], -1, GROUP)
    low = g.min(-1, keepdims=True)
    scale = (g.max(-1, keepdims=True) - low) / 15
    q = np.clip(np.rint((g - low) / np.where(scale == 0, 1, scale)), 0, 15).astype(np.uint8)
    q = q.reshape(w.shape)
    return q[:, ::2] | (q[:, 1::2] << 4), scale[..., 0].astype(np.float16), low[..., 0]


def numpy_dequantize(
    codes: np.ndarray, scale: np.ndarray, offset: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """The inverse of :func:`numpy_quantize`."""
    q = np.empty((codes.shape[0], codes.shape[1] * 2), np.uint8)
    q[:, ::2], q[:, 1::2] = codes & 15, codes >> 4
    g = q.reshape(codes.shape[0], -1, GROUP)
    factor = scale[..., None].astype(np.float32)
    if out is None:
        return (g.astype(np.float32) * factor + offset[..., None]).reshape(q.shape)
    target = out.reshape(g.shape)
    np.multiply(g, factor, out=target, dtype=np.float32)
    target += offset[..., None]
    return out


def once(call: Callable[[], Any]) -> Callable[[int], Any]:
    """A call that does not care whose turn it is."""
    return lambda i: call()


def storage_cases(threads: int, seconds: float) -> list[dict[str, Any]]:
    """Ops that store, fetch and sum up weights of the large layer, against NumPy or torch."""
    n, k = LAYERS["mlp"]
    torch.set_num_threads(threads)
    w = torch.randn(n, k)
    codes, scale, offset = ops.quantize(w, 4, GROUP, "affine")
    wn = w.numpy()
    parts = numpy_quantize(wn)
    code_bytes = codes.numel() + 4 * scale.numel()
    form: dict[str, Any] = {"bits": 4, "group_size": GROUP, "in_features": k}
    tokens = torch.randint(0, n, (4096,))
    dense = torch.empty_like(w)

    def transposed(grad: torch.Tensor, i: int) -> torch.Tensor:
        return ops.dequant_matmul_t(grad, codes, scale, None, offset, **form)

    moved = 4 * w.numel() + code_bytes
    runs: list[tuple[str, str, int, Callable[[int], Any]]] = [
        ("quantize", "mkrs", moved, lambda i: ops.quantize(w, 4, GROUP, "affine")),
        ("quantize", "NumPy", moved, lambda i: numpy_quantize(wn)),
        (
            "dequantize",
            "mkrs",
            moved,
            lambda i: ops.dequantize(codes, scale, None, offset, **form, dtype=torch.float32),
        ),
        ("dequantize", "NumPy", moved, lambda i: numpy_dequantize(*parts)),
        (
            "dequantize(out=)",
            "mkrs",
            moved,
            lambda i: ops.dequantize(codes, scale, None, offset, **form, out=dense),
        ),
        (
            "dequantize(out=)",
            "NumPy",
            moved,
            lambda i: numpy_dequantize(*parts, out=dense.numpy()),
        ),
        *(
            (
                f"dequant_matmul_t, {m} rows",
                "mkrs",
                code_bytes,
                functools.partial(transposed, torch.randn(m, n)),
            )
            for m in (1, 8, 64)
        ),
        (
            "dequant_embedding, 4096 rows",
            "mkrs",
            4 * 4096 * k + 4096 * code_bytes // n,
            lambda i: ops.dequant_embedding(
                tokens, codes, scale, None, offset, **form, dtype=torch.float32
            ),
        ),
        (
            "sum",
            "mkrs",
            code_bytes,
            lambda i: ops.dequant_reduce(codes, scale, None, offset, **form, reduction="sum"),
        ),
        (
            "abs_max",
            "mkrs",
            code_bytes,
            lambda i: ops.dequant_reduce(codes, scale, None, offset, **form, reduction="abs_max"),
        ),
        ("copy into fresh memory", "torch", 8 * w.numel(), lambda i: w.clone()),
    ]
    for number in (3, 8, 12, 14):
        layout = GGUF_LAYOUTS[number]
        blocks = torch.randint(0, 256, (n, k // layout.block * layout.block_bytes)).byte()
        native = sum(t.nbytes for t in gguf_unpack(blocks, number, n, k))
        for who, unpack in (("mkrs", gguf_unpack), ("plain torch", gguf_reference)):
            call = functools.partial(unpack, blocks, number, n, k)
            runs.append((f"{layout.name} to native", who, blocks.nbytes + native, once(call)))
    rows = []
    for (what, who, size, _), times in zip(
        runs, take_turns([r[3] for r in runs], seconds, 2), strict=True
    ):
        stats = spread(times)
        rows.append(
            {"op": what, "name": who, "threads": threads, "seconds": stats}
            | {"gbps": size / stats["min"] / 1e9}
        )
        print(f"  {what:28} {who:11} {stats['min'] * 1e3:9.2f} ms {rows[-1]['gbps']:6.2f} GB/s")
    return rows


def call_cost(threads: int) -> dict[str, dict[str, float]]:
    """Microseconds of one call on hot small layers, from Python, in inference mode."""
    torch.set_num_threads(threads)
    result = {}
    for size in (64, 576):
        x = torch.randn(1, size)
        codes, scale, offset = ops.quantize(torch.randn(size, size), 4, GROUP, "affine")
        dense = torch.randn(size, size)
        calls: dict[str, Callable[[], Any]] = {
            f"mkrs op {size}": functools.partial(
                torch.ops.mkrs.dequant_matmul, x, codes, scale, None, offset, None, 4, GROUP
            ),
            f"torch dense f32 {size}": functools.partial(torch.nn.functional.linear, x, dense),
        }
        for name, call in calls.items():
            times = []
            with torch.inference_mode():
                for _ in range(3000):
                    start = time.perf_counter_ns()
                    call()
                    times.append((time.perf_counter_ns() - start) / 1e3)
            result[name] = {"min": min(times), "median": statistics.median(times)}
            print(f"  {name:24} {min(times):6.1f} us (median {result[name]['median']:.1f})")
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=["mlp", "attention"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(INPUT_ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=0.25, help="per contender and case")
    parser.add_argument("--hot", action="store_true", help="a layer that stays in the cache")
    parser.add_argument("--output", type=Path, help="default: cpu.json, cpu-hot.json")
    given = sys.argv[1:] if argv is None else argv
    if parser.parse_known_args(given)[0].device == "cuda":
        from . import compare_cuda

        return compare_cuda.main(given)
    args = parser.parse_args(given)
    most = torch.get_num_threads()
    threads = args.threads or ([1] if args.hot else sorted({1, most}))
    cold = 0 if args.hot else 8 * limits.last_cache_bytes()
    output = args.output or RESULTS / ("cpu-hot.json" if args.hot else "cpu.json")
    report: dict[str, Any] = {
        "command": "python -m benchmarks.compare " + " ".join(sys.argv[1:]),
        "machine": {
            "cpu": limits.cpu_name(),
            "threads": most,
            "last_cache_bytes": limits.last_cache_bytes(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "limits": limits.measure(most),
        "cases": [],
        "storage": [],
        "calls": {},
    }
    print("limits:", json.dumps(report["limits"]), flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    for count in threads:
        todo = [(layer, m, 4) for layer in args.layers for m in args.rows]
        todo += [("mlp", m, bits) for bits in (8, 2) for m in args.rows if m in (1, 8, 512)]
        if args.hot:
            todo = [(HOT, m, bits) for bits in (4, 8, 2) for m in args.rows if m <= 128]
        for layer, m, bits in todo:
            print(f"{layer} {LAYERS[layer]} M={m}, {bits} bits, {count} threads", flush=True)
            report["cases"].append(matmul_case(layer, m, bits, count, cold, args.seconds))
        if args.hot:
            continue
        print(f"storage, {count} threads", flush=True)
        report["storage"] += storage_cases(count, args.seconds)
        report["calls"][str(count)] = call_cost(count)
    # Again at the end: a limit that moved says that the machine was not quiet.
    report["limits_after"] = limits.measure(most)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print("wrote", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""CUDA timings against what the same GPU does in the same run.

``python -m benchmarks.compare --device cuda --output benchmarks/results/cuda-h100.json`` times
every op by replaying CUDA graphs over copies of the weights that together exceed the last cache,
next to

* a kernel that only reads the same number of cold bytes (the floor of decode),
* ``F.linear`` on dense bf16 weights (cuBLAS), and
* ``torch._weight_int4pack_mm``.

Microseconds are per call; the minimum and the median of the replays are kept. ``python
-m benchmarks.report benchmarks/results/cuda-h100.json`` turns them into docs/performance-cuda.md.
"""

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, gguf_unpack

RESULTS = Path(__file__).with_name("results")
ROTATE_BYTES = 400 << 20  # several times any L2
REPLAYS = 15

READ_SOURCE = r"""
extern "C" __global__ void read_bytes(const uint4* data, long long count, unsigned int* sink) {
  // Four independent 16-byte loads a step.
  const long long stride = (long long)gridDim.x * blockDim.x;
  unsigned int sum = 0;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldg(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) {
    const uint4 v = __ldg(data + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}
"""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    min: float
    median: float


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One round of ``calls`` as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def time_graphs(*contenders: Sequence[Callable[[], object]]) -> list[Timing]:
    """Time one round of each contender's calls; the results are per call.

    Contenders take turns, so that the clocks, which follow power and heat, are the same for all.
    """
    graphs = [capture(calls) for calls in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs * 3:
        graph.replay()
    for _ in range(REPLAYS):
        for graph, calls, mine in zip(graphs, contenders, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return [Timing(min(mine), statistics.median(mine)) for mine in times]


def time_graph(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time one round of ``calls`` in a graph; the result is per call."""
    return time_graphs(calls)[0]


@dataclass(frozen=True)
class Weight:
    """Components of a random affine weight."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    offset: torch.Tensor | None
    bits: int
    group_size: int

    @property
    def bytes(self) -> int:
        """Bytes a product has to read."""
        parts = [self.codes, self.scale, self.zero_point, self.offset]
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[-1] * 8 // self.bits

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T``."""
        parts = (self.codes, self.scale, self.zero_point, self.offset)
        return torch.ops.mkrs.dequant_matmul(x, *parts, None, self.bits, self.group_size)

    def matmul_t(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W``."""
        parts = (self.codes, self.scale, self.zero_point, self.offset)
        return torch.ops.mkrs.dequant_matmul_t(
            x, *parts, self.bits, self.group_size, self.in_features
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """W."""
        parts = (self.codes, self.scale, self.zero_point, self.offset)
        return torch.ops.mkrs.dequantize(
            *parts, self.bits, self.group_size, self.in_features, dtype
        )


def random_weight(n: int, k: int, bits: int, group_size: int = 64) -> Weight:
    groups = -(-k // group_size)
    middle = 2.0 ** (bits - 1)
    scale = (torch.rand(n, groups, device="cuda") + 0.5) / middle / k**0.5
    offset = -scale * (middle + torch.rand(n, groups, device="cuda") - 0.5)
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device="cuda")
    return Weight(codes, scale.half(), None, offset.half(), bits, group_size)


def copies(bytes_each: int) -> int:
    return max(3, min(64, -(-ROTATE_BYTES // bytes_each)))


class Bench:
    """Collects rows and prints them as they come."""

    def __init__(self, path: Path, kept: Sequence[dict[str, Any]] = ()) -> None:
        self.path = path
        self.environment = environment()
        self.rows = {(row["op"], row["shape"], row["m"]): row for row in kept}
        self.read_kernel = torch.cuda._compile_kernel(READ_SOURCE, "read_bytes")
        self.reads: dict[int, Timing] = {}

    def add(self, op: str, shape: str, m: int, timing: Timing, **extra: Any) -> None:
        row = {
            "op": op,
            "shape": shape,
            "m": m,
            "us_min": round(timing.min, 2),
            "us_median": round(timing.median, 2),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in extra.items()},
        }
        self.rows[op, shape, m] = row
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        # After every row: a run that is cut off keeps what it has.
        rows = list(self.rows.values())
        document = {"environment": self.environment, "skipped": skipped(), "rows": rows}
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    def read(self, size: int) -> Timing:
        """The floor: a kernel that reads ``size`` cold bytes and does nothing else."""
        if size not in self.reads:
            buffers = [
                torch.randint(0, 255, (size // 16, 16), dtype=torch.uint8, device="cuda")
                for _ in range(copies(size))
            ]
            sink = torch.zeros(1, dtype=torch.int32, device="cuda")
            units = torch.cuda.get_device_properties(0).multi_processor_count
            best: Timing | None = None
            for blocks, threads in ((1, 1024), (2, 512), (2, 1024), (4, 512), (8, 256)):

                def call(b: torch.Tensor, blocks: int = blocks, threads: int = threads) -> None:
                    self.read_kernel(
                        grid=(units * blocks, 1, 1),
                        block=(threads, 1, 1),
                        args=(b, size // 16, sink),
                    )

                timing = time_graph([lambda b=b: call(b) for b in buffers])  # type: ignore[misc]
                if best is None or timing.median < best.median:
                    best = timing
            assert best is not None
            self.reads[size] = best
            self.add("read", f"{size / 1e6:.1f} MB", 0, best, tb_s=size / best.median / 1e6)
        return self.reads[size]

    def decode(
        self, n: int, k: int, bits: int, ms: Sequence[int], dtype: torch.dtype, peers: bool
    ) -> None:
        first = random_weight(n, k, bits)
        weights = [first] + [random_weight(n, k, bits) for _ in range(copies(first.bytes) - 1)]
        floor = self.read(first.bytes // 16 * 16)
        exact = first.dequantize(torch.float32).double()
        shape = f"{n}x{k} {bits}bit"
        name = str(dtype).removeprefix("torch.")
        for m in ms:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            expected = x.double() @ exact.T
            error = ((first.matmul(x).double() - expected).norm() / expected.norm()).item()
            dense = F.linear(x, exact.to(dtype))
            dense_error = ((dense.double() - expected).norm() / expected.norm()).item()
            timing = time_graph([lambda w=w, x=x: w.matmul(x) for w in weights])  # type: ignore[misc]
            self.add(
                f"dequant_matmul {name}",
                shape,
                m,
                timing,
                of_read=floor.median / timing.median,
                error=f"{error:.1e}",
                dense_error=f"{dense_error:.1e}",
            )
        if peers and bits == 4:
            self.tinygemm(first, [m for m in ms if m <= 16], floor)

    def tinygemm(self, w: Weight, ms: Sequence[int], floor: Timing) -> None:
        n, k = w.codes.shape[0], w.in_features
        packed = [
            torch._convert_weight_to_int4pack(w.codes, 8) for _ in range(copies(w.codes.numel()))
        ]
        zeros = torch.randn(k // w.group_size, n, 2, device="cuda", dtype=torch.bfloat16)
        params = [zeros.clone() for _ in packed]
        for m in ms:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            timing = time_graph(
                [
                    lambda p=p, z=z, x=x: torch._weight_int4pack_mm(x, p, w.group_size, z)  # type: ignore[misc]
                    for p, z in zip(packed, params, strict=True)
                ]
            )
            self.add(
                "torch _weight_int4pack_mm",
                f"{n}x{k} 4bit",
                m,
                timing,
                of_read=floor.median / timing.median,
            )

    def large(self, n: int, k: int, bits: int, ms: Sequence[int], transposed: bool) -> None:
        first = random_weight(n, k, bits)
        dense = [first.dequantize(torch.bfloat16) for _ in range(4)]
        weights = [first] + [random_weight(n, k, bits) for _ in range(3)]
        exact = first.dequantize(torch.float32).double()
        op = "dequant_matmul_t" if transposed else "dequant_matmul"
        floor = self.read(first.bytes // 16 * 16) if 1 in ms else None
        for m in ms:
            x = torch.randn(m, n if transposed else k, device="cuda", dtype=torch.bfloat16)
            rows = x[:256].double()
            expected = rows @ exact if transposed else rows @ exact.T
            run = Weight.matmul_t if transposed else Weight.matmul
            product = torch.matmul if transposed else F.linear
            error = ((run(first, x)[:256].double() - expected).norm() / expected.norm()).item()
            best = (product(x, dense[0])[:256].double() - expected).norm() / expected.norm()
            count = 4 if m >= 256 else 1
            repeated = weights * (1 if count == 4 else 4)
            reference, timing = time_graphs(
                [lambda d=d, x=x, product=product: product(x, d) for d in dense],  # type: ignore[misc]
                [lambda w=w, x=x, run=run: run(w, x) for w in repeated],  # type: ignore[misc]
            )
            extra: dict[str, Any] = (
                {} if floor is None else {"of_read": floor.median / timing.median}
            )
            self.add(
                f"{op} bfloat16",
                f"{n}x{k} {bits}bit",
                m,
                timing,
                dense_us=reference.median,
                of_dense=reference.median / timing.median,
                tflops=2e-6 * m * n * k / timing.median,
                error=f"{error:.1e}",
                dense_error=f"{best.item():.1e}",
                **extra,
            )

    def limits(self) -> None:
        """What the GPU reaches at its best: a gigabyte read, and a large dense product."""
        self.read(1 << 30)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        timing = time_graph([lambda: torch.matmul(a, b)] * 4)
        tflops = 2e-6 * 8192**3 / timing.median
        self.add("matmul bfloat16", "8192x8192x8192", 0, timing, tflops=tflops)

    def conversions(self, n: int, k: int) -> None:
        """Ops that only move and convert, against a copy of as many bytes."""
        source = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        target = torch.empty_like(source[0])
        timing = time_graph([lambda s=s: target.copy_(s) for s in source])  # type: ignore[misc]
        copied = 2 * source[0].numel() * 2
        self.add("copy", f"{n}x{k}", 0, timing, tb_s=copied / timing.median / 1e6)
        per_byte = timing.median / copied

        def add(op: str, what: str, moved: int, calls: Sequence[Callable[[], object]]) -> None:
            timing = time_graph(calls)
            rates = {"tb_s": moved / timing.median / 1e6}
            rates["of_copy"] = per_byte * moved / timing.median
            self.add(op, f"{n}x{k} {what}", 0, timing, **rates)

        for bits in (8, 4, 2):
            weights = [random_weight(n, k, bits) for _ in range(4)]
            moved = weights[0].bytes + n * k * 2
            reading = [functools.partial(w.dequantize, torch.bfloat16) for w in weights]
            add("dequantize", f"{bits}bit", moved, reading)
            quantize = torch.ops.mkrs.quantize
            writing = [functools.partial(quantize, w, bits, 64, "affine") for w in source]
            add("quantize", f"{bits}bit", moved, writing)
        for number, layout in GGUF_LAYOUTS.items():
            row_bytes = k // layout.block * layout.block_bytes
            files = [
                torch.randint(0, 256, (n, row_bytes), dtype=torch.uint8, device="cuda")
                for _ in range(4)
            ]
            moved = n * row_bytes + sum(t.nbytes for t in gguf_unpack(files[0], number, n, k))
            unpacking = [functools.partial(gguf_unpack, file, number, n, k) for file in files]
            add("gguf_unpack", layout.name, moved, unpacking)


def environment() -> dict[str, str]:
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "gpu": smi or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "command": "python -m benchmarks.compare --device cuda",
    }


def skipped() -> dict[str, str]:
    """Peers that are not timed, and why."""
    reasons = {}
    for name in ("gemlite", "bitsandbytes"):
        installed = importlib.util.find_spec(name) is not None
        reasons[name] = "nothing here calls it yet" if installed else "not installed"
    return reasons


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS / "cuda.json")
    parser.add_argument(
        "--sections",
        default="limits,decode,f32,prefill,transposed,convert,peers",
        help="comma-separated parts to run",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="keep the rows of --output that are not measured now (same GPU and versions only)",
    )
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, got a machine or a torch without CUDA")
    sections = arguments.sections.split(",")
    kept: list[dict[str, Any]] = []
    if arguments.merge:
        known = json.loads(arguments.output.read_text())
        if known["environment"] != environment():
            parser.error(
                f"{arguments.output} was measured elsewhere: {known['environment']}, here is "
                f"{environment()}"
            )
        kept = known["rows"]
    bench = Bench(arguments.output, kept)
    up, down, square = (14336, 4096), (4096, 14336), (4096, 4096)
    if "limits" in sections:
        bench.limits()
    if "decode" in sections:
        peers = "peers" in sections
        for n, k in (up, down, square):
            bench.decode(n, k, 4, (1, 2, 4, 8, 16, 32), torch.bfloat16, peers)
        bench.decode(*up, 4, (1, 16), torch.float16, False)
        for bits in (8, 2):
            for n, k in (up, down):
                bench.decode(n, k, bits, (1, 4, 16), torch.bfloat16, False)
        bench.decode(1024, 4096, 4, (1,), torch.bfloat16, False)
    if "f32" in sections:
        bench.decode(*up, 4, (1, 4, 16), torch.float32, False)
    if "prefill" in sections:
        for n, k in (up, down):
            bench.large(n, k, 4, (64, 128, 256, 512, 1024, 2048, 4096), False)
        bench.large(*up, 8, (64, 512, 4096), False)
    if "transposed" in sections:
        for n, k in (up, down):
            bench.large(n, k, 4, (1, 4, 16, 64, 4096), True)
    if "convert" in sections:
        bench.conversions(*up)
    return 0


if __name__ == "__main__":
    sys.exit(main())

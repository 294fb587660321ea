"""What ``mkrs doctor --device`` runs: every op case against the oracle, then timings.

Correctness is judged by :mod:`mergekit_torch.verify`, the same checks that ``MKRS_VERIFY=1`` makes.
Speed is set against what the device gives a plain copy and torch's own dense product, and against
the maker's figure where one is known (:mod:`mergekit_torch.chips`).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import chips, oracle, verify
from .format import BITS, FLOAT_DTYPES, SCHEMES
from .ops.dequant_reduce import REDUCTIONS

_OPS = torch.ops.mkrs
# (N, K): odd rows and columns, K beside and at multiples of groups, several tiles.
_SHAPES = ((33, 100), (40, 576), (5, 1111), (130, 260), (16, 257), (7, 64), (1, 33))
_GROUPS = (16, 32, 64, 128, 256, -1)
# Input rows for each kernel: decode, small batches one by one, tiles of every height, two tiles.
_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 20, 30, 50, 70)


@dataclass(frozen=True)
class Case:
    """One call of an op on random data."""

    op: str
    regime: str
    bits: int
    scheme: str
    scale_dtype: torch.dtype
    dtype: torch.dtype
    out_features: int
    in_features: int
    group_size: int
    aligned: bool
    rows: int = 0
    option: str = ""

    def __str__(self) -> str:
        names = [str(t).removeprefix("torch.") for t in (self.scale_dtype, self.dtype)]
        layout = "" if self.aligned else ", inside a wider weight"
        return (
            f"{self.op} {self.regime}: {self.bits}-bit {self.scheme} g{self.group_size}, "
            f"scales {names[0]}, {names[1]}, [{self.out_features}, {self.in_features}]{layout}"
        )


def _regimes(device_type: str) -> Iterator[tuple[str, str, int, str]]:
    """(op, regime, input rows, option) of everything that is a kernel of its own."""
    for rows in _ROWS:
        yield "dequant_matmul", f"{rows} rows", rows, "exact"
    if device_type == "cpu":
        for rows in (1, 4, 13, 70):
            yield "dequant_matmul", f"{rows} rows, int8", rows, "int8"
    yield "dequant_matmul_many", "3 weights", 2, "exact"
    for rows in _ROWS:
        yield "dequant_matmul_t", f"{rows} rows", rows, ""
    yield "dequantize", "all", 0, ""
    for index in ("int64", "int32"):
        yield "dequant_embedding", index, 9, index
    for reduction in REDUCTIONS:
        yield "dequant_reduce", reduction, 0, reduction
    yield "quantize", "groups", 0, "groups"
    yield "quantize", "whole rows", 0, "rows"


def cases(device_type: str, quick: bool = False) -> list[Case]:
    """The cases of a device: every kernel with every format, scale dtype and dtype.

    Shapes, group sizes and alignment rotate. ``quick`` keeps every kernel with every width and
    scheme, and rotates dtypes too.
    """
    found: list[Case] = []
    dtypes = list(product(FLOAT_DTYPES, FLOAT_DTYPES))
    for op, regime, rows, option in _regimes(device_type):
        for bits, scheme in product(BITS, SCHEMES):
            turn = len(found)
            chosen = [dtypes[(turn * 4 + turn // 9) % 9]] if quick else dtypes
            for scale_dtype, dtype in chosen:
                i = len(found)
                n, k = _SHAPES[i % len(_SHAPES)]
                group = _GROUPS[(i // 2 + i // 7) % len(_GROUPS)]
                if option == "rows":
                    group = -1
                aligned = (i + i // 3) % 2 == 0 or op == "quantize" or group == -1
                found.append(
                    Case(
                        op,
                        regime,
                        bits,
                        scheme,
                        scale_dtype,
                        dtype,
                        n,
                        k,
                        max(1, k) if group == -1 else group,
                        aligned,
                        rows,
                        option,
                    )
                )
    return found


def _weight(case: Case, device: torch.device) -> oracle.Weight:
    """A random weight; one that is not aligned is a view into a wider one, a byte further on."""
    n, k, bits, group = case.out_features, case.in_features, case.bits, case.group_size
    if case.aligned:
        return oracle.random_weight(n, k, bits, group, case.scheme, case.scale_dtype, device)
    wide = oracle.random_weight(n + 3, k + group, bits, group, case.scheme, case.scale_dtype)
    flat = torch.zeros(wide.codes.numel() + 1, dtype=torch.uint8)
    flat[1:] = wide.codes.flatten()
    codes = flat.to(device)[1:].view(wide.codes.shape)[2:-1, group * bits // 8 :]
    parts = [None if t is None else t.to(device)[2:-1, 1:] for t in wide.components[1:]]
    return oracle.Weight(codes, *parts, bits, group, k)  # type: ignore[call-arg,arg-type]


def _arguments(case: Case, device: torch.device) -> tuple[Any, ...]:
    n, k = case.out_features, case.in_features
    if case.op == "quantize":
        weight = (torch.randn(n, k) * 0.05).to(case.dtype).to(device)
        return weight, case.bits, case.group_size, case.scheme, case.scale_dtype
    w = _weight(case, device)
    kind = (case.bits, case.group_size)
    if case.op == "dequant_matmul":
        x = torch.randn(case.rows, k).to(case.dtype).to(device)
        bias = torch.randn(n).to(case.dtype).to(device) if case.bits != 2 else None
        return x, *w.components, bias, *kind, case.option
    if case.op == "dequant_matmul_many":
        x = torch.randn(case.rows, k).to(case.dtype).to(device)
        made = [w.components, _weight(case, device).components, w.components]
        lists = [[w[i] for w in made if w[i] is not None] for i in range(4)]
        return x, *lists, [], *kind, case.option
    if case.op == "dequant_matmul_t":
        x = torch.randn(case.rows, n).to(case.dtype).to(device)
        return x, *w.components, *kind, k
    if case.op == "dequant_embedding":
        indices = torch.randint(0, n, (case.rows,)).to(getattr(torch, case.option))
        return indices.to(device), *w.components, *kind, k, case.dtype
    if case.op == "dequant_reduce":
        return *w.components, *kind, k, case.option
    return *w.components, *kind, k, case.dtype


@dataclass
class Group:
    """All cases of one op and regime."""

    op: str
    regime: str
    cases: int = 0
    failed: int = 0
    not_judged: int = 0
    worst: float = 0.0  # in units of the bound


@dataclass
class Correctness:
    """What became of the cases."""

    seed: int
    groups: list[Group] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many cases ran."""
        return sum(g.cases for g in self.groups)

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return sum(g.failed for g in self.groups)


def run_cases(
    device: torch.device,
    chosen: Sequence[Case],
    seed: int,
    progress: Callable[[int], object] = lambda n: None,
) -> Correctness:
    """Run cases on fresh random data and judge each by the oracle.

    Args:
        device: where the ops run.
        chosen: from :func:`cases`.
        seed: of the random data; the same seed gives the same data.
        progress: called with 1 after each case.

    A kernel that raises is a failure with its message; nothing is raised from here.
    """
    result = Correctness(seed)
    groups: dict[tuple[str, str], Group] = {}
    with torch.random.fork_rng(devices=[]):
        for i, case in enumerate(chosen):
            group = groups.setdefault((case.op, case.regime), Group(case.op, case.regime))
            torch.manual_seed(seed + i)
            group.cases += 1
            try:
                arguments = _arguments(case, device)
                answer = getattr(_OPS, case.op)(*arguments)
                worst = verify.check_call(case.op, answer, arguments)
                if worst is None:
                    group.not_judged += 1
                else:
                    group.worst = max(group.worst, worst)
            except (RuntimeError, NotImplementedError) as error:
                group.failed += 1
                result.failures.append(f"{case}: {str(error).splitlines()[0]}")
            progress(1)
    result.groups = list(groups.values())
    return result


# ---- speed -------------------------------------------------------------------------------------


@dataclass
class Speed:
    """One timed call."""

    what: str
    seconds: float
    gigabytes: float  # per second: everything read and written once
    of_copy: float  # of what a copy moves
    teraflops: float | None = None
    over_dense: float | None = None  # times as fast as torch's product with the dense weight


@dataclass
class Speeds:
    """All timings of a device."""

    copy: float  # GB/s read and written by a plain copy
    nominal: float | None  # GB/s, as the maker states
    rows: list[Speed] = field(default_factory=list)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps" and not chips.is_simulated(device):
        torch.mps.synchronize()


def time_call(call: Callable[[int], object], device: torch.device, budget: float = 0.3) -> float:
    """Seconds of ``call(i)``, the median of batches that take ``budget`` together.

    ``i`` counts up, so that a caller can rotate over inputs larger than a cache.
    """
    count = 0

    def batch(n: int) -> float:
        nonlocal count
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            call(count)
            count += 1
        _synchronize(device)
        return (time.perf_counter() - start) / n

    batch(2)
    once = batch(1)
    n = max(1, int(budget / 7 / max(once, 1e-6)))
    return statistics.median(batch(n) for _ in range(7))


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s read and written by a plain copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / time_call(lambda i: target.copy_(source), device) / 1e9


def measure(device: torch.device, size: int = 4096, total: int = 1 << 28) -> Speeds:
    """Time the kernels on a ``size`` x ``size`` 4-bit weight in float16 (CPU: float32).

    Args:
        device: where.
        size: rows and columns of the weight.
        total: bytes of weights to rotate over, more than any cache holds.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    copy = copy_bandwidth(device, total // 2)
    speeds = Speeds(copy, chips.nominal_bandwidth(device))

    dense = (torch.randn(size, size) * 0.02).to(dtype).to(device)
    first = _OPS.quantize(dense, 4, 64, "affine", torch.float16)
    each = _bytes(first)
    weights = [tuple(t.clone() for t in first) for _ in range(max(2, min(64, total // each)))]

    def add(
        what: str, call: Callable[[tuple[Tensor, ...]], Tensor], moved: int, flops: int = 0
    ) -> float:
        answer = call(weights[0])
        seconds = time_call(lambda i: call(weights[i % len(weights)]), device)
        moved += _bytes([answer])
        rate = moved / seconds / 1e9
        row = Speed(what, seconds, rate, rate / copy)
        if flops:
            row.teraflops = flops / seconds / 1e12
        speeds.rows.append(row)
        return seconds

    for m in (1, 4, 16, 512):
        x = torch.randn(m, size).to(dtype).to(device)
        seconds = add(
            f"dequant_matmul, {m} rows",
            lambda w, x=x: _OPS.dequant_matmul(x, w[0], w[1], None, w[2], None, 4, 64),  # type: ignore[misc]
            each + _bytes([x]),
            2 * m * size * size,
        )
        several = (
            [dense] if m == 512 else [dense.clone() for _ in range(max(2, total // dense.nbytes))]
        )
        plain = time_call(lambda i, x=x, s=several: x @ s[i % len(s)].T, device)  # type: ignore[misc]
        del several
        speeds.rows[-1].over_dense = plain / seconds
    y = torch.randn(1, size).to(dtype).to(device)
    add(
        "dequant_matmul_t, 1 row",
        lambda w: _OPS.dequant_matmul_t(y, w[0], w[1], None, w[2], 4, 64, size),
        each + _bytes([y]),
        2 * size * size,
    )
    add("dequantize", lambda w: _OPS.dequantize(w[0], w[1], None, w[2], 4, 64, size, dtype), each)
    add(
        "dequant_reduce",
        lambda w: _OPS.dequant_reduce(w[0], w[1], None, w[2], 4, 64, size, "sum"),
        each,
    )
    indices = torch.randint(0, size, (512,)).to(device)
    add(
        "dequant_embedding, 512 rows",
        lambda w: _OPS.dequant_embedding(indices, w[0], w[1], None, w[2], 4, 64, size, dtype),
        each * 512 // size,
    )
    add("quantize", lambda w: _OPS.quantize(dense, 4, 64, "affine", None)[0], dense.nbytes)
    return speeds


def as_data(correctness: Correctness, speeds: Speeds | None) -> dict[str, Any]:
    """Both as plain data, for JSON."""
    return {
        "cases": correctness.count,
        "failed": correctness.failed,
        "correctness": asdict(correctness),
        "speed": None if speeds is None else asdict(speeds),
    }

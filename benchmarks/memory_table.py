"""The table "Measured" of docs/memory.md, from ``benchmarks/results/memory.json``."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"


def write(results: dict[str, Any], page: Path) -> None:
    """Put the table between the page's markers.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: must have the markers {BEGIN} and {END}")
    rows: list[tuple[str, ...]] = [
        row for part, lines in _PARTS.items() if part in results for row in lines(results[part])
    ]
    machines = {result["machine"] for result in results.values() if "machine" in result}
    torches = {result["torch"] for result in results.values()}
    table = [
        f"On {'; '.join(sorted(machines))}; torch {', '.join(sorted(torches))}.",
        "",
        "| `python -m benchmarks.memory` | what | result | target |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(table)}\n{END}{after}", encoding="utf-8")


def _arena(r: dict[str, Any]) -> list[tuple[str, ...]]:
    cpp, python, mixed = r["ns_cpp"], r["ns_python"], r["mixed"]
    small, mid, large = str(2 << 20), str(16 << 20), str(64 << 20)
    tensors = [r["ns_cpp_tensor"][size] for size in (small, mid, large)]
    from_python = [python[size] for size in (small, mid, large)]
    return [
        (
            "`arena`",
            "C++: allocate and free a block of 16 MiB / 64 MiB",
            f"{cpp[mid]['arena']} / {cpp[large]['arena']} ns; malloc {cpp[mid]['malloc']} / "
            f"{cpp[large]['malloc']} ns",
            "under 2 µs",
        ),
        (
            "",
            "C++: make a tensor and let go of it, 2 MiB / 16 MiB / 64 MiB",
            f"{' / '.join(str(t['arena']) for t in tensors)} ns; `at::empty_strided` "
            f"{' / '.join(str(t['torch']) for t in tensors)} ns",
            "faster than `torch.empty`",
        ),
        (
            "",
            "`Arena.empty` from Python, 2 MiB / 16 MiB / 64 MiB",
            f"{' / '.join(_us(row['arena']) for row in from_python)}; "
            f"`torch.empty` {' / '.join(_us(row['torch']) for row in from_python)}",
            "faster than `torch.empty`",
        ),
        (
            "",
            "the same with every byte written",
            f"{_us(python[mid]['arena_written'])} / {_us(python[large]['arena_written'])}; "
            f"`torch.empty` {_us(python[mid]['torch_written'])} / "
            f"{_us(python[large]['torch_written'])}",
            "",
        ),
        (
            "",
            "tensors of 14 sizes from 1 to 64 MiB, 8 alive, every page touched",
            f"{mixed['arena']['us']} µs; `torch.empty` {mixed['torch']['us']} µs",
            "faster than `torch.empty`",
        ),
        ("", "10^6 random cycles, 4 threads", r["million_cycles_4_threads"], "waste under 2x"),
    ]


def _us(ns: float) -> str:
    if ns < 1e4:
        return f"{ns / 1e3:.2f} µs"
    return f"{ns / 1e3:.1f} µs" if ns < 1e6 else f"{ns / 1e6:.1f} ms"


def _read(r: dict[str, Any]) -> list[tuple[str, ...]]:
    def cpu(name: str) -> str:
        return f"{r[name]['cpu_s']:.2f}" if "cpu_s" in r[name] else "not run"

    opened, slices = r["open_ms"], r["slices"]
    rows: list[tuple[str, ...]] = [
        (
            f"`read --size {r['gib']:g}`",
            f"open 300 tensors, {r['gib']:g} GiB",
            f"{opened['ms']} ms, the first time {opened['first_ms_cold']} ms; "
            f"{opened['bytes_read'] >> 10} KiB read from the disk",
            "under 5 ms, no data read",
        ),
        (
            "",
            "processor seconds to read every tensor once: `read='pread'`",
            cpu("mkrs_pread"),
            f"plain two-thread read {cpu('raw')} x 1.2",
        ),
        (
            "",
            "safetensors pread / mmap and copy / torch.load / fastsafetensors",
            " / ".join(
                map(
                    cpu,
                    ("safetensors_pread", "safetensors_mmap_copy", "torch_load", "fastsafetensors"),
                )
            ),
            "",
        ),
        (
            "",
            "without a copy, summed in place: `read='mmap'` / safetensors mmap",
            f"{cpu('mkrs_mmap_sum')} / {cpu('safetensors_mmap_sum')}",
            "",
        ),
    ]
    for name in ("rows", "columns"):
        s = slices[name]
        rows.append(
            (
                "",
                f"a slice of {name}: bytes needed / read by pread",
                f"{s['bytes_needed']} / {s['bytes_read']}",
                "its bytes",
            )
        )
    return rows


def _convert(r: dict[str, Any]) -> list[tuple[str, ...]]:
    cold, warm = r["cold"], r["warm"]
    m = cold["mkrs"]
    return [
        (
            f"`convert --size {r['gib']:g} --budget {r['budget']}`",
            f"{r['gib']:g} GiB of bf16 to 4 bits, disk to disk",
            f"{m['wall_s']:.1f} s ({m['gb_s']} GB/s), {cold['over_copy']}x of reading and writing "
            "alone",
            "1.5x",
        ),
        (
            "",
            "peak resident memory, under RLIMIT_DATA = 1 GiB",
            f"{m['peak_mib']} MiB ({m['before_mib']} of them before it starts)",
            "700 MiB",
        ),
        (
            "",
            "NumPy, disk to disk",
            f"{cold['over_numpy']}x slower; processor time {cold['numpy_over_cpu']}x",
            "10x",
        ),
        (
            "",
            "1 GiB from the page cache to memory: NumPy",
            f"{warm['over_numpy']}x slower; processor time {warm['numpy_over_cpu']}x; reading and "
            f"writing alone {1 / warm['over_copy']:.2f}x of the time",
            "10x",
        ),
    ]


def _stream(r: dict[str, Any]) -> list[tuple[str, ...]]:
    warm, cold = r["warm"], r["cold"]
    exact = "yes" if warm["bit_equal"] and cold["bit_equal"] else "NO"
    return [
        (
            "`stream`",
            f"{warm['bytes'] / 1e6:.0f} MB of 4-bit layers, budget a quarter, one thread computes: "
            "page cache / cold file",
            f"{warm['of_reading_rate']:.0%} / {cold['of_reading_rate']:.0%} of the rate of reading",
            "70%",
        ),
        (
            "",
            "page cache: a pass / reading alone, two threads / computing alone, weights in memory",
            f"{warm['pass_s'] * 1e3:.0f} / {warm['reading_s'] * 1e3:.0f} / "
            f"{warm['in_memory_s'] * 1e3:.0f} ms",
            "",
        ),
        (
            "",
            "peak over budget; bit-equal",
            f"{warm['peak'] / warm['budget']:.3f}; {exact}",
            "1.1; yes",
        ),
    ]


def _stream_cuda(r: dict[str, Any]) -> list[tuple[str, ...]]:
    host, file = r["host"], r["file"]
    return [
        (
            "`stream --device cuda`",
            f"{r['gpu']}: {host['bytes'] / 1e9:.1f} GB of 4-bit layers, budget a quarter, weights "
            "in host memory (`host_budget`)",
            f"{host['streamed_gb_s']} of {host['copy_gb_s']} GB/s, {host['of_copy_rate']:.0%}",
            "80%",
        ),
        (
            "",
            "the same, read from the page cache each time",
            f"{file['streamed_gb_s']} GB/s",
            "",
        ),
    ]


_PARTS = {
    "arena": _arena,
    "read": _read,
    "convert": _convert,
    "stream": _stream,
    "stream_cuda": _stream_cuda,
}

"""The tables of README.md and docs/performance.md about the demo's model.

``python -m benchmarks.demo --run`` runs ``mkrs demo`` and writes ``benchmarks/results/demo.json``;
without ``--run`` only the tables are written again from that file.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import limits

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/demo.json"
PAGES = {"README.md": "performance", "docs/performance.md": "demo"}
COMMAND = "python -m benchmarks.demo --run"


def run(threads: int) -> None:
    """Measure and write the result."""
    command = [sys.executable, "-m", "mergekit_torch.cli", "demo", "--cache", str(ROOT / ".cache")]
    command += ["--device", "cpu", "--threads", str(threads), "--json", str(RESULT)]
    subprocess.run(command, check=True, cwd=ROOT)
    report = json.loads(RESULT.read_text())
    report["machine"] = {
        "processor": limits.cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


def text_of(report: dict[str, Any]) -> str:
    """The table in Markdown, with machine and command."""
    q, d = report["quantized"], report["dense"]
    rows = [
        ("file", f"{q['file_bytes'] / 2**20:.1f} MiB", f"{d['file_bytes'] / 2**20:.1f} MiB"),
        ("bits per weight", f"{q['bits_per_weight']:.2f}", f"{d['bits_per_weight']:.2f}"),
        ("open", f"{1e3 * q['open_seconds']:.1f} ms", f"{1e3 * d['open_seconds']:.1f} ms"),
        (
            "time to first token",
            f"{1e3 * q['first_seconds']:.0f} ms",
            f"{1e3 * d['first_seconds']:.0f} ms",
        ),
        ("decode", f"{q['rate']:.1f} tokens/s", f"{d['rate']:.1f} tokens/s"),
        (
            "peak memory of the model",
            f"{q['peak_bytes'] / 2**20:.0f} MiB",
            f"{d['peak_bytes'] / 2**20:.0f} MiB",
        ),
    ]
    lines = [
        "| SmolLM2-135M-Instruct | GGUF Q4_1 weights | the same, dense float32 |",
        "|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machine = report["machine"]
    lines.append("")
    lines.append(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; both "
        f"through transformers' `generate`, greedy tokens identical. Command: `{COMMAND}`."
    )
    return "\n".join(lines)


def main() -> int:
    """Run if asked to, then write the tables."""
    parser = argparse.ArgumentParser(description="Measure the demo and write its tables.")
    parser.add_argument("--run", action="store_true", help="measure first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.run:
        run(args.threads)
    text = text_of(json.loads(RESULT.read_text()))
    for name, mark in PAGES.items():
        page = ROOT / name
        head, _, rest = page.read_text().partition(f"<!-- {mark}:begin -->")
        _, _, tail = rest.partition(f"<!-- {mark}:end -->")
        page.write_text(f"{head}<!-- {mark}:begin -->\n{text}\n<!-- {mark}:end -->{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What this machine gives the kernels: ``python -m mergekit_torch.doctor``.

Prints which instruction-set level the CPU kernels run at and why, threads, caches and thresholds.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import ops
from .version import __version__

_WHY = {
    "generic": "plain C++, nothing newer is supported here",
    "avx2": "AVX2, FMA, F16C and BMI2",
    "avx512": "AVX-512 F, BW, DQ, VL",
    "avx512_vnni": "AVX-512 with VNNI: integer dot products of codes with split activations",
    "neon": "NEON, part of every arm64 processor",
}


def caches() -> dict[str, str]:
    """Cache sizes of the first processor, where the system tells them (Linux)."""
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found[f"L{level} {kind.lower()}"] = size
    return found


def cpu_report() -> dict[str, Any]:
    """What the CPU kernels were given, as plain data.

    Returns:
        ``level``, ``reason``, ``available``, ``thresholds`` of the kernel table; ``threads``,
        ``caches``, ``processor``; versions.

    Raises:
        RuntimeError: MKRS_CPU_ISA names a level that this processor or build lacks.
    """
    info: dict[str, Any] = json.loads(torch.ops.mkrs._cpu_info())
    forced = os.environ.get("MKRS_CPU_ISA")
    reason = _WHY.get(info["level"], "")
    reason = f"forced by MKRS_CPU_ISA; {reason}" if forced else f"the best supported: {reason}"
    return {
        "mergekit_torch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "level": info["level"],
        "reason": reason,
        "available": info["available"],
        "thresholds": info["thresholds"],
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "caches": caches(),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as aligned lines."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "unknown"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"{key:15} {value}")
    return "\n".join(lines)


def main() -> int:
    """Print the report; 1 if the kernels cannot start."""
    try:
        print(format_report(cpu_report()))
    except RuntimeError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    return 0


assert ops  # loads the extension

if __name__ == "__main__":
    sys.exit(main())

"""``mkrs doctor``: what this machine gives the kernels."""

import argparse
import json
from typing import Any

from .common import add_command


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        "tell which kernels run on this machine and why",
        """
mkrs doctor
mkrs doctor --json
MKRS_CPU_ISA=avx2 mkrs doctor
""",
        details="Paste the output into a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from ..doctor import cpu_report, format_report

    report = cpu_report()
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return 0

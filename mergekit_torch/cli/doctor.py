"""``mkrs doctor``: what this machine gives the kernels, and whether they answer rightly."""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import WIDTH, shorten, table
from .common import add_command

if TYPE_CHECKING:
    import torch

    from ..selftest import Correctness, Speeds


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        "tell which kernels run on this machine and whether they are right and fast",
        """
mkrs doctor
mkrs doctor --device mps
mkrs doctor --device cuda --quick --json
MKRS_CPU_ISA=avx2 mkrs doctor --device cpu
""",
        details="With --device every op is run against an independent float64 oracle and timed "
        "against the\nmemory's bandwidth; the exit code is 1 if an answer is wrong. "
        "Paste the output into a bug report.",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="check and time the kernels of mps, cuda, cpu or auto"
    )
    parser.add_argument("--quick", action="store_true", help="a subset of the cases")
    parser.add_argument("--no-speed", action="store_true", help="only check answers")
    parser.add_argument("--seed", type=int, help="of the random data; default: a new one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a kernel is wrong."""
    from ..doctor import cpu_report, format_report

    if args.device is not None:
        return check_device(args)
    report = cpu_report()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(format_report(report))
        print("\nmkrs doctor --device cpu, cuda or mps checks and times the kernels themselves.")
    return 0


def check_device(args: argparse.Namespace) -> int:
    """Run the cases and the timings of one device."""
    from .. import chips, devices, selftest

    device = devices.check_device(args.device)
    simulated = chips.is_simulated(device)
    seed = args.seed if args.seed is not None else int(time.time()) % 1_000_000_007
    chosen = selftest.cases(device.type, args.quick)
    with CaseBar(len(chosen), f"cases on {device.type}") as bar:
        correctness = selftest.run_cases(device, chosen, seed, bar)
    # A simulator's time says nothing about a GPU.
    speeds = None if args.no_speed or simulated else selftest.measure(device)
    machine = describe(device)
    right, mapped = mapped_file(device)
    if mapped:
        machine["mapped file"] = mapped
    code = 0 if right and not correctness.failed else 1
    if args.json:
        data = {"machine": machine, **selftest.as_data(correctness, speeds)}
        print(json.dumps(data, indent=2))
        return code
    print(correctness_table(correctness))
    if speeds is not None:
        print()
        print(speed_table(speeds, "float32" if device.type == "cpu" else "float16"))
    elif simulated:
        print("\nNo timings: this is the simulator of the project's tests, not a GPU.")
    print()
    print(report_block(machine, correctness, speeds))
    verdict = (
        f"{correctness.failed} of {correctness.count} cases are wrong"
        if correctness.failed
        else f"all {correctness.count} cases are right"
    )
    print(f"\n{verdict}" + ("" if right else "; a mapped file is read wrongly"))
    return code


def mapped_file(device: "torch.device") -> tuple[bool, str]:
    """Whether a tensor in a mapped file is right on MPS, and how it got there.

    True and "" where the build has no buffers over mapped files: everywhere but on a Mac.
    """
    import torch

    from ..checkpoint import open_checkpoint, save_checkpoint

    if device.type != "mps" or not hasattr(torch.ops.mkrs, "mps_share"):
        return True, ""
    weight = torch.randn(1000, 1024).half()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mapped.safetensors"
        save_checkpoint({"weight": weight}, path)
        with open_checkpoint(path) as checkpoint:
            try:
                pieces, copied = torch.ops.mkrs.mps_share(checkpoint["weight"])
                right = torch.equal(torch.cat([piece.cpu() for piece in pieces]), weight)
            except RuntimeError as error:
                return False, f"WRONG: {str(error).splitlines()[0]}"
            del pieces
    if not right:
        return False, "WRONG: the tensor over it has other values"
    return True, f"copied: {copied}" if copied else "used in place, right"


class CaseBar:
    """A tqdm bar that counts cases, silent when stderr is not a terminal."""

    def __init__(self, total: int, description: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=description,
            unit="case",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def __enter__(self) -> Callable[[int], object]:
        update: Callable[[int], object] = self._bar.update
        return update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def describe(device: "torch.device") -> dict[str, str]:
    """Versions and the chip, in the order in which they are printed."""
    import torch

    from .. import chips
    from ..doctor import cpu_report
    from ..version import __version__

    system = platform.mac_ver()[0]
    found = {
        "mergekit_torch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"macOS {system}" if system else platform.platform(terse=True),
        "device": device.type,
        "chip": chips.chip_name(device),
    }
    if device.type == "cpu":
        report = cpu_report()
        found["kernels"] = f"{report['level']}, {report['threads']} threads"
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["cuda"] = str(torch.version.cuda)
    if device.type == "mps" and not chips.is_simulated(device):
        found["memory"] = f"{torch.mps.recommended_max_memory() / 2**30:.1f} GiB for the GPU"
    return found


def correctness_table(correctness: "Correctness") -> str:
    """One line an op and regime; the worst error is in units of its bound, 0 is exact."""
    rows = []
    for g in correctness.groups:
        judged = g.cases - g.failed - g.not_judged
        worst = "-" if not judged else "exact" if g.worst == 0 else f"{g.worst:.2f}"
        verdict = "WRONG" if g.failed else "right"
        rows.append((g.op, g.regime, str(g.cases), str(g.failed), worst, verdict))
    return table(("op", "kernel", "cases", "failed", "worst / bound", ""), rows, right=(2, 3, 4))


def speed_table(speeds: "Speeds", dtype: str) -> str:
    """Timings against a copy, the maker's figure and torch's dense product."""
    rows = []
    for r in speeds.rows:
        of_chip = f"{100 * r.gigabytes / speeds.nominal:.0f}%" if speeds.nominal else "-"
        rows.append(
            (
                r.what,
                f"{r.seconds * 1e6:.1f}",
                f"{r.gigabytes:.1f}",
                f"{100 * r.of_copy:.0f}%",
                of_chip,
                "-" if r.teraflops is None else f"{r.teraflops:.2f}",
                "-" if r.over_dense is None else f"{r.over_dense:.2f}x",
            )
        )
    nominal = f", {speeds.nominal:.0f} GB/s by its maker" if speeds.nominal else ""
    head = f"4096 x 4096, 4-bit affine g64, {dtype}; a copy moves {speeds.copy:.1f} GB/s{nominal}\n"
    headers = ("call", "us", "GB/s", "of copy", "of chip", "TFLOP/s", "dense")
    return head + table(headers, rows, right=(1, 2, 3, 4, 5, 6))


def report_block(
    machine: dict[str, str], correctness: "Correctness", speeds: "Speeds | None"
) -> str:
    """What to paste into a bug report."""
    lines = ["--- for a bug report " + "-" * (WIDTH - 21)]
    lines += [f"{key:15} {value}" for key, value in machine.items()]
    lines.append(
        f"{'cases':15} {correctness.count}, wrong {correctness.failed}, seed {correctness.seed}"
    )
    shown = correctness.failures[:20]
    lines += [f"{'wrong':15} {shorten(text, 3 * WIDTH)}" for text in shown]
    if len(correctness.failures) > len(shown):
        lines.append(f"{'':15} and {len(correctness.failures) - len(shown)} more")
    if speeds is not None:
        lines.append(f"{'copy':15} {speeds.copy:.1f} GB/s")
        lines += [
            f"{'speed':15} {r.what}: {r.seconds * 1e6:.1f} us, {r.gigabytes:.1f} GB/s"
            for r in speeds.rows
        ]
    return "\n".join([*lines, "-" * WIDTH])

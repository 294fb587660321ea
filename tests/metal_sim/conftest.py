"""Prints how long each stage of the Metal tests took."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_seconds: dict[str, float] = defaultdict(float)
_tests: dict[str, int] = defaultdict(int)


def pytest_runtest_logreport(report: Any) -> None:
    path = Path(report.nodeid.split("::")[0])
    if path.parent.name == HERE.name:
        _seconds[path.stem] += report.duration
        _tests[path.stem] += report.when == "call"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _seconds:
        return
    terminalreporter.section("Metal stages")
    for name, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{name:24} {_tests[name]:5} tests {seconds:8.1f} s")
    terminalreporter.line(
        f"{'together':24} {sum(_tests.values()):5} tests {sum(_seconds.values()):8.1f} s"
    )

"""What :mod:`benchmarks.memory` measures, each function in a process of its own:

    python -m benchmarks.memory_probes NAME [ARGUMENT ...] --threads N

prints one JSON object. ``NAME`` is a function of one of the modules below without its ``probe_``.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import memory_arena, memory_convert, memory_read, memory_stream

PROBES: dict[str, Callable[..., Any]] = {
    name.removeprefix("probe_"): function
    for module in (memory_arena, memory_read, memory_convert, memory_stream)
    for name, function in vars(module).items()
    if name.startswith("probe_")
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(PROBES[args.probe](*args.arguments)))


if __name__ == "__main__":
    main()

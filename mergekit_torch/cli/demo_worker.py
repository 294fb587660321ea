"""One model measured in a process of its own, so that its peak memory is its own.

``mkrs demo`` starts this with a JSON request in a file and reads the JSON answer from another.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import open_checkpoint
from ..integrations.transformers import load_native
from . import generation


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    # Not ru_maxrss on Linux: a child starts with its parent's.
    peak = _status_bytes("VmHWM")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak if sys.platform == "darwin" else peak * 1024
    return peak


def resident_bytes() -> int:
    """The resident set now (Linux), else the peak so far."""
    now = _status_bytes("VmRSS")
    return peak_bytes() if now is None else now


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Open, load, compute the prompt's logits and generate."""
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    path, device = Path(request["path"]), torch.device(request["device"])
    dtype = generation.DTYPES[request["dtype"]]
    ids = torch.tensor(request["ids"])[None]
    before = resident_bytes()
    started = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        opened = time.perf_counter() - started
        grown = resident_bytes() - before
        nbytes = checkpoint.nbytes
        weights = sum(checkpoint.info(name).numel for name in checkpoint)
        files = [str(file) for file in checkpoint.files]
    started = time.perf_counter()
    model = load_native(path, device=device, dtype=dtype)
    loaded = time.perf_counter() - started
    result = generation.generate(model, ids.to(device), request["max_new_tokens"])
    peak = peak_bytes()
    accelerator = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    with torch.inference_mode():
        logits = model(ids.to(device)).logits[0].float().cpu().numpy()
    np.save(request["logits"], logits)
    return {
        "file_bytes": sum(os.path.getsize(file) for file in files),
        "bits_per_weight": 8 * nbytes / weights,
        "open_seconds": opened,
        "open_bytes": grown,
        "load_seconds": loaded,
        "first_seconds": result.first,
        "rate": result.rate,
        "peak_bytes": peak - before + accelerator,
        "tokens": result.tokens,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    """Read the request, write the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(measure(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a chip should give: memory bandwidth as its maker states it."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# GB/s of unified memory, from Apple's technical specifications of the Macs with each chip. The Max
# chips of the third and fourth generation come with two memory widths; here stands the wider one.
APPLE_BANDWIDTH: dict[str, float] = {
    "Apple M1": 68.25,
    "Apple M1 Pro": 200,
    "Apple M1 Max": 400,
    "Apple M1 Ultra": 800,
    "Apple M2": 100,
    "Apple M2 Pro": 200,
    "Apple M2 Max": 400,
    "Apple M2 Ultra": 800,
    "Apple M3": 100,
    "Apple M3 Pro": 150,
    "Apple M3 Max": 400,
    "Apple M3 Ultra": 819,
    "Apple M4": 120,
    "Apple M4 Pro": 273,
    "Apple M4 Max": 546,
    "Apple M5": 153,
}


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def is_simulated(device: torch.device) -> bool:
    """Whether this is the Metal simulator of the project's tests: ``mps`` without Apple's."""
    return device.type == "mps" and not torch.backends.mps.is_built()


def chip_name(device: torch.device) -> str:
    """The name of the chip that a device computes on."""
    if is_simulated(device):
        return "simulated Metal GPU"
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def nominal_bandwidth(device: torch.device) -> float | None:
    """GB/s that the maker states for a device's memory; None where that is not known."""
    if is_simulated(device):
        return None
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        clock = getattr(properties, "memory_clock_rate", 0)  # kHz, two transfers a clock
        width = getattr(properties, "memory_bus_width", 0)  # bits
        return 2 * clock * 1e3 * width / 8 / 1e9 if clock and width else None
    return APPLE_BANDWIDTH.get(chip_name(device))

"""Which devices the ops of this build run on."""

import platform

import torch

_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS"}


def has_kernels(device_type: str) -> bool:
    """Whether this build of the extension has kernels for a device type (``"mps"``, ...)."""
    key = _KEYS.get(device_type)
    return key is not None and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key("mkrs::dequant_matmul", key)
    )


def best_device() -> torch.device:
    """MPS, then CUDA, then CPU: the first that is present and has kernels in this build."""
    if torch.backends.mps.is_available() and has_kernels("mps"):
        return torch.device("mps")
    if torch.cuda.is_available() and has_kernels("cuda"):
        return torch.device("cuda")
    return torch.device("cpu")


def check_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is :func:`best_device`.

    Raises:
        ValueError: not a device, not present, or without kernels in this build.
    """
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}") from error
    if device.type not in _KEYS:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type == "mps" and not present["mps"] and torch.backends.mps.is_built():
        raise ValueError(
            "device 'mps' must have a Metal GPU and macOS 14 or later, and torch finds none here "
            f"(macOS {platform.mac_ver()[0] or 'of unknown version'}, {platform.machine()}); "
            "everything also runs on the CPU"
        )
    if not present[device.type]:
        raise ValueError(f"device {name!r} must be present, and torch finds none here")
    if not has_kernels(device.type):
        raise ValueError(
            f"device {name!r} must have kernels in this build of mergekit_torch, and has none; "
            "for CUDA rebuild with MKRS_CUDA=1"
        )
    return device

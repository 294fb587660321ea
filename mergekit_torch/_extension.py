"""Loads the compiled extension, which registers ``torch.ops.mkrs.*``."""

from pathlib import Path

_MIN_TORCH = (2, 11)


def load() -> None:
    """Load ``_C.abi3.so`` once.

    Raises:
        ImportError: torch is missing or older than 2.11, or the extension is not built or does not
            load; the message names the next step.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "mergekit_torch needs PyTorch >= 2.11, and torch cannot be imported "
            f"({error}). Install it first: https://pytorch.org/get-started/locally/"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise ImportError(
            f"mergekit_torch needs PyTorch >= 2.11, got {torch.__version__}. "
            "Upgrade torch; the extension itself needs no rebuild."
        )
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        raise ImportError(
            f"mergekit_torch: the compiled extension {library} is missing. Build it in a source "
            "checkout with: pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"mergekit_torch: {library} does not load under torch {torch.__version__}: {error}. "
            "Rebuild it with: pip install --no-build-isolation -e ."
        ) from error

"""The compiled extension; its ops are in ``torch.ops.mkrs``."""

def arena_empty(arena: int, size: tuple[object, ...], dtype: int) -> object:
    """A DLPack capsule of an uninitialized tensor, see ``csrc/memory/arena_python.cpp``."""

"""Running and converting checkpoints that are larger than memory.

:class:`Arena` hands out tensors under a byte budget, :class:`TensorCache` loads the tensors of a
checkpoint into one, and :func:`stream` runs a model from such a cache.
"""

from .arena import Arena, ArenaStats, BudgetError
from .cache import CacheStats, TensorCache
from .stream import StreamedModel, stream

__all__ = [
    "Arena",
    "ArenaStats",
    "BudgetError",
    "CacheStats",
    "StreamedModel",
    "TensorCache",
    "stream",
]

"""Running and converting checkpoints that are larger than memory.

:class:`Arena` hands out tensors under a byte budget, :class:`TensorCache` loads the tensors of a
checkpoint into one, :func:`stream` runs a model from such a cache, and :func:`rewrite_checkpoint`
quantizes, dequantizes and converts checkpoints.
"""

from .arena import Arena, ArenaStats, BudgetError
from .cache import CacheStats, TensorCache
from .convert import rewrite_checkpoint
from .stream import StreamedModel, stream

__all__ = [
    "Arena",
    "ArenaStats",
    "BudgetError",
    "CacheStats",
    "StreamedModel",
    "TensorCache",
    "rewrite_checkpoint",
    "stream",
]

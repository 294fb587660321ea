"""Running and converting checkpoints that are larger than memory.

:class:`Arena` hands out tensors under a byte budget, :class:`TensorCache` loads the tensors of a
checkpoint into one, :func:`stream` runs a model from such a cache, and the functions of
:mod:`mergekit_torch.memory.convert` rewrite checkpoints of any size.
"""

from .arena import Arena, ArenaStats, BudgetError

__all__ = [
    "Arena",
    "ArenaStats",
    "BudgetError",
]

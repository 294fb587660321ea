"""What DTensor does to a QuantizedTensor as it distributes one: scatter and broadcast.

With these, torch's own ``ColwiseParallel`` and ``RowwiseParallel`` split an ``nn.Linear`` whose
weight is a QuantizedTensor: its local part is one again. Slices at a wrong group are refused by the
tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tensor import QuantizedTensor
from ..tensor._registry import implements, unsupported

c10d = torch.ops.c10d


@implements(c10d.broadcast_.default)
def broadcast(tensors: Sequence[Any], *rest: Any, **options: Any) -> Any:
    """All components of the one tensor."""
    return _each(c10d.broadcast_.default, tensors, None, rest, options)


@implements(c10d.scatter_.default)
def scatter(outputs: Sequence[Any], inputs: Sequence[Any], *rest: Any, **options: Any) -> Any:
    """All components of the one tensor and of the list it is taken from."""
    return _each(c10d.scatter_.default, outputs, inputs, rest, options)


def _each(
    op: Callable[..., Any],
    outputs: Sequence[Any],
    inputs: Sequence[Any] | None,
    rest: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    tensors = [*outputs, *(t for row in inputs or () for t in row)]
    if not all(isinstance(tensor, QuantizedTensor) for tensor in tensors) or len(outputs) != 1:
        return unsupported(f"{op} of quantized and dense tensors together")
    work: Any = None
    for name in outputs[0].components:
        if work is not None:
            work.wait()
        lists = [] if inputs is None else [[[getattr(t, name) for t in row] for row in inputs]]
        work = op([getattr(outputs[0], name)], *lists, *rest, **options)[-1]
    return list(outputs), work

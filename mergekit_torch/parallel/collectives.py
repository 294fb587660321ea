"""The collectives of tensor parallelism: torch's functional ones, with the gradients it needs.

Every rank computes the same loss, so a sum over ranks hands its gradient through, and a value that
all ranks share collects the gradients of all. (torch's own gradients of these collectives are those
of one loss per rank, which differ by a factor of the number of ranks.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .partition import Ranges

__all__ = ["gather_columns", "sum_gradients", "sum_ranks"]

_functional = torch.ops._c10d_functional


def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' ``x``; its gradient goes to every rank as it is.

    ``x`` has to be the caller's own: without a gradient the sum may take its memory.
    """
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _SumRanks.apply(x, group)
        return result
    if torch.compiler.is_compiling() or not x.is_contiguous():
        return _all_reduce(x, group)
    # Saves a copy of x, which the functional form makes.
    return _named(lambda: _wait(_functional.all_reduce_(x, "sum", group)), "all-reduce", x)


def sum_gradients(x: Tensor, group: str) -> Tensor:
    """``x``, which all ranks share; its gradient is the sum of all ranks'."""
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _SumGradients.apply(x, group)
        return result
    return x


def gather_columns(x: Tensor, group: str, rank: int, ranges: Ranges) -> Tensor:
    """All ranks' last dimensions side by side; rank r has ``ranges[r]`` of the result."""
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _GatherColumns.apply(x, group, rank, ranges)
        return result
    return _all_gather(x, group, ranges)


def _all_reduce(x: Tensor, group: str) -> Tensor:
    def run() -> Tensor:
        return _wait(_functional.all_reduce(x.contiguous(), "sum", group))

    return _named(run, "all-reduce", x)


def _wait(x: Tensor) -> Tensor:
    result: Tensor = _functional.wait_tensor(x)
    return result


def _all_gather(x: Tensor, group: str, ranges: Ranges) -> Tensor:
    world = len(ranges)
    widest = max(stop - start for start, stop in ranges)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[-1] < widest:
        rows = torch.nn.functional.pad(rows, (0, widest - rows.shape[-1]))

    def run() -> Tensor:
        return _wait(_functional.all_gather_into_tensor(rows.contiguous(), world, group))

    parts = _named(run, "all-gather", x).view(world, -1, widest)
    if all(stop - start == widest for start, stop in ranges):
        joined = parts.movedim(0, 1).reshape(-1, world * widest)
    else:
        joined = torch.cat(
            [parts[i, :, : stop - start] for i, (start, stop) in enumerate(ranges)], dim=-1
        )
    return joined.view(*x.shape[:-1], joined.shape[-1])


def _named(run: Callable[[], Tensor], what: str, x: Tensor) -> Tensor:
    """``run()``; in eager mode a failure says what it means."""
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} of {list(x.shape)} failed: another rank has ended, or did not take part "
            f"within the process group's timeout ({error})"
        ) from error


class _SumRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _GatherColumns(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, rank: int, ranges: Ranges) -> Tensor:
        ctx.range = ranges[rank]
        return _all_gather(x, group, ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        start, stop = ctx.range
        return grad[..., start:stop].contiguous(), None, None, None

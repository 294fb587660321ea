"""``place``: a model's blocks one after another on several devices of one process."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.writer import parse_size

__all__ = ["PlacedModel", "place"]


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """What :func:`place` did; the model itself is called as before.

    Attributes:
        devices: module name -> its device, in order of execution as registered.
        bytes: device -> bytes of weights and buffers on it.
        remove: takes the hooks off again; weights stay where they are.
    """

    devices: Mapping[str, torch.device]
    bytes: Mapping[torch.device, int]
    remove: Callable[[], None]


def place(
    model: nn.Module,
    devices: Sequence[torch.device | str],
    budget_per_device: int | str | Sequence[int | str] | None = None,
) -> PlacedModel:
    """Put contiguous blocks of ``model`` on ``devices`` by size; forward moves the activations.

    Blocks are the members of the model's ModuleLists and Sequentials, and the modules outside of
    them. In the order in which they are registered, which has to be that of their execution, each
    goes to the current device as long as the budget holds, then to the next; what has no weights
    (rotary tables) goes to the first. Before a block runs, its inputs are moved to its device; the
    output stays where the last block computed it. CPU, CUDA and MPS devices can be mixed. Weights
    that are tied across devices are copied to each.

    Args:
        model: on any device; its weights are moved one block at a time.
        devices: where to, in order of use.
        budget_per_device: most bytes of weights on each, or like ``"20GiB"``; one for all, or one
            per device. By default the model is spread evenly.

    Raises:
        ValueError: no devices, budgets that do not match them, or that do not hold the model; says
            how much is missing. The model is as it was then.
        TypeError: a parameter directly in a module that is divided over devices.
    """
    targets = [torch.device(device) for device in devices]
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"devices must be at least one, each once, got {list(devices)}")
    blocks = _blocks(model)
    sizes = [_size([module]) for _, module in blocks]
    budgets = _budgets(budget_per_device, targets, sizes)
    chosen = _assign(blocks, targets, budgets, even=budget_per_device is None)
    handles = []
    mover = _Mover(blocks)
    for (_, module), device in zip(blocks, chosen, strict=True):
        mover.move(module, device)
        handles.append(module.register_forward_pre_hook(_mover(device), with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    used = {
        device: _size([m for (_, m), d in zip(blocks, chosen, strict=True) if d == device])
        for device in targets
    }
    names = {name: device for (name, _), device in zip(blocks, chosen, strict=True)}
    return PlacedModel(names, used, remove)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that stay whole, in order; what lies above them has no weights of its own."""
    containers = (nn.ModuleList, nn.Sequential)

    def divides(module: nn.Module) -> bool:
        return any(isinstance(m, containers) and len(m) > 0 for m in module.modules())

    found: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        own = [*module._parameters.values()]
        if any(tensor is not None for tensor in own):
            raise TypeError(
                f"{prefix or type(model).__name__} has parameters of its own and cannot be divided "
                "over devices"
            )
        for name, child in module.named_children():
            where = f"{prefix}.{name}" if prefix else name
            if isinstance(module, containers) or not divides(child):
                found.append((where, child))
            else:
                visit(where, child)

    if not divides(model):
        return [("", model)]
    visit("", model)
    # Registered anywhere, and needed by all blocks.
    return sorted(found, key=lambda block: _has_weights(block[1]))


def _has_weights(module: nn.Module) -> bool:
    return bool(module.state_dict(keep_vars=True))


def _size(modules: Sequence[nn.Module]) -> int:
    """Bytes of parameters and buffers, each once."""
    tensors = {id(tensor): tensor for module in modules for tensor in _slots(module)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _budgets(
    given: int | str | Sequence[int | str] | None, devices: Sequence[Any], sizes: Sequence[int]
) -> list[int]:
    if given is None:
        return [sum(sizes)] * len(devices)
    if isinstance(given, (int, str)):
        return [parse_size(given)] * len(devices)
    if len(given) != len(devices):
        raise ValueError(
            f"budget_per_device must be one, or one for each of {len(devices)} devices, got "
            f"{len(given)}"
        )
    return [parse_size(size) for size in given]


def _assign(
    blocks: Sequence[tuple[str, nn.Module]],
    devices: Sequence[torch.device],
    budgets: Sequence[int],
    even: bool,
) -> list[torch.device]:
    """A device for every block, in order."""
    total = _size([module for _, module in blocks])
    chosen: list[torch.device] = []
    here: list[nn.Module] = []
    index, before = 0, 0
    for name, module in blocks:
        while True:
            size = _size([*here, module])
            if even and index + 1 < len(devices):
                # Half of a block may go over an even share.
                fits = before + size - _size([module]) // 2 <= total * (index + 1) / len(devices)
            else:
                fits = size <= budgets[index]
            if fits:
                break
            index, before, here = index + 1, before + _size(here), []
            if index == len(devices):
                raise ValueError(
                    f"budgets of {sum(budgets)} bytes on {len(devices)} devices do not hold the "
                    f"model's {total} bytes: there is no room for {name!r} ({_size([module])} "
                    "bytes) and what follows; blocks are not divided"
                )
        here.append(module)
        chosen.append(devices[index])
    return chosen


class _Mover:
    """Moves blocks; tensors that are tied stay tied on each device."""

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        counts = Counter(id(tensor) for _, block in blocks for tensor in _slots(block))
        self._tied = {key for key, count in counts.items() if count > 1}
        # The first is kept, so that no other tensor gets its id.
        self._moved: dict[tuple[int, torch.device], tuple[Any, Any]] = {}

    def move(self, block: nn.Module, device: torch.device) -> None:
        """Put the block's tensors on ``device``."""
        for member in block.modules():
            tables: tuple[Any, ...] = (member._parameters, member._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = self._on(tensor, device)

    def _on(self, tensor: Any, device: torch.device) -> Any:
        key = (id(tensor), device)
        if key in self._moved:
            return self._moved[key][1]
        value = tensor.detach().to(device)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        if key[0] in self._tied:
            self._moved[key] = (tensor, value)
        return value


def _slots(block: nn.Module) -> Iterator[Tensor]:
    """The tensors of all members, tied ones as often as they are there."""
    for member in block.modules():
        for tensor in (*member._parameters.values(), *member._buffers.values()):
            if tensor is not None:
                yield tensor


def _mover(device: torch.device) -> Callable[..., Any]:
    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _to(args, device), _to(kwargs, device)

    return move


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts on ``device``; anything else as it is."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=False)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(item, device) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_to(item, device) for item in value)
    if type(value) is dict:
        return {key: _to(item, device) for key, item in value.items()}
    return value

"""``stream``: run a model whose weights stay in its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..checkpoint import Checkpoint, open_checkpoint
from ..nn import QuantizedModule
from ..tensor import QuantizedTensor
from .arena import BudgetError
from .cache import CacheStats, TensorCache, tensor_parts

__all__ = ["StreamedModel", "stream"]

#: Tensors up to this size are kept once loaded (norms, biases), if all of them take little.
_SMALL = 64 << 10
_COMPONENTS = ("codes", "scale", "zero_point", "offset")


class _Slot(NamedTuple):
    """A parameter or buffer of a module, and what fills it."""

    name: str  # in the module
    buffer: bool
    source: str  # in the checkpoint
    part: str | None  # a component of a quantized source, None for the whole


class _Saved(NamedTuple):
    """A weight that autograd saved: where it is, instead of its memory."""

    source: str
    part: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Unit:
    """A module with weights of its own: what a step of streaming loads and lets go of."""

    def __init__(self, module: nn.Module, slots: list[_Slot]) -> None:
        self.module = module
        self.slots = slots
        self.sources = list(dict.fromkeys(slot.source for slot in slots))
        self.placeholders = {
            slot.name: (module._buffers if slot.buffer else module._parameters)[slot.name]
            for slot in slots
        }
        self.depth = 0
        self.saving: Any = None


class StreamedModel:
    """A model that runs from its checkpoint; made by :func:`stream`.

    Call it as the model. Attributes it does not have are the model's.

    Attributes:
        model: the module tree; its weights are on the ``meta`` device between calls.
        cache: the :class:`TensorCache` that holds what is in memory.
    """

    def __init__(self, model: nn.Module, cache: TensorCache, owns_checkpoint: bool) -> None:
        self.model = model
        self.cache = cache
        self._owns_checkpoint = owns_checkpoint
        self._handles: list[Any] = []
        self._units = _units(model, cache)
        self._order = list(self._units)  # as registered, until a pass shows the real one
        self._record: list[_Unit] = []
        self._position = 0
        self._ahead: dict[int, list[str]] = {}  # position -> what to load from there on
        self._planned = False
        self._keep = self._small()
        self._kept: set[str] = set()
        # Addresses of weights that are in modules now, for what autograd saves.
        self._addresses: dict[int, tuple[str, str]] = {}
        for unit in self._units:
            self._hook(unit)
        self._handles.append(model.register_forward_pre_hook(self._start_pass, prepend=True))
        self._handles.append(model.register_forward_hook(self._end_pass))
        self._prefetch(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def stats(self) -> CacheStats:
        """Counters of the cache."""
        return self.cache.stats()

    def close(self) -> None:
        """Stop streaming and free all weights; the model keeps its ``meta`` placeholders."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for unit in self._units:
            _restore(unit)
        self.cache.close()
        if self._owns_checkpoint:
            self.cache.checkpoint.close()

    # --- one module -----------------------------------------------------------------------------

    def _hook(self, unit: _Unit) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self._acquire(unit)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._release(unit)

        self._handles.append(unit.module.register_forward_pre_hook(before, prepend=True))
        # Also when forward raises: the weights must not stay.
        self._handles.append(unit.module.register_forward_hook(after, always_call=True))

    def _acquire(self, unit: _Unit) -> None:
        unit.depth += 1
        if unit.depth > 1:
            return
        self._advance(unit)
        loaded = {}
        for source in unit.sources:
            if source in self._keep and source not in self._kept:
                self.cache.pin(source)
                self._kept.add(source)
                self._ahead.clear()
            loaded[source] = self.cache.get(source)
        for source, tensor in loaded.items():
            for part, plain in tensor_parts(tensor).items():
                self._addresses[plain.untyped_storage().data_ptr()] = (source, part)
        for slot in unit.slots:
            tensor = loaded[slot.source]
            if slot.part is not None:
                unit.module._buffers[slot.name] = getattr(tensor, slot.part)
            elif slot.buffer:
                unit.module._buffers[slot.name] = tensor
            else:
                unit.module._parameters[slot.name] = nn.Parameter(tensor, requires_grad=False)
        if torch.is_grad_enabled():
            unit.saving = saved_tensors_hooks(self._pack, self._unpack)
            unit.saving.__enter__()

    def _release(self, unit: _Unit) -> None:
        unit.depth -= 1
        if unit.depth > 0:
            return
        self._forget(unit)
        _restore(unit)
        self.cache.notify(unit.sources)

    def _forget(self, unit: _Unit) -> None:
        for slot in unit.slots:
            table = unit.module._buffers if slot.buffer else unit.module._parameters
            tensor = table[slot.name]
            if isinstance(tensor, Tensor):
                for plain in tensor_parts(tensor).values():
                    self._addresses.pop(plain.untyped_storage().data_ptr(), None)

    # --- order and prefetching ------------------------------------------------------------------

    def _advance(self, unit: _Unit) -> None:
        """Note where the pass is, and have the next modules loaded."""
        if len(self._record) >= 16 * len(self._units):  # modules called without the model
            self._record = []
        self._record.append(unit)
        order, position = self._order, self._position
        if position >= len(order) or order[position] is not unit:
            position = next((i for i, other in enumerate(order) if other is unit), position)
        self._position = position + 1
        self._prefetch(self._position)

    def _prefetch(self, position: int) -> None:
        """Ask for what comes next, up to half of the budget; the cache waits for room."""
        if position in self._ahead:
            self.cache.prefetch(self._ahead[position])
            return
        ahead: list[str] = []
        room = self.cache.budget // 2
        for i in range(len(self._order)):
            unit = self._order[(position + i) % len(self._order)]
            for source in unit.sources:
                if source in ahead or source in self._kept:
                    continue
                room -= self.cache.nbytes(source)
                if room < 0:
                    break
                ahead.append(source)
            if room < 0:
                break
        self._ahead[position] = ahead
        self.cache.prefetch(ahead)

    def _start_pass(self, module: nn.Module, args: Any) -> None:
        self._record = []
        self._position = 0

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._record:
            if self._record != self._order:
                self._ahead.clear()
            self._order = self._record
        if not self._planned:
            self._planned = True
            self._keep |= self._resident()

    def _small(self) -> set[str]:
        sources = {source for unit in self._units for source in unit.sources}
        small = {source for source in sources if self.cache.nbytes(source) <= _SMALL}
        total = sum(self.cache.nbytes(source) for source in small)
        return small if total <= self.cache.budget // 8 else set()

    def _resident(self) -> set[str]:
        """What to keep from one pass to the next, now that the order is known.

        Under a cyclic order least-recently-used eviction drops each weight just before it is
        needed. Instead, an even spread of the weights stays and the others pass through the rest of
        the budget, which has room for the module at work and about two more to come.
        """
        sizes: dict[str, int] = {}
        for unit in self._order:
            for source in unit.sources:
                sizes.setdefault(source, self.cache.nbytes(source))
        streamed = {name: size for name, size in sizes.items() if name not in self._keep}
        kept = sum(size for name, size in sizes.items() if name in self._keep)
        room = self.cache.budget - kept
        if sum(streamed.values()) <= room:
            return set(streamed)
        largest = max((sum(sizes[s] for s in unit.sources) for unit in self._order), default=0)
        room -= 3 * largest
        share = room / max(1, sum(streamed.values()))
        chosen: set[str] = set()
        debt = 0.0
        for name, size in streamed.items():
            debt += share * size
            if debt >= size / 2 and size <= room:
                chosen.add(name)
                room -= size
                debt -= size
        return chosen

    # --- autograd -------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        """Save where a weight is, not the weight: its memory can go back before the backward."""
        if isinstance(tensor, QuantizedTensor) or tensor.device.type == "meta":
            return tensor
        found = self._addresses.get(tensor.untyped_storage().data_ptr())
        if found is None or tensor.numel() == 0:
            return tensor
        return _Saved(
            *found, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        )

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        plain = tensor_parts(self.cache.get(saved.source))[saved.part]
        return plain.as_strided(saved.size, saved.stride, saved.offset)


def stream(
    model: nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    device: torch.device | str = "cpu",
    budget: int | str = "1GiB",
    *,
    backend: Literal["native", "torch"] | None = None,
    host_budget: int | str | None = None,
) -> StreamedModel:
    """Run ``model`` with weights that are loaded when a module runs and let go of after it.

    Every module that owns parameters or buffers of the checkpoint takes them from a
    :class:`TensorCache` before its forward and gives them back after; the weights of the next
    modules are loaded meanwhile. The first pass shows the order in which modules run. From then on
    as many weights as fit stay in memory, spread evenly, and the others are streamed.

    The model's own weights are replaced by ``meta`` placeholders, so build it there:
    ``with torch.device("meta"): model = ...``. Weights get no gradient; gradients of inputs work,
    and the backward loads weights again. One forward at a time. Code that reads a module's weight
    from outside its forward sees the placeholder.

    Args:
        model: any module tree; its state-dict names are the checkpoint's. Weights that are
            quantized in the checkpoint may belong to quantized modules of the same format, or to
            ordinary ones such as ``nn.Linear``, which then compute with a QuantizedTensor. Tied
            parameters need one entry in the checkpoint and are loaded once.
        checkpoint: an open checkpoint or a path; what is opened here is closed by ``close()``.
        device: where weights go and the model runs. Buffers that the checkpoint does not have are
            moved there.
        budget: most bytes of weights, or like ``"512MiB"``; activations are not counted.
        backend: as for :class:`Arena`.
        host_budget: as for :class:`TensorCache`: page-locked memory for weights on their way to a
            CUDA device.

    Raises:
        KeyError: a parameter or persistent buffer that the checkpoint does not have.
        ValueError: another shape, dtype or quantization than the model's.
        BudgetError: the budget does not hold the largest module.
        FileNotFoundError, CheckpointError: as :func:`open_checkpoint`.
    """
    owns = not isinstance(checkpoint, Checkpoint)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    cache = None
    try:
        cache = TensorCache(opened, device, budget, backend=backend, host_budget=host_budget)
        streamed = StreamedModel(model, cache, owns)
    except BaseException:
        if cache is not None:
            cache.close()
        if owns:
            opened.close()
        raise
    return streamed


def _units(model: nn.Module, cache: TensorCache) -> list[_Unit]:
    """Modules with weights of their own, checked against the checkpoint; nothing changes before."""
    checkpoint = cache.checkpoint
    # Tied parameters are one object under several names.
    names: dict[int, list[str]] = {}
    for name, tensor in _own_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    found: list[tuple[nn.Module, list[_Slot]]] = []
    missing: list[str] = []
    local: list[tuple[nn.Module, str]] = []
    for prefix, module in model.named_modules():
        slots = []
        for name, tensor, buffer in _own(module):
            full = f"{prefix}.{name}" if prefix else name
            slot = next(
                filter(None, (_slot(checkpoint, n, name, buffer) for n in names[id(tensor)])), None
            )
            if slot is not None:
                _check(checkpoint, module, full, slot, tensor)
                slots.append(slot)
            elif buffer and name in module._non_persistent_buffers_set:
                local.append((module, name))
                if tensor.device.type == "meta":
                    missing.append(f"{full} (not persistent, and on the meta device)")
            else:
                missing.append(full)
        if slots:
            found.append((module, slots))
    if missing:
        raise KeyError(
            f"{checkpoint.path}: the model has {len(missing)} tensors that the checkpoint does not "
            f"have, such as {missing[0]!r}"
        )
    for module, slots in found:
        needed = sum(cache.nbytes(source) for source in {slot.source for slot in slots})
        if needed > cache.budget:
            raise BudgetError(
                f"{checkpoint.path}: a {type(module).__name__} needs {needed} bytes of weights at "
                f"once ({', '.join(slot.source for slot in slots)}), and the budget is "
                f"{cache.budget} bytes"
            )
    placeholders: dict[int, Tensor] = {}
    for module, slots in found:
        for slot in slots:
            table: Any = module._buffers if slot.buffer else module._parameters
            tensor = table[slot.name]
            if id(tensor) not in placeholders:
                meta = tensor.detach().to("meta")
                placeholders[id(tensor)] = (
                    meta if slot.buffer else nn.Parameter(meta, requires_grad=False)
                )
        # Replaced below, once no id can be reused.
    units = []
    for module, slots in found:
        for slot in slots:
            table = module._buffers if slot.buffer else module._parameters
            table[slot.name] = placeholders[id(table[slot.name])]
        units.append(_Unit(module, slots))
    for module, name in local:
        buffer_tensor = module._buffers[name]
        assert buffer_tensor is not None
        module._buffers[name] = buffer_tensor.to(cache.device)
    return units


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, True


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, tensor, _ in _own(module):
            yield (f"{prefix}.{name}" if prefix else name), tensor


def _slot(checkpoint: Checkpoint, full: str, name: str, buffer: bool) -> _Slot | None:
    if full in checkpoint:
        return _Slot(name, buffer, full, None)
    for part in _COMPONENTS:
        source = full.removesuffix(f"_{part}")
        if source != full and source in checkpoint:
            q = checkpoint.info(source).quantization
            if buffer and q is not None and part in q.component_shapes((1, q.in_features)):
                return _Slot(name, buffer, source, part)
    return None


def _check(
    checkpoint: Checkpoint, module: nn.Module, full: str, slot: _Slot, tensor: Tensor
) -> None:
    """That what the checkpoint has is what the module computes with."""
    info = checkpoint.info(slot.source)

    def fail(what: str, need: object, got: object) -> None:
        raise ValueError(
            f"{checkpoint.path}: {full}: the model has {what} {need}, and the checkpoint {got}"
        )

    if slot.part is None:
        if tuple(tensor.shape) != info.shape:
            fail("shape", list(tensor.shape), list(info.shape))
        if info.quantization is None and tensor.dtype != info.dtype:
            fail("dtype", tensor.dtype, f"{info.dtype}; use model.to(...) before")
        if info.quantization is not None and slot.buffer:
            fail("a plain buffer", "", info.kind)
        return
    q = info.quantization
    assert q is not None
    if isinstance(module, QuantizedModule):
        own: tuple[object, ...] = (module.bits, module.group_size, module.scheme)
        if own != (q.bits, q.group_size, q.scheme):
            fail("bits, group_size and scheme", own, (q.bits, q.group_size, q.scheme))
    dtype, shape = q.component_shapes(info.shape)[slot.part]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        fail("component", (tensor.dtype, list(tensor.shape)), (dtype, list(shape)))


def _restore(unit: _Unit) -> None:
    unit.depth = 0
    saving, unit.saving = unit.saving, None
    if saving is not None:
        saving.__exit__(None, None, None)
    for slot in unit.slots:
        table: Any = unit.module._buffers if slot.buffer else unit.module._parameters
        table[slot.name] = unit.placeholders[slot.name]

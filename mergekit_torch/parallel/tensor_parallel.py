"""``tensor_parallel_``: split a model's quantized modules over ranks, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel.style import ParallelStyle

from ..nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from .modules import ParallelModule
from .partition import Ranges, column_unit
from .plans import Heads, Split, WeightShape, llama_splits
from .styles import ColwiseParallel, RowwiseParallel, quantized_style

__all__ = ["llama_plan", "tensor_parallel_"]

_STYLES = {
    "colwise": lambda: ColwiseParallel(),
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": lambda: RowwiseParallel(),
    "vocabulary": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def tensor_parallel_(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str | ParallelStyle] | None = None,
    *,
    src_data_rank: int | None = None,
) -> dict[str, str]:
    """Split ``model``'s weights over the ranks of ``mesh``, in place.

    Every rank calls it with the same model. Each copies its own part of every weight out of the
    whole one, which is freed if nobody else holds it; nothing is communicated unless
    ``src_data_rank`` is given. Models on the meta device are split as well, to be loaded by
    :func:`load_sharded_`. Tied weights stay tied.

    Args:
        model: a model with quantized modules. Linear and embedding layers that are not quantized
            are split by torch's own styles.
        mesh: ranks in one dimension; all ranks of the default process group by default.
        plan: module name or glob -> ``"colwise"``, ``"colwise_gather"``, ``"rowwise"``,
            ``"vocabulary"`` (see :class:`mergekit_torch.parallel.plans.Split`) or a style, torch's
            or ours; later ones win. By default the plan of llama-style models: see
            :func:`llama_plan`.
        src_data_rank: take weights from this rank of the mesh instead of everybody's own.

    Returns:
        What became of which module.

    Raises:
        ValueError: a model that cannot be split so, with the sizes that are possible; a glob that
            matches nothing; no process group. The model is as it was then.
        NotImplementedError: a plain layer that would have to be split unevenly.
    """
    if mesh is None:
        mesh = _default_mesh(model)
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; take a part of it")
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding, nn.Linear, nn.Embedding))
    }
    if plan is None:
        splits = llama_plan(model, mesh.size())
        chosen: dict[str, Any] = {name: split.kind for name, split in splits.items()}
        ranges: dict[str, Ranges] = {name: split.ranges for name, split in splits.items()}
    else:
        chosen, ranges = _match(plan, layers), {}
    styles = {name: _style(name, value) for name, value in chosen.items()}
    _check(layers, styles, ranges, mesh.size())
    tied = _Tied(layers.values())
    done: dict[int, nn.Module] = {}
    for name, style in styles.items():
        module = layers[name]
        if id(module) in done:
            continue
        done[id(module)] = module
        style.src_data_rank = src_data_rank
        if isinstance(module, QuantizedModule):
            tied.apply(style, module, mesh, ranges.get(name))
        else:
            style._apply(module, mesh)
    if plan is None:
        _set_heads(model, splits, mesh)
    return {name: repr(style) for name, style in styles.items()}


def llama_plan(model: nn.Module, world: int) -> dict[str, Split]:
    """The splits of a llama-style transformers model by module name.

    Raises:
        ValueError: as :func:`mergekit_torch.parallel.plans.llama_splits`.
        NotImplementedError: attention that computes across heads outside its projections.
    """
    shapes: dict[str, WeightShape] = {}
    heads: dict[str, Heads] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        shape = _shape(module)
        if shape is not None:
            shapes[f"{name}.weight"] = shape
        found = _heads(name, module)
        if found is not None:
            heads[name] = found
    splits = llama_splits(shapes, heads, world)
    return {name.removesuffix(".weight"): split for name, split in splits.items()}


def _shape(module: nn.Module) -> WeightShape | None:
    if isinstance(module, ParallelModule):
        raise ValueError(f"the model is parallel already: {module}")
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        rows, columns = module._weight_size()
        return WeightShape(rows, columns, column_unit(module.bits, module.group_size, columns))
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return WeightShape(*module.weight.shape)
    return None


def _heads(name: str, module: nn.Module) -> Heads | None:
    """The heads of a llama-style attention module."""
    children = dict(module.named_children())
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= children.keys():
        return None
    size = getattr(module, "head_dim", None)
    if not isinstance(size, int):
        raise ValueError(f"{name}: an attention module must have head_dim, got {size!r}")
    for other in ("q_norm", "k_norm"):
        norm = getattr(children.get(other), "weight", None)
        if norm is not None and norm.shape[-1] != size:
            raise NotImplementedError(
                f"{name}.{other} normalizes all heads together, which no rank has; "
                "leave the attention out with a plan of your own"
            )
    rows = [_shape(children[key]) for key in ("q_proj", "k_proj")]
    if None in rows:
        return None
    return Heads(rows[0].rows // size, rows[1].rows // size, size)  # type: ignore[union-attr]


def _set_heads(model: nn.Module, splits: Mapping[str, Split], mesh: DeviceMesh) -> None:
    """Tell attention modules how many heads they have now."""
    rank = mesh.get_local_rank()
    for name, module in model.named_modules():
        q, k = splits.get(f"{name}.q_proj"), splits.get(f"{name}.k_proj")
        if q is None or k is None:
            continue
        size = module.head_dim
        queries, keys = ((s.ranges[rank][1] - s.ranges[rank][0]) // size for s in (q, k))
        for attribute, value in (
            ("num_key_value_groups", queries // keys),
            ("num_heads", queries),
            ("num_key_value_heads", keys),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _match(
    plan: Mapping[str, str | ParallelStyle], layers: Mapping[str, nn.Module]
) -> dict[str, str | ParallelStyle]:
    chosen: dict[str, str | ParallelStyle] = {}
    for glob, value in plan.items():
        names = [name for name in layers if fnmatchcase(name, glob)]
        if not names:
            raise ValueError(
                f"plan: {glob!r} matches none of the {len(layers)} linear and embedding layers"
                + (f", such as {next(iter(layers))!r}" if layers else "")
            )
        chosen.update(dict.fromkeys(names, value))
    return chosen


def _style(name: str, value: Any) -> Any:
    if isinstance(value, str):
        if value not in _STYLES:
            raise ValueError(f"plan: {name}: must be among {', '.join(_STYLES)}, got {value!r}")
        return _STYLES[value]()
    value = quantized_style(value)
    if not isinstance(value, (ColwiseParallel, RowwiseParallel)):
        raise ValueError(
            f"plan: {name}: must be among {', '.join(_STYLES)}, ColwiseParallel or "
            f"RowwiseParallel, got {type(value).__name__}"
        )
    return value


def _check(
    layers: Mapping[str, nn.Module],
    styles: Mapping[str, Any],
    ranges: Mapping[str, Ranges],
    world: int,
) -> None:
    """Raise what applying a style would, before anything has changed."""
    for name, style in styles.items():
        module = layers[name]
        if isinstance(module, ParallelModule):
            raise ValueError(f"{name} is parallel already: {module}")
        try:
            if isinstance(module, QuantizedModule):
                style._check_quantized(module, world)
            elif name in ranges and not _is_even(ranges[name]):
                raise NotImplementedError(
                    f"a plain {type(module).__name__} can be split evenly only, got parts "
                    f"{list(ranges[name])}; quantize it, or leave it out with a plan of your own"
                )
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{name}: {error}") from error


def _is_even(ranges: Ranges) -> bool:
    sizes = {stop - start for start, stop in ranges}
    return len(sizes) == 1 and len(set(ranges)) == len(ranges)


class _Tied:
    """Splits modules that share buffers so that they share them afterwards."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        quantized = {id(m): m for m in modules if isinstance(m, QuantizedModule)}
        counts = Counter(id(module.weight_codes) for module in quantized.values())
        self._shared = {codes for codes, count in counts.items() if count > 1}
        # A whole weight is kept alive while its address is a key.
        self._parts: dict[tuple[int, int, Ranges], tuple[Any, Any]] = {}

    def apply(
        self, style: Any, module: QuantizedModule, mesh: DeviceMesh, ranges: Ranges | None
    ) -> None:
        whole = module.weight_codes
        style._apply_quantized(module, mesh, ranges)
        assert isinstance(module, ParallelModule)
        key = (id(whole), module.part.dim, module.part.ranges)
        if key in self._parts:
            module.weight = self._parts[key][1]
        elif id(whole) in self._shared:
            self._parts[key] = (whole, module.weight)


def _default_mesh(model: nn.Module) -> DeviceMesh:
    if not dist.is_initialized():
        raise ValueError(
            "tensor_parallel_ needs torch.distributed: call init_process_group first, for example "
            "in a program started by torchrun"
        )
    tensor = next(iter(model.buffers()), None)
    kind = "cpu" if tensor is None or tensor.device.type == "meta" else tensor.device.type
    return init_device_mesh(kind, (dist.get_world_size(),))

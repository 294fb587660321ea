"""``quantize_``: replace a model's linear and embedding layers by quantized ones, in place."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .format import FLOAT_DTYPES, PER_ROW, check_group_size
from .nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from .quantize_config import QuantizeConfig
from .quantize_report import KeptReport, LayerReport, QuantizeReport
from .tensor import QuantizedTensor

__all__ = ["KeptReport", "LayerReport", "QuantizeReport", "dequantize_", "quantize_"]


@dataclass
class _Group:
    """One weight and the modules that hold it."""

    weight: Tensor
    names: list[str]
    format: dict[str, Any]


def quantize_(
    model: nn.Module, config: QuantizeConfig | None = None, *, progress: bool = False
) -> QuantizeReport:
    """Quantize the weights of ``model``'s linear and embedding layers, in place.

    No layer is skipped for its shape. Weights go one at a time and each old one is freed before
    the next, so the peak is the model plus one quantized weight. Modules that share a weight share
    the quantized one. Everything is checked before the first module is touched: when this raises,
    the model is as it was.

    Args:
        model: its ``nn.Linear`` and ``nn.Embedding`` submodules are replaced; not itself one.
            On the meta device only modules are replaced, ready to load quantized weights.
        config: what to do; 4-bit affine groups of 64 by default.
        progress: show a progress bar.

    Returns:
        What was quantized, and which other weights stay as they are and why.

    Raises:
        TypeError: ``model`` is itself a layer, or a weight's dtype is not float32, float16 or
            bfloat16.
        ValueError: a glob that matches no layer, tied layers with different treatment, or a weight
            with inf or NaN or beyond the range of ``scale_dtype``; the message names it.
    """
    config = QuantizeConfig() if config is None else config
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise TypeError(
            f"model must contain layers, got a {type(model).__name__} itself; "
            "use QuantizedLinear.from_linear or QuantizedEmbedding.from_embedding"
        )
    groups, reasons = _plan(model, config)
    kept = _kept(model, groups, reasons)
    for group in groups:
        _check_values(group)

    layers = []
    for group in _progress(groups, progress):
        layers.append(_replace(model, group))
    return QuantizeReport(tuple(layers), kept)


def _progress(groups: list[_Group], show: bool) -> Iterator[_Group]:
    """The groups, each dropped from the list as it is handed out, so that it can be freed."""
    bar = None
    if show:
        from tqdm import tqdm

        bar = tqdm(total=sum(g.weight.nbytes for g in groups), unit="B", unit_scale=True)
    groups.reverse()
    try:
        while groups:
            size = groups[-1].weight.nbytes
            yield groups.pop()
            if bar is not None:
                bar.update(size)
    finally:
        if bar is not None:
            bar.close()


def _unsuitable(module: nn.Module) -> str | None:
    """Why a linear or embedding layer cannot be replaced, if so; never its shape."""
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight itself"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized"
    if type(module).forward is not kind.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "forward is replaced on the instance"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes the weight in forward"
    return None


def _plan(model: nn.Module, config: QuantizeConfig) -> tuple[list[_Group], dict[str, str]]:
    """Weights to quantize, and by module name why other layers are not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    for pattern in (*config.overrides, *config.skip):
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"glob {pattern!r} matches none of the {len(layers)} linear and embedding layers"
                + (f", such as {next(iter(layers))!r}" if layers else "")
            )
    reasons: dict[str, str] = {}
    by_weight: dict[int, _Group] = {}
    for name, module in layers.items():
        wanted = config.linear if isinstance(module, nn.Linear) else config.embedding
        reason = (
            "skipped by the config" if config.skips(name) or not wanted else _unsuitable(module)
        )
        if reason is not None:
            reasons[name] = reason
            continue
        chosen = config.for_module(name)
        weight = module.weight
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}.weight must be float32, float16 or bfloat16, got {weight.dtype}"
            )
        in_features = weight.shape[-1]
        if chosen["group_size"] == PER_ROW:
            chosen["group_size"] = max(1, in_features)
        check_group_size(chosen["group_size"], in_features)
        group = by_weight.setdefault(id(weight), _Group(weight, [], chosen))
        if group.format != chosen:
            raise ValueError(
                f"{group.names[0]} and {name} share one weight and need one format, got "
                f"{group.format} and {chosen}"
            )
        group.names.append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        shared = by_weight.get(id(parameter))
        if shared is not None and (owner not in shared.names or attribute != "weight"):
            raise ValueError(
                f"{name} is the weight of {shared.names[0]} as well, but stays as it is "
                f"({reasons.get(owner, 'not a linear or embedding layer')}); "
                "skip both or neither"
            )
    return list(by_weight.values()), reasons


def _kept(
    model: nn.Module, groups: list[_Group], reasons: dict[str, str]
) -> tuple[KeptReport, ...]:
    taken = {id(group.weight) for group in groups}
    kept = []
    for name, parameter in model.named_parameters():
        if id(parameter) in taken or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        owner = name.rpartition(".")[0]
        other = f"{type(model.get_submodule(owner)).__name__} is not a linear or embedding layer"
        # A parametrized layer's parameters live below it.
        above = next((name for name in reasons if owner.startswith(f"{name}.")), owner)
        reason = reasons.get(owner, reasons.get(above, other))
        kept.append(KeptReport(name, tuple(parameter.shape), parameter.nbytes, reason))
    return tuple(kept)


def _check_values(group: _Group) -> None:
    """Refuse what quantizing would refuse, before anything is changed."""
    weight = group.weight.detach()
    if weight.is_meta or weight.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(weight))
    # NaN and inf come through aminmax.
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{group.names[0]}.weight must be finite, got inf or NaN")
    scale_dtype = group.format["scale_dtype"]
    limit = torch.finfo(scale_dtype or torch.float16).max
    # Scales and offsets are at most the range of the weight: only beyond it is a trial needed.
    if high - low > limit or max(-low, high) > limit:
        _quantized(group)


def _quantized(group: _Group) -> QuantizedTensor:
    chosen = {key: group.format[key] for key in ("bits", "group_size", "scheme", "scale_dtype")}
    try:
        return QuantizedTensor.from_float(group.weight.detach(), **chosen)
    except ValueError as error:
        raise ValueError(f"{group.names[0]}.weight: {error}") from error


def _replace(model: nn.Module, group: _Group) -> LayerReport:
    weight = _quantized(group)
    before = group.weight.nbytes
    replaced: dict[int, nn.Module] = {}
    for name in group.names:
        old = model.get_submodule(name)
        new = replaced.get(id(old))
        if new is None:
            if isinstance(old, nn.Linear):
                new = QuantizedLinear.from_quantized(
                    weight, old.bias, compute=group.format["compute"]
                )
            else:
                assert isinstance(old, nn.Embedding)
                new = QuantizedEmbedding.from_quantized(weight, old.padding_idx)
            _carry_over(old, new)
            replaced[id(old)] = new
        model.set_submodule(name, new)
    return LayerReport(
        names=tuple(group.names),
        shape=tuple(weight.shape),
        bits=weight.bits,
        group_size=weight.group_size,
        scheme=weight.scheme,
        scale_dtype=weight.scale.dtype,
        bytes_before=before,
        bytes_after=weight.nbytes,
    )


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training mode and hooks of the replaced module."""
    new.train(old.training)
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        getattr(new, name).update(getattr(old, name))


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace quantized layers by dense ``nn.Linear`` and ``nn.Embedding``, in place.

    Modules that shared quantized buffers share one dense weight.

    Args:
        model: the model; not itself a quantized layer.
        dtype: float32, float16 or bfloat16; by default each module's own.

    Returns:
        Names of the modules that were replaced.

    Raises:
        TypeError: ``model`` is itself a quantized layer, or ``dtype`` is not offered.
        ValueError: the model is split over ranks.
    """
    if isinstance(model, QuantizedModule):
        raise TypeError("model must contain layers; use to_linear() or to_embedding() on this one")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    replaced: dict[int, Any] = {}
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    codes: list[Tensor] = []  # keeps ids unique while they are keys
    names = []
    modules = list(model.named_modules(remove_duplicate=False))
    for name, old in modules:
        if isinstance(old, QuantizedModule):
            old._require_whole(name, "dequantize the model before it is split over ranks")
    for name, old in modules:
        if not isinstance(old, (QuantizedLinear, QuantizedEmbedding)):
            continue
        new = replaced.get(id(old))
        if new is None:
            key = (id(old.weight_codes), dtype or old.dtype)
            codes.append(old.weight_codes)
            shared = weights.get(key)
            new = _dense(old, dtype)
            if shared is not None:
                new.weight = shared
            weights[key] = new.weight
            _carry_over(old, new)
            replaced[id(old)] = new
        model.set_submodule(name, new)
        names.append(name)
    return names


def _dense(old: QuantizedLinear | QuantizedEmbedding, dtype: torch.dtype | None) -> Any:
    if isinstance(old, QuantizedLinear):
        return old.to_linear(dtype)
    return old.to_embedding(dtype)

"""The quantization method ``"mkrs"`` of transformers: its config and its quantizer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "mergekit_torch.integrations.transformers needs transformers >= 5.0 "
        f"({error}); install it with: pip install 'mergekit_torch[hf]'"
    ) from error

from ..nn import QuantizedModule
from ..nn.module import BUFFERS
from ..quantize_ import _Group, _plan, _replace, dequantize_
from ..quantize_config import QuantizeConfig
from ..tensor import QuantizedTensor

QUANT_METHOD = "mkrs"
_MODULE_KEYS = ("bits", "group_size", "scheme", "scale_dtype", "compute")


@register_quantization_config(QUANT_METHOD)
class MkrsConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of the method ``"mkrs"``, in ``config.json`` as well.

    Args:
        modules: module name -> bits, group_size, scheme, scale_dtype (its name) and compute, for a
            model whose layers were not quantized by one rule; then exactly these are quantized,
            and the remaining arguments say nothing.
        quant_method: ``"mkrs"``.
        **fields: those of :class:`mergekit_torch.QuantizeConfig`.

    Raises:
        TypeError, ValueError: what QuantizeConfig refuses, unknown keys by name.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        **fields: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.config = QuantizeConfig.from_dict(fields)
        self.modules = None if modules is None else {k: dict(v) for k, v in modules.items()}
        # Checks the formats too.
        self.module_formats()

    def module_formats(self) -> dict[str, dict[str, Any]] | None:
        """Format fields by module name when they are listed one by one."""
        if self.modules is None:
            return None
        formats = {}
        for name, fields in self.modules.items():
            unknown = sorted(set(fields) - set(_MODULE_KEYS))
            if unknown:
                raise ValueError(
                    f"modules[{name!r}]: keys must be among {', '.join(_MODULE_KEYS)}, "
                    f"got {', '.join(unknown)}"
                )
            fields = dict(fields)
            # Files may hold per-row groups of any length; a config says -1 for them.
            group_size = fields.pop("group_size", 64)
            chosen = QuantizeConfig(**fields).for_module(name)
            if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
                raise ValueError(f"modules[{name!r}]: group_size cannot be {group_size!r}")
            formats[name] = {**chosen, "group_size": group_size}
        return formats

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types."""
        result = {"quant_method": self.quant_method, **self.config.to_dict()}
        if self.modules is not None:
            result["modules"] = {k: dict(v) for k, v in self.modules.items()}
        return result

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def config_of(model: nn.Module) -> MkrsConfig:
    """The config that describes ``model``'s quantized modules one by one."""
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            modules[name] = {
                "bits": module.bits,
                "group_size": module.group_size,
                "scheme": module.scheme,
                "scale_dtype": str(module.weight_scale.dtype).removeprefix("torch."),
                "compute": getattr(module, "compute", "exact"),
            }
    return MkrsConfig(modules=modules)


def _groups(model: nn.Module, config: MkrsConfig) -> list[_Group]:
    """The weights of a dense ``model`` that ``config`` quantizes."""
    formats = config.module_formats()
    if formats is None:
        return _plan(model, config.config)[0]
    groups: dict[int, _Group] = {}
    for name, chosen in formats.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"quantization_config lists {name!r}, which the model lacks") from None
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise ValueError(
                f"quantization_config lists {name!r}, a {type(module).__name__}; only linear and "
                "embedding layers can be quantized"
            )
        group = groups.setdefault(id(module.weight), _Group(module.weight, [], chosen))
        group.names.append(name)
    return list(groups.values())


def tied_pairs(model: nn.Module) -> dict[str, str]:
    """Module names of tied weights, target -> source, as transformers has them."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in keys.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }


def forget_tie(model: Any, target: str) -> None:
    """Take a tie off transformers' list: it would look for parameters."""
    model.all_tied_weights_keys.pop(f"{target}.weight", None)


def declare_component_ties(model: nn.Module) -> None:
    """Let ``tie_weights()`` and ``save_pretrained`` know ties by component, not by ``weight``."""
    for module in model.modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if not isinstance(keys, dict):
            continue
        expanded: dict[str, str] = {}
        for target, source in keys.items():
            try:
                pair = [
                    module.get_submodule(name.removesuffix(".weight")) for name in (target, source)
                ]
            except AttributeError:  # a pattern, or a parameter that is no module's weight
                pair = []
            if len(pair) == 2 and all(isinstance(part, QuantizedModule) for part in pair):
                for name in BUFFERS:
                    if pair[1]._buffers[name] is not None:
                        new, old = (
                            f"{key.removesuffix('.weight')}.{name}" for key in (target, source)
                        )
                        expanded[new] = old
            else:
                expanded[target] = source
        if expanded != keys:
            module._tied_weights_keys = expanded  # type: ignore[assignment]


class _Quantize(ConversionOps):
    """Quantizes the weights that a float checkpoint has for a model, as they come."""

    def __init__(self, quantizer: "MkrsHfQuantizer") -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Put a quantized module in for every weight; give back what is not one."""
        rest = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            name = full_layer_name if len(input_dict) == 1 else key
            chosen = self.quantizer.formats.get(name)
            if chosen is None:
                rest[key] = value
                continue
            self._put(model, name.removesuffix(".weight"), tensor, chosen, missing_keys)
        return rest

    def _put(
        self,
        model: Any,
        name: str,
        tensor: Tensor,
        chosen: dict[str, Any],
        missing_keys: set[str] | None,
    ) -> None:
        module = model.get_submodule(name)
        if missing_keys is not None:
            missing_keys.discard(f"{name}.weight")
        if isinstance(module, QuantizedModule):
            # Its tied partner came first. Keep the tie if the values agree.
            own = QuantizedTensor.from_float(
                tensor, **{k: v for k, v in chosen.items() if k != "compute"}
            )
            if not torch.equal(own, module.weight):
                module.weight = own
            return
        pairs = tied_pairs(model)
        source = pairs.get(name, name)
        names = [source, *(t for t, s in pairs.items() if s == source)]
        names = [n for n in names if f"{n}.weight" in self.quantizer.formats] or [name]
        _replace(model, _Group(nn.Parameter(tensor, requires_grad=False), names, chosen))
        for tied in names:
            forget_tie(model, tied)
            if missing_keys is not None:
                missing_keys.discard(f"{tied}.weight")


@register_quantizer(QUANT_METHOD)
class MkrsHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model."""

    requires_calibration = False
    quantization_config: MkrsConfig

    def __init__(self, quantization_config: MkrsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        #: Format by the full name of every weight that is quantized on load.
        self.formats: dict[str, dict[str, Any]] = {}
        self._late_ties: list[tuple[str, str]] = []

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        groups = _groups(model, self.quantization_config)
        by_name = {name: group.format for group in groups for name in group.names}
        pairs = tied_pairs(model)
        for target, source in pairs.items():
            if by_name.get(target) != by_name.get(source):
                raise ValueError(
                    f"{source} and {target} share one weight; quantize both in one format, or "
                    "skip both"
                )
        if not self.pre_quantized:
            self.formats = {f"{name}.weight": chosen for name, chosen in by_name.items()}
            return model
        for group in groups:
            _replace(model, group)
        for target, source in pairs.items():
            if target not in by_name:
                continue
            forget_tie(model, target)
            # The file has the source only. Until it is there the target has nothing to load.
            module = model.get_submodule(target)
            module._non_persistent_buffers_set.update(BUFFERS)
            self._late_ties.append((target, source))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for target, source in self._late_ties:
            module = model.get_submodule(target)
            module.weight = model.get_submodule(source).weight
            module._non_persistent_buffers_set.difference_update(BUFFERS)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedModule) and module.weight_codes.is_meta:
                raise RuntimeError(f"{name}.weight was not loaded: the checkpoint lacks it")
        declare_component_ties(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a parameter of the float checkpoint is to be quantized on load."""
        return param_name in self.formats

    def get_quantize_ops(self) -> _Quantize:
        """The operation that does it."""
        return _Quantize(self)

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Never cast components: scales and offsets are the weight."""
        targets = getattr(converter, "target_patterns", ())
        if any(target.rpartition(".")[2] in BUFFERS for target in targets):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Components without tied duplicates, and the metadata that makes the file a native one."""
        from ..checkpoint.info import QuantInfo
        from ..checkpoint.native import native_metadata

        state_dict = model.state_dict()
        infos = {}
        for name, weight in unique_weights(model).items():
            infos[name] = QuantInfo(
                bits=weight.bits,
                group_size=weight.group_size,
                scheme=weight.scheme,
                in_features=weight.in_features,
                scale_dtype=weight.scale.dtype,
                dtype=weight.dtype,
            )
        if getattr(model, "_weight_conversions", None):
            # transformers renames tensors of such models as it saves; names would not fit.
            return state_dict, {}
        return state_dict, native_metadata(infos)

    def is_serializable(self) -> bool:
        """Components are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters and biases train; weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """No graph breaks."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model, dtype)
        return model


def unique_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """``name.weight`` -> weight; of tied ones, the one that transformers declares as the source."""
    targets = set()
    for prefix, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        for key in keys if isinstance(keys, dict) else ():
            path = key.rpartition(".")[0]
            targets.add(f"{prefix}.{path}" if prefix else path)
    result: dict[str, QuantizedTensor] = {}
    seen: set[int] = set()
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedModule)]
    modules.sort(key=lambda item: item[0] in targets)
    for name, module in modules:
        module._require_whole(name, "save the model's state_dict by torch.distributed.checkpoint")
        if id(module.weight_codes) not in seen:
            seen.add(id(module.weight_codes))
            result[f"{name}.weight"] = module.weight
    return result

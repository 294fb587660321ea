"""Hugging Face transformers: quantize on load, load and save native checkpoints.

Importing this module registers the quantization method ``"mkrs"``, so that
``from_pretrained(path, quantization_config=MkrsConfig(bits=4))`` quantizes a float checkpoint
tensor by tensor, ``save_pretrained`` writes the components, and ``from_pretrained`` reads them.
Needs the extra ``mergekit_torch[hf]``.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers.core_model_loading import ConversionOps
    from transformers.initialization import no_init_weights
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "mergekit_torch.integrations.transformers needs transformers >= 5.0 "
        f"({error}); install it with: pip install 'mergekit_torch[hf]'"
    ) from error

from ..nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from ..nn.module import BUFFERS
from ..quantize_ import QuantizeConfig, _Group, _plan, _replace, dequantize_
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
        self.quant_method = QUANT_METHOD
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


def _tied_pairs(model: nn.Module) -> dict[str, str]:
    """Module names of tied weights, target -> source, as transformers has them."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in keys.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }


def _forget_tie(model: Any, target: str) -> None:
    model.all_tied_weights_keys.pop(f"{target}.weight", None)


def _declare_component_ties(model: nn.Module) -> None:
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
            module._tied_weights_keys = expanded


class _Quantize(ConversionOps):
    """Quantizes the weights that a float checkpoint has for a model, as they come."""

    def __init__(self, quantizer: "MkrsHfQuantizer") -> None:
        self.quantizer = quantizer

    def convert(
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
        pairs = _tied_pairs(model)
        source = pairs.get(name, name)
        names = [source, *(t for t, s in pairs.items() if s == source)]
        names = [n for n in names if f"{n}.weight" in self.quantizer.formats] or [name]
        _replace(model, _Group(nn.Parameter(tensor, requires_grad=False), names, chosen))
        for tied in names:
            _forget_tie(model, tied)
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
        pairs = _tied_pairs(model)
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
            _forget_tie(model, target)
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
        _declare_component_ties(model)
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
        for name, weight in _unique_weights(model).items():
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


def _unique_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
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
        if id(module.weight_codes) not in seen:
            seen.add(id(module.weight_codes))
            result[f"{name}.weight"] = module.weight
    return result


def attach_(model: Any) -> None:
    """Make a transformers model with quantized modules savable by ``save_pretrained``.

    For models that :func:`mergekit_torch.quantize_` quantized; those of ``from_pretrained`` and
    :func:`load_native` are already.
    """
    config = config_of(model)
    quantizer = MkrsHfQuantizer(config, pre_quantized=True)
    _declare_component_ties(model)
    for target, source in _tied_pairs(model).items():
        if isinstance(model.get_submodule(source), QuantizedModule):
            _forget_tie(model, target)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def save_native(
    model: Any, directory: str | os.PathLike[str], *, max_shard_size: int | str | None = None
) -> list[Path]:
    """Save a transformers model as a native checkpoint, sharded or not, with its config.

    ``save_pretrained`` does so too as long as the weights fit one file; its shards may part
    components of one weight, which only ``from_pretrained`` can put together again.

    Args:
        model: a transformers model, quantized or not.
        directory: made if missing.
        max_shard_size: bytes a file, or like ``"5GB"``; None for one file.

    Returns:
        The weight files written, an index last.

    Raises:
        OSError, ValueError: as :func:`mergekit_torch.checkpoint.save_checkpoint`.
    """
    from ..checkpoint import save_checkpoint

    attach_(model)
    quantized = _unique_weights(model)
    state = model.state_dict()
    parts = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for buffer in BUFFERS
    }
    tensors: dict[str, Any] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        if name in parts:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and seen.setdefault(key, name) != name:
            continue  # tied; transformers ties it again
        tensors[name] = tensor
    tensors.update(quantized)
    files = save_checkpoint(tensors, directory, max_shard_size=max_shard_size)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    return files


def load_native(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Open a native checkpoint directory as a transformers model, without reading the weights.

    The model is built without memory for its weights; quantized modules take the place of the
    layers that the checkpoint has quantized, whatever their formats; tensors are the zero-copy
    views of :func:`mergekit_torch.checkpoint.open_checkpoint` (moved if ``device`` is not the CPU).

    Args:
        path: a directory with ``config.json`` and safetensors files.
        device: where the model goes.
        dtype: what weights dequantize to, and the dtype of the other parameters; by default the
            config's. Unquantized parameters of another dtype are converted, which copies them.

    Returns:
        The model (of the config's architecture) in eval mode.

    Raises:
        FileNotFoundError: no such directory or no ``config.json`` in it.
        ValueError: a checkpoint that does not fit the model; the message lists the names.
        mergekit_torch.checkpoint.CheckpointError: a damaged checkpoint.
    """
    from ..checkpoint import open_checkpoint

    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} must be a directory with a config.json")
    config = transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _empty_model(config, dtype)
    dtype = model.dtype if dtype is None else dtype
    checkpoint = open_checkpoint(directory)
    _fill(model, checkpoint, torch.device(device), dtype)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    attach_(model)
    return model.eval()


def _empty_model(config: Any, dtype: torch.dtype | None) -> Any:
    """The config's architecture with parameters on the meta device and buffers in place."""
    from accelerate import init_empty_weights

    name = (config.architectures or [None])[0]
    if name is None:
        factory = transformers.AutoModelForCausalLM
    else:
        factory = getattr(transformers, name, None)
        if factory is None:
            raise ValueError(f"architecture {name!r} is not one of transformers {transformers.__version__}")
    with no_init_weights(), init_empty_weights(include_buffers=False):
        build = getattr(factory, "_from_config", None) or factory.from_config
        return build(config, **({} if dtype is None else {"dtype": dtype}))


def _fill(model: Any, checkpoint: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Put the checkpoint's tensors into ``model`` and tie what is tied."""
    pairs = _tied_pairs(model)
    names = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    names.update(dict.fromkeys(model.state_dict()))
    used, missing = set(), []
    placed: dict[str, Any] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        stored = name
        if name not in checkpoint and attribute == "weight" and owner in pairs:
            stored = f"{pairs[owner]}.weight"
        if stored not in checkpoint:
            missing.append(name)
            continue
        used.add(stored)
        tensor = placed.get(stored)
        if tensor is None:
            tensor = placed[stored] = _moved(checkpoint[stored], device, dtype)
        _assign(model, owner, attribute, tensor, name)
    extra = sorted(set(checkpoint) - used)
    if missing or extra:
        raise ValueError(
            f"the checkpoint does not fit {type(model).__name__}: "
            f"it lacks {missing[:8]}{' ...' if len(missing) > 8 else ''}, "
            f"it has beyond {extra[:8]}{' ...' if len(extra) > 8 else ''}"
        )
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device and name not in names:
            owner, _, attribute = name.rpartition(".")
            if not attribute.startswith("weight_"):
                model.get_submodule(owner)._buffers[attribute] = buffer.to(device)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Any:
    tensor = tensor.to(device)
    if isinstance(tensor, QuantizedTensor) or tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor if isinstance(tensor, QuantizedTensor) else nn.Parameter(tensor, False)


def _assign(model: Any, owner: str, attribute: str, tensor: Any, name: str) -> None:
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    if tuple(old.shape) != tuple(tensor.shape):
        raise ValueError(f"{name} must have shape {list(old.shape)}, got {list(tensor.shape)}")
    if not isinstance(tensor, QuantizedTensor):
        if attribute in module._buffers:
            module._buffers[attribute] = tensor.data
        else:
            module._parameters[attribute] = tensor
        return
    new: nn.Module
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        new = QuantizedLinear.from_quantized(tensor, module.bias)
    elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        new = QuantizedEmbedding.from_quantized(tensor, module.padding_idx)
    elif attribute in module._parameters:
        # Its operations run on the quantized tensor, or say which of them cannot.
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        return
    else:
        raise ValueError(f"{name} is quantized in the checkpoint, but {attribute} is a buffer")
    model.set_submodule(owner, new)

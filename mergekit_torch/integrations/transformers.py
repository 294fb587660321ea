"""Hugging Face transformers: quantize on load, load and save native checkpoints.

Importing this module registers the quantization method ``"mkrs"``, so that
``from_pretrained(path, quantization_config=MkrsConfig(bits=4))`` quantizes a float checkpoint
tensor by tensor, ``save_pretrained`` writes the components, and ``from_pretrained`` reads them.
Needs the extra ``mergekit_torch[hf]``.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import StreamedModel, stream
from ..nn import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from ..nn.module import BUFFERS
from ..tensor import QuantizedTensor
from ._hf_quantizer import (
    QUANT_METHOD,
    MkrsConfig,
    MkrsHfQuantizer,
    config_of,
    declare_component_ties,
    forget_tie,
    tied_pairs,
    unique_weights,
)

# After _hf_quantizer, which says what to install if it is missing.
import transformers  # isort: skip
from transformers.initialization import no_init_weights  # isort: skip

__all__ = [
    "QUANT_METHOD",
    "MkrsConfig",
    "MkrsHfQuantizer",
    "attach_",
    "config_of",
    "load_native",
    "save_native",
]


def attach_(model: Any) -> None:
    """Make a transformers model with quantized modules savable by ``save_pretrained``.

    For models that :func:`mergekit_torch.quantize_` quantized; those of ``from_pretrained`` and
    :func:`load_native` are already.
    """
    config = config_of(model)
    quantizer = MkrsHfQuantizer(config, pre_quantized=True)
    declare_component_ties(model)
    for target, source in tied_pairs(model).items():
        if isinstance(model.get_submodule(source), QuantizedModule):
            forget_tie(model, target)
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
    quantized = unique_weights(model)
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
    model = _empty_model(_config_of(directory), dtype)
    dtype = model.dtype if dtype is None else dtype
    checkpoint = open_checkpoint(directory)
    _fill(model, checkpoint, torch.device(device), dtype)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    attach_(model)
    return model.eval()


def stream_native(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    budget: int | str = "1GiB",
) -> StreamedModel:
    """Open a native checkpoint directory as a transformers model whose weights are streamed.

    Like :func:`load_native`, but weights stay in the checkpoint and are read when a module runs;
    at most ``budget`` bytes of them are in memory. See :func:`mergekit_torch.memory.stream`.

    Returns:
        The streamed model, a context manager that closes the checkpoint.

    Raises:
        FileNotFoundError: no such directory or no ``config.json`` in it.
        BudgetError: the budget does not hold the largest module.
        KeyError, ValueError: a checkpoint that does not fit the model.
    """
    directory = Path(path)
    model = _empty_model(_config_of(directory), dtype)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    model.tie_weights()
    return stream(model.eval(), directory, device, budget)


def _config_of(directory: Path) -> Any:
    """The model's configuration, without a word on quantization: the checkpoint knows best."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} must be a directory with a config.json")
    config = transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _empty_model(config: Any, dtype: torch.dtype | None) -> Any:
    """The config's architecture with parameters on the meta device and buffers in place."""
    from accelerate import init_empty_weights

    name = (config.architectures or [None])[0]
    factory: Any
    if name is None:
        factory = transformers.AutoModelForCausalLM
    else:
        factory = getattr(transformers, name, None)
        if factory is None:
            raise ValueError(
                f"architecture {name!r} is not one of transformers {transformers.__version__}"
            )
    with no_init_weights(), init_empty_weights(include_buffers=False):
        build = getattr(factory, "_from_config", None) or factory.from_config
        return build(config, **({} if dtype is None else {"dtype": dtype}))


def _fill(
    model: Any, checkpoint: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Put the checkpoint's tensors into ``model`` and tie what is tied."""
    pairs = tied_pairs(model)
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
    # Buffers that the model computes were stored with it by older releases.
    computed = {name for name, _ in model.named_buffers()}
    extra = sorted(set(checkpoint) - used - computed)
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

"""GGUF checkpoints as native ones, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .gguf_names import (
    ROPE_FACTORS,
    gguf_to_hf_name,
    head_counts,
    hf_config,
    needs_rope_order,
    rope_row_order,
)
from .info import TensorInfo
from .opening import open_checkpoint
from .reader import Checkpoint
from .save import save_checkpoint
from .writer import TensorSpec

__all__ = ["ConvertedCheckpoint", "convert_gguf"]


class ConvertedCheckpoint:
    """A GGUF checkpoint seen under the names and in the row order of the native one.

    Nothing is read until :meth:`items` or :meth:`tensor` is asked for a tensor, and one tensor is
    in memory at a time. The values are the file's, exactly.

    Args:
        checkpoint: an opened GGUF file.
        names: ``"hf"`` for Hugging Face names (rows of llama's q and k are put back into
            transformers' order), ``"gguf"`` to keep names and rows as they are.

    Attributes:
        specs: new name -> :class:`TensorSpec`, in the file's order.
        source_names: new name -> name in the file.

    Raises:
        ValueError: not a GGUF checkpoint, or other ``names``.
        NotImplementedError: an architecture, tensor or tensor type that cannot be converted.
    """

    def __init__(self, checkpoint: Checkpoint, *, names: str = "hf") -> None:
        if checkpoint.format != "gguf":
            raise ValueError(
                f"{checkpoint.path}: must be a GGUF checkpoint to be converted, got "
                f"{checkpoint.format}"
            )
        if names not in ("hf", "gguf"):
            raise ValueError(f"names must be 'hf' or 'gguf', got {names!r}")
        self.checkpoint = checkpoint
        self._hf = names == "hf"
        self._architecture = str(checkpoint.metadata.get("general.architecture"))
        self.specs: dict[str, TensorSpec] = {}
        self.source_names: dict[str, str] = {}
        for source in checkpoint:
            if self._hf and source == ROPE_FACTORS:
                continue  # becomes rope_scaling in the configuration
            name = gguf_to_hf_name(source, self._architecture) if self._hf else source
            info = checkpoint.info(source)
            if info.dtype is None:
                checkpoint[source]  # raises, naming the type
                raise AssertionError(f"{source} has no dtype and was read")
            self.source_names[name] = source
            self.specs[name] = TensorSpec(info.dtype, info.shape, info.quantization)
        # Before any tensor is written: a model that cannot be described is not converted halfway.
        self.config: dict[str, Any] | None = self._config() if self._hf else None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that the native checkpoint will have."""
        return sum(spec.nbytes for spec in self.specs.values())

    def info(self, name: str) -> TensorInfo:
        """The source's :class:`TensorInfo` under the new name."""
        return replace(self.checkpoint.info(self.source_names[name]), name=name)

    def tensor(self, name: str) -> Tensor | dict[str, Tensor]:
        """One tensor; a quantized one as its components (see :meth:`Checkpoint.components`)."""
        source = self.source_names[name]
        order = self._row_order(source)
        if self.specs[name].quantization is None:
            tensor: Tensor = self.checkpoint[source]
            return tensor if order is None else tensor[order]
        parts, _ = self.checkpoint.components(source)
        if order is None:
            return parts
        return {part: component.index_select(-2, order) for part, component in parts.items()}

    def items(self) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
        """All tensors in the file's order, one at a time."""
        for name in self.specs:
            yield name, self.tensor(name)

    def write_config(self, directory: Path) -> Path:
        """Write the model's ``config.json``; returns its path.

        Raises:
            ValueError: ``names="gguf"``, which has no Hugging Face configuration.
        """
        if self.config is None:
            raise ValueError("only names='hf' has a config.json, got names='gguf'")
        config = directory / "config.json"
        temporary = directory / ".config.json.tmp"
        temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, config)
        return config

    def _row_order(self, source: str) -> Tensor | None:
        which = needs_rope_order(source, self._architecture) if self._hf else None
        if which is None:
            return None
        heads, kv_heads = head_counts(self.checkpoint.metadata)
        shape = self.checkpoint.info(source).shape
        rows = shape[0] if source.endswith(".bias") else shape[-2]
        return rope_row_order(rows, heads if which == "q" else kv_heads)

    def _config(self) -> dict[str, Any]:
        embedding = self.specs.get("model.embed_tokens.weight")
        factors = self.checkpoint.get(ROPE_FACTORS, None)
        config = hf_config(
            self.checkpoint.metadata,
            tied="lm_head.weight" not in self.specs,
            vocab_size=embedding.shape[0] if embedding else None,
            attention_bias=any(name.endswith("q_proj.bias") for name in self.specs),
            rope_factors=factors,
        )
        for source in self.source_names.values():
            self._row_order(source)  # raises if heads and rows do not fit
        return config


def convert_gguf(
    source: str | os.PathLike[str] | Checkpoint,
    path: str | os.PathLike[str],
    *,
    names: str = "hf",
    max_shard_size: int | str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Path]:
    """Convert a GGUF checkpoint into a native safetensors one, without loss.

    Memory: the largest tensor, as components.

    Args:
        source: a GGUF path or an opened checkpoint.
        path: the directory to write, or a ``.safetensors`` file.
        names: ``"hf"`` or ``"gguf"``, see :class:`ConvertedCheckpoint`. With ``"hf"`` a directory
            gets ``config.json`` as well.
        max_shard_size: as in :func:`save_checkpoint`.
        progress: called with name and bytes after every tensor.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, CheckpointError, NotImplementedError, OSError: as opening, converting and
            writing do; nothing is left half written.
    """
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    try:
        converted = ConvertedCheckpoint(opened, names=names)
        written = save_checkpoint(
            converted.items(),
            path,
            max_shard_size=max_shard_size,
            specs=converted.specs,
            progress=progress,
        )
        if converted.config is not None and Path(path).is_dir():
            written.append(converted.write_config(Path(path)))
    finally:
        if opened is not source:
            opened.close()
    return written

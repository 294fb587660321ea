"""Checkpoints that need not fit in memory: reading, writing and converting them.

Reading: :func:`open_checkpoint` for safetensors (single file or shards) and GGUF. Writing:
:func:`save_checkpoint`, :class:`CheckpointWriter`. Converting: :func:`convert_gguf`.
"""

from .convert import ConvertedCheckpoint, convert_gguf
from .errors import CheckpointError
from .gguf_names import gguf_to_hf_name, hf_config, hf_to_gguf_name
from .info import QuantInfo, TensorInfo
from .opening import open_checkpoint
from .reader import Checkpoint, TensorSlice
from .save import ShardedWriter, save_checkpoint
from .writer import CheckpointWriter, TensorSpec

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "ConvertedCheckpoint",
    "QuantInfo",
    "ShardedWriter",
    "TensorInfo",
    "TensorSlice",
    "TensorSpec",
    "convert_gguf",
    "gguf_to_hf_name",
    "hf_config",
    "hf_to_gguf_name",
    "open_checkpoint",
    "save_checkpoint",
]

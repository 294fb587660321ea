"""Quantized models over several devices and processes, on torch.distributed.

:func:`shard` takes a rank's part of a tensor; :func:`tensor_parallel_`, :class:`ColwiseParallel`
and :class:`RowwiseParallel` split modules; :func:`load_sharded_` fills them from a checkpoint.
:func:`shard_checkpoint` and :func:`merge_shards` write and join one file per rank; :func:`place`
spreads a model over the devices of one process. ``transformers.load_parallel`` does it all for a
transformers model.
"""

from . import dispatch  # noqa: F401  registers itself
from .files import merge_shards, plan_shards, shard_checkpoint
from .loading import LoadReport, load_sharded_
from .modules import ParallelModule, Part
from .partition import column_unit, shard, split_ranges
from .place import PlacedModel, place
from .source import open_parts
from .styles import ColwiseParallel, RowwiseParallel
from .tensor_parallel import llama_plan, tensor_parallel_

__all__ = [
    "ColwiseParallel",
    "LoadReport",
    "ParallelModule",
    "Part",
    "PlacedModel",
    "RowwiseParallel",
    "column_unit",
    "llama_plan",
    "load_sharded_",
    "merge_shards",
    "open_parts",
    "place",
    "plan_shards",
    "shard",
    "shard_checkpoint",
    "split_ranges",
    "tensor_parallel_",
]

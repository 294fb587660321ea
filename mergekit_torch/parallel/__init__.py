"""Quantized models over several devices and processes, on torch.distributed.

:func:`shard` takes a rank's part of a tensor; :func:`tensor_parallel_`, :class:`ColwiseParallel`
and :class:`RowwiseParallel` split modules; :func:`load_sharded_` fills them from a checkpoint.
"""

from .loading import LoadReport, load_sharded_
from .modules import ParallelModule, Part
from .partition import column_unit, shard, split_ranges
from .source import open_parts
from .styles import ColwiseParallel, RowwiseParallel
from .tensor_parallel import llama_plan, tensor_parallel_

__all__ = [
    "ColwiseParallel",
    "LoadReport",
    "ParallelModule",
    "Part",
    "RowwiseParallel",
    "column_unit",
    "llama_plan",
    "load_sharded_",
    "open_parts",
    "shard",
    "split_ranges",
    "tensor_parallel_",
]

"""Modules whose weights are quantized: ``QuantizedLinear`` and ``QuantizedEmbedding``."""

from .embedding import QuantizedEmbedding
from .linear import QuantizedLinear
from .module import QuantizedModule

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedModule"]

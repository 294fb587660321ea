"""``QuantizedTensor``: a tensor that is a view onto quantized components.

``quantized_tensor`` holds the class; the other modules say what torch operations do with it:
``views`` (slices and shapes), ``copies`` (devices, dtypes, copies), ``products`` (matmul and
embedding through the fused ops), ``elementwise`` and ``reductions``.
"""

from . import copies, elementwise, products, reductions, views
from .quantized_tensor import QuantizedTensor

__all__ = ["QuantizedTensor", "copies", "elementwise", "products", "reductions", "views"]

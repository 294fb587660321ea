"""Functions over quantized components: ``torch.ops.mkrs.*`` with checks.

Each module holds one op: the public function, its fake (shapes for ``torch.compile`` and export),
its gradient, and ``reference``, the op in plain torch. Schemas stand in ``csrc/ops.cpp``.
"""

from .._extension import load as _load

_load()

from .dequant_embedding import dequant_embedding
from .dequant_matmul import dequant_matmul
from .dequant_matmul_many import dequant_matmul_many
from .dequant_matmul_t import dequant_matmul_t
from .dequant_reduce import dequant_reduce
from .dequantize import dequantize
from .quantize import quantize

__all__ = [
    "dequant_embedding",
    "dequant_matmul",
    "dequant_matmul_many",
    "dequant_matmul_t",
    "dequant_reduce",
    "dequantize",
    "quantize",
]

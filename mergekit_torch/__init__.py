"""Low-bit weights and out-of-core checkpoints for PyTorch.

Importing this package registers the ops ``torch.ops.mkrs.*``.
"""

from . import ops, verify
from .checkpoint import open_checkpoint, save_checkpoint
from .format import FORMAT_VERSION, QuantFormat
from .nn import QuantizedEmbedding, QuantizedLinear
from .quantize_ import QuantizeReport, dequantize_, quantize_
from .quantize_config import QuantizeConfig
from .tensor import QuantizedTensor
from .version import __version__

verify.install_if_asked()

__all__ = [
    "FORMAT_VERSION",
    "QuantFormat",
    "QuantizeConfig",
    "QuantizeReport",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
    "__version__",
    "dequantize_",
    "open_checkpoint",
    "ops",
    "quantize_",
    "save_checkpoint",
]

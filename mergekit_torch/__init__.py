"""Low-bit weights and out-of-core checkpoints for PyTorch.

Importing this package registers the ops ``torch.ops.mkrs.*``.
"""

from . import ops
from .format import FORMAT_VERSION, QuantFormat
from .version import __version__

__all__ = ["FORMAT_VERSION", "QuantFormat", "__version__", "ops"]

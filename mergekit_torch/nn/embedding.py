"""``QuantizedEmbedding``: ``nn.Embedding`` on a low-bit table."""

import torch
from torch import Tensor, nn

from ..format import Scheme
from ..tensor import QuantizedTensor
from .linear import _require_matrix
from .module import QuantizedModule

_embedding = torch.ops.mkrs.dequant_embedding.default


class QuantizedEmbedding(QuantizedModule):
    """Rows of a quantized table; only those that are asked for are read.

    Takes int64 or int32 indices of any shape and returns ``[*indices.shape, embedding_dim]`` of
    the module's dtype. The table is frozen. Starts as zeros: load a state dict, or use
    :meth:`from_embedding`.

    Args:
        num_embeddings: N, the number of rows.
        embedding_dim: K, the length of a row.
        padding_idx: the row for padding, as in ``nn.Embedding``; it is only remembered, since
            nothing here gets a gradient.
        bits, group_size, scheme, scale_dtype, device, dtype: as for ``QuantizedLinear``.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: a format that is not offered, or a padding_idx that is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int = 4,
        group_size: int = 64,
        scheme: Scheme = "affine",
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx must be in [{-num_embeddings}, {num_embeddings}), got {padding_idx}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self._set_format(
            num_embeddings, embedding_dim, bits, group_size, scheme, scale_dtype, device, dtype
        )

    def _weight_size(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor, padding_idx: int | None = None
    ) -> "QuantizedEmbedding":
        """A module on ``weight``'s own components (shared, not copied).

        Args:
            weight: ``[num_embeddings, embedding_dim]``.
            padding_idx: see the class.

        Raises:
            TypeError: ``weight`` is not a QuantizedTensor.
            ValueError: it is not a matrix.
        """
        _require_matrix(weight)
        rows, columns = weight.shape
        module = cls(
            rows,
            columns,
            padding_idx,
            bits=weight.bits,
            group_size=weight.group_size,
            scheme=weight.scheme,
            device="meta",
            dtype=weight.dtype,
        )
        module.weight = weight
        return module

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        bits: int = 4,
        group_size: int = 64,
        scheme: Scheme = "affine",
        scale_dtype: torch.dtype | None = None,
    ) -> "QuantizedEmbedding":
        """Quantize ``embedding``'s table.

        Raises:
            TypeError: a table of a dtype that is not offered.
            ValueError: a format that is not offered, a table with inf or NaN, or ``max_norm``,
                which rescales rows in the forward pass.
        """
        if embedding.max_norm is not None:
            raise ValueError(
                f"an embedding with max_norm={embedding.max_norm} changes its weight in forward "
                "and cannot be quantized"
            )
        weight = QuantizedTensor.from_float(
            embedding.weight.detach(), bits, group_size, scheme, scale_dtype
        )
        module = cls.from_quantized(weight, embedding.padding_idx)
        return module.train(embedding.training)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A dense ``nn.Embedding`` of ``dtype`` (by default the module's)."""
        embedding = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        embedding.weight = nn.Parameter(self.weight.dequantize(dtype))
        return embedding.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape to ``[*input.shape, embedding_dim]``."""
        buffers = self._buffers
        result: Tensor = _embedding(
            input,
            buffers["weight_codes"],
            buffers["weight_scale"],
            buffers["weight_zero_point"],
            buffers["weight_offset"],
            self.bits,
            self.group_size,
            self.embedding_dim,
            self.dtype,
        )
        return result

    def extra_repr(self) -> str:
        """Sizes and format."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format_repr()}"

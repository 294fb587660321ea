"""What a checkpoint says about its tensors, and the dtypes that files name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_torch.format import code_bytes, num_groups

__all__ = ["SAFETENSORS_DTYPES", "QuantInfo", "TensorInfo", "dtype_code"]

#: Bits per element of every dtype the safetensors format defines. Files are checked against these
#: sizes whether or not torch has the dtype.
SAFETENSORS_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

#: The dtypes above that are a torch dtype with one element per logical element.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}

_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        TypeError: the format has no such dtype.
    """
    code = _CODES.get(dtype)
    if code is None:
        raise TypeError(
            f"safetensors files cannot hold {dtype}; they hold {', '.join(_CODES.values())}"
        )
    return code


@dataclass(frozen=True)
class QuantInfo:
    """The native quantization of one weight; see ``docs/format.md``.

    ``bits`` a code, ``group_size`` weights a scale, ``scheme`` one of symmetric, asymmetric,
    affine, ``in_features`` the length K of a row, ``scale_dtype`` of scale and offset, and
    ``dtype``, the dtype that the weight dequantizes to unless another is asked for.
    """

    bits: int
    group_size: int
    scheme: str
    in_features: int
    scale_dtype: torch.dtype = torch.float16
    dtype: torch.dtype = torch.float32

    @property
    def row_bytes(self) -> int:
        """Bytes of codes a row."""
        return code_bytes(self.in_features, self.bits)

    @property
    def groups(self) -> int:
        """Groups, so scales, a row."""
        return num_groups(self.in_features, self.group_size)

    def component_shapes(
        self, shape: tuple[int, ...]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each component of a weight of logical ``shape`` ``[..., N, K]``."""
        rows = shape[:-1]
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (*rows, self.row_bytes)),
            "scale": (self.scale_dtype, (*rows, self.groups)),
        }
        if self.scheme == "asymmetric":
            parts["zero_point"] = (torch.uint8, (*rows, self.groups))
        elif self.scheme == "affine":
            parts["offset"] = (self.scale_dtype, (*rows, self.groups))
        return parts


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading its data.

    Attributes:
        name: the name it is listed under.
        kind: the file's own word for the type: a safetensors dtype (``"F32"``), a GGUF type
            (``"Q4_K"``), or ``"quantized"`` for natively quantized weights.
        dtype: the torch dtype of ``checkpoint[name]`` (of its dequantized form if it is quantized);
            None if torch has no such type.
        shape: logical shape, in torch's order.
        nbytes: bytes stored in the file, all components together.
        file: the file that holds it.
        offset: where its data starts in the file, in bytes (its codes, if it is quantized
            natively).
        quantization: parameters of the native form, None for a plain tensor.
        parts: the stored tensors that make up a natively quantized weight.
    """

    name: str
    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    quantization: QuantInfo | None = None
    parts: tuple[TensorInfo, ...] = ()

    @property
    def numel(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales included; 0.0 for an empty tensor."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

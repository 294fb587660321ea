"""How natively quantized weights are laid over the plain tensors of safetensors files.

``docs/format.md`` is the specification; this is its one implementation in Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from mergekit_torch.format import BITS, FORMAT_VERSION, GROUP_SIZES, SCHEMES

from .errors import CheckpointError
from .info import SAFETENSORS_DTYPES, QuantInfo
from .safetensors_header import StoredTensor, load_json

__all__ = ["native_metadata", "parse_native"]

VERSION_KEY = "mkrs.format_version"
QUANTIZED_KEY = "mkrs.quantized"
#: Every metadata key with this prefix belongs to the format.
PREFIX = "mkrs."

_SCALE_CODES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_INT = 2**63 - 1
_REQUIRED = {"bits", "group_size", "scheme", "in_features"}


def native_metadata(quantized: Mapping[str, QuantInfo]) -> dict[str, str]:
    """The ``__metadata__`` entries of a file that holds these weights; empty if there are none."""
    if not quantized:
        return {}
    entries: dict[str, dict[str, Any]] = {}
    for name, info in quantized.items():
        entries[name] = {
            "bits": info.bits,
            "group_size": info.group_size,
            "scheme": info.scheme,
            "in_features": info.in_features,
            "dtype": str(info.dtype).removeprefix("torch."),
        }
    return {
        VERSION_KEY: str(FORMAT_VERSION),
        QUANTIZED_KEY: json.dumps(entries, separators=(",", ":")),
    }


def check_quant_info(info: QuantInfo, fail: Callable[[str], NoReturn]) -> None:
    """Check the values that a writer is about to store or a reader has found."""
    if type(info.bits) is not int or info.bits not in BITS:
        fail(f"bits must be 8, 4 or 2, got {info.bits!r:.80}")
    if info.scheme not in SCHEMES:
        fail(f"scheme must be symmetric, asymmetric or affine, got {info.scheme!r:.80}")
    if type(info.in_features) is not int or not 0 <= info.in_features <= _MAX_INT // 8:
        fail(f"in_features must be a number from 0 to 2**60, got {info.in_features!r:.80}")
    size = info.group_size
    if (
        type(size) is not int
        or not 0 < size <= _MAX_INT
        or (size not in GROUP_SIZES and size < info.in_features)
    ):
        fail(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))} or at least "
            f"in_features ({info.in_features}), got {size!r:.80}"
        )
    if info.scale_dtype not in _SCALE_CODES.values():
        fail(f"scale must be float16, bfloat16 or float32, got {info.scale_dtype}")
    if info.dtype not in _FLOATS.values():
        fail(f"dtype must be float32, float16 or bfloat16, got {info.dtype}")


def parse_native(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], path: object
) -> dict[str, tuple[QuantInfo, tuple[int, ...], dict[str, str]]]:
    """The natively quantized weights of one file.

    Returns, for each logical name, its parameters, its logical shape, and component -> stored name.

    Raises:
        CheckpointError: a newer format version, or metadata that does not fit the stored tensors.
    """

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: {what}")

    version = metadata.get(VERSION_KEY)
    text = metadata.get(QUANTIZED_KEY)
    if version is None:
        if text is not None:
            fail(f"metadata has {QUANTIZED_KEY} and must have {VERSION_KEY} as well")
        return {}
    if not (version.isascii() and version.isdigit() and len(version) <= 9) or int(version) < 1:
        fail(f"{VERSION_KEY} must be a version number, got {version!r:.80}")
    if int(version) > FORMAT_VERSION:
        fail(
            f"the file has storage format version {int(version)}, and this version of "
            f"mergekit_torch reads up to version {FORMAT_VERSION}; upgrade mergekit_torch"
        )
    if text is None:
        return {}

    def fail_json(what: str) -> NoReturn:
        fail(f"metadata {QUANTIZED_KEY}: {what}")

    entries = load_json(text, fail_json)
    if not isinstance(entries, dict):
        fail_json(f"must be a JSON object, got {type(entries).__name__}")
    result: dict[str, tuple[QuantInfo, tuple[int, ...], dict[str, str]]] = {}
    claimed: dict[str, str] = {}
    known: dict[QuantInfo, QuantInfo] = {}  # a model has few distinct ones
    for name, entry in entries.items():
        result[name] = _entry(name, entry, tensors, path, known)
        for part in result[name][2].values():
            if part in claimed:
                fail(f"tensor {part!r} belongs to both {claimed[part]!r} and {name!r}")
            claimed[part] = name
    for name in result:
        if name in tensors and name not in claimed:
            fail(f"tensor {name!r} is stored both quantized and plain")
        if name in claimed:
            fail(f"the quantized tensor {name!r} is also a component of {claimed[name]!r}")
    return result


def _entry(
    name: str,
    entry: Any,
    tensors: Mapping[str, StoredTensor],
    path: object,
    known: dict[QuantInfo, QuantInfo],
) -> tuple[QuantInfo, tuple[int, ...], dict[str, str]]:
    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: quantized tensor {name!r}: {what}")

    if not isinstance(entry, dict):
        fail("must be described by bits, group_size, scheme and in_features")
    missing = _REQUIRED - entry.keys()
    if missing:
        fail(f"its description lacks {', '.join(sorted(missing))}")

    def stored(part: str) -> StoredTensor:
        tensor = tensors.get(f"{name}_{part}")
        if tensor is None:
            fail(f"its component {name + '_' + part!r} is not in the file")
        return tensor

    codes, scale = stored("codes"), stored("scale")
    dtype = entry.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype not in _FLOATS:
        fail(f"dtype must be float32, float16 or bfloat16, got {dtype!r:.80}")
    if scale.code not in _SCALE_CODES:
        fail(f"{name}_scale must be F16, BF16 or F32, got {scale.code}")
    scheme = entry["scheme"]
    info = QuantInfo(
        bits=entry["bits"],
        group_size=entry["group_size"],
        scheme=scheme if isinstance(scheme, str) else repr(scheme)[:80],
        in_features=entry["in_features"],
        scale_dtype=SAFETENSORS_DTYPES[scale.code],
        dtype=_FLOATS[dtype],
    )
    check_quant_info(info, fail)
    info = known.setdefault(info, info)
    if len(codes.shape) < 2:
        fail(f"codes must have at least 2 dimensions [..., N, bytes], got {list(codes.shape)}")
    shape = (*codes.shape[:-1], info.in_features)
    expected = info.component_shapes(shape)
    for part, (part_dtype, part_shape) in expected.items():
        found = stored(part)
        if SAFETENSORS_DTYPES.get(found.code) != part_dtype:
            fail(f"{name}_{part} must be {part_dtype}, got {found.code}")
        if found.shape != part_shape:
            fail(f"{name}_{part} must have shape {list(part_shape)}, got {list(found.shape)}")
    for part in ("zero_point", "offset"):
        if part not in expected and f"{name}_{part}" in tensors:
            fail(f"scheme {info.scheme} has no {part}, and the file holds {name}_{part}")
    return info, shape, {part: f"{name}_{part}" for part in expected}

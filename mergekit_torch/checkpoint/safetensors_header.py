"""Reading and building safetensors headers.

Layout: u64 length of the header (little endian), the header as JSON
``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``, then the data, to which
the offsets are relative. As in the reference implementation, tensors must cover the data without
holes or overlaps, the header starts with ``{`` and is at most 100 MB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from .errors import CheckpointError
from .info import SAFETENSORS_BITS

__all__ = [
    "MAX_HEADER",
    "StoredTensor",
    "build_header",
    "header_length",
    "load_json",
    "parse_header",
]

#: The reference implementation's limit on the header, in bytes.
MAX_HEADER = 100_000_000
#: Data starts at a multiple of this in files that we write.
DATA_ALIGNMENT = 64
_MAX_INT = 2**63 - 1
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class StoredTensor(NamedTuple):
    """A tensor as a file stores it; ``begin`` and ``end`` are byte positions in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(prefix: bytes, file_size: int, path: object) -> int:
    """Length of the JSON header, checked against the file, from the file's first 8 bytes."""
    if file_size < 8 or len(prefix) < 8:
        raise CheckpointError(
            f"{path}: a safetensors file has at least 8 bytes, got {min(file_size, len(prefix))}"
        )
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header must be at most {MAX_HEADER} bytes, got {length}; "
            "is this a safetensors file?"
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"{path}: the header must end inside the file of {file_size} bytes, got a header of "
            f"{length} bytes; the file is truncated or no safetensors file"
        )
    if length < 2:
        raise CheckpointError(f"{path}: the header must be a JSON object, got {length} bytes")
    return length


def load_json(data: bytes | str, fail: Callable[[str], NoReturn]) -> Any:
    """JSON without repeated keys, NaN or infinity; ``fail`` raises with what is wrong."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    fail(f"the name {key!r} appears twice")
                seen.add(key)
        return result

    def constant(text: str) -> None:
        fail(f"numbers must be finite, got {text}")

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        fail(f"the JSON must be UTF-8, got {error}")
    except RecursionError:
        fail("the JSON is nested too deeply")
    except ValueError as error:
        fail(f"the JSON does not parse: {error}")


def parse_header(
    header: bytes, file_size: int, path: object
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a header that :func:`header_length` has measured.

    Everything is checked here, before anything is mapped: after it, every ``begin``/``end`` lies in
    the file and fits the dtype and shape.
    """

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: safetensors header: {what}")

    if not header.startswith(b"{"):
        fail(f"must start with '{{', got {header[:1]!r}")
    entries = load_json(header, fail)
    if not isinstance(entries, dict):
        fail(f"must be a JSON object, got {type(entries).__name__}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail("__metadata__ must map strings to strings")
    data_start = 8 + len(header)
    tensors = {
        name: _entry(name, entry, data_start, file_size, path) for name, entry in entries.items()
    }
    position = data_start
    previous = "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < position:
            fail(f"tensor {name!r} overlaps {previous!r}")
        if tensor.begin > position:
            fail(f"{tensor.begin - position} bytes before tensor {name!r} belong to no tensor")
        position, previous = tensor.end, name
    if position != file_size:
        fail(
            f"tensors must cover the data to the end of the file at {file_size} bytes, "
            f"got an end at {position}"
        )
    return tensors, metadata


def _entry(name: str, entry: Any, data_start: int, file_size: int, path: object) -> StoredTensor:
    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        fail("must be described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in SAFETENSORS_BITS:
        fail(f"dtype must be one of {', '.join(SAFETENSORS_BITS)}, got {_short(code)}")
    if not isinstance(shape, list):
        fail(f"shape must be a list of sizes, got {_short(shape)}")
    if len(shape) > 64:
        fail(f"a tensor has at most 64 dimensions, got {len(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        fail(f"data_offsets must be two numbers, got {_short(offsets)}")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        fail(f"data_offsets must be two rising numbers from 0 up, got {_short(offsets)}")
    if end > file_size - data_start:
        fail(
            f"its data must end inside the file's {file_size - data_start} bytes of data, "
            f"got {_short(end)}; the file is truncated or the header is wrong"
        )
    bits = SAFETENSORS_BITS[code]
    described = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_INT:
            fail(f"shape must hold sizes from 0 to 2**63-1, got {_short(shape)}")
        bits *= size
        described *= size or 1
    # Sizes that torch could not even describe: a zero elsewhere in the shape does not excuse them.
    if described > _MAX_INT:
        fail(f"the number of elements must fit in 63 bits, got shape {_short(shape)}")
    if bits % 8 or bits // 8 != end - begin:
        fail(f"{code} of shape {_short(shape)} takes {bits / 8:g} bytes, got {end - begin}")
    return StoredTensor(code, tuple(shape), data_start + begin, data_start + end)


def _short(value: Any) -> str:
    """A repr that garbage in a file cannot make long."""
    if type(value) is int and value.bit_length() > 80:
        return "a number of more than 80 bits"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """The first bytes of a file, where each tensor goes, and the size of the file.

    ``tensors`` gives name, dtype code, shape and bytes. The header is padded with spaces so that
    the data starts at a multiple of 64. The format allows no holes between tensors, so those whose
    length is a multiple of 64 come first (all of them and the next then start at one), the others
    by falling size of element, which keeps each aligned to its own elements.
    """
    ordered = sorted(
        tensors, key=lambda entry: (entry[3] % DATA_ALIGNMENT != 0, -SAFETENSORS_BITS[entry[1]])
    )
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    spans = {}
    for name, code, shape, nbytes in ordered:
        entries[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        spans[name] = (code, shape, position, position + nbytes)
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"the header of a safetensors file must be at most {MAX_HEADER} bytes, "
            f"got {len(text)}; write shards"
        )
    start = 8 + len(text)
    stored = {
        name: StoredTensor(code, shape, start + begin, start + end)
        for name, (code, shape, begin, end) in spans.items()
    }
    return struct.pack("<Q", len(text)) + text, stored, start + position

"""Reading GGUF headers (versions 2 and 3, little endian).

Layout: ``"GGUF"``, u32 version, u64 number of tensors, u64 number of key-value pairs, the pairs,
the tensor descriptions, padding to ``general.alignment`` (32 unless given), the data. Source:
ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from .errors import CheckpointError

__all__ = ["GGML_TYPES", "GgufHeader", "GgufMetadata", "GgufTensor", "parse_gguf"]

#: GGUF type number -> name, weights a block, bytes a block.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Value types: number -> struct code. 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # ggml's own limit
_MAX_NESTING = 4
# Arrays up to this many bytes are decoded while parsing; the tokenizer's wait until asked for.
_EAGER_BYTES = 1024
_MAX_INT = 2**63 - 1

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


class GgufTensor(NamedTuple):
    """A tensor as the file stores it: shape in torch's order, ``begin``/``end`` in the file."""

    type: int
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def type_name(self) -> str:
        """``"Q4_K"``, or ``"type 99"`` for a number without a known name."""
        known = GGML_TYPES.get(self.type)
        return known[0] if known else f"type {self.type}"


class _LazyArray(NamedTuple):
    """An array that has been measured and not decoded."""

    element: int
    length: int
    start: int


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file; long arrays are decoded when first asked for.

    Values are int, float, bool, str or lists of them. Bytes of a string that are not UTF-8 come as
    surrogate escapes, so nothing is lost.
    """

    def __init__(self, values: dict[str, Any], source: Callable[[], Any], path: object) -> None:
        self._values = values
        self._source = source
        self._path = path

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _LazyArray):
            reader = _Reader(self._source(), self._path)
            reader.position = value.start
            value = reader.elements(value.element, value.length, 1)
            self._values[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int | None:
        """Number of elements of an array, without decoding it; None for other values."""
        value = self._values[key]
        if isinstance(value, _LazyArray):
            return value.length
        return len(value) if isinstance(value, list) else None

    def __repr__(self) -> str:
        return f"GgufMetadata({len(self)} keys)"


class GgufHeader(NamedTuple):
    """A parsed header."""

    version: int
    alignment: int
    metadata: GgufMetadata
    tensors: dict[str, GgufTensor]


class _Reader:
    """A cursor over the file that cannot leave it."""

    def __init__(self, data: Any, path: object) -> None:
        self.data = data
        self.end = len(data)
        self.path = path
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: GGUF header: {what}")

    def require(self, count: int, what: str) -> None:
        if count > self.end - self.position:
            self.fail(
                f"{what} at byte {self.position} needs {count} bytes and the file has "
                f"{self.end - self.position} left; it is truncated or garbage"
            )

    def u32(self, what: str) -> int:
        self.require(4, what)
        (value,) = _u32(self.data, self.position)
        self.position += 4
        return value

    def u64(self, what: str) -> int:
        self.require(8, what)
        (value,) = _u64(self.data, self.position)
        self.position += 8
        return value

    def string(self, what: str, errors: str = "surrogateescape") -> str:
        length = self.u64(what)
        self.require(length, what)
        raw = bytes(self.data[self.position : self.position + length])
        self.position += length
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            self.fail(f"{what} must be UTF-8, got {raw[:40]!r}")

    def name(self, what: str) -> str:
        """A string that serves as a key: strictly UTF-8, within the format's 65535 bytes."""
        self.require(8, what)
        (length,) = _u64(self.data, self.position)
        if not 1 <= length <= 65535:
            self.fail(f"{what} must be 1 to 65535 bytes long, got {length}")
        return self.string(what, "strict")

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        code = _SCALARS.get(kind)
        if code is None:
            self.fail(f"{what} must have a value type from 0 to 12, got {kind}")
        size = struct.calcsize("<" + code)
        self.require(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value

    def array(self, what: str) -> Any:
        """A short array decoded, a long one measured and left for later."""
        element, count = self.u32(what), self.u64(what)
        start = self.position
        self.skip(element, count, what, 1)
        if self.position - start > _EAGER_BYTES:
            return _LazyArray(element, count, start)
        self.position = start
        return self.elements(element, count, 1)

    def skip(self, element: int, count: int, what: str, depth: int) -> None:
        """Step over an array, checking that all of it lies in the file."""
        if element in _SCALARS:
            size = count * struct.calcsize("<" + _SCALARS[element])
            self.require(size, what)
            self.position += size
        elif element == _STRING:
            self.require(8 * count, what)  # every string has at least its length
            # The hot loop of opening: a tokenizer has hundreds of thousands of strings.
            data, position = self.data, self.position
            try:
                for _ in range(count):
                    position += 8 + _u64(data, position)[0]
            except (struct.error, OverflowError):
                position = self.end + 1
            if position > self.end:
                self.fail(f"a string of {what} ends outside the file; it is truncated or garbage")
            self.position = position
        elif element == _ARRAY:
            if depth >= _MAX_NESTING:
                self.fail(f"{what} nests arrays more than {_MAX_NESTING} deep")
            self.require(12 * count, what)
            for _ in range(count):
                inner, inner_count = self.u32(what), self.u64(what)
                self.skip(inner, inner_count, what, depth + 1)
        else:
            self.fail(f"{what} must have elements of a type from 0 to 12, got {element}")

    def elements(self, element: int, count: int, depth: int) -> list[Any]:
        """The values of an array that :meth:`skip` has checked."""
        if element in _SCALARS:
            code = f"<{count}{_SCALARS[element]}"
            values = list(struct.unpack_from(code, self.data, self.position))
            self.position += struct.calcsize(code)
            return values
        if element == _STRING:
            return [self.string("a string") for _ in range(count)]
        return [
            self.elements(self.u32("an array"), self.u64("an array"), depth + 1)
            for _ in range(count)
        ]


def parse_gguf(data: Any, path: object, source: Callable[[], Any] | None = None) -> GgufHeader:
    """Parse and check the header in ``data``, the whole file as a buffer (bytes or an mmap).

    After it every tensor's ``begin``/``end`` lies in the file and fits its type and shape, and no
    two overlap. Gaps between tensors are allowed (writers pad to the alignment). A type number
    without a name is kept, to be refused when the tensor is asked for.

    ``source`` returns the buffer again when a long array is decoded later.
    """
    reader = _Reader(data, path)
    fail = reader.fail
    if bytes(data[:4]) != b"GGUF":
        fail(f"must start with the magic b'GGUF', got {bytes(data[:4])!r}")
    reader.position = 4
    version = reader.u32("the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0 and version:
            fail("big-endian files are not supported; convert the file to little endian")
        fail(f"the version must be 2 or 3, got {version}")
    tensor_count, pair_count = reader.u64("the tensor count"), reader.u64("the pair count")
    # The least a pair and a description take: bounds the loops by the file before they start.
    if pair_count > reader.end // 13 or tensor_count > reader.end // 24:
        fail(
            f"{pair_count} key-value pairs and {tensor_count} tensors do not fit into "
            f"{reader.end} bytes; the file is truncated or garbage"
        )
    values: dict[str, Any] = {}
    for _ in range(pair_count):
        key = reader.name("a key")
        if key in values:
            fail(f"the key {key!r} appears twice")
        values[key] = reader.value(reader.u32(f"the type of {key!r}"), f"the value of {key!r}")
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        fail(f"general.alignment must be a power of two from 8 to 2**20, got {alignment!r:.80}")

    described: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = reader.name("a tensor's name")
        if name in described:
            fail(f"the tensor {name!r} appears twice")
        dims = reader.u32(f"the dimensions of {name!r}")
        if dims > _MAX_DIMS:
            fail(f"tensor {name!r} must have at most {_MAX_DIMS} dimensions, got {dims}")
        sizes = [reader.u64(f"the sizes of {name!r}") for _ in range(dims)]
        kind = reader.u32(f"the type of {name!r}")
        described[name] = kind, tuple(reversed(sizes)), reader.u64(f"the offset of {name!r}")
    start = -(-reader.position // alignment) * alignment
    tensors = _place(described, start, alignment, reader)
    metadata = GgufMetadata(values, source or (lambda: data), path)
    return GgufHeader(version, alignment, metadata, tensors)


def _place(
    described: dict[str, tuple[int, tuple[int, ...], int]],
    start: int,
    alignment: int,
    reader: _Reader,
) -> dict[str, GgufTensor]:
    """Check every tensor's size and place; absolute positions."""

    def fail(name: str, what: str) -> NoReturn:
        raise CheckpointError(f"{reader.path}: tensor {name!r}: {what}")

    offsets = sorted(offset for _, _, offset in described.values())
    following = {a: b for a, b in itertools.pairwise(offsets) if a < b}
    tensors: dict[str, GgufTensor] = {}
    for name, (kind, shape, offset) in described.items():
        elements = 1
        for size in shape:
            elements *= max(size, 1)
        if elements > _MAX_INT:
            fail(name, f"the number of elements must fit in 63 bits, got shape {shape}")
        if 0 in shape:
            elements = 0
        if offset % alignment:
            fail(name, f"its offset must be a multiple of {alignment}, got {offset}")
        available = max(reader.end - start, 0)
        if kind in GGML_TYPES:
            type_name, block, block_bytes = GGML_TYPES[kind]
            row = shape[-1] if shape else 1
            if row % block:
                fail(name, f"rows of {type_name} must be a multiple of {block} long, got {row}")
            nbytes = elements // block * block_bytes
        else:
            # Of unknown size: everything up to the next tensor.
            nbytes = max(min(following.get(offset, available), available) - offset, 0)
        if offset > available or nbytes > available - offset:
            fail(
                name,
                f"its data must end inside the file's {available} bytes of data, got offset "
                f"{offset} and {nbytes} bytes; the file is truncated or the header is wrong",
            )
        tensors[name] = GgufTensor(kind, shape, start + offset, start + offset + nbytes)
    position, previous = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < position:
            fail(name, f"overlaps {previous!r}")
        position, previous = tensor.end, name
    return tensors

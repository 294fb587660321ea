"""Small checkpoint files made byte by byte, so that tests can make wrong ones as well."""

import json
import struct
from pathlib import Path

import numpy as np
import torch

from mergekit_torch.checkpoint import QuantInfo


def safetensors_bytes(header, data=b"", pad=0):
    """A safetensors file from a header (dict or raw JSON bytes) and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, item):
    """A GGUF value: the type number and the item's bytes."""
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
    codes |= {10: "Q", 11: "q", 12: "d"}
    if kind == 8:
        return string(item)
    if kind == 9:
        element, items = item
        body = b"".join(value(element, x) for x in items)
        return struct.pack("<IQ", element, len(items)) + body
    return struct.pack("<" + codes[kind], item)


def gguf_bytes(
    pairs=(),
    tensors=(),
    *,
    version=3,
    magic=b"GGUF",
    alignment=32,
    tensor_count=None,
    pair_count=None,
):
    """A GGUF file: pairs of (key, type, item), tensors of (name, dims, type, data[, offset])."""
    out = magic + struct.pack("<I", version)
    out += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    out += struct.pack("<Q", len(pairs) if pair_count is None else pair_count)
    for key, kind, item in pairs:
        out += string(key) + struct.pack("<I", kind) + value(kind, item)
    position, data = 0, b""
    for name, dims, kind, content, *offset in tensors:
        data += b"\0" * (-len(data) % alignment)
        position = len(data)
        out += string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += struct.pack("<IQ", kind, offset[0] if offset else position)
        data += content
    return out + b"\0" * (-len(out) % alignment) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def random_components(shape, info: QuantInfo, seed=0):
    """Components of a random weight of logical shape [..., N, K]."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for part, (dtype, part_shape) in info.component_shapes(shape).items():
        if dtype == torch.uint8:
            parts[part] = torch.randint(0, 256, part_shape, generator=generator, dtype=dtype)
        else:
            parts[part] = torch.randn(part_shape, generator=generator).to(dtype)
    return parts


def rss_bytes():
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def random_array(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

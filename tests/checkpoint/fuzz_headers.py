"""Fuzzing of the header parsers: mutated files may only raise CheckpointError, and never hang.

``python tests/checkpoint/fuzz_headers.py --iterations 200000 --seed 1`` runs that many inputs
through each parser and, for those that are accepted, checks what the parser promises.
"""

import argparse
import json
import random
import struct
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from files import entry, gguf_bytes, safetensors_bytes  # noqa: E402

from mergekit_torch.checkpoint import CheckpointError  # noqa: E402
from mergekit_torch.checkpoint.gguf_header import parse_gguf  # noqa: E402
from mergekit_torch.checkpoint.info import SAFETENSORS_BITS  # noqa: E402
from mergekit_torch.checkpoint.native import parse_native  # noqa: E402
from mergekit_torch.checkpoint.safetensors_header import header_length, parse_header  # noqa: E402

#: Values that sit at the edges of what fields can hold.
EDGES = [0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
EDGES += [2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
SECONDS_PER_INPUT = 1.0


def mutate_bytes(rng, data):
    """Flips, edge values, truncation, insertion, deletion, copies of a part elsewhere."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        kind = rng.randrange(7)
        at = rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice([4, 8])
            data[at : at + size] = (rng.choice(EDGES) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 16))
        elif kind == 5:
            del data[at : at + rng.randrange(1, 16)]
        elif data:
            start = rng.randrange(len(data))
            data[at:at] = data[start : start + rng.randrange(1, 64)]
    return bytes(data)


def random_json(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return rng.choice([*EDGES, -1, 10**40])
    if kind == 1:
        return rng.choice(["", "F32", "U8", "w", "\0", "é", "x" * 300, "\ud800"])
    if kind <= 4:
        return rng.choice([None, True, False, 1.5, -1, 1e308])
    if kind <= 6:
        return rng.choice(EDGES)
    if kind == 7:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(random_json(rng, 3)): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate_json(rng, value):
    """Replace, drop or add one thing somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        copy = dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[str(random_json(rng, 3))] = random_json(rng)
        elif kind == 2:
            copy[rng.choice(list(value))] = copy[key]
        else:
            copy[key] = mutate_json(rng, copy[key])
        return copy
    if isinstance(value, list) and value and rng.random() < 0.85:
        copy = list(value)
        at = rng.randrange(len(copy))
        kind = rng.randrange(6)
        if kind == 0:
            del copy[at]
        elif kind == 1:
            copy.insert(at, random_json(rng))
        else:
            copy[at] = mutate_json(rng, copy[at])
        return copy
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, value * 2, -value, rng.choice(EDGES)])
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice([*SAFETENSORS_BITS, "affine", "symmetric", "asymmetric"])
    return random_json(rng)


def safetensors_seed(rng):
    """A valid header with a quantized weight, as a dict, and its data's length."""
    rows, k = rng.randrange(1, 5), rng.choice([32, 33, 64])
    groups = -(-k // 32)
    header, position = {}, 0
    tensors = [
        ("w_codes", "U8", [rows, (k + 1) // 2], 1),
        ("w_scale", "F16", [rows, groups], 2),
        ("w_offset", "F16", [rows, groups], 2),
        ("p", "F32", [2, 3], 4),
        ("e", rng.choice(["BOOL", "I64", "F8_E4M3"]), [0, 4], 8),
        ("s", "BF16", [], 2),
    ]
    for name, code, shape, size in tensors:
        nbytes = size
        for dim in shape:
            nbytes *= dim
        header[name] = entry(code, shape, position, position + nbytes)
        position += nbytes
    quantized = {"w": {"bits": 4, "group_size": 32, "scheme": "affine", "in_features": k}}
    header["__metadata__"] = {"mkrs.format_version": "1", "mkrs.quantized": quantized, "a": "b"}
    return header, position


def safetensors_input(rng):
    header, size = safetensors_seed(rng)
    style = rng.randrange(4)
    if style:
        for _ in range(rng.choice([1, 1, 2, 4])):
            header = mutate_json(rng, header)
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        strings = dict(header["__metadata__"])
        if not isinstance(strings.get("mkrs.quantized"), str) and rng.random() < 0.95:
            strings["mkrs.quantized"] = json.dumps(strings.get("mkrs.quantized"))
        header["__metadata__"] = strings
    data = safetensors_bytes(header, bytes(size), rng.choice([0, 0, 7]))
    return data if style in (1, 2) else mutate_bytes(rng, data)


def check_safetensors(data):
    length = header_length(data[:8], len(data), "fuzz")
    tensors, metadata = parse_header(data[8 : 8 + length], len(data), "fuzz")
    for tensor in tensors.values():
        assert 8 + length <= tensor.begin <= tensor.end <= len(data)
        bits = SAFETENSORS_BITS[tensor.code]
        for size in tensor.shape:
            bits *= size
        assert bits == 8 * (tensor.end - tensor.begin)
    for info, shape, parts in parse_native(tensors, metadata, "fuzz").values():
        for part, (_, part_shape) in info.component_shapes(shape).items():
            assert tensors[parts[part]].shape == part_shape


def gguf_input(rng):
    pairs = [
        ("general.architecture", 8, "llama"),
        ("a", rng.randrange(6), 5),
        ("f", 12, 0.5),
        ("b", 7, True),
        ("ints", 9, (4, [1, 2, 3])),
        ("words", 9, (8, ["x"] * rng.choice([2, 200]))),
        ("nested", 9, (9, [(8, ["y"]), (0, [1, 2])])),
    ]
    style = rng.randrange(4)
    if style and rng.random() < 0.3:
        pairs.append(("general.alignment", 4, rng.choice(EDGES) % 2**32))
    tensors = []
    for number in range(rng.randrange(4)):
        kind, row, nbytes = rng.choice([(0, 4, 16), (2, 32, 18), (12, 256, 144), (99, 5, 9)])
        dims = [row, rng.randrange(1, 3)]
        content = bytes(nbytes * dims[1])
        offset = ()
        if style and rng.random() < 0.3:
            dims[rng.randrange(2)] = rng.choice(EDGES) % 2**64
        if style and rng.random() < 0.2:
            dims = dims * rng.randrange(4)
        if style and rng.random() < 0.2:
            offset = (rng.choice(EDGES) % 2**64,)
        if style and rng.random() < 0.2:
            kind = rng.randrange(50)
        tensors.append((f"t{number if rng.random() < 0.95 else 0}", dims, kind, content, *offset))
    counts = {}
    if style and rng.random() < 0.1:
        counts = {rng.choice(["tensor_count", "pair_count"]): rng.choice(EDGES) % 2**64}
    data = gguf_bytes(pairs, tensors, **counts)
    return data if style in (1, 2) else mutate_bytes(rng, data)


def check_gguf(data):
    header = parse_gguf(data, "fuzz")
    position = 0
    for tensor in sorted(header.tensors.values(), key=lambda t: (t.begin, t.end)):
        assert position <= tensor.begin <= tensor.end
        position = tensor.end
        if tensor.begin != tensor.end:
            assert tensor.end <= len(data)
        assert tensor.begin % header.alignment == 0
    for key in header.metadata:
        assert header.metadata[key] is not None


PARSERS = {
    "safetensors": (safetensors_input, check_safetensors),
    "gguf": (gguf_input, check_gguf),
}


def fuzz(parser, iterations, seed):
    """Run; returns how many inputs were accepted and the slowest one's seconds.

    An exception other than CheckpointError comes out with the input in its notes.
    """
    make, check = PARSERS[parser]
    accepted, slowest = 0, 0.0
    for number in range(iterations):
        rng = random.Random(f"{seed}/{number}")
        data = make(rng)
        start = time.perf_counter()
        try:
            check(data)
            accepted += 1
        except CheckpointError as error:
            assert str(error).startswith("fuzz: ")  # noqa: PT017
            assert len(str(error)) < 70_000  # noqa: PT017
        except Exception:
            print(f"{parser}: seed {seed}, input {number}: {data!r}", file=sys.stderr)
            raise
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        assert seconds < SECONDS_PER_INPUT, f"{parser}: seed {seed}, input {number}: {seconds} s"
    return accepted, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=100_000, help="inputs per parser")
    parser.add_argument("--seed", type=int, default=struct.unpack("<I", random.randbytes(4))[0])
    arguments = parser.parse_args()
    for name in PARSERS:
        start = time.perf_counter()
        accepted, slowest = fuzz(name, arguments.iterations, arguments.seed)
        print(
            f"{name}: seed {arguments.seed}, {arguments.iterations} inputs in "
            f"{time.perf_counter() - start:.0f} s, {accepted} accepted, "
            f"slowest {slowest * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()

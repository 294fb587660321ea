"""Reading GGUF files: against the gguf package, and what must be refused."""

import os
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from files import gguf_bytes, random_array, rss_bytes, string, write
from models import smollm2_gguf
from test_gguf_unpack import (
    assert_same_bits,
    dequantize,
    gguf_dequantize,
    random_blocks,
)

from mergekit_torch.checkpoint import CheckpointError, open_checkpoint
from mergekit_torch.checkpoint.gguf_header import GGML_TYPES, parse_gguf
from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS

F32 = 0


def plain(name="t", dims=(2,), data=b"\0" * 8, kind=F32, *offset):
    return (name, list(dims), kind, data, *offset)


def values(checkpoint, name):
    """Dequantized values of a quantized tensor, from its components."""
    parts, info = checkpoint.components(name)
    layout = next(
        entry for entry in GGUF_LAYOUTS.values() if entry.name == checkpoint.info(name).kind
    )
    zero = parts.get("offset")
    return dequantize(parts["codes"], parts["scale"], zero, layout, info.in_features)


def written_by_gguf(path, **pairs):
    """A file from the gguf package with one tensor of each kind that it can write."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.u32", 7)
    writer.add_float32("some.f32", 0.5)
    writer.add_string("some.string", "grün")
    writer.add_bool("some.bool", True)
    writer.add_array("some.ints", [1, -2, 3])
    writer.add_array("some.strings", [f"token {i}" for i in range(500)])
    arrays = {
        "f32": random_array((4, 6), 1),
        "f16": random_array((3, 5), 2).astype(np.float16),
        "f64": random_array((2, 3), 3).astype(np.float64),
        "i8": np.arange(5, dtype=np.int8),
        "i16": np.arange(6, dtype=np.int16).reshape(2, 3),
        "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
        "i64": np.arange(4, dtype=np.int64),
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    quantized = {}
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        raw = gguf.quants.quantize(random_array((5, 64), 9), number)
        writer.add_tensor(kind, raw, raw_dtype=number)
        quantized[kind] = gguf.quants.dequantize(raw, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays, quantized


def test_reads_what_the_gguf_package_wrote(tmp_path):
    path = tmp_path / "model.gguf"
    arrays, quantized = written_by_gguf(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "gguf"
    assert set(checkpoint) == set(arrays) | set(quantized)
    for name, want in arrays.items():
        assert torch.equal(checkpoint[name], torch.from_numpy(want))
        assert checkpoint.info(name).shape == want.shape
        assert checkpoint.info(name).quantization is None
    for name, want in quantized.items():
        if name == "BF16":
            assert_same_bits(checkpoint[name].float().numpy(), want)
            continue
        info = checkpoint.info(name)
        assert info.kind == name
        assert info.shape == (5, 64)
        assert info.quantization.group_size == 32
        assert_same_bits(values(checkpoint, name), want)
    kv = checkpoint.metadata
    assert kv["some.u32"] == 7
    assert kv["some.f32"] == 0.5
    assert kv["some.string"] == "grün"
    assert kv["some.bool"] is True
    assert kv["some.ints"] == [1, -2, 3]
    assert kv.length("some.strings") == 500
    assert kv["some.strings"] == [f"token {i}" for i in range(500)]
    assert kv["some.strings"] is kv["some.strings"]
    assert kv.length("some.u32") is None
    assert kv.length("some.ints") == 3
    assert "general.architecture" in kv
    with pytest.raises(KeyError):
        kv["nothing"]
    assert f"{len(kv)} keys" in repr(kv)


def test_type_table_agrees_with_gguf():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        assert GGML_TYPES[int(kind)] == (kind.name, block, size)


@pytest.mark.parametrize("ggml_type", GGUF_LAYOUTS)
def test_every_quantized_type(tmp_path, ggml_type):
    layout = GGUF_LAYOUTS[ggml_type]
    k = layout.block * 2
    blocks = random_blocks(ggml_type, 6, k, seed=ggml_type)
    raw = blocks.numpy().tobytes()
    experts = ("experts", [k, 3, 2], ggml_type, raw)
    data = gguf_bytes(tensors=[("w", [k, 6], ggml_type, raw), experts])
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    want = gguf_dequantize(blocks, ggml_type).reshape(6, k)
    assert_same_bits(values(checkpoint, "w"), want)
    assert_same_bits(values(checkpoint, "experts"), want.reshape(2, 3, k))
    parts, info = checkpoint.components("experts")
    assert parts["codes"].shape == (2, 3, k * layout.bits // 8)
    assert (info.bits, info.group_size, info.scheme) == layout[3:6]
    assert dict(checkpoint.stored_items()).keys() >= {"w_codes", "w_scale", "experts_codes"}


def test_zero_copy_views(tmp_path):
    data = gguf_bytes(tensors=[plain("a"), plain("b", (3, 2), struct.pack("<6f", *range(6)))])
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    view = checkpoint["b"]
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert view.data_ptr() == checkpoint["b"].data_ptr()
    assert checkpoint.get_slice("b")[1, 1:].tolist() == [4, 5]
    checkpoint.close()
    assert view.sum() == 15


def test_scalars_and_empty_tensors(tmp_path):
    data = gguf_bytes(
        tensors=[
            plain("s", (), b"\0\0\x80\x3f"),
            plain("e", (4, 0), b""),
            plain("q", (32, 0), b"", 2),
        ]
    )
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    assert checkpoint["s"].shape == ()
    assert checkpoint["s"] == 1
    assert checkpoint["e"].shape == (0, 4)
    parts, _ = checkpoint.components("q")
    assert parts["codes"].shape == (0, 16)


def test_codebook_types_are_refused_by_name_and_only_on_access(tmp_path):
    data = gguf_bytes(
        tensors=[
            ("iq", [256, 1], 23, b"\0" * 136),
            ("mx", [32, 1], 39, b"\0" * 17),
            ("unknown", [7, 3], 99, b"\0" * 11),
            ("flat", [32], 2, b"\0" * 18),
            plain("ok"),
        ]
    )
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    assert checkpoint["ok"].shape == (2,)
    assert checkpoint.info("iq").kind == "IQ4_XS"
    assert checkpoint.info("iq").dtype is None
    for name, kind in [
        ("iq", "IQ4_XS"),
        ("mx", "MXFP4"),
        ("unknown", "type 99"),
        ("flat", "Q4_0 of 1 dimension"),
    ]:
        with pytest.raises(NotImplementedError, match=f"tensor '{name}': .*{kind}"):
            checkpoint[name]
        with pytest.raises(NotImplementedError, match=kind):
            checkpoint.components(name)
        with pytest.raises(NotImplementedError, match=kind):
            checkpoint.get_slice(name)[0]


def test_nested_arrays(tmp_path):
    inner = [(5, [1, 2]), (5, [3])]
    pairs = [("nested", 9, (9, inner)), ("big", 9, (9, [(8, ["x" * 600]), (8, ["y" * 600])]))]
    kv = open_checkpoint(write(tmp_path / "x.gguf", gguf_bytes(pairs))).metadata
    assert kv["nested"] == [[1, 2], [3]]
    assert kv["big"] == [["x" * 600], ["y" * 600]]


def test_bytes_that_are_not_utf8_survive(tmp_path):
    raw = b"\xff\xfeabc"
    kv = open_checkpoint(write(tmp_path / "x.gguf", gguf_bytes([("k", 8, raw)]))).metadata
    assert kv["k"].encode("utf-8", "surrogateescape") == raw


NESTING_BOMB = struct.pack("<IQ", 9, 1) * 5000


def raw_pair(key, kind, body):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(key) + struct.pack("<I", kind) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must start with b?'?GGUF"),
        (b"GGU", "must start with"),
        (b"GGUX" + b"\0" * 100, "must start with"),
        (b"GGUF", "the version at byte 4 needs 4 bytes and the file has 0 left"),
        (gguf_bytes(version=1), "version must be 2 or 3, got 1"),
        (gguf_bytes(version=4), "version must be 2 or 3, got 4"),
        (gguf_bytes(version=3 << 24), "big-endian"),
        (gguf_bytes(tensor_count=2**63), "do not fit into"),
        (gguf_bytes(pair_count=2**64 - 1), "do not fit into"),
        (gguf_bytes([("a", 4, 1)], pair_count=2), "a key must be 1 to 65535 bytes long, got 0"),
        (gguf_bytes([("a", 4, 1), ("a", 4, 1)]), "the key 'a' appears twice"),
        (gguf_bytes([(b"\xff", 4, 1)]), "must be UTF-8"),
        (raw_pair("k", 13, b"\0" * 64), "value type from 0 to 12, got 13"),
        (raw_pair("k", 8, struct.pack("<Q", 2**63)), "needs 9223372036854775808 bytes"),
        (raw_pair("k", 9, struct.pack("<IQ", 4, 2**62)), "truncated or garbage"),
        (raw_pair("k", 9, struct.pack("<IQ", 8, 2**61)), "truncated or garbage"),
        (raw_pair("k", 9, struct.pack("<IQQ", 8, 1, 2**64 - 1)), "ends outside the file"),
        (raw_pair("k", 9, struct.pack("<IQ", 77, 0)), "elements of a type from 0 to 12, got 77"),
        (raw_pair("k", 9, NESTING_BOMB), "nests arrays more than 4 deep"),
        (raw_pair("k" * 70000, 4, b"\0" * 8), "1 to 65535 bytes long, got 70000"),
        (gguf_bytes([("general.alignment", 4, 33)]), "power of two from 8 .* got 33"),
        (gguf_bytes([("general.alignment", 4, 0)]), "power of two"),
        (gguf_bytes([("general.alignment", 8, "32")]), "power of two"),
        (gguf_bytes([("general.alignment", 4, 2**30)]), "power of two"),
        (gguf_bytes(tensors=[plain("a"), plain("a")]), "the tensor 'a' appears twice"),
        (gguf_bytes(tensors=[plain("a", (1,) * 5)]), "at most 4 dimensions, got 5"),
        (gguf_bytes(tensors=[plain("a", (2**62, 8))]), "must fit in 63 bits"),
        (gguf_bytes(tensors=[plain("a", (2**62, 8, 0), b"")]), "must fit in 63 bits"),
        (gguf_bytes(tensors=[plain("a", (3,))]), "must end inside the file's 8 bytes of data"),
        (gguf_bytes(tensors=[plain("a", (2,), b"\0" * 8, 0, 32)]), "offset 32 and 8 bytes"),
        (gguf_bytes(tensors=[plain("a", (2,), b"\0" * 8, 0, 2**64 - 32)]), "must end inside"),
        (gguf_bytes(tensors=[plain("a", (2,), b"\0" * 8, 0, 8)]), "multiple of 32, got 8"),
        (
            gguf_bytes(tensors=[plain("a"), plain("b", (2,), b"\0" * 8, 0, 0)]),
            "tensor 'b': overlaps 'a'",
        ),
        (gguf_bytes(tensors=[("a", [33, 1], 2, b"\0" * 40)]), "rows of Q4_0 .* 32 long, got 33"),
        (gguf_bytes(tensors=[("a", [256, 1], 12, b"\0" * 143)]), "must end inside"),
        (gguf_bytes(tensors=[(b"\xfe", [2], 0, b"\0" * 8)]), "must be UTF-8"),
    ],
)
def test_bad_headers(tmp_path, data, message):
    path = write(tmp_path / "bad.gguf", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "bad.gguf" in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    pairs = [("a", 4, 1), ("s", 8, "text"), ("l", 9, (8, ["x", "yy"])), ("f", 12, 0.5)]
    data = gguf_bytes(pairs, [plain("t"), plain("u")])
    for size in range(len(data)):
        with pytest.raises(CheckpointError):
            parse_gguf(data[:size], "x")
    parse_gguf(data, "x")


def test_version_2_is_the_same_layout(tmp_path):
    checkpoint = open_checkpoint(
        write(tmp_path / "x.gguf", gguf_bytes(version=2, tensors=[plain()]))
    )
    assert checkpoint["t"].shape == (2,)


def test_other_alignment(tmp_path):
    data = gguf_bytes([("general.alignment", 4, 128)], [plain("a"), plain("b")], alignment=128)
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    assert checkpoint.info("b").offset % 128 == 0


def test_the_content_decides_not_the_name(tmp_path):
    path = write(tmp_path / "model.bin", gguf_bytes(tensors=[plain()]))
    assert open_checkpoint(path).format == "gguf"


def test_changed_while_open(tmp_path):
    tokens = ("tokens", 9, (8, ["x"] * 2000))
    path = write(
        tmp_path / "x.gguf", gguf_bytes([tokens], [plain(), ("q", [32, 1], 2, b"\0" * 18)])
    )
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 1)
    for access in (
        lambda: checkpoint["t"],
        lambda: checkpoint.components("q"),
        lambda: checkpoint.get_slice("q")[0:1],
        lambda: checkpoint.metadata["tokens"],
    ):
        with pytest.raises(CheckpointError, match="was truncated"):
            access()


# Split files.


def split_pairs(number, count, tensors=2):
    return [
        ("split.no", 2, number),
        ("split.count", 2, count),
        ("split.tensors.count", 5, tensors),
    ]


@pytest.fixture
def split(tmp_path):
    pairs = [("general.name", 8, "first"), *split_pairs(0, 2)]
    one = write(tmp_path / "m-00001-of-00002.gguf", gguf_bytes(pairs, [plain("a")]))
    two = write(
        tmp_path / "m-00002-of-00002.gguf",
        gguf_bytes(split_pairs(1, 2), [plain("b", (2,), struct.pack("<2f", 1, 2))]),
    )
    return tmp_path, one, two


def test_split_files(split):
    folder, one, two = split
    for path in (one, two, folder):
        checkpoint = open_checkpoint(path)
        assert list(checkpoint) == ["a", "b"]
        assert checkpoint["b"].tolist() == [1, 2]
        assert checkpoint.info("b").file == two
        assert checkpoint.metadata["general.name"] == "first"
        assert checkpoint.files == [one, two]


def test_split_files_that_do_not_fit(split):
    _, one, two = split
    data = two.read_bytes()
    two.unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf: this part .* is missing"):
        open_checkpoint(one)
    two.write_bytes(gguf_bytes(split_pairs(0, 2), [plain("b")]))
    with pytest.raises(CheckpointError, match=r"split\.no must be 1, got 0"):
        open_checkpoint(one)
    two.write_bytes(gguf_bytes(split_pairs(1, 3), [plain("b")]))
    with pytest.raises(CheckpointError, match=r"split\.count must be the 2 .* got 3"):
        open_checkpoint(one)
    two.write_bytes(gguf_bytes(split_pairs(1, 2), [plain("a")]))
    with pytest.raises(CheckpointError, match="tensor 'a' is also in m-00001"):
        open_checkpoint(one)
    two.write_bytes(gguf_bytes(split_pairs(1, 2), [plain("b"), plain("c")]))
    with pytest.raises(CheckpointError, match="must hold 2 tensors, got 3"):
        open_checkpoint(one)
    two.write_bytes(data)
    renamed = one.with_name("alone.gguf")
    one.rename(renamed)
    with pytest.raises(CheckpointError, match=r"split\.count must be the 1"):
        open_checkpoint(renamed)
    impossible = write(one.with_name("m-00003-of-00002.gguf"), data)
    with pytest.raises(CheckpointError, match="number a part from 1 to 2"):
        open_checkpoint(impossible)


# The real file.


def test_smollm2_bit_for_bit():
    path = smollm2_gguf()
    checkpoint = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    assert len(checkpoint) == len(reader.tensors) == 272
    kinds = {}
    for tensor in reader.tensors:
        info = checkpoint.info(tensor.name)
        kinds[info.kind] = kinds.get(info.kind, 0) + 1
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.offset == tensor.data_offset
        assert info.nbytes == tensor.n_bytes
        if info.quantization is None:
            assert_same_bits(checkpoint[tensor.name].numpy(), np.asarray(tensor.data))
        else:
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert_same_bits(values(checkpoint, tensor.name), want)
    assert kinds == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    kv = checkpoint.metadata
    assert kv["general.architecture"] == "llama"
    assert len(kv["tokenizer.ggml.tokens"]) == 49152
    field = reader.fields["tokenizer.ggml.merges"]
    assert kv["tokenizer.ggml.merges"][:100] == field.contents()[:100]
    assert len(kv["tokenizer.ggml.merges"]) == len(field.data)


def test_smollm2_opens_without_reading():
    path = smollm2_gguf()
    open_checkpoint(path)
    before, start = rss_bytes(), time.perf_counter()
    checkpoint = open_checkpoint(path)
    # Generous bounds that only a read of the whole file or a decoded tokenizer would break.
    assert time.perf_counter() - start < 1
    assert rss_bytes() - before < 16 << 20
    assert len(checkpoint) == 272

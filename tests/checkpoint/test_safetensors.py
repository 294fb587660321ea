"""Reading safetensors files: against the safetensors library, and what must be refused."""

import gc
import json
import os
import pickle

import pytest
import torch
from files import entry, rss_bytes, safetensors_bytes, write
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_torch.checkpoint import CheckpointError, open_checkpoint
from mergekit_torch.checkpoint.info import SAFETENSORS_DTYPES


def random_tensor(dtype, shape, seed=0):
    """Random bits that are a valid value of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize
    raw = torch.randint(0, 256, (*shape, count), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).squeeze(-1) if raw.numel() else torch.empty(shape, dtype=dtype)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.fixture
def plain(tmp_path):
    tensors = {
        "a": torch.randn(4, 6),
        "b": torch.arange(10, dtype=torch.int64),
        "deep.c": torch.randn(2, 3, 5).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    return path, tensors


def test_reads_what_the_library_wrote(plain):
    path, tensors = plain
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert len(checkpoint) == 5
        assert "a" in checkpoint
        assert "z" not in checkpoint
        assert checkpoint.metadata == {"format": "pt", "note": "é"}
        assert checkpoint.format == "safetensors"
        assert checkpoint.files == [path]
        for name, want in tensors.items():
            assert same(checkpoint[name], want)
            info = checkpoint.info(name)
            assert info.shape == tuple(want.shape)
            assert info.dtype == want.dtype
            assert info.nbytes == want.numel() * want.dtype.itemsize
            assert info.file == path
            assert info.quantization is None
            raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
            assert raw == bytes(bits(want).view(torch.uint8).tolist())
        assert checkpoint.nbytes == sum(t.numel() * t.dtype.itemsize for t in tensors.values())
        assert dict(checkpoint.stored_items()).keys() == tensors.keys()
        assert "5 tensors" in repr(checkpoint)


@pytest.mark.parametrize("code", SAFETENSORS_DTYPES)
def test_every_dtype(tmp_path, code):
    dtype = SAFETENSORS_DTYPES[code]
    want = random_tensor(dtype, (3, 5))
    size = 15 * dtype.itemsize
    path = write(
        tmp_path / "x.safetensors",
        safetensors_bytes({"t": entry(code, [3, 5], 0, size)}, bytes(bits(want).tolist())),
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.info("t").kind == code
    assert same(checkpoint["t"], want)
    # The library reads the same (its Python side lacks a few of the format's dtypes).
    with safe_open(path, "pt") as library:
        assert library.get_slice("t").get_dtype() == code
        assert same(library.get_tensor("t"), want)


def test_dtypes_without_torch_counterpart_can_be_inspected(tmp_path):
    data = safetensors_bytes(
        {"four": entry("F4", [4, 3], 0, 6), "ok": entry("U8", [2], 6, 8)}, bytes(range(8))
    )
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", data))
    assert checkpoint.info("four").dtype is None
    assert checkpoint["ok"].tolist() == [6, 7]
    with pytest.raises(NotImplementedError, match=r"tensor 'four'.*F4"):
        checkpoint["four"]
    with pytest.raises(NotImplementedError, match="F4"):
        checkpoint.components("four")
    with pytest.raises(CheckpointError, match=r"F4 of shape \[3\] takes 1\.5 bytes"):
        open_checkpoint(
            write(
                tmp_path / "y.safetensors", safetensors_bytes({"f": entry("F4", [3], 0, 1)}, b"x")
            )
        )


def test_views_share_no_storage_and_copy_nothing(plain):
    path, _ = plain
    checkpoint = open_checkpoint(path)
    first, again = checkpoint["a"], checkpoint["a"]
    assert first.data_ptr() == again.data_ptr()
    assert first.untyped_storage().nbytes() == 4 * 6 * 4
    assert first.storage_offset() == 0
    assert len(pickle.dumps(first)) < 2000
    assert checkpoint["b"].data_ptr() != first.data_ptr()


def test_writing_into_a_view_never_reaches_the_file(plain):
    path, tensors = plain
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    view = checkpoint["a"]
    view.fill_(7)
    view.add_(1)
    assert (view == 8).all()
    assert path.read_bytes() == before
    assert same(open_checkpoint(path)["a"], tensors["a"])


def test_read_only_file(plain):
    path, tensors = plain
    os.chmod(path, 0o444)
    view = open_checkpoint(path)["a"]
    view.zero_()
    assert same(open_checkpoint(path)["a"], tensors["a"])


def test_tensors_outlive_the_checkpoint(plain):
    path, tensors = plain
    with open_checkpoint(path) as checkpoint:
        view = checkpoint["a"]
        part = checkpoint["deep.c"][1]
    del checkpoint
    gc.collect()
    assert same(view, tensors["a"])
    os.unlink(path)
    del view
    assert same(part, tensors["deep.c"][1])


def test_the_map_goes_with_the_last_tensor(plain):
    path, _ = plain

    def mapped():
        with open("/proc/self/maps") as maps:
            return str(path) in maps.read()

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    checkpoint = open_checkpoint(path)
    assert not mapped()  # opening reads headers only
    view = checkpoint["a"]
    assert mapped()
    checkpoint.close()
    assert mapped()
    del view
    gc.collect()
    assert not mapped()


def test_closed(plain):
    path, _ = plain
    checkpoint = open_checkpoint(path)
    checkpoint["a"]
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint["a"]
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.get_slice("empty")[:]
    assert checkpoint.info("a").shape == (4, 6)


def test_unknown_name(plain):
    checkpoint = open_checkpoint(plain[0])
    for call in (checkpoint.__getitem__, checkpoint.info, checkpoint.get_slice):
        with pytest.raises(KeyError, match="no tensor 'nope'"):
            call("nope")
    with pytest.raises(ValueError, match="must be quantized to have components"):
        checkpoint.components("a")
    assert checkpoint.get("nope") is None


@pytest.mark.parametrize("shift", range(8))
def test_unaligned_data_is_copied(tmp_path, shift):
    want = torch.randn(5, 7)
    raw = want.numpy().tobytes()
    header = {"pad": entry("U8", [shift], 0, shift), "t": entry("F32", [5, 7], shift, shift + 140)}
    data = safetensors_bytes(header, b"\xff" * shift + raw)
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", data))
    got = checkpoint["t"]
    assert got.data_ptr() % 4 == 0
    assert same(got, want)
    part = checkpoint.get_slice("t")
    for index in [
        (slice(1, 3), slice(2, 6)),
        slice(1, None, 2),
        2,
        -1,
        (..., 3),
        (slice(0, 0),),
        (1, 1),
        (),
    ]:
        assert same(part[index], want[index])


def test_slices(plain):
    path, tensors = plain
    part = open_checkpoint(path).get_slice("deep.c")
    want = tensors["deep.c"]
    assert part.shape == (2, 3, 5)
    assert part.dtype == torch.bfloat16
    for index in [
        0,
        (slice(None), 1),
        (..., slice(1, 4)),
        (1, slice(0, 2), -1),
        ...,
        (slice(9, 10)),
    ]:
        assert same(part[index], want[index])
    with pytest.raises(IndexError, match="3 dimensions, got 4 indices"):
        part[0, 0, 0, 0]
    with pytest.raises(IndexError, match="index 2 is out of range for dimension 0 of size 2"):
        part[2]
    with pytest.raises(IndexError, match="at most one ellipsis"):
        part[..., ...]
    with pytest.raises(ValueError, match="positive step"):
        part[::-1]
    with pytest.raises(TypeError, match="got list"):
        part[[0, 1]]
    with pytest.raises(TypeError, match="got bool"):
        part[True]


def test_slice_touches_only_its_bytes(tmp_path):
    rows, columns = 4096, 4096  # 64 MiB
    path = tmp_path / "big.safetensors"
    size = rows * columns * 4
    with open(path, "wb") as file:
        file.write(safetensors_bytes({"t": entry("F32", [rows, columns], 0, size)}, pad=64))
        file.truncate(file.tell() + size)
    checkpoint = open_checkpoint(path)
    part = checkpoint.get_slice("t")[100:104]
    before = rss_bytes()
    assert part.sum() == 0
    assert rss_bytes() - before < 4 << 20


def header_error(tmp_path, data, message):
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "bad.safetensors" in str(caught.value)


def one(dtype="F32", shape=(2,), begin=0, end=8):
    return {"t": entry(dtype, list(shape), begin, end)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least 8 bytes, got 0"),
        (b"\x01\x00\x00", "at least 8 bytes, got 3"),
        (b"\xff" * 8, "must be at most 100000000 bytes, got 18446744073709551615"),
        (b"\xff" * 8 + b"{" * 100, "at most 100000000"),
        ((99_999_999).to_bytes(8, "little") + b"{}", "must end inside the file of 10 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "must end inside the file"),
        ((0).to_bytes(8, "little"), "must be a JSON object, got 0 bytes"),
        (safetensors_bytes(b"[]"), "must start with '{'"),
        (safetensors_bytes(b" {}"), "must start with '{'"),
        (safetensors_bytes(b"{x}"), "does not parse"),
        (safetensors_bytes(b'{"a": \xff}'), "must be UTF-8"),
        (safetensors_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (safetensors_bytes(b'{"a": NaN}'), "must be finite, got NaN"),
        (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "does not parse"),
        (safetensors_bytes(b'{"a": 1}'), "tensor 'a': must be described by"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "must be described by"),
        (safetensors_bytes({"__metadata__": 3}), "__metadata__ must map"),
        (safetensors_bytes({"__metadata__": {"a": 3}}), "__metadata__ must map"),
        (safetensors_bytes(one("F33"), b"\0" * 8), "dtype must be one of .* got 'F33'"),
        (safetensors_bytes(one(dtype=["F32"]), b"\0" * 8), "dtype must be one of"),
        (safetensors_bytes(one(shape=[-2]), b"\0" * 8), "sizes from 0 to"),
        (safetensors_bytes(one(shape=[2.0]), b"\0" * 8), "sizes from 0 to"),
        (safetensors_bytes(one(shape=[True, 2]), b"\0" * 8), "sizes from 0 to"),
        (safetensors_bytes(one(shape=[2**63]), b"\0" * 8), "sizes from 0 to"),
        (safetensors_bytes(one(shape=[1] * 65), b"\0" * 8), "at most 64 dimensions, got 65"),
        (safetensors_bytes(one(shape=[2**62, 2**62, 0], end=0)), "must fit in 63 bits"),
        (safetensors_bytes(one(shape=[2**62, 4], end=0)), "must fit in 63 bits"),
        (safetensors_bytes(one(shape=[3]), b"\0" * 8), r"F32 of shape \[3\] takes 12 bytes, got 8"),
        (safetensors_bytes(one(shape=[]), b"\0" * 8), "takes 4 bytes, got 8"),
        (safetensors_bytes(one(end=9), b"\0" * 9), "takes 8 bytes, got 9"),
        (safetensors_bytes(one(begin=8, end=0), b"\0" * 8), "rising numbers"),
        (safetensors_bytes(one(begin=-8, end=0), b"\0" * 8), "rising numbers"),
        (safetensors_bytes(one(begin=0.0), b"\0" * 8), "rising numbers"),
        (safetensors_bytes(one(), b"\0" * 7), "must end inside the file's 7 bytes of data, got 8"),
        (safetensors_bytes(one(begin=2**70, end=2**70 + 8), b"\0" * 8), "must end inside"),
        (safetensors_bytes(one(begin=2**70, end=2**90), b"\0" * 8), "more than 80 bits"),
        (safetensors_bytes(one(), b"\0" * 9), "to the end of the file at 8?"),
        (safetensors_bytes(one(begin=1, end=9), b"\0" * 9), "1 bytes before tensor 't'"),
        (
            safetensors_bytes(
                {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, b"\0" * 7
            ),
            "tensor 'b' overlaps 'a'",
        ),
        (
            safetensors_bytes(
                {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"\0" * 4
            ),
            "overlaps",
        ),
        (
            safetensors_bytes(
                {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, b"\0" * 10
            ),
            "2 bytes before tensor 'b' belong to no tensor",
        ),
        (
            safetensors_bytes(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
                b"\0\0",
            ),
            "the name 'a' appears twice",
        ),
        (
            safetensors_bytes(
                b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"
            ),
            "the name 'dtype' appears twice",
        ),
        (b"PK\x03\x04" + b"\0" * 100, "at most|must end|must start"),
        (os.urandom(4096), "at most|must end|must start"),
    ],
)
def test_bad_headers(tmp_path, data, message):
    header_error(tmp_path, data, message)


def test_every_truncation_is_refused(plain):
    path, _ = plain
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_absurd_length_allocates_nothing(tmp_path):
    path = write(tmp_path / "x.safetensors", (99_000_000).to_bytes(8, "little") + b"{}")
    before = rss_bytes()
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert rss_bytes() - before < 4 << 20


def test_empty_checkpoint(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", safetensors_bytes(b"{}")))
    assert list(checkpoint) == []
    assert checkpoint.nbytes == 0


def test_paths(tmp_path, plain):
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_checkpoint(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors or .gguf"):
        open_checkpoint(empty)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        open_checkpoint(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.int8"):
        open_checkpoint(plain[0], dtype=torch.int8)


# A file that changes while it is open.


def test_replaced_while_open(plain, tmp_path):
    path, tensors = plain
    checkpoint = open_checkpoint(path)
    kept = checkpoint["a"]
    save_file({"a": torch.zeros(4, 6)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was (replaced|truncated)"):
        checkpoint["a"]
    assert same(kept, tensors["a"])


def test_replaced_before_the_first_access(plain, tmp_path):
    path, _ = plain
    data = path.read_bytes()
    checkpoint = open_checkpoint(path)
    write(tmp_path / "new", data)
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="was replaced by another file after it was opened"):
        checkpoint["a"]


def test_truncated_while_open(plain):
    path, _ = plain
    checkpoint = open_checkpoint(path)
    checkpoint["b"]
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(CheckpointError, match=f"was truncated from {size} to {size - 100} bytes"):
        checkpoint["a"]
    with pytest.raises(CheckpointError, match="was truncated"):
        checkpoint.get_slice("a")[0]
    with pytest.raises(CheckpointError, match="was truncated"):
        checkpoint["empty"]


def test_modified_while_open(plain):
    path, _ = plain
    checkpoint = open_checkpoint(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was modified"):
        checkpoint["a"]


def test_removed_while_open(plain):
    path, _ = plain
    checkpoint = open_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="was removed"):
        checkpoint["a"]


# Sharded directories.


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    tensors = {"a": torch.randn(3), "b": torch.randn(4, 2), "c": torch.ones(5, dtype=torch.int8)}
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 49},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, tensors, index


def test_sharded_directory(sharded):
    folder, tensors, _ = sharded
    for path in (folder, folder / "model.safetensors.index.json", str(folder)):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint) == set(tensors)
        assert all(same(checkpoint[name], want) for name, want in tensors.items())
        assert checkpoint.info("b").file.name == "model-00002-of-00002.safetensors"
        assert checkpoint.metadata == {"format": "pt"}
    # One shard alone is a file like any other.
    assert list(open_checkpoint(folder / "model-00001-of-00002.safetensors")) == ["a"]


def test_missing_shard(sharded):
    folder, _, _ = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002\.safetensors: this shard is"
    ):
        open_checkpoint(folder)


def test_shard_without_index(sharded):
    folder, _, _ = sharded
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds the shard model-00001-of-00002.*index"):
        open_checkpoint(folder)


def test_shard_lacks_listed_tensor(sharded):
    folder, _, index = sharded
    index["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*tensor 'd' is not in this shard"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not parse"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "same directory, got '../x"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "same directory"),
        ('{"weight_map": {"a": ".."}}', "same directory"),
        ('{"weight_map": {"a": ""}}', "same directory"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "appears twice"),
    ],
)
def test_bad_index(sharded, text, message):
    folder, _, _ = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_directories(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    assert list(open_checkpoint(folder)) == ["x"]
    save_file({"y": torch.ones(1)}, folder / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"one checkpoint, got another\.safetensors, other"):
        open_checkpoint(folder)
    save_file({"z": torch.ones(1)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder)) == ["z"]

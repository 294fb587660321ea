"""Writing checkpoints: against the safetensors library, and failures that must lose nothing."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from files import random_components
from safetensors import safe_open
from safetensors.torch import load_file
from test_safetensors import random_tensor, same

from mergekit_torch.checkpoint import (
    CheckpointWriter,
    QuantInfo,
    TensorSpec,
    open_checkpoint,
    save_checkpoint,
)
from mergekit_torch.checkpoint.info import SAFETENSORS_DTYPES
from mergekit_torch.checkpoint.writer import parse_size

AFFINE = QuantInfo(4, 32, "affine", 64)


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_the_library_reads_every_dtype(tmp_path):
    tensors = {
        code: random_tensor(dtype, (3, 7), number)
        for number, (code, dtype) in enumerate(SAFETENSORS_DTYPES.items())
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "é": torch.ones(1)}
    path = tmp_path / "x.safetensors"
    assert save_checkpoint(tensors, path, metadata={"note": "ü"}) == [path]
    with safe_open(path, "pt") as library:
        assert library.metadata() == {"note": "ü"}
        assert set(library.keys()) == set(tensors)
        assert all(same(library.get_tensor(name), want) for name, want in tensors.items())
    checkpoint = open_checkpoint(path)
    assert all(same(checkpoint[name], want) for name, want in tensors.items())
    assert checkpoint.metadata == {"note": "ü"}
    for name in tensors:
        info = checkpoint.info(name)
        assert info.offset % info.dtype.itemsize == 0


def test_data_is_aligned(tmp_path):
    tensors = {f"t{n}": torch.ones(n, dtype=torch.uint8) for n in (64, 3, 128, 1)}
    tensors |= {f"f{n}": torch.ones(n) for n in (16, 5)}
    for pad in range(8):
        path = tmp_path / "x.safetensors"
        save_checkpoint(tensors, path, metadata={"pad": "x" * pad})
        checkpoint = open_checkpoint(path)
        assert min(checkpoint.info(name).offset for name in tensors) % 64 == 0
        assert all(checkpoint.info(name).offset % 64 == 0 for name in ("t64", "t128", "f16", "f5"))


def test_tensors_that_are_not_contiguous(tmp_path):
    base = torch.arange(24).view(4, 6)
    tensors = {
        "t": base.t(),
        "part": base[1:3, 2:5],
        "step": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "x.safetensors"
    save_checkpoint(tensors, path)
    library = load_file(path)
    assert all(torch.equal(library[name], want.detach()) for name, want in tensors.items())


def test_any_order_and_threads(tmp_path):
    tensors = {f"t{n}": torch.randn(50, 50) for n in range(40)}
    path = tmp_path / "x.safetensors"
    with CheckpointWriter(path, tensors) as writer:
        threads = [
            threading.Thread(target=lambda part=part: [writer.write(n, tensors[n]) for n in part])
            for part in (list(tensors)[::-1][::2], list(tensors)[::-1][1::2])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not path.exists()
    assert path.stat().st_size == writer.nbytes
    assert all(torch.equal(load_file(path)[name], want) for name, want in tensors.items())


def test_what_a_writer_refuses(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    specs = {"a": torch.ones(2), "q": TensorSpec(torch.float32, (3, 64), AFFINE)}
    writer = CheckpointWriter(path, specs)
    with pytest.raises(KeyError, match="'z' was not declared"):
        writer.write("z", torch.ones(2))
    with pytest.raises(
        ValueError, match=r"must be torch.float32 of shape \[2\].*got torch.float32"
    ):
        writer.write("a", torch.ones(3))
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        writer.write("a", torch.ones(2).double())
    with pytest.raises(ValueError, match="got list"):
        writer.write("a", [1, 2])
    with pytest.raises(ValueError, match="must be a QuantizedTensor or a dict"):
        writer.write("q", torch.ones(3, 64))
    parts = random_components((3, 64), AFFINE)
    with pytest.raises(ValueError, match="components q_codes, q_offset, q_scale, got q_codes"):
        writer.write("q", {"codes": parts["codes"]})
    with pytest.raises(ValueError, match="q_scale"):
        writer.write("q", {**parts, "scale": parts["scale"].float()})
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="must be written once"):
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"1 are missing, such as 'q'"):
        writer.close()
    with pytest.raises(ValueError, match="finished"):
        writer.write("q", parts)
    with pytest.raises(ValueError, match="finished"):
        writer.close()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("specs", "metadata", "error", "message"),
    [
        ({"a": torch.ones(1)}, {"mkrs.x": "1"}, ValueError, "must not start with 'mkrs.'"),
        ({"a": torch.ones(1)}, {"x": 1}, ValueError, "must map strings to strings"),
        ({"__metadata__": torch.ones(1)}, None, ValueError, "other than"),
        ({1: torch.ones(1)}, None, ValueError, "must be a string"),
        ({"a": [1]}, None, TypeError, "must be a Tensor or QuantizedTensor, got list"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, None, TypeError, "cannot hold"),
        ({"a": TensorSpec(torch.int8, (-1,))}, None, ValueError, "sizes from 0 up"),
        (
            {"a": TensorSpec(torch.float32, (2, 32), AFFINE)},
            None,
            ValueError,
            r"in_features = 64\], got \[2, 32\]",
        ),
        (
            {"a": TensorSpec(torch.float32, (2, 64), QuantInfo(3, 32, "affine", 64))},
            None,
            ValueError,
            "bits must be 8, 4 or 2, got 3",
        ),
        (
            {
                "a": TensorSpec(torch.float32, (2, 64), AFFINE),
                "a_codes": torch.ones(1),
            },
            None,
            ValueError,
            "stored name 'a_codes' is already used",
        ),
    ],
)
def test_declarations_that_cannot_be(tmp_path, specs, metadata, error, message):
    with pytest.raises(error, match=message):
        CheckpointWriter(tmp_path / "x.safetensors", specs, metadata=metadata)
    assert names_in(tmp_path) == []


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def write():
        with CheckpointWriter(path, {"a": torch.ones(2)}) as writer:
            writer.write("a", torch.zeros(2))
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        write()
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["x.safetensors"]


def test_a_forgotten_writer_cleans_up(tmp_path):
    writer = CheckpointWriter(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert len(names_in(tmp_path)) == 1
    del writer
    assert names_in(tmp_path) == []


def test_overwriting_the_file_that_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    old = {"a": torch.randn(1000), "b": torch.randn(1000)}
    save_checkpoint(old, path)
    checkpoint = open_checkpoint(path)
    view = checkpoint["a"]
    save_checkpoint(((name, checkpoint[name] * 2) for name in list(checkpoint)), path)
    assert torch.equal(view, old["a"])
    new = open_checkpoint(path)
    assert all(torch.equal(new[name], old[name] * 2) for name in old)
    # And a checkpoint copied onto itself.
    save_checkpoint(new, path)
    assert all(torch.equal(open_checkpoint(path)[name], old[name] * 2) for name in old)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_system_calls(tmp_path, monkeypatch, number, call):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="an existing file is unchanged") as caught:
        save_checkpoint({"a": torch.ones(2)}, path)
    assert caught.value.errno == number
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["x.safetensors"]


def test_disk_full(tmp_path):
    """A file size limit stands in for a full disk: write() fails in the middle of a tensor."""
    path = tmp_path / "x.safetensors"
    save_checkpoint({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write.*existing file is unchanged") as caught:
            save_checkpoint({"a": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["x.safetensors"]


def test_read_only_target(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anything
    with pytest.raises(PermissionError, match=r"is read-only.*x\.safetensors"):
        save_checkpoint({"a": torch.ones(2)}, path)
    assert names_in(tmp_path) == ["x.safetensors"]


def test_targets_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="directory does not exist"):
        save_checkpoint({"a": torch.ones(2)}, tmp_path / "no" / "x.safetensors")
    with pytest.raises(IsADirectoryError):
        CheckpointWriter(tmp_path, {"a": torch.ones(2)})


def test_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    script = textwrap.dedent(f"""
        import os, signal, torch
        from mergekit_torch.checkpoint import CheckpointWriter
        with CheckpointWriter({str(path)!r}, {{"a": torch.ones(9), "b": torch.ones(9)}}) as writer:
            writer.write("a", torch.zeros(9))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    assert torch.equal(open_checkpoint(path)["a"], torch.ones(2))


def test_permissions_and_links(tmp_path):
    path, link = tmp_path / "x.safetensors", tmp_path / "link.safetensors"
    mask = os.umask(0o027)
    try:
        save_checkpoint({"a": torch.ones(2)}, path)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)
    os.chmod(path, 0o600)
    save_checkpoint({"a": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    link.symlink_to(path)
    save_checkpoint({"b": torch.ones(3)}, link)
    assert path.read_bytes() == before  # as in caches of models, the link's target is not ours
    assert not link.is_symlink()


# Directories and shards.


def tensors_of(*sizes):
    return {f"t{n}": torch.full((size,), n, dtype=torch.uint8) for n, size in enumerate(sizes)}


def test_one_file_in_a_directory(tmp_path):
    folder = tmp_path / "new" / "model"
    assert save_checkpoint(tensors_of(5, 6), folder) == [folder / "model.safetensors"]
    assert set(open_checkpoint(folder)) == {"t0", "t1"}
    with safe_open(folder / "model.safetensors", "pt") as library:
        assert library.metadata() == {"format": "pt"}


def test_shards(tmp_path):
    tensors = tensors_of(60, 50, 30, 500, 10, 0)
    shape = (3, 64)
    parts = random_components(shape, AFFINE)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    specs["q"] = TensorSpec(torch.float32, shape, AFFINE)
    files = save_checkpoint(
        iter([*tensors.items(), ("q", parts)]), tmp_path, max_shard_size=100, specs=specs
    )
    names = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    assert names_in(tmp_path) == sorted([*names, "model.safetensors.index.json"])
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs.values())
    assert index["weight_map"]["t3"] == names[2]
    assert {index["weight_map"][f"q_{part}"] for part in parts} == {names[4]}
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(specs)
    assert all(torch.equal(checkpoint[name], want) for name, want in tensors.items())
    found, info = checkpoint.components("q")
    assert info == AFFINE
    assert all(torch.equal(found[part], want) for part, want in parts.items())
    for name in names:
        assert load_file(tmp_path / name)
    # Sharded to single and back: nothing of the old checkpoint stays behind.
    save_checkpoint(checkpoint_without(checkpoint, "q"), tmp_path)
    assert names_in(tmp_path) == ["model.safetensors"]
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    save_checkpoint(open_checkpoint(tmp_path), tmp_path, max_shard_size="300B")
    assert len(names_in(tmp_path)) == 5
    assert (tmp_path / "other.safetensors").read_bytes() == b"mine"
    assert set(open_checkpoint(tmp_path)) == set(tensors)


def checkpoint_without(checkpoint, name):
    return ((key, checkpoint[key]) for key in list(checkpoint) if key != name)


def test_a_failing_shard_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tensors_of(60, 50), tmp_path, max_shard_size=64)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}

    def pairs():
        yield "t0", torch.zeros(60, dtype=torch.uint8)
        raise RuntimeError("source broke")

    specs = {name: TensorSpec(torch.uint8, (60,)) for name in ("t0", "t1")}
    with pytest.raises(RuntimeError, match="source broke"):
        save_checkpoint(pairs(), tmp_path, max_shard_size=64, specs=specs)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before
    with pytest.raises(ValueError, match="must be in specs"):
        save_checkpoint([("x", torch.ones(1))], tmp_path, specs=specs)
    with pytest.raises(ValueError, match="2 are missing"):
        save_checkpoint([], tmp_path, specs=specs)
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before


def test_progress_and_empty(tmp_path):
    seen = []
    tensors = tensors_of(5, 6)
    save_checkpoint(tensors, tmp_path / "x.safetensors", progress=lambda *a: seen.append(a))
    assert seen == [("t0", 5), ("t1", 6)]
    save_checkpoint({}, tmp_path / "y.safetensors")
    assert len(open_checkpoint(tmp_path / "y.safetensors")) == 0


def test_sizes():
    assert parse_size(5) == 5
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 << 19
    for bad in ("5 apples", "", "-1GB", 0, True, "0B"):
        with pytest.raises(ValueError, match="a size must be"):
            parse_size(bad)


def test_shards_need_a_directory(tmp_path):
    with pytest.raises(ValueError, match="max_shard_size needs a directory"):
        save_checkpoint(tensors_of(1), tmp_path / "x.safetensors", max_shard_size="1GB")

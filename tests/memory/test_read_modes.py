import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_torch.checkpoint import CheckpointError, open_checkpoint, pread, save_checkpoint
from mergekit_torch.checkpoint.info import SAFETENSORS_DTYPES
from mergekit_torch.checkpoint.rows import read_rows, row_count, row_layout
from mergekit_torch.tensor import QuantizedTensor


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for i, dtype in enumerate(SAFETENSORS_DTYPES.values()):
        raw = torch.randint(0, 256, (3, 5 + i, dtype.itemsize), generator=generator)
        result[f"plain.{i}"] = raw.to(torch.uint8).view(-1).view(dtype).view(3, 5 + i)
    result["scalar"] = torch.tensor(3.5)
    result["empty"] = torch.empty(4, 0)
    result["stack"] = torch.randn(2, 3, 4, 5, generator=generator)
    result["large"] = torch.randn(700, 2000, generator=generator)  # more than one piece to read
    for scheme in ("symmetric", "asymmetric", "affine"):
        w = torch.randn(2, 9, 100, generator=generator)
        result[f"q.{scheme}"] = QuantizedTensor.from_float(w, 4, 32, scheme)
    return result


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "model.safetensors"
    save_checkpoint(tensors(), path)
    return path


def same(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if isinstance(a, QuantizedTensor):
        for part, component in a.components.items():
            same(component, b.components[part])
        return
    raw = [t.clone(memory_format=torch.contiguous_format).view(-1) for t in (a, b)]
    raw = [t.clone().view(torch.uint8) for t in raw]
    assert torch.equal(*raw)


@pytest.mark.parametrize("read", ["mmap", "pread", "auto"])
def test_modes_agree(path, read):
    expected = tensors()
    with open_checkpoint(path, read=read) as checkpoint:
        assert checkpoint.read == ("mmap" if read == "mmap" else "pread")
        assert set(checkpoint) == set(expected)
        for name, tensor in expected.items():
            same(checkpoint[name], tensor)
        for name, tensor in checkpoint.stored_items():
            assert tensor.is_contiguous(), name


def test_a_read_tensor_is_independent(path):
    with open_checkpoint(path, read="pread") as checkpoint:
        a, b = checkpoint["large"], checkpoint["large"]
        assert a.data_ptr() != b.data_ptr()
        assert a.data_ptr() % 4096 == 0
        a.zero_()
        same(b, tensors()["large"])
    same(b, tensors()["large"])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_slices_agree(path, data):
    expected = tensors()
    name = data.draw(st.sampled_from(["stack", "large", "plain.4", "plain.13", "scalar", "empty"]))
    index = []
    for size in expected[name].shape:
        if size and data.draw(st.booleans()):
            index.append(data.draw(st.integers(-size, size - 1)))
        else:
            first, last = data.draw(st.integers(0, size)), data.draw(st.integers(-1, size + 1))
            index.append(slice(first, last, data.draw(st.sampled_from([None, None, 1, 2]))))
    with open_checkpoint(path, read="pread") as checkpoint:
        same(checkpoint.get_slice(name)[tuple(index)], expected[name][tuple(index)])


def test_quantized_slices_agree(path):
    expected = tensors()["q.affine"]
    with open_checkpoint(path, read="pread") as checkpoint:
        for index in ((0,), (slice(1, 2), slice(3, 7)), (1, slice(None), slice(32, 96))):
            same(checkpoint.get_slice("q.affine")[index], expected[index])
        with pytest.raises(ValueError, match="multiple"):
            checkpoint.get_slice("q.affine")[0, :, 3:40]


def test_slices_read_only_their_bytes(path, monkeypatch):
    counted = []
    original = pread.read_into

    def counting(file, path, out, offset, **arguments):
        counted.append(out.numel() * out.element_size())
        original(file, path, out, offset, **arguments)

    monkeypatch.setattr(pread, "read_into", counting)
    with open_checkpoint(path, read="pread") as checkpoint:
        part = checkpoint.get_slice("large")
        part[10:20]
        assert sum(counted) == 10 * 2000 * 4
        counted.clear()
        part[:, 100:104]
        assert sum(counted) == 700 * 4 * 4


def resident(tensor_address, nbytes):
    """Bytes of the mapping at an address that are resident, from the kernel's own books."""
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                first, last = (int(part, 16) for part in head.split("-"))
                inside = first <= tensor_address < last
            elif inside and head == "Rss:":
                return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is not there")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's smaps")
def test_pages_behind_a_reader_are_dropped(tmp_path):
    path = tmp_path / "big.safetensors"
    count, each = 16, 1 << 20
    save_checkpoint(
        {f"t{i}": torch.full((each,), i, dtype=torch.uint8) for i in range(count)}, path
    )
    with open_checkpoint(path) as checkpoint:
        most = 0
        for name in checkpoint:
            tensor = checkpoint[name]
            assert int(tensor.sum(dtype=torch.int64)) == each * int(name[1:])
            most = max(most, resident(tensor.data_ptr(), each))
            checkpoint.drop_pages(name)
        # The tensor itself, and what the kernel maps around a fault (64 KiB) of its neighbours.
        assert most <= each + (1 << 18)
        assert resident(tensor.data_ptr(), each) <= 1 << 18
        assert int(checkpoint["t3"][5]) == 3


def test_read_rows(path):
    expected = tensors()
    with open_checkpoint(path) as checkpoint:
        for name, tensor in expected.items():
            layout = row_layout(checkpoint, name)
            rows = row_count(tuple(tensor.shape))
            parts = tensor.components if isinstance(tensor, QuantizedTensor) else {"": tensor}
            assert layout.keys() == parts.keys()
            for begin, end in ((0, rows), (rows // 3, rows), (0, (rows + 1) // 2)):
                out = {
                    part: torch.empty(end - begin, n, dtype=dtype)
                    for part, (dtype, n) in layout.items()
                }
                read_rows(checkpoint, name, begin, out)
                for part, (_, n) in layout.items():
                    same(out[part], parts[part].reshape(rows, n)[begin:end])


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: os.truncate(path, 1000), "was truncated from"),
        (lambda path: os.utime(path, ns=(1, 1)), "was modified"),
        (lambda path: path.unlink(), "was removed"),
        (lambda path: save_checkpoint({"x": torch.ones(1 << 20)}, path), "replaced|modified|trunc"),
    ],
    ids=["truncated", "touched", "removed", "replaced"],
)
def test_a_changed_file_raises_before_it_is_touched(tmp_path, read, damage, match):
    path = tmp_path / "model.safetensors"
    save_checkpoint(tensors(), path)
    with open_checkpoint(path, read=read) as checkpoint:
        taken = checkpoint["stack"].clone()
        damage(path)
        with pytest.raises(CheckpointError, match=match):
            checkpoint["stack"]
        with pytest.raises(CheckpointError, match=match):
            read_rows(checkpoint, "scalar", 0, {"": torch.empty(1, 1)})
    same(taken, tensors()["stack"])


def test_errors_name_file_and_offset(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint({"x": torch.ones(100)}, path)
    with open_checkpoint(path, read="pread") as checkpoint:
        offset = checkpoint.info("x").offset
        # A directory opens and cannot be read: the system's EISDIR.
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            opened = checkpoint._files[0].opened()
            os.dup2(directory, opened.fileno())
            with pytest.raises(IsADirectoryError, match=f"offset {offset}") as caught:
                checkpoint["x"]
            assert caught.value.filename == str(path)
        finally:
            os.close(directory)


def test_truncation_between_check_and_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_checkpoint({"x": torch.ones(5000)}, path)
    with open_checkpoint(path, read="pread") as checkpoint:
        checkpoint["x"]
        monkeypatch.setattr(checkpoint._files[0], "check", lambda: None)
        os.truncate(path, 8192)
        with pytest.raises(CheckpointError, match="ends before byte 8192"):
            checkpoint["x"]


def test_many_threads_read_at_once(tmp_path):
    value = torch.arange(3 << 20, dtype=torch.int32)
    save_checkpoint({f"t{i}": value + i for i in range(8)}, tmp_path / "x.safetensors")
    wrong = []

    def work(i, checkpoint):
        for _ in range(3):
            if not torch.equal(checkpoint[f"t{i}"], value + i):
                wrong.append(i)

    with open_checkpoint(tmp_path / "x.safetensors", read="pread") as checkpoint:
        threads = [threading.Thread(target=work, args=(i, checkpoint)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_reads(tmp_path):
    """The threads that help a read are the parent's."""
    code = f"""
import os, sys, torch
from mergekit_torch.checkpoint import open_checkpoint, save_checkpoint
value = torch.arange(4 << 20, dtype=torch.int32)
save_checkpoint({{"x": value}}, {str(tmp_path / "x.safetensors")!r})
checkpoint = open_checkpoint({str(tmp_path / "x.safetensors")!r}, read="pread")
assert torch.equal(checkpoint["x"], value)
child = os.fork()
if child == 0:
    os._exit(0 if all(bytes(checkpoint["x"].numpy()) == bytes(value.numpy()) for _ in "ab") else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_bad_mode(path):
    with pytest.raises(ValueError, match="read must be"):
        open_checkpoint(path, read="fast")


def test_auto_maps_what_does_not_fit(path, monkeypatch):
    monkeypatch.setattr("mergekit_torch.checkpoint.opening.available_memory", lambda: 1 << 20)
    with open_checkpoint(path, read="auto") as checkpoint:
        assert checkpoint.read == "mmap"


def test_closing_while_others_read(path):
    expected = tensors()["large"]
    for _ in range(5):
        checkpoint = open_checkpoint(path, read="pread")
        wrong = []

        def work(checkpoint=checkpoint, wrong=wrong):
            try:
                for _ in range(20):
                    if not torch.equal(checkpoint["large"], expected):
                        wrong.append("values")
            except CheckpointError:
                pass
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        checkpoint.close()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.fixture
def sparse(tmp_path):
    """A checkpoint of holes in a file system that fills a hole's page when it is read."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("needs a tmpfs at /dev/shm")
    header = {}
    end = 0
    for name, dtype, shape in (
        ("x", "F32", [64, 64 << 10]),  # rows of 256 KiB
        ("q_codes", "U8", [512, 64 << 10]),  # rows of 64 KiB
        ("q_scale", "F32", [512, 1 << 10]),  # rows of 4 KiB
    ):
        size = math.prod(shape) * (4 if dtype == "F32" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    info = {"bits": 8, "group_size": 64, "scheme": "symmetric", "in_features": 64 << 10}
    header["__metadata__"] = {
        "mkrs.format_version": "1",
        "mkrs.quantized": json.dumps({"q": info}),
    }
    text = json.dumps(header).encode()
    text += b" " * (4096 - 8 - len(text))  # data starts with a page
    with tempfile.NamedTemporaryFile(dir=shm, suffix=".safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(4096 + end)
        file.flush()
        yield Path(file.name)


def test_slices_of_a_map_touch_only_their_pages(sparse):
    def pages():
        return os.stat(sparse).st_blocks * 512 // 4096

    def touched(work):
        before = pages()
        work()
        return pages() - before

    with open_checkpoint(sparse) as checkpoint:
        x, q = checkpoint.get_slice("x"), checkpoint.get_slice("q")
        if not pages() < 10:
            pytest.skip("this file system has no holes")
        assert touched(lambda: (x[10:13], q[100:104], checkpoint["x"], checkpoint["q"])) == 0
        assert touched(lambda: x[10:13].sum()) == 3 * 64
        assert touched(lambda: x[40:42, 1024:2048].sum()) == 2  # 4 KiB of each row
        assert touched(lambda: x[:, 5120:5121].sum()) == 64 - 3  # a page a row, three are there
        # Rows of a quantized weight: codes and scales.
        assert touched(lambda: q[100:104].dequantize()) == 4 * 16 + 4
        assert touched(lambda: q[200:203, 4096:8192].dequantize()) == 3 * 1 + 3

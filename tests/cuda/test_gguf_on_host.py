"""The CUDA kernel of gguf_unpack, compiled for the CPU: the same source, without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gguf_unpack import IDS, TYPES, random_blocks
from torch.utils import cpp_extension

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, reference

ROOT = Path(__file__).resolve().parents[2]
SENTINEL = 0xEE
MARGIN = 64  # bytes before and behind every output


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("host") / "gguf_unpack.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas"]  # unroll
    # Overflowing shifts and misaligned words trap.
    command += ["-fsanitize=shift,alignment,signed-integer-overflow"]
    command += ["-fsanitize-undefined-trap-on-error"]
    command += [f"-I{ROOT / 'tests/cuda/host'}", f"-I{ROOT / 'csrc'}"]
    command += [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    command += [str(ROOT / "tests/cuda/host/gguf_unpack.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def guarded(shape, dtype):
    """An output of that shape in a buffer of sentinels, 64 bytes aligned."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.full(size + 2 * MARGIN + 64, SENTINEL, dtype=np.uint8)
    begin = MARGIN + -(buffer.ctypes.data + MARGIN) % 64
    return buffer, slice(begin, begin + size)


def unpack(library, view, ggml_type, in_features, row_steps, descending):
    """What the kernel writes for rows of a NumPy matrix, and that it writes nothing else."""
    layout = GGUF_LAYOUTS[ggml_type]
    rows, row_blocks = len(view), in_features // layout.block
    groups = (rows, in_features // layout.group_size)
    scale = torch.empty(0, dtype=layout.scale_dtype).numpy().dtype
    shapes = [((rows, in_features * layout.bits // 8), np.uint8), (groups, scale), (groups, scale)]
    outputs = [guarded(*shape) for shape in shapes]
    done = library.gguf_unpack(
        ctypes.c_int(ggml_type),
        ctypes.c_void_p(view.ctypes.data),
        *(ctypes.c_int64(n) for n in (rows, row_blocks, view.strides[0])),
        ctypes.c_int(row_steps),
        ctypes.c_bool(descending),
        *(ctypes.c_void_p(buffer.ctypes.data + inner.start) for buffer, inner in outputs),
    )
    assert done
    result = []
    for (buffer, inner), (shape, dtype) in zip(outputs, shapes, strict=True):
        assert (buffer[: inner.start] == SENTINEL).all()
        assert (buffer[inner.stop :] == SENTINEL).all()
        result.append(buffer[inner].view(dtype).reshape(shape))
    if layout.scheme == "symmetric":
        assert (result[2].view(np.uint8) == SENTINEL).all()  # there is no offset
        result[2] = np.empty(0, dtype=np.uint8)
    return result


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
def test_kernel_against_reference(library, ggml_type):
    layout = GGUF_LAYOUTS[ggml_type]
    # Rows, blocks of a row, bytes before the first and between rows, rows of the grid, order.
    for rows, blocks, start, gap, steps, descending in (
        (1, 1, 0, 0, 1, False),
        (3, 5, 0, 0, 9, True),
        (7, 333, 0, 0, 1, False),  # several tiles, the last one ragged
        (5, 18, 2, 0, 1, True),
        (5, 9, 1, 13, 2, False),  # bytes, and blocks that walk over rows
        (4, 700, 4, 4, 4, True),
        (4, 6, 0, 16, 3, False),
    ):
        k = blocks * layout.block
        data = random_blocks(ggml_type, rows, k, seed=rows * 1000 + blocks)
        width = data.shape[1] + gap
        buffer = np.zeros(start + rows * width + 16, dtype=np.uint8)
        begin = -buffer.ctypes.data % 16 + start
        view = buffer[begin : begin + rows * width].reshape(rows, width)[:, : data.shape[1]]
        view[:] = data.numpy()
        got = unpack(library, view, ggml_type, k, steps, descending)
        want = reference(data, ggml_type, rows, k)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.numpy().view(np.uint8))

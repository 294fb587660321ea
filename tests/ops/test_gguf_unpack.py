"""gguf_unpack against the gguf package's dequantizers and against the plain-torch reference."""

import gguf
import numpy as np
import pytest
import torch

from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, gguf_unpack, reference

TYPES = list(GGUF_LAYOUTS)
IDS = [layout.name for layout in GGUF_LAYOUTS.values()]
# Byte positions of the f16 fields of each block, to make some of them ordinary numbers.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(ggml_type, rows, in_features, seed, finite=True):
    layout = GGUF_LAYOUTS[ggml_type]
    rng = np.random.default_rng(seed)
    count = rows * in_features // layout.block
    data = rng.integers(0, 256, (count, layout.block_bytes), dtype=np.uint8)
    if finite:
        for start in HALVES[layout.name]:
            d = (rng.standard_normal(count) * 0.05).astype(np.float16)
            data[:, start : start + 2] = d[:, None].view(np.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


def unpack_codes(codes, bits, in_features):
    shift = np.arange(0, 8, bits, dtype=np.uint8)
    q = (codes[..., None] >> shift) & np.uint8(2**bits - 1)
    return q.reshape(*codes.shape[:-1], -1)[..., :in_features]


def dequantize(codes, scale, zero, layout, in_features):
    """The format's definition in numpy float32: one rounding per operation."""
    q = unpack_codes(codes.numpy(), layout.bits, in_features).astype(np.int32)
    scale = np.repeat(scale.numpy().astype(np.float32), layout.group_size, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        if layout.scheme == "symmetric":
            return scale * (q - 2 ** (layout.bits - 1)).astype(np.float32)
        offset = np.repeat(zero.numpy().astype(np.float32), layout.group_size, axis=-1)
        return scale * q.astype(np.float32) + offset


def gguf_dequantize(blocks, ggml_type):
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(
            np.ascontiguousarray(blocks.numpy()), gguf.GGMLQuantizationType(ggml_type)
        )


def assert_same_bits(actual, expected):
    """Bit for bit, the sign of zero included; NaN equals NaN whatever its payload."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(np.uint32)[~nan],
        np.ascontiguousarray(expected).view(np.uint32)[~nan],
    )


@pytest.fixture
def device(device):
    if device.type == "mps":
        pytest.skip("gguf_unpack runs on CPU and CUDA devices")
    return device


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "any-bytes"])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (64, 9), (2, 1500)])
def test_bit_exact_against_gguf(ggml_type, finite, rows, blocks, device):
    layout = GGUF_LAYOUTS[ggml_type]
    k = layout.block * blocks
    data = random_blocks(ggml_type, rows, k, seed=rows * 100 + blocks, finite=finite)
    result = gguf_unpack(data.to(device), ggml_type, rows, k)
    assert all(part.device.type == device.type for part in result)
    codes, scale, zero = (part.cpu() for part in result)
    assert codes.shape == (rows, k * layout.bits // 8)
    assert scale.shape == (rows, k // layout.group_size)
    assert scale.dtype == layout.scale_dtype
    assert_same_bits(
        dequantize(codes, scale, zero, layout, k), gguf_dequantize(data, ggml_type).reshape(rows, k)
    )


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
def test_layouts_agree_with_gguf(ggml_type):
    layout = GGUF_LAYOUTS[ggml_type]
    kind = gguf.GGMLQuantizationType(ggml_type)
    assert kind.name == layout.name
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.block, layout.block_bytes)


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
def test_reference_matches(ggml_type, device):
    k = GGUF_LAYOUTS[ggml_type].block * 3
    data = random_blocks(ggml_type, 7, k, seed=5)
    result = gguf_unpack(data.to(device), ggml_type, 7, k)
    for got, want in zip(result, reference(data, ggml_type, 7, k), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
@pytest.mark.parametrize(("start", "gap"), [(1, 13), (2, 0), (4, 4), (16, 16)])
def test_unaligned_and_strided_blocks(ggml_type, start, gap, device):
    layout = GGUF_LAYOUTS[ggml_type]
    k = layout.block * 9
    data = random_blocks(ggml_type, 5, k, seed=11)
    row_bytes = data.shape[1]
    want = reference(data, ggml_type, 5, k)
    # Rows of a wider matrix that starts at any address.
    wide = torch.zeros(5 * (row_bytes + gap) + start, dtype=torch.uint8, device=device)
    view = wide[start:].view(5, row_bytes + gap)[:, gap // 2 : gap // 2 + row_bytes]
    view.copy_(data)
    for got, expected in zip(gguf_unpack(view, ggml_type, 5, k), want, strict=True):
        assert torch.equal(got.cpu(), expected)
    # Bytes that are not adjacent.
    spread = torch.zeros(5, row_bytes, 2, dtype=torch.uint8, device=device)
    spread[..., 0] = data
    for got, expected in zip(gguf_unpack(spread[..., 0], ggml_type, 5, k), want, strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("ggml_type", TYPES, ids=IDS)
def test_one_and_many_threads_agree(ggml_type):
    k = GGUF_LAYOUTS[ggml_type].block * 40
    data = random_blocks(ggml_type, 97, k, seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gguf_unpack(data, ggml_type, 97, k)
        torch.set_num_threads(4)
        many = gguf_unpack(data, ggml_type, 97, k)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(("rows", "k"), [(0, 256), (4, 0), (0, 0)])
def test_empty(rows, k, device):
    blocks = torch.empty(rows, k // 256 * 144, dtype=torch.uint8, device=device)
    codes, scale, zero = gguf_unpack(blocks, 12, rows, k)
    assert codes.shape == (rows, k // 2)
    assert scale.shape == zero.shape == (rows, k // 32)


def test_bad_arguments():
    good = torch.zeros(2, 18, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"blocks must be uint8, got torch.int8"):
        gguf_unpack(good.to(torch.int8), 2, 2, 32)
    with pytest.raises(TypeError, match="must be a Tensor, got list"):
        gguf_unpack([1], 2, 2, 32)
    with pytest.raises(ValueError, match=r"ggml_type must be one of Q4_0 \(2\).*got 4"):
        gguf_unpack(good, 4, 2, 32)
    with pytest.raises(ValueError, match="multiple of 32 for Q4_0, got 33"):
        gguf_unpack(good, 2, 2, 33)
    with pytest.raises(ValueError, match=r"shape \[3, 18\].*got \[2, 18\]"):
        gguf_unpack(good, 2, 3, 32)
    with pytest.raises(ValueError, match="rows must not be negative, got -1"):
        gguf_unpack(good, 2, -1, 32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((2, 3, 32), r"blocks must have shape \[3"),
        ((2, 2, 33), "multiple of 32"),
        ((2, 2, -32), "must not be negative"),
        ((2, -2, 32), "must not be negative"),
        ((2, 2, 2**62), "blocks must have shape"),
        ((99, 2, 32), "ggml_type must be one of"),
    ],
)
def test_the_op_itself_checks(args, message, device):
    blocks = torch.zeros(2, 18, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match=f"mkrs::gguf_unpack: .*{message}"):
        torch.ops.mkrs.gguf_unpack(blocks, *args)


def test_opcheck(device):
    data = random_blocks(12, 3, 512, seed=1).to(device)
    torch.library.opcheck(torch.ops.mkrs.gguf_unpack.default, (data, 12, 3, 512))
    data = random_blocks(2, 3, 64, seed=1).to(device)
    torch.library.opcheck(torch.ops.mkrs.gguf_unpack.default, (data, 2, 3, 64))

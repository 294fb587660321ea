"""What only a CUDA device can show; the op suite itself runs there with MKRS_TEST_DEVICE=cuda."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from oracle import assert_within, dequantize64, matmul_bound, random_weight, transposed_bound

from mergekit_torch import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device and a build with MKRS_CUDA=1"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Every route: decode in one and several passes, the fused kernel's tiles, ragged edges of all.
INPUT_ROWS = (1, 4, 5, 16, 17, 64, 65, 130, 300)


def matmul(x, w, bias=None):
    return ops.dequant_matmul(x, *w.components, bias, bits=w.bits, group_size=w.group_size)


def matmul_t(x, w):
    return ops.dequant_matmul_t(
        x, *w.components, bits=w.bits, group_size=w.group_size, in_features=w.in_features
    )


def check(x, w, bias=None):
    x64 = x.cpu().double().numpy()
    expected = x64 @ dequantize64(w).T
    if bias is not None:
        expected = expected + bias.cpu().double().numpy()
    bound = matmul_bound(x64, w, expected, x.dtype) * (1 if bias is None else 2)
    got = matmul(x, w, bias)
    assert_within(got, expected, bound)
    return got


@pytest.mark.parametrize("group_size", [16, 32, 64, 256, -1])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_routes_against_float64(bits, group_size, dtype):
    for rows, k in ((200, 512), (130, 1088), (72, 4096)):
        w = random_weight(rows, k, bits, group_size, "affine", torch.float16, "cuda")
        for m in INPUT_ROWS:
            bias = torch.randn(rows, device="cuda", dtype=dtype) if m % 2 else None
            check(torch.randn(m, k, device="cuda", dtype=dtype), w, bias)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_many_tiles_a_block(bits, scheme):
    """More row tiles than multiprocessors, so that blocks walk over several and meet between."""
    w = random_weight(5000, 1024, bits, 64, scheme, torch.float32, "cuda")
    for m in (1, 3, 16, 40):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        check(x, w)
        y = torch.randn(m, 5000, device="cuda", dtype=torch.bfloat16)
        y64 = y.cpu().double().numpy()
        expected = y64 @ dequantize64(w)
        assert_within(matmul_t(y, w), expected, transposed_bound(y64, w, expected, y.dtype))


@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transposed_routes_against_float64(bits, group_size, dtype):
    """Few input rows exactly, more on rounded weights, most by way of dense ones; ragged edges."""
    for rows, k in ((200, 512), (136, 1092), (1001, 100), (4104, 64)):
        for scheme in ("affine", "asymmetric"):
            w = random_weight(rows, k, bits, group_size, scheme, torch.float16, "cuda")
            for m in (1, 2, 3, 8, 9, 16, 33, 64, 65):
                y = torch.randn(m, rows, device="cuda", dtype=dtype)
                y64 = y.cpu().double().numpy()
                expected = y64 @ dequantize64(w)
                assert_within(matmul_t(y, w), expected, transposed_bound(y64, w, expected, dtype))


def test_activations_fill_shared_memory():
    """Long rows: what is staged of them, and over how many blocks, follows from the room."""
    for k in (6144, 14336, 28672):
        for bits in (8, 4, 2):
            w = random_weight(40, k, bits, 64, "affine", torch.float16, "cuda")
            for m in (1, 2, 4, 6, 8, 11, 16):
                check(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), w)


def test_results_do_not_vary():
    """Partial sums are added in a fixed order: every run gives the same bits."""
    w = random_weight(300, 8192, 4, 64, "affine", device="cuda")
    for m in (1, 7, 33, 200):
        x = torch.randn(m, 8192, device="cuda", dtype=torch.float16)
        y = torch.randn(m, 300, device="cuda", dtype=torch.float16)
        first, first_t = matmul(x, w), matmul_t(y, w)
        for _ in range(5):
            assert torch.equal(matmul(x, w), first)
            assert torch.equal(matmul_t(y, w), first_t)


def test_unaligned_views():
    """Weights and inputs that start anywhere take slower loads to the same values."""
    w = random_weight(67, 1024, 4, 64, "affine", device="cuda")
    base = torch.zeros(67 * 520 + 3, dtype=torch.uint8, device="cuda")
    for offset in (0, 1, 3):
        codes = base[offset : offset + 67 * 520].view(67, 520)[:, :512]
        codes.copy_(w.codes)
        view = dataclasses.replace(w, codes=codes)
        for m in (1, 16, 70):
            store = torch.randn(m * 1027 + 1, device="cuda").to(torch.bfloat16)
            check(store[1:].view(m, 1027)[:, :1024], view)


def test_current_stream_is_used():
    """An op on a side stream is ordered after that stream's work, and only that."""
    w = random_weight(512, 1024, 4, 64, "affine", device="cuda")
    x = torch.randn(2, 1024, device="cuda", dtype=torch.float16)
    expected = matmul(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = matmul(late, w)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_graph_capture_and_replay():
    """Every op can be captured; replays see new inputs."""
    w = random_weight(256, 512, 4, 64, "affine", device="cuda")
    static = {m: torch.randn(m, 512, device="cuda", dtype=torch.bfloat16) for m in (1, 20, 300)}
    gradients = {m: torch.randn(m, 256, device="cuda", dtype=torch.bfloat16) for m in static}
    indices = torch.tensor([3, 255, 0], device="cuda")

    def run():
        results = [matmul(x, w) for x in static.values()]
        results += [matmul_t(y, w) for y in gradients.values()]
        arguments = {"bits": 4, "group_size": 64, "in_features": 512}
        results.append(ops.dequantize(*w.components, **arguments, dtype=torch.float32))
        results.append(
            ops.dequant_embedding(indices, *w.components, **arguments, dtype=torch.float16)
        )
        results.append(ops.dequant_reduce(*w.components, **arguments, reduction="sum"))
        results += torch.ops.mkrs.quantize(static[20], 4, 64, "affine")
        return results

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in [*static.values(), *gradients.values()]:
        x.normal_()
    indices.copy_(torch.tensor([7, 8, 9], device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, run(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_another_device_than_the_current_one():
    w = random_weight(128, 512, 4, 64, "affine", device="cuda:1")
    for m in (1, 100):
        x = torch.randn(m, 512, device="cuda:1", dtype=torch.float16)
        got = matmul(x, w)
        assert got.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        check(x, w)


def test_quantize_matches_the_cpu_bit_for_bit():
    for dtype in FLOATS:
        for shape in ((64, 512), (33, 100), (5, 257), (3, 2, 64)):
            weight = torch.randn(shape, dtype=dtype) * torch.randint(1, 50, (*shape[:-1], 1))
            weight[..., 0, :] = 0.375  # a constant row
            for bits in (8, 4, 2):
                for scheme in ("symmetric", "asymmetric", "affine"):
                    for group in (16, 64, 256, -1):
                        here = ops.quantize(weight, bits, group, scheme)
                        there = ops.quantize(weight.cuda(), bits, group, scheme)
                        for a, b in zip(here, there, strict=True):
                            assert torch.equal(a, b.cpu()), (dtype, shape, bits, scheme, group)


def test_devices_must_agree():
    w = random_weight(8, 64, 4, 32, "affine", device="cuda")
    with pytest.raises(ValueError, match="must be on"):
        matmul(torch.randn(1, 64), w)


def test_an_index_out_of_range_is_an_error_of_the_stream():
    """In a process of its own: such an error ends the CUDA context, as with torch's indexing."""
    script = (
        "import torch\n"
        "from mergekit_torch import ops\n"
        "parts = ops.quantize(torch.randn(8, 64, device='cuda'), 4, 32, 'symmetric')[:2]\n"
        "bad = torch.tensor([9], device='cuda')\n"
        "ops.dequant_embedding(bad, *parts, None, None, bits=4, group_size=32,"
        " in_features=64, dtype=torch.float32)\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "indices must be in [0, 8), got 9" in result.stdout + result.stderr

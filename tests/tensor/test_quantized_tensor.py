"""What a QuantizedTensor is: construction, metadata, conversions, copies and protocols."""

import copy
import io
import pickle

import pytest
import torch
from cases import BITS, FLOATS, SCHEMES
from oracle import dequantize64, random_weight
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mergekit_torch import QuantizedTensor


def quantized(rows, k, bits=4, group=64, scheme="affine", scale_dtype=torch.float16, **kwargs):
    w = random_weight(rows, k, bits, group, scheme, scale_dtype)
    return QuantizedTensor(
        *w.components, bits=w.bits, group_size=w.group_size, in_features=k, **kwargs
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "k"), [((1,), 1), ((3,), 5), ((33,), 100), ((2, 3), 70)])
def test_dequantizes_as_the_format_says(bits, scheme, rows, k):
    w = random_weight(rows, k, bits, 64, scheme, torch.float32)
    q = QuantizedTensor(*w.components, bits=bits, group_size=64, in_features=k)
    assert tuple(q.shape) == (*rows, k)
    expected = torch.from_numpy(dequantize64(w)).float()
    # float64 then float32 rounds once, the format rounds a product and a sum.
    step = w.scale.abs().max() * 2**bits + (0 if w.offset is None else w.offset.abs().max())
    torch.testing.assert_close(q.dequantize(), expected, rtol=0, atol=float(step) * 2.0**-23)


def test_dequantizes_into_a_given_tensor():
    q = quantized(24, 100, dtype=torch.bfloat16)
    out = torch.empty(24, 100, dtype=torch.float16)
    assert q.dequantize(out=out) is out  # whose dtype counts
    assert torch.equal(out, q.dequantize(torch.float16))
    assert q.t().dequantize(out=out.t()).data_ptr() == out.data_ptr()
    assert torch.equal(out, q.dequantize(torch.float16))
    row = torch.empty(100, dtype=torch.bfloat16)
    assert torch.equal(q[3].dequantize(out=row), q.dequantize()[3])
    assert torch.equal(row, q.dequantize()[3])
    with pytest.raises(TypeError, match=r"dtype torch\.float32 that is asked for"):
        q.dequantize(torch.float32, out=out)
    with pytest.raises(ValueError, match=r"out must have shape \[24, 100\]"):
        q.dequantize(out=out[:, :64])


def test_metadata():
    q = quantized(24, 100, dtype=torch.bfloat16)
    assert (q.bits, q.group_size, q.scheme, q.transposed) == (4, 64, "affine", False)
    assert (q.in_features, q.out_features) == (100, 24)
    assert q.dtype == torch.bfloat16
    assert q.stride() == (100, 1)
    assert q.nbytes == 24 * (50 + 2 * 2 + 2 * 2)
    assert q.bits_per_weight == 8 * q.nbytes / 2400
    assert list(q.components) == ["codes", "scale", "offset"]
    assert q.zero_point is None
    assert not q.requires_grad
    text = repr(q)
    for part in ("(24, 100)", "bits=4", "group_size=64", "'affine'", "float16", "bfloat16", "cpu"):
        assert part in text
    assert "transposed" in repr(q.t())


def test_per_row_group():
    q = quantized(3, 100, group=-1)
    again = QuantizedTensor(
        q.codes, q.scale, None, q.offset, bits=4, group_size=-1, in_features=100
    )
    assert again.group_size == 100


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_float(dtype, scheme):
    w = torch.randn(9, 70).to(dtype)
    q = QuantizedTensor.from_float(w, 8, 16, scheme)
    assert q.dtype == dtype
    assert q.scheme == scheme
    assert q.scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    steps = q.scale.float().abs().repeat_interleave(16, 1)[:, :70]
    # Half a step; symmetric clamps at the short end by at most one. Then rounding to dtype.
    unit = torch.finfo(dtype).eps * w.float().abs() + 1e-6
    error = (q.dequantize().float() - w.float()).abs()
    assert bool((error <= steps * (1.0 if scheme == "symmetric" else 0.75) + unit).all())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": 3}, ValueError, "bits must be 8, 4 or 2, got 3"),
        ({"group_size": 48}, ValueError, "got 48"),
        ({"group_size": 0}, ValueError, "got 0"),
        ({"in_features": 99999}, ValueError, "codes must have"),
        ({"in_features": -1}, ValueError, "negative"),
        ({"dtype": torch.float64}, TypeError, "float64"),
        ({"codes": torch.zeros(24, 50)}, TypeError, "uint8"),
        ({"codes": [1]}, TypeError, "list"),
        ({"scale": torch.zeros(24, 3, dtype=torch.float16)}, ValueError, r"\[24, 3\]"),
        ({"scale": torch.zeros(24, 2, dtype=torch.int8)}, TypeError, "int8"),
        ({"scale": torch.zeros(24, 2, dtype=torch.float16, device="meta")}, ValueError, "meta"),
        ({"offset": torch.zeros(24, 2)}, TypeError, "float32"),
        ({"zero_point": torch.zeros(24, 2, dtype=torch.uint8)}, ValueError, "both"),
    ],
)
def test_constructor_refuses(change, error, words):
    q = quantized(24, 100)
    arguments = {
        "codes": q.codes,
        "scale": q.scale,
        "zero_point": None,
        "offset": q.offset,
        "bits": 4,
        "group_size": 64,
        "in_features": 100,
    }
    with pytest.raises(error, match=words):
        QuantizedTensor(**{**arguments, **change})


def test_from_float_refuses():
    with pytest.raises(ValueError, match="finite"):
        QuantizedTensor.from_float(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(TypeError, match="QuantizedTensor"):
        QuantizedTensor.from_float(quantized(2, 16))
    with pytest.raises(TypeError, match="int32"):
        QuantizedTensor.from_float(torch.ones(2, 16, dtype=torch.int32))


def test_empty():
    q = QuantizedTensor.from_float(torch.zeros(0, 32))
    assert q.dequantize().shape == (0, 32)
    q = QuantizedTensor.from_float(torch.zeros(3, 0))
    assert q.dequantize().shape == (3, 0)
    assert q.sum(1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_to_dtype_shares_components(dtype):
    q = quantized(5, 64)
    moved = q.to(dtype)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.dequantize(), q.dequantize().to(dtype), rtol=0, atol=0)
    assert moved.scale.dtype == torch.float16
    assert (q.half().dtype, q.bfloat16().dtype, q.float().dtype) == (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_to_refuses_dtype(dtype):
    with pytest.raises(TypeError, match="dequantize"):
        quantized(2, 16).to(dtype)


def test_to_device():
    q = quantized(5, 64)
    assert q.cpu() is q
    moved = q.to("meta")
    assert moved.device.type == "meta"
    assert all(part.device.type == "meta" for part in moved.components.values())
    assert moved.dequantize().shape == (5, 64)
    assert torch.nn.functional.linear(torch.empty(2, 64, device="meta"), moved).shape == (2, 5)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            q.cuda()


def test_copies():
    q = quantized(5, 64)
    for other in (q.clone(), copy.deepcopy(q), q[:3].contiguous(), q.t().clone().t()):
        assert isinstance(other, QuantizedTensor)
    twin = q.clone()
    assert torch.equal(twin, q)
    assert twin.codes.data_ptr() != q.codes.data_ptr()
    assert q.detach().codes is q.codes
    assert q.data.codes is q.codes
    twin.codes.zero_()
    assert not torch.equal(twin, q)
    twin.copy_(q)
    assert torch.equal(twin, q)
    with pytest.raises(ValueError, match="one format"):
        twin.copy_(quantized(5, 64, bits=8))
    with pytest.raises(NotImplementedError, match="from_float"):
        twin.copy_(torch.zeros(5, 64))
    with pytest.raises(NotImplementedError, match="dequantize"):
        torch.zeros(5, 64).copy_(q)
    assert torch.empty_like(q).codes.shape == q.codes.shape


def test_deepcopy_keeps_sharing():
    q = quantized(5, 64)
    a, b = copy.deepcopy([q, q.t()])
    assert a.codes is b.codes
    assert b.transposed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_save_and_load(scheme):
    q = quantized(5, 70, scheme=scheme, dtype=torch.bfloat16)
    state = {"w": q, "t": q.t(), "p": torch.nn.Parameter(q, requires_grad=False), "row": q[2]}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for name, tensor in state.items():
        assert isinstance(loaded[name], QuantizedTensor)
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == torch.bfloat16
    assert loaded["t"].transposed
    assert isinstance(loaded["p"], torch.nn.Parameter)
    assert torch.equal(pickle.loads(pickle.dumps(q)), q)


def test_load_checks_what_it_reads():
    q = quantized(5, 64)
    rebuild, (parts, meta, is_param) = q.__reduce_ex__(2)
    with pytest.raises(ValueError, match="codes must have"):
        rebuild((parts[0][:, :3], *parts[1:]), meta, is_param)


def test_parameter():
    q = quantized(5, 64)
    p = torch.nn.Parameter(q, requires_grad=False)
    assert isinstance(p, torch.nn.Parameter)
    assert isinstance(p, QuantizedTensor)
    assert p.codes is q.codes
    assert isinstance(copy.deepcopy(p), torch.nn.Parameter)
    with pytest.raises(NotImplementedError, match="frozen"):
        torch.nn.Parameter(q)
    with pytest.raises(NotImplementedError, match="frozen"):
        q.requires_grad_()
    assert q.requires_grad_(False) is q


def test_module_with_quantized_parameter():
    module = torch.nn.Linear(64, 5)
    module.weight = torch.nn.Parameter(quantized(5, 64), requires_grad=False)
    other = torch.nn.Linear(64, 5)
    other.weight = torch.nn.Parameter(quantized(5, 64), requires_grad=False)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.weight, other.weight)
    module.half()
    assert module.weight.dtype == torch.float16
    assert module(torch.ones(1, 64, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize(
    "call",
    [
        lambda q: q.abs(),
        lambda q: q.exp(),
        lambda q: torch.zeros_like(q),
        lambda q: q.softmax(-1),
        lambda q: q.sort(),
        lambda q: q.max(dim=1),
        lambda q: q.norm(p=1),
        lambda q: q.amax(0),
        lambda q: q.mul_(2),
        lambda q: q.add_(1),
        lambda q: q.fill_(0),
        lambda q: q.view(-1),
        lambda q: q.t().contiguous(),
        lambda q: q @ q.t(),
        lambda q: torch.dot(torch.ones(64), q[0]),
        lambda q: q[:, 3],
        lambda q: q[:, ::2],
        lambda q: q[:, torch.tensor([1])],
        lambda q: q[torch.zeros(5, 64, dtype=torch.bool)],
        lambda q: torch.cat([q, q], 1),
        lambda q: torch.cat([q, torch.zeros(5, 64)]),
        lambda q: q.numpy(),
        lambda q: q.tolist(),
        lambda q: q.__array__(),
        lambda q: torch.from_dlpack(q),
        lambda q: q.data_ptr(),
        lambda q: torch.as_strided(q, (2, 2), (1, 1)),
        lambda q: torch.nn.functional.embedding(torch.tensor([0]), q.t()),
        lambda q: torch.nn.functional.embedding(torch.tensor([0]), q, max_norm=1.0),
    ],
)
def test_unsupported_says_the_way_out(call):
    q = quantized(5, 64)
    before = q.dequantize()
    with pytest.raises(NotImplementedError, match=r"does not support .*;") as info:
        call(q)
    assert "dequantize" in str(info.value) or "use " in str(info.value)
    torch.testing.assert_close(q.dequantize(), before, rtol=0, atol=0)


def test_safetensors_is_refused_without_a_crash():
    from safetensors.torch import save

    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        save({"w": quantized(5, 64)})


def test_fake():
    q = quantized(24, 128)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert isinstance(fake, QuantizedTensor)
        assert isinstance(fake.codes, FakeTensor)
        x = mode.from_tensor(torch.randn(3, 128))
        assert torch.nn.functional.linear(x, fake).shape == (3, 24)
        assert fake.sum(1).shape == (24,)
        assert fake[2:4, 64:].shape == (2, 64)
        assert fake.dequantize().shape == (24, 128)
        assert isinstance(fake * 2.0, QuantizedTensor)


def test_shared_memory():
    q = quantized(5, 64)
    assert not q.is_shared()
    assert q.share_memory_() is q
    assert q.is_shared()
    assert not q.is_pinned()

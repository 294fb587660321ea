"""Operations on a QuantizedTensor against the same operations on the dense tensor."""

import pytest
import torch
import torch.nn.functional as F
from cases import BITS, FLOATS, SCHEMES
from test_quantized_tensor import quantized

from mergekit_torch import QuantizedTensor

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def product_bound(x, w, dtype, bias=None):
    """|error| of a product of length K accumulated in float32, then rounded to ``dtype``."""
    magnitude = x.double().abs() @ w.double().abs()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    k = x.shape[-1] + 4
    return magnitude * (k * 2.0**-24 + 2 * UNIT[dtype]) + 1e-30


def close(actual, expected, bound):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    assert bool((error <= bound).all()), f"error {error.max()} above {bound.max()}"


# --- products -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(mode, dtype, bits, scheme):
    q = quantized(24, 100, bits, 32, scheme)
    w, bias = q.dequantize(), torch.randn(24).to(dtype)
    with mode():
        for shape in ((100,), (0, 100), (1, 100), (3, 100), (2, 3, 100)):
            x = torch.randn(shape).to(dtype)
            bound = product_bound(x, w.T, dtype)
            y = F.linear(x, q)
            assert y.dtype == dtype
            close(y, x.double() @ w.double().T, bound)
            close(x @ q.T, x.double() @ w.double().T, bound)
            close(
                F.linear(x, q, bias),
                x.double() @ w.double().T + bias.double(),
                product_bound(x, w.T, dtype, bias) + UNIT[dtype] * bias.abs(),
            )


@pytest.mark.parametrize("mode", MODES)
def test_products_from_both_sides(mode):
    q = quantized(24, 100)
    w = q.dequantize()
    with mode():
        x, y, v = torch.randn(5, 24), torch.randn(100, 5), torch.randn(100)
        cases = [
            (lambda w: x @ w, product_bound(x, w, torch.float32)),
            (lambda w: w @ y, product_bound(w, y, torch.float32)),
            (lambda w: w.T @ x.T, product_bound(w.T, x.T, torch.float32)),
            (lambda w: w @ v, product_bound(w, v, torch.float32)),
            (lambda w: w.T @ x[0], product_bound(w.T, x[0], torch.float32)),
            (lambda w: y.T @ w[3], product_bound(y.T, w[3], torch.float32)),
            (lambda w: F.linear(x, w.T), product_bound(x, w, torch.float32)),
            (
                lambda w: torch.addmm(x, x[:, :5].contiguous(), x, beta=2, alpha=3) @ w,
                None,
            ),
            (
                lambda w: torch.addmm(torch.ones(5, 24), y.T, w.T, beta=0.5, alpha=2),
                3 * product_bound(y.T, w.T, torch.float32) + 1e-6,
            ),
            (lambda w: torch.addmv(torch.ones(24), w, v), None),
            # Not contiguous, so torch expands the weight over the batch.
            (lambda w: x.view(5, 1, 24).expand(5, 3, 24).transpose(0, 1) @ w, None),
        ]
        for call, bound in cases:
            expected = call(w)
            limit = bound if bound is not None else 1e-5 * (1 + expected.abs().double())
            close(call(q), expected, 2 * limit)


def test_batched_products():
    q = quantized((3, 8), 40)
    w = q.dequantize()
    x = torch.randn(3, 5, 40, requires_grad=True)
    for call in (
        lambda w: torch.bmm(x, w.transpose(1, 2)),
        lambda w: x @ w.mT,
        lambda w: torch.bmm(w, x.transpose(1, 2)),
        lambda w: torch.baddbmm(torch.ones(3, 5, 8), x, w.mT, beta=0.5, alpha=2),
        lambda w: x[0] @ w.mT,
    ):
        expected = call(w)
        close(call(q), expected, 1e-5 * (1 + expected.detach().abs().double()))
    (got,) = torch.autograd.grad((x @ q.mT).square().sum(), x)
    (want,) = torch.autograd.grad((x @ w.mT).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="stacks"):
        torch.bmm(torch.ones(2, 5, 40), q.mT)


def test_product_refuses_shapes():
    q = quantized(24, 100)
    for call in (lambda: torch.ones(2, 3) @ q, lambda: F.linear(torch.ones(2, 3), q)):
        with pytest.raises((ValueError, RuntimeError), match=r"multiplied|size|shapes"):
            call()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_input_and_bias(scheme):
    q = quantized(6, 20, 4, 16, scheme)
    w = q.dequantize()
    for call in (
        lambda x, b, w: F.linear(x, w, b),
        lambda x, b, w: x @ w.T + b,
        lambda x, b, w: F.linear(x.view(1, 3, 20), w, b),
        lambda x, b, w: (w @ x.T).T + b,
        lambda x, b, w: F.linear(x, w[2:], b[2:]),
        lambda x, b, w: F.linear(x * w[1], w, b),
    ):
        grads = []
        for weight in (q, w):
            x = torch.linspace(-1, 1, 60).view(3, 20).requires_grad_()
            b = torch.linspace(-1, 1, 6).requires_grad_()
            call(x, b, weight).square().sum().backward()
            assert type(x.grad) is torch.Tensor
            grads.append((x.grad, b.grad))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding(dtype):
    q = quantized(24, 100, dtype=dtype)
    for index in (torch.tensor([[1, 2], [3, 23]]), torch.tensor(5), torch.tensor([], dtype=int)):
        torch.testing.assert_close(
            F.embedding(index, q), F.embedding(index, q.dequantize()), rtol=0, atol=0
        )
    with pytest.raises((RuntimeError, IndexError), match="24"):
        F.embedding(torch.tensor([24]), q)


# --- views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_share_memory(mode, bits, scheme):
    q = quantized(24, 200, bits, 64, scheme)
    w = q.dequantize()
    memory = {t.untyped_storage().data_ptr() for t in q.components.values()}
    calls = [
        lambda w: w[2:9],
        lambda w: w[::3],
        lambda w: w[3],
        lambda w: w[-1],
        lambda w: w[4:4],
        lambda w: w[:, 64:],
        lambda w: w[:, :128],
        lambda w: w[:, 64:128],
        lambda w: w[:, 64:100],
        lambda w: w[:, 16:32],
        lambda w: w[5:, 192:],
        lambda w: w[..., 128:128],
        lambda w: w.narrow(0, 3, 4),
        lambda w: w.narrow(1, 64, 64),
        lambda w: w.chunk(5)[4],
        lambda w: w.split(7)[3],
        lambda w: w.split([1, 23])[1],
        lambda w: w.split(64, dim=1)[3],
        lambda w: w.unbind()[4],
        lambda w: list(w)[4],
        lambda w: w.view(2, 12, 200),
        lambda w: w.view(2, -1, 200)[1],
        lambda w: w.view(2, 12, 200).flatten(0, 1),
        lambda w: w.reshape(4, 6, 200),
        lambda w: w.unflatten(0, (6, 4))[2:4, 1],
        lambda w: w.unsqueeze(0),
        lambda w: w.unsqueeze(1).squeeze(1),
        lambda w: w[None, 2:3].squeeze(0),
        lambda w: w.view(2, 12, 200).transpose(0, 1),
        lambda w: w.view(2, 12, 200).permute(1, 0, 2)[3],
        lambda w: w.t(),
        lambda w: w.T[64:, ::2],
        lambda w: w.mT[:, 3],
        lambda w: w.transpose(0, 1).transpose(-1, -2),
        lambda w: w.view(2, 12, 200).mT[1],
        lambda w: w.view(2, 12, 200).permute(0, 2, 1),
        lambda w: w.view(2, 12, 200).permute(1, 2, 0)[3],
        lambda w: w.view(2, 12, 200).permute(1, 2, 0).transpose(1, 2)[:, :, 64:],
        lambda w: w.expand(3, 24, 200),
        lambda w: w.t().expand(3, 200, 24),
        lambda w: w.detach(),
        lambda w: w.contiguous(),
    ]
    with mode():
        for i, call in enumerate(calls):
            got, want = call(q), call(w)
            assert isinstance(got, QuantizedTensor), i
            assert got.shape == want.shape, i
            assert got.stride() == want.stride() or want.numel() < 2 or 1 in want.shape, i
            torch.testing.assert_close(got.dequantize(), want, rtol=0, atol=0)
            assert {t.untyped_storage().data_ptr() for t in got.components.values()} <= memory, i
        # Products of views too.
        x, part = torch.randn(2, 64), w[::3, 64:128].T
        bound = product_bound(x, part, torch.float32)
        close(F.linear(x, q[::3, 64:128]), x.double() @ part.double(), bound)


def test_writes_through_a_view_are_seen():
    q = quantized(8, 64)
    q[2:4].copy_(quantized(2, 64))
    view = q[2:4]
    view.codes.zero_()
    assert bool((q.codes[2:4] == 0).all())


@pytest.mark.parametrize(
    ("bits", "group", "columns"),
    [
        (4, 64, slice(3, 100)),
        (4, 64, slice(2, 100)),
        (4, 64, slice(32, 65)),
        (4, 64, slice(0, 99)),
        (2, 32, slice(0, 18)),
        (2, 32, slice(6, 10)),
        (8, 32, slice(5, 33)),
        (8, 32, slice(33, 65)),
    ],
)
def test_misaligned_columns_name_the_alignment(bits, group, columns):
    q = quantized(4, 100, bits, group)
    with pytest.raises(ValueError, match=f"multiple of {group}.*multiple of {8 // bits}"):
        q[:, columns]


def test_column_slices_inside_a_group():
    q = quantized(4, 100, 8, -1)
    w = q.dequantize()
    torch.testing.assert_close(q[:, 7:33].dequantize(), w[:, 7:33], rtol=0, atol=0)
    torch.testing.assert_close(q[:, 7:33][:, 3:].sum(1), w[:, 10:33].sum(1))


def test_view_errors():
    q = quantized(4, 32)
    for call, error in (
        (lambda: q.view(3, 32), ValueError),
        (lambda: q.view(-1, -1, 32), (ValueError, RuntimeError)),
        (lambda: q[9], IndexError),
        (lambda: q.narrow(0, 3, 4), (RuntimeError, IndexError, ValueError)),
        (lambda: q.select(5, 0), IndexError),
        (lambda: q.split([1, 2]), (ValueError, RuntimeError)),
        (lambda: q.permute(0, 0), (ValueError, RuntimeError)),
        (lambda: q.expand(2, 32), (RuntimeError, ValueError)),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gathered_rows(scheme):
    q = quantized(24, 100, scheme=scheme)
    w = q.dequantize()
    index, mask = torch.tensor([3, 3, 23]), torch.arange(24) % 5 == 0
    for call in (
        lambda w: w[index],
        lambda w: w[mask],
        lambda w: w[index.view(3, 1)],
        lambda w: w.index_select(0, index),
        lambda w: w.view(2, 12, 100)[:, index % 12],
        lambda w: torch.cat([w, w[2:4]]),
        lambda w: torch.cat([w.t(), w[2:4].t()], 1),
        lambda w: torch.cat([w.view(2, 12, 100), w.view(2, 12, 100)], 1),
        lambda w: w.repeat_interleave(1, 0) if not isinstance(w, QuantizedTensor) else w,
    ):
        got, want = call(q), call(w)
        assert isinstance(got, QuantizedTensor)
        torch.testing.assert_close(got.dequantize(), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="one format"):
        torch.cat([q, quantized(24, 100, bits=8, scheme=scheme)])


# --- arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("factor", [0.3, -7, 2.0**-20, 3e5, torch.tensor(0.1)])
def test_scaling_rounds_scale_and_offset_once(scale_dtype, scheme, factor):
    q = quantized(5, 100, scheme=scheme, scale_dtype=scale_dtype)
    c = torch.as_tensor(factor, dtype=torch.float32)
    for got in (q * factor, factor * q, torch.mul(q, factor)):
        assert isinstance(got, QuantizedTensor)
        assert got.codes is q.codes
        assert got.scale.dtype == torch.float32
        assert torch.equal(got.scale, (q.scale.double() * c.double()).float())
        if q.offset is not None:
            assert torch.equal(got.offset, (q.offset.double() * c.double()).float())
    got = q / factor
    assert isinstance(got, QuantizedTensor)
    torch.testing.assert_close(got.scale, q.scale.float() / c, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_signs_and_powers_of_two_are_exact(scheme):
    q = quantized(5, 100, scheme=scheme)
    w = q.dequantize()
    for got, want in (
        (-q, -w),
        (q * -1, -w),
        (q * 1, w),
        (q / -1.0, -w),
        (q * 2.0**-12, w * 2.0**-12),
        (q / 1024, w / 1024),
    ):
        assert isinstance(got, QuantizedTensor)
        torch.testing.assert_close(got.dequantize(), want, rtol=0, atol=0)
    assert (-q).scale.dtype == (q * -1).scale.dtype == torch.float16


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_scaling_refuses_what_is_not_finite(factor):
    q = quantized(5, 100)
    with pytest.raises(ValueError, match="finite"):
        q * factor
    with pytest.raises(ValueError, match="divisor"):
        q / 0


def test_learnable_scale():
    q, x = quantized(6, 20), torch.randn(3, 20)
    alpha = torch.tensor(0.7, requires_grad=True)
    F.linear(x, q * alpha).sum().backward()
    expected = (x @ q.dequantize().T).sum()
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-4, atol=1e-4)


def test_arithmetic_with_tensors_gives_floats():
    q, p = quantized(5, 100), quantized(5, 100, bits=8)
    w, v, x = q.dequantize(), p.dequantize(), torch.randn(5, 100)
    for call in (
        lambda a, b: a + x,
        lambda a, b: x - a,
        lambda a, b: a * x,
        lambda a, b: a / x,
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a + 1,
        lambda a, b: 1 - a,
        lambda a, b: a > 0,
        lambda a, b: a <= b,
        lambda a, b: a == x,
        lambda a, b: a != b,
        lambda a, b: torch.add(x, a, alpha=2),
        lambda a, b: x.clone().add_(a),
        lambda a, b: x.clone().sub_(a, alpha=3),
        lambda a, b: x.clone().mul_(a),
    ):
        got, want = call(q, p), call(w, v)
        assert type(got) is torch.Tensor
        assert torch.equal(got, want)
    assert (q.half() + x.half()).dtype == torch.float16


def test_equal_and_allclose():
    q = quantized(40, 100)
    w = q.dequantize()
    assert torch.equal(q, q.clone())
    assert torch.equal(q, w)
    assert torch.equal(w, q)
    assert torch.allclose(q, w)
    assert not torch.equal(q, q.half())
    other = q.clone()
    other.codes[39, 49] ^= 1
    assert not torch.equal(q, other)
    assert not torch.allclose(q, other, rtol=0, atol=0)
    assert torch.allclose(q, q * (1 + 1e-7), atol=1e-5)
    # The same values in another format.
    assert torch.equal(q * 1.0, q * 2 / 2)
    with pytest.raises(ValueError, match="one shape"):
        torch.allclose(q, w[:3])


def test_nan_is_not_equal_to_itself():
    q = quantized(4, 100)
    q.scale[1, 0] = float("nan")
    assert not torch.equal(q, q.clone())
    assert torch.allclose(q, q.clone(), equal_nan=True)


def test_comparison_in_blocks():
    from mergekit_torch.tensor.elementwise import _row_blocks

    q = quantized((2, 30), 100)
    blocks = list(_row_blocks(q, elements=700))
    assert len(blocks) == 2 * 5
    assert torch.equal(torch.cat([b[0] for b in blocks]), q.dequantize().flatten(0, 1))


# --- reductions -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
def test_reductions(bits, scheme, transposed):
    q = quantized(24, 100, bits, 32, scheme)
    if transposed:
        q = q.t()
    w = q.dequantize().double()
    n = q.numel()
    # Sums of n float32 terms of magnitude |w|.
    bound = float(w.abs().sum()) * n * 2.0**-24
    for call in (
        lambda w: w.sum(),
        lambda w: w.sum(-1),
        lambda w: w.sum(0),
        lambda w: w.sum(1, keepdim=True),
        lambda w: w.sum((0, 1)),
        lambda w: w.sum((0, 1), keepdim=True),
        lambda w: w.mean(),
        lambda w: w.mean(0, keepdim=True),
        lambda w: w.mean(-1),
        lambda w: w.norm(),
        lambda w: torch.norm(w),
        lambda w: torch.linalg.vector_norm(w),
    ):
        close(call(q), call(w), bound)
    last = 0 if transposed else 1
    for call in (
        lambda w: w.amax(),
        lambda w: w.amin(),
        lambda w: w.amax(last),
        lambda w: w.amin(last, keepdim=True),
        lambda w: w.amax((0, 1)),
        lambda w: w.max(),
        lambda w: w.min(),
        lambda w: w.norm(float("inf")),
        lambda w: torch.linalg.vector_norm(w, float("inf"), dim=last),
    ):
        assert torch.equal(call(q).double(), call(w))
    close(torch.linalg.vector_norm(q, dim=last), torch.linalg.vector_norm(w, dim=last), bound)
    assert torch.equal(q.abs_max().double(), w.abs().max())


def test_reductions_of_stacks_rows_and_dtypes():
    q = quantized((2, 3), 50)
    w = q.dequantize()
    for call in (
        lambda w: w.sum(),
        lambda w: w.sum(1),
        lambda w: w.sum((0, 2)),
        lambda w: w.mean((1, 2)),
        lambda w: w.amax((0, 2)),
        lambda w: w[1, 2].sum(),
        lambda w: w[1, 2].norm(),
        lambda w: w.sum(-1, dtype=torch.float64),
    ):
        got = call(q)
        assert got.dtype == call(w).dtype
        torch.testing.assert_close(got, call(w), rtol=1e-4, atol=1e-4)
    assert q.half().sum().dtype == torch.float16
    with pytest.raises(NotImplementedError, match="sum"):
        q.sum(0)
    with pytest.raises(IndexError):
        q.sum(3)

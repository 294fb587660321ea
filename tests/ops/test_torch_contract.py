"""What PyTorch expects of an op: opcheck, fakes, torch.compile, torch.export."""

import pytest
import torch
from cases import SCHEMES
from oracle import random_weight

from mergekit_torch import ops

OPS = torch.ops.mkrs
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def samples(scheme, device):
    w = random_weight(24, 96, 4, 32, scheme, device=device)
    x = torch.randn(2, 3, 96, device=device)
    grad = torch.randn(5, 24, device=device)
    bias = torch.randn(24, device=device)
    trained = x.clone().requires_grad_(), bias.clone().requires_grad_()
    indices = torch.randint(0, 24, (3, 2), device=device)
    yield OPS.quantize.default, (torch.randn(6, 50, device=device), 4, 16, scheme)
    yield OPS.dequantize.default, (*w.components, 4, 32, 96, torch.float16)
    out = torch.empty(24, 96, dtype=torch.bfloat16, device=device)
    yield OPS.dequantize_into.default, (*w.components, 4, 32, 96, out)
    yield OPS.dequant_matmul.default, (x, *w.components, bias, 4, 32)
    yield OPS.dequant_matmul.default, (trained[0], *w.components, trained[1], 4, 32)
    yield OPS.dequant_matmul.default, (x.half(), *w.components, None, 4, 32)
    yield OPS.dequant_matmul_t.default, (grad, *w.components, 4, 32, 96)
    yield (
        OPS.dequant_matmul_t.default,
        (grad.clone().requires_grad_(), *w.components, 4, 32, 96),
    )
    yield OPS.dequant_embedding.default, (indices, *w.components, 4, 32, 96, torch.bfloat16)
    yield OPS.dequant_reduce.default, (*w.components, 4, 32, 96, "abs_max")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    # opcheck itself says "NYI" about autograd registration on mps.
    checks = [c for c in CHECKS if device.type != "mps" or c != "test_autograd_registration"]
    for op, args in samples(scheme, device):
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fakes_give_the_real_shapes(scheme, device):
    for op, args in samples(scheme, device):
        real = op(*args)
        meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        if real is None:
            assert meta is None
            continue
        pairs = zip(real, meta, strict=True) if isinstance(real, tuple) else [(real, meta)]
        for a, b in pairs:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def layer(w, bias):
    def forward(x):
        hidden = ops.dequant_matmul(x, *w.components, bias, bits=4, group_size=32)
        return torch.nn.functional.silu(hidden)

    return forward


def test_compile_without_graph_breaks(device):
    w = random_weight(24, 96, 4, 32, "affine", device=device)
    forward = layer(w, torch.randn(24, device=device))
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for m in (1, 4, 9):
        x = torch.randn(m, 96, device=device)
        torch.testing.assert_close(compiled(x), forward(x))
    x = torch.randn(4, 96, device=device, requires_grad=True)
    compiled(x).sum().backward()
    compiled_grad, x.grad = x.grad, None
    forward(x).sum().backward()
    torch.testing.assert_close(compiled_grad, x.grad)


def test_compile_with_a_given_output(device):
    w = random_weight(24, 96, 4, 32, "affine", device=device)
    form = {"bits": 4, "group_size": 32, "in_features": 96}

    def forward(x, out):
        return x @ ops.dequantize(*w.components, **form, out=out).T, out.sum()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x, out = torch.randn(3, 96, device=device), torch.zeros(24, 96, device=device)
    product, total = compiled(x, out)
    dense = ops.dequantize(*w.components, **form)
    assert torch.equal(out, dense)
    torch.testing.assert_close(product, x @ dense.T)
    torch.testing.assert_close(total, dense.sum())


@pytest.mark.slow
def test_compile_with_inductor(device):
    if device.type == "mps" and not torch.backends.mps.is_built():
        pytest.skip("inductor writes Metal shaders of its own, which need a Mac")
    w = random_weight(24, 96, 4, 32, "affine", device=device)
    forward = layer(w, torch.randn(24, device=device))
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for m in (2, 5):
        x = torch.randn(m, 96, device=device)
        torch.testing.assert_close(compiled(x), forward(x))


class Model(torch.nn.Module):
    def __init__(self, w, device):
        super().__init__()
        for name, part in zip(
            ("codes", "scale", "offset"), (w.codes, w.scale, w.offset), strict=True
        ):
            self.register_buffer(name, part)
        self.bias = torch.nn.Parameter(torch.randn(24, device=device))

    def forward(self, x, indices):
        components = (self.codes, self.scale, None, self.offset)
        rows = ops.dequant_embedding(
            indices, *components, bits=4, group_size=32, in_features=96, dtype=x.dtype
        )
        return ops.dequant_matmul(x + rows, *components, self.bias, bits=4, group_size=32)


def test_export_with_a_dynamic_batch(device):
    model = Model(random_weight(24, 96, 4, 32, "affine", device=device), device)
    batch = torch.export.Dim("batch", min=1, max=64)
    args = (torch.randn(3, 96, device=device), torch.tensor([1, 2, 3], device=device))
    program = torch.export.export(model, args, dynamic_shapes=({0: batch}, {0: batch}))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "mkrs.dequant_matmul.default" in targets
    for m in (1, 7, 30):
        x = torch.randn(m, 96, device=device)
        indices = torch.randint(0, 24, (m,), device=device)
        torch.testing.assert_close(program.module()(x, indices), model(x, indices))

import pytest
import torch
from cases import BITS, FLOATS, SCHEMES
from oracle import random_weight

from mergekit_torch import ops
from mergekit_torch.ops.dequant_matmul_many import reference

ROWS = (24, 1, 130)


def weights(scheme, bits, k, group_size, device):
    made = [random_weight(n, k, bits, group_size, scheme, device=device) for n in ROWS]
    lists = [[w.components[i] for w in made if w.components[i] is not None] for i in range(4)]
    return made, lists


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_each_product(scheme, bits, dtype, device):
    made, lists = weights(scheme, bits, 100, 32, device)
    for m in (0, 1, 3, 20):
        x = torch.randn(m, 100, device=device).to(dtype)
        bias = [torch.randn(n, device=device).to(dtype) for n in ROWS]
        for chosen in ([], bias):
            # only the CPU has int8 products; other devices say so
            for compute in ("exact", "int8") if device.type == "cpu" else ("exact",):
                got = ops.dequant_matmul_many(
                    x, *lists, chosen, bits=bits, group_size=32, compute=compute
                )
                for i, w in enumerate(made):
                    one = ops.dequant_matmul(
                        x,
                        *w.components,
                        chosen[i] if chosen else None,
                        bits=bits,
                        group_size=32,
                        compute=compute,
                    )
                    assert torch.equal(got[i], one)


def test_reference_agrees(device):
    _, lists = weights("affine", 4, 64, 32, device)
    x = torch.randn(2, 64, device=device)
    got = ops.dequant_matmul_many(x, *lists, bits=4, group_size=32)
    on_cpu = [[t.cpu() for t in parts] for parts in lists]  # float64, which mps lacks
    for a, b in zip(got, reference(x.cpu(), *on_cpu, [], 4, 32), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_gradients(device):
    made, lists = weights("affine", 4, 64, 32, device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    bias = [torch.randn(n, device=device, requires_grad=True) for n in ROWS]
    got = ops.dequant_matmul_many(x, *lists, bias, bits=4, group_size=32)
    sum(y.square().sum() for y in (got[0], got[2])).backward()
    expected = x.detach().clone().requires_grad_()
    loss = 0
    for i in (0, 2):
        b = bias[i].detach()
        y = ops.dequant_matmul(expected, *made[i].components, b, bits=4, group_size=32)
        loss = loss + y.square().sum()
    loss.backward()
    torch.testing.assert_close(x.grad, expected.grad)
    torch.testing.assert_close(bias[0].grad, 2 * got[0].detach().sum(0))


def test_opcheck(device):
    for scheme in SCHEMES:
        _, lists = weights(scheme, 4, 64, 32, device)
        x = torch.randn(3, 64, device=device, requires_grad=True)
        args = (x, *lists, [], 4, 32, "exact")
        checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        if device.type != "mps":  # opcheck itself says "NYI" about mps
            checks.append("test_autograd_registration")
        torch.library.opcheck(torch.ops.mkrs.dequant_matmul_many.default, args, test_utils=checks)


def test_arguments(device):
    _, lists = weights("affine", 4, 64, 32, device)
    x = torch.randn(3, 64, device=device)
    call = {"bits": 4, "group_size": 32}
    with pytest.raises(ValueError, match="at least one weight"):
        ops.dequant_matmul_many(x, [], [], **call)
    with pytest.raises(ValueError, match="scale must have 3 tensors"):
        ops.dequant_matmul_many(x, lists[0], lists[1][:2], **call)
    with pytest.raises(ValueError, match="bias must have no or 3"):
        ops.dequant_matmul_many(x, *lists, [torch.ones(24)], **call)
    with pytest.raises(RuntimeError, match=r"mkrs::dequant_matmul_many: scale must have"):
        torch.ops.mkrs.dequant_matmul_many(x, lists[0], lists[1][:2], [], [], [], 4, 32, "exact")

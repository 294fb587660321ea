"""MKRS_VERIFY=1: right kernels pass, every kind of wrong answer is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_torch import selftest, verify

OPS = torch.ops.mkrs
ROOT = Path(__file__).resolve().parents[2]


def one_of(op, device):
    """A case of each kernel of an op, in its arguments."""
    torch.manual_seed(3)
    for case in selftest.cases(device.type, quick=True)[::4]:
        if case.op == op:
            yield case, selftest._arguments(case, device)


def changed(result, amount):
    """The result with one element moved by ``amount`` of its size, or its first code flipped."""
    if isinstance(result, (tuple, list)):
        return type(result)([changed(result[0], amount), *result[1:]])
    wrong = result.clone().cpu()
    flat = wrong.flatten()
    at = flat.numel() - 1 if flat.dtype == torch.uint8 else int(flat.float().abs().argmax())
    flat[at] = flat[at] ^ 1 if flat.dtype == torch.uint8 else flat[at] * (1 + amount) + amount
    return flat.view(wrong.shape).to(result.device)


@pytest.mark.parametrize("op", sorted({case.op for case in selftest.cases("cpu", quick=True)}))
def test_right_results_pass_and_wrong_ones_do_not(op, device):
    judged = 0
    for case, arguments in one_of(op, device):
        result = getattr(OPS, op)(*arguments)
        worst = verify.check_call(op, result, arguments)
        assert worst is not None
        assert worst <= 1, case
        with pytest.raises(verify.VerificationError, match=f"mkrs::{op}.* must be .*got"):
            verify.check_call(op, changed(result, 4), arguments)
        judged += 1
    assert judged >= 2


def test_dequantize_into_is_checked(device):
    w = selftest.oracle.random_weight(8, 64, 4, 32, "affine", device=device)
    out = torch.empty(8, 64, device=device)
    arguments = (*w.components, 4, 32, 64, out)
    assert verify.check_call("dequantize_into", OPS.dequantize_into(*arguments), arguments) == 0
    out[-1, -1] += 1
    with pytest.raises(verify.VerificationError, match="dequantize_into"):
        verify.check_call("dequantize_into", None, arguments)


def test_gguf_unpack_is_checked(device):
    if device.type == "mps":
        pytest.skip("gguf_unpack runs on CPU and CUDA devices")
    blocks = torch.randint(0, 256, (4, 36), dtype=torch.uint8, device=device)
    arguments = (blocks, 2, 4, 64)
    result = OPS.gguf_unpack(*arguments)
    assert verify.check_call("gguf_unpack", result, arguments) == 0
    with pytest.raises(verify.VerificationError, match="gguf_unpack"):
        verify.check_call("gguf_unpack", changed(result, 1), arguments)


def test_nan_in_a_result_is_wrong(device):
    case, arguments = next(one_of("dequant_matmul", device))
    result = OPS.dequant_matmul(*arguments)
    result[..., 0] = float("nan")
    with pytest.raises(verify.VerificationError, match="got nan"):
        verify.check_call(case.op, result, arguments)


def test_what_cannot_be_judged(device):
    """inf and NaN among the inputs, nothing in the result: neither right nor wrong."""
    w = selftest.oracle.random_weight(4, 64, 4, 32, "affine", device=device)
    x = torch.full((2, 64), float("inf"), device=device)
    arguments = (x, *w.components, None, 4, 32)
    result = OPS.dequant_matmul(*arguments)
    assert verify.check_call("dequant_matmul", result, arguments) is None
    empty = (x[:0], *w.components, None, 4, 32)
    assert verify.check_call("dequant_matmul", OPS.dequant_matmul(*empty), empty) is None


def test_large_weights_are_sampled(device, monkeypatch):
    """The last row and the last columns are always among what is compared."""
    monkeypatch.setattr(verify, "_MOST", 512)
    w = selftest.oracle.random_weight(40, 256, 4, 32, "affine", device=device)
    x, y = torch.randn(9, 256, device=device), torch.randn(9, 40, device=device)
    for op, arguments in (
        ("dequant_matmul", (x, *w.components, None, 4, 32)),
        ("dequant_matmul_t", (y, *w.components, 4, 32, 256)),
        ("dequantize", (*w.components, 4, 32, 256, torch.float32)),
        ("dequant_reduce", (*w.components, 4, 32, 256, "sum")),
    ):
        result = getattr(OPS, op)(*arguments)
        assert verify.check_call(op, result, arguments) is not None
        result.view(-1)[-1] += 1000
        with pytest.raises(verify.VerificationError):
            verify.check_call(op, result, arguments)


def test_variants_tell_kernels_apart(device):
    w = selftest.oracle.random_weight(8, 64, 4, 32, "affine", device=device)
    s = selftest.oracle.random_weight(8, 64, 4, 32, "symmetric", device=device)
    x = torch.randn(1, 64, device=device)

    def of(x, w):
        return verify.variant("dequant_matmul", x, *w.components, None, 4, 32)

    base = of(x, w)
    assert base == of(torch.randn_like(x), w)
    others = [of(x.half(), w), of(x, s), of(x.expand(2, 64), w), of(x.expand(9, 64), w)]
    assert len({base, *others}) == 5
    assert others[3] == of(x.expand(16, 64), w)


# What a user runs: a program, with a kernel that adds one to the first weight that it dequantizes.
PROGRAM = """
import importlib.util, pathlib, torch
library = torch.library.Library("mkrs", "IMPL")
# Before the package is imported, which installs the checks.
package = pathlib.Path(importlib.util.find_spec("mergekit_torch").origin).parent
torch.ops.load_library(str(package / "_C.abi3.so"))
good = torch.library.get_kernel("mkrs::dequantize", "CPU")
def broken(keys, *args):
    result = good.call_boxed(keys, *args)
    result.view(-1)[0] += 1
    return result
if {broken}:
    library.impl("dequantize", broken, "CPU", with_keyset=True)
import mergekit_torch
from mergekit_torch import ops, verify
codes, scale, offset = ops.quantize(torch.randn(8, 64), 4, 32, "affine")
for _ in range(2):
    ops.dequantize(codes, scale, None, offset, bits=4, group_size=32, in_features=64)
print(len(verify.verified))
"""


def program(broken: bool, value: str | None):
    environment = {k: v for k, v in os.environ.items() if k != "MKRS_VERIFY"}
    if value is not None:
        environment["MKRS_VERIFY"] = value
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.replace("{broken}", str(broken))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )


def test_environment_variable():
    silent = program(broken=True, value=None)
    assert silent.returncode == 0, silent.stderr
    assert silent.stdout.strip() == "0"  # not asked: nothing is checked
    fine = program(broken=False, value="1")
    assert fine.returncode == 0, fine.stderr
    assert int(fine.stdout) >= 2
    refused = program(broken=False, value="yes")
    assert "MKRS_VERIFY must be 0 or 1, got 'yes'" in refused.stderr
    caught = program(broken=True, value="1")
    if "already a kernel registered from python" in caught.stderr:
        pytest.skip("this torch takes one Python kernel an op, and the broken one is it")
    assert caught.returncode == 1
    assert "VerificationError: mkrs::dequantize(" in caught.stderr
    assert "the result at (0, 0) must be" in caught.stderr

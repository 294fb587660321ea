"""Bad arguments: what was required and what was got, from the op and from its wrapper."""

import pytest
import torch
from oracle import random_weight

from mergekit_torch import QuantFormat, ops

W = random_weight(8, 64, 4, 32, "affine")
Z = random_weight(8, 64, 4, 32, "asymmetric")
FORMAT = {"bits": 4, "group_size": 32}


def call(error, match, function, *args, **kwargs):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"bits": 3}, ValueError, "bits must be 8, 4 or 2, got 3"),
        ({"bits": "4"}, TypeError, "bits must be an int, got str"),
        ({"group_size": 24}, ValueError, r"group_size must be .*got 24"),
        ({"group_size": 0}, ValueError, r"group_size must be .*got 0"),
        ({"group_size": -1}, ValueError, r"group_size must be .*got -1"),
        ({"in_features": 65}, ValueError, r"codes must have 33 bytes a row .*got shape \[8, 32\]"),
        ({"in_features": -1}, ValueError, "in_features must not be negative, got -1"),
        ({"group_size": 16}, ValueError, r"scale must have shape \[8, 4\] .*got \[8, 2\]"),
        ({"codes": W.codes.int()}, TypeError, "codes must be uint8, got torch.int32"),
        ({"codes": W.codes[0]}, ValueError, r"codes must have at least 2 dimensions.*\[32\]"),
        ({"codes": None}, TypeError, "codes must be a Tensor, got NoneType"),
        ({"scale": W.scale.double()}, TypeError, "scale must be float32, float16 or bfloat16"),
        ({"scale": W.scale[:7]}, ValueError, r"scale must have shape \[8, 2\] .*got \[7, 2\]"),
        ({"offset": W.offset.float()}, TypeError, "offset must have scale's dtype"),
        ({"zero_point": Z.zero_point}, ValueError, "must not both be given"),
        ({"offset": None, "zero_point": W.scale}, TypeError, "zero_point must be uint8"),
        ({"scale": W.scale.to("meta")}, ValueError, "scale must be on cpu like codes, got meta"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_components(changes, error, match):
    args = {
        "codes": W.codes,
        "scale": W.scale,
        "offset": W.offset,
        "in_features": 64,
        "dtype": torch.float32,
        **FORMAT,
    }
    call(error, match, ops.dequantize, **{**args, **changes})


def test_raw_op_checks_by_itself():
    """The op never trusts its caller: the same mistakes are errors without the wrapper."""
    dequantize = torch.ops.mkrs.dequantize
    common = (W.codes, W.scale, None, W.offset)
    match = r"mkrs::dequantize: .*got "
    bad = [
        (*common, 3, 32, 64, torch.float32),
        (*common, 4, 24, 64, torch.float32),
        (*common, 4, 0, 64, torch.float32),
        (*common, 4, 32, 66, torch.float32),
        (*common, 4, 32, -2, torch.float32),
        (*common, 4, 16, 64, torch.float32),
        (*common, 4, 32, 64, torch.float64),
        (W.codes.int(), W.scale, None, W.offset, 4, 32, 64, torch.float32),
        (W.codes[0], W.scale, None, W.offset, 4, 32, 64, torch.float32),
        (W.codes, W.scale[:7], None, W.offset, 4, 32, 64, torch.float32),
        (W.codes, W.scale, Z.zero_point, W.offset, 4, 32, 64, torch.float32),
        (W.codes, W.scale, W.scale, None, 4, 32, 64, torch.float32),
        (W.codes, W.scale, None, W.offset.float(), 4, 32, 64, torch.float32),
    ]
    for args in bad:
        call(RuntimeError, match, dequantize, *args)
    x = torch.randn(2, 64)
    matmul = torch.ops.mkrs.dequant_matmul
    match = r"mkrs::dequant_matmul: .*got "
    bad = [
        (x.double(), *common, None, 4, 32),
        (x[:, :62], *common, None, 4, 32),
        (torch.tensor(1.0), *common, None, 4, 32),
        (x, *common, torch.randn(7), 4, 32),
        (x, *common, torch.randn(8).half(), 4, 32),
        (x, *common, None, 4, 32, "fast"),
        (x, *(None if t is None else t[None] for t in common), None, 4, 32),
    ]
    for args in bad:
        call(RuntimeError, match, matmul, *args)
    call(
        RuntimeError,
        r"mkrs::dequant_matmul_t: input must have N = 8 .*got shape \[2, 64\]",
        torch.ops.mkrs.dequant_matmul_t,
        *(x, *common, 4, 32, 64),
    )
    call(
        RuntimeError,
        r"mkrs::dequant_embedding: indices must be int64 or int32, got float32",
        torch.ops.mkrs.dequant_embedding,
        *(x, *common, 4, 32, 64, torch.float32),
    )
    call(
        RuntimeError,
        r"mkrs::dequant_reduce: reduction must be .*got 'median'",
        torch.ops.mkrs.dequant_reduce,
        *(*common, 4, 32, 64, "median"),
    )
    quantize = torch.ops.mkrs.quantize
    for args in [
        (x, 5, 32, "affine"),
        (x, 4, 33, "affine"),
        (x, 4, 32, "linear"),
        (x.double(), 4, 32, "affine"),
        (x[0], 4, 32, "affine"),
        (x, 4, 32, "affine", torch.int8),
    ]:
        call(RuntimeError, r"mkrs::quantize: .*got ", quantize, *args)


def test_matmul_arguments():
    x = torch.randn(2, 64)
    common = (W.codes, W.scale, None, W.offset)
    matmul = ops.dequant_matmul
    call(TypeError, "input must be float32", matmul, x.long(), *common, **FORMAT)
    call(TypeError, "input must be a Tensor, got list", matmul, [1.0], *common, **FORMAT)
    call(ValueError, "codes must have 31 bytes", matmul, x[:, :62], *common, **FORMAT)
    call(ValueError, "got a scalar", matmul, torch.tensor(1.0), *common, **FORMAT)
    call(ValueError, r"bias must have shape \[8\]", matmul, x, *common, torch.ones(9), **FORMAT)
    call(TypeError, "bias must have input's", matmul, x, *common, torch.ones(8).half(), **FORMAT)
    call(ValueError, "compute must be", matmul, x, *common, **FORMAT, compute="fast")
    call(ValueError, "input must be on cpu", matmul, x.to("meta"), *common, **FORMAT)
    stacked = tuple(None if t is None else t[None] for t in common)
    call(ValueError, "codes must have 2 dimensions", matmul, x, *stacked, **FORMAT)
    call(
        ValueError,
        "input must have N = 8 as its last size",
        ops.dequant_matmul_t,
        *(x, *common),
        **FORMAT,
        in_features=64,
    )


def test_quantize_arguments():
    x = torch.randn(4, 64)
    call(TypeError, "weight must be float32, float16 or bfloat16", ops.quantize, x.int())
    call(TypeError, "weight must be a Tensor", ops.quantize, [[1.0]])
    call(ValueError, "at least 2 dimensions", ops.quantize, x[0])
    call(ValueError, "group_size must be .*got 48", ops.quantize, x, 4, 48)
    call(ValueError, "scheme must be .*got 'nf4'", ops.quantize, x, 4, 32, "nf4")
    call(TypeError, "scale_dtype must be", ops.quantize, x, 4, 32, "affine", torch.int8)


def test_format():
    assert QuantFormat(4, -1).resolve_group_size(77) == 77
    assert QuantFormat(4, 64, "affine").bits_per_weight(128, torch.float16) == 4.5
    assert QuantFormat(8, 32, "symmetric").bits_per_weight(64, torch.float16) == 8.5
    call(ValueError, "bits must be 8, 4 or 2", QuantFormat, 5)
    call(ValueError, "group_size must be .* or -1", QuantFormat, 4, 33)
    call(ValueError, "scheme must be", QuantFormat, 4, 32, "linear")

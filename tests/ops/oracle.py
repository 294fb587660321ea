"""The oracle stands in the package, where `mkrs doctor` and MKRS_VERIFY=1 use it too."""

from mergekit_torch.oracle import (  # noqa: F401
    TINY,
    UNIT,
    Weight,
    assert_within,
    dequantize32,
    dequantize64,
    group_max64,
    magnitude64,
    matmul_bound,
    quantize_bound,
    random_weight,
    transposed_bound,
    unpack,
)

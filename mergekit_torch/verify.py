"""Kernels checked against the oracle while a program runs: ``MKRS_VERIFY=1``.

With the variable set, the first call of each kernel variant (op, device, dtypes, bits, scheme,
alignment and number of input rows) is answered twice: by the kernel and, on the CPU, by
:mod:`mergekit_torch.oracle`. A result outside its error bound raises :class:`VerificationError`.
Unset, nothing is installed and calls cost what they always cost. ``mkrs doctor`` judges by the same
checks.

Large weights are sampled: of more than ``_MOST`` elements some rows are compared, the last one
among them, or the last columns.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle
from .format import code_bytes
from .ops.gguf_unpack import reference as reference_gguf_unpack
from .ops.quantize import reference as reference_quantize

_MOST = 1 << 22
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS"}


class VerificationError(RuntimeError):
    """A kernel's result is outside the error bound of its op."""


# ---- pieces ------------------------------------------------------------------------------------


def _host(t: Tensor) -> Tensor:
    """A CPU tensor without gradient; NumPy knows neither."""
    return t.detach().cpu()


def _array(t: Tensor) -> np.ndarray:
    result: np.ndarray = _host(t).double().numpy()
    return result


def _every(n: int, width: int) -> slice:
    """Of ``n`` rows of ``width`` elements those to compare: evenly spaced, the last included."""
    step = max(1, -(-n * width // _MOST))
    return slice((n - 1) % step, None, step)


def _finite(*tensors: Tensor | None) -> bool:
    return all(t is None or bool(torch.isfinite(_host(t)).all()) for t in tensors)


def _weight(
    parts: Sequence[Tensor | None], bits: int, group_size: int, in_features: int, rows: slice
) -> oracle.Weight:
    """Some rows of a weight on the CPU, leading dimensions flattened."""
    codes, scale, zero_point, offset = (
        None if t is None else _host(t.flatten(0, -2)[rows]) for t in parts
    )
    assert codes is not None
    assert scale is not None
    return oracle.Weight(codes, scale, zero_point, offset, bits, group_size, in_features)


def _within(got: Tensor, expected: np.ndarray, bound: np.ndarray) -> float | None:
    """The worst error in bounds; None where the answer overflows the result's dtype."""
    if expected.size == 0:
        return None
    if not (np.abs(expected) + bound < torch.finfo(got.dtype).max).all():
        return None
    value = _array(got)
    error = np.abs(value - expected)
    ratio = np.where(error == 0, 0.0, error / np.maximum(bound, np.finfo(np.float64).tiny))
    ratio = np.where(np.isnan(value), np.inf, ratio)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    if not ratio[worst] <= 1:
        raise VerificationError(
            f"the result at {tuple(map(int, worst))} must be {expected[worst]:.9g} within "
            f"{bound[worst]:.3g}, got {value[worst]:.9g}"
        )
    return float(ratio[worst])


def _equal(got: Tensor, expected: Tensor) -> float:
    """0 if two tensors agree bit for bit, up to the payload of NaN and the sign of zero."""
    got, expected = _host(got), _host(expected)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise VerificationError(
            f"the result must be {expected.dtype} {list(expected.shape)}, got {got.dtype} "
            f"{list(got.shape)}"
        )
    same = (got == expected) | ((got != got) & (expected != expected))
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise VerificationError(
            f"the result at {at} must be {expected[at].item()!r} exactly, got {got[at].item()!r} "
            f"({int((~same).sum())} of {same.numel()} differ)"
        )
    return 0.0


# ---- one check an op ---------------------------------------------------------------------------
# Each takes the op's result and arguments and returns the worst error in units of its bound, or
# None if the call cannot be judged (nothing in it, or inf and NaN among its inputs).


def check_matmul(
    result: Tensor,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    compute: str = "exact",
) -> float | None:
    """``dequant_matmul`` within :func:`oracle.matmul_bound`."""
    n, k = codes.shape[0], input.shape[-1]
    if result.numel() == 0:
        return None
    flat = input.detach().flatten(0, -2) if input.dim() > 1 else input.detach()[None]
    rows, which = _every(n, max(1, k)), _every(flat.shape[0], max(1, k))
    w = _weight((codes, scale, zero_point, offset), bits, group_size, k, rows)
    x = flat[which]
    if not _finite(x, w.scale, w.offset, bias):
        return None
    x64 = _array(x)
    bias64 = None if bias is None else _array(bias[rows])
    expected = x64 @ oracle.dequantize64(w).T
    if bias64 is not None:
        expected = expected + bias64
    bound = oracle.matmul_bound(
        x64,
        w,
        expected,
        input.dtype,
        bias=bias64,
        int8=compute == "int8",
        rounds=oracle.rounds_weights(codes.device.type, input.dtype, flat.shape[0]),
    )
    return _within(result.reshape(-1, n)[which][:, rows], expected, bound)


def check_matmul_many(
    result: Sequence[Tensor],
    input: Tensor,
    codes: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    offset: Sequence[Tensor],
    bias: Sequence[Tensor],
    bits: int,
    group_size: int,
    compute: str,
) -> float | None:
    """``dequant_matmul_many``: each product by itself."""

    def at(parts: Sequence[Tensor], i: int) -> Tensor | None:
        return parts[i] if parts else None

    worst: list[float] = []
    for i in range(len(codes)):
        value = check_matmul(
            result[i],
            input,
            codes[i],
            scale[i],
            at(zero_point, i),
            at(offset, i),
            at(bias, i),
            bits,
            group_size,
            compute,
        )
        if value is None:
            return None
        worst.append(value)
    return max(worst, default=None)


def check_matmul_t(
    result: Tensor,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> float | None:
    """``dequant_matmul_t`` within :func:`oracle.transposed_bound`."""
    n, k = codes.shape[0], in_features
    if result.numel() == 0 or n == 0:
        return None
    # The last columns, from where a group and a byte begin.
    unit = group_size if group_size < k else 8
    first = max(0, k - max(unit, _MOST // n)) // unit * unit
    parts: list[Tensor | None] = [codes[:, code_bytes(first, bits) :]]
    group = first // group_size
    parts += [None if t is None else t[:, group:] for t in (scale, zero_point, offset)]
    size = group_size if group_size < k else k - first
    w = _weight(parts, bits, size, k - first, slice(None))
    flat = input.detach().flatten(0, -2) if input.dim() > 1 else input.detach()[None]
    which = _every(flat.shape[0], max(n, k - first))
    x = flat[which]
    if not _finite(x, w.scale, w.offset):
        return None
    x64 = _array(x)
    expected = x64 @ oracle.dequantize64(w)
    rounds = oracle.rounds_weights(codes.device.type, input.dtype, flat.shape[0])
    bound = oracle.transposed_bound(x64, w, expected, input.dtype, rounds=rounds)
    return _within(result.reshape(-1, k)[which][:, first:], expected, bound)


def check_dequantize(
    result: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> float | None:
    """``dequantize`` bit for bit."""
    if result.numel() == 0:
        return None
    flat = result.flatten(0, -2)
    rows = _every(flat.shape[0], in_features)
    w = _weight((codes, scale, zero_point, offset), bits, group_size, in_features, rows)
    return _equal(flat[rows], torch.from_numpy(oracle.dequantize32(w)).to(dtype))


def check_dequantize_into(
    result: None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out: Tensor,
) -> float | None:
    """What ``dequantize_into`` has left in ``out``, bit for bit."""
    form = (bits, group_size, in_features, out.dtype)
    return check_dequantize(out, codes, scale, zero_point, offset, *form)


def check_embedding(
    result: Tensor,
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> float | None:
    """``dequant_embedding`` bit for bit; indices outside the weight are not judged."""
    if result.numel() == 0:
        return None
    flat = _host(indices).flatten().long()
    which = _every(flat.numel(), in_features)
    index = flat[which]
    if bool(((index < 0) | (index >= codes.shape[0])).any()):
        return None
    used, place = index.unique(return_inverse=True)
    on_device = used.to(codes.device)
    parts = (codes, scale, zero_point, offset)
    taken = [None if t is None else t.index_select(0, on_device) for t in parts]
    w = _weight(taken, bits, group_size, in_features, slice(None))
    dense = torch.from_numpy(oracle.dequantize32(w)).to(dtype)
    return _equal(result.reshape(-1, in_features)[which], dense[place])


def check_reduce(
    result: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    reduction: str,
) -> float | None:
    """``dequant_reduce``: extremes bit for bit, sums within the error of K float32 additions."""
    if result.numel() == 0 or in_features == 0:
        return None
    flat = result.flatten()
    rows = _every(flat.shape[0], in_features)
    w = _weight((codes, scale, zero_point, offset), bits, group_size, in_features, rows)
    if not _finite(w.scale, w.offset):
        return None
    if reduction in ("sum", "sum_squares"):
        power = 1 if reduction == "sum" else 2
        expected = (oracle.dequantize64(w) ** power).sum(-1)
        # Each weight is rounded itself, once or twice.
        size = (oracle.magnitude64(w) ** power).sum(-1)
        unit = oracle.UNIT[torch.float32]
        bound = (in_features + 8) * unit * size + oracle.TINY[torch.float32] * in_features
        return _within(flat[rows], expected, bound)
    dense = oracle.dequantize32(w)
    extremes = {"amax": dense.max, "amin": dense.min, "abs_max": np.abs(dense).max}
    return _equal(flat[rows], torch.from_numpy(extremes[reduction](-1)))


def check_quantize(
    result: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bits: int,
    group_size: int,
    scheme: str,
    scale_dtype: torch.dtype | None = None,
) -> float | None:
    """``quantize`` bit for bit, and within :func:`oracle.quantize_bound` of the weight."""
    if weight.numel() == 0:
        return None
    k = weight.shape[-1]
    flat = weight.detach().flatten(0, -2)
    rows = _every(flat.shape[0], k)
    dense = _host(flat[rows])
    codes, scale, zero = (_host(t.flatten(0, -2)[rows]) if t.numel() else _host(t) for t in result)
    if not _finite(dense, scale):
        return None
    for got, want in zip(
        (codes, scale, zero),
        reference_quantize(dense, bits, group_size, scheme, scale_dtype),
        strict=True,
    ):
        _equal(got, want)
    w = oracle.Weight(
        codes,
        scale,
        zero if scheme == "asymmetric" else None,
        zero if scheme == "affine" else None,
        bits,
        group_size,
        k,
    )
    bound = oracle.quantize_bound(_array(dense), w)
    if not np.isfinite(bound).all():
        return None
    back = torch.from_numpy(oracle.dequantize64(w))
    # Groups of subnormals are stored as one value.
    return _within(back, _array(dense), bound + 2.0**-118)


def check_gguf_unpack(
    result: tuple[Tensor, Tensor, Tensor],
    blocks: Tensor,
    ggml_type: int,
    rows: int,
    in_features: int,
) -> float | None:
    """``gguf_unpack`` bit for bit."""
    if rows == 0 or in_features == 0:
        return None
    which = _every(rows, in_features)
    part = _host(blocks[which])
    expected = reference_gguf_unpack(part, ggml_type, part.shape[0], in_features)
    for got, want in zip(result, expected, strict=True):
        _equal(got[which] if got.numel() else got, want)
    return 0.0


CHECKS: dict[str, Callable[..., float | None]] = {
    "quantize": check_quantize,
    "dequantize": check_dequantize,
    "dequantize_into": check_dequantize_into,
    "dequant_matmul": check_matmul,
    "dequant_matmul_many": check_matmul_many,
    "dequant_matmul_t": check_matmul_t,
    "dequant_embedding": check_embedding,
    "dequant_reduce": check_reduce,
    "gguf_unpack": check_gguf_unpack,
}


# ---- variants ----------------------------------------------------------------------------------

ROW_REGIMES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 64)
"""Numbers of input rows up to which some backend has a kernel of its own."""


def variant(op: str, *args: Any, **kwargs: Any) -> tuple[Hashable, ...]:
    """What decides which kernel a call runs: device, dtypes, format, alignment, input rows."""
    if op == "gguf_unpack":
        return (op, args[0].device.type, args[1])
    key: list[Hashable] = [op]
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            key.append(len(value) > 0)
            tensors += list(value[:1])
        elif isinstance(value, Tensor):
            tensors.append(value)
        else:
            key.append(value)  # None tells which components there are
    for t in tensors:
        key += [t.device.type, t.dtype]
    first = tensors[0]
    if op.startswith("dequant_matmul"):
        rows = first.numel() // max(1, first.shape[-1])
        key.append(next((r for r in ROW_REGIMES if rows <= r), None))
    for t in tensors[:2]:
        stride = t.stride(-2) if t.dim() > 1 else 0
        key.append((t.storage_offset() % 16 == 0, stride % 16 == 0, t.shape[-1] % 16 == 0))
    return tuple(key)


def describe(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The call in words, for an error message."""
    words = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            words.append(f"{dtype}{list(value.shape)} on {value.device.type}")
        elif isinstance(value, (list, tuple)):
            words.append(f"{len(value)} tensors")
        else:
            words.append(repr(value))
    return f"mkrs::{op}({', '.join(words)})"


def check_call(
    op: str, result: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> float | None:
    """Judge one call of an op.

    Returns:
        The worst error in units of its bound (0 where the op is exact to the bit), or None if the
        call cannot be judged.

    Raises:
        VerificationError: an element is outside its bound; the message names the call.
    """
    kwargs = kwargs or {}
    try:
        return CHECKS[op](result, *args, **kwargs)
    except VerificationError as error:
        raise VerificationError(f"{describe(op, args, kwargs)}: {error}") from None


# ---- MKRS_VERIFY -------------------------------------------------------------------------------

_library: torch.library.Library | None = None
_installed: dict[tuple[str, str], Any] = {}
verified: set[tuple[Hashable, ...]] = set()
"""Variants that were checked in this process, under ``MKRS_VERIFY=1``."""


def _checked(op: str, kernel: Any) -> Callable[..., Any]:
    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = kernel.call_boxed(keys, *args, **kwargs)
        key = variant(op, *args, **kwargs)
        if key not in verified and check_call(op, result, args, kwargs) is not None:
            verified.add(key)
        return result

    return call


def install() -> None:
    """Put the check in front of every kernel that is loaded; calling it again adds new ones.

    Raises:
        RuntimeError: torch cannot hand out registered kernels (before 2.10).
    """
    global _library
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(f"MKRS_VERIFY=1 needs torch >= 2.10, got {torch.__version__}")
    if _library is None:
        _library = torch.library.Library("mkrs", "IMPL")
    for op in CHECKS:
        for key in _KEYS.values():
            name = f"mkrs::{op}"
            if (op, key) in _installed or not torch._C._dispatch_has_kernel_for_dispatch_key(
                name, key
            ):
                continue
            kernel = torch.library.get_kernel(name, key)
            _installed[op, key] = kernel
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of what is meant here: an override
                _library.impl(op, _checked(op, kernel), key, with_keyset=True)


def install_if_asked() -> None:
    """:func:`install` when ``MKRS_VERIFY`` is set to 1.

    Raises:
        ValueError: it is set to something other than 0, 1 or nothing.
    """
    asked = os.environ.get("MKRS_VERIFY", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MKRS_VERIFY must be 0 or 1, got {asked!r}")
    if asked == "1":
        install()

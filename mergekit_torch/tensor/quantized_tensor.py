"""The class: components, metadata, and the protocols of torch that need a method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .. import ops
from ..format import PER_ROW, Scheme
from ..ops._common import check_components, require_float, require_tensor, scheme_of
from ._registry import ALIASING, HANDLERS, unsupported

# What a component needs to know to become a tensor again, besides the components themselves.
_Meta = tuple[int, int, torch.dtype, bool]


def _contiguous_stride(size: Sequence[int]) -> tuple[int, ...]:
    stride, step = [], 1
    for n in reversed(size):
        stride.append(step)
        step = step * n
    return tuple(reversed(stride))


class QuantizedTensor(torch.Tensor):
    """A low-bit weight ``[..., N, K]`` that is a view onto its components.

    The components are plain tensors; nothing else holds data, and nothing here ever makes the
    weight dense unless :meth:`dequantize` is called or an operation's result is defined to be a
    float tensor (``+``, ``-``, ``*``, ``/`` and comparisons with a tensor). What is not supported
    raises NotImplementedError.

    * ``F.linear``, ``F.embedding``, ``matmul`` and its kin run fused kernels on the codes. A
      product takes the dtype of the float operand, whatever this tensor's ``dtype`` is, and is
      differentiable in that operand. Weights themselves are frozen.
    * Slices of rows are views without a copy; slices of columns are too when they start at a
      group's first element (or stay inside one group) and at a byte's first code.
    * Multiplication by a number or a 0-d tensor changes ``scale`` and ``offset`` only. By 1 or -1
      it is exact; any other factor ``c`` gives float32 scale and offset, each the product with
      ``float32(c)`` rounded once, so that no precision of a float16 scale is lost.

    Args:
        codes: uint8 ``[..., N, ceil(K*bits/8)]``, packed along K, lowest bits first.
        scale: float16, bfloat16 or float32 ``[..., N, ceil(K/group_size)]``.
        zero_point: uint8 of scale's shape (asymmetric), or None.
        offset: scale's dtype and shape (affine), or None.
        bits: 8, 4 or 2.
        group_size: elements of a row that share a scale; -1 for one group per row.
        in_features: K, the logical row length.
        dtype: float32, float16 or bfloat16: what the tensor dequantizes to.

    Attributes:
        codes, scale, zero_point, offset: the components; the last two may be None.
        bits, group_size: the format.
        transposed: whether this is the transposed view ``[..., K, N]`` of the stored rows.

    Raises:
        TypeError: a component that is not a tensor, or a wrong dtype.
        ValueError: components whose shapes or devices do not make one weight, or a format that
            is not offered.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    bits: int
    group_size: int
    transposed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls: "type[QuantizedTensor]",
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        offset: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        in_features: int,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantizedTensor":
        require_float("dtype", dtype)
        if group_size == PER_ROW:
            group_size = max(1, in_features)
        parts = (codes, scale, zero_point, offset)
        if isinstance(codes, Tensor) and codes.dim() == 1:
            # A single row; the check wants a matrix.
            rows = [p.unsqueeze(0) if isinstance(p, Tensor) else p for p in parts]
        else:
            rows = list(parts)
        c, s, z, o = rows
        check_components(c, s, z, o, bits, group_size, in_features)  # type: ignore[arg-type]
        for part in parts:
            if isinstance(part, QuantizedTensor):
                raise TypeError("components must be plain tensors, got a QuantizedTensor")
        size = (*codes.shape[:-1], in_features)
        return cls._wrap(parts, bits, group_size, dtype, size)

    @classmethod
    def _wrap(
        cls,
        parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int] | None = None,
        transposed: bool = False,
    ) -> "QuantizedTensor":
        """Make a tensor from components that are known to fit."""
        if torch.is_inference_mode_enabled():
            # A view of a normal tensor is a normal tensor in inference mode too; torch insists.
            with torch.inference_mode(False):
                return cls._wrap(parts, bits, group_size, dtype, size, stride, transposed)
        self: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            size,
            strides=_contiguous_stride(size) if stride is None else stride,
            dtype=dtype,
            device=parts[0].device,
        )
        self.codes, self.scale, self.zero_point, self.offset = parts
        self.bits = bits
        self.group_size = group_size
        self.transposed = transposed
        return self

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bits: int = 4,
        group_size: int = 64,
        scheme: Scheme = "affine",
        scale_dtype: torch.dtype | None = None,
    ) -> "QuantizedTensor":
        """Quantize a float tensor ``[..., N, K]`` by rounding to nearest.

        Arguments and errors are those of :func:`mergekit_torch.ops.quantize`. The result
        dequantizes to ``weight``'s dtype.
        """
        if isinstance(weight, QuantizedTensor):
            raise TypeError("weight must be a float tensor, got a QuantizedTensor")
        codes, scale, zero = ops.quantize(weight, bits, group_size, scheme, scale_dtype)
        return cls(
            codes,
            scale,
            zero if scheme == "asymmetric" else None,
            zero if scheme == "affine" else None,
            bits=bits,
            group_size=group_size,
            in_features=weight.shape[-1],
            dtype=weight.dtype,
        )

    # --- what it is -------------------------------------------------------------------------

    @property
    def scheme(self) -> Scheme:
        """``"symmetric"``, ``"asymmetric"`` or ``"affine"``."""
        return scheme_of(self.zero_point, self.offset)

    @property
    def in_features(self) -> int:
        """K: the length of a stored row, along which codes are packed."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        """N: the number of stored rows in the last matrix (1 for a single row)."""
        if self.dim() == 1:
            return 1
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def components(self) -> dict[str, Tensor]:
        """The component tensors that are there, by name."""
        return {name: getattr(self, name) for name in self._part_names()}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all components, as they are counted for one copy of this view."""
        return sum(part.numel() * part.element_size() for part in self.components.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales and zeros included."""
        return 8 * self.nbytes / max(1, self.numel())

    def _part_names(self) -> list[str]:
        names = ["codes", "scale", "zero_point", "offset"]
        return [name for name in names if getattr(self, name) is not None]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.codes, self.scale, self.zero_point, self.offset

    def _map(self, fn: Callable[[Tensor], Tensor], **changes: Any) -> "QuantizedTensor":
        """A tensor whose components are ``fn`` of this one's; metadata as it is or changed."""
        codes, scale, zero_point, offset = self._parts()
        parts = (
            fn(codes),
            fn(scale),
            None if zero_point is None else fn(zero_point),
            None if offset is None else fn(offset),
        )
        return self._with(parts, **changes)

    def _with(
        self, parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None], **changes: Any
    ) -> "QuantizedTensor":
        meta: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": self.dtype,
            "size": self.shape,
            "stride": self.stride(),
            "transposed": self.transposed,
        }
        meta.update(changes)
        if "size" in changes and "stride" not in changes:
            meta["stride"] = None
        return type(self)._wrap(parts, **meta)

    def _rows(self) -> "QuantizedTensor":
        """The stored orientation ``[..., N, K]``."""
        return _transpose(self) if self.transposed else self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rate = self.bits_per_weight
        # Symbolic under torch.compile with dynamic shapes.
        stored = f", {rate:.3g} bits per weight" if isinstance(rate, float) else ""
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, bits={self.bits}, "
            f"group_size={self.group_size}, scheme={self.scheme!r}, "
            f"scale={str(self.scale.dtype).removeprefix('torch.')}, "
            f"dtype={self.dtype}, device='{self.device}'{stored}"
            f"{', transposed' if self.transposed else ''})"
        )

    # --- to float ---------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The dense tensor, as the format defines it to the bit.

        Args:
            dtype: float32, float16 or bfloat16; by default this tensor's ``dtype``, or that of
                ``out``.
            out: a tensor of this one's shape to write to, contiguous (for a transposed tensor: a
                transposed view of a contiguous one), as for :func:`mergekit_torch.ops.dequantize`.

        Returns:
            A float tensor of this tensor's shape; ``out`` if it was given.

        Raises:
            TypeError: another dtype.
            ValueError: ``out`` does not fit.
        """
        base = self._rows()
        parts = base._parts()
        if base.dim() == 1:
            parts = tuple(None if p is None else p.unsqueeze(0) for p in parts)  # type: ignore[assignment]
        if out is not None:
            target = out.transpose(-1, -2) if self.transposed else out
            ops.dequantize(
                *parts,
                bits=base.bits,
                group_size=base.group_size,
                in_features=base.in_features,
                dtype=dtype,
                out=target.unsqueeze(0) if base.dim() == 1 else target,
            )
            return out
        dtype = self.dtype if dtype is None else dtype
        require_float("dtype", dtype)
        dense: Tensor = torch.ops.mkrs.dequantize(
            *parts, base.bits, base.group_size, base.in_features, dtype
        )
        if base.dim() == 1:
            return dense.squeeze(0)
        return dense.transpose(-1, -2) if self.transposed else dense

    def abs_max(self) -> Tensor:
        """The largest magnitude of all elements, a 0-d tensor of this dtype, without densifying."""
        return torch.linalg.vector_norm(self, float("inf"))

    # --- torch's protocols ------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is None:
            # In inference mode composite operators arrive whole; their parts may have answers.
            result = func.decompose(*args, **kwargs)
            return unsupported(str(func)) if result is NotImplemented else result
        result = handler(*args, **kwargs)
        if func in ALIASING:
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result

    def __tensor_flatten__(self) -> tuple[list[str], _Meta]:
        return self._part_names(), (self.bits, self.group_size, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner_tensors: dict[str, Tensor],
        meta: _Meta,
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> "QuantizedTensor":
        bits, group_size, dtype, transposed = meta
        parts = (
            inner_tensors["codes"],
            inner_tensors["scale"],
            inner_tensors.get("zero_point"),
            inner_tensors.get("offset"),
        )
        return cls._wrap(parts, bits, group_size, dtype, outer_size, outer_stride, transposed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        meta = (self.bits, self.group_size, self.in_features, self.dtype, self.transposed)
        is_param = bool(getattr(self, "_is_param", False))
        return _rebuild, (self._parts(), meta, is_param)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedTensor":
        if id(self) in memo:
            copied: QuantizedTensor = memo[id(self)]
            return copied
        # Components go through the memo, so that what shared memory before shares it after.
        copied = self._map(lambda part: part.__deepcopy__(memo))
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedTensor":
        """Refuse to train the weight; ``requires_grad_(False)`` does nothing.

        Raises:
            NotImplementedError: ``requires_grad`` is True.
        """
        if requires_grad:
            unsupported(
                "requires_grad=True: quantized weights are frozen",
                "train a dense copy (.dequantize()) or an adapter beside it; wrap with "
                "nn.Parameter(tensor, requires_grad=False)",
            )
        return self

    def share_memory_(self) -> "QuantizedTensor":
        """Move the components to shared memory; see :meth:`torch.Tensor.share_memory_`."""
        for part in self.components.values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether all components are in shared memory."""
        return all(part.is_shared() for part in self.components.values())

    def data_ptr(self) -> int:
        """Refuse: a quantized tensor has no memory of its own, its components do.

        Raises:
            NotImplementedError: always.
        """
        return int(unsupported("data_ptr()", "use .codes.data_ptr(), .scale.data_ptr(), ..."))

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse: use ``.dequantize().numpy()`` or the components.

        Raises:
            NotImplementedError: always.
        """
        return unsupported("numpy()", "call .dequantize().numpy()")

    def tolist(self) -> Any:
        """Refuse: use ``.dequantize().tolist()``.

        Raises:
            NotImplementedError: always.
        """
        return unsupported("tolist()", "call .dequantize().tolist()")

    def __dlpack__(self, **kwargs: Any) -> Any:
        return unsupported("DLPack export", "export .dequantize() or the components")

    def __dlpack_device__(self) -> Any:
        return unsupported("DLPack export", "export .dequantize() or the components")


def _transpose(tensor: QuantizedTensor) -> QuantizedTensor:
    """Swap the last two dimensions of the view; memory stays as it is."""
    size, stride = list(tensor.shape), list(tensor.stride())
    size[-1], size[-2] = size[-2], size[-1]
    stride[-1], stride[-2] = stride[-2], stride[-1]
    return tensor._with(tensor._parts(), size=size, stride=stride, transposed=not tensor.transposed)


def _rebuild(
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    meta: tuple[int, int, int, torch.dtype, bool],
    is_param: bool,
) -> QuantizedTensor:
    """Make a tensor from pickled components, checked like any other input."""
    bits, group_size, in_features, dtype, transposed = meta
    require_tensor("codes", parts[0])
    tensor = QuantizedTensor(
        *parts, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype
    )
    if transposed:
        tensor = _transpose(tensor)
    if is_param:
        tensor._is_param = True
    return tensor


# torch.load(weights_only=True) may call this; it only checks and wraps tensors.
torch.serialization.add_safe_globals([_rebuild])

"""What modules with one quantized weight share: buffers, conversions, loading."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..format import PER_ROW, Scheme, check_bits, check_group_size, check_scheme
from ..format import code_bytes as _code_bytes
from ..format import num_groups as _num_groups
from ..ops._common import require_float
from ..ops.quantize import default_scale_dtype
from ..tensor import QuantizedTensor

PARTS = ("codes", "scale", "zero_point", "offset")
BUFFERS = tuple(f"weight_{part}" for part in PARTS)

# Integers of a float dtype's size: quantization data goes through Module.to(dtype) as bits.
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}

# Where `Module._apply(fn)` has taken a buffer: buffer -> (fn, result). Modules that share a buffer
# share the result; torch itself does this for parameters, not for buffers.
_applied: Any = WeakIdKeyDictionary()


class QuantizedModule(nn.Module):
    """A module whose ``weight [N, K]`` lives in buffers, under the names that files use.

    ``weight_codes``, ``weight_scale``, and ``weight_zero_point`` or ``weight_offset`` (None when
    the scheme has none) are buffers; state-dict keys are the keys of native checkpoints. Two
    modules that hold the same buffer objects are tied, and stay so through ``.to()`` and
    ``copy.deepcopy``.

    ``.to(dtype)``, ``.half()``, ``.bfloat16()`` and ``.float()`` change :attr:`dtype`, what the
    weight dequantizes to; codes, scale and offset are the weight itself and keep their dtypes.
    """

    bits: int
    group_size: int
    scheme: Scheme
    dtype: torch.dtype
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_offset: Tensor | None
    part: Any = None
    """What this process has of a weight that is split over several; None for all of it."""

    def _set_format(
        self,
        rows: int,
        in_features: int,
        bits: int,
        group_size: int,
        scheme: Scheme,
        scale_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the format and register buffers of that size, a weight of zeros."""
        for name, value in (("rows", rows), ("in_features", in_features)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        check_bits(bits)
        check_scheme(scheme)
        if group_size == PER_ROW:
            group_size = max(1, in_features)
        check_group_size(group_size, in_features)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_float("dtype", dtype)
        scale_dtype = default_scale_dtype(dtype) if scale_dtype is None else scale_dtype
        require_float("scale_dtype", scale_dtype)
        self.bits, self.group_size, self.scheme, self.dtype = bits, group_size, scheme, dtype
        codes = torch.zeros(rows, _code_bytes(in_features, bits), dtype=torch.uint8, device=device)
        groups = (rows, _num_groups(in_features, group_size))
        scale = torch.zeros(groups, dtype=scale_dtype, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer(
            "weight_zero_point",
            torch.zeros(groups, dtype=torch.uint8, device=device)
            if scheme == "asymmetric"
            else None,
        )
        self.register_buffer(
            "weight_offset", torch.zeros_like(scale) if scheme == "affine" else None
        )

    def _weight_size(self) -> tuple[int, int]:
        """``(N, K)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define its weight's size")

    @property
    def weight(self) -> QuantizedTensor:
        """The weight ``[N, K]``, a view onto the buffers; assigning one replaces the buffers.

        Assigning another module's ``weight`` ties the two. The new weight may have another
        format, not another shape.

        Raises:
            TypeError: what is assigned is not a QuantizedTensor.
            ValueError: it has another shape, or is a transposed view.
        """
        buffers = self._buffers
        return QuantizedTensor(
            *(buffers[name] for name in BUFFERS),  # type: ignore[arg-type]
            bits=self.bits,
            group_size=self.group_size,
            in_features=self._weight_size()[1],
            dtype=self.dtype,
        )

    @weight.setter
    def weight(self, value: QuantizedTensor) -> None:
        if not isinstance(value, QuantizedTensor):
            raise TypeError(
                f"{type(self).__name__}.weight must be a QuantizedTensor, got "
                f"{type(value).__name__}; quantize it with QuantizedTensor.from_float"
            )
        if tuple(value.shape) != self._weight_size() or value.transposed:
            raise ValueError(
                f"{type(self).__name__}.weight must have shape {self._weight_size()}, got {value}"
            )
        for part, name in zip(PARTS, BUFFERS, strict=True):
            self._buffers[name] = getattr(value, part)
        self.bits, self.group_size, self.scheme = value.bits, value.group_size, value.scheme
        self.dtype = value.dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            # nn.Module would register a Parameter under this name.
            type(self).weight.__set__(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    def _format_repr(self) -> str:
        scale = str(self.weight_scale.dtype).removeprefix("torch.")
        return (
            f"bits={self.bits}, group_size={self.group_size}, scheme={self.scheme!r}, "
            f"scale={scale}, dtype={self.dtype}"
        )

    def _require_whole(self, name: str, instead: str) -> None:
        """Raise ValueError if this is only a part of a weight."""
        if self.part is not None:
            raise ValueError(f"{name} holds one rank's part of a weight; {instead}")

    # --- torch's conversions ----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedModule":
        """Apply ``fn`` as torch does, except that no buffer of the weight is cast."""
        device = self.weight_codes.device
        dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if dtype not in _BITS:
            raise TypeError(
                f"{type(self).__name__} can be float32, float16 or bfloat16, got a conversion to "
                f"{dtype}; dequantize_ the model first"
            )
        before = {name: self._buffers[name] for name in BUFFERS}
        after = {
            name: None if buffer is None else _apply_to_bits(fn, buffer)
            for name, buffer in before.items()
        }
        # torch's loop must not see them.
        self._buffers.update(dict.fromkeys(BUFFERS))
        try:
            super()._apply(fn, recurse)
        except BaseException:
            self._buffers.update(before)
            raise
        self._buffers.update(after)
        self.dtype = dtype
        return self

    # --- loading ----------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load components; a plain ``weight`` is quantized to this module's format on the way."""
        state_dict = dict(state_dict)
        plain = state_dict.pop(f"{prefix}weight", None)
        if plain is not None:
            try:
                state_dict.update(self._components_of(plain, prefix, state_dict))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
        for name in BUFFERS:
            given, own = state_dict.get(prefix + name), self._buffers[name]
            if given is not None and own is not None and given.dtype != own.dtype:
                # copy_ would round scales, and codes are not numbers at all.
                error_msgs.append(
                    f"{prefix}{name}: dtype must be {own.dtype} as in the module, got "
                    f"{given.dtype}; build the module with that scale_dtype, or assign "
                    "module.weight"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _components_of(
        self, weight: Tensor, prefix: str, state_dict: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The module's format of a plain ``weight``, by state-dict key."""
        if any(prefix + name in state_dict for name in BUFFERS):
            raise ValueError("the state dict has the plain weight and quantized components of it")
        if tuple(weight.shape) != self._weight_size():
            raise ValueError(f"shape must be {self._weight_size()}, got {tuple(weight.shape)}")
        if not isinstance(weight, QuantizedTensor):
            weight = QuantizedTensor.from_float(
                weight, self.bits, self.group_size, self.scheme, self.weight_scale.dtype
            )
        elif (weight.bits, weight.group_size, weight.scheme) != (
            self.bits,
            self.group_size,
            self.scheme,
        ):
            raise ValueError(f"the module holds {self._format_repr()}, got {weight}")
        return {f"{prefix}weight_{name}": part for name, part in weight.components.items()}


def _apply_to_bits(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """``fn(buffer)`` without a cast, and the same result for every module that has the buffer."""
    known = _applied.get(buffer)
    if known is not None and known[0]() is fn:
        shared: Tensor | None = known[1]()
        if shared is not None:
            return shared
    bits = buffer.view(_BITS[buffer.dtype]) if buffer.dtype in _BITS else buffer
    moved = fn(bits)
    if moved is bits:
        return buffer
    if moved.dtype != bits.dtype:
        raise TypeError(
            f"quantized weights cannot be cast to {moved.dtype}; use .to(dtype) with a float "
            "dtype, or dequantize_ the model"
        )
    moved = moved.view(buffer.dtype)
    try:
        reference: Callable[[], Any] = weakref.ref(fn)
    except TypeError:  # builtins have no weak references, and live forever anyway
        reference = lambda: fn  # noqa: E731
    _applied[buffer] = (reference, weakref.ref(moved))
    return moved

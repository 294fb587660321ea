"""``QuantizedLinear``: ``nn.Linear`` on low-bit weights."""

import torch
from torch import Tensor, nn

from ..format import Scheme
from ..ops.dequant_matmul import COMPUTE_MODES, Compute
from ..tensor import QuantizedTensor
from .module import QuantizedModule

_matmul = torch.ops.mkrs.dequant_matmul.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled


class QuantizedLinear(QuantizedModule):
    """``input @ weight.T + bias`` on a weight that is never made dense.

    Takes float32, float16 and bfloat16 input ``[..., in_features]`` and returns
    ``[..., out_features]`` of input's dtype, accumulated in float32. Differentiable in input and
    bias; the weight is frozen. Starts as zeros: load a state dict, or use :meth:`from_linear`.

    Args:
        in_features: K, the last size of the input.
        out_features: N, the last size of the output.
        bias: whether there is a trainable ``bias [N]``.
        bits: 8, 4 or 2.
        group_size: 16, 32, 64, 128, 256, at least K, or -1 for one group per row.
        scheme: ``"symmetric"``, ``"asymmetric"`` or ``"affine"``.
        scale_dtype: dtype of scale and offset; by default bfloat16 for a bfloat16 module and
            float16 otherwise.
        compute: ``"exact"``, or ``"int8"``, which quantizes activations to int8 first.
        device: of all tensors; ``"meta"`` allocates nothing.
        dtype: of the bias, and what ``weight`` dequantizes to; torch's default dtype if None.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: a format or mode that is not offered.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 64,
        scheme: Scheme = "affine",
        scale_dtype: torch.dtype | None = None,
        compute: Compute = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if compute not in COMPUTE_MODES:
            raise ValueError(f"compute must be 'exact' or 'int8', got {compute!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.compute = compute
        self._set_format(
            out_features, in_features, bits, group_size, scheme, scale_dtype, device, dtype
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype))
        else:
            self.register_parameter("bias", None)

    def _weight_size(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute: Compute = "exact",
    ) -> "QuantizedLinear":
        """A module on ``weight``'s own components (shared, not copied).

        Args:
            weight: ``[out_features, in_features]``.
            bias: ``[out_features]`` or None; a Parameter is used as it is.
            compute: see the class.

        Raises:
            TypeError: ``weight`` is not a QuantizedTensor.
            ValueError: it is not a matrix, or bias has another length.
        """
        _require_matrix(weight)
        rows, columns = weight.shape
        module = cls(
            columns,
            rows,
            bias=False,
            bits=weight.bits,
            group_size=weight.group_size,
            scheme=weight.scheme,
            compute=compute,
            device="meta",
            dtype=weight.dtype,
        )
        module.weight = weight
        if bias is not None:
            if tuple(bias.shape) != (rows,):
                raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}")
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 64,
        scheme: Scheme = "affine",
        scale_dtype: torch.dtype | None = None,
        compute: Compute = "exact",
    ) -> "QuantizedLinear":
        """Quantize ``linear``'s weight; the bias Parameter is shared with it.

        Raises:
            TypeError: a weight of a dtype that is not offered.
            ValueError: a format that is not offered, or a weight with inf or NaN.
        """
        weight = QuantizedTensor.from_float(
            linear.weight.detach(), bits, group_size, scheme, scale_dtype
        )
        module = cls.from_quantized(weight, linear.bias, compute=compute)
        return module.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense ``nn.Linear`` of ``dtype`` (by default the module's)."""
        weight = self.weight.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            same = self.bias.dtype == weight.dtype
            linear.bias = self.bias if same else nn.Parameter(self.bias.detach().to(weight.dtype))
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` of input's dtype.

        A bias of another dtype is rounded to input's.
        """
        return self._product(input, self._parameters["bias"])

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        if bias is not None and bias.dtype is not input.dtype:
            bias = bias.to(input.dtype)
        args = (
            input,
            buffers["weight_codes"],
            buffers["weight_scale"],
            buffers["weight_zero_point"],
            buffers["weight_offset"],
            bias,
            self.bits,
            self.group_size,
            self.compute,
        )
        if (
            _is_compiling()
            or _is_inference()
            or (_is_grad_enabled() and (input.requires_grad or bias is not None))
        ):
            result: Tensor = _matmul(*args)
            return result
        # Nothing to differentiate: skip the op's autograd layer, which is Python and half the
        # cost of a small call (inference mode skips it by itself).
        with _BelowAutograd():
            result = _matmul(*args)
        return result

    def extra_repr(self) -> str:
        """Sizes and format."""
        compute = "" if self.compute == "exact" else f", compute={self.compute!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._format_repr()}{compute}"
        )


def _require_matrix(weight: QuantizedTensor) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight must be a QuantizedTensor, got {type(weight).__name__}")
    if weight.dim() != 2 or weight.transposed:
        raise ValueError(f"weight must be a matrix [N, K], not transposed, got {weight}")

"""Contenders of the CPU comparison: one linear layer in every peer's own format.

All hold the same weights, ``w = scale * (q - 8)`` with scales that bf16 and f16 represent exactly,
so that every error is an error of the product. A contender is built with ``copies`` copies of the
weight, to be rotated past the last cache, and called as ``run(copy) -> Tensor [M, N]``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergekit_torch import ops

from . import limits

GROUP = 64
READING = "reading alone"


@dataclass
class Contender:
    """One way to compute the layer."""

    name: str
    arithmetic: str  # what products are computed in: f32, bf16, int8
    weight_bytes: int  # codes and scales of one copy
    bits: int
    run: Callable[[int], Tensor]
    ours: bool = False


class Problem:
    """Weights and input shared by all contenders."""

    def __init__(self, n: int, k: int, m: int, bits: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n, self.k, self.m, self.bits = n, k, m, bits
        self.q = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, k // GROUP, generator=generator) * 0.01 + 0.005
        self.scale = scale.bfloat16().float()
        self.x = torch.randn(m, k, generator=generator)

    def dense(self) -> Tensor:
        """The weight as float32 ``[N, K]``; exact."""
        zero = 1 << (self.bits - 1)
        return (self.q.float() - zero) * self.scale.repeat_interleave(GROUP, 1)

    def expected(self, rows: int = 64) -> Tensor:
        """float64 results of the first ``rows`` outputs."""
        zero = 1 << (self.bits - 1)
        q, scale = self.q[:rows].double(), self.scale[:rows].double()
        return self.x.double() @ ((q - zero) * scale.repeat_interleave(GROUP, 1)).T

    def codes(self) -> Tensor:
        """Packed codes, lowest bits first."""
        per = 8 // self.bits
        q = self.q.reshape(self.n, -1, per)
        shifts = torch.arange(per, dtype=torch.uint8) * self.bits
        return (q << shifts).sum(-1, dtype=torch.uint8)


def copies_for(weight_bytes: int, cold_bytes: int, limit: int = 4096) -> int:
    """How many copies must rotate so that a copy is out of the cache when its turn comes.

    One where nothing is to leave the cache (``cold_bytes`` 0).
    """
    if cold_bytes == 0:
        return 1
    return max(2, min(limit, -(-cold_bytes // max(1, weight_bytes))))


def reading_alone(weight_bytes: int, cold: int, threads: int) -> Contender:
    """Not a peer: reads as many cold bytes as our weights have, in the same kind of memory."""
    read = limits.reader()
    count = copies_for(weight_bytes, cold)
    copies = [torch.ones(weight_bytes, dtype=torch.uint8) for _ in range(count)]

    def run(i: int) -> Tensor:
        copy = copies[i % count]
        read(copy.data_ptr(), weight_bytes, threads)
        return copy

    return Contender(READING, "", weight_bytes, 0, run)


def ours(p: Problem, cold: int, dtype: torch.dtype, compute: str) -> Contender:
    """mkrs::dequant_matmul, affine scheme, f16 scale and offset."""
    codes, scale = p.codes(), p.scale.half()
    offset = (-p.scale * (1 << (p.bits - 1))).half()
    size = codes.numel() + 2 * (scale.numel() + offset.numel())
    weights = [
        (codes.clone(), scale.clone(), offset.clone()) for _ in range(copies_for(size, cold))
    ]
    x = p.x.to(dtype)
    call = torch.ops.mkrs.dequant_matmul

    def run(i: int) -> Tensor:
        c, s, o = weights[i % len(weights)]
        result: Tensor = call(x, c, s, None, o, None, p.bits, GROUP, compute)
        return result

    short = str(dtype).removeprefix("torch.").replace("float", "f").replace("bf16", "bf16")
    arithmetic = "int8" if compute == "int8" else short
    return Contender(f"mkrs int{p.bits} {compute} {short}", arithmetic, size, p.bits, run, True)


def torch_dense(p: Problem, cold: int, dtype: torch.dtype) -> Contender:
    """torch.nn.functional.linear on a dense weight."""
    weight = p.dense().to(dtype)
    size = weight.numel() * weight.element_size()
    weights = [weight.clone() for _ in range(copies_for(size, cold))]
    x = p.x.to(dtype)
    short = "f32" if dtype == torch.float32 else "bf16"
    return Contender(
        f"torch dense {short}",
        short,
        size,
        32 if dtype == torch.float32 else 16,
        lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]),
    )


def torch_int4pack(p: Problem, cold: int) -> Contender:
    """torch's own int4 product (what torchao uses on CPU), bf16 input."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(p.q.int(), 2)
    pairs = torch.stack([p.scale.T, torch.zeros_like(p.scale.T)], -1).bfloat16().contiguous()
    size = packed.numel() * packed.element_size() + 2 * pairs.numel()
    weights = [(packed.clone(), pairs.clone()) for _ in range(copies_for(size, cold))]
    x = p.x.bfloat16()
    call = torch.ops.aten._weight_int4pack_mm_for_cpu

    def run(i: int) -> Tensor:
        c, s = weights[i % len(weights)]
        result: Tensor = call(x, c, GROUP, s)
        return result

    return Contender("torch int4pack bf16", "bf16", size, 4, run)


def onnxruntime(p: Problem, cold: int, threads: int, accuracy: int) -> Contender:
    """MatMulNBits; accuracy level 4 is int8 activations."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    blocks = p.k // GROUP
    codes = p.codes().reshape(p.n, blocks, GROUP // 2).numpy()
    scales = p.scale.numpy().reshape(-1)
    size = codes.size + 4 * scales.size
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=p.k,
        N=p.n,
        bits=4,
        block_size=GROUP,
        accuracy_level=accuracy,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [p.m, p.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [p.m, p.n])],
        [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    blob = model.SerializeToString()
    del onnx
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = [
        ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
        for _ in range(copies_for(size, cold, 16))
    ]
    feed = {"x": p.x.numpy()}

    def run(i: int) -> Tensor:
        return torch.from_numpy(sessions[i % len(sessions)].run(None, feed)[0])

    kind = "int8" if accuracy == 4 else "f32"
    return Contender(f"onnxruntime int4 {kind}", kind, size, 4, run)


def openvino(p: Problem, cold: int, threads: int, int8: bool) -> Contender:
    """Compressed u4 weights; dynamic quantization of activations off or per group."""
    import openvino as ov
    from openvino import opset13 as op

    core = ov.Core()
    codes = p.codes().numpy()
    size = codes.size + 2 * p.scale.numel()
    blocks = p.k // GROUP
    x = p.x.numpy()

    def compile_copy() -> ov.InferRequest:
        data = ov.Tensor(codes.copy().reshape(-1), [p.n, blocks, GROUP], ov.Type.u4)
        weight = op.convert(op.constant(data), ov.Type.f16)
        # The pattern that OpenVINO keeps compressed: zero points are u4 constants, converted too.
        zeros = ov.Tensor(np.full(p.n * blocks // 2, 0x88, np.uint8), [p.n, blocks, 1], ov.Type.u4)
        centred = op.subtract(weight, op.convert(op.constant(zeros), ov.Type.f16))
        scaled = op.multiply(centred, op.constant(p.scale.numpy().astype(np.float16)[..., None]))
        flat = op.reshape(scaled, op.constant(np.array([p.n, p.k])), special_zero=False)
        dense = op.convert(flat, ov.Type.f32)
        data_in = op.parameter([p.m, p.k], ov.Type.f32)
        model = ov.Model([op.matmul(data_in, dense, False, True)], [data_in])
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if int8 else 0,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        return core.compile_model(model, "CPU", config).create_infer_request()

    requests = [compile_copy() for _ in range(copies_for(size, cold, 16))]

    def run(i: int) -> Tensor:
        request = requests[i % len(requests)]
        request.infer([x], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    kind = "int8" if int8 else "f32"
    return Contender(f"OpenVINO int4 {kind}", kind, size, 4, run)


def ggml_q4_0(p: Problem, cold: int, threads: int) -> Contender:
    """ggml's mul_mat on Q4_0 (blocks of 32), int8 activations; the version ggml-python builds."""
    import ggml

    low, high = p.q.reshape(p.n, -1, 2, 16).unbind(2)
    nibbles = (low | (high << 4)).numpy()
    blocks = np.empty((p.n, p.k // 32, 18), np.uint8)
    scale = p.scale.half().repeat_interleave(GROUP // 32, 1).numpy()
    blocks[..., :2] = scale[..., None].view(np.uint8)
    blocks[..., 2:] = nibbles
    size = blocks.size
    graphs = []
    for _ in range(copies_for(size, cold, 64)):
        work = 4 * p.m * (p.k + p.n) + 4 * p.m * p.k + (8 << 20)
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size + work, mem_buffer=None))
        weight = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_Q4_0, p.k, p.n)
        inputs = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, p.k, p.m)
        ctypes.memmove(ggml.ggml_get_data(weight), blocks.ctypes.data, size)
        ctypes.memmove(ggml.ggml_get_data(inputs), p.x.data_ptr(), 4 * p.m * p.k)
        result = ggml.ggml_mul_mat(context, weight, inputs)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, result)
        plan = ggml.ggml_graph_plan(graph, threads, None)
        buffer = (ctypes.c_uint8 * max(1, plan.work_size))()
        plan.work_data = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint8))
        graphs.append((graph, plan, result, buffer))

    def run(i: int) -> Tensor:
        graph, plan, result, _ = graphs[i % len(graphs)]
        ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        data = ctypes.cast(ggml.ggml_get_data(result), ctypes.POINTER(ctypes.c_float))
        return torch.from_numpy(np.ctypeslib.as_array(data, (p.m, p.n)))

    return Contender("ggml Q4_0 int8", "int8", size, 4, run)


def mlx_cpu(p: Problem, cold: int) -> Contender:
    """mlx.core.quantized_matmul on the CPU stream (one thread)."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    words = p.codes().numpy().view(np.uint32)
    size = words.nbytes + 4 * p.scale.numel()
    scale = mx.array(p.scale.numpy())
    bias = mx.array((-8 * p.scale).numpy())
    weights = [mx.array(words) for _ in range(copies_for(size, cold, 4))]
    x = mx.array(p.x.numpy())

    def run(i: int) -> Tensor:
        y = mx.quantized_matmul(
            x, weights[i % len(weights)], scale, bias, True, group_size=GROUP, bits=4
        )
        mx.eval(y)
        return torch.from_numpy(np.array(y))

    return Contender("mlx CPU int4 f32", "f32", size, 4, run)


def contenders(p: Problem, cold: int, threads: int) -> Iterator[Contender | tuple[str, str]]:
    """Every contender that can be built; a ``(name, reason)`` pair for each that cannot."""
    builders: list[tuple[str, str | None, Callable[[], Contender]]] = [
        ("mkrs exact f32", None, lambda: ours(p, cold, torch.float32, "exact")),
        ("mkrs exact bf16", None, lambda: ours(p, cold, torch.bfloat16, "exact")),
        ("mkrs int8", None, lambda: ours(p, cold, torch.float32, "int8")),
    ]
    if p.bits == 4:
        builders += [
            ("torch dense f32", None, lambda: torch_dense(p, cold, torch.float32)),
            ("torch dense bf16", None, lambda: torch_dense(p, cold, torch.bfloat16)),
            ("torch int4pack", None, lambda: torch_int4pack(p, cold)),
            ("onnxruntime f32", "onnxruntime", lambda: onnxruntime(p, cold, threads, 0)),
            ("onnxruntime int8", "onnxruntime", lambda: onnxruntime(p, cold, threads, 4)),
            ("OpenVINO f32", "openvino", lambda: openvino(p, cold, threads, False)),
            ("OpenVINO int8", "openvino", lambda: openvino(p, cold, threads, True)),
            ("ggml Q4_0", "ggml", lambda: ggml_q4_0(p, cold, threads)),
        ]
        if p.m == 1:  # its CPU kernel takes tens of milliseconds per row
            builders.append(("mlx CPU", "mlx", lambda: mlx_cpu(p, cold)))
    for name, module, build in builders:
        if module is not None and importlib.util.find_spec(module) is None:
            yield name, f"{module} is not installed"
            continue
        try:
            yield build()
        except Exception as error:  # a peer that fails is reported, never hidden
            yield name, f"{type(error).__name__}: {error}"


assert ops  # registers torch.ops.mkrs

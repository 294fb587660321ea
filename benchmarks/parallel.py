"""Tensor parallelism on several GPUs of one host, against one GPU.

    torchrun --nproc-per-node 1 -m benchmarks.parallel --checkpoint DIR --reference FILE --out JSON
    torchrun --nproc-per-node 2 -m benchmarks.parallel --checkpoint DIR --reference FILE --out JSON
    python -m benchmarks.parallel --report     # writes the table into docs/performance.md

A llama-shaped model at 7B shapes with 4-bit weights and bfloat16 activations. One rank writes the
checkpoint (random weights, quantized on the device) and keeps its logits as the reference; the runs
on more ranks load the same files, each rank its own parts, and compare. Decoding is timed as one
CUDA graph a step, collectives included, and eagerly; prefill eagerly.

The floor of decoding is reading this rank's weights once; the sums over ranks add two all-reduces
of one row per layer, which cost latency, not bandwidth.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from mergekit_torch import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from mergekit_torch.checkpoint import CheckpointWriter, TensorSpec
from mergekit_torch.checkpoint.info import QuantInfo
from mergekit_torch.nn import QuantizedModule
from mergekit_torch.parallel import load_sharded_, place, tensor_parallel_

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "parallel-h200.json"
PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- parallel:begin -->", "<!-- parallel:end -->"

SIZES = {
    "7b": {"hidden": 4096, "inner": 11008, "heads": 32, "keys": 32, "layers": 32, "vocab": 32000},
    "tiny": {"hidden": 256, "inner": 704, "heads": 4, "keys": 2, "layers": 2, "vocab": 512},
}
GROUP = 64
CONTEXT = 1024
META: dict[str, Any] = {"scale_dtype": torch.bfloat16, "device": "meta"}


class Attention(nn.Module):
    """Grouped-query attention over a cache of fixed size, so that a step can be a CUDA graph."""

    def __init__(self, size: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        hidden, self.head_dim = size["hidden"], size["hidden"] // size["heads"]
        kwargs: dict[str, Any] = {"bias": False, "group_size": GROUP, **META}
        keys = size["keys"] * self.head_dim
        self.q_proj = QuantizedLinear(hidden, hidden, dtype=dtype, **kwargs)
        self.k_proj = QuantizedLinear(hidden, keys, dtype=dtype, **kwargs)
        self.v_proj = QuantizedLinear(hidden, keys, dtype=dtype, **kwargs)
        self.o_proj = QuantizedLinear(hidden, hidden, dtype=dtype, **kwargs)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, at: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        length = x.shape[0]

        def heads(y: Tensor) -> Tensor:
            return y.view(length, -1, self.head_dim).transpose(0, 1)

        q, k = rotate(heads(self.q_proj(x)), turn), rotate(heads(self.k_proj(x)), turn)
        v = heads(self.v_proj(x))
        if self.cache is None:
            empty = torch.zeros(k.shape[0], CONTEXT, self.head_dim, dtype=x.dtype, device=x.device)
            self.cache = (empty, empty.clone())
        for stored, new in zip(self.cache, (k, v), strict=True):
            stored.index_copy_(1, at, new)
        y = nn.functional.scaled_dot_product_attention(
            q[None], self.cache[0][None], self.cache[1][None], attn_mask=mask, enable_gqa=True
        )
        return self.o_proj(y[0].transpose(0, 1).reshape(length, -1))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding; ``turn`` is ``[2, length, head_dim / 2]``, cosine and sine."""
    a, b = x.float().chunk(2, -1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, size: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": False, "group_size": GROUP, **META}
        self.gate_proj = QuantizedLinear(size["hidden"], size["inner"], dtype=dtype, **kwargs)
        self.up_proj = QuantizedLinear(size["hidden"], size["inner"], dtype=dtype, **kwargs)
        self.down_proj = QuantizedLinear(size["inner"], size["hidden"], dtype=dtype, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, size: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size["hidden"], 1e-5, device="meta", dtype=dtype)
        self.self_attn = Attention(size, dtype)
        self.post_attention_layernorm = nn.RMSNorm(size["hidden"], 1e-5, device="meta", dtype=dtype)
        self.mlp = MLP(size, dtype)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), at, mask, turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids ``[length]`` at positions ``at`` to the logits of the last one."""

    def __init__(self, size: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = size["hidden"] // size["heads"]
        self.embed_tokens = QuantizedEmbedding(
            size["vocab"], size["hidden"], group_size=GROUP, dtype=dtype, **META
        )
        self.layers = nn.ModuleList(Layer(size, dtype) for _ in range(size["layers"]))
        self.norm = nn.RMSNorm(size["hidden"], 1e-5, device="meta", dtype=dtype)
        self.lm_head = QuantizedLinear(
            size["hidden"], size["vocab"], False, group_size=GROUP, dtype=dtype, **META
        )

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        frequency = torch.arange(0, self.head_dim, 2, device=ids.device) / self.head_dim
        angle = at[:, None] * 10000.0**-frequency
        turn = torch.stack([angle.cos(), angle.sin()])
        mask = torch.arange(CONTEXT, device=ids.device)[None] <= at[:, None]
        for layer in self.layers:
            x = layer(x, at, mask, turn)
        return self.lm_head(self.norm(x[-1:]))


def write_checkpoint(path: Path, size: dict[str, int], device: torch.device) -> float:
    """Random weights, a tensor at a time; seconds."""
    model = Llama(size, torch.bfloat16)
    tensors: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedModule, nn.RMSNorm)):
            tensors[f"{name}.weight"] = tuple(module.weight.shape)
    specs = {}
    for name, shape in tensors.items():
        info = QuantInfo(4, GROUP, "affine", shape[-1], torch.bfloat16, torch.bfloat16)
        specs[name] = TensorSpec(torch.bfloat16, shape, info if len(shape) == 2 else None)
    generator = torch.Generator(device).manual_seed(0)
    started = time.perf_counter()
    with CheckpointWriter(path, specs) as writer:
        for name, shape in tensors.items():
            if len(shape) == 1:
                writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
                continue
            weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            weight *= shape[-1] ** -0.5
            writer.write(name, QuantizedTensor.from_float(weight, 4, GROUP, "affine").cpu())
    return time.perf_counter() - started


class Timer:
    """Wall time of device work, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, run: Callable[[], Any], repeats: int) -> float:
        """Of ``repeats`` runs, each begun by all ranks together."""
        run()
        times = []
        for _ in range(repeats):
            self.sync()
            dist.barrier()
            started = time.perf_counter()
            run()
            self.sync()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)


def slowest(value: float, device: torch.device) -> float:
    """The largest over ranks."""
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def logits_of(model: Llama, ids: Tensor) -> dict[str, Tensor]:
    """Of the last token of a prompt, and of a decode step after it."""
    positions = torch.arange(len(ids), device=ids.device)
    prefill = model(ids, positions).float().cpu()
    decode = model(ids[-1:], positions[-1:] + 1).float().cpu()
    return {"prefill": prefill, "decode": decode}


def prompt_ids(size: dict[str, int], length: int, device: torch.device) -> Tensor:
    """The same for every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size["vocab"], (length,), generator=generator).to(device)


def measure(model: Llama, ids: Tensor) -> dict[str, float]:
    """Times of the slowest rank."""
    device, prompt = ids.device, len(ids)
    timer = Timer(device)
    positions = torch.arange(prompt, device=device)
    times: dict[str, float] = {}
    times["prefill_ms"] = slowest(timer.median(lambda: model(ids, positions), 5), device)
    token, at = ids[-1:].clone(), torch.tensor([prompt], device=device)
    times["decode_eager_ms"] = slowest(timer.median(lambda: model(token, at), 10), device)
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(token, at)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks about events meanwhile, which concerns this capture only.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            model(token, at)

        def steps() -> None:
            for _ in range(20):
                graph.replay()

        times["decode_graph_ms"] = slowest(timer.median(steps, 7) / 20, device)
    return times


def compare(got: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Relative error of logits, and whether the best token is the same."""
    result: dict[str, Any] = {}
    for name, expected in reference.items():
        mine = got[name].cpu().double()
        error = (mine - expected.double()).norm() / expected.double().norm()
        result[f"{name}_error"] = float(error)
        result[f"{name}_same_token"] = bool(mine.argmax() == expected.argmax())
    return result


def run(args: argparse.Namespace) -> None:
    """One rank of one measurement."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = not args.cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timedelta(seconds=120),
        **({"device_id": device} if cuda else {}),
    )
    size = SIZES[args.size]
    path = args.checkpoint / "model.safetensors"
    result: dict[str, Any] = {"world": world, "size": args.size, **size, "group_size": GROUP}
    if not path.exists():
        if rank == 0:
            args.checkpoint.mkdir(parents=True, exist_ok=True)
            result["write_s"] = write_checkpoint(path, size, device)
        dist.barrier()
    mesh = init_device_mesh(device.type, (world,))
    all_logits: dict[str, Tensor] = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            model = Llama(size, dtype)
            if world > 1:
                tensor_parallel_(model, mesh)
            started = time.perf_counter()
            report = load_sharded_(model, path, device)
            Timer(device).sync()
            load_s = time.perf_counter() - started
            name = str(dtype).removeprefix("torch.")
            # Few tokens: float32 is here to tell sums in another order from mistakes.
            logits = logits_of(model, prompt_ids(size, 32, device))
            all_logits.update({f"{name}_{key}": value for key, value in logits.items()})
            if dtype == torch.bfloat16:
                held = sum(b.nbytes for b in model.buffers())
                held += sum(p.nbytes for p in model.parameters())
                result["load_s"] = slowest(load_s, device)
                result["bytes_read"] = int(slowest(report.bytes_read, device))
                result["bytes_total"] = report.bytes_total
                result["bytes_held"] = int(slowest(held, device))
                result.update(measure(model, prompt_ids(size, args.prompt, device)))
            del model
    if world == 1:
        torch.save(all_logits, args.reference)
    elif rank == 0:
        result.update(compare(all_logits, torch.load(args.reference)))
    if rank == 0:
        result["prompt"] = args.prompt
        result["torch"] = torch.__version__
        result["device"] = torch.cuda.get_device_name(device) if cuda else "cpu"
        save(args.out, result)
    dist.barrier()
    dist.destroy_process_group()


def save(path: Path, result: dict[str, Any]) -> None:
    """Replace the entry of this number of ranks."""
    known = json.loads(path.read_text()) if path.exists() else []
    known = [entry for entry in known if entry["world"] != result["world"]] + [result]
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(result), flush=True)


def run_placed(args: argparse.Namespace) -> None:
    """One process, layers on two GPUs and the last ones on the CPU, against one GPU."""
    size, path = SIZES[args.size], args.checkpoint / "model.safetensors"
    with torch.inference_mode():
        model = Llama(size, torch.float32)
        load_sharded_(model, path, "cpu")
        placed = place(model, ["cuda:0", "cuda:1", "cpu"], ["1800MiB", "1800MiB", "4GiB"])
        got = logits_of(model, prompt_ids(size, 32, torch.device("cpu")))
    expected = {
        key: value for key, value in torch.load(args.reference).items() if key.startswith("float32")
    }
    result = compare({f"float32_{key}": value for key, value in got.items()}, expected)
    result["bytes"] = {str(device): count for device, count in placed.bytes.items()}
    save(args.out, {"world": 0, "placed": result})


def table(results: list[dict[str, Any]]) -> str:
    """The page's section between its markers."""
    placed = [entry["placed"] for entry in results if entry["world"] == 0]
    results = [entry for entry in results if entry["world"] > 0]
    first = results[0]
    lines = [
        "| GPUs | decode, CUDA graph | decode, eager | prefill | bytes read and held per rank | "
        "logits against one GPU, float32 / bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    one = next(entry for entry in results if entry["world"] == 1)
    for entry in sorted(results, key=lambda e: e["world"]):

        def ms(key: str, entry: dict[str, Any] = entry) -> str:
            text = f"{entry[key]:.2f} ms"
            return text if entry is one else f"{text} ({one[key] / entry[key]:.2f}x)"

        error = "-"
        if entry is not one:
            error = f"{entry['float32_decode_error']:.1e} / {entry['bfloat16_decode_error']:.1e}"
        lines.append(
            f"| {entry['world']} | {ms('decode_graph_ms')} | {ms('decode_eager_ms')} | "
            f"{ms('prefill_ms')} | {entry['bytes_read'] / 1e9:.2f} / "
            f"{entry['bytes_held'] / 1e9:.2f} GB | {error} |"
        )
    lines += [
        "",
        f"{first['device']}s of one host, NCCL, torch {first['torch']}; hidden {first['hidden']}, "
        f"intermediate {first['inner']}, {first['heads']} heads, {first['layers']} layers, "
        f"vocabulary {first['vocab']}, 4-bit affine groups of {first['group_size']} with bfloat16 "
        f"scales, random weights ({first['bytes_total'] / 1e9:.2f} GB); bfloat16 activations; "
        f"prompt of {first['prompt']} tokens, decoding at a cache of {CONTEXT}. Errors are "
        "relative, of the logits after a decode step. Command: `torchrun --nproc-per-node N -m "
        "benchmarks.parallel --checkpoint DIR --reference FILE`, N = 1 first.",
    ]
    for entry in placed:
        where = ", ".join(f"{n / 1e9:.2f} GB on {device}" for device, n in entry["bytes"].items())
        lines += [
            "",
            f"`place` with {where} in one process, against one GPU: relative error of the logits "
            f"after a decode step {entry['float32_decode_error']:.1e} (float32). Command: `python "
            "-m benchmarks.parallel --placed --checkpoint DIR --reference FILE`.",
        ]
    return "\n".join(lines)


def report() -> None:
    """Put the table of the committed results into the page."""
    results = json.loads(RESULT.read_text())
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}")


def main() -> int:
    """Measure as one rank of torchrun, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write the table and stop")
    parser.add_argument("--placed", action="store_true", help="measure place() instead")
    parser.add_argument("--checkpoint", type=Path, help="directory, written if it has no model")
    parser.add_argument("--reference", type=Path, help="logits of one rank: written, or compared")
    parser.add_argument("--out", type=Path, default=RESULT, help="results, one entry per world")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--cpu", action="store_true", help="gloo, to try the program")
    args = parser.parse_args()
    if args.report:
        report()
        return 0
    if args.checkpoint is None or args.reference is None:
        parser.error("give --checkpoint and --reference")
    if args.placed:
        run_placed(args)
    elif "RANK" in os.environ:
        run(args)
    else:
        parser.error("start it with torchrun")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from mergekit_torch.parallel.collectives import sum_ranks

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "parallel-h200.json"
PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- parallel:begin -->", "<!-- parallel:end -->"

SIZES = {
    "7b": {"hidden": 4096, "inner": 11008, "heads": 32, "keys": 32, "layers": 32, "vocab": 32000},
    "tiny": {"hidden": 256, "inner": 704, "heads": 4, "keys": 2, "layers": 2, "vocab": 512},
}
GROUP = 64
PROMPTS = (512, 2048)
CONTEXT = 2304
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

    def forward(self, x: Tensor, start: int, turn: Tensor) -> Tensor:
        length = x.shape[0]
        shape = (1, length, -1, self.head_dim)
        q, k = rotate(self.q_proj(x).view(shape), turn), rotate(self.k_proj(x).view(shape), turn)
        v = self.v_proj(x).view(shape)
        if self.cache is None:
            empty = torch.zeros(1, CONTEXT, *k.shape[2:], dtype=x.dtype, device=x.device)
            self.cache = (empty, empty.clone())
        end = start + length
        for stored, new in zip(self.cache, (k, v), strict=True):
            stored[:, start:end] = new
        keys, values = (stored[:, :end].transpose(1, 2) for stored in self.cache)
        y = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            is_causal=length > 1,
            enable_gqa=keys.shape[1] != q.shape[2],
        )
        return self.o_proj(y.transpose(1, 2).reshape(length, -1))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of pairs; ``turn`` is complex ``[length, 1, head_dim / 2]``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


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

    def forward(self, x: Tensor, start: int, turn: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), start, turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids ``[length]`` from position ``start`` on to the logits of the last one."""

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

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x = self.embed_tokens(ids)
        frequency = torch.arange(0, self.head_dim, 2, device=ids.device) / self.head_dim
        at = torch.arange(start, start + len(ids), device=ids.device)
        angle = at[:, None, None] * 10000.0**-frequency
        turn = torch.polar(torch.ones_like(angle), angle)
        for layer in self.layers:
            x = layer(x, start, turn)
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
    prefill = model(ids, 0).float().cpu()
    decode = model(ids[-1:], len(ids)).float().cpu()
    return {"prefill": prefill, "decode": decode}


def prompt_ids(size: dict[str, int], length: int, device: torch.device) -> Tensor:
    """The same for every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size["vocab"], (length,), generator=generator).to(device)


def measure(model: Llama, size: dict[str, int], device: torch.device) -> dict[str, float]:
    """Times in milliseconds, of the slowest rank."""
    timer = Timer(device)
    times: dict[str, float] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        times[f"{name}_eager"] = slowest(timer.median(run, 7), device)
        if device.type == "cuda":
            times[name] = slowest(graph_time(run, timer), device)

    for prompt in PROMPTS:
        ids = prompt_ids(size, prompt, device)
        note(f"prefill_{prompt}", lambda ids=ids: model(ids, 0))  # type: ignore[misc]
    token = prompt_ids(size, 1, device)
    note("decode", lambda: model(token, PROMPTS[0]))
    # Where decoding spends its time.
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    inputs = {
        k: torch.randn(1, k, dtype=torch.bfloat16, device=device)
        for k in {linear.in_features for linear in linears}
    }

    def products() -> None:
        for linear in linears:
            linear._product(inputs[linear.in_features], None)

    note("products", products)
    if dist.get_world_size() > 1:
        world: Any = dist.group.WORLD
        group: str = world.group_name
        row = torch.zeros(1, size["hidden"], dtype=torch.bfloat16, device=device)

        def collectives() -> None:
            for _ in range(2 * size["layers"]):
                sum_ranks(row, group)

        note("collectives", collectives)
    return times


def graph_time(run: Callable[[], Any], timer: Timer) -> float:
    """Milliseconds of ``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks about events meanwhile, which concerns this capture only.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()

    def replays() -> None:
        for _ in range(10):
            graph.replay()

    return timer.median(replays, 7) / 10


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
        device_id=device if cuda else None,
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
                result.update(measure(model, size, device))
            del model
    if world == 1:
        torch.save(all_logits, args.reference)
    elif rank == 0:
        result.update(compare(all_logits, torch.load(args.reference)))
    if rank == 0:
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
    one = next(entry for entry in results if entry["world"] == 1)
    results = sorted(results, key=lambda entry: entry["world"])
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = []

    def milliseconds(key: str, entry: dict[str, Any]) -> str:
        if key not in entry:
            return "-"
        ratio = "" if entry is one or key not in one else f" ({one[key] / entry[key]:.2f}x)"
        return f"{entry[key]:.2f} ms{ratio}"

    for title, key in (
        ("decode, one token", "decode"),
        ("- products with weights alone", "products"),
        ("- sums over ranks alone", "collectives"),
        *[(f"prefill, {n} tokens", f"prefill_{n}") for n in PROMPTS],
        ("decode, eager", "decode_eager"),
        *[(f"prefill, {n} tokens, eager", f"prefill_{n}_eager") for n in PROMPTS],
    ):
        rows.append((title, lambda entry, key=key: milliseconds(key, entry)))  # type: ignore[misc]
    rows.append(("bytes read by each rank", lambda entry: f"{entry['bytes_read'] / 1e9:.2f} GB"))
    rows.append(("bytes held by each rank", lambda entry: f"{entry['bytes_held'] / 1e9:.2f} GB"))
    rows.append(("loading, file in the page cache", lambda entry: f"{entry['load_s']:.2f} s"))
    for title, dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
        rows.append(
            (
                f"logits against one GPU, {title}",
                lambda entry, dtype=dtype: (  # type: ignore[misc]
                    "-" if entry is one else f"{entry[f'{dtype}_decode_error']:.1e}"
                ),
            )
        )
    lines = [
        "| | " + " | ".join(f"{e['world']} GPU{'s' * (e['world'] > 1)}" for e in results) + " |",
        "|---" * (len(results) + 1) + "|",
        *[f"| {title} | " + " | ".join(show(e) for e in results) + " |" for title, show in rows],
        "",
        f"{first['device']}s of one host (NVLink, no multicast), NCCL, torch {first['torch']}; "
        f"hidden {first['hidden']}, intermediate {first['inner']}, {first['heads']} heads, "
        f"{first['layers']} layers, vocabulary {first['vocab']}, 4-bit affine groups of "
        f"{first['group_size']} with bfloat16 scales, random weights "
        f"({first['bytes_total'] / 1e9:.2f} GB), bfloat16 activations, decoding after "
        f"{PROMPTS[0]} tokens. Times are of CUDA graphs, collectives included, unless they say "
        "eager; medians, of the slowest rank. Errors are relative, of the logits after a decode "
        "step. Command: `torchrun --nproc-per-node N -m benchmarks.parallel --checkpoint DIR "
        "--reference FILE`, N = 1 first.",
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

"""A whole language model on 4-bit weights against its dense float32 self, through transformers.

``python -m benchmarks.model --run`` measures SmolLM2-135M-Instruct (GGUF Q4_1 weights) and writes
``benchmarks/results/model.json``; without ``--run`` the table of docs/performance.md is written
again from that file. Models take turns; a prompt is fixed token ids, so no tokenizer is involved.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mergekit_torch import dequantize_
from mergekit_torch.cli.demo_model import smollm2
from mergekit_torch.cli.generation import generate
from mergekit_torch.integrations.transformers import load_native

from . import limits

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/model.json"
PAGE = ROOT / "docs/performance.md"
PROMPT, TOKENS = 512, 64


def native_model(cache: Path) -> Path:
    """The model as native safetensors, fetched and converted where it is not there yet."""
    gguf = smollm2(cache)
    native = cache / f"{gguf.stem}-native"
    if not (native / "tokenizer.json").exists():
        command = [sys.executable, "-m", "mergekit_torch.cli", "convert", str(gguf), str(native)]
        subprocess.run(command, check=True)
    return native


def prefill_seconds(model: Any, ids: torch.Tensor) -> float:
    """One forward pass over the prompt, logits of the last token only."""
    with torch.inference_mode():
        started = time.perf_counter()
        model(ids, logits_to_keep=1, use_cache=True)
        return time.perf_counter() - started


def decode_seconds(model: Any, ids: torch.Tensor, **options: Any) -> float:
    """Seconds a token, of greedy decoding after a short prompt."""
    return 1 / generate(model, ids, TOKENS, min_new_tokens=TOKENS, **options).rate


def kernel_seconds(model: Any, ids: torch.Tensor) -> float:
    """Seconds a decoded token that are spent inside our ops."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        generate(model, ids, TOKENS + 1, min_new_tokens=TOKENS + 1)
    with profile(activities=[ProfilerActivity.CPU]) as prefill:
        generate(model, ids, 1)
    total = 0.0
    for sign, events in ((1, recorded), (-1, prefill)):
        for event in events.key_averages():
            if event.key.startswith("mkrs::"):
                total += sign * event.self_cpu_time_total
    return total / TOKENS / 1e6


def compile_decoding(model: Any) -> None:
    """Forward passes of one token through ``torch.compile``, others as they are."""
    eager = model.forward
    compiled = torch.compile(eager, dynamic=False)

    def forward(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        run = compiled if input_ids.shape[-1] == 1 else eager
        return run(*args, input_ids=input_ids, **kwargs)

    model.forward = forward


def measure(threads: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """All numbers of one run."""
    torch.set_num_threads(threads)
    path = native_model(ROOT / ".cache")
    loads, models = [], {}
    for _ in range(3):
        started = time.perf_counter()
        models["4-bit"] = load_native(path, dtype=torch.float32)
        loads.append(time.perf_counter() - started)
    models["dense float32"] = load_native(path, dtype=torch.float32)
    dequantize_(models["dense float32"])
    random = torch.Generator().manual_seed(1)
    vocabulary = models["4-bit"].config.vocab_size
    ids = torch.randint(0, vocabulary, (1, PROMPT), generator=random)
    short = ids[:, :8]
    result: dict[str, Any] = {"load_seconds": min(loads), "models": {}}
    times: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "decode": []} for n in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name]["prompt"].append(prefill_seconds(model, ids))
            times[name]["decode"].append(decode_seconds(model, short))
    result["kernels_per_token"] = kernel_seconds(models["4-bit"], short)
    if compiled:
        for model in models.values():
            compile_decoding(model)
            decode_seconds(model, short, cache_implementation="static")
        for times_of in times.values():
            times_of["compiled"] = []
        for _ in range(repeats):
            for name, model in models.items():
                seconds = decode_seconds(model, short, cache_implementation="static")
                times[name]["compiled"].append(seconds)
    for name, times_of in times.items():
        result["models"][name] = {
            what: {"min": min(all_), "median": statistics.median(all_)}
            for what, all_ in times_of.items()
        }
    return result


def table(report: dict[str, Any]) -> str:
    """The table in Markdown, with machine and command."""
    quantized, dense = (report["models"][name] for name in ("4-bit", "dense float32"))
    rows = []
    for label, what, count in (
        (f"prompt of {PROMPT} tokens", "prompt", PROMPT),
        ("decode, eager", "decode", 1),
        ("decode, `torch.compile` and a static cache", "compiled", 1),
    ):
        if what not in quantized:
            continue
        ours, theirs = quantized[what], dense[what]
        rows.append(
            f"| {label} | {count / ours['min']:.1f} ({count / ours['median']:.1f}) "
            f"| {count / theirs['min']:.1f} ({count / theirs['median']:.1f}) "
            f"| {theirs['min'] / ours['min']:.2f}x |"
        )
    machine = report["machine"]
    share = report["kernels_per_token"] / quantized["decode"]["min"]
    return "\n".join(
        [
            "| tokens a second, best (median) | GGUF Q4_1 weights | dense float32 | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Loading the 4-bit model into modules takes {report['load_seconds']:.2f} s. Of a "
            f"token decoded in eager mode our ops take {1e3 * report['kernels_per_token']:.1f} ms "
            f"({share:.0%}); the rest is torch's and transformers' own Python and small ops. "
            f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"transformers {machine['transformers']}. Command: `{report['command']}`.",
        ]
    )


def main() -> int:
    """Run if asked to, then write the table."""
    parser = argparse.ArgumentParser(description="Measure a language model and write its table.")
    parser.add_argument("--run", action="store_true", help="measure first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    if args.run:
        import transformers

        report = measure(args.threads, args.repeats, not args.no_compile)
        report["machine"] = {
            "processor": limits.cpu_name(),
            "threads": args.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        report["command"] = " ".join(["python -m benchmarks.model", *sys.argv[1:]])
        RESULT.write_text(json.dumps(report, indent=2) + "\n")
    text = table(json.loads(RESULT.read_text()))
    print(text)
    head, _, rest = PAGE.read_text().partition("<!-- model:begin -->")
    _, _, tail = rest.partition("<!-- model:end -->")
    PAGE.write_text(f"{head}<!-- model:begin -->\n{text}\n<!-- model:end -->{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

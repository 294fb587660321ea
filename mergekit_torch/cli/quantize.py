"""``mkrs quantize``: a float checkpoint to native low-bit weights."""

import argparse
import json
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    Checkpoint,
    QuantInfo,
    TensorInfo,
    TensorSpec,
    open_checkpoint,
)
from ..format import BITS, FLOAT_DTYPES, SCHEMES
from ..ops.quantize import default_scale_dtype
from ..quantize_ import QuantizeConfig
from ..text import size_text, table
from .common import (
    add_command,
    add_rewrite_arguments,
    check_output,
    copy_side_files,
    in_torchrun,
    rewrite,
    rewrite_by_ranks,
)

SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
OVERRIDE_KEYS = {"bits": int, "group_size": int, "scheme": str, "scale_dtype": str}


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "quantize",
        "quantize a float safetensors checkpoint to 8, 4 or 2 bits",
        """
mkrs quantize llama-1b llama-1b-4bit
mkrs quantize model.safetensors model-8bit.safetensors --q-bits 8 --q-group-size 32
mkrs quantize llama-1b out --override '*.down_proj=bits=8' --skip 'lm_head'
mkrs quantize llama-70b out --out-shard-size 5GB --budget 512MiB --resume
torchrun --nproc-per-node 4 -m mergekit_torch.cli quantize llama-70b out
""",
        details=(
            "Every float tensor of two dimensions named *.weight (linear and embedding layers) is\n"
            "rounded to nearest in groups; all others are kept as they are. Globs match the name\n"
            "without .weight. Memory stays within --budget, whatever the size of the checkpoint.\n"
            "Under torchrun every process quantizes its share (the budget is for each)."
        ),
    )
    parser.add_argument("source", type=Path, help="float checkpoint: file, index.json or directory")
    parser.add_argument("target", type=Path, help="directory, or a .safetensors file")
    parser.add_argument("--q-bits", type=int, choices=BITS, default=4, help="bits per code")
    parser.add_argument(
        "--q-group-size",
        type=int,
        default=64,
        metavar="G",
        help="weights per scale: 16 to 256, or -1 for a row",
    )
    parser.add_argument("--scheme", choices=SCHEMES, default="affine", help="how codes are read")
    parser.add_argument(
        "--scale-dtype",
        choices=tuple(SCALE_DTYPES),
        default=None,
        help="dtype of scales (bf16 for bfloat16 weights, else f16)",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="GLOB=KEY=VALUE,...",
        help="other bits, group_size, scheme or scale_dtype for some layers; repeatable",
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="GLOB", help="layers to keep; repeatable"
    )
    add_rewrite_arguments(parser)
    parser.set_defaults(run=run)


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """``"*.down_proj=bits=8,group_size=32"`` as a glob and its changes.

    Raises:
        ValueError: not of that form.
    """
    glob, _, changes = text.partition("=")
    values: dict[str, Any] = {}
    for item in filter(None, changes.split(",")):
        key, _, value = item.partition("=")
        convert = OVERRIDE_KEYS.get(key.strip())
        if convert is None or not value:
            raise ValueError(
                f"--override must be GLOB=KEY=VALUE,... with keys {', '.join(OVERRIDE_KEYS)}, "
                f"got {text!r}"
            )
        try:
            values[key.strip()] = convert(value.strip())
        except ValueError as error:
            raise ValueError(f"--override {text!r}: {key} must be a number") from error
        if key.strip() == "scale_dtype":
            values["scale_dtype"] = SCALE_DTYPES.get(value.strip(), value.strip())
    if not glob or not values:
        raise ValueError(f"--override must be GLOB=KEY=VALUE,..., got {text!r}")
    return glob, values


def config_of(args: argparse.Namespace) -> QuantizeConfig:
    """The arguments as a :class:`QuantizeConfig`, which checks them."""
    return QuantizeConfig(
        bits=args.q_bits,
        group_size=args.q_group_size,
        scheme=args.scheme,
        scale_dtype=SCALE_DTYPES[args.scale_dtype] if args.scale_dtype else None,
        overrides=dict(parse_override(text) for text in args.override),
        skip=tuple(args.skip),
    )


def module_name(name: str) -> str:
    """The module that a tensor named ``<module>.weight`` belongs to."""
    return name.removesuffix(".weight")


def plan(checkpoint: Checkpoint, config: QuantizeConfig) -> dict[str, TensorSpec]:
    """What every tensor becomes, from headers alone.

    Raises:
        ValueError: a glob that matches nothing, nothing to quantize, or a checkpoint that is
            quantized already.
    """
    specs = {}
    candidates = []
    for name in checkpoint:
        info = checkpoint.info(name)
        if info.quantization is not None:
            raise ValueError(
                f"{checkpoint.path}: must be a float checkpoint, and {name!r} is already "
                f"{info.kind}; write it dense first: mkrs dequantize SOURCE TARGET"
            )
        if info.dtype is None:
            checkpoint[name]  # raises, naming the type
            raise AssertionError(f"{name} has no dtype and was read")
        specs[name] = TensorSpec(info.dtype, info.shape)
        if is_candidate(info):
            candidates.append(name)
            if not config.skips(module_name(name)):
                specs[name] = quantized_spec(info, config)
    names = [module_name(name) for name in candidates]
    for glob in (*config.overrides, *config.skip):
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"{checkpoint.path}: no layer matches the glob {glob!r}; "
                "list names with: mkrs inspect"
            )
    if not any(spec.quantization is not None for spec in specs.values()):
        raise ValueError(
            f"{checkpoint.path}: holds no float tensor of two dimensions named *.weight to quantize"
        )
    return specs


def is_candidate(info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a linear or embedding layer."""
    return (
        info.name.endswith(".weight")
        and len(info.shape) == 2
        and info.dtype in FLOAT_DTYPES
        and info.numel > 0
    )


def quantized_spec(info: TensorInfo, config: QuantizeConfig) -> TensorSpec:
    """The spec of one quantized weight."""
    chosen = config.for_module(module_name(info.name))
    in_features = info.shape[-1]
    group_size = in_features if chosen["group_size"] == -1 else chosen["group_size"]
    assert info.dtype is not None
    quantization = QuantInfo(
        bits=chosen["bits"],
        group_size=group_size,
        scheme=chosen["scheme"],
        in_features=in_features,
        scale_dtype=chosen["scale_dtype"] or default_scale_dtype(info.dtype),
        dtype=info.dtype,
    )
    return TensorSpec(info.dtype, info.shape, quantization)


def run(args: argparse.Namespace) -> int:
    """Quantize with a progress bar and print what became of the layers."""
    config = config_of(args)
    check_output(args.target, args.force)
    started = time.perf_counter()
    with open_checkpoint(args.source) as checkpoint:
        specs = plan(checkpoint, config)
        before = checkpoint.nbytes
        after = sum(spec.nbytes for spec in specs.values())
        if in_torchrun():
            if not rewrite_by_ranks(args, checkpoint, specs, "quantizing"):
                return 0  # rank 0 does the rest
        else:
            rewrite(args, checkpoint, specs, "quantizing")
        report = summary(checkpoint, specs)
    if args.target.is_dir():
        copy_side_files(args.source, args.target)
        add_quantization(args.target / "config.json", config)
    seconds = time.perf_counter() - started
    print(report)
    print(
        f"\n{args.target}: {size_text(before)} -> {size_text(after)}, "
        f"{before / after:.2f}x smaller, in {seconds:.2f} s, {before / seconds / 1e9:.2f} GB/s read"
    )
    return 0


def summary(checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> str:
    """A table by format."""
    groups: dict[str, list[tuple[int, int, int]]] = {}
    for name, spec in specs.items():
        q = spec.quantization
        kind = "kept as it is" if q is None else f"{q.bits}-bit {q.scheme} g{q.group_size}"
        info = checkpoint.info(name)
        groups.setdefault(kind, []).append((info.numel, info.nbytes, spec.nbytes))
    rows = []
    for kind, members in groups.items():
        count, before, after = (sum(column) for column in zip(*members, strict=True))
        rows.append(
            (
                kind,
                str(len(members)),
                f"{count / 1e6:.2f} M",
                size_text(before),
                size_text(after),
                f"{8 * after / count:.2f}" if count else "-",
            )
        )
    headers = ("", "tensors", "weights", "before", "after", "bits")
    return table(headers, rows, right=(1, 2, 3, 4, 5))


def add_quantization(config: Path, quantization: QuantizeConfig) -> None:
    """Say in a config.json that the weights beside it are quantized."""
    if not config.exists():
        return
    document = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        document["quantization_config"] = {"quant_method": "mkrs", **quantization.to_dict()}
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

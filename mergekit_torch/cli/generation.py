"""Loading a model and generating from it, with the times that people ask for."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import check_device

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what runs where."""
    parser.add_argument("--device", default="auto", help="auto (MPS, CUDA, CPU), or one of them")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="f32", help="dtype of activations"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (torch's choice)"
    )


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Apply ``--threads`` and resolve ``--device`` and ``--dtype``."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    return check_device(args.device), DTYPES[args.dtype]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model's weights.

    Raises:
        FileNotFoundError: the directory has none.
        ImportError: transformers is not installed.
    """
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{path}: holds no tokenizer (tokenizer.json); for a GGUF model make it with: "
            f"mkrs convert MODEL.gguf {path} --force"
        )
    return AutoTokenizer.from_pretrained(str(path))


def encode(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    """Token ids int64 ``[1, T]``; through the chat template unless ``raw`` or there is none."""
    if raw or getattr(tokenizer, "chat_template", None) is None:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.shape[-1] == 0:
        raise ValueError("the prompt must hold at least one token, got an empty one")
    return torch.as_tensor(ids)


@dataclass
class Generated:
    """What :func:`generate` measured: new token ids, seconds to the first and to the last."""

    tokens: list[int]
    first: float
    total: float

    @property
    def rate(self) -> float:
        """Decoded tokens a second, the first one (prefill) left out."""
        seconds = self.total - self.first
        return (len(self.tokens) - 1) / seconds if seconds > 0 and len(self.tokens) > 1 else 0.0


class _Clock:
    """A transformers streamer that notes when each token arrives."""

    def __init__(self, prompt: int, on_token: Callable[[int], None] | None) -> None:
        self.skip = prompt
        self.on_token = on_token
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten().tolist():
            if self.skip > 0:  # generate() sends the prompt first
                self.skip -= 1
                continue
            self.times.append(time.perf_counter())
            self.tokens.append(int(token))
            if self.on_token is not None:
                self.on_token(int(token))

    def end(self) -> None:
        pass


def generate(
    model: Any,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    on_token: Callable[[int], None] | None = None,
    **options: Any,
) -> Generated:
    """Generate with transformers; greedy at temperature 0.

    Args:
        model: a causal language model in eval mode.
        ids: prompt, int64 ``[1, T]``, on the model's device.
        max_new_tokens: at most so many tokens; generation ends earlier at an end token.
        temperature: 0 for greedy, else sampling.
        on_token: called with each new token.
        options: more for ``model.generate``.
    """
    clock = _Clock(ids.numel(), on_token)
    sampling = (
        {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature == 0
        else {"do_sample": True, "temperature": temperature}
    )
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **{"pad_token_id": model.generation_config.eos_token_id, **sampling, **options},
        )
    if not clock.times:
        raise ValueError(f"max_new_tokens must let at least one token out, got {max_new_tokens}")
    return Generated(clock.tokens, clock.times[0] - started, clock.times[-1] - started)


class TextPrinter:
    """Prints tokens as text as they come, holding back an unfinished character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, token: int) -> None:
        """Take one token."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[self.printed :])
            sys.stdout.flush()
            self.printed = len(text)

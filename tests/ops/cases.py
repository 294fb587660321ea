"""The case list that tests and benchmarks share."""

from dataclasses import dataclass

import torch

BITS = (8, 4, 2)
SCHEMES = ("symmetric", "asymmetric", "affine")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# (N, K): one row, one column, K below, at and beside the group, odd bytes, several tiles.
SHAPES = (
    (1, 16),
    (1, 1),
    (3, 5),
    (7, 64),
    (33, 100),
    (16, 257),
    (40, 576),
    (130, 260),
    (5, 1111),
)
# -1 is one group per row.
GROUPS = (16, 32, 64, 128, 256, -1)
# Rows of input: none, decode, small batches, one more than a tile, prefill.
INPUT_ROWS = (0, 1, 2, 5, 17, 65)


@dataclass(frozen=True)
class Layer:
    """A linear layer to time: out_features N, in_features K."""

    name: str
    out_features: int
    in_features: int


LAYERS = (
    Layer("smollm2 q/o", 576, 576),
    Layer("llama-7b attention", 4096, 4096),
    Layer("llama-7b mlp up", 11008, 4096),
    Layer("llama-7b mlp down", 4096, 11008),
)

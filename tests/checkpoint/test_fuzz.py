"""A bounded run of fuzz_headers.py; run that file for more."""

import random

import pytest
from fuzz_headers import PARSERS, fuzz

from mergekit_torch.checkpoint import CheckpointError, open_checkpoint


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_headers(parser):
    accepted, _ = fuzz(parser, 10_000, seed=1)
    assert accepted > 100  # mutations that are too coarse would test only the first check


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_files(tmp_path, parser):
    """Through the whole of open_checkpoint, with every accepted tensor read."""
    path = tmp_path / f"x.{parser}"
    opened = 0
    for number in range(1000):
        path.write_bytes(PARSERS[parser][0](random.Random(number)))
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError:
            continue
        opened += 1
        for name in checkpoint:
            info = checkpoint.info(name)
            try:
                if info.quantization is not None:
                    checkpoint.components(name)
                else:
                    checkpoint[name].float().sum()
            except NotImplementedError:
                assert info.dtype is None
    assert opened > 20

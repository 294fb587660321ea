"""What quantize_ says it did, on terminals and in notebooks."""

import torch
from torch import nn

from mergekit_torch import QuantizeConfig, quantize_
from mergekit_torch.quantize_ import KeptReport, LayerReport, QuantizeReport


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv1d(8, 8, 1))


def test_repr_is_a_table_that_says_what_stayed_dense():
    report = quantize_(model(), QuantizeConfig(skip=["1"]))
    assert repr(report) == str(report)
    lines = repr(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-2].startswith("1 weights quantized, 4.50 bits per weight; ")
    dense = 64 * 64 + 64
    assert report.dense_fraction == dense / (dense + 64 * 64)
    assert report.dense_bytes == 4 * dense
    assert lines[-1].startswith("2 weights stay dense: 50.4 % of the elements, 16.2 KiB of the ")


def test_nothing_is_said_about_dense_weights_where_there_are_none():
    report = quantize_(nn.Sequential(nn.Linear(64, 64)))
    assert "dense" not in repr(report)
    assert report.dense_fraction == 0.0


def hostile():
    name = "<script>alert(1)</script>\x1b[2J\nforged"
    layer = LayerReport((name,), (64, 64), 4, 64, "affine", torch.float16, 16384, 2304)
    return QuantizeReport((layer,), (KeptReport("k" * 200, (2, 2), 16, "why " * 60),))


def test_names_are_escaped_in_notebooks():
    text = hostile()._repr_html_()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert "\n" not in text
    assert "k" * 200 in text
    assert text.count("<tr>") == 3


def test_names_cannot_break_the_table():
    lines = repr(hostile()).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


def test_an_empty_report():
    assert "0 weights quantized" in repr(QuantizeReport((), ()))

"""Sizes, names and tables for people."""

import pytest

from mergekit_torch.text import printable, shorten, size_text, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("модель 模型", "модель 模型"),
        ("\x1b[2Jx\x07", "\\x1b[2Jx\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u202eevil\u200b\u2028", "\\u202eevil\\u200b\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_names_cannot_steer_a_terminal(text, shown):
    assert printable(text) == shown
    assert table(("name", "n"), [(text, "1")], right=(1,)).splitlines()[2].startswith(shown)


@pytest.mark.parametrize("lengths", [(10, 10), (300, 5), (5, 300), (300, 300), (60, 45), (12, 300)])
def test_tables_fit_whichever_column_is_long(lengths):
    rows = [(*("x" * n for n in lengths), "12.5 MiB"), ("a", "b", "1 B")]
    text = table(("first", "second", "size"), rows, right=(2,))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 4
    assert lines[2].endswith("12.5 MiB")
    assert ("..." in text) == (sum(lengths) > 80)


def test_short_names_are_not_cut_for_a_long_one():
    text = table(("first", "second"), [("x" * 300, "y" * 30), ("short", "z")])
    assert "y" * 30 in text


def test_shorten_keeps_both_ends():
    assert len(shorten("a" * 50 + "z", 20)) == 20
    assert shorten("a" * 50 + "z", 20).endswith("z")


def test_sizes():
    assert [size_text(n) for n in (0, 17, 2048, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "17 B",
        "2.00 KiB",
        "5.00 MiB",
        "3.00 GiB",
    ]

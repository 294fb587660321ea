"""What to split how: plans by module name, and the ready one for llama-style models."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from .partition import Ranges, split_ranges

__all__ = ["Heads", "Split", "WeightShape", "llama_splits", "split_heads"]

Kind = Literal["colwise", "colwise_gather", "rowwise", "vocabulary"]


class Heads(NamedTuple):
    """Attention heads of a model."""

    queries: int
    keys: int
    head_dim: int


class WeightShape(NamedTuple):
    """A weight ``[rows, columns]`` whose columns can be cut at multiples of ``unit``."""

    rows: int
    columns: int
    unit: int = 1


class Split(NamedTuple):
    """How one weight is split over ranks.

    Attributes:
        kind: ``"colwise"``: rows of the weight, each rank has a part of the output;
            ``"colwise_gather"``: the same, and all ranks get the whole output; ``"rowwise"``:
            columns of the weight, results are summed; ``"vocabulary"``: rows of an embedding.
        ranges: ``(start, stop)`` of every rank.
    """

    kind: Kind
    ranges: Ranges

    @property
    def dim(self) -> int:
        """The dimension of the weight that is split."""
        return 1 if self.kind == "rowwise" else 0


_ATTENTION = re.compile(r"(?:(.*)\.)?(q_proj|k_proj|v_proj|o_proj)\.weight", re.DOTALL)
_MLP = re.compile(r"(?:(.*)\.)?(gate_proj|up_proj|down_proj)\.weight", re.DOTALL)
_EMBEDDING = re.compile(r"(?:.*\.)?embed_tokens\.weight", re.DOTALL)
_HEAD = re.compile(r"(?:.*\.)?lm_head\.weight", re.DOTALL)


def split_heads(heads: Heads, world: int, unit: int = 1) -> tuple[Ranges, Ranges]:
    """Query heads and key heads of every rank.

    With at least as many key heads as ranks, every rank gets whole groups of a key head and the
    query heads that use it, as evenly as they divide. With fewer, several ranks share a key head
    (each has a copy of it) and divide its query heads.

    Args:
        heads: of the model.
        world: number of ranks.
        unit: columns of the output projection can be cut at multiples of this.

    Returns:
        Ranges of query heads, ranges of key heads.

    Raises:
        ValueError: more ranks than can have a query head of their own, within ``unit``.
    """
    queries, keys, head_dim = heads
    if keys < 1 or queries % keys or head_dim < 1:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads}")
    group = queries // keys
    # So many key heads have to stay together for a cut that is aligned.
    together = unit // math.gcd(unit, group * head_dim)
    if -(-keys // together) >= world:
        key_ranges = split_ranges(keys, world, together)
        return tuple((a * group, b * group) for a, b in key_ranges), key_ranges
    step = unit // math.gcd(unit, head_dim)
    shares = split_ranges(world, keys) if keys <= world else ()
    pieces = -(-group // step)
    if together > 1 or not shares or pieces < max(b - a for a, b in shares):
        most = keys * pieces if together == 1 else -(-keys // together)
        raise ValueError(
            f"attention with {queries} query heads, {keys} key heads and head_dim {head_dim} "
            f"cannot be split over {world} ranks: cuts of the output projection must be multiples "
            f"of {unit} columns, so at most {most} ranks are possible; use fewer, or leave the "
            "attention out with a plan of your own"
        )
    query_ranges: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    for key, (first, last) in enumerate(shares):
        for start, stop in split_ranges(group, last - first, step):
            query_ranges.append((key * group + start, key * group + stop))
            shared.append((key, key + 1))
    return tuple(query_ranges), tuple(shared)


def llama_splits(
    shapes: Mapping[str, WeightShape], heads: Heads | Mapping[str, Heads], world: int
) -> dict[str, Split]:
    """The splits of a llama-style model's weights by name; what has none is on every rank.

    ``q_proj``, ``k_proj``, ``v_proj`` by heads and ``o_proj`` by their columns; ``gate_proj`` and
    ``up_proj`` by rows and ``down_proj`` by the same columns; ``embed_tokens`` and ``lm_head`` by
    vocabulary.

    Args:
        shapes: of all weights, by their names in the checkpoint.
        heads: of all attentions, or by prefix (the part of the name before ``.q_proj.weight``).
        world: number of ranks.

    Raises:
        ValueError: no attention in ``shapes``, one that is not of this style, or a model that
            cannot be split over this many ranks; names what can.
    """
    attentions = _by_prefix(shapes, _ATTENTION)
    mlps = _by_prefix(shapes, _MLP)
    complete = {prefix: parts for prefix, parts in attentions.items() if len(parts) == 4}
    if not complete:
        raise ValueError(
            "a llama-style model must have q_proj, k_proj, v_proj and o_proj, and none was found; "
            "give a plan: {module name or glob: 'colwise' or 'rowwise'}"
        )
    splits: dict[str, Split] = {}
    for prefix, parts in complete.items():
        own = heads if isinstance(heads, Heads) else heads[prefix]
        where = f"{prefix}." if prefix else ""
        expected = (own.queries * own.head_dim, *[own.keys * own.head_dim] * 2)
        found = tuple(parts[name].rows for name in ("q_proj", "k_proj", "v_proj"))
        if found != expected or parts["o_proj"].columns != own.queries * own.head_dim:
            raise ValueError(
                f"{where}q_proj, k_proj and v_proj must have {expected} rows for {own}, got {found}"
            )
        try:
            queries, keys = split_heads(own, world, parts["o_proj"].unit)
        except ValueError as error:
            raise ValueError(f"{where}o_proj: {error}") from error
        size = own.head_dim
        by_query = tuple((a * size, b * size) for a, b in queries)
        by_key = tuple((a * size, b * size) for a, b in keys)
        splits[f"{where}q_proj.weight"] = Split("colwise", by_query)
        splits[f"{where}k_proj.weight"] = Split("colwise", by_key)
        splits[f"{where}v_proj.weight"] = Split("colwise", by_key)
        splits[f"{where}o_proj.weight"] = Split("rowwise", by_query)
    for prefix, parts in mlps.items():
        down = parts.get("down_proj")
        if down is None or "up_proj" not in parts:
            continue
        where = f"{prefix}." if prefix else ""
        ranges = split_ranges(down.columns, world, down.unit, f"{where}down_proj: in_features")
        for name in parts:
            kind: Kind = "rowwise" if name == "down_proj" else "colwise"
            if name != "down_proj" and parts[name].rows != down.columns:
                raise ValueError(
                    f"{where}{name} must have {down.columns} rows like down_proj has columns, "
                    f"got {parts[name].rows}"
                )
            splits[f"{where}{name}.weight"] = Split(kind, ranges)
    for name, shape in shapes.items():
        if _EMBEDDING.fullmatch(name):
            splits[name] = Split("vocabulary", split_ranges(shape.rows, world, 1, f"{name}: rows"))
        elif _HEAD.fullmatch(name):
            ranges = split_ranges(shape.rows, world, 1, f"{name}: rows")
            splits[name] = Split("colwise_gather", ranges)
    return splits


def _by_prefix(
    shapes: Mapping[str, WeightShape], pattern: re.Pattern[str]
) -> dict[str, dict[str, WeightShape]]:
    found: dict[str, dict[str, WeightShape]] = {}
    for name, shape in shapes.items():
        match = pattern.fullmatch(name)
        if match is not None:
            found.setdefault(match[1] or "", {})[match[2]] = shape
    return found

"""``QuantizeConfig``: which layers of a model are quantized, and how."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from .format import SCALE_DTYPES, QuantFormat, Scheme
from .ops.dequant_matmul import COMPUTE_MODES, Compute

CONFIG_VERSION = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
_FORMAT_KEYS = ("bits", "group_size", "scheme", "scale_dtype", "compute")


@dataclass(frozen=True)
class QuantizeConfig:
    """What :func:`quantize_` does to which layers.

    Args:
        version: of this config's meaning; 1.
        bits: 8, 4 or 2.
        group_size: 16, 32, 64, 128 or 256; -1 for one group per row.
        scheme: ``"symmetric"``, ``"asymmetric"`` or ``"affine"``.
        scale_dtype: dtype of scale and offset (or its name); by default bfloat16 for bfloat16
            weights and float16 otherwise.
        compute: ``"exact"`` or ``"int8"``, for linear layers.
        overrides: module-name glob -> the fields above that differ for those modules. Globs are
            those of :mod:`fnmatch` (``*`` crosses dots); of several that match, later ones win.
        skip: module-name globs that stay as they are.
        linear: whether ``nn.Linear`` layers are quantized.
        embedding: whether ``nn.Embedding`` layers are quantized.

    Raises:
        TypeError, ValueError: a field or an override that is not offered; the message names it.
    """

    version: int = CONFIG_VERSION
    bits: int = 4
    group_size: int = 64
    scheme: Scheme = "affine"
    scale_dtype: torch.dtype | None = None
    compute: Compute = "exact"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    linear: bool = True
    embedding: bool = True

    def __post_init__(self) -> None:
        if self.version != CONFIG_VERSION:
            raise ValueError(
                f"QuantizeConfig version must be {CONFIG_VERSION}, got {self.version!r}; "
                "a newer mergekit_torch may know it"
            )
        if isinstance(self.skip, str):
            raise TypeError(f"skip must be a sequence of globs, got the string {self.skip!r}")
        object.__setattr__(self, "skip", tuple(self.skip))
        own = _checked_format({name: getattr(self, name) for name in _FORMAT_KEYS}, "config")
        for name, value in own.items():
            object.__setattr__(self, name, value)
        checked = {}
        for pattern, changes in self.overrides.items():
            unknown = sorted(set(changes) - set(_FORMAT_KEYS))
            if unknown:
                raise ValueError(
                    f"override {pattern!r}: keys must be among {', '.join(_FORMAT_KEYS)}, "
                    f"got {', '.join(unknown)}"
                )
            merged = _checked_format({**own, **changes}, f"override {pattern!r}")
            checked[pattern] = {name: merged[name] for name in changes}
        object.__setattr__(self, "overrides", checked)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types; dtypes by name."""

        def plain(value: Any) -> Any:
            return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

        result = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        result["overrides"] = {
            pattern: {name: plain(value) for name, value in changes.items()}
            for pattern, changes in self.overrides.items()
        }
        result["skip"] = list(self.skip)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizeConfig":
        """The config of :meth:`to_dict`.

        Raises:
            ValueError: a newer version, or a key that this version does not know, by name.
        """
        version = values.get("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(
                f"QuantizeConfig version must be {CONFIG_VERSION}, got {version!r}; "
                "a newer mergekit_torch may know it"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"QuantizeConfig: keys must be among {', '.join(known)}, got {', '.join(unknown)}"
            )
        return cls(**values)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "QuantizeConfig":
        """The config of :meth:`to_json`.

        Raises:
            ValueError: text that is not a JSON object, or what :meth:`from_dict` refuses.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"QuantizeConfig: JSON must be an object, got {type(values).__name__}")
        return cls.from_dict(values)

    def for_module(self, name: str) -> dict[str, Any]:
        """The format fields that hold for the module ``name``."""
        chosen = {key: getattr(self, key) for key in _FORMAT_KEYS}
        for pattern, changes in self.overrides.items():
            if fnmatchcase(name, pattern):
                chosen.update(changes)
        return chosen

    def skips(self, name: str) -> bool:
        """Whether the module ``name`` stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


def _checked_format(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``values`` with dtypes resolved from names; ValueError or TypeError names ``where``."""
    try:
        QuantFormat(values["bits"], values["group_size"], values["scheme"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    dtype = values["scale_dtype"]
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{where}: scale_dtype must be float32, float16 or bfloat16, got {dtype!r}"
        )
    if values["compute"] not in COMPUTE_MODES:
        raise ValueError(f"{where}: compute must be 'exact' or 'int8', got {values['compute']!r}")
    return {**values, "scale_dtype": dtype}

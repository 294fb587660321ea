"""Quantized weights in safetensors files: folding, slices, and inconsistent metadata."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from files import random_components
from safetensors.torch import load_file, save_file

from mergekit_torch.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    QuantInfo,
    TensorSpec,
    open_checkpoint,
)
from mergekit_torch.checkpoint.gguf_header import GGML_TYPES
from mergekit_torch.checkpoint.native import native_metadata

AFFINE = QuantInfo(4, 32, "affine", 70, torch.float16, torch.float32)
INFOS = [
    AFFINE,
    QuantInfo(8, 16, "symmetric", 33, torch.bfloat16, torch.bfloat16),
    QuantInfo(2, 64, "asymmetric", 64, torch.float32, torch.float16),
    QuantInfo(4, 1000, "asymmetric", 70, torch.float16, torch.float32),
]


class Double:
    """Stands in for QuantizedTensor: keeps what it was made from."""

    def __init__(self, codes, scale, zero_point=None, offset=None, **parameters):
        self.codes, self.scale = codes, scale
        self.zero_point, self.offset = zero_point, offset
        self.__dict__.update(parameters)
        self.index = None

    @property
    def scheme(self):
        if self.zero_point is not None:
            return "asymmetric"
        return "symmetric" if self.offset is None else "affine"

    def __getitem__(self, index):
        self.index = index
        return self


@pytest.fixture
def double(monkeypatch):
    module = types.ModuleType("mergekit_torch.tensor")
    module.QuantizedTensor = Double
    monkeypatch.setitem(sys.modules, "mergekit_torch.tensor", module)


def stored(weights, seed=0):
    """Plain tensors and metadata for name -> (QuantInfo, shape)."""
    tensors = {}
    for number, (name, (info, shape)) in enumerate(weights.items()):
        for part, tensor in random_components(shape, info, seed + number).items():
            tensors[f"{name}_{part}"] = tensor
    return tensors, native_metadata({name: info for name, (info, _) in weights.items()})


@pytest.mark.parametrize("info", INFOS, ids=lambda info: f"{info.bits}-{info.scheme}")
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,)])
def test_round_trip(tmp_path, double, info, leading):
    shape = (*leading, info.in_features)
    parts = random_components(shape, info)
    specs = {"w": TensorSpec(info.dtype, shape, info), "b": torch.ones(3)}
    with CheckpointWriter(tmp_path / "x.safetensors", specs) as writer:
        writer.write("w", parts)
        writer.write("b", torch.ones(3))
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert set(checkpoint) == {"w", "b"}
    found, quantization = checkpoint.components("w")
    assert quantization == info
    assert found.keys() == parts.keys()
    for part, tensor in parts.items():
        assert torch.equal(found[part], tensor)
        assert found[part].dtype == tensor.dtype
    about = checkpoint.info("w")
    assert about.kind == "quantized"
    assert about.shape == shape
    assert about.dtype == info.dtype
    assert about.nbytes == sum(t.numel() * t.dtype.itemsize for t in parts.values())
    assert [part.name for part in about.parts] == [f"w_{part}" for part in parts]
    assert about.offset == about.parts[0].offset
    weight = checkpoint["w"]
    assert weight.scheme == info.scheme
    assert (weight.bits, weight.group_size) == (info.bits, info.group_size)
    assert (weight.in_features, weight.dtype) == (info.in_features, info.dtype)
    if found["codes"].numel():
        assert weight.codes.data_ptr() == found["codes"].data_ptr()
    # The library sees plain tensors.
    library = load_file(tmp_path / "x.safetensors")
    assert library.keys() == {"b", *(f"w_{part}" for part in parts)}
    assert all(torch.equal(library[f"w_{part}"], tensor) for part, tensor in parts.items())
    assert dict(checkpoint.stored_items()).keys() == library.keys()


def test_dtype_of_the_caller(tmp_path, double):
    tensors, metadata = stored({"w": (AFFINE, (3, 70))})
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert checkpoint.info("w").dtype == torch.bfloat16
    assert checkpoint["w"].dtype == torch.bfloat16


def test_dtype_is_optional_in_the_file(tmp_path):
    tensors, metadata = stored({"w": (replace(AFFINE, dtype=torch.float16), (3, 70))})
    entries = json.loads(metadata["mkrs.quantized"])
    assert entries["w"].pop("dtype") == "float16"
    metadata["mkrs.quantized"] = json.dumps(entries)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert open_checkpoint(tmp_path / "x.safetensors").info("w").dtype == torch.float32


def test_slices_go_through_the_tensor(tmp_path, double):
    tensors, metadata = stored({"w": (AFFINE, (3, 70))})
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    part = open_checkpoint(tmp_path / "x.safetensors").get_slice("w")
    assert part.shape == (3, 70)
    assert part[1:2].index == (slice(1, 2), slice(None))
    assert part[..., :32].index == (slice(None), slice(None, 32))


def test_slices_with_the_real_tensor(tmp_path):
    tensor = pytest.importorskip("mergekit_torch.tensor")
    info = QuantInfo(4, 32, "affine", 96)
    tensors, metadata = stored({"w": (info, (6, 96))})
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    weight = checkpoint["w"]
    assert isinstance(weight, tensor.QuantizedTensor)
    dense = weight.dequantize()
    for index in [slice(1, 4), (slice(None), slice(32, 64)), (slice(2, 3), slice(64, 96)), ...]:
        assert torch.equal(checkpoint.get_slice("w")[index].dequantize(), dense[index])


@pytest.mark.parametrize("ggml_type", [2, 3, 8, 10, 12, 14], ids=lambda n: GGML_TYPES[n][0])
def test_gguf_slices(tmp_path, double, ggml_type):
    from files import gguf_bytes, write
    from test_gguf_unpack import random_blocks

    _, block, _ = GGML_TYPES[ggml_type]
    k = 3 * block
    blocks = random_blocks(ggml_type, 6, k, seed=4)
    data = gguf_bytes(tensors=[("w", [k, 3, 2], ggml_type, blocks.numpy().tobytes())])
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", data))
    parts, info = checkpoint.components("w")
    part = checkpoint.get_slice("w")

    rows = part[1:2]
    assert rows.index is None  # nothing left to cut
    assert rows.codes.shape == (1, 3, parts["codes"].shape[-1])
    assert torch.equal(rows.codes, parts["codes"][1:2])
    assert torch.equal(rows.scale, parts["scale"][1:2])

    columns = part[..., block : 2 * block]
    per_block = block * info.bits // 8
    assert columns.in_features == block
    assert columns.index is None
    assert torch.equal(columns.codes, parts["codes"][..., per_block : 2 * per_block])

    inside = part[0, 2, block : block + info.group_size]
    assert inside.codes.shape == (1, 3, per_block)
    assert inside.index == (
        0,
        2,
        slice(None) if block == info.group_size else slice(0, info.group_size, 1),
    )
    assert part[...].index is None


# What must be refused.


def open_changed(tmp_path, change, weights=None):
    tensors, metadata = stored(weights or {"w": (AFFINE, (3, 70))})
    entries = json.loads(metadata["mkrs.quantized"])
    tensors = change(tensors, entries, metadata) or tensors
    if "mkrs.quantized" in metadata and not metadata.get("raw"):
        metadata["mkrs.quantized"] = json.dumps(entries)
    metadata.pop("raw", None)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    return open_checkpoint(tmp_path / "x.safetensors")


def setting(key, value):
    def change(tensors, entries, metadata):
        entries["w"][key] = value

    return change


def metadata_key(key, value):
    def change(tensors, entries, metadata):
        metadata[key] = value
        metadata["raw"] = "1"

    return change


def tensor_key(key, value):
    def change(tensors, entries, metadata):
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata_key("mkrs.format_version", "2"), "format version 2.*up to version 1; upgrade"),
        (metadata_key("mkrs.format_version", "0"), "must be a version number, got '0'"),
        (metadata_key("mkrs.format_version", "one"), "must be a version number, got 'one'"),
        (metadata_key("mkrs.format_version", "-1"), "must be a version number"),
        (metadata_key("mkrs.format_version", "9" * 5000), "must be a version number"),
        (metadata_key("mkrs.quantized", "x"), "does not parse"),
        (metadata_key("mkrs.quantized", "[]"), "must be a JSON object, got list"),
        (metadata_key("mkrs.quantized", '{"w": 1}'), "must be described by"),
        (metadata_key("mkrs.quantized", '{"w": {"bits": 4}}'), "lacks group_size, in_features"),
        (metadata_key("mkrs.quantized", '{"w": {}, "w": {}}'), "the name 'w' appears twice"),
        (lambda t, e, m: m.pop("mkrs.format_version") and None, r"must have mkrs\.format_version"),
        (setting("bits", 3), "bits must be 8, 4 or 2, got 3"),
        (setting("bits", True), "bits must be"),
        (setting("bits", 8), r"w_codes must have shape \[3, 70\], got \[3, 35\]"),
        (setting("group_size", 0), "group_size must be one of"),
        (setting("group_size", -1), "group_size must be one of"),
        (setting("group_size", 48), r"at least in_features \(70\), got 48"),
        (setting("group_size", 2**70), "group_size must be one of"),
        (setting("group_size", 16), r"w_scale must have shape \[3, 5\], got \[3, 3\]"),
        (setting("scheme", "nf4"), "scheme must be symmetric, asymmetric or affine, got 'nf4'"),
        (setting("scheme", ["affine"]), "scheme must be"),
        (setting("scheme", "asymmetric"), "its component 'w_zero_point' is not in the file"),
        (setting("scheme", "symmetric"), "symmetric has no offset, and the file holds w_offset"),
        (setting("in_features", 72), r"w_codes must have shape \[3, 36\]"),
        (setting("in_features", -70), "in_features must be a number from 0"),
        (setting("in_features", 2**62), "in_features must be a number from 0"),
        (setting("in_features", 70.0), "in_features must be a number from 0"),
        (setting("dtype", "int8"), "dtype must be float32, float16 or bfloat16, got 'int8'"),
        (tensor_key("w_codes", None), "component 'w_codes' is not in the file"),
        (tensor_key("w_scale", None), "component 'w_scale' is not in the file"),
        (tensor_key("w_offset", None), "component 'w_offset' is not in the file"),
        (tensor_key("w_codes", torch.zeros(35, dtype=torch.uint8)), "at least 2 dimensions"),
        (
            tensor_key("w_codes", torch.zeros(3, 35, dtype=torch.int8)),
            "must be torch.uint8, got I8",
        ),
        (tensor_key("w_scale", torch.zeros(3, 3).double()), "must be F16, BF16 or F32, got F64"),
        (tensor_key("w_scale", torch.zeros(3, 3)), "w_offset must be torch.float32, got F16"),
        (tensor_key("w_offset", torch.zeros(2, 3).half()), r"w_offset must have shape \[3, 3\]"),
        (tensor_key("w", torch.zeros(3)), "stored both quantized and plain"),
    ],
)
def test_inconsistent_metadata(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_changed(tmp_path, change)
    assert "x.safetensors" in str(caught.value)


def test_components_without_metadata_are_plain_tensors(tmp_path):
    tensors, _ = stored({"w": (AFFINE, (3, 70))})
    save_file(tensors, tmp_path / "x.safetensors")
    assert set(open_checkpoint(tmp_path / "x.safetensors")) == set(tensors)


def test_unknown_keys_are_ignored(tmp_path):
    assert "w" in open_changed(tmp_path, setting("note", [1, 2]))

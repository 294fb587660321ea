"""The mkrs command: what it prints, writes and refuses, and its exit codes."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize as gguf_quantize
from safetensors.torch import load_file, save_file

from mergekit_torch import __version__, ops
from mergekit_torch.checkpoint import open_checkpoint
from mergekit_torch.cli.common import progress_bar
from mergekit_torch.cli.main import COMMANDS, main, parser


@pytest.fixture
def float_model(tmp_path):
    """A directory with weights, a configuration and a tokenizer's file."""
    folder = tmp_path / "float"
    folder.mkdir()
    torch.manual_seed(1)
    tensors = {
        "embed.weight": torch.randn(50, 96),
        "layers.0.up.weight": torch.randn(40, 96),
        "layers.0.down.weight": torch.randn(96, 40).bfloat16(),
        "layers.0.norm.weight": torch.ones(96),
        "layers.0.up.bias": torch.zeros(40),
        "conv.weight": torch.randn(4, 3, 3),
        "ids": torch.arange(6),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder, tensors


@pytest.fixture
def gguf_file(tmp_path):
    """Two quantized matrices and a vector, named by no architecture."""
    path = tmp_path / "toy.gguf"
    writer = GGUFWriter(path, "toy")
    rng = np.random.default_rng(0)
    dense = {}
    for name, kind in (("a", GGMLQuantizationType.Q4_1), ("b", GGMLQuantizationType.Q8_0)):
        values = rng.standard_normal((8, 64)).astype(np.float32)
        blocks = gguf_quantize(values, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        dense[name] = blocks
    writer.add_tensor("norm", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mkrs(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, match, *arguments):
    code, _, err = mkrs(capsys, *arguments)
    assert code == 1
    assert err.startswith(f"mkrs {arguments[0]}: ")
    assert match in err
    assert "Traceback" not in err
    return err


def test_quantize_and_dequantize(capsys, float_model, tmp_path):
    source, tensors = float_model
    target = tmp_path / "q"
    code, out, _ = mkrs(capsys, "quantize", source, target, "--q-group-size", 32)
    assert code == 0
    assert "4-bit affine g32" in out
    assert "kept as it is" in out
    with open_checkpoint(target) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            stored = checkpoint[name]
            if not (name.endswith(".weight") and tensor.dim() == 2):
                assert torch.equal(stored, tensor)
                continue
            codes, scale, offset = ops.quantize(tensor, 4, 32, "affine")
            assert torch.equal(stored.codes, codes)
            assert torch.equal(stored.scale, scale)
            assert torch.equal(stored.offset, offset)
            assert stored.dtype == tensor.dtype
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "toy"
    assert config["quantization_config"]["quant_method"] == "mkrs"
    assert (target / "vocab.txt").read_text() == "a\nb\n"

    back = tmp_path / "back"
    assert mkrs(capsys, "dequantize", target, back, "--dtype", "f16")[0] == 0
    dense = load_file(back / "model.safetensors")
    with open_checkpoint(target, dtype=torch.float16) as checkpoint:
        assert torch.equal(dense["embed.weight"], checkpoint["embed.weight"].dequantize())
    assert dense["layers.0.norm.weight"].dtype == torch.float32  # never was quantized
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


def test_quantize_options(capsys, float_model, tmp_path):
    source, _ = float_model
    target = tmp_path / "q"
    code, _, _ = mkrs(
        capsys,
        *("quantize", source, target, "--q-bits", 2, "--scheme", "symmetric"),
        *("--scale-dtype", "f32", "--q-group-size", -1, "--skip", "embed"),
        *("--override", "*.down=bits=8,group_size=16,scheme=asymmetric,scale_dtype=bf16"),
        *("--out-shard-size", "4KB"),
    )
    assert code == 0
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.info("embed.weight").quantization is None
        up = checkpoint.info("layers.0.up.weight").quantization
        assert (up.bits, up.group_size, up.scheme, up.scale_dtype) == (
            *(2, 96, "symmetric"),
            torch.float32,
        )
        down = checkpoint.info("layers.0.down.weight").quantization
        assert (down.bits, down.group_size, down.scheme, down.scale_dtype) == (
            *(8, 16, "asymmetric"),
            torch.bfloat16,
        )


def test_one_file_to_one_file(capsys, float_model, tmp_path):
    source, _ = float_model
    target = tmp_path / "out.safetensors"
    assert mkrs(capsys, "quantize", source / "model.safetensors", target)[0] == 0
    assert target.is_file()
    refused(capsys, "give --force", "quantize", source / "model.safetensors", target)
    assert mkrs(capsys, "quantize", source, target, "--force", "--q-bits", 8)[0] == 0
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.info("embed.weight").quantization.bits == 8


def test_quantize_refuses(capsys, float_model, tmp_path):
    source, tensors = float_model
    target = tmp_path / "q"
    call = ("quantize", source, target)
    refused(capsys, "no layer matches the glob '*.q_proj'", *call, "--skip", "*.q_proj")
    refused(capsys, "no layer matches the glob 'x'", *call, "--override", "x=bits=8")
    refused(capsys, "--override must be GLOB=KEY=VALUE", *call, "--override", "embed")
    refused(capsys, "--override must be GLOB=KEY=VALUE", *call, "--override", "embed=width=3")
    refused(capsys, "bits must be a number", *call, "--override", "embed=bits=x")
    refused(capsys, "bits must be 8, 4 or 2, got 3", *call, "--override", "embed=bits=3")
    refused(capsys, "group_size must be", *call, "--q-group-size", 7)
    refused(capsys, "no such file or directory", "quantize", tmp_path / "none", target)
    assert not target.exists()
    bad = {**tensors, "layers.0.up.weight": torch.full((4, 32), float("nan"))}
    save_file(bad, source / "model.safetensors")
    message = refused(capsys, "tensor 'layers.0.up.weight'", *call)
    assert "finite" in message
    assert not target.exists()
    save_file({"norm": torch.ones(3)}, source / "model.safetensors")
    refused(capsys, "holds no float tensor of two dimensions", *call)


def test_budget_and_resume(capsys, float_model, tmp_path):
    """Any budget gives the same bytes; resuming what never started starts it."""
    source, _ = float_model
    assert mkrs(capsys, "quantize", source, tmp_path / "a")[0] == 0
    options = ("--budget", "64KiB", "--resume")
    assert mkrs(capsys, "quantize", source, tmp_path / "b", *options)[0] == 0
    one, other = (tmp_path / name / "model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    refused(capsys, "budget", "quantize", source, tmp_path / "c", "--budget", "16B")
    refused(capsys, "size must be", "quantize", source, tmp_path / "c", "--budget", "lots")
    assert not (tmp_path / "c").exists()


def test_convert(capsys, gguf_file, tmp_path):
    target = tmp_path / "native.safetensors"
    code, out, _ = mkrs(capsys, "convert", gguf_file, target, "--names", "gguf")
    assert code == 0
    assert "GB/s" in out
    with open_checkpoint(gguf_file) as source, open_checkpoint(target) as native:
        for name in source:
            pair = (source[name], native[name])
            dense = [t.dequantize() if hasattr(t, "codes") else t for t in pair]
            assert torch.equal(*dense)
    refused(capsys, "already holds a checkpoint", "convert", gguf_file, target, "--names", "gguf")
    refused(capsys, "toy", "convert", gguf_file, tmp_path / "hf")  # no Hugging Face names for it
    assert not (tmp_path / "hf").exists()
    refused(capsys, "already", "quantize", gguf_file, tmp_path / "q")


def test_inspect(capsys, gguf_file, float_model, tmp_path):
    code, out, _ = mkrs(capsys, "inspect", gguf_file)
    assert code == 0
    assert "3 tensors" in out
    assert "Q4_1" in out
    assert "8x64" in out
    assert "general.architecture  toy" in out
    document = json.loads(mkrs(capsys, "inspect", gguf_file, "--json", "--tensors", "a")[1])
    assert document["format"] == "gguf"
    assert [tensor["name"] for tensor in document["tensors"]] == ["a"]
    assert document["tensors"][0]["bits_per_weight"] == 5.0
    source, _ = float_model
    mkrs(capsys, "quantize", source, tmp_path / "q")
    document = json.loads(mkrs(capsys, "inspect", tmp_path / "q", "--json")[1])
    by_name = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert by_name["embed.weight"]["quantization"] == {
        "bits": 4,
        "group_size": 64,
        "scheme": "affine",
        "in_features": 96,
        "scale_dtype": "float16",
    }
    assert "tensor  " not in mkrs(capsys, "inspect", source, "--summary")[1]
    refused(capsys, "no tensor name matches", "inspect", source, "--tensors", "zzz")


def test_tables_fit_a_terminal(capsys, tmp_path):
    name = "a.very." + "long." * 40 + "name.weight"
    save_file({name: torch.randn(64, 64)}, tmp_path / "m.safetensors")
    for command in (
        ("inspect", tmp_path / "m.safetensors"),
        ("quantize", tmp_path / "m.safetensors", tmp_path / "q.safetensors"),
        ("inspect", tmp_path / "q.safetensors"),
    ):
        code, out, _ = mkrs(capsys, *command)
        assert code == 0
        folder = len(str(tmp_path))
        assert all(len(line) <= 100 + folder for line in out.splitlines())
        assert "..." in out or command[0] == "quantize"


def test_malformed_files_are_user_errors(capsys, tmp_path):
    for content in (b"", b"GGUF", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0not json"):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        refused(capsys, "bad.safetensors", "inspect", path)


def test_generate_refuses(capsys, float_model, gguf_file):
    source, _ = float_model
    refused(capsys, "convert it first", "generate", gguf_file, "hello")
    refused(capsys, "must be at least 1", "generate", source, "hello", "--max-new-tokens", 0)
    refused(capsys, "must not be negative", "generate", source, "hello", "--temperature", -1)
    refused(capsys, "device must be", "generate", source, "hello", "--device", "tpu")
    refused(capsys, "--threads", "generate", source, "hello", "--threads", 0)
    if not torch.cuda.is_available():
        refused(capsys, "torch finds none here", "generate", source, "hi", "--device", "cuda")


def test_a_write_that_fails_leaves_nothing(capsys, float_model, tmp_path, monkeypatch):
    source, _ = float_model
    target = tmp_path / "q.safetensors"
    assert mkrs(capsys, "quantize", source, target)[0] == 0
    old = target.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    for name in ("write", "pwrite", "writev", "pwritev"):
        monkeypatch.setattr(os, name, full, raising=False)
    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, "No space left", "quantize", source, target, "--force")
    monkeypatch.undo()
    assert target.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "q.safetensors"]


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "mergekit_torch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_help_version_and_usage():
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[-1]
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
    text = parser().format_help()
    assert "examples:" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    result = run("--version")
    assert result.stdout.strip() == f"mkrs {__version__}"
    assert run("frobnicate").returncode == 2
    assert run("quantize", "a").returncode == 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__.rsplit(".", 1)[-1])
def test_help_has_examples_and_fits(command, capsys):
    with pytest.raises(SystemExit):
        main([command.__name__.rsplit(".", 1)[-1], "--help"])
    text = capsys.readouterr().out
    assert "examples:\n  mkrs " in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_closed_pipe_is_no_error(gguf_file):
    command = f"{sys.executable} -m mergekit_torch.cli inspect {gguf_file} | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_says_bytes_rate_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(4 << 20, "quantizing") as bar:
        monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 2)
        bar.update(1 << 20)
        bar.refresh()
    text = terminal.getvalue()
    # A quarter in two seconds; tqdm gives rates in decimal units.
    assert re.search(r"quantizing: +25%.* 1\.00M/4\.00M \[00:02<00:06, 524kB/s\]", text), text


def test_progress_is_silent_without_a_terminal(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar(4 << 20, "quantizing") as bar:
        bar.update(1 << 20)
    assert pipe.getvalue() == ""

"""Whole models, split as they are loaded: logits are those of one process."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from mergekit_torch import QuantizeConfig, dequantize_, open_checkpoint, quantize_
from mergekit_torch.checkpoint import ConvertedCheckpoint
from mergekit_torch.integrations.transformers import load_native, save_native
from mergekit_torch.memory import rewrite_checkpoint
from mergekit_torch.parallel import load_sharded_, open_parts, tensor_parallel_
from mergekit_torch.parallel.files import merge_shards, shard_checkpoint
from mergekit_torch.parallel.transformers import load_parallel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model = models.tiny_llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    quantize_(model, QuantizeConfig(group_size=16, overrides={"*.down_proj": {"group_size": 64}}))
    save_native(model, folder)
    return folder


IDS = torch.tensor([[1, 5, 202, 7, 100, 3], [9, 8, 7, 6, 5, 4]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a prefill and of a decode step that uses its cache."""
    with torch.no_grad():
        first = model(ids, use_cache=True)
        second = model(ids[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def check_load(rank: int, paths: list[Path], expected: torch.Tensor, ids: torch.Tensor) -> Any:
    reports = []
    for path in paths:
        model, report = load_parallel(path)
        torch.testing.assert_close(logits(model, ids), expected, rtol=2e-4, atol=2e-4)
        held = {id(b): b.nbytes for b in (*model.buffers(), *model.parameters())}
        reports.append((report.bytes_read, report.bytes_total, sum(held.values())))
    return reports


@pytest.mark.parametrize("world", [2, 4])
def test_llama(llama: Path, tmp_path: Path, world: int) -> None:
    shard_checkpoint(llama, tmp_path / "own", world)
    shard_checkpoint(tmp_path / "own", tmp_path / "other", 6 - world)
    for folder in ("own", "other"):
        (tmp_path / folder / "config.json").write_text((llama / "config.json").read_text())
    paths = [llama, tmp_path / "own", tmp_path / "other"]
    expected = logits(load_native(llama))
    for reports in run_ranks(world, check_load, paths, expected, IDS):
        for read, total, held in reports:
            # Norms and some biases are everywhere, and five groups are split over four ranks.
            assert read < total / world * 1.45
            assert held < total / world * 1.45 + 2000  # rotary tables


def mapped_pages(path: Path) -> int:
    """Bytes of files in ``path`` that are resident in this process through a map."""
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
    return sum(
        1024 * int(re.search(r"^Rss:\s+(\d+) kB", block, re.M)[1])  # type: ignore[index]
        for block in blocks
        if str(path) in block.split("\n", 1)[0]
    )


def check_uneven(rank: int, path: Path, expected: torch.Tensor, ids: torch.Tensor) -> Any:
    model, report = load_parallel(path)
    got = logits(model, ids)
    # Sums over 30 layers in another order; random codes would be off by the logits' own size.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    attention = model.model.layers[0].self_attn
    heads = [getattr(attention, f"{x}_proj").out_features // 64 for x in "qk"]
    tied = model.lm_head.weight_codes is model.model.embed_tokens.weight_codes
    return report.bytes_read / report.bytes_total, heads, tied


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    with open_checkpoint(models.smollm2_gguf()) as checkpoint:
        converted = ConvertedCheckpoint(checkpoint, names="hf")
        rewrite_checkpoint(converted, folder, converted.specs)
        converted.write_config(folder)
    return folder


@pytest.mark.parametrize(
    ("world", "heads"),
    [(2, [[6, 2], [3, 1]]), (4, [[2, 1], [1, 1], [3, 1], [3, 1]])],
)
def test_smollm2(smollm2: Path, world: int, heads: list[list[int]]) -> None:
    """9 query and 3 key heads: whole groups per rank, or a key head that two ranks share."""
    ids = torch.tensor([[1, 4093, 2048, 77, 12]])
    model = load_native(smollm2, dtype=torch.float32)
    results = run_ranks(world, check_uneven, smollm2, logits(model, ids), ids)
    assert [result[1] for result in results] == heads
    assert all(result[2] for result in results)  # tied before, tied after
    assert sum(result[0] for result in results) < 1.06
    assert max(result[0] for result in results) < 1.2 / world


def check_mapped(rank: int, path: Path) -> Any:
    model, report = load_parallel(path)
    logits(model)
    return mapped_pages(path), report.bytes_read, report.bytes_total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_pages_touched(tmp_path: Path) -> None:
    """Rows are pages of the map, and no others; columns are read past it."""
    model = models.tiny_llama(hidden_size=1536, intermediate_size=6144, num_hidden_layers=1)
    quantize_(model, QuantizeConfig(group_size=64))
    save_native(model, tmp_path)
    for pages, read, total in run_ranks(2, check_mapped, tmp_path):
        assert read < 0.51 * total
        # 69% of the weights are split by rows; the kernel maps up to 16 pages around each fault.
        assert 0.3 * total < pages < 0.62 * total


def check_generate(rank: int, path: Path, expected: list[int]) -> None:
    model, _ = load_parallel(path)
    out = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out[0].tolist() == expected


def test_generate(llama: Path) -> None:
    whole = load_native(llama)
    out = whole.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    run_ranks(2, check_generate, llama, out[0].tolist())


def check_in_memory(rank: int, expected: torch.Tensor) -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    quantize_(model, QuantizeConfig(group_size=32))
    tensor_parallel_(model)
    torch.testing.assert_close(logits(model), expected, rtol=2e-4, atol=2e-4)
    assert model.lm_head.weight_codes is model.model.embed_tokens.weight_codes
    # What is not quantized is split by torch's own styles.
    model = models.tiny_llama(num_attention_heads=4)
    plain = logits(model)
    mesh = init_device_mesh("cpu", (2,))
    plan = {"*.gate_proj": "colwise", "*.up_proj": "colwise", "*.down_proj": "rowwise"}
    tensor_parallel_(model, mesh, plan)
    torch.testing.assert_close(logits(model), plain, rtol=2e-4, atol=2e-4)


def test_in_memory() -> None:
    model = models.tiny_llama(tie_word_embeddings=True)
    quantize_(model, QuantizeConfig(group_size=32))
    run_ranks(2, check_in_memory, logits(model))


def check_refuses(rank: int, path: Path) -> None:
    model = models.tiny_llama(hidden_size=320, num_attention_heads=5, num_key_value_heads=1)
    quantize_(model, QuantizeConfig(group_size=256))
    with pytest.raises(ValueError, match=r"o_proj: .*multiples of 256 columns, so at most 1 ranks"):
        tensor_parallel_(model)
    with pytest.raises(ValueError, match="llama-style"):
        tensor_parallel_(nn.Sequential(nn.Linear(8, 8)))
    model = models.tiny_llama()
    quantize_(model, QuantizeConfig(group_size=16))
    tensor_parallel_(model)
    # A part must not be taken for the whole.
    for use in (lambda: save_native(model, path / "part"), lambda: dequantize_(model)):
        with pytest.raises(ValueError, match="one rank's part of a weight"):
            use()
    split = copy.deepcopy(model)
    assert torch.equal(logits(split), logits(model))
    with pytest.raises(ValueError, match=r"down_proj\.weight must have bits"):
        load_sharded_(model, path)


def test_refusals(llama: Path) -> None:
    run_ranks(2, check_refuses, llama)


def test_merge_is_bit_equal(llama: Path, tmp_path: Path) -> None:
    shard_checkpoint(llama, tmp_path / "4", 4)
    shard_checkpoint(tmp_path / "4", tmp_path / "2", 2)
    for source in ("4", "2"):
        size = None if source == "4" else "50KB"
        merge_shards(tmp_path / source, tmp_path / f"back{source}", max_shard_size=size)
        with open_checkpoint(llama) as a, open_checkpoint(tmp_path / f"back{source}") as b:
            assert list(a) == sorted(b, key=list(a).index)
            assert a.metadata == b.metadata
            for name, tensor in a.stored_items():
                assert torch.equal(tensor, dict(b.stored_items())[name])
            assert all(a.info(name).quantization == b.info(name).quantization for name in a)


def test_sharded_files_are_checked(llama: Path, tmp_path: Path) -> None:
    shard_checkpoint(llama, tmp_path / "x", 2)
    manifest = tmp_path / "x" / "shards.json"
    good = json.loads(manifest.read_text())

    def fails(change: Any, message: str) -> None:
        document = json.loads(json.dumps(good))
        change(document)
        manifest.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=message):
            merge_shards(tmp_path / "x", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    name = "model.layers.0.self_attn.o_proj.weight"
    fails(lambda d: d.update({"mkrs.shards_version": 2}), "shards_version")
    fails(lambda d: d["files"].__setitem__(0, "../x"), "files must be names")
    fails(lambda d: d["tensors"][name].update(dim=7), "o_proj")
    fails(lambda d: d["tensors"][name].update(shape=[128, 96]), "o_proj")
    fails(lambda d: d["tensors"][name].update(ranges=[[0, 64], [80, 128]]), "o_proj")
    fails(lambda d: d["tensors"].pop(name), "must hold the tensors")
    manifest.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        open_parts(tmp_path / "x")
    manifest.write_text(json.dumps(good))
    (tmp_path / "x" / good["files"][1]).unlink()
    with pytest.raises(FileNotFoundError, match="rank-00001"):
        merge_shards(tmp_path / "x", tmp_path / "out")
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards\.json"):
        merge_shards(tmp_path / "x", tmp_path / "out")


def test_shard_refusals(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another directory"):
        shard_checkpoint(llama, llama, 2)
    with pytest.raises(ValueError, match=r"down_proj: in_features of 320 .* at most 5 ranks"):
        shard_checkpoint(llama, tmp_path / "x", 6)
    with pytest.raises(ValueError, match="matches the glob"):
        shard_checkpoint(llama, tmp_path / "x", 2, dims={"nothing": "rows"})
    assert not (tmp_path / "x").exists()


def test_dim_plan(tmp_path: Path) -> None:
    """A checkpoint of no known style; a weight with one group per row and one with short groups."""
    from mergekit_torch import QuantizedTensor, save_checkpoint

    torch.manual_seed(0)
    tensors = {
        "row": QuantizedTensor.from_float(torch.randn(6, 20), 4, -1, "asymmetric"),
        "short": QuantizedTensor.from_float(torch.randn(3, 5, 100), 2, 32, "affine"),
        "plain": torch.randn(7, 4),
        "vector": torch.arange(5),
        "scalar": torch.tensor(3.0),
    }
    save_checkpoint(tensors, tmp_path / "a.safetensors")
    dims = {"row": "columns", "short": "columns", "plain": "columns", "vector": "rows"}
    shard_checkpoint(tmp_path / "a.safetensors", tmp_path / "3", 3, dims=dims)
    shard_checkpoint(tmp_path / "3", tmp_path / "2", 2, dims={"*": "replicate", "short": "rows"})
    for number in "32":
        merge_shards(tmp_path / number, tmp_path / f"{number}.safetensors")
        got = (tmp_path / f"{number}.safetensors").read_bytes()
        assert got == (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no plan"):
        shard_checkpoint(tmp_path / "a.safetensors", tmp_path / "4", 3)


def test_commands(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_torch.cli.main import main

    four, two, back = (str(tmp_path / name) for name in ("4", "2", "back"))
    assert main(["shard", str(llama), four, "--world", "4"]) == 0
    assert "are split" in capsys.readouterr().out
    assert main(["shard", four, two, "--world", "2"]) == 0
    assert main(["merge-shards", two, back]) == 0
    with open_checkpoint(llama) as a, open_checkpoint(back) as b:
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "back" / "config.json").exists()
    assert not (tmp_path / "back" / "shards.json").exists()
    capsys.readouterr()
    assert main(["shard", str(llama), four, "--world", "2"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["shard", str(llama), four, "--world", "2", "--force"]) == 0
    assert len(list((tmp_path / "4").glob("rank-*"))) == 2  # the old four are gone
    assert main(["shard", str(llama), str(tmp_path / "x"), "--world", "9"]) == 1
    assert "at most" in capsys.readouterr().err
    assert main(["shard", str(llama), str(tmp_path / "x"), "--world", "2", "--dim-plan", "a"]) == 1
    assert "--dim-plan must be" in capsys.readouterr().err
    assert main(["merge-shards", str(llama), str(tmp_path / "x")]) == 1
    assert "holds no shards.json" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

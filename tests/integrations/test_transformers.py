"""transformers: quantize on load, native files, ties; on tiny random models."""

import json
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from mergekit_torch import (  # noqa: E402
    QuantizeConfig,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTensor,
    quantize_,
)
from mergekit_torch.checkpoint import CheckpointError, open_checkpoint  # noqa: E402
from mergekit_torch.integrations.transformers import (  # noqa: E402
    MkrsConfig,
    attach_,
    config_of,
    load_native,
    save_native,
)

RULES = {
    "bits": 8,
    "overrides": {"*.q_proj": {"bits": 4, "scale_dtype": "float32", "scheme": "symmetric"}},
}
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def tiny(tie):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=130,
        tie_word_embeddings=tie,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tie(request):
    return request.param


@pytest.fixture(scope="module")
def dense_dir(tie, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    tiny(tie).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(tie):
    """Logits of the model quantized in memory."""
    model = tiny(tie)
    quantize_(model, QuantizeConfig.from_dict(RULES))
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def native_dir(dense_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("native")
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=MkrsConfig(**RULES))
    model.save_pretrained(directory)
    return directory


def check(model, expected, tie):
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert (model.lm_head.weight_codes is model.model.embed_tokens.weight_codes) == tie
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_quantizes_on_load(dense_dir, expected, tie):
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=MkrsConfig(**RULES))
    check(model, expected, tie)
    assert model.model.layers[0].self_attn.q_proj.scheme == "symmetric"
    model.tie_weights()
    check(model, expected, tie)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)


def test_saves_a_native_checkpoint(native_dir, tie):
    with open(native_dir / "config.json") as file:
        stored = json.load(file)["quantization_config"]
    assert stored["quant_method"] == "mkrs"
    assert stored["overrides"] == RULES["overrides"]
    checkpoint = open_checkpoint(native_dir)
    assert ("lm_head.weight" in checkpoint) != tie
    weight = checkpoint["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert (weight.bits, weight.scale.dtype) == (4, torch.float32)


def test_loads_what_it_saved(native_dir, expected, tie):
    model = AutoModelForCausalLM.from_pretrained(native_dir)
    check(model, expected, tie)
    model.tie_weights()
    check(model, expected, tie)
    half = AutoModelForCausalLM.from_pretrained(native_dir, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(IDS).logits.dtype == torch.bfloat16
    # Scales are data, not parameters.
    assert half.lm_head.weight_scale.dtype == torch.float16
    assert torch.equal(half.lm_head.weight_scale, model.lm_head.weight_scale)
    dense = model.dequantize()
    assert type(dense.lm_head) is torch.nn.Linear
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_load_native(native_dir, expected, tie):
    model = load_native(native_dir)
    check(model, expected, tie)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    half = load_native(native_dir, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.lm_head.dtype == torch.float16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_load_native_copies_nothing(native_dir):
    model = load_native(native_dir)
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if str(native_dir) in line:
                begin, end = line.split()[0].split("-")
                ranges.append((int(begin, 16), int(end, 16)))
    for name, tensor in model.state_dict().items():
        address = tensor.data_ptr()
        assert any(begin <= address < end for begin, end in ranges), name


def test_save_native_in_shards(native_dir, expected, tie, tmp_path):
    files = save_native(load_native(native_dir), tmp_path / "out", max_shard_size="20KB")
    assert len(files) > 3
    check(load_native(tmp_path / "out"), expected, tie)
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected, tie)


def test_shards_of_save_pretrained(native_dir, expected, tie, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(native_dir)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected, tie)
    # transformers parts components of one weight; that is said, not misread.
    with pytest.raises(CheckpointError, match="not in the file"):
        load_native(tmp_path)


def test_models_quantized_in_memory_can_be_saved(expected, tie, tmp_path):
    model = tiny(tie)
    quantize_(model, QuantizeConfig.from_dict(RULES))
    attach_(model)
    model.save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected, tie)
    check(load_native(tmp_path), expected, tie)


def test_non_finite_weights_name_the_parameter(tmp_path, caplog):
    model = tiny(False)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.propagate = True
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MkrsConfig())
    logger.propagate = False
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text


def test_tied_layers_need_one_treatment(tmp_path):
    tiny(True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="both"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MkrsConfig(skip=["lm_head"])
        )
    with pytest.raises(ValueError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MkrsConfig(skip=["nowhere"])
        )


def test_config():
    config = MkrsConfig(**RULES)
    again = MkrsConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["bits"] == 8
    model = tiny(False)
    quantize_(model, QuantizeConfig.from_dict(RULES))
    modules = config_of(model).modules
    assert len(modules) == 2 + 2 * 7
    for values, words in (
        ({"bitz": 4}, "bitz"),
        ({"bits": 5}, "bits"),
        ({"version": 9}, "9"),
        ({"quant_method": "awq"}, "awq"),
        ({"modules": {"a": {"bitz": 4}}}, "bitz"),
    ):
        with pytest.raises(ValueError, match=words):
            MkrsConfig(**values)


def test_load_native_refuses(native_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_native(tmp_path)
    for file in native_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks .*layers\.2"):
        load_native(tmp_path)
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"beyond .*layers\.1"):
        load_native(tmp_path)

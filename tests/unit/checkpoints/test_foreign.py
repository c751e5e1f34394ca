"""Quark's and gpt-oss's checkpoints are converted without changing a bit of their values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3MoeConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints.cached import quantized_cache
from verl_aqn.checkpoints.foreign import import_checkpoint
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.errors import ConfigError, ModelError

TOKENS = torch.arange(24).view(2, 12)
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    },
    "exclude": ["lm_head"],
}


def quark(root: Path, config) -> tuple[Path, Path]:
    """(a folder as Quark writes it, a folder with the same codes in compressed-tensors' form)."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "ours")
    theirs = root / "quark"
    theirs.mkdir()
    (theirs / "tokenizer.json").write_text("{}")
    config_json = json.loads((root / "ours/config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config_json | {"quantization_config": QUARK}))
    tensors = load_file(root / "ours/model.safetensors")
    save_file({name.replace("weight_packed", "weight"): t for name, t in tensors.items()}, theirs / "model.safetensors")
    return theirs, root / "ours"


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL_ASCEND, tie_word_embeddings=True, attention_bias=True),
        Qwen3MoeConfig(**SMALL_ASCEND, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    ],
    ids=["llama", "qwen3-moe"],
)
def test_quark_gives_the_same_bytes(config, tmp_path: Path) -> None:
    theirs, ours = quark(tmp_path, config)
    report = import_checkpoint(theirs, tmp_path / "imported")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "imported" / name).read_bytes() == (ours / name).read_bytes(), name
    assert (tmp_path / "imported/tokenizer.json").is_file()
    assert report.imported == "quark"
    assert report.bytes_before == report.bytes_after
    assert checkpoint_digest(tmp_path / "imported") == checkpoint_digest(ours)
    with torch.no_grad():
        assert load_model(tmp_path / "imported")(TOKENS).logits.isfinite().all()


def test_quark_to_modelslim(tmp_path: Path) -> None:
    theirs, _ = quark(tmp_path, LlamaConfig(**SMALL_ASCEND))
    import_checkpoint(theirs, tmp_path / "slim", format="modelslim", max_shard_bytes=50_000)
    assert len(list((tmp_path / "slim").glob("model-*.safetensors"))) > 1
    before, after = Weights(theirs), Weights(tmp_path / "slim")
    assert before.specs == after.specs  # the same names: only the description is new
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.specs)
    description = json.loads((tmp_path / "slim/quant_model_description.json").read_text())
    assert description["model.layers.0.mlp.down_proj.weight"] == "W4A4_MXFP4"
    assert description["lm_head.weight"] == "FLOAT"


def test_a_w4a8_folder_of_modelslim_gives_the_same_bytes(tmp_path: Path) -> None:
    theirs, ours = quark(tmp_path, LlamaConfig(**SMALL_ASCEND))
    import_checkpoint(theirs, tmp_path / "slim", format="modelslim-w4a8")
    file = tmp_path / "slim/quant_model_description.json"
    assert json.loads(file.read_text())["model.layers.0.mlp.down_proj.weight"] == "W4A8_MXFP"
    assert import_checkpoint(tmp_path / "slim", tmp_path / "back").imported == "modelslim"
    assert (tmp_path / "back/model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    for form in ("modelslim", "modelslim-w4a8"):
        with pytest.raises(ModelError, match="is already MXFP4 in the format modelslim: there is nothing to convert"):
            import_checkpoint(tmp_path / "slim", tmp_path / "again", format=form)
    file.write_text(file.read_text().replace("W4A8_MXFP", "W8A8_MXFP8"))
    with pytest.raises(ModelError, match="in W8A8_MXFP8, but only W4A4_MXFP4 and W4A8_MXFP can be converted"):
        import_checkpoint(tmp_path / "slim", tmp_path / "other")


def gpt_oss(folder: Path) -> Path:
    """A tiny model in the form of openai/gpt-oss-* on the hub: stacks of experts in blocks, the rest in bf16."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **SMALL_ASCEND, num_local_experts=3, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            e, k, n = tensors.pop(name).shape
            tensors[name + "_blocks"] = torch.randint(256, (e, n, k // 32, 16), dtype=torch.uint8)
            tensors[name + "_scales"] = torch.randint(115, 125, (e, n, k // 32), dtype=torch.uint8)
            tensors[name + "_bias"] = torch.randn(e, n).bfloat16() / 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config_json = json.loads((folder / "config.json").read_text())
    ignore = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config_json["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ignore}
    (folder / "config.json").write_text(json.dumps(config_json))
    return folder


def test_gpt_oss_equals_transformers_own_reading(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "oss")
    report = import_checkpoint(source, tmp_path / "imported")
    assert (report.imported, report.modules) == ("gpt-oss", 4)
    dequantize_checkpoint(tmp_path / "imported", tmp_path / "dense")
    theirs, packed, dense = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "imported", tmp_path / "dense")
    )
    for layer in range(2):
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            blocks, scales = theirs[name + "_blocks"], theirs[name + "_scales"]
            assert torch.equal(packed[name + ".weight_packed"], blocks.flatten(-2))
            assert torch.equal(packed[name + ".weight_scale"], scales)
            assert torch.equal(dense[name], convert_moe_packed_tensors(blocks, scales))
    kept = [name for name in theirs if not name.endswith(("_blocks", "_scales"))]
    assert all(torch.equal(packed[name], theirs[name]) and torch.equal(dense[name], theirs[name]) for name in kept)
    assert len(packed) == len(theirs)

    config = json.loads((tmp_path / "imported/config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"
    assert {"lm_head", "model.layers.0.mlp.router", "model.layers.1.self_attn.q_proj"} <= set(config["ignore"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
        got = load_model(tmp_path / "imported")(TOKENS).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
    assert checkpoint_digest(quantized_cache(source, tmp_path / "cache")) == checkpoint_digest(tmp_path / "imported")


def test_refusals(tmp_path: Path) -> None:
    oss = gpt_oss(tmp_path / "oss")
    theirs, ours = quark(tmp_path, LlamaConfig(**SMALL_ASCEND))
    with pytest.raises(ModelError, match=r"is already MXFP4 \(gpt-oss\): convert it with"):
        quantize_checkpoint(oss, tmp_path / "out")
    with pytest.raises(ModelError, match="is already MXFP4 in the format compressed-tensors"):
        import_checkpoint(ours, tmp_path / "out")
    with pytest.raises(
        ModelError, match="is not an MXFP4 checkpoint of compressed-tensors, Quark, gpt-oss or ModelSlim"
    ):
        import_checkpoint(tmp_path / "source", tmp_path / "out")
    with pytest.raises(ModelError, match="does not support fused experts"):
        import_checkpoint(oss, tmp_path / "out", format="modelslim")
    with pytest.raises(ConfigError, match="unknown format 'gguf': use one of compressed-tensors, modelslim"):
        import_checkpoint(theirs, tmp_path / "out", format="gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(theirs / "model.safetensors")
    save_file(tensors | {name + "_scale": tensors[name + "_scale"][:, :1].clone()}, theirs / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"tensor {name} of .*model\.safetensors is not MXFP4: torch\.uint8 \[128, 32\]"
    ):
        import_checkpoint(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.1.input_layernorm.weight"])
def test_a_value_that_is_no_number_is_refused(name: str, tmp_path: Path) -> None:
    theirs, _ = quark(tmp_path, LlamaConfig(**SMALL_ASCEND))
    tensors = load_file(theirs / "model.safetensors")
    tensors[name].view(-1)[3] = 255 if name.endswith("scale") else torch.nan  # E8M0 has NaN at 255
    save_file(tensors, theirs / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {name} of .*/model\.safetensors contains NaN"):
        import_checkpoint(theirs, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()

"""Packed checkpoints: written, cached, digested, loaded, dequantised, and rejected with a reason."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tests.helpers.digests import base_digest, model_digest
from tests.helpers.sqnr import sqnr_db
from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.cached import dequantized_cache, quantized_cache
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import (
    checkpoint_digest,
    quantize_checkpoint,
)
from verl_aqn.checkpoints.storage import read_config
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4 import Mxfp4Linear, dequantize, quantize
from verl_aqn.mxfp4.codec import Mxfp4Tensor

TOKENS = torch.arange(24).view(2, 12)
LINEARS = 14  # seven in each of two layers


def make(folder: Path, config=None, dtype: torch.dtype = torch.bfloat16, **save) -> Path:
    """Make a random model with a tokenizer file in its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL, tie_word_embeddings=True), dtype=dtype)
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:  # otherwise all ones and zeros, which would hide a mix-up
            nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.1)
    model.generation_config = GenerationConfig(eos_token_id=[7, 9], pad_token_id=7)
    model.save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    quantize_checkpoint(source, tmp_path / "packed")
    return tmp_path / "packed"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


CONFIGS = {
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**SMALL, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen2 tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SMALL, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_equals_the_dequantised_model(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", CONFIGS[name])
    quantize_checkpoint(source, tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    model = load_model(tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(dense))
    assert not torch.equal(logits(dense), logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)))

    assert sum(isinstance(m, Mxfp4Linear) for m in model.modules()) == LINEARS
    assert not hasattr(model.config, "quantization_config")
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == ("untied" not in name)
    assert model.generation_config.eos_token_id == [7, 9]
    assert not model.training
    assert model.dtype == torch.bfloat16


def test_report_and_folder(source: Path, tmp_path: Path) -> None:
    calls = []
    report = quantize_checkpoint(source, tmp_path / "packed", "even", progress=lambda *a: calls.append(a))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    assert len(report.modules) == LINEARS
    assert calls[-1] == (LINEARS, LINEARS, report.modules[-1].name)
    for module in report.modules:
        weight = before.pop(module.name + ".weight")
        packed, scale = after.pop(module.name + ".weight_packed"), after.pop(module.name + ".weight_scale")
        assert module.shape == tuple(weight.shape)
        expected = quantize(weight, "even")
        assert torch.equal(packed, expected.packed)
        assert torch.equal(scale, expected.scale)
        assert module.sqnr_db == pytest.approx(sqnr_db(weight, dequantize(packed, scale)))
        assert module.bytes_after == packed.nbytes + scale.nbytes
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    summary = json.loads(json.dumps(report.to_dict()))
    assert summary == json.loads((tmp_path / "packed" / "quantization.json").read_text())
    assert summary["base_digest"] == checkpoint_digest(tmp_path / "packed")
    assert summary["bytes_before"] == report.bytes_before
    assert 17 < summary["sqnr_db"] < 20
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mxfp4-pack-quantized"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (tmp_path / "packed" / "generation_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "source"]


def test_compressed_tensors_decompresses_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own decompressor is used, as config.json describes."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers import CompressedTensorsConfig

    calls = []
    decompress = ModelCompressor.decompress_model
    monkeypatch.setattr(
        ModelCompressor, "decompress_model", lambda self, model: calls.append(model) or decompress(self, model)
    )

    theirs = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    for name, module in load_model(packed).named_modules():
        if isinstance(module, Mxfp4Linear):
            assert torch.equal(theirs.get_submodule(name).weight, module.weight), name
    assert len(calls) == 1


def test_shards_and_other_dtypes(source: Path, tmp_path: Path) -> None:
    sharded = make(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    wide = make(tmp_path / "wide", dtype=torch.float32)
    half = make(tmp_path / "half", dtype=torch.float16)
    for folder in (source, sharded, wide, half):
        quantize_checkpoint(folder, tmp_path / "out" / folder.name)
    assert checkpoint_digest(tmp_path / "out/source") == checkpoint_digest(tmp_path / "out/sharded")
    for name in ("wide", "half"):
        kept = load_file(tmp_path / "out" / name / "model.safetensors")
        assert {t.dtype for t in kept.values()} == {torch.bfloat16, torch.uint8}
        assert json.loads((tmp_path / "out" / name / "config.json").read_text())["dtype"] == "bfloat16"
        assert logits(load_model(tmp_path / "out" / name)).isfinite().all()


def test_exclude(source: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "a", exclude=("o_proj", "model.layers.0.*"))
    assert len(report.modules) == 6
    ignore = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignore) == LINEARS - 6 + 1
    assert isinstance(load_model(tmp_path / "a").get_submodule("model.layers.1.self_attn.o_proj"), nn.Linear)
    with pytest.raises(ConfigError, match="'o_porj', which matches no module of LlamaForCausalLM"):
        quantize_checkpoint(source, tmp_path / "b", exclude=("o_porj",))


@pytest.mark.parametrize(
    ("parent", "inside"), [("self_attn", ".self_attn."), ("layers.0", ".layers.0."), ("model.layers.*.mlp", ".mlp.")]
)
def test_the_name_of_a_module_excludes_what_it_contains(parent: str, inside: str, source: Path, tmp_path: Path) -> None:
    packed = {one.name for one in quantize_checkpoint(source, tmp_path / "all").modules}
    report = quantize_checkpoint(source, tmp_path / "some", exclude=("lm_head", parent))
    some = {one.name for one in report.modules}
    assert some == {name for name in packed if inside not in name}
    assert 0 < len(some) < len(packed)


def test_a_quantizer_of_the_caller_s_own(source: Path, tmp_path: Path) -> None:
    def halved(module: str, weight: torch.Tensor) -> Mxfp4Tensor:
        seen.append((module, tuple(weight.shape)))
        return quantize(weight / 2)

    seen: list[tuple[str, tuple[int, ...]]] = []
    report = quantize_checkpoint(source, tmp_path / "packed", quantizer=halved)
    assert seen == [(module.name, module.shape) for module in report.modules]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    for name, _ in seen:
        assert torch.equal(after[name + ".weight_packed"], quantize(before[name + ".weight"] / 2).packed)
    assert report.sqnr_db == pytest.approx(6, abs=0.5)  # an error of half the weight


def test_load_as_float32_on_request(packed: Path) -> None:
    model = load_model(packed, dtype=torch.float32)
    assert model.model.norm.weight.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(load_model(packed)).float(), atol=0.05, rtol=0.05)


def test_digest_is_the_same_wherever_the_base_is(source: Path, packed: Path, tmp_path: Path) -> None:
    digest = checkpoint_digest(packed)
    model = load_model(packed)
    assert model_digest(model) == digest
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert model_digest(wrapped) == digest
    triples = [
        (name.removeprefix("base_model.model.").removesuffix(".base_layer"), m.weight_packed, m.weight_scale)
        for name, m in wrapped.named_modules()
        if isinstance(m, Mxfp4Linear)
    ]
    assert base_digest(reversed(triples)) == digest
    quantize_checkpoint(source, tmp_path / "even", "even")
    assert checkpoint_digest(tmp_path / "even") != digest
    with torch.no_grad():
        triples[3][1][0, 0] ^= 1
    assert model_digest(wrapped) != digest


def test_lora_step_leaves_the_base_and_moves_the_adapter(packed: Path) -> None:
    model = get_peft_model(load_model(packed), LoraConfig(r=4, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    before = model_digest(model)
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert model_digest(model) == before == checkpoint_digest(packed)
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, adapter[n])]
    assert len(moved) >= LINEARS


def test_cache(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = quantized_cache(source, cache)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert quantized_cache(source, cache) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert quantized_cache(source, cache, "even") != first
    assert quantized_cache(source, cache, exclude=("lm_head", "o_proj")) != first
    (source / "tokenizer.json").write_text("{}")
    changed = quantized_cache(source, cache)
    assert changed != first
    assert (changed / "tokenizer.json").read_text() == "{}"
    assert checkpoint_digest(changed) == checkpoint_digest(first)
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def test_bf16_equal_of_a_packed_folder_is_made_once(source: Path, tmp_path: Path) -> None:
    packed = quantized_cache(source, tmp_path / "cache")
    first = dequantized_cache(packed, tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert dequantized_cache(packed, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert "quantization_config" not in read_config(first)
    name = "model.layers.0.mlp.up_proj.weight"
    codes, equal = load_file(packed / "model.safetensors"), load_file(first / "model.safetensors")
    dense = dequantize(codes[f"{name}_packed"], codes[f"{name}_scale"], torch.bfloat16)
    assert torch.equal(equal[name], dense)


def test_cache_loses_a_race_gracefully(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rivals: list[Path] = []

    def progress(done: int, total: int, module: str) -> None:
        if done == total:  # the other folder is published before ours
            rivals.append(quantized_cache(source, cache))

    assert quantized_cache(source, cache, progress=progress) == rivals[0]
    assert [p.name for p in cache.iterdir()] == [rivals[0].name]
    load_model(rivals[0])


def test_interrupted_write_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, module: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "packed", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_existing_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    with pytest.raises(ModelError, match="already exists: remove it"):
        quantize_checkpoint(source, tmp_path / "packed")


def refused(source: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        quantize_checkpoint(source, source.parent / "refused")
    assert "\n" not in str(caught.value)
    assert not (source.parent / "refused").exists()


def test_refuses_what_is_not_a_model(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (source / "model.safetensors").unlink()
    refused(source, "has no weights")
    (source / "config.json").write_text("{")
    refused(source, "cannot read .*config.json")


def test_refuses_unknown_architectures(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    refused(source, "transformers cannot build the model of .*nonesuch")


def test_refuses_damaged_files(source: Path) -> None:
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(source, r"model\.safetensors is truncated in tensor model\.\S+")
    file.write_bytes(whole[:50])
    refused(source, "header is truncated")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused(source, "is not a safetensors file")
    file.write_bytes(whole.replace(b'"shape":[96,64]', b'"shape":[95,64]', 1))
    refused(source, "is damaged")


def test_refuses_missing_shards_and_tensors(tmp_path: Path) -> None:
    source = make(tmp_path / "source", max_shard_size="40KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    refused(source, f"{shard.name} lacks tensor {name}")
    shard.unlink()
    refused(source, f"cannot read .*{shard.name}")


def test_refuses_weights_that_do_not_fit(source: Path) -> None:
    file, name = source / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    good = load_file(file)
    cases = [
        ({name: good[name][:-1].clone()}, r"up_proj\.weight of .* config\.json asks for \[96, 64\]"),
        ({name: torch.full_like(good[name], float("nan"))}, f"tensor {name} of .* contains NaN or Inf"),
        ({"extra.weight": torch.ones(2, 2)}, r"has unknown tensor extra\.weight"),
        ({name: good[name].to(torch.float8_e4m3fn)}, "has dtype F8_E4M3"),
    ]
    for change, match in cases:
        save_file(good | change, file)
        refused(source, match)
    save_file({n: t for n, t in good.items() if n != name}, file)
    refused(source, f"lacks tensor {name}")


def test_refuses_layers_that_mxfp4_cannot_hold(tmp_path: Path) -> None:
    source = make(tmp_path / "odd", LlamaConfig(**SMALL | {"intermediate_size": 100}))
    refused(source, r"model\.layers\.0\.mlp\.down_proj of .* has 100 inputs, but MXFP4 needs a multiple of 32")
    report = quantize_checkpoint(source, tmp_path / "packed", exclude=("down_proj",))
    assert len(report.modules) == LINEARS - 2


def test_refuses_to_quantise_twice_and_to_load_dense(source: Path, packed: Path) -> None:
    refused(packed, "is already MXFP4")
    for function in (load_model, checkpoint_digest):
        with pytest.raises(ModelError, match="not a packed MXFP4 checkpoint: make one with"):
            function(source)


def test_load_refuses_wrong_weights(packed: Path) -> None:
    file, name = packed / "model.safetensors", "model.layers.0.mlp.up_proj"
    good = load_file(file)
    cases = [
        ({name + ".weight_scale": good[name + ".weight_scale"][:, :1].clone()}, "do not match"),
        ({"model.norm.weight": torch.ones(3)}, "do not fit its config.json.*model.norm.weight"),
        ({"extra.weight": torch.ones(2, 2)}, "unknown tensor"),
        (
            {f"extra.{kind}": good[f"{name}.{kind}"].clone() for kind in ("weight_packed", "weight_scale")},
            "extra, which is not a linear layer",
        ),
    ]
    for change, match in cases:
        save_file(good | change, file)
        with pytest.raises(ModelError, match=match) as caught:
            load_model(packed)
        assert "\n" not in str(caught.value)
    save_file({n: t for n, t in good.items() if n != "model.norm.weight"}, file)
    with pytest.raises(ModelError, match=r"lacks tensor model\.norm\.weight"):
        load_model(packed)


def test_imports_stay_light() -> None:
    code = """
import sys
import verl_aqn.mxfp4
assert not {"transformers", "peft", "safetensors"} & set(sys.modules), "the codec needs torch only"
"""
    subprocess.run([sys.executable, "-c", code], check=True)

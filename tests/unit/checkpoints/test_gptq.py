"""GPTQ: codes in the standard format, with less error of the outputs than plain rounding has."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from tests.helpers.sqnr import sqnr_db
from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.cached import quantized_cache
from verl_aqn.checkpoints.calibrate import Calibration, calibration_ids
from verl_aqn.checkpoints.gptq import gptq, gptq_quantizer, quantize_with_gptq
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.errors import ConfigError, DataError, ModelError
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.codec import SCALE_RULES
from verl_aqn.tasks.smollm2 import tiny_model

TOKENS = torch.arange(96).view(4, 24)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, seed: int) -> torch.Tensor:
    """Return the second moment of inputs that mix k/2 sources unevenly, with one input that is always zero."""
    inputs = normal(512, k // 2, seed=seed) @ normal(k // 2, k, seed=seed + 1) + 0.3 * normal(512, k, seed=seed + 2)
    inputs *= torch.linspace(0.2, 3, k)
    inputs[:, k // 3] = 0
    return inputs.T @ inputs


def make(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.float()


# Under ``mse``, errors are weighted by the inputs' energy, so only inputs of equal energy give plain rounding.
EQUAL = [("mse", torch.eye(128)), ("mse", torch.zeros(128, 128))]
ANY = [(rule, m) for rule in ("even", "floor", "rceil") for m in (torch.eye(128), torch.rand(128).diag())]


@pytest.mark.parametrize(("rule", "moment"), EQUAL + ANY)
def test_gptq_without_correlation_is_plain_rounding(rule, moment):
    weight = normal(40, 128).bfloat16()
    weight[3, 32:64] = 0
    weight[4, :8] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5])
    got, expected = gptq(weight, moment, rule), quantize(weight, rule)
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(dequantize(*got), dequantize(*expected))


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """Return tr((W-Q) H (W-Q)^T) / tr(W H W^T): squared error of the layer's outputs relative to their energy."""
    weight, moment = weight.double(), moment.double()
    error = weight - rounded.double()
    return (((error @ moment) * error).sum() / ((weight @ moment) * weight).sum()).item()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rule=st.sampled_from(SCALE_RULES), n=st.sampled_from([1, 24]))
def test_gptq_lowers_the_output_error(seed, rule, n):
    weight, moment = normal(n, 96, seed=seed), correlated(96, seed)
    packed, scale = gptq(weight, moment, rule)
    assert (packed.dtype, packed.shape, scale.dtype, scale.shape) == (torch.uint8, (n, 48), torch.uint8, (n, 3))
    assert not (scale == 255).any()
    plain = output_error(weight, dequantize(*quantize(weight, rule)), moment)
    assert output_error(weight, dequantize(packed, scale), moment) < plain


def test_gptq_is_deterministic_and_leaves_its_inputs_alone():
    weight, moment = normal(24, 96), correlated(96, 0)
    kept = weight.clone(), moment.clone()
    first, second = gptq(weight, moment), gptq(weight, moment * 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(weight, kept[0])
    assert torch.equal(moment, kept[1])


def test_gptq_refuses():
    for moment in (torch.eye(32), torch.full((64, 64), float("nan"))):
        with pytest.raises(ModelError, match=r"needs a second moment \[64, 64\]"):
            gptq(normal(4, 64), moment)
    with pytest.raises(ModelError, match="multiple of 32"):
        gptq(normal(4, 40), torch.eye(40))
    with pytest.raises(ModelError, match="unknown scale rule"):
        gptq(normal(4, 64), torch.eye(64), "best")


def test_second_moments_are_those_of_the_whole_model(source: Path):
    model = AutoModelForCausalLM.from_pretrained(source)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda m, x, name=name: inputs.update({name: x[0].flatten(0, 1)}))
    logits(model)
    calibration = Calibration(source, TOKENS, torch.float32)
    for name, x in inputs.items():
        torch.testing.assert_close(calibration.second_moment(name), x.T @ x)
    layer = "model.layers.1."
    q = calibration.second_moment(layer + "self_attn.q_proj")
    assert q is calibration.second_moment(layer + "self_attn.v_proj")
    assert q is not calibration.second_moment(layer + "self_attn.o_proj")
    with pytest.raises(ModelError, match=r"lm_head, which is outside model\.layers"):
        calibration.second_moment("lm_head")


def test_later_layers_see_what_earlier_ones_became(source: Path):
    plain, zeroed = Calibration(source, TOKENS), Calibration(source, TOKENS)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        zeroed.second_moment(f"model.layers.0.{name}")
        zeroed.replace(f"model.layers.0.{name}", torch.zeros(64, 96 if "mlp" in name else 64))
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.allclose(plain.second_moment(name), zeroed.second_moment(name))


def test_calibration_refuses_experts(tmp_path: Path):
    source = make(tmp_path / "experts", MixtralConfig(**SMALL, num_local_experts=2))
    with pytest.raises(ModelError, match="MixtralForCausalLM: experts are not supported"):
        Calibration(source, TOKENS)


def test_gptq_checkpoint(source: Path, tmp_path: Path):
    digests = []
    for folder in ("a", "b"):
        report = quantize_checkpoint(source, tmp_path / folder, quantizer=gptq_quantizer(source, TOKENS))
        digests.append(checkpoint_digest(tmp_path / folder))
    assert digests[0] == digests[1]
    assert len(report.modules) == 14
    quantize_checkpoint(source, tmp_path / "plain")
    original = logits(AutoModelForCausalLM.from_pretrained(source))
    error = [(logits(load_model(tmp_path / name)) - original).square().mean() for name in ("a", "plain")]
    assert error[0] < error[1]


def test_excluded_layers_stay_as_they_are_in_calibration(source: Path, tmp_path: Path):
    exclude = ("lm_head", "model.layers.0.*")
    report = quantize_checkpoint(source, tmp_path / "q", exclude=exclude, quantizer=gptq_quantizer(source, TOKENS))
    assert len(report.modules) == 7
    name = "model.layers.1.self_attn.q_proj"
    weight = AutoModelForCausalLM.from_pretrained(source).get_submodule(name).weight.data
    expected = gptq(weight, Calibration(source, TOKENS).second_moment(name))
    assert torch.equal(load_model(tmp_path / "q").get_submodule(name).weight_packed, expected.packed)


def test_calibration_texts(tmp_path: Path):
    model = tiny_model(tmp_path / "tiny")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(99)))
    ids = calibration_ids(model, ["embedded", str(file)], sequences=4, length=64)
    assert ids.shape == (4, 64)
    assert torch.equal(ids, calibration_ids(model, ["embedded", str(file)], sequences=4, length=64))
    assert not torch.equal(ids, calibration_ids(model, [str(file), "embedded"], sequences=4, length=64, seed=1))
    file.write_text("\n".join([json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 40})] * 48))
    report = quantize_with_gptq(model, tmp_path / "packed", [str(file)])
    assert report.sqnr_db < quantize_checkpoint(model, tmp_path / "plain").sqnr_db
    with pytest.raises(DataError, match="too little text"):
        calibration_ids(model, [str(file)], sequences=49)
    file.write_text('{"answer": "4"}')
    with pytest.raises(DataError, match="is not JSONL with"):
        calibration_ids(model, [str(file)])
    with pytest.raises(DataError, match="cannot read"):
        calibration_ids(model, ["/nowhere.jsonl"])
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="without its tokenizer"):
        calibration_ids(model, ["embedded"])
    with pytest.raises(ModelError, match="not a folder"):
        calibration_ids(tmp_path / "nowhere", ["embedded"])


def test_a_recipe_s_base_is_calibrated_and_cached(tmp_path: Path):
    model, cache, file = tiny_model(tmp_path / "tiny"), tmp_path / "cache", tmp_path / "texts.jsonl"
    file.write_text("\n".join([json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 40})] * 48))
    plain = quantized_cache(model, cache)
    first = quantized_cache(model, cache, calibrate=[str(file)])
    assert "-mxfp4-mse-gptq-" in first.name
    assert checkpoint_digest(first) != checkpoint_digest(plain)
    assert quantized_cache(model, cache, calibrate=[str(file)]) == first
    with file.open("a") as stream:
        stream.write("\n" + json.dumps({"text": "One more."}))
    with pytest.raises(DataError, match=r"cannot read calibration texts /nowhere.jsonl \(No such file"):
        quantized_cache(model, cache, calibrate=["/nowhere.jsonl"])
    assert quantized_cache(model, cache, calibrate=[str(file)]) != first


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_loftq_is_nearer_with_its_adapter(shape):
    weight = normal(*shape)
    plain = sqnr_db(weight, dequantize(*quantize(weight, "mse"), dtype=torch.float32))
    gains = []
    for rank in (4, 16):
        codes, a, b = loftq(weight, rank)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        gains.append(sqnr_db(weight, dequantize(*codes, dtype=torch.float32) + b @ a) - plain)
    assert 0.1 < gains[0] < gains[1]


def test_loftq_s_first_adapter_is_the_truncated_svd():
    weight = normal(96, 64)
    codes, a, b = loftq(weight, 8, rounds=1)
    residual = weight - dequantize(*codes, dtype=torch.float32)
    u, s, v = torch.linalg.svd(residual)
    torch.testing.assert_close(b @ a, u[:, :8] * s[:8] @ v[:8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.norm(), b.norm())
    # The residual has a lower rank than the adapter: no division by zero.
    flat = torch.ones(64, 64)
    assert all(t.isfinite().all() for t in loftq(flat, 8)[1:])


@pytest.mark.parametrize(("alpha", "rslora"), [(8, False), (32, False), (16, True)])
def test_loftq_s_adapter_in_plain_peft(source: Path, tmp_path: Path, alpha, rslora):
    loftq_checkpoint(source, tmp_path / "base", tmp_path / "adapter", rank=8, alpha=alpha, rslora=rslora)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "source"]
    model = PeftModel.from_pretrained(load_model(tmp_path / "base", torch.float32), tmp_path / "adapter")
    weights = AutoModelForCausalLM.from_pretrained(source).state_dict()
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = weights[name.removeprefix("base_model.model.") + ".weight"].float()
        _, a, b = loftq(weight, 8)
        torch.testing.assert_close(layer.get_delta_weight("default"), b @ a, atol=1e-6, rtol=1e-4)
    original = logits(AutoModelForCausalLM.from_pretrained(source))
    quantize_checkpoint(source, tmp_path / "plain")
    plain = (logits(load_model(tmp_path / "plain", torch.float32)) - original).square().mean()
    assert (logits(model) - original).square().mean() < plain


def test_loftq_refuses_a_rank_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"rank=65.*\[64, 96\]"):
        loftq(normal(64, 96), 65)


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen2Config(**SMALL), LlamaConfig(**SMALL, mlp_bias=True)])
def test_folded_scales_keep_the_function(tmp_path: Path, config):
    source = make(tmp_path / "source", config)
    assert fold_macro_scales(source, tmp_path / "folded") > 0
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "folded"))
    torch.testing.assert_close(logits(after), logits(before), atol=1e-5, rtol=1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    plain, folded = (quantize_checkpoint(tmp_path / n, tmp_path / ("q" + n)) for n in ("source", "folded"))
    assert folded.sqnr_db > plain.sqnr_db


def test_folding_needs_a_pair(tmp_path: Path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="neither up_proj and down_proj"):
        fold_macro_scales(tmp_path, tmp_path / "folded")


def test_worst_layers_are_found_and_kept_together(source: Path, tmp_path: Path):
    def quantizer(name: str, weight: torch.Tensor):
        return quantize(-weight if name == "model.layers.1.self_attn.v_proj" else weight)

    quantize_checkpoint(source, tmp_path / "packed", quantizer=quantizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = logits(model)
    attention = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    size = 128 * 64 * 47 // 32
    assert worst_layers(model, tmp_path / "packed", TOKENS, size) == attention
    assert worst_layers(model, tmp_path / "packed", TOKENS, size // 4) == ()
    assert torch.equal(logits(model), before)
    quantize_checkpoint(source, tmp_path / "kept", exclude=("lm_head", *attention))
    assert set(attention) <= set(
        json.loads((tmp_path / "kept/config.json").read_text())["quantization_config"]["ignore"]
    )

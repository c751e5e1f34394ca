"""GPTQ: codes in the standard format, with less error of the outputs than plain rounding has."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.cached import quantized_cache
from verl_aqn.checkpoints.calibrate import Calibration, calibration_ids
from verl_aqn.checkpoints.gptq import gptq, gptq_quantizer, quantize_with_gptq
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.errors import DataError, ModelError
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.codec import SCALE_RULES
from verl_aqn.tasks.smollm2 import tiny_model

TOKENS = torch.arange(96).view(4, 24)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, seed: int) -> torch.Tensor:
    """Second moment of inputs that mix k/2 sources unevenly, with one input that is always zero."""
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


# Under ``mse``, inputs of unequal energy have their errors weighed accordingly, so only equal ones are plain there.
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
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): the squared error of the layer's outputs as a share of their energy."""
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
    with pytest.raises(ModelError, match="cannot calibrate MixtralForCausalLM: experts are not supported"):
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

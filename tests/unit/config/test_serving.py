"""The form of the base in the rollout, by device; the folders that this needs; and the config for each chip."""

import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.rounded_block import pack_with_a_rounded_block
from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints.loading import open_packed, packed_modules
from verl_aqn.checkpoints.packing import checkpoint_digest, combined_digest, quantize_checkpoint, values_digest
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import check_activations, check_int8_device, form_of, prepare_serving
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.mxfp4.chips import chip_name, generation
from verl_aqn.mxfp4.mxfp8 import ARITHMETIC
from verl_aqn.preflight.prepare import prepare_model, tell_workers, warnings_of

A3, ASCEND_950 = "Ascend910_9392", "Ascend950PR_9589"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_ASCEND), dtype=torch.bfloat16).save_pretrained(root / "bf16")
    quantize_checkpoint(root / "bf16", root / "packed")
    return root / "packed"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))


def prepared(packed: Path, chip: str | None, *overrides: str):
    """Return the config after `prepare_serving` on a machine with this chip."""

    def name() -> str:
        assert chip, "the chip was asked for"
        return chip

    config = load_recipe("e12", list(overrides))
    config.actor_rollout_ref.model.path = str(packed)
    prepare_serving(config, name)
    tell_workers(config)
    return config


@pytest.mark.parametrize(
    ("name", "found"),
    [("Ascend910B2C", "A2"), ("Ascend910_9392", "A3"), ("Ascend950PR_9589", "950"), ("Ascend910_9579", "950")],
)
def test_chips_are_told_by_their_names(name, found):
    assert generation(name) == found


def test_an_unknown_chip_and_a_missing_one_are_told_in_a_line():
    with pytest.raises(EnvironmentFault, match=r"unknown Ascend chip 'Ascend310P3'"):
        generation("Ascend310P3")
    with pytest.raises(EnvironmentFault, match=r"no Ascend device responds.*aqn\.mxfp4\.rollout_weight_format"):
        chip_name()


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_the_packed_base_is_served_as_it_is_where_vllm_can(packed, profile):
    config = prepared(packed, None, f"profile={profile}")
    assert parse_aqn(config).mxfp4.rollout_weight_format == "packed"
    assert "served_path" not in config.actor_rollout_ref.model.override_config


@pytest.mark.parametrize(
    ("chip", "overrides"),
    [
        (A3, ["profile=npu"]),
        (None, ["profile=npu", "aqn.mxfp4.rollout_weight_format=bf16"]),
        (None, ["profile=cpu", "aqn.mxfp4.rollout_weight_format=bf16"]),
    ],
)
def test_without_mx_units_the_rollout_has_the_bf16_equal(packed, chip, overrides):
    config = prepared(packed, chip, *overrides)
    model, engine = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout.engine_kwargs.vllm
    assert (parse_aqn(config).mxfp4.rollout_weight_format, parse_aqn(config).mxfp4.activation) == ("bf16", "none")
    assert model.path == str(packed)
    served = Path(model.override_config.served_path)
    assert "quantization_config" not in json.loads((served / "config.json").read_text())
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(served / "model.safetensors").values())
    assert "quantization" not in engine


def test_the_bf16_equal_is_known_by_a_digest_that_is_made_of_the_packed_bytes(packed):
    """A run compares its rollout with this digest, also if a tensor-parallel rank holds a part of a weight."""
    config = prepared(packed, None, "profile=cpu", "aqn.mxfp4.rollout_weight_format=bf16")
    weights = load_file(Path(config.actor_rollout_ref.model.override_config.served_path) / "model.safetensors")
    modules = packed_modules(open_packed(packed))
    digests = {module: values_digest(weights[f"{module}.weight"]) for module in modules}
    assert checkpoint_digest(packed, form="bf16") == combined_digest(digests.items())
    name = "model.layers.0.mlp.down_proj"
    for column, columns in ((64, 64), (48, 80)):  # the second boundary is inside a block
        part = {name: [0, 64, column, columns]}  # row, rows, column, columns
        digests[name] = values_digest(weights[f"{name}.weight"][:, column:])
        assert checkpoint_digest(packed, part, "bf16") == combined_digest(digests.items())
    weights[f"{name}.weight"][0, 64] += 1
    assert values_digest(weights[f"{name}.weight"][:, 64:]) != digests[name]


def test_an_ascend_950_serves_the_packed_bytes_and_both_sides_round_activations(packed):
    config = prepared(packed, ASCEND_950, "profile=npu")
    aqn, actor_rollout = parse_aqn(config), config.actor_rollout_ref
    assert (aqn.mxfp4.rollout_weight_format, aqn.mxfp4.activation_arithmetic) == ("packed", ARITHMETIC)
    assert actor_rollout.model.override_config.mxfp4_activation == ARITHMETIC
    assert actor_rollout.rollout.engine_kwargs.vllm.quantization == "ascend"
    served = Path(actor_rollout.model.override_config.served_path)
    theirs, ours = load_file(packed / "model.safetensors"), load_file(served / "model.safetensors")
    assert {name.replace("weight_packed", "weight") for name in theirs} == ours.keys()
    assert all(torch.equal(ours[name.replace("weight_packed", "weight")], tensor) for name, tensor in theirs.items())
    description = json.loads((served / "quant_model_description.json").read_text())
    assert description["model.layers.0.mlp.up_proj.weight"] == "W4A8_MXFP"


def test_an_ascend_950_rounds_activations_to_mxfp4_if_the_recipe_says_so(packed):
    w4a4, w4a8 = (prepared(packed, ASCEND_950, "profile=npu", *more) for more in (["aqn.mxfp4.activation=mxfp4"], []))
    assert parse_aqn(w4a8).mxfp4.activation == "mxfp8"
    aqn, actor_rollout = parse_aqn(w4a4), w4a4.actor_rollout_ref
    assert (aqn.mxfp4.rollout_weight_format, aqn.mxfp4.activation_arithmetic) == ("packed", "floor/half_away")
    assert actor_rollout.model.override_config.mxfp4_activation == "floor/half_away"
    assert actor_rollout.rollout.engine_kwargs.vllm.quantization == "ascend"
    served, other = (Path(config.actor_rollout_ref.model.override_config.served_path) for config in (w4a8, w4a4))
    assert (served / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    text = (served / "quant_model_description.json").read_text()
    assert json.loads(text)["model.layers.0.mlp.up_proj.weight"] == "W4A8_MXFP"
    assert text.replace("W4A8_MXFP", "W4A4_MXFP4") == (other / "quant_model_description.json").read_text()


def test_the_cpu_s_rollout_rounds_to_mxfp8_as_the_actor_does(packed):
    config = prepared(packed, None, "profile=cpu", "aqn.mxfp4.activation=mxfp8")
    actor_rollout = config.actor_rollout_ref
    assert actor_rollout.model.override_config.mxfp4_activation == ARITHMETIC
    assert actor_rollout.rollout.engine_kwargs.vllm.additional_config.mxfp4_activation == ARITHMETIC


@pytest.mark.parametrize(
    ("chip", "overrides", "words"),
    [
        (None, ["profile=cuda"], "no CUDA kernel for linear layers with MXFP4 weights and MXFP8 activations"),
        (A3, ["profile=npu"], r"with a bf16 or int8 base \(always on Ascend A2 and A3\) the rollout does not"),
        (A3, ["profile=npu", "aqn.mxfp4.rollout_weight_format=packed"], f"{A3} has no MX units"),
        (None, ["profile=npu", "aqn.mxfp4.rollout_weight_format=bf16"], "needs a packed base in the rollout"),
        (None, ["profile=cpu", "aqn.mxfp4.rollout_weight_format=bf16"], "needs a packed base in the rollout"),
    ],
)
def test_a_device_without_mxfp8_is_told_in_a_line_before_any_work(chip, overrides, words):
    """Nothing is read: there is no base yet."""
    aqn = parse_aqn(load_recipe("e12", ["aqn.mxfp4.activation=mxfp8", *overrides]))
    with pytest.raises(ConfigError, match=words) as refused:
        check_activations(aqn, lambda: chip or pytest.fail("the chip was asked for"))
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("aqn.mxfp4.activation=mxfp8")
    assert "set aqn.mxfp4.activation=none" in str(refused.value)


def test_prepare_model_asks_first(monkeypatch):
    monkeypatch.setattr("verl_aqn.preflight.prepare.find_model", lambda config: pytest.fail("work has begun"))
    with pytest.raises(ConfigError, match="no CUDA kernel"):
        prepare_model(load_recipe("e12", ["profile=cuda", "aqn.mxfp4.activation=mxfp8"]))


def test_a_driver_without_an_npu_starts_a_run_of_the_format_that_the_recipe_names(packed):
    def absent() -> str:
        raise EnvironmentFault("no Ascend device responds")

    overrides = ["profile=npu", "aqn.mxfp4.rollout_weight_format=packed", "aqn.mxfp4.activation=mxfp8"]
    check_activations(parse_aqn(load_recipe("e12", overrides)), absent)


def test_what_cannot_be_is_refused(packed):
    with pytest.raises(ConfigError, match=r"W4A8_MXFP and W4A4_MXFP4 only.*aqn\.mxfp4\.rollout_weight_format=bf16"):
        prepared(packed, None, "profile=npu", "aqn.mxfp4.rollout_weight_format=packed")
    with pytest.raises(ConfigError, match=r"activation_scale_rule=even .* are not for aqn\.mxfp4\.activation=mxfp8"):
        prepared(packed, ASCEND_950, "profile=npu", "aqn.mxfp4.activation_scale_rule=even")  # `auto` chooses mxfp8
    with pytest.raises(ConfigError, match="the rollout does not round activations"):
        prepared(packed, A3, "profile=npu", "aqn.mxfp4.activation=mxfp4")
    with pytest.raises(ConfigError, match=r"rollout_weight_format='fp8' is not one of auto, packed, bf16, int8"):
        load_recipe("e12", ["profile=npu", "aqn.mxfp4.rollout_weight_format=fp8"])


def test_a_config_is_told_anew_when_it_is_used_again(packed):
    """An evaluation uses a run's config and may request a different form."""
    config = prepared(packed, ASCEND_950, "profile=npu")
    OmegaConf.update(config, "aqn.mxfp4.enabled", False)
    prepare_serving(config, lambda: ASCEND_950)
    assert "served_path" not in config.actor_rollout_ref.model.override_config
    assert "quantization" not in config.actor_rollout_ref.rollout.engine_kwargs.vllm


def test_an_unquantised_base_asks_for_no_chip(packed):
    config = load_recipe("e12", ["profile=npu", "aqn.mxfp4.enabled=false"])
    prepare_serving(config, lambda: pytest.fail("the chip was asked for"))
    assert form_of(parse_aqn(load_recipe("e12", ["profile=cpu"]))) == "packed"


INT8 = ("profile=npu", "aqn.mxfp4.rollout_weight_format=int8")


@pytest.fixture(scope="module")
def slightly_rounded(tmp_path_factory) -> Path:
    return pack_with_a_rounded_block(tmp_path_factory.mktemp("rounded"))


@pytest.mark.parametrize("chip", ["Ascend910B2C", A3])
def test_a2_and_a3_serve_int8_if_the_recipe_says_so_and_only_then(packed, chip):
    config = prepared(packed, chip, *INT8)
    model, engine = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout.engine_kwargs.vllm
    assert (parse_aqn(config).mxfp4.rollout_weight_format, parse_aqn(config).mxfp4.activation) == ("int8", "none")
    assert (model.path, engine.quantization) == (str(packed), "ascend")
    served = Path(model.override_config.served_path)
    description = json.loads((served / "quant_model_description.json").read_text())
    assert description["model.layers.0.mlp.up_proj.weight"] == "W8A16"
    assert load_file(served / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert parse_aqn(prepared(packed, chip, "profile=npu")).mxfp4.rollout_weight_format == "bf16"  # the default
    OmegaConf.update(config, "aqn.mxfp4.rollout_weight_format", "bf16")  # an evaluation asks for another form
    prepare_serving(config, lambda: chip)
    assert "quantization" not in config.actor_rollout_ref.rollout.engine_kwargs.vllm


def test_a_run_tells_what_int8_changes_before_it_starts(packed, slightly_rounded):
    (told,) = warnings_of(prepared(slightly_rounded, A3, *INT8))
    assert re.fullmatch(r"the rollout's base in int8: 1 of [\d,]+ blocks .*\(model\.layers\.0\.mlp\.up_proj\)", told)
    assert warnings_of(prepared(slightly_rounded, A3, "profile=npu")) == []
    assert warnings_of(load_recipe("e12", [*INT8])) == []  # not prepared: nothing is known


@pytest.mark.parametrize(
    ("chip", "overrides", "words"),
    [
        (None, ["profile=cpu"], "profile=cpu has no kernel for it: set aqn.mxfp4.rollout_weight_format=auto"),
        (None, ["profile=cuda"], "profile=cuda has no kernel for it: set aqn.mxfp4.rollout_weight_format=auto"),
        (ASCEND_950, [], f"{ASCEND_950} holds the packed base itself in half the memory"),
        (A3, ["ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ASCEND_ENABLE_NZ='1'"], "VLLM_ASCEND_ENABLE_NZ='0'"),
        (A3, ["ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ASCEND_ENABLE_NZ=null"], "VLLM_ASCEND_ENABLE_NZ='0'"),
        (
            A3,
            ["+actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.weight_nz_mode=1"],
            r"and remove actor_rollout_ref\.rollout\.engine_kwargs\.vllm\.additional_config\.weight_nz_mode",
        ),
        (A3, ["actor_rollout_ref.rollout.dtype=float16"], "float16: layers compute in bfloat16 in both"),
        (A3, ["aqn.noise.targets=[norm,linear]"], "in int8 and has no packed layer: remove `linear`"),
        (A3, ["aqn.mxfp4.activation=mxfp4"], "bf16 or int8 base"),
    ],
)
def test_int8_is_refused_where_it_cannot_be_served(packed, tmp_path, chip, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        prepared(packed, chip or A3, *INT8, *overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache" / "int8").exists()


def test_a_driver_without_an_npu_may_prepare_int8(packed):
    def absent() -> str:
        raise EnvironmentFault("no Ascend device responds")

    check_int8_device(load_recipe("e12", list(INT8)), absent)
    check_int8_device(load_recipe("e12", [*INT8, "aqn.mxfp4.enabled=false"]), lambda: pytest.fail("asked"))

"""A recipe with a mixture of experts: how it is served, where its adapter goes, and what is rejected."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL, SMALL_MOE
from verl_aqn.checkpoints.packing import is_packed, quantize_checkpoint
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import prepare_serving
from verl_aqn.errors import ConfigError
from verl_aqn.mxfp4.kernels import native
from verl_aqn.preflight import memory_plan as memory
from verl_aqn.preflight import recipe_checks as checks
from verl_aqn.preflight.expert_adapters import keep_adapter_off_experts
from verl_aqn.preflight.sizing import shape_of

CONFIGS = {
    "qwen3": Qwen3MoeConfig(**SMALL_MOE, moe_intermediate_size=32, num_experts=4, mlp_only_layers=[1]),
    "qwen2": Qwen2MoeConfig(
        **SMALL_MOE, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4
    ),
    "mixtral": MixtralConfig(**SMALL_MOE, num_local_experts=4),
    "dense": LlamaConfig(**SMALL),
}  # fmt: skip
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A packed folder for each of CONFIGS, and `kept`, whose experts stay in bf16."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / f"{name}-source")
        quantize_checkpoint(folder / f"{name}-source", folder / name)
    exclude = ("lm_head", "embed_tokens", "*.experts.*")
    quantize_checkpoint(folder / "mixtral-source", folder / "kept", exclude=exclude)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))


def recipe(model: Path, *overrides: str, profile: str = "cpu") -> DictConfig:
    return load_recipe("e12", [f"profile={profile}", f"actor_rollout_ref.model.path={model}", *overrides])


@pytest.mark.parametrize(
    ("name", "profile", "form"),
    [
        ("qwen3", "cpu", "bf16"),
        ("mixtral", "cpu", "bf16"),
        ("mixtral", "cuda", "packed"),
        ("kept", "cpu", "packed"),
        ("dense", "cpu", "packed"),
    ],
)
def test_packed_experts_are_served_in_bf16_on_a_cpu(root, name, profile, form):
    config = recipe(root / name, profile=profile)
    prepare_serving(config)
    assert parse_aqn(config).mxfp4.rollout_weight_format == form
    served = config.actor_rollout_ref.model.override_config.get("served_path")
    assert (served is not None and not is_packed(served)) == (form == "bf16")


@pytest.mark.parametrize(
    ("name", "override", "multiplies", "linear"),
    [
        ("mixtral", "aqn.seed=0", True, memory.BF16),  # packed experts are served in bf16
        ("dense", "aqn.seed=0", True, memory.PACKED),
        ("dense", "aqn.seed=0", False, memory.PACKED + memory.BF16),  # no AVX512-BF16: the values are kept, too
        ("dense", "aqn.noise.targets=[norm,linear]", True, memory.PACKED + memory.BF16),  # noise is written to values
    ],
)
def test_the_memory_of_a_base_in_a_rollout_on_a_cpu(root, name, override, multiplies, linear, monkeypatch):
    monkeypatch.setattr(native, "can_multiply", lambda: multiplies)
    shape, given = shape_of(root / name, ("lm_head", "embed_tokens")), memory.sizes(recipe(root / name, override))
    base = memory.rollout(shape, given, memory.cpu_costs(), 0).resident["base"]
    assert base == pytest.approx(linear * shape.linears + memory.BF16 * shape.kept, abs=1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("aqn.mxfp4.rollout_weight_format=packed", "vLLM has no kernel for packed experts on a CPU"),
        ("aqn.mxfp4.activation=mxfp4", "vLLM has no kernel for packed experts on a CPU"),
        ("aqn.mxfp4.activation=mxfp8", "vLLM has no kernel for packed experts on a CPU"),
        ("aqn.noise.targets=[norm,linear]", "aqn.noise.targets has `linear`"),
    ],
)
def test_what_a_bf16_base_cannot_do_is_refused(root, override, words):
    with pytest.raises(ConfigError, match=words):
        prepare_serving(recipe(root / "mixtral", override))


def test_experts_have_mxfp4_activations_on_an_ascend_950_by_default(root):
    config = recipe(root / "qwen2", "aqn.mxfp4.rollout_weight_format=auto", profile="npu")
    prepare_serving(config, lambda: "Ascend950PR_9589")
    assert parse_aqn(config).mxfp4.activation == "mxfp4"


def test_experts_with_mxfp8_activations_are_refused_on_an_ascend_950(root):
    config = recipe(root / "qwen3", "aqn.mxfp4.activation=mxfp8", profile="npu")
    with pytest.raises(ConfigError, match=r"mxfp8 on NPUs is not for experts \(.*qwen3\), whose rounding is not read"):
        prepare_serving(config, lambda: "Ascend950PR_9589")


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "mixtral"])
def test_the_adapter_goes_to_attention_in_actor_and_rollout(root, name):
    """It does not go to shared experts, dense layers and routers, whatever PEFT and vLLM would do with `all-linear`."""
    config = recipe(root / name)
    keep_adapter_off_experts(config)
    keep_adapter_off_experts(config)  # an evaluation's config is that of a run
    actor_rollout = config.actor_rollout_ref
    assert actor_rollout.model.target_modules == ATTENTION
    assert actor_rollout.rollout.engine_kwargs.vllm.lora_target_modules == ATTENTION


def test_a_dense_model_and_one_without_adapter_are_left_alone(root):
    for config in (recipe(root / "dense"), recipe(root / "mixtral", "actor_rollout_ref.model.lora_rank=0")):
        before = OmegaConf.to_container(config)
        keep_adapter_off_experts(config)
        assert OmegaConf.to_container(config) == before


@pytest.mark.parametrize("targets", ["[q_proj,gate_proj]", "[gate]", ".*_proj"])
def test_an_adapter_elsewhere_is_refused(root, targets):
    config = recipe(root / "qwen2")
    with open_dict(config):
        config.actor_rollout_ref.model.target_modules = OmegaConf.create(targets) if "[" in targets else targets
    with pytest.raises(
        ConfigError,
        match=r"only attention can have adapters: set target_modules to some of k_proj, o_proj, q_proj, v_proj",
    ):
        keep_adapter_off_experts(config)
    with pytest.raises(ConfigError, match="target_parameters is set"):
        keep_adapter_off_experts(recipe(root / "qwen2", "+actor_rollout_ref.model.target_parameters=[experts]"))


TWO = ("trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2")


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("dense", ("actor_rollout_ref.rollout.expert_parallel_size=2", *TWO), "this model has no experts"),
        ("qwen2", ("actor_rollout_ref.rollout.expert_parallel_size=2",), "expert_parallel_size to 1 or 1"),
        ("qwen2", ("actor_rollout_ref.rollout.tensor_model_parallel_size=8",), "at most 4"),
        ("qwen2", ("+actor_rollout_ref.rollout.engine_kwargs.vllm.enable_eplb=true",), "moves experts"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(root, name, overrides, words):
    (finding,) = checks.check_experts(recipe(root / name, *overrides), shape_of(root / name, ()))
    assert words in finding.fix


def test_doctor_says_how_many_experts_there_are_and_in_which_form(root):
    shape = shape_of(root / "qwen2", ())
    (finding,) = checks.check_experts(
        recipe(root / "qwen2", "actor_rollout_ref.rollout.expert_parallel_size=2", *TWO), shape
    )
    assert not finding.fix
    assert finding.found.startswith("4 per layer, divided among 2 ranks, in bf16 in the rollout")
    (finding,) = checks.check_experts(recipe(root / "qwen2", profile="cuda"), shape)
    assert finding.found == "4 per layer"
    assert not list(checks.check_experts(recipe(root / "dense"), shape_of(root / "dense", ())))

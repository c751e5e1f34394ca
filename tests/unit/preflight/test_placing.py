"""The layers that an adapter goes to if PEFT or vLLM cannot adapt all of them."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict
from peft import LoraConfig, get_peft_model
from transformers import FalconH1Config, LlamaConfig

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.loading import empty_model
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.preflight.placing import place_adapter

MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
HERE = {"without_slot": []}


def recipe(folder: Path, targets: object = "all-linear") -> DictConfig:
    config = load_recipe("e12", ["profile=cpu", f"actor_rollout_ref.model.path={folder}"])
    with open_dict(config):
        config.actor_rollout_ref.model.target_modules = targets
    return config


@pytest.fixture
def falcon(tmp_path) -> Path:
    FalconH1Config(**SMALL, head_dim=16, **MAMBA).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def llama(tmp_path) -> Path:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    return tmp_path


def test_what_peft_refuses_is_left_out_and_the_rest_adapted(falcon):
    config = recipe(falcon)
    place_adapter(config, HERE)
    before = OmegaConf.to_container(config)
    place_adapter(config, HERE)  # an evaluation's config is that of a run
    assert OmegaConf.to_container(config) == before
    model = config.actor_rollout_ref.model
    leaves = config.actor_rollout_ref.rollout.engine_kwargs.vllm.lora_target_modules
    adapted = get_peft_model(
        empty_model(falcon), LoraConfig(target_modules=model.target_modules, exclude_modules=model.exclude_modules)
    )
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert sorted(found) == leaves
    assert "in_proj" in leaves
    assert "out_proj" not in leaves


def test_a_tower_without_places_in_vllm_is_left_out(llama):
    config = recipe(llama)
    place_adapter(config, {"without_slot": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]})
    assert config.actor_rollout_ref.model.exclude_modules == r"model\.layers\.\d+\.mlp\.down_proj(\..*)?"
    assert "down_proj" not in config.actor_rollout_ref.rollout.engine_kwargs.vllm.lora_target_modules
    config = recipe(llama)
    place_adapter(config, {"without_slot": [f"model.layers.0.mlp.{one}_proj" for one in ("up", "gate", "down")]})
    assert config.actor_rollout_ref.model.exclude_modules == r"model\.layers\.0\.mlp(\..*)?"  # layer 1 keeps its own


def test_a_model_of_which_all_can_be_adapted_is_left_alone(llama):
    for answer in (None, HERE):
        config = recipe(llama)
        before = OmegaConf.to_container(config)
        place_adapter(config, answer)
        assert OmegaConf.to_container(config) == before


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.down_proj"])
def test_a_choice_of_the_recipe_that_cannot_be_adapted_is_refused_by_name(llama, targets):
    answer = {"without_slot": ["model.layers.0.mlp.down_proj"]}
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj cannot have an adapter \(vLLM has no"):
        place_adapter(recipe(llama, targets), answer)
    place_adapter(recipe(llama, ["q_proj"]), answer)

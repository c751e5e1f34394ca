"""vLLM's reply to whether it can serve a model, and the reasons for which a recipe is rejected."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPTNeoXConfig, MistralConfig, PretrainedConfig

from tests.helpers.tiny_configs import SMALL, SMALL_MOE
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.serving import fit_engine
from verl_aqn.errors import EnvironmentFault
from verl_aqn.launch.forkserver.ahead import Ahead
from verl_aqn.preflight import vllm_says as vllm
from verl_aqn.preflight.asking import asked_by, in_new_process

pytest.importorskip("vllm")
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    vllm._answers.clear()


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """Ask in forks of a server that has imported vLLM, as a run does."""
    with Ahead({**os.environ, "VERL_PLATFORM": "cpu"}) as ahead, asked_by(ahead.run_module):
        yield


def folder_of(path: Path, config: PretrainedConfig) -> Path:
    from accelerate import init_empty_weights

    with init_empty_weights():
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(path)
    return path


def recipe(model: Path, *overrides: str, profile: str = "cpu") -> DictConfig:
    return load_recipe("e12", [f"profile={profile}", f"actor_rollout_ref.model.path={model}", *overrides])


def fix(config: DictConfig, folder: Path) -> str:
    (finding,) = vllm.check_served(config, folder)
    return finding.fix


@pytest.mark.usefixtures("forks")
def test_windows_in_all_layers_are_served_in_blocks_of_16(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, MistralConfig(**SMALL, head_dim=32, sliding_window=32))
    config = recipe(folder)
    assert not fix(config, folder)
    answer = vllm.ask(config, folder)
    assert answer["class"] == "MistralForCausalLM"
    assert answer["without_slot"] == []
    fit_engine(config, answer)
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.block_size == 16
    vllm._answers.clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # the reply is cached, also for other processes
    assert vllm.ask(config, folder) == answer
    assert vllm.ask(recipe(folder, profile="cuda"), folder) is None  # this vLLM is not the right one for that device


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
            "does not support LoRA adapters for",
        ),
        (DeepseekV3Config(**SMALL_MOE, **LATENT, n_routed_experts=4, n_group=1, topk_group=1), "cannot build"),
        (MistralConfig(**SMALL, head_dim=48, sliding_window=None), "does not support heads of 48"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_name(tmp_path, config, words):
    folder = folder_of(tmp_path, config)
    said = fix(recipe(folder), folder)
    assert words in said
    assert "vLLM 0." in said
    assert "\n" not in said


def test_a_question_that_crashes_is_no_yes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, MistralConfig(**SMALL))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with asked_by(in_new_process):
        with pytest.raises(EnvironmentFault, match="could not be asked"):
            vllm.ask(recipe(folder), folder)
        assert fix(recipe(folder), folder)
    monkeypatch.setattr(vllm, "vllm_version", lambda: None)
    (finding,) = vllm.check_served(recipe(folder), folder)
    assert (finding.found.startswith("not checked"), finding.fix) == (True, "")


def test_a_tensor_that_vllm_has_no_parameter_for_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    AutoModelForCausalLM.from_config(MistralConfig(**SMALL, head_dim=32, sliding_window=None)).save_pretrained(tmp_path)
    assert not fix(recipe(tmp_path), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.input_norm.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    said = fix(recipe(tmp_path), tmp_path)  # the same config, but not the earlier reply
    assert "cannot load" in said
    assert "input_norm" in said
    assert "publisher" in said

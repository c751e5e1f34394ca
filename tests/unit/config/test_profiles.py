"""What a device's profile requires of verl and vLLM, and what it does not support."""

import json
import sys
import types

import pytest

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.preflight import npu_found
from verl_aqn.preflight.prepare import _bound_context, prepare_model, tell_workers


def test_gpus_serve_weight_only_with_graphs_and_sleep_between_phases():
    rollout = load_recipe("e12", ["profile=cuda"]).actor_rollout_ref.rollout
    assert rollout.engine_kwargs.vllm.linear_backend == "marlin"
    assert rollout.enforce_eager is False
    assert (rollout.free_cache_engine, rollout.enable_sleep_mode) == (True, True)


@pytest.mark.parametrize("packed", [True, False])
def test_a_gpu_s_actor_needs_no_flash_attn(packed):
    """verl's default is FlashAttention 2, whose package no extra installs: a bf16 model is not loaded without it."""
    config = load_recipe("e12", ["profile=cuda", f"aqn.mxfp4.enabled={str(packed).lower()}"])
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"


def test_npus_are_eager_and_sleep_too():
    config = load_recipe("e12", ["profile=npu", "trainer.n_gpus_per_node=16"])
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.enforce_eager, rollout.engine_kwargs.vllm.block_size) == (True, 128)
    assert (rollout.free_cache_engine, rollout.enable_sleep_mode) == (True, True)
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("npu", 16)
    assert config.actor_rollout_ref.actor.fsdp_config.use_torch_compile is False


def test_a_packed_base_needs_an_adapter():
    """Otherwise verl discards the rollout's weights in its sleep (level 2) and replaces them by bf16 weights."""
    rank = "actor_rollout_ref.model.lora_rank=0"
    with pytest.raises(ConfigError, match=r"needs an adapter on the packed base.*lora_rank"):
        tell_workers(load_recipe("e12", ["profile=cuda", rank]))
    tell_workers(load_recipe("e12", ["profile=cuda", rank, "aqn.mxfp4.enabled=false"]))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.rollout.load_format=dummy", "set safetensors"),
        ("actor_rollout_ref.rollout.load_format=dummy_dtensor", "set safetensors"),
        ("actor_rollout_ref.rollout.data_parallel_size=2", "set 1"),
        ("trainer.v1.sampler.custom_sampler.path=mine.py", "verl's own sampler"),
        ("actor_rollout_ref.model.lora.merge=true", "set false"),
    ],
)
def test_what_could_not_be_read_back_is_refused(override, words, base, tmp_path):
    config = load_recipe("e12", ["profile=cpu", override, f"aqn.mxfp4.enabled={base}"])
    with pytest.raises(ConfigError, match=words) as error:
        prepare_model(config)
    assert override.partition("=")[0] in str(error.value)


@pytest.mark.parametrize(
    "override", ["trainer.v1.trainer_mode=colocate_async", "trainer.v1.trainer_mode=separate_async",
                 "actor_rollout_ref.rollout.name=sglang"],
)  # fmt: skip
def test_other_trainers_and_engines_than_ours_are_refused(override):
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=f"^{key} has '{value}': "):
        load_recipe("e12", ["profile=cpu", override])


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 32768}, 5121),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({}, 5121),
    ],
)
def test_the_context_is_that_of_the_answers_where_a_recipe_says_nothing(shape, length, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    lengths = ["data.max_prompt_length=1024", "data.max_response_length=4096"]
    rollout = load_recipe("e12", ["profile=cuda", *lengths]).actor_rollout_ref.rollout
    _bound_context(rollout, tmp_path)
    assert rollout.max_model_len == length
    rollout.max_model_len = 77
    _bound_context(rollout, tmp_path)
    assert rollout.max_model_len == 77


def test_noise_in_the_actor_is_refused_on_npus():
    with pytest.raises(ConfigError, match=r"rollout\+actor.*NPU"):
        tell_workers(load_recipe("e12", ["profile=npu", "aqn.noise.apply_to=rollout+actor"]))


def install(monkeypatch, chip: str, built: str) -> None:
    npu = types.SimpleNamespace(get_device_name=lambda: chip, device_count=lambda: 16)
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu=npu))
    build = types.SimpleNamespace(__device_type__=built)
    monkeypatch.setitem(sys.modules, "vllm_ascend", types.SimpleNamespace(_build_info=build))


def test_doctor_says_how_npus_serve_the_base_and_what_it_costs(monkeypatch):
    install(monkeypatch, "Ascend910_9392", "A3")
    rows = npu_found.examine()
    assert rows[0].found == "16 × Ascend910_9392 (A3)"
    assert rows[1].found == (
        "no MX units: dequantised to bf16 (same values), 2 GB for 1e9 weights instead of 0.53 GB "
        "(aqn.mxfp4.rollout_weight_format=int8: 1 GB; some values may be rounded)"
    )
    assert [row.fix for row in rows] == ["", "", ""]
    install(monkeypatch, "Ascend950PR_9589", "A5")
    rows = npu_found.examine()
    assert rows[1].found.startswith("packed, as W4A8_MXFP: 0.53 GB")
    assert not any(row.fix for row in rows)


def test_doctor_finds_a_vllm_ascend_of_another_chip_and_no_chip_at_all(monkeypatch):
    install(monkeypatch, "Ascend910_9392", "A2")  # PyPI's wheel on an A3
    (fault,) = [row.fix for row in npu_found.examine() if row.fix]
    assert "SOC_VERSION=ascend910_9392" in fault
    monkeypatch.delitem(sys.modules, "torch_npu")
    (row,) = npu_found.examine()
    assert "no Ascend device responds" in row.fix


@pytest.mark.parametrize(
    ("overrides", "workers", "storage"),
    [
        (["profile=cpu"], (1, 1), 1),
        (["profile=cuda"], (8, 8), 8),
        (["profile=npu", "trainer.nnodes=128"], (1024, 1024), 256),
        (["profile=cuda", "trainer.nnodes=2", "reward.num_workers=3"], (16, 3), 8),
    ],
)
def test_processes_beside_the_model_grow_with_the_nodes(overrides, workers, storage):
    config = load_recipe("e12", overrides)
    assert (config.actor_rollout_ref.rollout.agent.num_workers, config.reward.num_workers) == workers
    storages = config.transfer_queue.backend.SimpleStorage
    assert (storages.num_data_storage_units, storages.total_storage_size) == (storage, None)

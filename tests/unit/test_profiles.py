"""What a device's profile asks of verl and vLLM, and what it cannot have."""

import sys
import types

import pytest

from verl_aqn import ascend
from verl_aqn.config import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.prepare import tell_workers


def test_gpus_serve_weight_only_with_graphs_and_sleep_between_phases():
    rollout = load_recipe("e12", ["profile=cuda"]).actor_rollout_ref.rollout
    assert rollout.engine_kwargs.vllm.linear_backend == "marlin"
    assert rollout.enforce_eager is False
    assert (rollout.free_cache_engine, rollout.enable_sleep_mode) == (True, True)


def test_npus_are_eager_and_sleep_too():
    config = load_recipe("e12", ["profile=npu", "trainer.n_gpus_per_node=16"])
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.enforce_eager, rollout.engine_kwargs.vllm.block_size) == (True, 128)
    assert (rollout.free_cache_engine, rollout.enable_sleep_mode) == (True, True)
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("npu", 16)
    assert config.actor_rollout_ref.actor.use_torch_compile is False


@pytest.mark.parametrize("override", ["lora_rank=0", "lora.merge=true"])
def test_a_packed_base_needs_an_adapter_that_stays_one(override):
    """Otherwise verl discards the rollout's weights in its sleep (level 2) and sends others, in bf16, for them."""
    config = load_recipe("e12", ["profile=cuda", f"actor_rollout_ref.model.{override}"])
    with pytest.raises(ConfigError, match=r"needs an adapter beside the packed base.*lora_rank"):
        tell_workers(config)
    tell_workers(load_recipe("e12", ["profile=cuda", f"actor_rollout_ref.model.{override}", "aqn.mxfp4.enabled=false"]))


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
    rows = ascend.examine()
    assert rows[0].found == "16 × Ascend910_9392 (A3)"
    assert rows[1].found == "no MX units: as the exact bf16 equal, 2 GB for 1e9 weights instead of 0.53 GB"
    assert [row.fix for row in rows] == ["", "", ""]
    install(monkeypatch, "Ascend950PR_9589", "A5")
    rows = ascend.examine()
    assert rows[1].found.startswith("packed, as W4A4_MXFP4: 0.53 GB")
    assert not any(row.fix for row in rows)


def test_doctor_finds_a_vllm_ascend_of_another_chip_and_no_chip_at_all(monkeypatch):
    install(monkeypatch, "Ascend910_9392", "A2")  # PyPI's wheel on an A3
    (fault,) = [row.fix for row in ascend.examine() if row.fix]
    assert "SOC_VERSION=ascend910_9392" in fault
    monkeypatch.delitem(sys.modules, "torch_npu")
    (row,) = ascend.examine()
    assert "no Ascend device answers" in row.fix

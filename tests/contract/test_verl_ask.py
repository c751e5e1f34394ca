"""verl's own checks, called before a run: they reject what verl would reject later, and accept every shipped recipe."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tests.helpers.composed import recipe_with
from verl_aqn.cache import cache_dir
from verl_aqn.config.allowed import REWARD_MANAGERS
from verl_aqn.config.compose import recipe_names
from verl_aqn.integrations.verl.ask_verl import faults
from verl_aqn.preflight import verl_says

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GROUPS = ["algorithm.filter_groups.enable=true"]


def say(*overrides: str, recipe: str = "e12") -> list[str]:
    config = recipe_with(recipe, *overrides)
    found = faults(OmegaConf.create(json.loads(json.dumps(verl_says.question(config)))))
    return [f"{one['what']}: {one['found']}: {one['fix']}" for one in found]


@pytest.mark.parametrize("recipe", recipe_names())
def test_verl_refuses_no_shipped_recipe(recipe):
    assert say(recipe=recipe) == []
    assert say("experiment=gsm8k", recipe=recipe) == []


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "gpg"])
def test_estimators_that_verl_s_trainer_can_compute_are_taken(name):
    assert say(f"algorithm.adv_estimator={name}") == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.adv_estimator=remax"], ["algorithm.adv_estimator=remax", "reward_baselines", "grpo, "]),
        (["algorithm.adv_estimator=rlo"], ["algorithm.adv_estimator=rlo", "rloo"]),
        (["algorithm.adv_estimator=gdpo"], ["algorithm.adv_estimator=gdpo", "gdpo_reward_keys"]),
        (["algorithm.adv_estimator=optimal_token_baseline"], ["sum_pi_squared"]),
        (["algorithm.adv_estimator=grpo_passk", f"{ROLLOUT}.n=1"], ["at least 2 samples"]),
        ([f"{ACTOR}.policy_loss.loss_mode=vanila"], [f"{ACTOR}.policy_loss.loss_mode=vanila", "vanilla"]),
        ([f"{ACTOR}.policy_loss.loss_mode=dro"], ["dro_beta"]),
        ([f"{ACTOR}.loss_agg_mode=mean"], ["actor_rollout_ref", "Invalid loss_agg_mode: mean"]),
        ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=k9"], [f"{ACTOR}.kl_loss_type=k9", "low_var_kl"]),
        (["algorithm.use_kl_in_reward=true", "algorithm.kl_penalty=k9"], ["algorithm.kl_penalty=k9", "low_var_kl"]),
        (["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=a"], ["algorithm.kl_ctrl.type=a", "adaptive"]),
        (["algorithm.rollout_correction.rollout_is=all"], ["algorithm.rollout_correction", "rollout_is"]),
        ([*GROUPS, "algorithm.filter_groups.metric=null"], ["algorithm.filter_groups.metric"]),
        ([*GROUPS, "+algorithm.filter_groups.max_inflight_gen_batches=0"], ["max_inflight_gen_batches"]),
        ([f"{ROLLOUT}.agent.default_agent_loop=tool"], [f"{ROLLOUT}.agent.default_agent_loop=tool", "tool_agent"]),
        ([f"{ROLLOUT}.mode=sync"], [ROLLOUT, "mode"]),
        ([f"{ACTOR}.use_dynamic_bsz=false"], ["actor.ppo_micro_batch_size"]),
        ([f"{ACTOR}.optim.lr_scheduler_type=linear"], ["lr_scheduler_type", "cosine"]),
        ([f"{ACTOR}.ulysses_sequence_parallel_size=2"], ["use_remove_padding"]),
        (["reward.reward_kwargs.overlong_buffer_cfg.len=25"], ["reward.reward_kwargs", "max_resp_len"]),
        (
            ["reward.reward_manager.source=importlib", "reward.reward_manager.module.path=pkg://collections",
             "reward.reward_manager.name=OrderedDict"],
            ["reward.reward_manager", "OrderedDict", "RewardManagerBase"],
        ),
    ],
)  # fmt: skip
def test_what_would_end_a_run_is_refused_by_name(overrides, words):
    said = say(*overrides)
    assert said, "nothing refused"
    assert all(word in said[0] for word in words), said
    assert "\n" not in said[0]


def test_the_reward_managers_are_those_of_verl_s_register():
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    assert tuple(sorted(REWARD_MANAGER)) == REWARD_MANAGERS
    for name in REWARD_MANAGERS:
        assert say(f"reward.reward_manager.name={name}") == []


def test_verl_is_asked_in_a_process_of_its_own_and_its_yes_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    config = recipe_with("e12", "algorithm.adv_estimator=remax")
    (finding,) = verl_says.check_verl(config)
    assert "reward_baselines" in finding.found
    assert not list(tmp_path.rglob("verl/*"))
    config.algorithm.adv_estimator = "rloo"
    (finding,) = verl_says.check_verl(config)
    assert (finding.fix, len(list(tmp_path.rglob("verl/*")))) == ("", 1)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    config.data.train_files, config.trainer.save_freq = "other.parquet", 3
    assert [one.fix for one in verl_says.check_verl(config)] == [""]
    monkeypatch.undo()
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    config.algorithm.adv_estimator = "gpg"
    assert "could not be asked" in next(iter(verl_says.check_verl(config))).found

"""Groups with equal rewards are counted, and a run with only such groups ends with a reason."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, TrainingError
from verl_aqn.integrations.verl import trainer as trainer_module
from verl_aqn.integrations.verl.groups import check_refill, count_groups, remedy
from verl_aqn.preflight.prepare import check_steps


def config(**noise) -> OmegaConf:
    overrides = [f"aqn.noise.{key}={value}" for key, value in noise.items()]
    return load_recipe("e12", ["profile=cuda", "data.train_batch_size=4", *overrides])


def test_groups_are_counted_by_prompt():
    uids = ["a", "b", "a", "b", "c", "c", "alone"]
    assert count_groups(uids, [1, 0, 1, 1, 0, 0, 1]) == (3, 2)


def test_a_refill_within_the_limit_is_let_through():
    check_refill(Counter({0.0: 39}), 39, config(), step=4, sigma=0.05)


def test_groups_that_fail_without_end_stop_a_run_too():
    with pytest.raises(TrainingError, match=r"^step 4: generation or reward of 40 groups failed .*training\.log$"):
        check_refill(Counter(), 40, config(), step=4, sigma=0.05)


@pytest.mark.parametrize(
    ("thrown_away", "sigma", "noise", "words"),
    [
        ({0.0: 40}, 0.05, {}, r"sigma_start \(0\.05 absolute; `verl-aqn probe`.* set aqn\.noise\.target_kl=.* easier"),
        ({0.0: 40}, 0.05, {"unit": "rms"}, r"lower aqn\.noise\.sigma_start \(0\.05 rms;"),
        ({0.0: 40}, 0.05, {"target_kl": 0.3}, r": lower aqn\.noise\.target_kl \(0\.3 nats per token\), or use easier"),
        ({0.0: 40}, 0.0, {}, r"mean acc 0\.000, .*: use easier prompts"),
        ({1.0: 38, 0.0: 2}, 0.05, {}, r"mean acc 0\.950.*use harder prompts"),
    ],
)
def test_refills_without_end_stop_with_one_line(thrown_away, sigma, noise, words):
    with pytest.raises(TrainingError, match=words) as error:
        check_refill(Counter(thrown_away), 0, config(**noise), step=4, sigma=sigma)
    assert str(error.value).startswith("step 4: 40 groups had no variance in acc")
    assert f"σ {sigma:g}" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_limit_is_refused_before_the_run():
    recipe = load_recipe("e12", ["profile=cuda", "algorithm.filter_groups.max_num_gen_batches=0"])
    with pytest.raises(ConfigError, match="would draw prompts without limit"):
        check_steps(recipe, 7473)
    check_steps(load_recipe("e12", ["profile=cuda"]), 7473)
    failing = ["algorithm.filter_groups.enable=false", "trainer.v1.sampler.sync_refill_failed_groups=true"]
    recipe = load_recipe("e12", ["profile=cuda", "algorithm.filter_groups.max_num_gen_batches=0", *failing])
    with pytest.raises(ConfigError, match="would draw prompts without limit"):
        check_steps(recipe, 7473)


class Data(dict):
    def to_padded_tensor(self):
        return self


def step_figures(
    monkeypatch,
    rewards: list[float],
    *,
    critic: bool = False,
    queued: dict | None = None,
    correction: dict | None = None,
) -> tuple[dict, list[str]]:
    """Return the trainer's metrics and warnings for two prompts × two responses, after three discarded groups."""
    responses = torch.nested.nested_tensor([torch.ones(2)] * 4, layout=torch.jagged)
    scores = torch.tensor([[0.0, reward] for reward in rewards])
    there = Data(responses=responses, rm_scores=scores, loss_mask=torch.ones(4, 2), **(queued or {}))

    def get(select_fields, **_):
        return Data({name: there[name] for name in select_fields if name in there})

    monkeypatch.setattr("verl_aqn.integrations.verl.batches.transfer_queue.kv_batch_get", get)
    trainer, warned = trainer_module.AqnTrainer.__new__(trainer_module.AqnTrainer), []
    trainer.use_critic, trainer.global_steps, trainer.noise_metrics = critic, 7, {"aqn/sigma": 0.05}
    trainer.replay_buffer = SimpleNamespace(thrown_away=Counter({0.0: 3}))
    trainer.warn, trainer.config, trainer.aqn = warned.append, config(), parse_aqn(config())
    trainer.config.algorithm.rollout_correction = correction
    trainer.clean_logp = {}
    keys, tags = ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0"], [{}, {}, {}, {}, {"is_padding": True}]
    batch = SimpleNamespace(keys=keys, tags=tags, partition_id="train")
    surplus = {"training/filter_groups/discarded_surplus_samples": 1}
    return trainer.group_and_mismatch_metrics(batch, surplus), warned


def test_what_the_filter_threw_away_is_counted_too(monkeypatch):
    figures, warned = step_figures(monkeypatch, [1.0, 0.0, 1.0, 1.0])
    counts = {"aqn/groups": 2 + 3 + 1, "aqn/groups_without_variance": 1 + 3}
    assert figures == counts | {"response_length/clip_ratio": 0}  # the responses have 2 of 8 tokens
    assert not warned


def test_a_step_that_teaches_nothing_is_warned_of_unless_there_is_a_critic(monkeypatch):
    _, (warning,) = step_figures(monkeypatch, [0.0] * 4)
    assert warning.startswith(
        "step 7: the rewards differ in no group, so there is no gradient (σ 0.05, mean reward 0.000)"
    )
    assert "lower aqn.noise.sigma_start (0.05 absolute;" in warning
    assert not step_figures(monkeypatch, [0.0] * 4, critic=True)[1]


def test_the_advice_for_rewards_that_do_not_differ_names_the_key_that_decides_sigma():
    noise = parse_aqn(load_recipe("kl_control", ["profile=cpu"])).noise
    assert remedy(0.1, 0.2, noise) == (
        "lower aqn.noise.control.value or sigma_max (0.1 rms), or use easier prompts (worked examples help)"
    )


def log_probs() -> dict[str, torch.Tensor]:
    """Return log-probs of a step, of which half of the tokens differ by 1 nat between rollout and trainer."""
    rollout = torch.tensor([[-1.0, -2.0]] * 4)
    return {"rollout_log_probs": rollout, "old_log_probs": rollout - torch.tensor([0.0, 1.0]), "entropy": rollout}


def test_tokens_that_verl_rejects_count_in_the_mismatch(monkeypatch):
    """verl rejects tokens because of their mismatch, so without them the figures would contradict the evidence."""
    logp, kept = log_probs(), torch.ones(4, 2)
    data = DataProto.from_dict(tensors={**logp, "response_mask": kept})
    rule = {"rollout_is": None, "rollout_rs": "token_k1", "rollout_rs_threshold": 1.5, "bypass_mode": False}
    after, _ = compute_rollout_correction_and_add_to_batch(data, OmegaConf.create(rule))
    assert int(after.batch["response_mask"].sum()) == 4, "verl must have rejected half of the tokens"
    queued = {**logp, "response_mask": after.batch["response_mask"]}
    figures, _ = step_figures(monkeypatch, [1.0, 0.0, 1.0, 0.0], queued=queued, correction=rule)
    assert (figures["aqn/mismatch/tokens"], figures["aqn/mismatch/abs_dlogp_mean"]) == (8, 0.5)


def test_a_step_in_bypass_mode_has_no_figures_of_the_mismatch(monkeypatch):
    """The trainer's log-probs were computed for the checks of the first step, and then replaced by the rollout's."""
    logp = log_probs()
    queued = {**logp, "old_log_probs": logp["rollout_log_probs"]}
    figures, _ = step_figures(monkeypatch, [1.0, 0.0, 1.0, 0.0], queued=queued, correction={"bypass_mode": True})
    assert not any(name.startswith("aqn/mismatch") for name in figures)

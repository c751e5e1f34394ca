"""GRPO, DAPO, PPO with a critic, RLOO, REINFORCE++, GSPO and CISPO, one or two steps each on a tiny model.

A run that cannot learn reports the reason.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import constant_reward
from tests.integration.conftest import compared, leftovers, lines, newest
from verl_aqn.evaluation.export.fsdp_adapter import read_adapter

SHORT = ["trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1"]
ONE_STEP = ["trainer.total_training_steps=1", "aqn.noise.num_stages=1", *SHORT]
TWO_STEPS = ["trainer.total_training_steps=2", "aqn.noise.num_stages=2", *SHORT]  # σ 0, then σ_start

SPLIT = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"]


@pytest.fixture
def run(train, tmp_path):
    """`run(recipe, *overrides)` → (exit code, standard error as one line, run folder)."""

    def start(recipe: str, *overrides: str) -> tuple[int, str, Path]:
        before = leftovers()
        process = train(tmp_path, *overrides, recipe=recipe)
        _, err = process.communicate(timeout=800)
        assert leftovers() == before
        return process.returncode, err.replace("\n", " "), newest(tmp_path)

    return start


def steps_of(outcome: tuple[int, str, Path]) -> list[dict]:
    code, err, folder = outcome
    assert code == 0, err + (folder / "training.log").read_text()[-3000:]
    return [record["metrics"] for record in lines(folder / "metrics.jsonl", "step")]


def test_grpo_on_two_ranks_with_correction_and_a_warning_where_top_p_biases_it(run):
    """Two actor ranks share the base; there are two rollout replicas. All have the same base, adapter and noise."""
    top_p, two = "actor_rollout_ref.rollout.top_p=0.95", "trainer.n_gpus_per_node=2"
    in_actor = "aqn.noise.apply_to=rollout+actor"
    saved = "trainer.save_freq=2"
    options = ["algorithm.filter_groups.enable=false", "correction=tis", top_p, two, in_actor, saved]
    outcome = run("grpo", *TWO_STEPS, *options)
    _, step = steps_of(outcome)
    evidence = outcome[2] / "evidence.jsonl"
    noise = [record for record in lines(evidence, "noise") + lines(evidence, "actor noise") if record["sigma_target"]]
    assert [(record["kind"], record["ranks"]) for record in noise] == [("noise", [0, 1]), ("actor noise", [0, 1])]
    assert len({record["weights_digest"] for record in noise}) == 1
    (start, end), adapter = lines(evidence, "base"), lines(evidence, "adapter")[-1]
    assert [len(start["actor"]), len(start["rollout"]), adapter["actual"][0]["ranks"]] == [2, 2, [0, 1]]
    assert read_adapter(outcome[2] / "checkpoints/global_step_2/actor").digest() == adapter["sent"]
    assert {*start["actor"], *end["actor"], *(answer["base_digest"] for answer in end["rollout"])} == {start["disk"]}
    validations = lines(outcome[2] / "metrics.jsonl", "validation")
    assert [record["step"] for record in validations] == [2]  # the last step's, with test_freq=-1
    assert step["actor/kl_loss"] >= 0
    assert step["actor/grad_norm"] > 0
    assert step["aqn/groups"] == 2
    assert 0 < step["rollout_corr/rollout_is_mean"] < step["rollout_corr/rollout_is_max"] <= 2
    _, err, folder = outcome
    (warning,) = lines(folder / "events.jsonl", "warning")
    assert "rollout_correction.rollout_is is biased" in warning["text"]
    assert "warning: rollout.top_p=0.95" in err
    # Scored sequences would not be comparable with what top_p left over.
    assert "aqn/mismatch/kl_k3" in step
    assert "aqn/mismatch/rescored_tokens" not in step


def test_dapo_on_a_tensor_parallel_rollout_tells_noise_from_kernels_and_validates_without_noise(run):
    strong = ["aqn.noise.sigma_start=2", "actor_rollout_ref.actor.optim.lr=0"]  # the policy does not change
    validated = ["trainer.val_before_train=true", "trainer.test_freq=2"]
    outcome = run("dapo", *TWO_STEPS, "aqn.mismatch.rescore=2", *strong, *validated, *SPLIT)
    clean, noisy = steps_of(outcome)
    before, after = (
        {
            record["input"]: (record["output"], record["acc"])
            for record in lines(outcome[2] / f"validation/{step}.jsonl")
        }
        for step in (0, 2)
    )
    assert len(before) == 4
    assert after == before  # greedy, token for token
    start, adapter = (
        lines(outcome[2] / "evidence.jsonl", "base")[0],
        lines(outcome[2] / "evidence.jsonl", "adapter")[-1],
    )
    assert [answer["sliced"]["matrices"] for answer in start["rollout"]] == [14, 14]
    assert len({start["disk"], *(answer["base_digest"] for answer in start["rollout"])}) == 3
    assert len({adapter["sent"], *(answer["adapter_digest"] for answer in adapter["actual"])}) == 3
    for step in (clean, noisy):
        assert step["aqn/groups"] >= 2 + step["aqn/groups_without_variance"]
        assert 0 < step["aqn/mismatch/rescored_tokens"] <= step["aqn/mismatch/tokens"] / 1.5
        assert step["aqn/mismatch/kernels/abs_dlogp_mean"] < 0.05
        assert step["aqn/mismatch/trainer_entropy"] > 0
    assert clean["aqn/sigma"] == 0
    assert clean["aqn/mismatch/noise/abs_dlogp_mean"] < 0.05  # what decoding and scoring differ by
    assert noisy["aqn/sigma"] == 2
    assert noisy["aqn/mismatch/noise/abs_dlogp_mean"] > 5 * clean["aqn/mismatch/noise/abs_dlogp_mean"]
    assert noisy["aqn/mismatch/noise/abs_dlogp_mean"] > 5 * noisy["aqn/mismatch/kernels/abs_dlogp_mean"]
    assert noisy["aqn/mismatch/kl_k3"] > 5 * clean["aqn/mismatch/kl_k3"]


def test_ppo_trains_a_critic_on_the_packed_base_with_noise_in_the_actor_too(run):
    fast = ["critic.optim.lr=1e-2", "critic.optim.lr_warmup_steps=0", "trainer.save_freq=1"]
    in_actor = ["aqn.noise.apply_to=rollout+actor", "aqn.mismatch.rescore=2"]
    some = "actor_rollout_ref.model.target_modules=[q_proj,v_proj]"  # of what vLLM fuses in one layer
    rank = "actor_rollout_ref.model.lora_rank=16"
    outcome = run("ppo", *TWO_STEPS, "algorithm.filter_groups.enable=false", *fast, *in_actor, some, rank)
    assert [answer["modules"] for answer in lines(outcome[2] / "evidence.jsonl", "adapter")[-1]["actual"]] == [4]
    first, second = steps_of(outcome)
    # Actor and rollout have the same noise, so the remaining mismatch comes from the kernels.
    (rollout,) = [record for record in lines(outcome[2] / "evidence.jsonl", "noise") if record["sigma_target"]]
    (actor,) = [record for record in lines(outcome[2] / "evidence.jsonl", "actor noise") if record["sigma_target"]]
    assert actor["weights_digest"] == rollout["weights_digest"] != rollout["clean_digest"]
    assert [record["uses"] > 0 for record in lines(outcome[2] / "evidence.jsonl", "actor clean")] == [False, True]
    assert second["aqn/mismatch/noise/abs_dlogp_mean"] > 0.1
    assert second["aqn/mismatch/abs_dlogp_mean"] < 0.05
    assert second["aqn/mismatch/kernels/abs_dlogp_mean"] < 0.05
    assert first["critic/values/mean"] == 0  # the value head starts from 0 …
    assert second["critic/values/mean"] != 0  # … and has learned
    assert first["critic/grad_norm"] > 0
    assert second["actor/grad_norm"] > 0
    saved = [
        torch.load(outcome[2] / f"checkpoints/global_step_{n}/critic/model_world_size_1_rank_0.pt", weights_only=False)
        for n in (1, 2)
    ]
    trained = {name for name in saved[0] if "lora_" in name or name.endswith("adapter_row")}
    assert trained == set(saved[0]), "a critic's checkpoint holds adapters and value head only"
    assert sum(name.endswith("adapter_row") for name in trained) == 1
    for part in ("adapter_row", "lora_B"):
        assert any(not torch.equal(saved[0][n].full_tensor(), saved[1][n].full_tensor()) for n in trained if part in n)


@pytest.mark.parametrize(
    ("recipe", "estimator", "modules", "rank", "more"),
    [
        ("gspo", "rloo", "all-linear", 8, ["experiment=embedded_3", "aqn.mxfp4.keep.worst=0.2"]),
        ("cispo", "reinforce_plus_plus", "[o_proj]", 64, ["experiment=embedded_2"]),
    ],
)
def test_an_estimator_with_kl_in_the_reward_beside_a_loss_of_another_kind(run, recipe, estimator, modules, rank, more):
    """The recipes `rloo` and `reinforce_plus_plus` differ from these only in the loss, so two runs cover four."""
    kl = ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.5"]
    model = [f"actor_rollout_ref.model.target_modules={modules}", f"actor_rollout_ref.model.lora_rank={rank}"]
    options = [f"algorithm.adv_estimator={estimator}", *kl, *model, *more, "algorithm.filter_groups.enable=false"]
    outcome = run(recipe, *TWO_STEPS, *options)
    first, second = steps_of(outcome)
    assert first["actor/reward_kl_penalty"] == pytest.approx(0, abs=1e-3)  # a new adapter is the base
    assert second["actor/reward_kl_penalty"] > 1e-3
    assert second["critic/rewards/mean"] != pytest.approx(second["critic/score/mean"], abs=1e-4)
    assert min(first["actor/grad_norm"], second["actor/grad_norm"]) > 0
    (answer,) = lines(outcome[2] / "evidence.jsonl", "adapter")[-1]["actual"]
    assert answer["modules"] == (14 if modules == "all-linear" else 2)
    said, start = compared(outcome[2])
    left = json.loads((outcome[2] / "quantization.json").read_text())["left_in_16_bits"]
    kept = len(left) - 1  # without the head
    assert bool(kept) == ("aqn.mxfp4.keep.worst=0.2" in more)
    assert f"{14 - kept} packed matrices" in said
    assert (f"{kept} 16-bit matrices" in said) == bool(kept), said  # layers that are kept are read back, too
    assert start["disk"] == start["rollout"][0]["base_digest"]
    (rows,) = [one for one in lines(outcome[2] / "events.jsonl", "rows") if one["set"] == "train"]
    assert (rows["files"], rows["kept"]) == (2048, 16)


def test_a_run_whose_groups_never_differ_stops_and_says_why(run):
    reward = "reward.custom_reward_function"
    constant = [f"{reward}.path={constant_reward.__file__}", f"{reward}.name=constant"]
    limits = ["algorithm.filter_groups.max_num_gen_batches=2", "reward.reward_kwargs.overlong_buffer_cfg.enable=false"]
    code, err, folder = run("dapo", *ONE_STEP, *constant, *limits)
    assert code == 1
    assert "groups had no variance in score and were discarded (σ 0.05, mean score 0.000" in err
    assert "lower aqn.noise.sigma_start" in err
    assert "Traceback" not in err
    assert not lines(folder / "metrics.jsonl", "step")

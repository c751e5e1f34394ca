"""Mismatch figures against sums written out token by token, and the meaning of their parts."""

import math
import re

import pytest
import torch
from omegaconf import OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.integrations.verl.token_mismatch import (
    can_rescore,
    clip_range,
    gap,
    mismatch_metrics,
    scored_again,
    split_metrics,
    step_metrics,
)
from verl_aqn.preflight.prepare import warnings_of

CLIP = (0.2, 0.25)


def logp(seed: int, tokens: int = 301) -> torch.Tensor:
    return -torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) * 4


def test_gap_is_the_sum_written_out():
    rollout, other = logp(0), logp(0) + 0.3 * (logp(1) + 2)
    d = [float(a) - float(b) for a, b in zip(rollout, other, strict=True)]
    found = gap(rollout, other, CLIP)
    assert found["abs_dlogp_mean"] == pytest.approx(sum(map(abs, d)) / len(d))
    assert found["abs_dlogp_p99"] == pytest.approx(sorted(map(abs, d))[297])  # 0.99 · 300
    assert found["kl_k3"] == pytest.approx(sum(math.exp(-x) - 1 + x for x in d) / len(d))
    assert found["clipped_share"] == pytest.approx(sum(not 0.8 <= math.exp(-x) <= 1.25 for x in d) / len(d))
    assert 0 < found["clipped_share"] < 1


def test_a_step_may_have_more_tokens_than_torch_has_quantiles_of():
    logp = torch.zeros(2**24 + 1)
    assert gap(logp, logp, CLIP)["abs_dlogp_p99"] == 0.0


def test_equal_probabilities_give_no_gap():
    assert set(gap(logp(0), logp(0), CLIP).values()) == {0.0}


@pytest.mark.parametrize(("ratio", "clipped"), [(0.79, 1.0), (0.81, 0.0), (1.24, 0.0), (1.26, 1.0)])
def test_ratio_is_the_trainer_s_over_the_rollout_s(ratio, clipped):
    rollout = torch.tensor([-1.0])
    assert gap(rollout, rollout + math.log(ratio), CLIP)["clipped_share"] == clipped


def test_k3_estimates_the_kl_of_the_policy_that_sampled():
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(50, generator=generator).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(p.exp(), 400_000, replacement=True, generator=generator)
    true = (p.exp() * (p - q)).sum().item()
    assert gap(p[tokens], q[tokens], CLIP)["kl_k3"] == pytest.approx(true, rel=0.05)


def test_entropies_are_of_rollout_and_trainer():
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(50, generator=generator).log_softmax(0)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    found = mismatch_metrics(p[tokens], p[tokens] - 0.5, torch.full((200_000,), 1.5), CLIP)
    assert found["aqn/mismatch/rollout_entropy_sampled"] == pytest.approx(-(p.exp() * p).sum().item(), rel=0.01)
    assert found["aqn/mismatch/trainer_surprisal"] == pytest.approx(found["aqn/mismatch/rollout_entropy_sampled"] + 0.5)
    assert found["aqn/mismatch/trainer_entropy"] == 1.5
    assert found["aqn/mismatch/tokens"] == 200_000


def test_split_gives_each_cause_its_own():
    noisy = logp(5)
    only_noise = split_metrics(noisy, noisy - 0.4, noisy - 0.4, CLIP)
    assert only_noise["aqn/mismatch/noise/abs_dlogp_mean"] == pytest.approx(0.4)
    assert only_noise["aqn/mismatch/kernels/abs_dlogp_mean"] == 0
    only_kernels = split_metrics(noisy, noisy, noisy + 0.01, CLIP)
    assert only_kernels["aqn/mismatch/noise/kl_k3"] == 0
    assert only_kernels["aqn/mismatch/kernels/abs_dlogp_mean"] == pytest.approx(0.01, rel=1e-4)
    assert only_kernels["aqn/mismatch/rescored_tokens"] == 301
    noise_in_both = split_metrics(noisy, noisy - 0.4, noisy + 0.01, CLIP, noisy_trainer=True)
    assert noise_in_both["aqn/mismatch/noise/abs_dlogp_mean"] == pytest.approx(0.4)
    assert noise_in_both["aqn/mismatch/kernels/abs_dlogp_mean"] == pytest.approx(0.01, rel=1e-4)


def test_step_reads_response_tokens_only_and_finds_rescored_samples_by_name():
    nan = float("nan")  # values outside the mask must not matter
    data = {
        "response_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "rollout_log_probs": torch.tensor([[-1.0, -2.0, nan], [-1.0, -1.0, -3.0]]),
        "old_log_probs": torch.tensor([[-1.0, -2.0, nan], [-1.0, -1.5, -3.0]]),
        "entropy": torch.tensor([[1.0, 1.0, nan], [1.0, 1.0, 6.0]]),
    }
    found = step_metrics(data, ["a", "b"], {"b": [-1.0, -1.4]}, CLIP)  # there was no room to score the last token
    assert found["aqn/mismatch/tokens"] == 5
    assert found["aqn/mismatch/abs_dlogp_mean"] == pytest.approx(0.1)
    assert found["aqn/mismatch/trainer_entropy"] == pytest.approx(2.0)
    assert found["aqn/mismatch/rescored_tokens"] == 2
    assert found["aqn/mismatch/noise/abs_dlogp_mean"] == pytest.approx(0.2)
    assert found["aqn/mismatch/kernels/abs_dlogp_mean"] == pytest.approx(0.05)
    assert not any("rescored" in name for name in step_metrics(data, ["a", "b"], {}, CLIP))


def test_one_in_so_many_is_scored_again_and_at_least_one():
    assert scored_again(list("abcdefgh"), 4) == ["a", "e"]
    assert scored_again(["a", "b"], 16) == ["a"]
    assert scored_again(["a", "b"], 0) == []


@pytest.mark.parametrize(
    ("change", "comparable"),
    [({}, True), ({"temperature": 0.8}, False), ({"top_p": 0.9}, False), ({"top_k": 20}, False)],
)
def test_only_plain_sampling_is_comparable_with_a_scored_sequence(change, comparable):
    plain = {"calculate_log_probs": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
    assert can_rescore(OmegaConf.create(plain | change)) is comparable


def test_clip_range_falls_back_to_the_symmetric_one():
    assert clip_range(load_recipe("e12", ["profile=cpu"]).actor_rollout_ref.actor) == (0.2, 0.25)
    plain = OmegaConf.create({"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None})
    assert clip_range(plain) == (0.1, 0.1)


TOP_P, TOP_K = "actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.top_k=20"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], None),
        (["correction=tis"], None),
        ([TOP_P, "correction=tis"], "top_p=0.9: .*ratio of rollout_correction.rollout_is is biased"),
        ([TOP_K, "correction=tis"], "top_k=20: .*biased"),
        ([TOP_P, "algorithm.rollout_correction.bypass_mode=true"], "bypass_mode is biased"),
        ([TOP_P], "noise cannot be separated from kernels"),
    ],
)
def test_cut_off_sampling_is_warned_of(overrides, words):
    found = warnings_of(load_recipe("e12", ["profile=cpu", *overrides]))
    assert len(found) == (words is not None)
    if words:
        assert re.search(words, found[0])
        assert "\n" not in found[0]

"""The tripwire: which comparison a step allows, what is measured, and when a run warns or stops."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import MismatchConfig, parse_aqn
from verl_aqn.errors import ConfigError, EvidenceError
from verl_aqn.integrations.verl import tripwire

CLIP = (0.2, 0.25)
PLAIN = {"calculate_log_probs": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
LIMITS = MismatchConfig()


def found(mean: float, tokens: int = 64, error: float = 0.0) -> dict:
    return {
        "tokens": tokens,
        "abs_dlogp_mean": mean,
        "abs_dlogp_error": error,
        "abs_dlogp_p99": 3 * mean,
        "clipped_share": 0.5,
    }


@pytest.mark.parametrize(
    ("change", "sigma", "noisy_actor", "source"),
    [
        ({}, 0.0, False, "sampled"),
        ({}, 0.05, False, "rescored"),
        ({}, 0.05, True, "sampled"),
        ({"temperature": 0.8}, 0.0, False, "sampled"),
        ({"temperature": 0.8}, 0.05, False, None),
        ({"top_p": 0.9}, 0.0, False, "rescored"),
        ({"top_p": 0.9, "temperature": 0.8}, 0.0, False, None),
        ({"top_k": 20}, 0.0, True, "rescored"),
        ({"top_k": 20}, 0.05, True, None),  # samples with noise cannot be compared with a rollout without
        ({"calculate_log_probs": False}, 0.0, False, "rescored"),
    ],
)
def test_a_step_is_compared_by_what_is_comparable_in_it(change, sigma, noisy_actor, source):
    assert tripwire.source_of(OmegaConf.create(PLAIN | change), sigma, noisy_actor) == source


def batch() -> dict[str, torch.Tensor]:
    nan = float("nan")  # outside the mask
    return {
        "response_mask": torch.tensor([[1, 1, 0], [1, 0, 1]]),  # the second has a tool's token in its middle
        "rollout_log_probs": torch.tensor([[-1.0, -2.0, nan], [-1.0, nan, -3.0]]),
        "old_log_probs": torch.tensor([[-1.0, -2.4, nan], [-1.0, nan, -3.0]]),
    }


def test_sampled_tokens_are_compared_where_the_mask_says_so():
    measured = tripwire.measure(batch(), ["a", "b"], {}, "sampled", CLIP)
    assert (measured["source"], measured["tokens"]) == ("sampled", 4)
    assert measured["abs_dlogp_mean"] == pytest.approx(0.1)


def test_rescored_tokens_are_found_by_name_and_the_noisy_ones_are_not_looked_at():
    data = batch()
    data["rollout_log_probs"].fill_(-100.0)
    measured = tripwire.measure(data, ["a", "b"], {"b": [-1.0, -7.0, -2.0]}, "rescored", CLIP)
    assert measured["tokens"] == 2
    assert measured["abs_dlogp_mean"] == pytest.approx(0.5)
    assert tripwire.measure(data, ["a", "b"], {}, "rescored", CLIP) is None


@pytest.mark.parametrize("mean", [1.01, math.inf, math.nan])
def test_a_run_stops_above_the_limit_and_where_there_is_no_number(mean):
    with pytest.raises(
        EvidenceError, match=r"step 1: .*aqn\.mismatch\.stop=1: the weights were not updated; likely causes: .*window"
    ) as told:
        tripwire.judge(found(mean), 1, [], LIMITS, "separate rows")
    assert "\n" not in str(told.value)
    assert "separate rows" in str(told.value)


def test_a_run_is_warned_of_once_and_healthy_ones_are_not():
    assert tripwire.judge(found(0.06), 1, [], LIMITS) is None
    assert "aqn.mismatch.warn=0.2" in (tripwire.judge(found(0.3), 1, [], LIMITS) or "")
    assert tripwire.judge(found(0.3), 2, [0.3], LIMITS) is None
    assert "aqn.mismatch.warn=0.2" in (tripwire.judge(found(0.3), 3, [0.19, 0.19], LIMITS) or "")


def test_a_mean_of_few_tokens_has_to_be_clearly_above_a_limit():
    assert tripwire.judge(found(1.2, tokens=8, error=1.1), 5, [0.01], LIMITS) is None
    assert "0.4 ± 0.1 nats" in (tripwire.judge(found(0.4, error=0.1), 5, [0.01], LIMITS) or "")
    data = {name: torch.zeros(1, 4) for name in ("rollout_log_probs", "old_log_probs")}
    data |= {"response_mask": torch.ones(1, 4)}
    data["old_log_probs"][0] = torch.tensor([1.0, 3.0, 1.0, 3.0])
    measured = tripwire.measure(data, ["a"], {}, "sampled", CLIP)
    assert (measured["abs_dlogp_mean"], measured["abs_dlogp_error"]) == (2.0, pytest.approx(1.96 / 2))


def test_a_later_step_is_held_against_the_first_ones():
    first = [0.01, 0.012, 0.011]
    assert tripwire.judge(found(0.04), 9, [*first, 0.04], LIMITS) is None  # below the floor
    assert tripwire.judge(found(0.06), 2, first[:2], LIMITS) is None  # too few to compare with
    assert "5.5 times that of the first steps (0.011)" in (tripwire.judge(found(0.06), 9, first, LIMITS) or "")
    with pytest.raises(EvidenceError, match="step 9"):
        tripwire.judge(found(1.5), 9, first, LIMITS)


def test_limits_are_settable_and_checked():
    set_to = ["profile=cpu", "aqn.mismatch.warn=0.5", "aqn.mismatch.stop=inf"]
    limits = parse_aqn(load_recipe("e12", set_to)).mismatch
    assert tripwire.judge(found(40.0), 1, [0.6], limits) is None
    for override in ("aqn.mismatch.warn=0", "aqn.mismatch.stop=0.1", "aqn.mismatch.warn=nan"):
        with pytest.raises(ConfigError, match=r"aqn\.mismatch\.warn is"):
            parse_aqn(load_recipe("e12", ["profile=cpu", override]))

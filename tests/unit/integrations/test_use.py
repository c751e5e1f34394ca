"""Whether a forward of the rollout used its noise: measured and predicted values, and when a run is stopped."""

import pytest
import torch

from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.noise_effect import PROBE, TRAINER, UseOfNoise
from verl_aqn.runs.judge.noise_use import check_effect, falls_short, predicted_effect

KEYS = ["a", "b"]
STRENGTH = {"kind": "strength", "noisy": {"sigma": 0.05, "dlogp": 0.4}, "clean": {"entropy": [1.0, 0.9, 1.1]}}


def batch(shift: float) -> dict[str, torch.Tensor]:
    """Return sampled log-probs that differ by `shift` from those without noise."""
    return {
        "response_mask": torch.ones(2, 3),
        "rollout_log_probs": torch.full((2, 3), -1.0 + shift),
        "old_log_probs": torch.full((2, 3), -1.0),
    }


CLEAN = {"a": [-1.0, -1.0, -1.0]}


def record(use: UseOfNoise, shift: float, sigma: float, noisy: float | None = None, mismatch: float = 0.01) -> dict:
    trainer = None if noisy is None else torch.full((2, 3), -1.0 + noisy)
    found = use.measure(batch(shift), KEYS, CLEAN, sigma, mismatch, trainer)
    assert found
    return {"step": 1, **found}


def test_noise_that_moves_log_probs_as_it_moves_the_trainer_s_passes():
    use = UseOfNoise([])
    quiet = record(use, 0.002, 0.0)
    assert (quiet["predicted"], quiet["predicted_by"], quiet["here"], quiet["floor"]) == (0, "", False, 0.01)
    check_effect(quiet)
    noisy = record(use, 0.3, 0.05, noisy=0.4)
    assert (noisy["effect"], noisy["predicted"]) == (pytest.approx(0.3), pytest.approx(0.4))
    assert (noisy["predicted_by"], noisy["here"], noisy["tokens"]) == (TRAINER, True, 3)
    check_effect(noisy)


@pytest.mark.parametrize("shift", [0.0, 0.004, 0.19])
def test_a_forward_without_the_noise_is_an_error_in_the_step_where_its_effect_was_measured(shift):
    with pytest.raises(
        EvidenceError, match=r"step 1: noise of σ 0\.05 is in the rollout's weights, but its forward does"
    ):
        check_effect(record(UseOfNoise([]), shift, 0.05, noisy=0.4))
    with pytest.raises(EvidenceError, match=r"the probe before training predicts 0\.4"):
        check_effect(record(UseOfNoise([STRENGTH]), shift, 0.05))


def test_a_prediction_from_another_step_scales_and_is_not_held_against_the_run():
    use = UseOfNoise([])
    record(use, 0.4, 0.05, noisy=0.4)
    later = record(use, 0.0, 0.025)
    assert later["predicted"] == pytest.approx(0.2)
    assert not later["here"]
    assert falls_short(later)  # the trainer measures once more before this is on record
    check_effect(later)
    with pytest.raises(EvidenceError):
        check_effect(record(use, 0.0, 0.025, noisy=0.2))
    resumed = UseOfNoise([STRENGTH, {"kind": "use", "sigma": 0.05, "effect": 0.4}])
    assert record(resumed, 0.0, 0.05)["here"] is False  # the probe measured the policy before training


def test_what_is_too_small_to_be_seen_is_no_fault():
    use = UseOfNoise([])
    assert record(use, 0.05, 0.0, mismatch=0.0)["floor"] == pytest.approx(
        0.05
    )  # difference between decoding and scoring
    small = record(use, 0.0, 0.05, noisy=0.15)
    assert small["here"]
    assert not falls_short(small)
    check_effect(small)


def test_a_policy_that_became_sure_moves_less():
    reference = {"sigma": 0.05, "effect": 0.4, "surprisal": 1.0}
    assert predicted_effect(0.05, 0.25, reference) == pytest.approx(0.1)
    assert predicted_effect(0.05, 2.0, reference) == pytest.approx(0.4)
    assert predicted_effect(0.1, 1.0, reference) == pytest.approx(0.4)  # not outside the measured range
    assert predicted_effect(0.05, 1.0, None) == 0
    assert UseOfNoise([STRENGTH]).by == PROBE


def test_nothing_was_scored_again():
    assert UseOfNoise([]).measure(batch(0.0), KEYS, {}, 0.05, 0.0) is None


@pytest.mark.parametrize("change", [{"tokens": 0}, {"effect": float("nan")}, {"error": -1.0}, {"predicted_by": ""}])
def test_what_is_no_measurement_is_an_error(change):
    with pytest.raises(EvidenceError):
        check_effect(record(UseOfNoise([]), 0.4, 0.05, noisy=0.4) | change)

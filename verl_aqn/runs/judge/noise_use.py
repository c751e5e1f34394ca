"""Check that the forward pass of the rollout used the noise that its weights hold.

A graph, a fused kernel or a cached copy of a weight can bypass the parameter that was written and read back. Therefore
some of a step's samples are scored again without noise. The rollout's log-probabilities must move by about as much as
the trainer's own log-probabilities move with the same noise. The trainer measures this once per run; for other steps
the measured effect is scaled by σ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from verl_aqn.errors import EvidenceError

VISIBLE = 4.0
"""A predicted effect is visible if it is at least this many times the effect at σ = 0."""

SHORT = 2.0
"""The measured effect may be smaller than the prediction by up to this factor."""


def floor_of(mismatch: float, quiet: Sequence[float]) -> float:
    """Return how far two forwards without noise differ, in nats per token; a visible effect is clearly larger.

    Args:
        mismatch: mean |Δ log p| between trainer and rollout without noise, that is between two implementations.
        quiet: effects in the run's steps with σ = 0, that is the differences between decoding and scoring.
    """
    return max(mismatch, sum(quiet) / len(quiet)) if quiet else mismatch


def predicted_effect(sigma: float, surprisal: float, reference: Mapping[str, float] | None) -> float:
    """Return the mean |Δ log p| that the noise should cause, in nats per token; 0 if there is no reference.

    The effect grows with σ. For the tiny models of `verl-aqn bench families` it is 0.1 to 26 σ (σ relative to each
    norm's rms). Between σ 0.01 and 0.05 it is proportional to σ within 4 % for the median model, and within a factor of
    1.7 for all of them. It shrinks when training makes the policy more certain; the ratio of surprisals accounts for
    that.

    Args:
        sigma: σ of the step. surprisal: mean −log p of the sampled tokens without noise, in nats.
        reference: the measurement to scale, from the probe or the trainer: `sigma`, `effect`, `surprisal`.
    """
    if sigma == 0 or not reference:
        return 0.0
    surer = min(1.0, surprisal / reference["surprisal"]) if reference["surprisal"] > 0 else 1.0
    return reference["effect"] * min(1.0, sigma / reference["sigma"]) * surer


def is_visible(record: Mapping[str, Any]) -> bool:
    """Return whether the predicted effect of a step is clearly larger than the differences at σ = 0."""
    return record["predicted"] >= VISIBLE * record["floor"] and record["predicted"] > 0


def falls_short(record: Mapping[str, Any]) -> bool:
    """Return whether the predicted effect is visible, but the log-probs moved by too little."""
    return is_visible(record) and record["effect"] + record["error"] < record["predicted"] / SHORT


def check_effect(record: Mapping[str, Any]) -> None:
    """Raise EvidenceError unless a step's noise had the predicted effect, if that effect is visible.

    Args:
        record: `step` (from 1), `sigma`, `tokens`; in nats per token `effect` (mean |log p with noise − log p without|)
            with `error` (half its 95 % interval), `predicted`, and `floor` (how far two forwards without noise differ).
            `here`: whether the prediction was made for this step. A prediction that is scaled from another step never
            stops a run, because training may make a policy robust to its noise.
    """
    for key in ("effect", "error", "predicted", "floor"):
        if not (math.isfinite(record[key]) and record[key] >= 0):
            raise EvidenceError(
                f"step {record['step']}: {key} of the noise is {record[key]}, which is not a measurement"
            )
    if (record["predicted"] > 0) != bool(record["predicted_by"]) or (
        record["sigma"] == 0 and (record["predicted"] or record["here"])
    ):
        raise EvidenceError(f"step {record['step']}: the record does not say what the effect of noise is predicted by")
    if record["tokens"] < 1:
        raise EvidenceError(f"step {record['step']}: no token was scored again without noise")
    if record["here"] and falls_short(record):
        raise EvidenceError(
            f"step {record['step']}: noise of σ {record['sigma']:g} is in the rollout's weights, but its forward does "
            f"not use it: the noise moves log-probs by {record['effect']:.2g} ± {record['error']:.1g} nats per "
            f"token, {record['predicted_by']} predicts {record['predicted']:.2g} ({record['floor']:.2g} is usual "
            "without noise); try actor_rollout_ref.rollout.enforce_eager=true"
        )

"""Whether a forward of the rollout used the noise that its weights hold.

A graph, a fused kernel or a cached copy of a weight can bypass the parameter that was written and read back. So some
of a step's samples are scored again without noise: the rollout's log-probabilities must move by about as much as the
trainer's own do when it computes with the same noise, once a run, and otherwise by what σ makes of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from verl_aqn.errors import EvidenceError

VISIBLE = 4.0
"""A predicted effect can be seen from so many times the effect at σ = 0 on."""

SHORT = 2.0
"""By this factor the measured effect may fall short of the prediction."""


def floor_of(mismatch: float, quiet: Sequence[float]) -> float:
    """Return how far two forwards without noise differ, in nats a token: what an effect must clearly exceed.

    Args:
        mismatch: mean |Δ log p| of trainer and rollout without noise, two implementations.
        quiet: effects in the run's steps with σ = 0, where decoding is held against scoring.
    """
    return max(mismatch, sum(quiet) / len(quiet)) if quiet else mismatch


def predicted_effect(sigma: float, surprisal: float, reference: Mapping[str, float] | None) -> float:
    """Return the mean |Δ log p| that noise is to cause, in nats a token; 0 where nothing is known.

    It grows with σ: over the tiny models of `verl-aqn bench families` it is 0.1 to 26 σ (of each norm's rms), and
    between σ 0.01 and 0.05 in proportion within 4 % for the median model, a factor of 1.7 at most. It shrinks where
    training makes the policy sure of its answers, for which the ratio of surprisals stands.

    Args:
        sigma: σ of the step. surprisal: mean −log p of the sampled tokens without noise, in nats.
        reference: what the trainer measured in the run's first step with noise: `sigma`, `effect`, `surprisal`.
    """
    if sigma == 0 or not reference:
        return 0.0
    surer = min(1.0, surprisal / reference["surprisal"]) if reference["surprisal"] > 0 else 1.0
    return reference["effect"] * min(1.0, sigma / reference["sigma"]) * surer


def is_visible(record: Mapping[str, Any]) -> bool:
    """Return whether the noise of a step is large enough to be told from what differs at σ = 0."""
    return record["predicted"] >= VISIBLE * record["floor"] and record["predicted"] > 0


def falls_short(record: Mapping[str, Any]) -> bool:
    """Return whether noise that is large enough to be seen moved the log-probs by too little."""
    return is_visible(record) and record["effect"] + record["error"] < record["predicted"] / SHORT


def check_effect(record: Mapping[str, Any]) -> None:
    """Raise EvidenceError unless a step's noise had the effect that was predicted, as far as that can be seen.

    Args:
        record: `step` (from 1), `sigma`, `tokens`; in nats a token `effect` (mean |log p with noise − log p without|)
            with `error` (half its 95 % interval), `predicted`, and `floor` (how far two forwards without noise differ).
            `here`: whether the prediction was made for this very step. One that is scaled from another step says
            nothing against a run: training may make a policy robust to its noise.
    """
    for key in ("effect", "error", "predicted", "floor"):
        if not (math.isfinite(record[key]) and record[key] >= 0):
            raise EvidenceError(f"step {record['step']}: {key} of the noise is {record[key]}, which is no measurement")
    if (record["predicted"] > 0) != bool(record["predicted_by"]) or (
        record["sigma"] == 0 and (record["predicted"] or record["here"])
    ):
        raise EvidenceError(f"step {record['step']}: it is not clear what the effect of noise is predicted by")
    if record["tokens"] < 1:
        raise EvidenceError(f"step {record['step']}: no token was scored again without noise")
    if record["here"] and falls_short(record):
        raise EvidenceError(
            f"step {record['step']}: noise of σ {record['sigma']:g} is in the rollout's weights, but its forward does "
            f"not use it: without the noise log-probs move by {record['effect']:.2g} ± {record['error']:.1g} nats a "
            f"token, {record['predicted_by']} predicts {record['predicted']:.2g} ({record['floor']:.2g} is usual "
            "without noise): does it stay with actor_rollout_ref.rollout.enforce_eager=true?"
        )

"""Check of the train–rollout mismatch: whether both compute the same model, by the log-probabilities of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from verl_aqn.errors import EvidenceError


def least(record: Mapping[str, Any]) -> float:
    """Return the lower end of the mean mismatch's interval, in nats per token: a few tokens must not stop a run."""
    mean, error = record["abs_dlogp_mean"], record["abs_dlogp_error"]
    return mean - error if math.isfinite(mean) else mean


def bound(record: Mapping[str, Any], key: str) -> float:
    """Return the bound `warn` or `stop` of a record in nats per token; "none" stands for infinity, which JSON lacks."""
    return math.inf if record[key] == "none" else record[key]


def check_mismatch(record: Mapping[str, Any]) -> None:
    """Raise EvidenceError if a step's mismatch is above `stop`, or is not a valid measurement."""
    step, mean, error = record["step"], record["abs_dlogp_mean"], record["abs_dlogp_error"]
    if record["tokens"] < 1:
        raise EvidenceError(f"step {step}: trainer and rollout were not compared on any token")
    if not (math.isfinite(mean) and mean >= 0 and math.isfinite(error) and error >= 0):
        raise EvidenceError(f"step {step}: the mismatch is {mean} ± {error} nats per token, which is not a measurement")
    if not (record["abs_dlogp_p99"] >= 0 and record["kl_k3"] >= -1e-6 and 0 <= record["clipped_share"] <= 1):
        raise EvidenceError(f"step {step}: a figure of the mismatch is impossible for log-probs")
    warn, stop = (bound(record, key) for key in ("warn", "stop"))
    if not 0 < warn <= stop:
        raise EvidenceError(f"step {step}: the bounds of the mismatch, {warn:g} and {stop:g}, are not valid")
    if not least(record) <= stop:
        raise EvidenceError(
            f"step {step}: trainer and rollout without noise differ by {mean:.3g} ± {error:.2g} nats per token, above "
            f"{stop:g}"
        )

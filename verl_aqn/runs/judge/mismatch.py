"""Whether trainer and rollout compute the same model, by the log-probabilities of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from verl_aqn.errors import EvidenceError


def least(record: Mapping[str, Any]) -> float:
    """Return the lower end of the mean mismatch, in nats a token: a few tokens of a sample end no run."""
    mean, error = record["abs_dlogp_mean"], record["abs_dlogp_error"]
    return mean - error if math.isfinite(mean) else mean


def bound(record: Mapping[str, Any], key: str) -> float:
    """Return the bound `warn` or `stop` of a record in nats a token: "none", as JSON has no infinity, is infinity."""
    return math.inf if record[key] == "none" else record[key]


def check_mismatch(record: Mapping[str, Any]) -> None:
    """Raise EvidenceError where a step's mismatch is above `stop`, or is no measurement."""
    step, mean, error = record["step"], record["abs_dlogp_mean"], record["abs_dlogp_error"]
    if record["tokens"] < 1:
        raise EvidenceError(f"step {step}: trainer and rollout were compared on no token")
    if not (math.isfinite(mean) and mean >= 0 and math.isfinite(error) and error >= 0):
        raise EvidenceError(f"step {step}: trainer and rollout differ by {mean} ± {error} nats a token: no measurement")
    if not (record["abs_dlogp_p99"] >= 0 and record["kl_k3"] >= -1e-6 and 0 <= record["clipped_share"] <= 1):
        raise EvidenceError(f"step {step}: a figure of the mismatch is none that log-probs can give")
    warn, stop = (bound(record, key) for key in ("warn", "stop"))
    if not 0 < warn <= stop:
        raise EvidenceError(f"step {step}: the bounds of the mismatch are {warn:g} and {stop:g}: no bounds")
    if not least(record) <= stop:
        raise EvidenceError(
            f"step {step}: trainer and rollout without noise differ by {mean:.3g} ± {error:.2g} nats a token, above "
            f"{stop:g}"
        )

"""Stop a run whose trainer and rollout do not compute the same model, before it learns from wrong log-probabilities.

The check needs no knowledge of architectures: at the same tokens, the trainer's log-probabilities are held against the
rollout's without noise. What can be compared depends on the step:

========  ============================================================  ===========================================
source    tokens                                                        when
========  ============================================================  ===========================================
sampled   all of the step, with the log-probs that the rollout sampled  σ is 0, or the actor has the same noise; and
          them with                                                     sampling keeps the whole vocabulary
rescored  those that the rollout scored again without noise             the temperature is 1, and the actor is clean
========  ============================================================  ===========================================
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from verl_aqn.config.schema import MismatchConfig
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.token_mismatch import align, gap, truncates
from verl_aqn.runs.judge.mismatch import least

FIRST_SAMPLES = 16
"""Samples that are scored again in the first step, where the rollout has noise and the actor has none."""

BASELINE_STEPS = 3
"""Compared steps whose median is what later steps are held against."""

GROWTH, GROWTH_FLOOR = 4.0, 0.05
"""A later step is worth a warning above so many times the baseline, and above so many nats a token."""

CAUSES = "a layer that one of them computes otherwise (window, state, router), another base or adapter, one's settings"


def source_of(rollout: DictConfig, sigma: float, noisy_actor: bool) -> str | None:
    """Return which comparison a step allows: "sampled", "rescored", or None.

    Args:
        rollout: verl's `actor_rollout_ref.rollout`.
        sigma: σ of the rollout in this step. noisy_actor: whether the actor has the rollout's noise.
    """
    if (sigma == 0 or noisy_actor) and rollout.calculate_log_probs and not truncates(rollout):
        return "sampled"
    # vLLM scores given tokens at temperature 1; the trainer divides its logits by the rollout's temperature.
    return "rescored" if rollout.temperature == 1 and (sigma == 0 or not noisy_actor) else None


def measure(
    data: Mapping[str, Tensor],
    keys: Sequence[str],
    clean_logp: Mapping[str, Sequence[float]],
    source: str,
    clip: tuple[float, float],
) -> dict[str, Any] | None:
    """Return the mismatch of one step, in nats a token; None where no token can be compared.

    Args:
        data: `old_log_probs` (the trainer's), `response_mask` and, for "sampled", `rollout_log_probs`, each [B, R].
        keys: names of the B samples. clean_logp: log-probs without noise of some of them, from the first response
            token on. clip: PPO's clip range below and above 1.

    Returns:
        `source`, `tokens`, `abs_dlogp_mean` with `abs_dlogp_error` (half its 95 % interval, as if tokens were
        independent), `abs_dlogp_p99`, `kl_k3`, `clipped_share` (see `parity.gap`).
    """
    mask, trainer = data["response_mask"].bool(), data["old_log_probs"].float()
    if source == "sampled":
        rollout = data["rollout_log_probs"].float()
    else:
        rollout, mask = align(keys, clean_logp, mask)
    if not mask.any():
        return None
    distance, tokens = (rollout[mask] - trainer[mask]).double().abs(), int(mask.sum())
    error = 1.96 * distance.std(correction=0).item() / math.sqrt(tokens)
    found = gap(rollout[mask], trainer[mask], clip)
    return {"source": source, "tokens": tokens, "abs_dlogp_error": error, **found}


def judge(
    found: Mapping[str, Any], step: int, earlier: Sequence[float], limits: MismatchConfig, layout: str = ""
) -> str | None:
    """Return a warning about the mismatch of `step` (from 1), or None where there is nothing to say.

    The lower end of the mean's interval counts, so that a few tokens of a rescored sample do not end a run.

    Args:
        found: as `measure` returns it. earlier: mean mismatches of the steps compared before. limits: bounds.
        layout: how the actor lays out a batch, for the message.

    Raises:
        EvidenceError: the mismatch is above `limits.stop`, or not a number.
    """
    mean, error, lowest = found["abs_dlogp_mean"], found["abs_dlogp_error"], least(found)
    text = (
        f"step {step}: trainer and rollout without noise differ by {mean:.3g} ± {error:.2g} nats a token on the same "
        f"{found['tokens']:,} tokens ({found['clipped_share']:.0%} of the ratios outside PPO's clip range)"
    )
    causes = f"likely causes: {CAUSES}" + (f"; layout of a batch: {layout}" if layout else "")
    if not lowest <= limits.stop:  # NaN, too
        raise EvidenceError(
            f"{text}, above aqn.mismatch.stop={limits.stop:g}: nothing was updated; {causes}; does it stay with "
            "aqn.mxfp4.enabled=false?"
        )
    usual = statistics.median(earlier[:BASELINE_STEPS]) if len(earlier) >= BASELINE_STEPS else math.inf
    if lowest > max(GROWTH * usual, GROWTH_FLOOR):
        return f"{text}, {mean / usual:.1f} times that of the first steps ({usual:.3g}): {causes}"
    if lowest > limits.warn and not any(value > limits.warn for value in earlier):  # told once
        return f"{text}, above aqn.mismatch.warn={limits.warn:g}: {causes}"
    return None

"""Stop a run whose trainer and rollout do not compute the same model, before it learns from wrong log-probabilities.

The check works for every architecture: it compares the trainer's log-probabilities of the same tokens with the
rollout's without noise. The tokens that can be compared depend on the step:

========  ============================================================  ===========================================
source    tokens                                                        when
========  ============================================================  ===========================================
sampled   all tokens of the step, with the rollout's log-probs at       σ is 0, or the actor has the same noise; and
          sampling                                                      sampling uses the whole vocabulary
rescored  the tokens that the rollout scored again without noise        the temperature is 1, and the actor is clean
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
"""How many samples are scored again in the first step if the rollout has noise and the actor has none."""

BASELINE_STEPS = 3
"""How many compared steps form the baseline (their median) for later steps."""

GROWTH, GROWTH_FLOOR = 4.0, 0.05
"""A later step gives a warning above GROWTH times the baseline and above GROWTH_FLOOR nats per token."""

CAUSES = "a layer that one of them computes differently (window, state, router), another base or adapter, settings"


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
    """Return the mismatch of one step, in nats per token, or None if no token can be compared.

    Args:
        data: `old_log_probs` (the trainer's), `response_mask` and, for "sampled", `rollout_log_probs`, each [B, R].
        keys: names of the B samples. clean_logp: log-probs without noise for some of them, from the first response
            token on. clip: PPO's clip range below and above 1.

    Returns:
        `source`, `tokens`, `abs_dlogp_mean` with `abs_dlogp_error` (half its 95 % interval, as if tokens were
        independent), `abs_dlogp_p99`, `kl_k3`, `clipped_share` (see `token_mismatch.gap`).
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
    """Return a warning about the mismatch of `step` (from 1), or None if the mismatch is small.

    The lower end of the mean's interval is compared with the bounds, so that a few tokens of a rescored sample do not
    stop a run.

    Args:
        found: the result of `measure`. earlier: mean mismatches of the steps compared before. limits: the bounds.
        layout: the layout of the actor's batches, for the message.

    Raises:
        EvidenceError: the mismatch is above `limits.stop`, or not a number.
    """
    mean, error, lowest = found["abs_dlogp_mean"], found["abs_dlogp_error"], least(found)
    text = (
        f"step {step}: trainer and rollout without noise differ by {mean:.3g} ± {error:.2g} nats per token on the same "
        f"{found['tokens']:,} tokens ({found['clipped_share']:.0%} of the ratios outside PPO's clip range)"
    )
    causes = f"likely causes: {CAUSES}" + (f"; layout of a batch: {layout}" if layout else "")
    if not lowest <= limits.stop:  # NaN, too
        raise EvidenceError(
            f"{text}, above aqn.mismatch.stop={limits.stop:g}: the weights were not updated; {causes}; try "
            "aqn.mxfp4.enabled=false"
        )
    usual = statistics.median(earlier[:BASELINE_STEPS]) if len(earlier) >= BASELINE_STEPS else math.inf
    if lowest > max(GROWTH * usual, GROWTH_FLOOR):
        return f"{text}, {mean / usual:.1f} times that of the first steps ({usual:.3g}): {causes}"
    if lowest > limits.warn and not any(value > limits.warn for value in earlier):  # warn only once
        return f"{text}, above aqn.mismatch.warn={limits.warn:g}: {causes}"
    return None

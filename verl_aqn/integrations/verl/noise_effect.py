"""The effect of noise on the rollout's log-probs, measured in each step on the samples that are scored again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from verl_aqn.integrations.verl.token_mismatch import align
from verl_aqn.runs.judge.noise_use import floor_of, predicted_effect

PROBE, TRAINER = "the probe before training", "the trainer with the same noise"

Logp = Mapping[str, Tensor]
"""`response_mask`, `rollout_log_probs` and `old_log_probs` (the trainer's), each [B, R]."""


class UseOfNoise:
    """The measured and the predicted effect of noise, by step. `evidence`: records of the run's earlier attempts."""

    def __init__(self, evidence: Sequence[Mapping[str, Any]]) -> None:
        self.reference: dict[str, float] | None = None
        self.by = ""  # the source of the reference
        for record in evidence:
            if record["kind"] == "strength" and (noisy := record["noisy"]).get("dlogp"):
                surprisal = record["clean"]["entropy"][0]
                self.reference = {"sigma": noisy["sigma"], "effect": noisy["dlogp"], "surprisal": surprisal}
                self.by = PROBE
        self._begun = any(record["kind"] == "use" and record["sigma"] > 0 for record in evidence)
        self._quiet = [record["effect"] for record in evidence if record["kind"] == "use" and record["sigma"] == 0]

    def measure(
        self,
        data: Logp,
        keys: Sequence[str],
        clean_logp: Mapping[str, Sequence[float]],
        sigma: float,
        mismatch: float,
        noisy_trainer: Tensor | None = None,
    ) -> dict[str, Any] | None:
        """Return a step's record `use`, without its field `step`, for `verl_aqn.runs.judge.noise_use.check_effect`.

        Args:
            data: the fields of the step. keys: names of the B samples.
            clean_logp: the rollout's log-probs without noise for some of them, from the first response token on.
            sigma: σ of the step. mismatch: mean |Δ log p| between trainer and rollout without noise.
            noisy_trainer: the trainer's log-probs [B, R] with the rollout's noise, if they were computed. `data` has
                its log-probs without noise, unless the trainer has noise in every step.

        Returns:
            The record, or None if no token was scored again.
        """
        clean, scored = align(keys, clean_logp, data["response_mask"].bool())
        if not scored.any():
            return None
        clean, noisy = clean[scored].double(), data["rollout_log_probs"][scored].double()
        distance, tokens, surprisal = (noisy - clean).abs(), int(scored.sum()), -clean.mean().item()
        effect = distance.mean().item()
        here = noisy_trainer is not None or (self.by == PROBE and not self._begun)
        self._begun |= sigma > 0
        if noisy_trainer is not None:
            trainer = data["old_log_probs"]
            other = clean if trainer is noisy_trainer else trainer[scored].double()
            moved = (noisy_trainer[scored].double() - other).abs().mean().item()
            self.reference, self.by = {"sigma": sigma, "effect": moved, "surprisal": surprisal}, TRAINER
        if sigma == 0:
            self._quiet.append(effect)
        predicted = predicted_effect(sigma, surprisal, self.reference)
        return {
            "sigma": sigma,
            "tokens": tokens,
            "effect": effect,
            "error": 1.96 * distance.std(correction=0).item() / math.sqrt(tokens),
            "predicted": predicted,
            "predicted_by": self.by if predicted else "",
            "here": here and predicted > 0,
            "floor": floor_of(mismatch, self._quiet),
        }

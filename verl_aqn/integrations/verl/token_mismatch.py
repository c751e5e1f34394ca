"""The train–rollout mismatch on the tokens that the rollout sampled, and its parts.

Three probabilities of a sampled token are known: the rollout's at sampling (with noise on its norms), the rollout's
without noise (a few sequences are scored again), and the trainer's. The difference between the first two is the effect
of noise. The effect of the kernels (two implementations of one quantised model) is the difference between the trainer
and the rollout with the same noise: the second probability, as the trainer has no noise, or the first one with
`aqn.noise.apply_to=rollout+actor`.

All figures are over response tokens; [T] stands for all of them in one row. Logarithms are natural.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

PREFIX = "aqn/mismatch/"


def gap(rollout: Tensor, other: Tensor, clip: tuple[float, float]) -> dict[str, float]:
    """Return the distance between ``rollout``'s log-probabilities [T] of its sampled tokens and ``other``'s [T].

    `abs_dlogp_mean`, `abs_dlogp_p99`: mean and 99th percentile of |log p_rollout − log p_other|. `kl_k3`:
    KL(rollout ‖ other) by Schulman's k3, the mean of e^(−d) − 1 + d with d = log p_rollout − log p_other. It is never
    negative, and it is unbiased if the tokens were sampled from ``rollout``. `clipped_share`: share of tokens whose
    ratio p_other / p_rollout lies outside [1 − clip[0], 1 + clip[1]], where PPO would clip it.
    """
    d = rollout.double() - other.double()
    ratio = torch.exp(-d)
    outside = (ratio < 1 - clip[0]) | (ratio > 1 + clip[1])
    return {
        "abs_dlogp_mean": d.abs().mean().item(),
        "abs_dlogp_p99": float(np.quantile(d.abs().numpy(), 0.99)),
        "kl_k3": (ratio - 1 + d).mean().item(),
        "clipped_share": outside.double().mean().item(),
    }


def mismatch_metrics(rollout: Tensor, trainer: Tensor, entropy: Tensor, clip: tuple[float, float]) -> dict[str, float]:
    """Return the figures over all tokens of a step: noise and kernels together.

    `rollout_entropy_sampled`: mean of −log p_rollout of the sampled tokens, with noise; an unbiased estimate of the
    rollout's entropy at temperature 1. `trainer_surprisal`: mean of −log p_trainer of the same tokens.
    `trainer_entropy`: the trainer's entropy over the whole vocabulary after the same prefixes, without noise unless the
    actor has it too.

    Args:
        rollout, trainer: log-probabilities [T] of the sampled tokens. entropy: the trainer's [T].
        clip: how far below and above 1 a ratio may lie before PPO clips it.
    """
    figures = gap(rollout, trainer, clip) | {
        "tokens": float(rollout.numel()),
        "rollout_entropy_sampled": -rollout.double().mean().item(),
        "trainer_surprisal": -trainer.double().mean().item(),
        "trainer_entropy": entropy.double().mean().item(),
    }
    return {PREFIX + name: value for name, value in figures.items()}


def split_metrics(
    noisy: Tensor, clean: Tensor, trainer: Tensor, clip: tuple[float, float], noisy_trainer: bool = False
) -> dict[str, float]:
    """Return the effects of noise and of kernels, on the tokens that the rollout scored again without noise.

    `noise/…`: distance from the rollout with noise to the rollout without. It includes the engine's own difference
    between decoding token by token and scoring a sequence at once; steps with σ = 0 show how small this difference is.
    `kernels/…`: distance from the rollout without noise to the trainer, on the same tokens (`kl_k3` is not an unbiased
    KL here, as the tokens were sampled with noise). log p_noisy − log p_trainer is the sum of the two, token by token;
    with ``noisy_trainer`` it is `kernels/…` alone.
    """
    parts = {"noise/": gap(noisy, clean, clip), "kernels/": gap(noisy if noisy_trainer else clean, trainer, clip)}
    figures = {part + name: value for part, found in parts.items() for name, value in found.items()}
    figures["rescored_tokens"] = float(noisy.numel())
    return {PREFIX + name: value for name, value in figures.items()}


def step_metrics(
    data: Mapping[str, Tensor],
    keys: list[str],
    clean_logp: dict[str, list[float]],
    clip: tuple[float, float],
    noisy_trainer: bool = False,
) -> dict[str, float]:
    """Return all figures of one step.

    Args:
        data: `rollout_log_probs`, `old_log_probs` (the trainer's), `entropy` and `response_mask`, each [B, R], padded.
        keys: names of the B samples. clean_logp: the rollout's log-probabilities without noise for some of them, from
            the first response token on. noisy_trainer: whether the trainer's forward has the rollout's noise.
    """
    mask = data["response_mask"].bool()
    rollout, trainer = data["rollout_log_probs"].float(), data["old_log_probs"].float()
    figures = mismatch_metrics(rollout[mask], trainer[mask], data["entropy"][mask], clip)
    clean, scored = align(keys, clean_logp, mask)
    if scored.any():
        figures |= split_metrics(rollout[scored], clean[scored], trainer[scored], clip, noisy_trainer)
    return figures


def align(keys: Sequence[str], clean_logp: Mapping[str, Sequence[float]], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs of rescored samples [B, R] float32, and the part of `mask` [B, R] that has one.

    Args:
        keys: names of the B samples. clean_logp: log-probs of some of them, from the first response token on.
    """
    rows = {key: row for row, key in enumerate(keys)}
    clean, scored = torch.zeros(mask.shape), torch.zeros_like(mask)
    for key, values in clean_logp.items():
        row, length = rows[key], len(values)
        clean[row, :length] = torch.tensor(values)
        scored[row, :length] = mask[row, :length]
    return clean, scored


def scored_again(keys: list[str], one_in: int) -> list[str]:
    """Return one in ``one_in`` of ``keys``, evenly spread and at least one; none if ``one_in`` is 0."""
    return keys[::one_in] if one_in > 0 else []


def can_rescore(rollout: DictConfig) -> bool:
    """Return whether scored log-probs are comparable with sampled ones: vLLM scores without temperature and top_p/k."""
    return bool(rollout.calculate_log_probs and rollout.temperature == 1 and not truncates(rollout))


def truncates(rollout: DictConfig) -> bool:
    """Return whether sampling excludes tokens, so that the rollout's log-probs are renormalised over the others."""
    return rollout.top_p < 1 or rollout.top_k > 0


def clip_range(actor: DictConfig) -> tuple[float, float]:
    """Return PPO's clip range below and above 1."""
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    return actor.clip_ratio if low is None else low, actor.clip_ratio if high is None else high

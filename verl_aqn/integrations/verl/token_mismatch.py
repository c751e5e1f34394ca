"""How far trainer and rollout are apart on the tokens that the rollout sampled, and what makes the difference.

Three probabilities of a sampled token are known: the rollout's as it sampled it (noise on its norms), the rollout's
without noise (a few sequences are scored again), and the trainer's. From the first to the second is what noise does.
What the kernels do, two implementations of one quantised model, is from the trainer to whichever of the two has as much
noise: the second, since the trainer has none; the first with `aqn.noise.apply_to=rollout+actor`.

Every figure is over response tokens, [T] stands for all of them in one row. Natural logarithms.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

PREFIX = "aqn/parity/"


def gap(rollout: Tensor, other: Tensor, clip: tuple[float, float]) -> dict[str, float]:
    """Distance between log-probabilities [T] of tokens that ``rollout`` sampled and ``other``'s of the same tokens.

    `abs_dlogp_mean`, `abs_dlogp_p99`: of |log p_rollout − log p_other|. `kl_k3`: KL(rollout ‖ other) by Schulman's k3,
    the mean of e^(−d) − 1 + d with d = log p_rollout − log p_other: never negative, and unbiased where ``rollout`` is
    what the tokens were sampled from. `clipped_share`: share of tokens whose ratio p_other / p_rollout lies outside
    [1 − clip[0], 1 + clip[1]], where PPO would clip it.
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


def parity_metrics(rollout: Tensor, trainer: Tensor, entropy: Tensor, clip: tuple[float, float]) -> dict[str, float]:
    """Figures over all tokens of a step: noise and kernels together.

    `rollout_entropy_sampled`: with noise, mean of −log p_rollout of the sampled tokens, an unbiased estimate of the
    rollout's entropy at temperature 1. `trainer_surprisal`: the same tokens' −log p_trainer. `trainer_entropy`: the
    trainer's entropy over the whole vocabulary after the same prefixes, without noise unless the actor has it too.

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
    """What noise and what kernels cause, on the tokens that the rollout scored again without noise.

    `noise/…`: the rollout with noise against the rollout without. It holds the engine's own difference between decoding
    token by token and scoring a sequence at once; steps with σ = 0 show how small that is. `kernels/…`: the rollout
    without noise against the trainer, on the same tokens (`kl_k3` there is a distance, not an unbiased KL: the tokens
    were sampled with noise). log p_noisy − log p_trainer is the sum of the two, token by token; with ``noisy_trainer``
    it is `kernels/…` alone.
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
    """All figures of one step.

    Args:
        data: `rollout_log_probs`, `old_log_probs` (the trainer's), `entropy` and `response_mask`, each [B, R], padded.
        keys: names of the B samples. clean_logp: the rollout's log-probabilities without noise of some of them, from
            the first response token on. noisy_trainer: whether the trainer's forward has the rollout's noise.
    """
    mask = data["response_mask"].bool()
    rollout, trainer = data["rollout_log_probs"].float(), data["old_log_probs"].float()
    figures = parity_metrics(rollout[mask], trainer[mask], data["entropy"][mask], clip)
    clean, scored = align(keys, clean_logp, mask)
    if scored.any():
        figures |= split_metrics(rollout[scored], clean[scored], trainer[scored], clip, noisy_trainer)
    return figures


def align(keys: Sequence[str], clean_logp: Mapping[str, Sequence[float]], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs of rescored samples [B, R] float32, and which of `mask` [B, R] have one.

    Args:
        keys: names of the B samples. clean_logp: of some of them, from the first response token on.
    """
    rows = {key: row for row, key in enumerate(keys)}
    clean, scored = torch.zeros(mask.shape), torch.zeros_like(mask)
    for key, values in clean_logp.items():
        row, length = rows[key], len(values)
        clean[row, :length] = torch.tensor(values)
        scored[row, :length] = mask[row, :length]
    return clean, scored


def scored_again(keys: list[str], one_in: int) -> list[str]:
    """One in ``one_in`` of ``keys``, evenly spread and at least one; none where ``one_in`` is 0."""
    return keys[::one_in] if one_in > 0 else []


def can_rescore(rollout: DictConfig) -> bool:
    """Whether a scored sequence is comparable with a sampled one: vLLM scores without temperature, top_p and top_k."""
    return bool(rollout.calculate_log_probs and rollout.temperature == 1 and not truncates(rollout))


def truncates(rollout: DictConfig) -> bool:
    """Whether sampling leaves tokens out, so that the rollout's log-probabilities are of a renormalised rest."""
    return rollout.top_p < 1 or rollout.top_k > 0


def clip_range(actor: DictConfig) -> tuple[float, float]:
    """PPO's clip range below and above 1."""
    low, high = actor.clip_ratio_low, actor.clip_ratio_high
    return actor.clip_ratio if low is None else low, actor.clip_ratio if high is None else high

"""Figures of the effect of σ on the policy, and those of a run's start, stored for the next run of the same inputs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from omegaconf import DictConfig

from verl_aqn.cache import cache_dir
from verl_aqn.preflight.asking import keep, kept
from verl_aqn.preflight.reward_function import is_ours
from verl_aqn.preflight.run_data import has_own_class


@dataclass(frozen=True)
class Strength:
    """Measurements of the policy with noise of σ: value, and low and high end of the 95 % interval.

    Units are nats per token, and shares as fractions of 1. `kl` is KL(clean || noisy) and `entropy` that of the noisy
    policy, with intervals from a bootstrap over prompts. `accuracy` is the mean of `acc`, and `variance` the share of
    groups with different rewards, with Wilson intervals, as if the samples of a prompt were independent. These two are
    None if nothing was sampled. `dlogp`: mean |log p_clean − log p_noisy| of the tokens that the clean policy samples;
    a run compares it with its rollout (`verl_aqn.runs.judge.noise_use`).
    """

    sigma: float
    kl: tuple[float, float, float]
    entropy: tuple[float, float, float]
    accuracy: tuple[float, float, float] | None = None
    variance: tuple[float, float, float] | None = None
    dlogp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the figures that `to_dict` gave, also after JSON made lists of the tuples."""
        told: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**told)


def stored_start(identity: Mapping[str, Any], versions: Mapping[str, Any], config: DictConfig) -> Path | None:
    """Return the file for the figures of a run's start, or None if not everything that they depend on is known.

    They depend on the run's config (`identity`), on files, packages, commit and processor (`versions`), and on code of
    the user: a reward function, a data set class, tools. Code that is not committed is not known either, nor is that of
    an installed package.
    """
    tools = any(config.data.get(key) for key in ("tool_config_path", "function_tool_path"))
    committed = versions["commit"] and versions["dirty"] is False
    if not committed or tools or has_own_class(config) or not is_ours(config):
        return None
    inputs = json.dumps([identity, versions], sort_keys=True, default=str)
    return cache_dir() / "strength" / f"{hashlib.sha256(inputs.encode()).hexdigest()[:24]}.json"


def read_start(file: Path | None) -> list[Strength] | None:
    """Return the stored figures, without noise and at σ_start, or None if there are none."""
    found = kept(file, _fits) if file else None
    return found and [Strength.from_dict(one) for one in found]


def store_start(file: Path | None, figures: list[Strength]) -> None:
    """Write the figures of a run's start for `read_start`."""
    if file:
        keep(file, [one.to_dict() for one in figures])


def _fits(found: Any) -> bool:
    names = {field.name for field in fields(Strength)}
    return isinstance(found, list) and len(found) == 2 and all(isinstance(x, dict) and set(x) == names for x in found)

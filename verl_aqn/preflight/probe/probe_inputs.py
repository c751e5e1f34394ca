"""The inputs of a probe from a recipe: prompts, and the first noise specification."""

import hashlib
from dataclasses import replace
from typing import Any, NamedTuple

from omegaconf import DictConfig

from verl_aqn.config.noise_settings import order_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.noise.spec import NoiseSpec
from verl_aqn.preflight.policy import prompt_tokens
from verl_aqn.preflight.run_data import Items, items_of


class Prompt(NamedTuple):
    """One row of the training data: its number, its prompt tokens, and the arguments of the reward function."""

    row: int
    ids: list[int]
    reward: dict[str, Any]


def read_prompts(config: DictConfig, tokenizer: Any, count: int, items: Items | None = None) -> list[Prompt]:
    """Read `count` rows of the training data, chosen by a hash of their number.

    A larger count adds rows to those of a smaller count. `items` are the items of the training data (`items_of`), if
    they are already loaded.

    Raises:
        DataError: fewer rows have a prompt within `data.max_prompt_length`.
    """
    items = items_of(config, "train") if items is None else items
    total, limit = len(items), config.data.train_max_samples
    seed = parse_aqn(config).noise.seed
    rows = sorted(
        range(min(total, limit) if limit > 0 else total),
        key=lambda row: hashlib.blake2b(f"{seed}\0{row}".encode(), digest_size=8).digest(),
    )
    chosen: list[Prompt] = []
    for row in rows:
        item = items[row]
        ids = prompt_tokens(config, tokenizer, item["raw_prompt"])
        if ids is not None:
            truth = (item.get("reward_model") or {}).get("ground_truth")
            told = {"data_source": item.get("data_source"), "ground_truth": truth, "extra_info": item["extra_info"]}
            chosen.append(Prompt(row, ids, told))
            if len(chosen) == count:
                return chosen
    raise DataError(
        f"{config.data.train_files} has {len(chosen)} prompts within data.max_prompt_length, but {count} are needed"
    )


def first_noise(config: DictConfig, steps: int) -> NoiseSpec:
    """Return the noise specification of the first RL step with noise, at σ_start.

    Raises:
        ConfigError: noise is disabled, or σ is 0 at every step.
    """
    noise, schedule = parse_aqn(config).noise, schedule_of(config, steps)
    if not noise.enabled:
        raise ConfigError("aqn.noise.enabled=false: there is no noise to measure")
    for step in range(steps):
        if schedule.sigma(step) > 0:
            return replace(order_of(noise, schedule, step), sigma=noise.sigma_start)
    raise ConfigError(f"σ is 0 at each of the {steps} steps: there is no noise to measure; raise aqn.noise.sigma_start")

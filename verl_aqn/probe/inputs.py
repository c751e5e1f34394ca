"""What a recipe gives a probe: its prompts, reward, and first noise."""

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from omegaconf import DictConfig

from verl_aqn.config import order_of, parse_aqn, schedule_of
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.order import NoiseOrder
from verl_aqn.policy import prompt_tokens
from verl_aqn.prepare import data_files


class Prompt(NamedTuple):
    """One row of the training data: its number, prompt tokens, and what the reward wants to know."""

    row: int
    ids: list[int]
    reward: dict[str, Any]


def read_prompts(config: DictConfig, tokenizer: Any, count: int) -> list[Prompt]:
    """`count` rows of the training data, chosen by a hash of their number: a larger count adds to a smaller one.

    Raises:
        DataError: fewer rows have a prompt within `data.max_prompt_length`.
    """
    tables = [pq.read_table(file) for file in data_files(config, "train_files")]
    total = sum(table.num_rows for table in tables)
    limit = config.data.train_max_samples
    seed = parse_aqn(config).noise.seed
    rows = sorted(
        range(min(total, limit) if limit > 0 else total),
        key=lambda row: hashlib.blake2b(f"{seed}\0{row}".encode(), digest_size=8).digest(),
    )
    chosen: list[Prompt] = []
    for row in rows:
        at, table = row, tables[0]
        for table in tables:
            if at < table.num_rows:
                break
            at -= table.num_rows
        record = table.slice(at, 1).to_pylist()[0]
        ids = prompt_tokens(config, tokenizer, record[config.data.prompt_key])
        if ids is not None:
            truth = record["reward_model"]["ground_truth"]
            told = {"data_source": record["data_source"], "ground_truth": truth, "extra_info": record["extra_info"]}
            chosen.append(Prompt(row, ids, told))
            if len(chosen) == count:
                return chosen
    raise DataError(
        f"{config.data.train_files} holds {len(chosen)} prompts within data.max_prompt_length, {count} are asked for"
    )


def reward_of(config: DictConfig) -> Callable[..., Any]:
    """The recipe's reward function (`reward.custom_reward_function`), called with names as verl does.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    custom = config.reward.custom_reward_function
    path = str(custom.path or "")
    try:
        if path.startswith("pkg://"):
            module = importlib.import_module(path.removeprefix("pkg://"))
        else:
            spec = importlib.util.spec_from_file_location("verl_aqn_probe_reward", Path(path).expanduser())
            if spec is None or spec.loader is None:
                raise ImportError("no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return getattr(module, custom.name)
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(f"reward.custom_reward_function {path!r} cannot be loaded: {error}") from error


def first_noise(config: DictConfig, steps: int) -> NoiseOrder:
    """The order of the first RL step that has noise, at σ_start."""
    noise, schedule = parse_aqn(config).noise, schedule_of(config, steps)
    if not noise.enabled:
        raise ConfigError("aqn.noise.enabled=false: there is no noise to measure")
    for step in range(steps):
        if schedule.sigma(step) > 0:
            return replace(order_of(noise, schedule, step), sigma=noise.sigma_start)
    raise ConfigError(f"σ is 0 at each of the {steps} steps: there is no noise to measure; raise aqn.noise.sigma_start")

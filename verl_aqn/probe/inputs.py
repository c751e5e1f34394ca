"""What a recipe gives a probe: its prompts and first noise."""

import hashlib
from dataclasses import replace
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


def first_noise(config: DictConfig, steps: int) -> NoiseOrder:
    """The order of the first RL step that has noise, at σ_start."""
    noise, schedule = parse_aqn(config).noise, schedule_of(config, steps)
    if not noise.enabled:
        raise ConfigError("aqn.noise.enabled=false: there is no noise to measure")
    for step in range(steps):
        if schedule.sigma(step) > 0:
            return replace(order_of(noise, schedule, step), sigma=noise.sigma_start)
    raise ConfigError(f"σ is 0 at each of the {steps} steps: there is no noise to measure; raise aqn.noise.sigma_start")

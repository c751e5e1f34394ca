"""The prompts for the trial of an export, and the recorded greedy responses of the run to them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.errors import DataError
from verl_aqn.evaluation.export.source import Source
from verl_aqn.preflight.agent_tools import SINGLE, loops_of
from verl_aqn.preflight.policy import prompt_tokens
from verl_aqn.preflight.run_data import KEYS, data_files, items_of

PROMPTS = 32  # or all prompts if the validation data have fewer


@dataclass(frozen=True)
class Questions:
    """Prompts of the trial.

    `prompts`: [[token, …], …]. `answers`: the recorded greedy responses of the run at this step to the first of the
    prompts.
    """

    prompts: list[list[int]]
    answers: list[str]


def read_questions(source: Source, tokenizer: Any) -> Questions:
    """Read the first prompts of the recorded validation at the checkpoint's step, then others of the validation data.

    Raises:
        DataError: the validation data is missing, or does not contain the recorded prompts.
    """
    prompts = validation_prompts(source.config, tokenizer)
    file = f"validation/{source.step}.jsonl"
    rollout = source.config.actor_rollout_ref.rollout
    val = rollout.val_kwargs
    once = loops_of(source.config, items_of(source.config, "test")) == {SINGLE}
    greedy = val.temperature == 0 and val.n == 1 and once
    records = list(source.run.read(file))[:PROMPTS] if greedy else []
    answers = {record["input"]: record["output"] for record in records}
    if unknown := answers.keys() - prompts.keys():
        raise DataError(
            f"{len(unknown)} prompts of {source.run.path / file} are not in data.val_files="
            f"{source.config.data.val_files}: restore the file that the run was validated on"
        )
    chosen = list(answers | prompts)[:PROMPTS]  # prompts with a recorded response first
    return Questions([prompts[text] for text in chosen], list(answers.values()))


def validation_prompts(config: DictConfig, tokenizer: Any) -> dict[str, list[int]]:
    """Return every prompt of the validation data as the policy receives it, by its text as verl records it."""
    prompts = _prompts(config, tokenizer, "test", "validation data is needed to test the export")
    return {tokenizer.decode(ids, skip_special_tokens=True): ids for ids in prompts}


def training_prompts(config: DictConfig, tokenizer: Any, number: int) -> list[list[int]]:
    """Return the first ``number`` prompts of the training data as the policy receives them.

    Raises:
        DataError: the training data is missing.
    """
    prompts = _prompts(config, tokenizer, "train", "training data is needed to round the model to 4 bits")
    return list(itertools.islice(prompts, number))


def _prompts(config: DictConfig, tokenizer: Any, split: str, why: str) -> Iterator[list[int]]:
    files: list[Path] = data_files(config, KEYS[split])
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]} does not exist: the run's {why}")
    items = items_of(config, split)
    prompts = (prompt_tokens(config, tokenizer, items[row]["raw_prompt"]) for row in range(len(items)))
    return (ids for ids in prompts if ids is not None)

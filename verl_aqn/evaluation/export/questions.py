"""The prompts that an export is tried on, and those of the run's own greedy answers that it has on record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.errors import DataError
from verl_aqn.evaluation.export.source import Source
from verl_aqn.preflight.agent_tools import SINGLE, loops_of
from verl_aqn.preflight.policy import prompt_tokens
from verl_aqn.preflight.run_data import data_files, items_of

PROMPTS = 32  # all there are where the validation data have fewer


@dataclass(frozen=True)
class Questions:
    """`prompts` [[token, …], …]; `answers`: the run's greedy ones of this step to the first of them, as many as it
    recorded."""

    prompts: list[list[int]]
    answers: list[str]


def read_questions(source: Source, tokenizer: Any) -> Questions:
    """The first prompts of the recorded validation after the checkpoint's step, then others of the validation data.

    Raises:
        DataError: the validation data is gone, or does not have the recorded prompts.
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
            f"{source.config.data.val_files}: the file is not the one that the run was validated on"
        )
    asked = list(answers | prompts)[:PROMPTS]  # those with an answer first
    return Questions([prompts[text] for text in asked], list(answers.values()))


def validation_prompts(config: DictConfig, tokenizer: Any) -> dict[str, list[int]]:
    """Every prompt of the validation data as the run's policy gets it, by its text as verl records it."""
    files: list[Path] = data_files(config, "val_files")
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]} is not there: the run's validation data is needed to try the export on")
    items = items_of(config, "test")
    prompts = (prompt_tokens(config, tokenizer, items[row]["raw_prompt"]) for row in range(len(items)))
    return {tokenizer.decode(ids, skip_special_tokens=True): ids for ids in prompts if ids is not None}

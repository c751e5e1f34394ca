"""Reasons for missing responses: a worker with `NotingFailures` records them, and the trainer decides about the run.

If a session fails (its generation or its reward raises an error), verl's worker logs the error and continues, and the
session adds nothing to verl's queue. Here the run stops, unless the recipe allows a share of the responses of each step
and each validation to fail (`aqn.run.allow_failed`).
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from verl_aqn.errors import AqnError, ProcessFault, RewardError, first_line
from verl_aqn.integrations.verl.root_cause import root_cause
from verl_aqn.runs.folder import RunFolder, folder_of
from verl_aqn.runs.request_seeds import PROMPT
from verl_aqn.tasks.user_lines import user_line

FILE = "failures.jsonl"
"""The file has one line for each failed session: set (train or val), RL step, attempt at the run, uid, session, item
(row of the set), prompt (its beginning), stage (generation or reward), reason."""


class NotingFailures:
    """A mixin that goes before verl's worker in a class, and records each failed session with its reason."""

    async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)  # type: ignore[misc]
        except Exception as error:
            note(self.config, trajectory, kwargs, error)  # type: ignore[attr-defined]
            raise


def note(config: Any, trajectory: dict, prompt: dict, error: Exception) -> None:
    """Write one line about a failed session; if the run folder cannot be written, only the log has the error."""
    cause, folder = root_cause(error), folder_of(config)
    # A user's own reward manager may raise any error, in verl's reward worker.
    reward = isinstance(cause, RewardError) or "compute_score" in str(getattr(error, "function_name", ""))
    place = user_line(error, str(config.reward.custom_reward_function.path or "")) if reward else ""
    reason = f"{f'{place}: ' if place else ''}{type(cause).__name__}: {first_line(cause)}"
    record = {
        "set": "val" if trajectory["validate"] else "train",
        "step": int(trajectory["step"]),
        "attempt": attempt_of(folder),
        "uid": str(prompt.get("uid")),
        "session": int(prompt.get("session_id", 0)),
        "item": int(prompt[PROMPT].partition("+")[0]) if PROMPT in prompt else None,
        "prompt": beginning_of(prompt.get("raw_prompt")),
        "stage": "reward" if reward else "generation",
        "reason": (first_line(cause) if isinstance(cause, RewardError) else reason)[:300],
    }
    with suppress(AqnError, OSError):
        folder.append(FILE, record)


def beginning_of(messages: Any) -> str:
    """Return the first words of a prompt's last message, so that a person can recognise the prompt."""
    try:
        text = " ".join(str(messages[-1]["content"]).split())
    except (TypeError, KeyError, IndexError):
        return ""
    return text if len(text) <= 60 else f"{text[:57]}..."


def attempt_of(folder: RunFolder) -> int:
    """Return the number of the current attempt at the run; the same step may occur in several attempts."""
    try:
        return int(folder.state.get("attempt", 1))
    except AqnError:
        return 1


def answered(keys: Sequence[str]) -> int:
    """Return how many sessions gave a response; a session with several outputs counts once.

    `keys`: verl's keys, UID_SESSION_INDEX.
    """
    return len({key.rsplit("_", 1)[0] for key in keys})


def failures_of(folder: RunFolder, part: str, step: int) -> list[dict]:
    """Return the records of this attempt's failed sessions in a step (`part` train) or a validation (val)."""
    this = part, step, attempt_of(folder)
    latest = {
        (record["uid"], record["session"]): record
        for record in folder.read(FILE)
        if (record["set"], record["step"], record.get("attempt", 1)) == this
    }
    return list(latest.values())


def refuse_failures(folder: RunFolder, part: str, step: int, requested: int, allowed: float, missing: int = 0) -> None:
    """Stop a run if more responses failed than the recipe allows.

    Args:
        part: train or val. requested: how many responses were requested. allowed: the share of them that may fail.
        missing: how many responses are missing, if this is known; otherwise the recorded failures count.

    Raises:
        RewardError: a reward failed. ProcessFault: only generations failed, which another attempt may avoid.
    """
    records = failures_of(folder, part, step)
    count = max(missing, len(records))
    if count <= allowed * requested:
        return
    text = failure_text(folder, part, step, requested, count)
    share = f"aqn.run.allow_failed={allowed:g} allows {int(allowed * requested):,}"
    if any(record["stage"] == "reward" for record in records):
        raise RewardError(f"{text}: fix the reward function, or allow more failures ({share})")
    raise ProcessFault(f"{text}: see training.log, or allow more failures ({share})")


def moment(part: str, step: int) -> str:
    """Name a step (`part` train), or the validation after it (val)."""
    return f"validation after step {step}" if part == "val" else f"step {step}"


def failure_text(folder: RunFolder, part: str, step: int, requested: int, count: int) -> str:
    """Say that `count` of `requested` responses of a step failed, with the most frequent reason if one is known.

    `part` is train or val.
    """
    told = f"{moment(part, step)}: {count:,} of {requested:,} responses failed"
    reason = failure_reason(folder, part, step, count)
    return f"{told}: {reason}" if reason else f"{told}; see training.log for the reason"


def failure_reason(folder: RunFolder, part: str, step: int, count: int) -> str:
    """Return the most frequent failure of a step's responses, with its item and its number, or "" if none is known.

    `count` responses failed in total.
    """
    records = failures_of(folder, part, step)
    if not records:
        return ""
    (reason, times), *others = Counter(record["reason"] for record in records).most_common()
    first = next(record for record in records if record["reason"] == reason)
    stage, item = first.get("stage", "generation"), first.get("item")
    named = "" if item is None else f" of {'validation' if part == 'val' else 'training'} item {item}"
    named += f" ({first['prompt']!r})" if first.get("prompt") else ""
    more = f" ({times:,} times{f', and {len(others)} other reason(s)' if others else ''})" if count > 1 else ""
    return f"the {stage}{named}: {reason}{more}"

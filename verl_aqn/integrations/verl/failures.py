"""Why an answer never came: noted by a worker that has `NotingFailures`, and judged by the trainer.

A session that fails (its generation, or the reward of its answer, raised) leaves nothing in verl's queue: verl's worker
logs the error and goes on. Here the run stops, unless the recipe allows a share of the answers to fail
(`aqn.run.allow_failed`, of each step and of each validation).
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import AqnError, ProcessFault, RewardError, first_line
from verl_aqn.integrations.verl.root_cause import root_cause
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.request_seeds import PROMPT
from verl_aqn.tasks.user_lines import user_line

FILE = "failures.jsonl"
"""A line for each session that failed: set (train or val), RL step, attempt at the run, uid, session, item (row of the
set), prompt (its beginning), stage (generation or reward), reason."""


class NotingFailures:
    """Goes before verl's worker among the bases of a class: a session that fails is on record with its reason."""

    async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)  # type: ignore[misc]
        except Exception as error:
            note(self.config, trajectory, kwargs, error)  # type: ignore[attr-defined]
            raise


def note(config: Any, trajectory: dict, prompt: dict, error: Exception) -> None:
    """Write one line; where the run's folder is not to be had, the log alone has the error."""
    cause, folder = root_cause(error), RunFolder(Path(str(parse_aqn(config).run.dir)))
    # A reward manager of the user's own raises what it likes, in verl's reward worker.
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
    """Return the first words of a prompt's last message, for a person to know it by."""
    try:
        text = " ".join(str(messages[-1]["content"]).split())
    except (TypeError, KeyError, IndexError):
        return ""
    return text if len(text) <= 60 else f"{text[:57]}..."


def attempt_of(folder: RunFolder) -> int:
    """Return which attempt at the run this is: a step that stopped one may come again in the next."""
    try:
        return int(folder.state.get("attempt", 1))
    except AqnError:
        return 1


def answered(keys: Sequence[str]) -> int:
    """How many sessions gave an answer; one with several outputs counts once. `keys`: verl's, UID_SESSION_INDEX."""
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


def refuse_failures(folder: RunFolder, part: str, step: int, asked: int, allowed: float, missing: int = 0) -> None:
    """Stop a run of whose answers more failed than a recipe allows.

    Args:
        part: train or val. asked: how many answers were asked for. allowed: the share of them that may fail.
        missing: how many did not come, where that is known; else those on record count.

    Raises:
        RewardError: a reward failed. ProcessFault: a generation did, which another attempt need not meet.
    """
    records = failures_of(folder, part, step)
    count = max(missing, len(records))
    if count <= allowed * asked:
        return
    text = failure_text(folder, part, step, asked, count)
    share = f"aqn.run.allow_failed={allowed:g} allows {int(allowed * asked):,}"
    if any(record["stage"] == "reward" for record in records):
        raise RewardError(f"{text}: mend the reward, or let more of them fail ({share})")
    raise ProcessFault(f"{text}: see training.log, or let more of them fail ({share})")


def moment(part: str, step: int) -> str:
    """Name a step (`part` train), or the validation after it (val)."""
    return f"validation after step {step}" if part == "val" else f"step {step}"


def failure_text(folder: RunFolder, part: str, step: int, asked: int, count: int) -> str:
    """Say that `count` of `asked` answers of a step failed, with the most frequent reason where one is known.

    `part` is train or val.
    """
    told = f"{moment(part, step)}: {count:,} of {asked:,} answers failed"
    reason = failure_reason(folder, part, step, count)
    return f"{told}: {reason}" if reason else f"{told}, for a reason that training.log has"


def failure_reason(folder: RunFolder, part: str, step: int, count: int) -> str:
    """Say what failed most often of a step's answers, of which item and how often; "" where nothing is known.

    `count` answers failed in all.
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

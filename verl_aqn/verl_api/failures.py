"""Why an answer never came: noted by a worker that has `NotingFailures`, and told by the trainer with the count.

A session that fails (its generation, or the reward of its answer, raised) leaves nothing in verl's queue: verl's worker
logs the error and goes on.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from verl_aqn.config import parse_aqn
from verl_aqn.errors import AqnError, first_line
from verl_aqn.runs.folder import RunFolder
from verl_aqn.verl_api.cause import root_cause

FILE = "failures.jsonl"
"""A line for each session that failed: set (train or val), RL step, uid, session, reason."""


class NotingFailures:
    """Goes before verl's worker among the bases of a class: a session that fails is on record with its reason."""

    async def _run_agent_loop(self, sampling_params, trajectory, **kwargs):
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)  # type: ignore[misc]
        except Exception as error:
            note(parse_aqn(self.config).run.dir, trajectory, kwargs, error)  # type: ignore[attr-defined]
            raise


def note(folder: str | None, trajectory: dict, prompt: dict, error: Exception) -> None:
    """Write one line; where the run's folder is not to be had, the log alone has the error."""
    cause = root_cause(error)
    record = {
        "set": "val" if trajectory["validate"] else "train",
        "step": int(trajectory["step"]),
        "uid": str(prompt.get("uid")),
        "session": int(prompt.get("session_id", 0)),
        "reason": f"{type(cause).__name__}: {first_line(cause)}"[:300],
    }
    with suppress(AqnError, OSError):
        RunFolder(Path(str(folder))).append(FILE, record)


def answered(keys: Sequence[str]) -> int:
    """How many sessions gave an answer; one with several outputs counts once. `keys`: verl's, UID_SESSION_INDEX."""
    return len({key.rsplit("_", 1)[0] for key in keys})


def failure_text(folder: RunFolder, part: str, step: int, asked: int, count: int) -> str:
    """Say that `count` of `asked` answers of a step failed, with the most frequent reason where one is known.

    `part` is train or val.
    """
    what = f"validation after step {step}" if part == "val" else f"step {step}"
    counted = " and count as wrong" if part == "val" else ", so that their groups teach less"
    told = f"{what}: {count:,} of {asked:,} answers failed{counted}"
    reason = failure_reason(folder, part, step)
    return f"{told}: {reason}; see training.log" if reason else f"{told}: training.log says why"


def failure_reason(folder: RunFolder, part: str, step: int) -> str:
    """The most frequent reason for which answers of a step failed, and how often; "" where none is known."""
    latest = {
        (record["uid"], record["session"]): record["reason"]
        for record in folder.read(FILE)
        if (record["set"], record["step"]) == (part, step)
    }
    if not latest:
        return ""
    (reason, times), *others = Counter(latest.values()).most_common()
    more = f", and {len(others)} other reason(s)" if others else ""
    return f"{reason} ({times:,} times{more})"

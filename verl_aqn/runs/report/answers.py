"""Responses of several validations side by side, for the same randomly but reproducibly chosen problems."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from verl_aqn.runs.accuracy import recorded
from verl_aqn.runs.report.page_data import Run


@dataclass(frozen=True)
class Answer:
    """A response of a run; `right` is None if the record does not say."""

    text: str
    right: bool | None


@dataclass(frozen=True)
class Item:
    """A problem and its responses, one per column (None if the problem was not asked).

    `kind`: right, wrong, differ or unknown.
    """

    prompt: str
    truth: str
    answers: tuple[Answer | None, ...]

    @property
    def kind(self) -> str:
        given = {answer.right for answer in self.answers if answer}
        if len(given) > 1:
            return "differ"
        return {True: "right", False: "wrong"}.get(next(iter(given), None), "unknown")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Answers:
    """The responses to show. `columns`: (name, colour) of each validation. `total`: the number of all problems.

    `before` and `after`: lines that all prompts begin and end with (instructions, worked examples); they are removed
    from the items.
    """

    columns: list[tuple[str, int]]
    before: str
    after: str
    items: list[Item]
    total: int


def read_answers(runs: Sequence[Run], wanted: int) -> Answers:
    """Return `wanted` problems: before and after training for one run, the last validation of each for several runs.

    The SHA-256 of the problem decides which ones are chosen: the choice is random, but the same in every report of the
    same problems. Problems that every column has come first.
    """
    if len(runs) == 1:
        chosen = [(runs[0], step) for step in sorted({*runs[0].answered[:1], *runs[0].answered[-1:]})]
    else:
        chosen = [(run, run.answered[-1]) for run in runs if run.answered]
    columns = [
        (f"{run.label}, after step {step}" if len(runs) > 1 else f"after step {step}", run.colour)
        for run, step in chosen
    ]
    read = [_answers(run, step) for run, step in chosen]
    problems = {problem for answers in read for problem in answers}
    order = sorted(problems, key=lambda one: (-sum(one in answers for answers in read), _digest(one)))[:wanted]
    items = [Item(*problem, tuple(answers.get(problem) for answers in read)) for problem in order]
    lines = [item.prompt.splitlines(keepends=True) for item in items]
    before = _shared([one[:-1] for one in lines])
    after = _shared([one[:before:-1] for one in lines])
    own = ["".join(one[before : len(one) - after]) for one in lines]
    items = [Item(text, item.truth, item.answers) for text, item in zip(own, items, strict=True)]
    begin, end = ("".join(lines[0][:before]), "".join(lines[0][len(lines[0]) - after :])) if lines else ("", "")
    return Answers(columns, begin, end, items, len(problems))


def _answers(run: Run, step: int) -> dict[tuple[str, str], Answer]:
    """Return the responses by (prompt, right answer); if a prompt has several responses, the first one."""
    found: dict[tuple[str, str], Answer] = {}
    for line in run.folder.read(f"validation/{step}.jsonl"):
        answer = Answer(str(line.get("output", "")), recorded(line))
        found.setdefault((str(line.get("input", "")), str(line.get("gts", "–"))), answer)
    return found


def _digest(problem: tuple[str, str]) -> str:
    return hashlib.sha256("\0".join(problem).encode(errors="replace")).hexdigest()


def _shared(prompts: list[list[str]]) -> int:
    """Return how many lines from the first on are the same in all prompts; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    return sum(1 for _ in itertools.takewhile(lambda line: len(set(line)) == 1, zip(*prompts, strict=False)))

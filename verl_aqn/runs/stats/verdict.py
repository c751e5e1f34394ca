"""What a result says about a recipe's target, and what a run changed, in sentences that claim no more than the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from verl_aqn.config.schema import TargetConfig
from verl_aqn.errors import DataError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.intervals import samples_of, validation_interval, validation_text
from verl_aqn.runs.stats.paired import LEVEL, of_items
from verl_aqn.runs.stats.scores import answers_in


def target_verdict(record: Mapping[str, Any], target: TargetConfig, comparable: bool) -> str:
    """Say whether the accuracy in a validation's record is above the target. Without a target, say the accuracy.

    With several responses per problem the accuracy is avg@k. `comparable`: the run is of the target's model and
    problems; otherwise it is not judged. DataError for no items or an accuracy outside [0, 1].
    """
    text, (low, high) = validation_text(record), validation_interval(record)
    if target.accuracy is None:
        return f"{text}."
    bar = f"{100 * target.accuracy:.2f} %"
    if not comparable:
        return f"{text}. The recipe's target of {bar} is for {target.task}: it is not comparable with this run."
    by = f" by avg@{samples}" if (samples := samples_of(record)) > 1 else ""
    met = "met" if record["accuracy"] > target.accuracy else "not met"
    verdict = f"{text}: the recipe's target (above {bar}) is {met}{by}"
    if low <= target.accuracy <= high:
        return f"{verdict}, but the interval contains {bar}: this run alone does not show a difference from it."
    return f"{verdict}, and the interval excludes {bar}."


@dataclass(frozen=True)
class Comparison:
    """The scores of the same `n` items before and after.

    Shares are fractions of 1; `interval` and `p_value` are from one test. `left_out`: items that have no response on
    one of the two sides.
    """

    n: int
    before: float
    after: float
    gained: int  # items with a higher score after; with one response each: wrong before, right after
    lost: int  # items with a lower score after
    p_value: float  # two-sided
    interval: tuple[float, float]  # of after - before, 95 %
    test: str
    left_out: int = 0

    @property
    def text(self) -> str:
        low, high = self.interval
        change = f"{100 * (self.after - self.before):+.1f} points"
        finding = "more than chance" if self.p_value < LEVEL else "chance alone may explain it"
        left = f" ({self.left_out} more have no response in one of the two)" if self.left_out else ""
        return (
            f"{100 * self.before:.1f} % -> {100 * self.after:.1f} % on the same {self.n} items{left}: {change} "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}); {self.gained} gained, {self.lost} lost, "
            f"{self.test} p = {self.p_value:.2g}: {finding}."
        )


def compare_before_after(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare paired per-item scores in [0, 1], in the same order of items. Test and interval: `of_items`.

    Raises DataError if the two differ in length or are empty.
    """
    if len(before) != len(after) or len(before) == 0:
        raise DataError(f"{len(before)} items before and {len(after)} after: the same items are needed on both sides")
    was, now = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    found = of_items(now - was)
    test = "McNemar" if np.isin([was, now], (0, 1)).all() else "score test over items,"
    gained, lost = int((now > was).sum()), int((now < was).sum())
    return Comparison(
        len(was), float(was.mean()), float(now.mean()), gained, lost, found.p_value, found.interval(), test
    )


def compare_validations(run: RunFolder, first: int, last: int) -> Comparison | None:
    """Compare the responses after two steps with `compare_before_after`, item by item.

    A score is avg@k if a problem has several responses. Returns None if no item was answered in both, or if the
    responses of a record cannot be assigned to items.
    """
    records = run.by_step("metrics.jsonl", "validation")
    try:
        before, after = (
            answers_in(
                [
                    {"gts": ""} | line
                    for line in run.read(f"validation/{step}.jsonl")
                    if {"input", "acc"} <= line.keys()
                ],
                record={"samples": records.get(step, {}).get("samples")},
            ).scores()
            for step in (first, last)
        )
    except DataError:
        return None
    both = sorted(before.keys() & after.keys())
    if not both:
        return None
    items = max(int(records.get(step, {}).get("items", len(both))) for step in (first, last))
    found = compare_before_after([before[key] for key in both], [after[key] for key in both])
    return replace(found, left_out=max(0, items - len(both)))

"""What a result says about the plan, and what a run changed, in sentences that claim no more than the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from verl_aqn.runs.accuracy import recorded
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats import accuracy_text, mcnemar, wilson

PLAN_MODEL = "Qwen2.5-1.5B-Instruct"
E12_ACCURACY = 0.7248  # E12 on GSM8K, Qwen2.5-1.5B-Instruct: the experiment plan's bar


def plan_verdict(accuracy: float, n: int, comparable: bool) -> str:
    """The plan's criterion (accuracy above `E12_ACCURACY`) for `accuracy`, a fraction of 1 over `n` items.

    `comparable`: the items are GSM8K's test set and the model is the plan's. DataError for no items or an accuracy
    outside [0, 1].
    """
    successes = round(accuracy * n)
    text, (low, high) = accuracy_text(successes, n), wilson(successes, n)
    bar = f"{100 * E12_ACCURACY:.2f} %"
    if not comparable:
        return (
            f"{text}. The plan's {bar} is of {PLAN_MODEL} on GSM8K's test problems: it is not comparable with this "
            "run, and the criterion is neither met nor missed."
        )
    met = accuracy > E12_ACCURACY
    verdict = f"{text}: the plan's criterion (above {bar}) is {'met' if met else 'not met'}"
    if low <= E12_ACCURACY <= high:
        return f"{verdict}, but the interval contains {bar}: this run alone does not show a difference from it."
    return f"{verdict}, and the interval excludes {bar}."


@dataclass(frozen=True)
class Comparison:
    """The same `n` items before and after. Shares are fractions of 1, `p_value` is two-sided."""

    n: int
    before: float
    after: float
    gained: int  # wrong before, right after
    lost: int  # right before, wrong after
    p_value: float
    interval: tuple[float, float]  # of after - before, 95 %

    @property
    def text(self) -> str:
        low, high = self.interval
        change = f"{100 * (self.after - self.before):+.1f} points"
        finding = "a difference" if self.p_value < 0.05 else "no difference beyond chance"
        return (
            f"{100 * self.before:.1f} % -> {100 * self.after:.1f} % on the same {self.n} items: {change} "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}); {self.gained} gained, {self.lost} lost, "
            f"exact McNemar p = {self.p_value:.2g}: {finding}."
        )


def compare_before_after(before: Sequence[bool], after: Sequence[bool]) -> Comparison:
    """Paired comparison of per-item results, in the same order of items.

    p: `mcnemar`, whose DataError it raises. Interval: Agresti and Min's adjusted Wald interval for paired shares
    (2005), half an item added to each cell.
    """
    gained, lost, p_value = mcnemar(before, after)
    n = len(before)
    total, up, down = n + 2, gained + 0.5, lost + 0.5
    middle = (up - down) / total
    half = NormalDist().inv_cdf(0.975) * math.sqrt((up + down) / total - middle**2) / math.sqrt(total)
    interval = (max(-1.0, middle - half), min(1.0, middle + half))
    return Comparison(n, sum(map(bool, before)) / n, sum(map(bool, after)) / n, gained, lost, p_value, interval)


def compare_validations(run: RunFolder, first: int, last: int) -> Comparison | None:
    """`compare_before_after` of the answers after two steps, by prompt.

    None where no prompt was answered in both, or where it is not on record of each answer whether it is right.
    """
    before, after = (
        {line["input"]: recorded(line) for line in run.read(f"validation/{step}.jsonl") if "input" in line}
        for step in (first, last)
    )
    if None in (*before.values(), *after.values()):
        return None
    both = sorted(before.keys() & after.keys())
    return compare_before_after(*([bool(one[key]) for key in both] for one in (before, after))) if both else None

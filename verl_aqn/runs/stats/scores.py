"""Answers of a validation by problem, and what is reckoned of them: avg@k or pass@k."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.accuracy import is_right
from verl_aqn.runs.stats.passk import avg_at_k, ks, pass_at_k

AVG = "avg"


class Item(NamedTuple):
    """A validation problem: the prompt and its right answer; `copy` counts problems that are alike in both, from 0."""

    prompt: str
    answer: str
    copy: int = 0


@dataclass(frozen=True)
class Answers:
    """Every item was answered `samples` times; `right` has how many of these answers were right."""

    right: dict[Item, int]
    samples: int

    def scores(self, metric: str = AVG) -> dict[Item, float]:
        """Score each item, a fraction of 1. ConfigError for a metric that `k_of` refuses or that takes more answers."""
        k = k_of(metric)
        if k is None:
            return {item: avg_at_k(count, self.samples) for item, count in self.right.items()}
        if k > self.samples:
            raise ConfigError(f"pass@{k} takes {k} answers to each problem, and there are {self.samples}")
        return {item: pass_at_k(count, self.samples, k) for item, count in self.right.items()}

    @property
    def metrics(self) -> list[str]:
        """The metrics that are shown of so many answers: avg, and pass@k of several."""
        return [AVG, *(f"pass@{k}" for k in ks(self.samples) if self.samples > 1)]


def k_of(metric: str) -> int | None:
    """The k of 'pass@k', None of 'avg'. ConfigError for anything else."""
    if metric == AVG:
        return None
    if found := re.fullmatch(r"pass@([1-9]\d*)", metric):
        return int(found.group(1))
    raise ConfigError(f"metric {metric!r} is neither avg nor pass@K, such as pass@8")


def answers_in(lines: Iterable[Mapping[str, Any]], rule: str = "acc", samples: int | None = None) -> Answers:
    """The answers in lines of a validation, right by `rule`: 1 or true; wrong: 0 or false.

    `item` tells problems apart, and `sample` the answers to one. Lines of older versions have neither: there one line a
    prompt is one problem with one answer. `samples`: how many answers to each were asked for, by the validation's
    record; one that never came is wrong, as it is in the record. None where the record does not tell.

    DataError where a line lacks a key or its rule is neither 0 nor 1, where a prompt is answered several times and the
    lines do not tell which problem and sample each is, or where problems were not answered equally often.
    """
    lines = list(lines)
    found: dict[tuple[str, str, int], dict[int, bool]] = {}
    try:
        unclear = [line[rule] for line in lines if is_right(line[rule]) is None]
        for line in lines:
            key = (line["input"], str(line["gts"]), int(line.get("item", -1)))
            found.setdefault(key, {})[int(line.get("sample", 0))] = is_right(line[rule]) is True
    except KeyError as error:
        raise DataError(f"has no {error} in a line: it is no validation of a run of ours") from error
    if unclear:
        raise DataError(
            f"has {rule}={json.dumps(unclear[0])} for {len(unclear)} of {len(lines)} answers, which is neither 0 nor "
            "1: whether these answers are right is not on record, so the run cannot be compared"
        )
    counts = {len(given) for given in found.values()}
    each = samples or max(counts, default=1)
    if (
        sum(map(len, found.values())) < len(lines)
        or not counts
        or max(counts) > each
        or (not samples and min(counts) < each)
    ):
        raise DataError(
            f"has {len(lines)} answers to {len(found)} problems: each problem needs the same number of answers, and "
            "several are told apart by `item` and `sample`, which records of older versions have not"
        )
    copies: Counter[tuple[str, str]] = Counter()
    right: dict[Item, int] = {}
    for key in sorted(found):
        right[Item(*key[:2], copies[key[:2]])] = sum(found[key].values())
        copies[key[:2]] += 1
    return Answers(right, each)

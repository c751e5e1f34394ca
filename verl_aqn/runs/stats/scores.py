"""Responses of a validation by problem, and the metrics computed from them: avg@k or pass@k."""

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
    """A validation problem: prompt and right answer. `copy` numbers problems that are equal in both, from 0."""

    prompt: str
    answer: str
    copy: int = 0


@dataclass(frozen=True)
class Answers:
    """Each item has `samples` responses; `right` has the number of right ones for each item.

    `silent`: the number of further items, of which no response came. Their prompts are not on record, and their
    responses count as wrong.
    """

    right: dict[Item, int]
    samples: int
    silent: int = 0

    @property
    def items(self) -> int:
        """Return the number of all items, with those of which no response came."""
        return len(self.right) + self.silent

    def values(self, metric: str = AVG) -> list[float]:
        """Return the score of every item: those of `scores`, and 0 for each item of which no response came."""
        return [*self.scores(metric).values(), *[0.0] * self.silent]

    def scores(self, metric: str = AVG) -> dict[Item, float]:
        """Score each item in `right`, as a fraction of 1.

        Raises ConfigError for a metric that `k_of` rejects or that needs more responses.
        """
        k = k_of(metric)
        if k is None:
            return {item: avg_at_k(count, self.samples) for item, count in self.right.items()}
        if k > self.samples:
            raise ConfigError(f"pass@{k} needs {k} responses to each problem, but there are {self.samples}")
        return {item: pass_at_k(count, self.samples, k) for item, count in self.right.items()}

    @property
    def metrics(self) -> list[str]:
        """Return the metrics that are reported for this number of responses: avg, and pass@k if there are several."""
        return [AVG, *(f"pass@{k}" for k in ks(self.samples) if self.samples > 1)]


def k_of(metric: str) -> int | None:
    """Return the k of 'pass@k', or None for 'avg'. Raises ConfigError for anything else."""
    if metric == AVG:
        return None
    if found := re.fullmatch(r"pass@([1-9]\d*)", metric):
        return int(found.group(1))
    raise ConfigError(f"metric {metric!r} is neither avg nor pass@K, such as pass@8")


def answers_in(
    lines: Iterable[Mapping[str, Any]], rule: str = "acc", record: Mapping[str, Any] | None = None
) -> Answers:
    """Collect the answers in lines of a validation. An answer is right if `rule` is 1 or true, wrong if 0 or false.

    `item` identifies a problem, and `sample` a response to it. Lines of older versions have neither: there, a prompt
    with one line is one problem with one response. `record`: the validation's record in metrics.jsonl. It says how many
    problems and responses were requested; a missing response counts as wrong, as it does in the record. Older records
    do not say how many responses are missing: there, a problem without a response is left out.

    Raises DataError if a line lacks a key or its rule is neither 0 nor 1, if a prompt has several responses and the
    lines do not say which problem and sample each is, if the problems do not have the same number of responses, or if
    the number of lines or of right ones is not that of the record.
    """
    record = record or {}
    samples, answered = record.get("samples"), record.get("answered")
    lines = list(lines)
    found: dict[tuple[str, str, int], dict[int, bool]] = {}
    try:
        unclear = [line[rule] for line in lines if is_right(line[rule]) is None]
        for line in lines:
            key = (line["input"], str(line["gts"]), int(line.get("item", -1)))
            found.setdefault(key, {})[int(line.get("sample", 0))] = is_right(line[rule]) is True
    except KeyError as error:
        raise DataError(f"has no {error} in a line: it was not written by a validation of verl-aqn") from error
    if unclear:
        raise DataError(
            f"has {rule}={json.dumps(unclear[0])} for {len(unclear)} of {len(lines)} responses, which is "
            "neither 0 nor 1: the record does not say whether these responses are right, so the run cannot be "
            "compared"
        )
    if answered is not None and answered != len(lines):
        raise DataError(
            f"has {len(lines)} responses, but metrics.jsonl counts {answered}: one of the files was cut or changed, so "
            "restore it, or leave this run out"
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
            f"has {len(lines)} responses to {len(found)} problems: each problem needs the same number of "
            "responses, and several responses are identified by `item` and `sample`, which records of older "
            "versions do not have"
        )
    copies: Counter[tuple[str, str]] = Counter()
    right: dict[Item, int] = {}
    for key in sorted(found):
        right[Item(*key[:2], copies[key[:2]])] = sum(found[key].values())
        copies[key[:2]] += 1
    if answered is None:
        return Answers(right, each)
    share = record.get("accuracy" if rule == "acc" else rule)
    correct, wanted = sum(right.values()), record["items"] * each
    if share is not None and correct != round(share * wanted):
        raise DataError(
            f"has {correct} right responses of {wanted}, but metrics.jsonl says {100 * share:.2f} %: one of the files "
            "was changed, so restore it, or leave this run out"
        )
    return Answers(right, each, record["items"] - len(right))

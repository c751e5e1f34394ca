"""Confidence intervals for accuracies and for means over items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from verl_aqn.errors import DataError

RESAMPLES = 10_000


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share (Wilson 1927): (low, high) as fractions of 1.

    Unlike the textbook ± interval, it stays within [0, 1] and is right near both ends. Both counts may be fractions (an
    average over several responses, an effective number of items). Raises DataError unless 0 <= successes <= n and n >=
    1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} right of {n} is not an accuracy: at least one item is needed")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # The interval reaches 0 or 1 exactly if all items agree; rounding would leave 1e-17.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def score_interval(scores: Sequence[float] | np.ndarray, samples: int = 1) -> tuple[float, float]:
    """Return the 95 % interval of a mean over problems, clustered by problem: (low, high) as fractions of 1.

    `scores`: [n], one in [0, 1] for each problem, computed from `samples` responses (avg@k, pass@k). This is Wilson's
    interval with the effective number of problems n·p(1 − p)/s², where s² is the variance of the scores over n: the
    design effect of clusters (Korn and Graubard 1998 use it in the exact interval; Dean and Pagano 2015 in Wilson's).
    For scores of 0 and 1 it equals Wilson's interval. The effective number is limited to n · `samples`, so that equal
    scores have an interval too, and to n if all responses are right or all are wrong.
    """
    values = np.asarray(scores, dtype=float)
    if len(values) == 0:
        raise DataError("no problem was answered: at least one is needed")
    n, share = len(values), float(values.mean())
    free, found = share * (1 - share), float(values.var())
    most = n * samples if free > 0 else n
    effective = min(n * free / found, most) if found > 1e-15 else most
    effective = n if effective < n * (1 + 1e-9) else effective  # for scores of 0 and 1 this is n except for rounding
    return wilson(min(share * effective, effective), effective)


def accuracy_text(successes: int, n: int) -> str:
    """Return a text such as '72.5 % (956 of 1319; 95 % interval 70.0–74.8 %)'."""
    low, high = wilson(successes, n)
    share = 100 * successes / n
    return f"{share:.1f} % ({successes} of {n}; 95 % interval {100 * low:.1f}–{100 * high:.1f} %)"


def validation_text(record: Mapping[str, Any]) -> str:
    """Return `accuracy_text` for a validation's record, or avg@k and pass@k if there are several responses per problem.

    The interval is `validation_interval`.
    """
    share, items, samples = record["accuracy"], record["items"], samples_of(record)
    if samples == 1:
        return accuracy_text(round(share * items), items)
    low, high = validation_interval(record)
    text = f"avg@{samples} {100 * share:.1f} % ({items} problems × {samples} responses; 95 % interval at most "
    text += f"{100 * low:.1f}–{100 * high:.1f} %)"
    return ", ".join([text, *(f"{passed} %" for passed in [pass_text(record)] if passed)])


def validation_interval(record: Mapping[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy in a validation's record, as fractions of 1.

    The interval of avg@k is the widest that the record allows: as if all responses to a problem were equal.
    """
    share, items = record["accuracy"], record["items"]
    return wilson(round(share * items) if samples_of(record) == 1 else share * items, items)


def samples_of(record: Mapping[str, Any]) -> int:
    """Return the number of responses per problem in a validation's record; older records have one."""
    return int(record.get("samples") or 1)


def passed_of(record: Mapping[str, Any]) -> list[str]:
    """Return ['pass@2 80.1', 'pass@8 91.3'], in percent, for a validation's record; [] for one response per problem."""
    shares = {int(k): share for k, share in (record.get("pass_at") or {}).items() if share is not None}
    return [f"pass@{k} {100 * shares[k]:.1f}" for k in sorted(shares) if k > 1]


def pass_text(record: Mapping[str, Any]) -> str:
    """Return the last text of `passed_of`, for the largest k; "" for one response per problem."""
    return (passed_of(record) or [""])[-1]


def share_text(share: float | None, n: int | None, unit: str = "") -> str:
    """Return '84.4 [78.6, 88.8]': a share of `n` items in percent, with its 95 % interval; '–' if there is none."""
    if share is None or not n:
        return "–"
    low, high = wilson(share * n, n)
    return f"{100 * share:.1f}{unit} [{100 * low:.1f}, {100 * high:.1f}]"


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Return (sum of `sums` / sum of `counts`, low, high): a mean per token with its 95 % interval, from sums by item.

    `sums` and `counts` are [n], one entry per item (a text, a prompt). Tokens of one item resemble each other, so whole
    items are drawn: the percentile bootstrap of a ratio over clusters (Efron and Tibshirani 1993, ch. 13; Davison and
    Hinkley 1997, sec. 3.8). The interval is too narrow if there are few items: for exponentially distributed items, 60
    items cover the truth in 92 % of trials, 16 in 88 %, and 4 in 77 %. The same `seed` draws the same items, so that
    values can be compared.
    """
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)

"""The error rate of `compare`: its verdicts on simulated runs of arms whose true difference is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from verl_aqn.runs.stats.arms import Arm, Run
from verl_aqn.runs.stats.compare import HELPS, HURTS, SAME, UNKNOWN, WANTED, compare
from verl_aqn.runs.stats.scores import Answers

SEEDS = (1, 2, 3, 5, 8, 12)
ITEMS = (100, 384, 1319)
SPREADS = (0.0, 0.01, 0.02, 0.03)  # standard deviation of a seed's accuracy
DIFFERENCES = (0.0, 0.02, 0.05)
ACCURACY = 0.75  # of the control
BY_ITEM, BY_ARM = 1.8, 0.4  # standard deviations of an item's log-odds, and of the part that differs between arms
SHARED = 0.5  # fraction of a seed's variance that both arms share


@cache
def _population() -> np.ndarray:
    """Return log-odds of items around their mean, at evenly spaced quantiles."""
    from scipy.stats import norm

    return norm.ppf((np.arange(20_000) + 0.5) / 20_000)


@cache
def _log_odds(accuracy: float, spread: float) -> tuple[float, float]:
    """Return the mean log-odds for a mean accuracy of `accuracy` over items and seeds, and the seeds' deviation.

    Both are on the log-odds scale; `spread` is the seeds' standard deviation in accuracy.
    """
    seed, middle = 0.0, 0.0
    for _ in range(20):  # the two values depend on each other
        wide = math.sqrt(BY_ITEM**2 + BY_ARM**2 + seed**2) * _population()
        low, high = -15.0, 15.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if float((1 / (1 + np.exp(-middle - wide))).mean()) < accuracy else (low, middle)
        share = 1 / (1 + np.exp(-middle - wide))
        seed = spread / float((share * (1 - share)).mean())
    return middle, seed


def answers(
    seeds: int, items: int, spread: float, difference: float, rng: np.random.Generator, accuracy: float = ACCURACY
) -> tuple[np.ndarray, np.ndarray]:
    """Draw (treated, control), [seeds, items] bool, of arms that differ by `difference` over all items and seeds.

    `spread`: standard deviation of a seed's accuracy. Accuracies are fractions of 1.
    """
    problems, common = rng.normal(0, BY_ITEM, items), rng.normal(0, math.sqrt(SHARED), (seeds, 1))
    drawn = []
    for share in (accuracy + difference, accuracy):
        middle, seed = _log_odds(share, spread)
        own = rng.normal(0, math.sqrt(1 - SHARED), (seeds, 1))
        odds = middle + problems + rng.normal(0, BY_ARM, items) + seed * (common + own)
        drawn.append(rng.random((seeds, items)) < 1 / (1 + np.exp(-odds)))
    return drawn[0], drawn[1]


def arm(name: str, scores: np.ndarray) -> Arm:
    """Return an arm in the form that `compare` takes, with seeds 0, 1, …"""
    runs = tuple(Run(Path(name), name, seed, {"arm": name}, Answers({}, 1)) for seed in range(len(scores)))
    return Arm(name, runs, scores.astype(float))


def rates(
    seeds: int, items: int, spread: float, difference: float, trials: int, accuracy: float = ACCURACY
) -> dict[str, float]:
    """Return the fraction of `trials` in which `compare` gave each verdict.

    The same arguments draw the same responses.
    """
    key = [seeds, items, *(round(10_000 * value) for value in (spread, difference, accuracy))]
    rng = np.random.default_rng(key)
    said: Counter[str] = Counter()
    for _ in range(trials):
        treated, control = answers(seeds, items, spread, difference, rng, accuracy)
        said[compare([arm("control", control), arm("treated", treated)]).arms[0].verdict] += 1
    return {verdict: said[verdict] / trials for verdict in (HELPS, HURTS, SAME, UNKNOWN)}


def survey(trials: int, accuracy: float, done: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Return `rates` for every number of seeds and items, spread of seeds and true difference, one row each."""
    rows: list[dict[str, Any]] = []
    cases = [(s, i, w, d) for s in SEEDS for i in ITEMS for w in SPREADS for d in DIFFERENCES]
    for at, (seeds, items, spread, difference) in enumerate(cases):
        found = rates(seeds, items, spread, difference, trials, accuracy)
        rows.append({"seeds": seeds, "items": items, "spread": spread, "difference": difference, "verdicts": found})
        done(at + 1, len(cases))
    return rows


def wrong(row: dict[str, Any]) -> float:
    """Return the fraction of a row's verdicts that are wrong.

    Wrong are a sign that does not exist, and "equivalent" for a difference of 5 points or more.
    """
    said, difference = row["verdicts"], row["difference"]
    return (
        (said[HELPS] if difference <= 0 else 0.0)
        + (said[HURTS] if difference >= 0 else 0.0)
        + (said[SAME] if abs(difference) >= WANTED else 0.0)
    )


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per number of seeds and items, with minimum and maximum over the seeds' spreads.

    `false`: the value of `wrong`, by true difference (0, 2 and 5 points). `reached`: the fraction of verdicts other
    than "not enough data", by true difference.
    """
    found = []
    for seeds, items in dict.fromkeys((row["seeds"], row["items"]) for row in rows):
        own = [row for row in rows if (row["seeds"], row["items"]) == (seeds, items)]
        by = {d: [row for row in own if row["difference"] == d] for d in DIFFERENCES}
        false = {d: _ends([wrong(row) for row in some]) for d, some in by.items()}
        reached = {d: _ends([1 - row["verdicts"][UNKNOWN] for row in some]) for d, some in by.items()}
        found.append({"seeds": seeds, "items": items, "false": false, "reached": reached})
    return found


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)

"""Accuracies over several seeds that answered the same items: both are samples, and both count in an interval.

A table of scores is [seeds, items], one an arm, with the same items in all arms: 0 or 1 where an item is answered once,
avg@k or pass@k where it is answered k times, so that an item is the cluster of its answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from verl_aqn.runs.stats.paired import LEVEL

MOST_SEEDS = 200


class Spread(NamedTuple):
    """A mean or a difference of means (fractions of 1), and what its variance is made of."""

    value: float
    shared: float  # variance that more seeds do not lessen, which items were drawn: unbiased, so it may be below 0
    per_seed: tuple[float, ...]  # variance of seed means, by arm
    residual: tuple[float, ...]  # the part of each that is chance item by item
    error: float  # standard error
    freedom: float  # degrees of freedom of `error`

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Give the interval that covers the truth in all but the share `level` of cases."""
        from scipy.stats import t

        half = float(t.isf(level / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Of no difference, two-sided. 1 where nothing differs at all, 0 where everything does and nothing varies."""
        from scipy.stats import t

        if self.error == 0:
            return float(self.value == 0)
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def spread(treated: np.ndarray, control: np.ndarray | None = None) -> Spread:
    """Mean of `treated`, [seeds, items], less that of `control` where there is one; at least two seeds each.

    Two-way random effects, seeds crossed with items (as readers with cases: Obuchowski and Rockette 1995). With
    S the variance of seed means over n, summed over arms, I the variance over items of the difference of item means
    over m, and E that of the residuals over n·m, summed over arms, S and I both hold E, and

        V = max(I − E, 0) + max(S, E)

    where S + I − E is the unbiased estimate and the bounds keep V from falling below S or I. Degrees of freedom are
    Satterthwaite's (1946) for S by arm (Welch's: arms need not spread alike; Hillis 2007 for readers and cases) and I.
    With endless items this is Welch's t-test of seed means, which does not pair seeds. For pairs `treated` is the
    difference of the two tables, row by row of one seed, and there is no `control`: then it is the paired t-test, with
    n − 1 degrees of freedom in place of about 2 (n − 1).

    Simulated false positives at 5 % are 1 to 3 % where seeds do not differ and 3 to 7 % where they differ much (2 to 5
    seeds, 192 and 1319 items; the 7 % are two seeds against five: take as many of each), of five pairs 1 to 6 %. A test
    of items alone, which ignores seeds, then has 29 to 65 %.
    """
    tables = [np.asarray(arm, dtype=float) for arm in (treated, control) if arm is not None]
    items, seeds = tables[0].shape[1], [len(table) for table in tables]
    per_seed, residual = [], []
    for table in tables:
        per_seed.append(float(table.mean(1).var(ddof=1)))
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        residual.append(float((rest**2).sum()) / ((len(table) - 1) * max(items - 1, 1)) / items)
    by_item = tables[0].mean(0) - (tables[1].mean(0) if len(tables) > 1 else 0.0)
    of_items = float(by_item.var(ddof=1)) / items if items > 1 else 0.0
    shared = of_items - _of_means(residual, seeds)
    error, freedom = _error(shared, per_seed, residual, seeds, items)
    return Spread(float(by_item.mean()), shared, tuple(per_seed), tuple(residual), error, freedom)


def _of_means(variances: Sequence[float], seeds: Sequence[int]) -> float:
    """Variance of the difference of arms' means, of the variance of a seed and the number of seeds by arm."""
    return sum(variance / count for variance, count in zip(variances, seeds, strict=True))


def _error(
    shared: float, per_seed: Sequence[float], residual: Sequence[float], seeds: Sequence[int], items: int
) -> tuple[float, float]:
    """Standard error and degrees of freedom by `spread`'s formula, for any number of `seeds` by arm."""
    by_chance = _of_means(residual, seeds)
    variance = max(shared, 0.0) + max(_of_means(per_seed, seeds), by_chance)
    spare = sum((of_seed / count) ** 2 / (count - 1) for of_seed, count in zip(per_seed, seeds, strict=True))
    spare += max(shared + by_chance, 0.0) ** 2 / max(items - 1, 1)
    return math.sqrt(variance), variance**2 / spare if spare else 1.0


def seeds_needed(
    shared: float,
    per_seed: Sequence[float],
    items: int,
    half_width: float,
    residual: Sequence[float] = (),
    level: float = LEVEL,
) -> int | None:
    """Seeds an arm, two or more, with which the interval at `level` is at most ± `half_width` (fraction of 1) wide.

    None where `MOST_SEEDS` are too few. `shared`, `per_seed` and `residual` are `Spread`'s, with an entry for each arm
    (of pairs one); without `residual` it is taken to be 0. What was found with so many seeds an arm already is reckoned
    alike, by `spread`'s formula.
    """
    from scipy.stats import t

    residual = residual or [0.0] * len(per_seed)
    at_least = NormalDist().inv_cdf(1 - level / 2)  # a t-distribution's is more, and takes a hundred times as long
    for seeds in range(2, MOST_SEEDS + 1):
        error, freedom = _error(shared, per_seed, residual, [seeds] * len(per_seed), items)
        if at_least * error <= half_width and float(t.isf(level / 2, freedom)) * error <= half_width:
            return seeds
    return None

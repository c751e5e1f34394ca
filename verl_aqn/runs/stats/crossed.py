"""Accuracies over several seeds that answered the same items: intervals account for both seeds and items.

A table of scores is [seeds, items], one per arm, with the same items in all arms. A score is 0 or 1 if an item is
answered once, and avg@k or pass@k if it is answered k times, so that an item is the cluster of its responses.
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
    """A mean or a difference of means (fractions of 1), with the parts of its variance."""

    value: float
    # variance due to the choice of items, which more seeds do not reduce; an unbiased estimate, so it may be below 0
    shared: float
    per_seed: tuple[float, ...]  # variance of the means of seeds, by arm
    residual: tuple[float, ...]  # the part of each `per_seed` that is chance item by item
    error: float  # standard error
    freedom: float  # degrees of freedom of `error`

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval that covers the truth in all but the share `level` of cases."""
        from scipy.stats import t

        half = float(t.isf(level / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Return the two-sided p value of no difference.

        It is 1 if nothing differs at all, and 0 if there is a difference without any variance.
        """
        from scipy.stats import t

        if self.error == 0:
            return float(self.value == 0)
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def spread(treated: np.ndarray, control: np.ndarray | None = None) -> Spread:
    """Estimate the mean of `treated`, [seeds, items], minus that of `control` if given; each needs at least two seeds.

    Two-way random effects, seeds crossed with items (like readers with cases: Obuchowski and Rockette 1995). Let S be
    the variance of seed means over n, summed over arms; I the variance over items of the difference of item means, over
    m; and E the variance of the residuals over n·m, summed over arms. S and I both contain E, and

        V = max(I − E, 0) + max(S, E)

    S + I − E is the unbiased estimate, and the bounds keep V from falling below S or I. Degrees of freedom are
    Satterthwaite's (1946) for S by arm (Welch's: arms may vary differently; Hillis 2007 for readers and cases) and I.

    With infinitely many items this is Welch's t-test of seed means, which does not pair seeds. For pairs, `treated` is
    the difference of the two tables, row by row for the same seed, and there is no `control`: then it is the paired
    t-test, with n − 1 degrees of freedom instead of about 2 (n − 1).

    Simulated false positives at 5 % are 1 to 3 % if seeds do not differ and 3 to 7 % if they differ much (2 to 5 seeds,
    192 and 1319 items; the 7 % are for two seeds against five, so use the same number of each), and 1 to 6 % for five
    pairs. A test over items alone, which ignores seeds, then has 29 to 65 %.
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
    """Return the variance of the difference of arms' means, from the variance and the number of seeds of each arm."""
    return sum(variance / count for variance, count in zip(variances, seeds, strict=True))


def _error(
    shared: float, per_seed: Sequence[float], residual: Sequence[float], seeds: Sequence[int], items: int
) -> tuple[float, float]:
    """Return the standard error and degrees of freedom by `spread`'s formula, for any number of `seeds` per arm."""
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
    """Return the seeds per arm (2 or more) for which the interval at `level` is at most ±`half_width` (fraction of 1).

    Returns None if `MOST_SEEDS` are not enough. `shared`, `per_seed` and `residual` are those of `Spread`, with one
    entry for each arm (one entry for pairs); without `residual` it is assumed to be 0. For the number of seeds that was
    measured, the result is the same as that of `spread`.
    """
    from scipy.stats import t

    residual = residual or [0.0] * len(per_seed)
    # the quantile of the t-distribution is larger and takes a hundred times as long to compute
    at_least = NormalDist().inv_cdf(1 - level / 2)
    for seeds in range(2, MOST_SEEDS + 1):
        error, freedom = _error(shared, per_seed, residual, [seeds] * len(per_seed), items)
        if at_least * error <= half_width and float(t.isf(level / 2, freedom)) * error <= half_width:
            return seeds
    return None

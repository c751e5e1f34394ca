"""Accuracies over several seeds that answered the same items: both are samples, and both count in an interval.

Items are correct or not: a table of answers is [seeds, items], one an arm, with the same items in all arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verl_aqn.runs.stats import RESAMPLES

LEVEL = 0.05  # two-sided
POWER = 0.8
MOST_SEEDS = 200


class Spread(NamedTuple):
    """A mean or a difference of means (fractions of 1), and what its variance is made of."""

    value: float
    shared: float  # variance that more seeds do not lessen, which items were drawn: unbiased, so it may be below 0
    per_seed: tuple[float, ...]  # variance of seed means, by arm
    residual: tuple[float, ...]  # the part of each that is chance item by item
    error: float  # standard error
    freedom: float  # degrees of freedom of `error`

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        from scipy.stats import t

        half = float(t.isf(LEVEL / 2, self.freedom)) * self.error
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


def bootstrap(treated: np.ndarray, control: np.ndarray | None = None) -> tuple[float, float]:
    """95 % percentile interval of what `spread` estimates: seeds drawn in each arm, then items, the same in both arms.

    With one seed each this is the paired bootstrap of items (Efron and Tibshirani 1993). Of n seeds n − 1 are drawn,
    without which the spread between few seeds comes out too small by (n − 1) / n (Rao and Wu 1988). It is shown and
    does not decide: it knows no t-distribution, and draws on two levels count the residuals up to three times (Owen
    2007). In simulations of no difference (2, 3 and 5 seeds, 192 and 1319 items) it covered 81 % (two seeds that differ
    much) to 100 % (seeds that do not), and drawing n seeds 72 to 100 %, where `Spread.interval` covered 93 to 99 %.
    """
    rng = np.random.default_rng(0)
    tables = [np.asarray(arm, dtype=np.float32) for arm in (treated, control) if arm is not None]
    items, batch = tables[0].shape[1], 500  # rows at a time: 2.6 MB for GSM8K's 1319 items
    drawn = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, batch):
        means = []
        for table in tables:
            draws = max(len(table) - 1, 1)
            counts = rng.multinomial(draws, np.full(len(table), 1 / len(table)), batch)
            means.append((counts / draws).astype(np.float32) @ table)
        chosen = rng.integers(items, size=(batch, items))
        difference = means[0] - means[1] if len(means) > 1 else means[0]
        drawn[start : start + batch] = np.take_along_axis(difference, chosen, axis=1).mean(1)
    low, high = np.percentile(drawn, [50 * LEVEL, 100 - 50 * LEVEL])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order (Holm 1979): the family's error stays below 5 %."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def detectable(error: float, freedom: float, level: float = LEVEL) -> float:
    """The difference (fraction of 1) that a two-sided test at `level` finds in 80 % of cases.

    (t(1 − level / 2) + t(80 %)) · standard error: Bloom 1995. Of few degrees of freedom it is somewhat less: of two
    77 % at 5 % and 72 % at a third of that, of four 79 % and 76 %.

    Of one of m tests that `holm` corrects together the level is 5 % / m: there its first step rejects, whatever the
    others find.
    """
    from scipy.stats import t

    return float(t.isf(level / 2, freedom) + t.isf(1 - POWER, freedom)) * error


def detectable_by_pairs(gained: int, lost: int, items: int, level: float = LEVEL) -> float:
    """As `detectable`, for McNemar's test of one run each: Connor 1987, solved for the difference d,

    d √m = z(1 − level / 2) √ψ + z(80 %) √(ψ − d²), with ψ the share of answers that differ, half an item added to each
    of `gained` and `lost` (Agresti and Min 2005), so that it is not 0 where none differs.
    """
    from scipy.stats import norm

    unlike = (gained + lost + 1) / (items + 2)
    bound, power = float(norm.isf(level / 2)) * math.sqrt(unlike), float(norm.isf(1 - POWER))
    square, rest = items + power**2, bound**2 - power**2 * unlike
    # Of three items or fewer nothing is found in 80 % of cases: the root is of a negative number.
    return (bound * math.sqrt(items) + math.sqrt(max(bound**2 * items - square * rest, 0.0))) / square


def seeds_needed(
    shared: float,
    per_seed: Sequence[float],
    items: int,
    difference: float,
    residual: Sequence[float] = (),
    level: float = LEVEL,
) -> int | None:
    """Seeds an arm, two or more, of which `detectable` is at most `difference`; None where `MOST_SEEDS` are too few.

    `shared`, `per_seed` and `residual` are `Spread`'s, with an entry for each arm (of pairs one); without `residual`
    it is taken to be 0. What was found with so many seeds an arm already is reckoned alike, by `spread`'s formula.
    """
    residual = residual or [0.0] * len(per_seed)
    for seeds in range(2, MOST_SEEDS + 1):
        error, freedom = _error(shared, per_seed, residual, [seeds] * len(per_seed), items)
        if detectable(error, freedom, level) <= difference:
            return seeds
    return None

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
    shared: float  # variance that more seeds do not lessen: which items were drawn
    per_seed: float  # variance that n seeds an arm divide by n, summed over arms
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
    items = tables[0].shape[1]
    by_seed, residual, spare, per_seed, per_seed_residual = 0.0, 0.0, 0.0, 0.0, 0.0
    for table in tables:
        seeds = len(table)
        of_seed = float(table.mean(1).var(ddof=1))
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        of_rest = float((rest**2).sum()) / ((seeds - 1) * max(items - 1, 1)) / items
        by_seed, per_seed = by_seed + of_seed / seeds, per_seed + of_seed
        residual, per_seed_residual = residual + of_rest / seeds, per_seed_residual + of_rest
        spare += (of_seed / seeds) ** 2 / (seeds - 1)
    by_item = tables[0].mean(0) - (tables[1].mean(0) if len(tables) > 1 else 0.0)
    of_items = float(by_item.var(ddof=1)) / items if items > 1 else 0.0
    shared = max(of_items - residual, 0.0)
    variance = shared + max(by_seed, residual)
    spare += of_items**2 / max(items - 1, 1)
    return Spread(
        float(by_item.mean()),
        shared,
        max(per_seed, per_seed_residual),
        math.sqrt(variance),
        variance**2 / spare if spare else 1.0,
    )


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


def detectable(error: float, freedom: float) -> float:
    """The difference (fraction of 1) that a two-sided test at 5 % finds in 80 % of cases.

    (t(97.5 %) + t(80 %)) · standard error: Bloom 1995.
    """
    from scipy.stats import t

    return float(t.isf(LEVEL / 2, freedom) + t.isf(1 - POWER, freedom)) * error


def detectable_by_pairs(gained: int, lost: int, items: int) -> float:
    """As `detectable`, for McNemar's test of one run each: Connor 1987, solved for the difference d,

    d √m = z(97.5 %) √ψ + z(80 %) √(ψ − d²), with ψ the share of answers that differ, half an item added to each of
    `gained` and `lost` (Agresti and Min 2005), so that it is not 0 where none differs.
    """
    from scipy.stats import norm

    unlike = (gained + lost + 1) / (items + 2)
    level, power = float(norm.isf(LEVEL / 2)) * math.sqrt(unlike), float(norm.isf(1 - POWER))
    square, rest = items + power**2, level**2 - power**2 * unlike
    # Of three items or fewer nothing is found in 80 % of cases: the root is of a negative number.
    return (level * math.sqrt(items) + math.sqrt(max(level**2 * items - square * rest, 0.0))) / square


def seeds_needed(shared: float, per_seed: float, items: int, difference: float, tables: int = 2) -> int | None:
    """Seeds an arm, two or more, of which `detectable` is at most `difference`; None where `MOST_SEEDS` are too few.

    `shared` and `per_seed` are `Spread`'s, of two arms that are taken to spread alike or, with `tables` 1, of their
    pairs.
    """
    for seeds in range(2, MOST_SEEDS + 1):
        variance = shared + per_seed / seeds
        spare = (per_seed / seeds) ** 2 / (tables * (seeds - 1)) + shared**2 / max(items - 1, 1)
        if variance == 0 or detectable(math.sqrt(variance), variance**2 / spare) <= difference:
            return seeds
    return None

"""A difference of paired answers with a test and an interval that agree with each other."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

LEVEL = 0.05  # two-sided


class Difference(Protocol):
    """A difference (fraction of 1) whose `p_value` is below a level exactly when its `interval` excludes 0."""

    @property
    def value(self) -> float: ...

    @property
    def p_value(self) -> float: ...

    def interval(self, level: float = LEVEL) -> tuple[float, float]: ...


class Strictest(NamedTuple):
    """Several tests of one difference: all must be significant, and the interval spans all of theirs."""

    parts: tuple[Difference, ...]

    @property
    def value(self) -> float:
        return self.parts[0].value

    @property
    def p_value(self) -> float:
        return max(part.p_value for part in self.parts)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval that covers the truth in all but the share `level` of cases."""
        lows, highs = zip(*(part.interval(level) for part in self.parts), strict=True)
        return min(lows), max(highs)


class Changes(NamedTuple):
    """`gained` of `items` items became right and `lost` became wrong: Tango's score test (1998) of the difference.

    For the difference d the statistic is

        T(d) = (gained − lost − n·d) / √(n·(2q + d(1 − d))),

    where q is the maximum-likelihood share of lost items if the difference is d. T is compared with the normal
    distribution. For d = 0 this is McNemar's test without correction (1947). The interval is all d that the test does
    not reject, so it excludes 0 exactly when the test finds a difference. Counts may be fractions.

    Chosen by exact rates over all tables (tests/unit/runs/test_paired.py) of 50 to 1319 items, with 2 to 50 % of them
    changed: the test finds a difference that does not exist in 0.2 to 5.4 % of cases (for 8 to 40 items in up to 6.6
    %), and the interval covers the truth in at least 93.4 % of cases. Fagerland, Lydersen and Laake recommend both
    (2013; 2014). McNemar's exact conditional test errs in 0 to 4.6 % of cases, and inverting it gives an interval of an
    odds ratio.
    """

    gained: float
    lost: float
    items: float

    @property
    def value(self) -> float:
        return (self.gained - self.lost) / self.items

    def statistic(self, difference: float) -> float:
        """Return T for a difference (fraction of 1); T is infinite if its variance at that difference is 0."""
        n, d = self.items, difference
        b = (2 * n - self.gained + self.lost) * d - self.gained - self.lost
        root = math.sqrt(max(b * b + 8 * n * self.lost * d * (1 - d), 0.0))
        spread = n * (2 * (root - b) / (4 * n) + d * (1 - d))
        above = self.gained - self.lost - n * d
        if spread <= 1e-12:
            return 0.0 if abs(above) < 1e-9 else math.copysign(math.inf, above)
        return above / math.sqrt(spread)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval that covers the truth in all but the share `level` of cases."""
        from statistics import NormalDist

        bound = NormalDist().inv_cdf(1 - level / 2)
        return self._where(bound), self._where(-bound)

    def _where(self, bound: float) -> float:
        """Return the difference whose statistic is `bound`, by bisection: the statistic falls from −1 to 1."""
        low, high = (-1.0, self.value) if bound > 0 else (self.value, 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.statistic(middle) > bound else (low, middle)
        return (low + high) / 2

    @property
    def p_value(self) -> float:
        """Return the two-sided p value of no difference."""
        changed = self.gained + self.lost
        return math.erfc(abs(self.gained - self.lost) / math.sqrt(2 * changed)) if changed else 1.0


def of_items(differences: np.ndarray) -> Changes:
    """Test the mean of `differences`, [items], each of two scores in [0, 1], with Tango's test.

    An item whose score is between 0 and 1 (avg@k, pass@k, a mean over seeds) is the cluster of its responses. Counts
    are scaled to the effective number of items n·Σ|d| / Σd², so that an item that changed completely has the same
    weight as it would alone. Mean and variance are then those of the differences (the design effect, as Rao and Scott
    1992 apply it to tests of counts). For right and wrong responses the effective number is n.
    """
    values, n = np.asarray(differences, dtype=float), len(differences)
    gained, lost = float(values[values > 0].sum()), -float(values[values < 0].sum())
    squares = float((values**2).sum())
    scale = (gained + lost) / squares if squares > 0 else 1.0
    return Changes(gained * scale, lost * scale, n * scale)

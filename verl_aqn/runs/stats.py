"""Intervals for accuracies. Standard library only."""

from __future__ import annotations

import math
from statistics import NormalDist

from verl_aqn.errors import DataError


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927): (low, high) as fractions of 1.

    Unlike the textbook ± it stays within [0, 1] and is right near both ends. DataError unless 0 <= successes <= n
    and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} right of {n} is no accuracy: at least one item is needed")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # The interval touches 0 and 1 exactly when all items agree; rounding would leave 1e-17.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def accuracy_text(successes: int, n: int) -> str:
    """'72.5 % (956 of 1319; 95 % interval 70.0–74.8 %)'."""
    low, high = wilson(successes, n)
    share = 100 * successes / n
    return f"{share:.1f} % ({successes} of {n}; 95 % interval {100 * low:.1f}–{100 * high:.1f} %)"

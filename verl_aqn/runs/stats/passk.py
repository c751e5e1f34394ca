"""avg@k and pass@k of problems with several responses each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from verl_aqn.errors import DataError


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Estimate without bias the chance that one of `k` responses to a problem is right, as a fraction of 1.

    The estimate is 1 − C(samples − right, k) / C(samples, k), where `right` of `samples` responses are right: the share
    of the subsets of k responses that contain a right one (Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code", eq. 1). Raises DataError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    _check(right, samples)
    if not 1 <= k <= samples:
        raise DataError(f"pass@{k} of {samples} responses to a problem: k must be from 1 to {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def avg_at_k(right: int, samples: int) -> float:
    """Return the share of right responses to a problem, as a fraction of 1.

    This equals pass@1. Raises DataError under the same conditions as `pass_at_k`.
    """
    _check(right, samples)
    return right / samples


def ks(samples: int) -> list[int]:
    """Return the values of k that are reported for `samples` responses per problem: 1, 2, 4, … and `samples`."""
    if samples < 1:
        raise DataError(f"{samples} responses to a problem: at least one is needed")
    return [*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples]


def mean_pass(right: Sequence[int], samples: int) -> dict[int, float]:
    """Give the mean pass@k over problems, as {k: fraction of 1} for all k of `ks`.

    `right` has for each problem the number of its right answers, of `samples`.
    """
    return {k: _mean([pass_at_k(count, samples, k) for count in right]) for k in ks(samples)}


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise DataError("no problem was answered: at least one is needed")
    return math.fsum(values) / len(values)


def _check(right: int, samples: int) -> None:
    if samples < 1 or not 0 <= right <= samples:
        raise DataError(f"{right} right of {samples} responses to a problem is impossible")

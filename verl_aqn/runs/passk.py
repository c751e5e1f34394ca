"""avg@k and pass@k of problems that were answered several times each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from verl_aqn.errors import DataError


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Estimate without bias the chance that one of `k` answers to a problem is right, as a fraction of 1.

    1 − C(samples − right, k) / C(samples, k), where `right` of `samples` answers are right: the share of the subsets of
    k answers that hold a right one (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1).
    DataError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    _check(right, samples)
    if not 1 <= k <= samples:
        raise DataError(f"pass@{k} of {samples} answers to a problem: k is from 1 to {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def avg_at_k(right: int, samples: int) -> float:
    """Give the share of right answers to a problem, a fraction of 1. It equals pass@1. DataError as `pass_at_k`."""
    _check(right, samples)
    return right / samples


def ks(samples: int) -> list[int]:
    """List the k that are told of `samples` answers to a problem: 1, 2, 4, … up to `samples`, and `samples`."""
    if samples < 1:
        raise DataError(f"{samples} answers to a problem: at least one is needed")
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
        raise DataError(f"{right} right of {samples} answers to a problem: that cannot be")

"""How near a copy of a tensor is, in float64."""

import math

from torch import Tensor


def energies(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(sum x^2, sum (x - y)^2)."""
    return x.double().square().sum().item(), (x.double() - y.double()).square().sum().item()


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal to noise of ``y``, a copy of ``x`` that is not exact."""
    signal, noise = energies(x, y)
    return 10 * math.log10(signal / noise)

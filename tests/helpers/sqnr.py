"""Differences between a tensor and its copy, in float64."""

import math

from torch import Tensor


def energies(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return (sum x^2, sum (x - y)^2)."""
    return x.double().square().sum().item(), (x.double() - y.double()).square().sum().item()


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Return the signal-to-noise ratio in dB of ``y``, an inexact copy of ``x``."""
    signal, noise = energies(x, y)
    return 10 * math.log10(signal / noise)

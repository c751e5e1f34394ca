"""Adaptive quantization noise: N(0, σ²) on the weights of norms, and evidence that the weights contain it.

Noise is a function, not a state: `draw(seed, step, name, numel)` returns the same numbers in every process, and weights
are always written as clean + noise. The written weights are then read back, and the noise is measured.
"""

from verl_aqn.judge.noise import check_equal_noise, check_evidence, check_norms, check_used, sigma_interval
from verl_aqn.noise.expected import expected_norms
from verl_aqn.noise.gaussian import draw
from verl_aqn.noise.injector import NoiseInjector
from verl_aqn.noise.norms import find_norms
from verl_aqn.order import UNITS, NoiseOrder

__all__ = [
    "UNITS",
    "NoiseInjector",
    "NoiseOrder",
    "check_equal_noise",
    "check_evidence",
    "check_norms",
    "check_used",
    "draw",
    "expected_norms",
    "find_norms",
    "sigma_interval",
]

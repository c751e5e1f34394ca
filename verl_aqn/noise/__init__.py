"""Adaptive quantization noise: N(0, σ²) on the weights of norms, and evidence that the weights contain it.

Noise is a function, not a state: `draw(seed, step, name, numel)` returns the same numbers in every process, and weights
are always written as clean + noise. The written weights are then read back, and the noise is measured.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_aqn.noise.checks import check_equal_noise, check_evidence, check_norms, check_used, sigma_interval
    from verl_aqn.noise.expected import expected_norms
    from verl_aqn.noise.injector import NoiseInjector
    from verl_aqn.noise.norms import find_norms
    from verl_aqn.noise.rng import draw
    from verl_aqn.noise.spec import UNITS, NoiseOrder, NoiseSpec

__all__ = [
    "UNITS",
    "NoiseInjector",
    "NoiseOrder",
    "NoiseSpec",
    "check_equal_noise",
    "check_evidence",
    "check_norms",
    "check_used",
    "draw",
    "expected_norms",
    "find_norms",
    "sigma_interval",
]
_CHECKS = ("check_equal_noise", "check_evidence", "check_norms", "check_used", "sigma_interval")
_MODULES = dict.fromkeys(_CHECKS, "checks") | {
    "UNITS": "spec",
    "NoiseOrder": "spec",
    "NoiseSpec": "spec",
    "NoiseInjector": "injector",
    "draw": "rng",
    "expected_norms": "expected",
    "find_norms": "norms",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the schedule and the specification must not need torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

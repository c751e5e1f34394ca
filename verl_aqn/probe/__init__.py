"""What σ does to the policy before training. `measure.py` says how; `strength.py` what follows from it."""

from verl_aqn.probe.measure import PROMPTS, SAMPLES, Probe, Strength
from verl_aqn.probe.strength import (
    FACTORS,
    START_PROMPTS,
    START_TOKENS,
    check_strength,
    fit_sigma,
    measure_start,
    survey,
)

__all__ = [
    "FACTORS",
    "PROMPTS",
    "SAMPLES",
    "START_PROMPTS",
    "START_TOKENS",
    "Probe",
    "Strength",
    "check_strength",
    "fit_sigma",
    "measure_start",
    "survey",
]

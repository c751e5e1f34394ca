"""What σ does to the policy before training. `measure.py` says how; `strength.py` what follows from it."""

from verl_aqn.preflight.probe.measure import PROMPTS, SAMPLES, Probe, Strength
from verl_aqn.preflight.probe.strength import (
    CLEAR_GROUPS,
    FACTORS,
    FIT_TOKENS,
    START_GROUPS,
    SURE_GROUPS,
    check_strength,
    fit_sigma,
    measure_start,
    survey,
)

__all__ = [
    "CLEAR_GROUPS",
    "FACTORS",
    "FIT_TOKENS",
    "PROMPTS",
    "SAMPLES",
    "START_GROUPS",
    "SURE_GROUPS",
    "Probe",
    "Strength",
    "check_strength",
    "fit_sigma",
    "measure_start",
    "survey",
]

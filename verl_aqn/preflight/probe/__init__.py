"""Measurement of the effect of σ on the policy before training (`measure.py`), and its uses (`strength.py`)."""

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

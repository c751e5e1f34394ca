"""The public name of the noise schedule: `verl_aqn.schedule.SigmaSchedule`."""

from verl_aqn.noise.schedule import SigmaSchedule

__all__ = ["SigmaSchedule"]

"""The public name of the noise schedule: `verl_aqn.noise.schedule.SigmaSchedule`."""

from verl_aqn.noise.schedule import SigmaSchedule

__all__ = ["SigmaSchedule"]

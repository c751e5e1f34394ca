"""Names of a run's phases that its trainer records and its watchdog knows."""

TRACKERS = "trackers"  # the phase that sends metrics to experiment trackers


ENDING = "ending"  # the phase in which processes may end

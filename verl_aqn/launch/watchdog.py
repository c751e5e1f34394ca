"""Notice a run that hangs, or goes on without one of its processes."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from verl_aqn.runs.phases import ENDING, TRACKERS
from verl_aqn.runs.processes import title
from verl_aqn.runs.stacks import listening

LEAST_S = 60  # no phase is late before
FIRST_S = 3600  # how long all processes may be idle in a phase of which nobody knows yet how long it takes
ENDING_S = 300  # from a run's last word to its end
GRACE_S = 3  # for a run to say itself why a process of it died
RAY_GRACE_S = 2  # for the run's own word that it ends: of its head's loss Ray says nothing for a minute
LOOK_S = 2
ASLEEP_S = 30  # a watchdog that was not asked for so long was stopped itself, and the run with it
WEIGH_S = 60  # the time over which a process is idle or not
BUSY = 0.05  # the share of a core from which on it is not; idle processes of a run were measured at 0.005
# Phases that wait for what is outside of the run: a server that tries again, a network's disk.
_OUTSIDE = {TRACKERS: 3600, "checkpoint": 600}
RAY = ("raylet", "gcs_server")  # no Python, so they promise nothing; without them nothing works
# The actors without which a run cannot go on. What a user's own code starts may come and go.
_ACTORS = (
    "AqnTaskRunner", "WorkerDict", "AqnHttpServer", "AqnAgentLoopWorker", "RewardLoopWorker",
    "GlobalRequestLoadBalancer", "SimpleStorageUnit", "TransferQueueController",
)  # fmt: skip
_VITAL = ("VLLM::", *(f"ray::{name}" for name in _ACTORS))


class Watchdog:
    """Told of the run's records (`record`); `fault()` says what is wrong, "" where nothing is.

    A phase is late after `patience` times the median of its earlier durations, and not before `LEAST_S` (`_OUTSIDE`
    names longer ones). One that is seen for the first time is late when no process of the run has worked for `FIRST_S`;
    where processes are on machines that this one cannot see (`alone=False`), never. `patience` 0: no phase is late.
    `clock`: seconds, from any beginning.
    """

    def __init__(
        self, patience: float, stacks: Path, *, alone: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.patience = patience
        self.stacks = stacks
        self.alone = alone
        self.clock = clock
        self.phase, self.step = "starting", None
        now = clock()
        self.began = self.since = now  # of the phase; of what it is patient with
        self.durations: dict[str, list[float]] = {}
        self.vital: dict[int, str] = {}
        self.dead: dict[int, float] = {}
        self.asked = self.worked = self.weighed = now
        self.looked = now - LOOK_S
        self.seconds: dict[int, float] = {}  # of a core, that each process had used at `weighed`
        self.told = 0  # hours of the present phase
        # In seconds since the epoch, as the times of records and errors: when each process was last seen alive, when it
        # was first missed, and when phases began.
        self.seen: dict[int, float] = {}
        self.missed: dict[int, float] = {}
        self.passed: list[tuple[float, str]] = []

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Phases begin with records of the kinds `doing` (every step) and `phase` (the start of a run).

        Their times are not used: a clock may be set, and may be another machine's. The same phase of the same step anew
        (generation, for what refills thrown away groups) is no new phase, but a sign of life: from then on it may take
        as long as the whole phase usually does.
        """
        now = self.clock()
        if record.get("kind") == "error":
            self.phase, self.since = ENDING, now
        if record.get("kind") not in ("doing", "phase"):
            return
        phase, step = record["phase"] if record["kind"] == "doing" else record["text"], record.get("step")
        if (phase, step) != (self.phase, self.step):
            self.durations.setdefault(self.phase, []).append(now - self.began)
            self.phase, self.step, self.began, self.told = phase, step, now, 0
            self.passed.append((record.get("time", time.time()), self.where))
        self.since = now

    @property
    def where(self) -> str:
        """The present phase, and of which step it is."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def where_at(self, time: float) -> str:
        """The phase of a moment."""
        return next((where for began, where in reversed(self.passed) if began <= time), "starting")

    def limit(self) -> float:
        """Seconds that the present phase may take; infinite where it is the first of its kind."""
        if not self.patience:
            return float("inf")
        if self.phase == ENDING:
            return ENDING_S
        usual = self.durations.get(self.phase)
        least = _OUTSIDE.get(self.phase, LEAST_S)
        return max(least, self.patience * statistics.median(usual)) if usual else float("inf")

    def fault(self) -> str:
        """What is wrong with the run now. To be called often; looks at its processes every `LOOK_S` seconds."""
        now = self.clock()
        if (asleep := now - self.asked) > ASLEEP_S:
            self.began, self.since, self.worked = (one + asleep for one in (self.began, self.since, self.worked))
            self.dead = {pid: since + asleep for pid, since in self.dead.items()}
        self.asked = now
        usual = self.durations.get(self.phase)
        if now - self.since > self.limit():
            often = f" ({statistics.median(usual):.0f} s are usual)" if usual else ""
            return f"{self.where} has taken {now - self.since:.0f} s{often}: the run hangs"
        if self.phase == ENDING:
            return ""
        if now - self.looked >= LOOK_S:
            self.looked = now
            self.look()
        idle = now - max(self.since, self.worked)
        if self.patience and self.alone and not usual and idle > FIRST_S:
            return f"no process of the run has worked for {idle:.0f} s in {self.where}: the run hangs"
        for pid, since in self.dead.items():
            if now - since > (RAY_GRACE_S if self.vital[pid] in RAY else GRACE_S):
                return f"{self.vital[pid]} (process {pid}) died during {self.where}"
        return ""

    def warning(self) -> str:
        """What a user should hear of a phase whose usual time is not known, once an hour; "" else."""
        hours = int((self.clock() - self.since) // FIRST_S)
        if self.limit() < float("inf") or not self.patience or hours <= self.told:
            return ""
        self.told = hours
        return (
            f"{self.where} has taken {hours} h; it is the first of its kind in this attempt, so that nobody knows how "
            "long it should take: stop the run by Ctrl-C if it hangs"
        )

    def look(self) -> None:
        """Which processes of this run live, since when others do not, and whether any of them works."""
        now, promised = self.clock(), listening(self.stacks)
        living, seconds, waiting = {}, {}, False
        for process in psutil.Process().children(recursive=True):
            try:
                with process.oneshot():
                    status = process.status()
                    if status == psutil.STATUS_ZOMBIE:
                        continue
                    living[process.pid] = title(process)
                    seconds[process.pid] = sum(process.cpu_times()[:2])
                    waiting |= status == psutil.STATUS_DISK_SLEEP
            except psutil.Error:  # gone meanwhile, or another user's
                continue
        for pid, what in living.items():
            if (pid in promised and what.startswith(_VITAL)) or what in RAY:
                self.vital[pid] = what
                self.seen[pid] = time.time()
        for pid in self.vital:
            if pid not in living:
                self.dead.setdefault(pid, now)
                self.missed.setdefault(pid, time.time())
        if waiting:
            self.worked = now
        if (span := now - self.weighed) >= WEIGH_S:
            if any(used - self.seconds.get(pid, 0) > BUSY * span for pid, used in seconds.items()):
                self.worked = now
            self.seconds, self.weighed = seconds, now

"""Detecting a run that hangs, or that goes on without one of its processes."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from verl_aqn.runs.phases import ENDING, TRACKERS
from verl_aqn.runs.processes import title
from verl_aqn.runs.stacks import listening

LEAST_S = 60  # no phase is reported before it has taken this long
FIRST_S = 3600  # how long all processes may be idle in a phase whose usual time is not known yet
ENDING_S = 300  # from a run's last record to its end
GRACE_S = 3  # for a run to report why one of its processes died
RAY_GRACE_S = 2  # for the run to report its end; Ray does not report the loss of its head for a minute
LOOK_S = 2
ASLEEP_S = 30  # if fault() was not called for this long, this process was stopped, and the run with it
WEIGH_S = 60  # the interval over which processor use is measured
BUSY = 0.05  # fraction of a core above which a process is not idle; idle processes of a run use 0.005
# Phases that wait for something outside the run: a server that retries, a network disk.
_OUTSIDE = {TRACKERS: 3600, "checkpoint": 600}
RAY = ("raylet", "gcs_server")  # not Python, so they write no stack files; a run cannot go on without them
# The actors that a run needs. Processes that a user's own code starts may come and go.
_ACTORS = (
    "AqnTaskRunner", "WorkerDict", "AqnHttpServer", "AqnAgentLoopWorker", "RewardLoopWorker",
    "GlobalRequestLoadBalancer", "SimpleStorageUnit", "TransferQueueController",
)  # fmt: skip
_VITAL = ("VLLM::", *(f"ray::{name}" for name in _ACTORS))


class Watchdog:
    """Watch the records (`record`) and processes of a run; `fault()` says what is wrong, "" if nothing is.

    A phase hangs if it takes longer than `hang_timeout_factor` times the median of its earlier durations and longer
    than `LEAST_S` (`_OUTSIDE` has larger minimums). In the first occurrence of a phase, the run hangs if no process of
    it has worked for `FIRST_S`; this check is skipped if processes are on machines that this one cannot see
    (`alone=False`). With `hang_timeout_factor` 0 no phase counts as hanging. `clock`: returns seconds since any fixed
    moment.
    """

    def __init__(
        self,
        hang_timeout_factor: float,
        stacks: Path,
        *,
        alone: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hang_timeout_factor = hang_timeout_factor
        self.stacks = stacks
        self.alone = alone
        self.clock = clock
        self.phase, self.step = "starting", None
        now = clock()
        self.began = self.since = now  # start of the phase; start of the present wait
        self.durations: dict[str, list[float]] = {}
        self.vital: dict[int, str] = {}
        self.dead: dict[int, float] = {}
        self.last_check = self.worked = self.weighed = now
        self.looked = now - LOOK_S
        self.seconds: dict[int, float] = {}  # processor seconds of each process at `weighed`
        self.told = 0  # hours of the present phase that were reported
        # In seconds since the epoch, like the times of records and errors: when each process was last seen alive, when
        # it was first missing, and when phases began.
        self.seen: dict[int, float] = {}
        self.missed: dict[int, float] = {}
        self.passed: list[tuple[float, str]] = []

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Take note of a record: kinds `doing` (every step) and `phase` (start of a run) begin a phase.

        Record times are not used for durations: a clock may be set, and may be another machine's. If the same phase of
        the same step starts again (generation that replaces discarded groups), this is not a new phase but a sign of
        life: from then on the phase may take as long as the whole phase usually does.
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
        """The present phase and its step."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def where_at(self, time: float) -> str:
        """Return the phase at the given time (seconds since the epoch)."""
        return next((where for began, where in reversed(self.passed) if began <= time), "starting")

    def limit(self) -> float:
        """Return how many seconds the present phase may take; infinite in the first occurrence of the phase."""
        if not self.hang_timeout_factor:
            return float("inf")
        if self.phase == ENDING:
            return ENDING_S
        usual = self.durations.get(self.phase)
        least = _OUTSIDE.get(self.phase, LEAST_S)
        return max(least, self.hang_timeout_factor * statistics.median(usual)) if usual else float("inf")

    def fault(self) -> str:
        """Return what is wrong with the run now, "" if nothing is.

        Call this often; it checks the processes every `LOOK_S` seconds.
        """
        now = self.clock()
        if (asleep := now - self.last_check) > ASLEEP_S:
            self.began, self.since, self.worked = (one + asleep for one in (self.began, self.since, self.worked))
            self.dead = {pid: since + asleep for pid, since in self.dead.items()}
        self.last_check = now
        usual = self.durations.get(self.phase)
        if now - self.since > self.limit():
            often = f" (usually {statistics.median(usual):.0f} s)" if usual else ""
            return f"{self.where} has taken {now - self.since:.0f} s{often}: the run hangs"
        if self.phase == ENDING:
            return ""
        if now - self.looked >= LOOK_S:
            self.looked = now
            self.look()
        idle = now - max(self.since, self.worked)
        if self.hang_timeout_factor and self.alone and not usual and idle > FIRST_S:
            return f"all processes of the run were idle for {idle:.0f} s in {self.where}: the run hangs"
        for pid, since in self.dead.items():
            if now - since > (RAY_GRACE_S if self.vital[pid] in RAY else GRACE_S):
                return f"{self.vital[pid]} (process {pid}) died during {self.where}"
        return ""

    def warning(self) -> str:
        """Return a warning, once an hour, about a phase whose usual time is not known; "" otherwise."""
        hours = int((self.clock() - self.since) // FIRST_S)
        if self.limit() < float("inf") or not self.hang_timeout_factor or hours <= self.told:
            return ""
        self.told = hours
        return (
            f"{self.where} has taken {hours} h. This attempt has no earlier phase of this kind to compare with: "
            "stop the run with Ctrl-C if it hangs"
        )

    def look(self) -> None:
        """Check which processes of this run live, since when the others do not, and whether any of them works."""
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
            except psutil.Error:  # ended meanwhile, or another user's
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

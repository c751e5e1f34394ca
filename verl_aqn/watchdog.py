"""Notice a run that hangs, or goes on without one of its processes."""

import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from verl_aqn.stacks import listening

LEAST_S = 60  # no phase is late before
FIRST_S = 3600  # a phase that has not been seen in this attempt
ENDING_S = 300  # from a run's last word to its end
GRACE_S = 3  # for a run to say itself why a process of it died
RAY_GRACE_S = 2  # for the run's own word that it ends: of its head's loss Ray says nothing for a minute
LOOK_S = 2
ENDING = "ending"  # the phase in which processes may go
RAY = ("raylet", "gcs_server")  # no Python, so they promise nothing; without them nothing works
_PASSING = "vllm.model_executor.models.registry"  # looks at an architecture that vLLM meets first, and ends


class Watchdog:
    """Told of the run's records (`record`); `fault()` says what is wrong, "" where nothing is.

    A phase is late after `patience` times the median of its earlier durations, and not before `LEAST_S`; one that is
    seen for the first time after `FIRST_S`. `patience` 0: never. Times are seconds since the epoch, as in the records.
    """

    def __init__(self, patience: float, stacks: Path) -> None:
        self.patience = patience
        self.stacks = stacks
        self.phase, self.step = "starting", None
        self.began = self.since = time.time()  # of the phase; of what it is patient with
        self.durations: dict[str, list[float]] = {}
        self.vital: dict[int, str] = {}
        self.dead: dict[int, float] = {}
        self.seen: dict[int, float] = {}  # when each was last seen alive
        self.passed: list[tuple[float, str]] = []  # beginnings of phases, in their order
        self.looked = 0.0

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Phases begin with records of the kinds `doing` (every step) and `phase` (the start of a run).

        The same phase of the same step anew (generation, for what refills thrown away groups) is no new phase, but a
        sign of life: from then on it may take as long as the whole phase usually does.
        """
        if record.get("kind") == "error":
            self.phase, self.since = ENDING, time.time()
        if record.get("kind") not in ("doing", "phase"):
            return
        phase, step = record["phase"] if record["kind"] == "doing" else record["text"], record.get("step")
        if (phase, step) != (self.phase, self.step):
            self.durations.setdefault(self.phase, []).append(record["time"] - self.began)
            self.phase, self.step, self.began = phase, step, record["time"]
            self.passed.append((record["time"], self.where))
        self.since = record["time"]

    @property
    def where(self) -> str:
        """The present phase, and of which step it is."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase

    def where_at(self, time: float) -> str:
        """The phase of a moment."""
        return next((where for began, where in reversed(self.passed) if began <= time), "starting")

    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if not self.patience:
            return float("inf")
        if self.phase == ENDING:
            return ENDING_S
        usual = self.durations.get(self.phase)
        return max(LEAST_S, self.patience * statistics.median(usual)) if usual else FIRST_S

    def fault(self) -> str:
        """What is wrong with the run now. Looks at its processes every `LOOK_S` seconds."""
        now = time.time()
        if now - self.since > self.limit():
            usual = self.durations.get(self.phase)
            often = f"{statistics.median(usual):.0f} s are usual" if usual else "it was the first of its kind"
            return f"{self.where} has taken {now - self.since:.0f} s ({often}): the run hangs"
        if self.phase == ENDING:
            return ""
        if now - self.looked > LOOK_S:
            self.looked = now
            self.look(now)
        for pid, since in self.dead.items():
            if now - since > (RAY_GRACE_S if self.vital[pid] in RAY else GRACE_S):
                return f"{self.vital[pid]} (process {pid}) died during {self.where}"
        return ""

    def look(self, now: float) -> None:
        """Which processes of this run live, and since when others do not."""
        promised = listening(self.stacks)
        living = {}
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    living[process.pid] = title(process)
            except psutil.NoSuchProcess:
                continue
        for pid, what in living.items():
            if (pid in promised and what != _PASSING) or what in RAY:
                self.vital[pid] = what
                self.seen[pid] = now
        for pid, what in self.vital.items():
            if pid not in living and "IDLE" not in what:  # Ray ends workers that have nothing to do
                self.dead.setdefault(pid, now)


def title(process: psutil.Process) -> str:
    """What a process calls itself: "ray::AqnActorWorker", "VLLM::Worker", "raylet"."""
    line = process.cmdline()
    if not line:
        return process.name()
    first = line[0].split()[0] if line[0].startswith(("ray::", "VLLM::")) else Path(line[0]).name
    if first.startswith("python") and "-m" in line[:-1]:
        return line[line.index("-m") + 1]
    # A named actor has its name, too, while it is created: "ray::agent_loop_worker_0:AgentLoopWorker.__init__".
    return f"ray::{first.rpartition(':')[2].partition('.')[0]}" if first.startswith("ray::") else first
